"""Pairs: rows of `[2, T]`, ids in halves, and the built-in pairs."""

import numpy as np
import pytest

from jaxpost import data


def example(length, start=1, seed=0):
    tokens = np.random.default_rng(seed).integers(3, 90, length).astype(np.int32)
    mask = np.arange(length) >= start
    return data.Example(tokens, mask)


def pair(one, two, id=7):
    return data.Pair(example(one, seed=one), example(two, seed=100 + two), id)


def test_both_answers_lie_in_one_row_of_the_smallest_bucket():
    pairs = [pair(3, 5), pair(6, 2), pair(4, 4)]
    rows = data.pad_pairs(pairs, (4, 8), pad_id=9)
    assert [row["tokens"].shape for row in rows] == [(2, 8), (2, 8), (2, 4)]
    for row, source in zip(rows, pairs, strict=True):
        for side, answer in enumerate((source.chosen, source.rejected)):
            n = len(answer)
            np.testing.assert_array_equal(row["tokens"][side, :n], answer.tokens)
            assert np.all(row["tokens"][side, n:] == 9)
            np.testing.assert_array_equal(row["loss_mask"][side, :n], answer.loss_mask)
            assert not row["loss_mask"][side, n:].any()
            np.testing.assert_array_equal(row["positions"][side, :n], np.arange(n))
            assert row["segment_ids"][side].tolist() == [1] * n + [0] * (
                len(row["segment_ids"][side]) - n
            )


def test_an_answer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 tokens do not fit rows of 1 to 8"):
        data.pad_pairs([pair(3, 9)], (4, 8))
    with pytest.raises(ValueError, match="at least one length"):
        data.pad_pairs([pair(3, 3)], ())


@pytest.mark.parametrize("id", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 123 << 40])
def test_an_id_survives_its_halves(id):
    halves = data.split_id(id)
    assert halves.dtype == np.uint32
    assert int(data.join_ids(halves)) == id
    assert data.join_ids(np.stack([halves, halves])).tolist() == [id, id]


def test_batches_of_pairs_keep_their_place_and_columns():
    pairs = [pair(3 + n % 5, 4 + n % 3, id=1000 + n) for n in range(20)]
    rows = data.pad_pairs(pairs, 8)
    rows = data.with_columns(rows, {"ref": np.arange(20, dtype=np.float32)})
    batches = data.Batches(rows, 4, seed=3)
    first = [next(batches) for _ in range(3)]
    place = batches.state()
    rest = [next(batches) for _ in range(4)]
    again = data.Batches(rows, 4, seed=3)
    again.restore(place)
    for one, two in zip(rest, again, strict=False):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert first[0]["tokens"].shape == (4, 2, 8)
    assert first[0]["ref"].shape == (4,)
    for batch in first + rest:  # what belongs together stays together
        np.testing.assert_array_equal(
            data.join_ids(batch["example_id"]), 1000 + batch["ref"].astype(int)
        )
    halves = [
        data.Batches(rows, 4, seed=3, process_index=i, process_count=2).at(0)
        for i in (0, 1)
    ]
    both = np.concatenate([half["tokens"] for half in halves])
    np.testing.assert_array_equal(both, first[0]["tokens"])


def test_a_column_must_fit():
    rows = data.pad_pairs([pair(3, 4)], 8)
    with pytest.raises(ValueError, match="'ref' has 2 entries for 1 rows"):
        data.with_columns(rows, {"ref": np.zeros(2)})
    with pytest.raises(ValueError, match="have a column 'tokens' already"):
        data.with_columns(rows, {"tokens": np.zeros(1)})


def rows_of(**options):
    return list(data.arithmetic_pair_rows("train", **{"count": 300, **options}))


def test_the_right_answer_is_right_and_the_wrong_one_wrong():
    for row in rows_of():
        assert not row["flipped"]
        assert data.check_arithmetic_work(row["chosen"], row["answer"])
        assert not data.check_arithmetic_work(row["rejected"], row["answer"])
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("slip", ["copy", "calculation", "skip"])
def test_a_slip_is_what_it_says(slip):
    for row in rows_of(slips=slip, grades=(2, 3)):
        right, wrong = row["chosen"].splitlines(), row["rejected"].splitlines()
        if row["slip"] != slip:
            assert slip == "skip"  # its result would have been right
            continue
        assert wrong[-1] != right[-1] or slip == "skip"
        assert len(wrong) == len(right) - (slip == "skip")
        same_work = wrong[:-1] == right[: len(wrong) - 1]
        assert same_work == (slip != "calculation")


def test_flips_are_a_share_of_rows_and_nested():
    none, some, more = (rows_of(flip=flip) for flip in (0, 20, 40))
    flipped = [[row["flipped"] for row in rows] for rows in (some, more)]
    assert 0.1 < np.mean(flipped[0]) < 0.3 < np.mean(flipped[1]) < 0.5
    assert all(b or not a for a, b in zip(*flipped, strict=True))
    for clean, noisy in zip(none, more, strict=True):
        sides = [noisy["chosen"], noisy["rejected"]]
        assert sides[:: -1 if noisy["flipped"] else 1] == [
            clean["chosen"],
            clean["rejected"],
        ]
    assert rows_of(flip=40, count=50) == more[:50]


def test_bad_options_are_refused():
    with pytest.raises(data.DataError, match="flip must be a percentage"):
        list(data.read_rows("builtin:arithmetic_pairs?flip=101"))
    with pytest.raises(data.DataError, match="slips must be some of"):
        list(data.read_rows("builtin:arithmetic_pairs?slips=typo"))


def test_pairs_that_are_the_same_once_truncated_are_refused(word_tokenizer):
    words = word_tokenizer
    row = data.Row({"prompt": "a b ", "chosen": "c d e", "rejected": "c d f"}, "s", 1)
    assert data.encode_pair(row, words).id == data.encode_pair(row, words).id
    with pytest.raises(data.BadRow, match="same tokens once truncated"):
        data.encode_pair(row, words, max_length=4, on_too_long="truncate")


@pytest.mark.parametrize(
    ("file", "options", "count"),
    [
        ("hh_rlhf_harmless_base_test_part1.jsonl.gz", {}, 20),
        ("ultrafeedback_train_500.jsonl.gz", {}, 20),
        ("dpo_en_demo_300.jsonl.gz", {"format": "sharegpt"}, 20),
    ],
)
def test_published_layouts_load_as_pairs(shared_data, file, options, count):
    path = shared_data / "preferences" / file
    folder = shared_data / "tokenizers" / "phi3_mini"
    if not path.is_file() or not folder.is_dir():
        pytest.skip(f"real data not found: {file}")
    tokenizer = data.load_tokenizer(folder)
    report = data.BadRows()
    pairs = data.load_pairs(
        path, tokenizer, limit=count, on_bad_row="skip", report=report, **options
    )
    assert len(pairs) == count - report.total
    assert len(pairs) >= count - 2, report.summary()
    for found in pairs:
        sides = (found.chosen, found.rejected)
        starts = [int(np.argmax(side.loss_mask)) for side in sides]
        assert starts[0] == starts[1] > 1  # the prompt is the same, and given
        np.testing.assert_array_equal(
            sides[0].tokens[: starts[0]], sides[1].tokens[: starts[1]]
        )
        assert all(side.loss_mask[starts[0] :].all() for side in sides)
