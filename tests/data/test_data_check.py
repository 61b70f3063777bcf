"""The data doctor: each problem is found, counted and placed; the views show it."""

import io

import numpy as np
import pytest
from rich.console import Console

from jaxpost import data


def problems(check):
    return {problem.name: problem for problem in check.problems}


def printed(renderable, **settings):
    settings = {"width": 160, "force_terminal": False, **settings}
    console = Console(file=io.StringIO(), **settings)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def clean(word_tokenizer):
    """Padding apart from the end, so that only the data can be at fault."""
    ids = {"eos_token_id": 0, "pad_token_id": 6}
    return data.make_tokenizer(word_tokenizer.backend, ids)


def test_clean_data_have_no_problems(write, clean):
    path = write(
        [{"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "c"}]
    )
    check = data.check_data(path, clean)
    assert check.problems == ()
    assert check.ok
    assert check.rows == 2
    np.testing.assert_array_equal(check.lengths, [3, 3])
    assert check.supervised == pytest.approx(4 / 6)
    assert "no problems found" in printed(data.render_check(check, clean))


def test_bad_rows_are_counted_by_reason(write, clean):
    path = write(
        [
            {"text": "a b"},
            b"?",
            {"text": ""},
            {"text": " "},
            {"text": "a b c d e f"},
            {"txt": ""},
            {"prompt": "a b", "completion": 3},
        ]
    )
    check = data.check_data(path, clean, max_length=4)
    found = problems(check)
    assert not check.ok
    assert {name: problem.count for name, problem in found.items()} == {
        "nothing_supervised": 2,
        "not_json": 1,
        "too_long": 1,
        "wrong_column": 1,
        "wrong_type": 1,
    }
    assert found["nothing_supervised"].rows == ("row 3", "row 4")
    assert found["too_long"].rows == ("row 5",)
    text = printed(data.render_check(check, clean))
    assert "nothing_supervised" in text
    assert "row 3; row 4" in text


def test_double_bos(write, bos_tokenizer):
    check = data.check_data(write([{"text": "<s>the"}]), bos_tokenizer)
    assert problems(check)["double_bos"].count == 1


def test_pad_equal_to_eos_is_a_note(write, word_tokenizer):
    check = data.check_data(write([{"text": "a b"}]), word_tokenizer)
    (problem,) = check.problems
    assert (problem.name, problem.severity) == ("pad_is_eos", "note")
    assert check.ok


def test_truncated_answers_lose_their_end(write, clean):
    path = write([{"text": "a b"}, {"text": "a b c d e"}])
    found = problems(data.check_data(path, clean, max_length=4, on_too_long="truncate"))
    assert found["truncated"].rows == ("row 2",)
    assert found["stop_token_unsupervised"].rows == ("row 2 ends in 4",)
    assert {problem.severity for problem in found.values()} == {"error"}


def test_unsupervised_stop_token(write, clean):
    path = write([{"text": "a b"}, {"text": "a c </s>"}])
    found = problems(data.check_data(path, clean, append_eos=False))
    assert found["stop_token_unsupervised"].count == 1
    assert found["special_text"].rows == ("row 2 ('</s>')",)


def test_token_merge(write, byte_tokenizer):
    path = write(
        [
            {"prompt": "hel", "completion": "lo"},
            {"prompt": "hello", "completion": " there"},
        ]
    )
    found = problems(data.check_data(path, byte_tokenizer))
    assert found["token_merge"].rows == ("row 1",)
    assert found["token_merge"].severity == "note"


def test_duplicates(write, clean):
    pair = {"prompt": "a ", "chosen": "b", "rejected": "c"}
    path = write(
        [{"text": "a b"}, {"text": "a c"}, {"text": "a b", "id": 3}, pair, pair]
    )
    found = problems(data.check_data(path, clean))
    assert found["duplicates"].count == 2
    assert found["duplicates"].rows == ("row 3 = row 1", "row 5 = row 4")


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_length_bias(write, clean, longer):
    shorter = "rejected" if longer == "chosen" else "chosen"
    words = "abcdef"
    pairs = [
        {"prompt": f"{p} {q} ", longer: f"{r} a b", shorter: "a"}
        for p in words
        for q in words
        for r in words[:1]
    ]
    found = problems(data.check_data(write(pairs), clean))
    assert found["length_bias"].count == 36
    side = "36 of 36" if longer == "chosen" else "0 of 36"
    assert f"longer one in {side} pairs" in found["length_bias"].what


def test_balanced_lengths_are_no_bias(write, clean):
    pairs = []
    for k, word in enumerate("abcdef"):
        long, short = ("chosen", "rejected") if k % 2 else ("rejected", "chosen")
        pairs.append({"prompt": f"{word} ", long: "a b", short: "a"})
    assert data.check_data(write(pairs), clean).problems == ()


def negatives(*texts, **columns):
    return {"prompt": "a ", "completion": "b c", "negatives": list(texts), **columns}


def test_negatives_without_fault(write, clean):
    rows = [negatives("c", "d"), negatives("d", "e", prompt="b ")]
    check = data.check_data(write(rows), clean, negative_columns=2)
    assert check.problems == ()
    np.testing.assert_array_equal(check.lengths, [4, 3, 3, 4, 3, 3])
    assert len(check.examples) == 2


@pytest.mark.parametrize(
    ("row", "name", "severity", "words", "place"),
    [
        (
            negatives("c", " "),
            "nothing_supervised",
            "error",
            r"negatives[1]: the text to train on is empty",
            "row 2",
        ),
        (
            negatives("c", "d e f a"),
            "too_long",
            "error",
            "negatives[1]: 6 tokens where at most 5 fit",
            "row 2",
        ),
        (
            {"prompt": "a ", "completion": "b"},
            "wrong_column",
            "error",
            "no column 'negatives'",
            "row 2",
        ),
        (
            negatives("d", "b c"),
            "negative_equal",
            "warning",
            "is the right answer",
            "row 2 (negatives[1])",
        ),
        (
            negatives("d", "e", "d", "d"),
            "negative_repeated",
            "note",
            "the same as an earlier one",
            "row 2 (negatives[2], negatives[3])",
        ),
        (
            negatives("d", "e", negative_finished=[False, True]),
            "negative_cut",
            "warning",
            "was cut when sampled",
            "row 2 (negatives[0])",
        ),
        (
            negatives("d", "e </s> f"),
            "special_text",
            "warning",
            "special token",
            "row 2 ('</s>')",
        ),
        (
            {**negatives("e", "f"), "prompt": "f "},
            "duplicate_id",
            "error",
            "the id of an earlier row",
            "row 2 = row 1",
        ),
    ],
)
def test_each_fault_of_negatives_is_found(
    row, name, severity, words, place, write, clean
):
    """And none of them where rows are trained on without their negatives."""
    path = write([negatives("d", "e", prompt="f "), row])
    check = data.check_data(path, clean, max_length=5, negative_columns=None)
    found = problems(check)
    assert set(found) == {name}
    problem = found[name]
    assert (problem.count, problem.severity) == (1, severity)
    assert words in problem.what
    assert problem.rows == (place,)
    if name != "duplicate_id":
        assert data.check_data(path, clean, max_length=5).problems == ()


def test_negatives_are_cut_named_and_counted_once_per_row(write, clean):
    path = write([negatives("c d e", "d", "c d e f", completion="b")])
    settings = {"max_length": 4, "on_too_long": "truncate", "negative_columns": 4}
    found = problems(data.check_data(path, clean, **settings))
    assert found["truncated"].count == 1
    assert found["truncated"].rows == ("row 1 (negatives[0], negatives[2])",)
    assert found["stop_token_unsupervised"].rows == found["truncated"].rows
    assert found["few_negatives"].rows == ("row 1 (3 of 4)",)
    # Only the columns that training takes are looked at.
    settings |= {"negative_columns": 2, "max_length": 5}
    assert data.check_data(path, clean, **settings).problems == ()


def test_settings_that_cannot_work_are_raised(write, clean):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="no chat template"):
        data.check_data(write([{"messages": chat}]), clean)
    with pytest.raises(data.DataError, match="holds no rows"):
        data.check_data(write([]), clean)


def test_view_of_a_packed_row(word_tokenizer, row):
    examples = [
        data.encode_row(row(prompt="a ", completion="b"), word_tokenizer),
        data.encode_row(row(text="c d"), word_tokenizer),
    ]
    (packed,) = data.pack(examples, 7)
    views = data.view_tokens(packed, word_tokenizer)
    assert [view.segment for view in views] == [1, 1, 1, 2, 2, 2, 0]
    assert [view.position for view in views] == [0, 1, 2, 0, 1, 2, 0]
    assert [view.text for view in views[:3]] == ["a", "b", "</s>"]
    # The end of one example does not predict the beginning of the next.
    assert [view.label for view in views] == [2, 0, -100, 4, 0, -100, -100]


def test_token_table_has_colours(word_tokenizer, row):
    example = data.encode_row(row(prompt="a ", completion="b c"), word_tokenizer)
    plain = printed(data.render_tokens(example, word_tokenizer)).splitlines()
    assert plain[0].split() == [
        "#",
        "id",
        "token",
        "mask",
        "label",
        "position",
        "segment",
    ]
    assert plain[1].split() == ["0", "1", "a", "no", "2", "0", "1"]
    assert plain[4].split() == ["3", "0", "</s>", "yes", "-100", "3", "1"]
    coloured = printed(
        data.render_tokens(example, word_tokenizer),
        force_terminal=True,
        color_system="standard",
        no_color=False,
    )
    assert "\x1b[32mb" in coloured  # green: trained on
    assert "\x1b[7;32m</s>" in coloured  # reversed: ends the text


def test_long_examples_are_shortened_and_controls_made_visible(
    clean, byte_tokenizer, row
):
    example = data.encode_row(row(text="a b c d e f " * 5), clean)
    table = printed(data.render_tokens(example, clean, limit=6))
    assert "…" in table
    assert len(table.splitlines()) == 8
    assert "…" in str(data.render_text(example, clean, limit=6))
    whole = data.render_tokens(example, clean, limit=None)
    assert whole.row_count == len(example)
    escape = data.encode_row(row(text="hello\x1b[31m there"), byte_tokenizer)
    text = str(data.render_text(escape, byte_tokenizer))
    assert "\x1b" not in text
    assert text.endswith(" there<|im_end|>")


@pytest.mark.slow
def test_checks_of_real_pairs(shared_data):
    tokenizer = data.load_tokenizer(shared_data / "tokenizers" / "phi3_mini")
    check = data.check_data(
        shared_data / "preferences" / "ultrafeedback_train_500.jsonl.gz",
        tokenizer,
        max_length=1024,
        limit=120,
    )
    assert check.rows >= 120
    found = problems(check)
    assert {"too_long", "nothing_supervised"} <= set(found)
    text = printed(data.render_check(check, tokenizer))
    assert "<|assistant|>" in text
