"""Rows with negatives: `[1 + columns, T]`, each epoch's columns, the built-in ones."""

import collections
import math

import numpy as np
import pytest

from jaxpost import data


@pytest.fixture
def answers(row, word_tokenizer):
    """Encodes a row of words a to f."""

    def encode(negatives=("c", "d e"), *, row_columns=None, **options):
        columns = {"prompt": "a b ", "completion": "c d", "negatives": list(negatives)}
        columns |= row_columns or {}
        return data.encode_answers(row(**columns), word_tokenizer, **options)

    return encode


def test_each_answer_follows_the_prompt_and_ends(answers):
    found = answers()
    assert [x.tokens.tolist() for x in found.texts] == [
        [1, 2, 3, 4, 0],
        [1, 2, 3, 0],
        [1, 2, 4, 5, 0],
    ]
    for text in found.texts:
        assert text.loss_mask.tolist() == [False] * 2 + [True] * (len(text) - 2)
    assert found.negative_logps is None
    assert len(answers(columns=1).negatives) == 1


def test_conversations_have_negatives_of_messages_or_texts(row, byte_tokenizer):
    def said(text):
        return [{"role": "assistant", "content": text}]

    columns = {
        "prompt": [{"role": "user", "content": "hello"}],
        "completion": said("Bye now"),
    }
    as_messages = row(**columns, negatives=[said("hello there"), said("you")])
    as_texts = row(**columns, negatives=["hello there", "you"])
    one, two = (data.encode_answers(r, byte_tokenizer) for r in (as_messages, as_texts))
    assert one.id == two.id
    for left, right in zip(one.texts, two.texts, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
    wrong = row(**columns, negatives=[[{"role": "nobody", "content": "x"}]])
    with pytest.raises(data.BadRow, match=r"'negatives\[0\]' has the role 'nobody'"):
        data.encode_answers(wrong, byte_tokenizer)


def test_an_id_is_given_or_that_of_prompt_and_answer(answers, word_tokenizer, row):
    plain = row(prompt="a b ", completion="c d")
    assert answers().id == data.encode_row(plain, word_tokenizer).id
    assert answers(["f"]).id == answers().id
    assert answers(row_columns={"id": 7}).id == 7
    named = answers(row_columns={"id": "7"}).id
    assert named not in (7, answers().id)
    assert 0 <= named < 2**63
    for bad in (-1, 2**63, 1.5, True, []):
        with pytest.raises(data.BadRow, match="'id' is .* where a text or an integer"):
            answers(row_columns={"id": bad})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"negatives": None}, "no column 'negatives'.*jaxpost negatives"),
        ({"prompt": None}, "no column 'prompt'"),
        ({"completion": None}, "no column 'completion'"),
        ({"negatives": "c"}, "'negatives' is no list of answers"),
        ({"negatives": ["c", 3]}, "'negatives' is no list of answers"),
        ({"negatives": [["c"]]}, "'negatives' is no list of answers"),
        ({"negatives": []}, "'negatives' is an empty list"),
        ({"negatives": ["c", " "]}, r"row 3: negatives\[1\]: .*empty"),
        ({"completion": ""}, "row 3: the text to train on is empty"),
        ({"negative_logps": [-1.0]}, "one number for each of 2 negatives.*1 entries"),
        ({"negative_logps": -1.0}, "one number for each of 2 negatives"),
        ({"negative_logps": [-1.0, "x"]}, "that are no numbers"),
        ({"negative_logps": [-1.0, math.inf]}, "not finite"),
    ],
)
def test_bad_rows(columns, words, answers):
    with pytest.raises(data.BadRow, match=words):
        answers(row_columns=columns)


def test_an_answer_that_is_too_long_is_named(answers):
    with pytest.raises(data.BadRow, match=r"negatives\[1\]: 5 tokens .* at most 4"):
        answers(["c", "c d"], row_columns={"completion": "c"}, max_length=4)
    cut = answers(["c d e f"], max_length=4, on_too_long="truncate")
    assert len(cut.negatives[0]) == 4


def test_an_id_that_comes_twice_is_refused_by_its_rows(write, word_tokenizer):
    lines = [
        {"prompt": "a ", "completion": x, "negatives": ["b"]} for x in ("c", "d", "c")
    ]
    path = write(lines)
    with pytest.raises(data.BadRow, match=r"row 3: has the id \d+ of row 1"):
        data.load_answers(path, word_tokenizer)
    report = data.BadRows()
    found = data.load_answers(path, word_tokenizer, on_bad_row="skip", report=report)
    assert len(found) == 2
    assert report.counts == {"duplicate_id": 1}
    lines[2]["id"] = "the copy"
    assert len(data.load_answers(write(lines), word_tokenizer)) == 3


def test_rows_hold_the_answer_first_then_the_columns(answers):
    items = [answers(["c", "d e", "f"]), answers(["c e", "c"], row_columns={"id": 5})]
    rows = data.pad_answers(items, (4, 8), pad_id=9)
    assert [row["tokens"].shape for row in rows] == [(3, 8), (3, 8)]
    assert rows[0]["tokens"][:, :5].tolist() == [
        [1, 2, 3, 4, 0],
        [1, 2, 3, 0, 9],
        [1, 2, 4, 5, 0],
    ]
    assert int(data.join_ids(rows[1]["example_id"])) == 5
    with pytest.raises(ValueError, match="row 3 has 2 negatives where 3 are needed"):
        data.pad_answers(items, 8, columns=3)


def test_repeated_and_equal_negatives_are_found_and_dropped(answers):
    item = answers(["e", "c d", "e", "e", "f", "e"])
    assert data.equal_answers(item).tolist() == [0, 1, 0, 0, 0, 0]
    # Only within a step's negatives: the next epoch may draw the same again.
    assert data.repeated_answers(item, group=2).tolist() == [0, 0, 0, 1, 0, 0]
    assert data.repeated_answers(item, group=6).tolist() == [0, 0, 1, 1, 0, 1]
    rows = data.pad_answers([item], 8)
    gone = np.array([[True, False, False, False, False, True]])
    (found,) = data.drop_answers(rows, gone)
    kept = [0, 2, 3, 4, 5]
    for name in ("tokens", "positions", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(found[name][kept], rows[0][name][kept])
    for name in ("positions", "segment_ids", "loss_mask"):
        assert not found[name][[1, 6]].any()


def rows_with_columns(count=12, columns=6):
    rng = np.random.default_rng(0)
    items = []
    for number in range(count):
        texts = [
            data.Example(np.full(4, 10 * number + place, np.int32), np.arange(4) > 1)
            for place in range(1 + columns)
        ]
        items.append(data.Answers(texts[0], tuple(texts[1:]), 2**40 + number))
    rows = data.pad_answers(items, 4)
    logps = rng.normal(size=(count, 1 + columns)).astype(np.float32)
    return data.with_columns(
        rows, {"ref_logps": logps, "example_index": np.arange(count, dtype=np.int32)}
    )


@pytest.mark.parametrize("sample", [True, False])
def test_each_epoch_takes_its_columns(sample):
    rows = rows_with_columns()
    batches = data.AnswerBatches(rows, 4, negatives=2, sample=sample, seed=1)
    plain = data.Batches(rows, 4, seed=1)
    for step in range(9):
        batch, whole = next(batches), plain.at(step)
        first = 1 + (2 * (step // 3) if sample else 0)
        np.testing.assert_array_equal(
            batch["tokens"], whole["tokens"][:, [0, first, first + 1]]
        )
        np.testing.assert_array_equal(
            batch["ref_logps"], whole["ref_logps"][:, [0, first, first + 1]]
        )
        np.testing.assert_array_equal(batch["example_index"], whole["example_index"])
        assert len(set(batch["example_index"].tolist())) == 4
    if sample:
        with pytest.raises(ValueError, match="2 negatives in each of 4 epochs are 8"):
            next(batches)


def test_the_place_belongs_to_the_columns():
    rows = rows_with_columns()
    batches = data.AnswerBatches(rows, 4, negatives=2)
    for _ in range(4):
        next(batches)
    place = batches.state()
    again = data.AnswerBatches(rows, 4, negatives=2)
    again.restore(place)
    np.testing.assert_array_equal(next(again)["tokens"], next(batches)["tokens"])
    for options in ({"negatives": 3}, {"negatives": 2, "sample": False}):
        with pytest.raises(ValueError, match="cannot resume the data order"):
            data.AnswerBatches(rows, 4, **options).restore(place)


def test_batches_refuse_an_id_that_comes_twice_and_too_few_columns():
    rows = rows_with_columns()
    with pytest.raises(ValueError, match="7 columns, but the rows have 6"):
        data.AnswerBatches(rows, 4, negatives=7)
    rows[3]["example_id"] = rows[8]["example_id"]
    with pytest.raises(ValueError, match=f"example ids {2**40 + 8} occur more than"):
        data.AnswerBatches(rows, 4, negatives=2)


def builtin(**options):
    return list(data.arithmetic_negative_rows("train", **{"count": 60, **options}))


def test_built_in_negatives_are_wrong_and_their_odds_are_known():
    for row in builtin(negatives=3):
        assert data.check_arithmetic_work(row["completion"], row["answer"])
        for negative in row["negatives"]:
            assert not data.check_arithmetic_work(negative, row["answer"])
    pairs = data.arithmetic_rows("train", count=60)
    assert [row["prompt"] for row in builtin()] == [row["prompt"] for row in pairs]
    # More columns are more draws, not other ones.
    for few, many in zip(builtin(negatives=2), builtin(negatives=5), strict=True):
        assert many["negatives"][:2] == few["negatives"]
    (row,) = builtin(count=1, grades=(2,), negatives=20_000)
    odds = dict(zip(row["negatives"], row["negative_logps"], strict=True))
    assert sum(map(math.exp, odds.values())) == pytest.approx(1.0)
    drawn = collections.Counter(row["negatives"])
    for negative, logp in odds.items():
        share, chance = drawn[negative] / 20_000, math.exp(logp)
        # Five standard deviations of a share.
        assert share == pytest.approx(chance, abs=5 * math.sqrt(chance / 20_000))
    with pytest.raises(data.DataError, match="negatives must be at least 1"):
        data.read_rows("builtin:arithmetic_negatives?negatives=0")
    with pytest.raises(data.DataError, match="slips must be some of"):
        data.read_rows("builtin:arithmetic_negatives?slips=typo")
