"""Rows to tokens: exact masks, stop tokens, no double BOS, every refusal."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost import data, ops

ASK = {"role": "user", "content": "how are you?"}
SAY = {"role": "assistant", "content": "I am fine"}
BYE = {"role": "assistant", "content": "Bye"}
# Ends turns in words only: nothing tells a reader to stop.
WORDS_ONLY = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Qwen 3's way: earlier turns lose what the last one keeps.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(example, tokenizer):
    """The runs of tokens trained on, as the vocabulary spells them."""
    runs, last = [], -2
    for index in np.flatnonzero(example.loss_mask):
        text = tokenizer.token_text(example.tokens[index]).replace("\u0120", " ")
        if index == last + 1:
            runs[-1] += text
        else:
            runs.append(text)
        last = index
    return runs


def test_six_tokens_by_hand(row, word_tokenizer):
    # prompt a b, completion c d e, end 0: six tokens; the answer and its end count.
    example = data.encode_row(row(prompt="a b ", completion="c d e"), word_tokenizer)
    np.testing.assert_array_equal(example.tokens, [1, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(example.loss_mask, [0, 0, 1, 1, 1, 1])
    targets, mask = ops.shift_targets(example.tokens[None], example.loss_mask[None])
    # The last token of the prompt predicts the first of the answer.
    np.testing.assert_array_equal(targets, [[2, 3, 4, 5, 0, 0]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1, 1, 0]])
    views = data.view_tokens(example, word_tokenizer)
    assert [view.label for view in views] == [-100, 3, 4, 5, 0, -100]
    assert [view.position for view in views] == list(range(6))
    assert example.tokens.dtype == np.int32
    assert example.loss_mask.dtype == bool


def test_text_trains_on_all_but_the_first(row, word_tokenizer):
    example = data.encode_row(row(text="a b"), word_tokenizer)
    np.testing.assert_array_equal(example.tokens, [1, 2, 0])
    np.testing.assert_array_equal(example.loss_mask, [0, 1, 1])
    ended = data.encode_row(row(text="a b </s>"), word_tokenizer)
    np.testing.assert_array_equal(ended.tokens, [1, 2, 0])
    open_end = data.encode_row(row(text="a b"), word_tokenizer, append_eos=False)
    np.testing.assert_array_equal(open_end.tokens, [1, 2])


def test_bos_stands_once_and_is_not_trained_on(row, bos_tokenizer):
    example = data.encode_row(row(text="the thank"), bos_tokenizer)
    assert list(example.tokens[:2]) == [1, *bos_tokenizer.encode("the")[:1]]
    assert list(example.loss_mask[:2]) == [False, True]
    assert example.tokens[-1] == 2
    for columns in (
        {"text": "<s>the"},
        {"prompt": "<s>the", "completion": " thank"},
    ):
        with pytest.raises(data.BadRow, match=r"sequence token twice; remove '<s>'"):
            data.encode_row(row(**columns), bos_tokenizer)
    with pytest.raises(data.BadRow, match="twice"):
        data.encode_prompt(row(prompt="<s>the"), bos_tokenizer)
    doubled = bos_tokenizer.with_chat_template("<s>" + bos_tokenizer.chat_template)
    with pytest.raises(data.BadRow, match="row 3: the tokens begin with"):
        data.encode_row(row(messages=[ASK, SAY]), doubled)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Question: what is 2 + 2? Answer:", " the answer"),
        ("Question: what is 2 + 2? Answer: ", "the answer"),
        ("hel", "lo there"),
        ("the answer is\n", "\n4"),
        ("", "hello there"),
    ],
)
def test_prompt_tokens_are_those_of_the_prompt_alone(
    kind, prompt, completion, row, request
):
    tokenizer = request.getfixturevalue(kind)
    given_row = row(prompt=prompt, completion=completion)
    example = data.encode_row(given_row, tokenizer)
    start = int(np.flatnonzero(example.loss_mask)[0])
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    if prompt:
        alone = [*bos, *tokenizer.encode(prompt)]
        assert list(example.tokens[:start]) == alone
        assert data.encode_prompt(given_row, tokenizer) == alone
    # Nothing is lost or added at the border.
    text = tokenizer.decode(example.tokens, skip_special=True)
    assert text == prompt + completion
    whole = [*bos, *tokenizer.encode(prompt + completion), tokenizer.eos_ids[0]]
    assert example.merged == (list(example.tokens) != whole)


def test_merges_across_the_border_are_told(row, byte_tokenizer):
    split = data.encode_row(row(prompt="hel", completion="lo"), byte_tokenizer)
    assert split.merged
    clean = data.encode_row(row(prompt="hello", completion=" there"), byte_tokenizer)
    assert not clean.merged


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=12), completion=st.text(min_size=1, max_size=12))
def test_any_border_is_exact(byte_tokenizer, prompt, completion):
    if not completion.strip() or not (prompt + completion).isprintable():
        return
    columns = {"prompt": prompt, "completion": completion}
    example = data.encode_row(data.Row(columns, "s", 1), byte_tokenizer)
    count = len(byte_tokenizer.encode(prompt))
    assert list(example.tokens[:count]) == byte_tokenizer.encode(prompt)
    assert not example.loss_mask[:count].any()
    assert example.loss_mask[max(count, 1) :].all()
    assert example.tokens[-1] == byte_tokenizer.eos_ids[0]
    assert byte_tokenizer.decode(example.tokens[:-1]) == prompt + completion


def test_chatml_turns(row, byte_tokenizer):
    messages = [ASK, SAY, ASK, BYE]
    example = data.encode_row(row(messages=messages), byte_tokenizer)
    assert trained(example, byte_tokenizer) == ["I am fine<|im_end|>", "Bye<|im_end|>"]
    text = byte_tokenizer.render(messages)
    assert list(example.tokens) == byte_tokenizer.encode(text)
    last = data.encode_row(row(messages=messages), byte_tokenizer, loss_on="last")
    assert trained(last, byte_tokenizer) == ["Bye<|im_end|>"]
    every = data.encode_row(row(messages=messages), byte_tokenizer, loss_on="all")
    np.testing.assert_array_equal(np.flatnonzero(~every.loss_mask), [0])


def test_completion_of_messages_trains_only_behind_the_prompt(row, byte_tokenizer):
    example = data.encode_row(
        row(prompt=[ASK, SAY, ASK], completion=[BYE]), byte_tokenizer
    )
    assert trained(example, byte_tokenizer) == ["Bye<|im_end|>"]
    mixed = data.encode_row(
        row(prompt=[ASK, SAY, ASK], completion="Bye"), byte_tokenizer
    )
    np.testing.assert_array_equal(mixed.tokens, example.tokens)
    text_first = data.encode_row(
        row(prompt="how are you?", completion=[SAY]), byte_tokenizer
    )
    assert trained(text_first, byte_tokenizer) == ["I am fine<|im_end|>"]


def test_prompt_of_a_conversation_is_what_was_trained_with(row, byte_tokenizer):
    messages = [ASK, SAY, ASK, BYE]
    example = data.encode_row(row(messages=messages), byte_tokenizer, loss_on="last")
    start = int(np.flatnonzero(example.loss_mask)[0])
    for columns in ({"messages": messages}, {"prompt": messages[:3]}):
        prompt = data.encode_prompt(row(**columns), byte_tokenizer)
        assert prompt == list(example.tokens[:start])
    assert data.encode_prompt(row(text="hello"), byte_tokenizer) == (
        byte_tokenizer.encode("hello")
    )
    pair = row(chosen=[ASK, SAY], rejected=[ASK, BYE])
    assert data.encode_prompt(pair, byte_tokenizer) == data.encode_prompt(
        row(prompt=[ASK]), byte_tokenizer
    )


def test_plain_template_with_bos(row, bos_tokenizer):
    example = data.encode_row(row(messages=[ASK, SAY, ASK, BYE]), bos_tokenizer)
    assert list(example.tokens).count(1) == 1
    runs = trained(example, bos_tokenizer)
    assert [run.replace("\u2581", " ") for run in runs] == [
        " I am fine</s>",
        " Bye</s>",
    ]


def test_a_template_without_end_tokens_is_refused(row, byte_tokenizer):
    words = byte_tokenizer.with_chat_template(WORDS_ONLY)
    conversation = row(messages=[ASK, SAY, ASK, BYE])
    with pytest.raises(data.BadRow, match=r"never stop \(ids \[2\]\); name the token"):
        data.encode_row(conversation, words)
    example = data.encode_row(conversation, words, append_eos=False)
    # Found by comparing with the rendering that ends there.
    newline = "\u010a"
    assert trained(example, words) == [f" I am fine{newline}", f" Bye{newline}"]


def test_end_of_turn_that_is_not_yet_an_end_is_refused(row, byte_tokenizer):
    backend = byte_tokenizer.backend
    other = data.make_tokenizer(backend, {"eos_token_id": 0}, chat_template="chatml")
    with pytest.raises(data.BadRow, match="no_stop_token|without an end-of-sequence"):
        data.encode_row(row(messages=[ASK, SAY]), other)
    both = data.make_tokenizer(
        backend, {"eos_token_id": [0, 2]}, chat_template="chatml"
    )
    example = data.encode_row(row(messages=[ASK, SAY, ASK, BYE]), both)
    assert trained(example, both) == ["I am fine<|im_end|>", "Bye<|im_end|>"]


def test_templates_that_rewrite_are_refused_unless_the_last_turn_is_asked(
    row, byte_tokenizer
):
    rewriting = byte_tokenizer.with_chat_template(REWRITES)
    thought = {"role": "assistant", "content": "<think>hm</think>I am fine"}
    conversation = row(messages=[ASK, thought, ASK, BYE])
    with pytest.raises(data.BadRow, match=r"changes the words of message 1; .*last"):
        data.encode_row(conversation, rewriting)
    example = data.encode_row(conversation, rewriting, loss_on="last")
    assert trained(example, rewriting) == ["Bye<|im_end|>"]
    # What comes before an answer depends on the answer: no border to be had.
    peeking = byte_tokenizer.with_chat_template(
        "{{ messages | length }}" + byte_tokenizer.chat_template
    )
    with pytest.raises(
        data.BadRow, match="renders what precedes message 1 differently"
    ):
        data.encode_row(row(messages=[ASK, SAY]), peeking)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ""}, "row 3: the text to train on is empty"),
        ({"prompt": "hi", "completion": " \n"}, "the text to train on is empty"),
        ({"messages": [ASK]}, "no message of the assistant"),
        ({"messages": [ASK, {**SAY, "content": ""}]}, "messages are empty"),
        ({"prompt": [ASK], "completion": [ASK]}, "no message of the assistant"),
        ({"messages": [SAY]}, "the conversation begins with the assistant"),
        ({"prompt": "hi"}, "the row has no answer where one text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a pair of answers"),
    ],
)
def test_rows_that_train_nothing_are_refused(row, byte_tokenizer, columns, message):
    with pytest.raises(data.BadRow, match=message):
        data.encode_row(row(**columns), byte_tokenizer)


def test_one_token_without_end_trains_nothing(row, word_tokenizer):
    with pytest.raises(data.BadRow, match="no token to train on; remove the row"):
        data.encode_row(row(text="a"), word_tokenizer, append_eos=False)


def test_templates_that_raise_are_bad_rows(row, byte_tokenizer):
    strict = byte_tokenizer.with_chat_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}" + byte_tokenizer.chat_template
    )
    conversation = [{"role": "system", "content": "S"}, ASK, SAY]
    with pytest.raises(data.BadRow, match="refuses it: no system; correct") as raised:
        data.encode_row(row(messages=conversation), strict)
    assert raised.value.reason == "template_error"
    with pytest.raises(data.BadRow, match="no system"):
        data.encode_prompt(row(messages=conversation), strict)


def test_no_template_is_a_setting_not_a_row(row, word_tokenizer):
    for encode in (data.encode_row, data.encode_prompt):
        with pytest.raises(ValueError, match=r"--data\.chat-template") as raised:
            encode(row(messages=[ASK, SAY]), word_tokenizer)
        assert not isinstance(raised.value, data.BadRow)


def test_too_long(row, word_tokenizer):
    long = row(prompt="a b ", completion="c d e")
    assert len(data.encode_row(long, word_tokenizer, max_length=6)) == 6
    with pytest.raises(data.BadRow, match="row 3: 6 tokens where at most 5 fit") as bad:
        data.encode_row(long, word_tokenizer, max_length=5)
    assert bad.value.reason == "too_long"
    cut = data.encode_row(long, word_tokenizer, max_length=4, on_too_long="truncate")
    assert cut.truncated
    np.testing.assert_array_equal(cut.tokens, [1, 2, 3, 4])
    with pytest.raises(data.BadRow, match="no token to train on once it is truncated"):
        data.encode_row(long, word_tokenizer, max_length=2, on_too_long="truncate")


def test_unknown_settings(row, word_tokenizer):
    with pytest.raises(ValueError, match="loss_on must be one of auto, all"):
        data.encode_row(row(text="a"), word_tokenizer, loss_on="answer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_too_long must be 'refuse' or 'truncate'"):
        data.encode_row(row(text="a"), word_tokenizer, on_too_long="cut")  # type: ignore[arg-type]
    with pytest.raises(data.BadRow, match="loss_on is 'completion', but the row is"):
        data.encode_row(row(text="a"), word_tokenizer, loss_on="completion")


def test_pairs_share_the_prompt(row, byte_tokenizer):
    pair = data.encode_pair(
        row(prompt="hello there,", chosen=" I am", rejected=" how are you"),
        byte_tokenizer,
    )
    assert trained(pair.chosen, byte_tokenizer) == [" I am<|im_end|>"]
    assert trained(pair.rejected, byte_tokenizer) == [" how are you<|im_end|>"]
    starts = [
        np.flatnonzero(side.loss_mask)[0] for side in (pair.chosen, pair.rejected)
    ]
    assert starts[0] == starts[1]
    swapped = data.encode_pair(
        row(prompt="hello there,", chosen=" how are you", rejected=" I am"),
        byte_tokenizer,
    )
    assert swapped.id != pair.id
    with pytest.raises(data.BadRow, match="no pair of answers"):
        data.encode_pair(row(text="a"), byte_tokenizer)
    with pytest.raises(data.BadRow, match="the same"):
        data.encode_pair(row(prompt="a", chosen="b", rejected="b"), byte_tokenizer)


def test_ids_follow_the_texts(row, word_tokenizer):
    one = data.encode_row(row(text="a b"), word_tokenizer)
    extra = data.encode_row(row(text="a b", source_name="x"), word_tokenizer)
    other = data.encode_row(row(text="a c"), word_tokenizer)
    assert one.id == extra.id != other.id
    assert 0 <= one.id < 2**63
    # The same in every process and release: checkpoints hold them.
    digest = hashlib.blake2b(b'{"text": "a b"}', digest_size=8).digest()
    assert one.id == int.from_bytes(digest, "big") // 2


def test_load_examples_skips_and_counts(write, word_tokenizer):
    path = write(
        [{"text": "a b"}, {"text": ""}, {"txt": "a"}, {"text": "a b c d e f"}, b"?"]
    )
    report = data.BadRows()
    examples = data.load_examples(
        path, word_tokenizer, max_length=5, on_bad_row="skip", report=report
    )
    assert [example.number for example in examples] == [1]
    assert report.rows == 5
    assert report.counts == {
        "nothing_supervised": 1,
        "wrong_column": 1,
        "too_long": 1,
        "not_json": 1,
    }
    with pytest.raises(data.BadRow, match="row 2: the text to train on is empty"):
        data.load_examples(path, word_tokenizer)
    none = write([{"text": ""}], "none.jsonl")
    with pytest.raises(data.DataError, match=r"no row can be used \(1 rows read, 1 sk"):
        data.load_examples(none, word_tokenizer, on_bad_row="skip")


def test_load_pairs(write, word_tokenizer):
    path = write([{"prompt": "a ", "chosen": "b", "rejected": "c"}])
    (pair,) = data.load_pairs(path, word_tokenizer)
    np.testing.assert_array_equal(pair.chosen.tokens, [1, 2, 0])
    np.testing.assert_array_equal(pair.rejected.loss_mask, [0, 1, 1])


def test_the_real_phi3_template(row, shared_data):
    tokenizer = data.load_tokenizer(shared_data / "tokenizers" / "phi3_mini")
    messages = [ASK, SAY, ASK, BYE]
    example = data.encode_row(row(messages=messages), tokenizer)
    # The template puts <|endoftext|> behind the whole conversation: with no generation
    # config beside this tokenizer it is the only end, and so is trained on.
    assert [run.replace("\u2581", " ") for run in trained(example, tokenizer)] == [
        " I am fine<|end|>",
        " Bye<|end|><|endoftext|>",
    ]
    assert list(example.tokens) == tokenizer.encode(tokenizer.render(messages))
    several = data.load_tokenizer(
        shared_data / "tokenizers" / "phi3_mini", eos_tokens=("<|end|>",)
    )
    assert several.eos_ids == (32007, 32000)
    example = data.encode_row(row(messages=messages), several)
    runs = trained(example, several)
    assert runs[1].replace("\u2581", " ") == " Bye<|end|>"


def test_real_gsm8k_on_stories(shared_data):
    tokenizer = data.load_tokenizer(shared_data / "weights" / "stories260K")
    report = data.BadRows()
    examples = data.load_examples(
        shared_data / "prompts" / "gsm8k_train_2000.jsonl",
        tokenizer,
        max_length=512,
        columns={"prompt": "question", "completion": "answer"},
        on_bad_row="skip",
        report=report,
    )
    assert report.rows == 2000
    assert report.counts == {"too_long": 2000 - len(examples)}
    assert 200 < report.total < 260
    assert all(example.tokens[0] == 1 for example in examples)
    assert all(example.tokens[-1] == 2 for example in examples)
    assert all(example.loss_mask[-1] for example in examples)
