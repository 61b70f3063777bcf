"""Packed and padded rows: every token once, segments apart, positions restarted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost import data

LENGTH = 16


def example(number, size):
    """Tokens that tell the example and the place; all but the first trained on."""
    tokens = np.arange(size, dtype=np.int32) + 100 * (number + 1)
    mask = np.arange(size) > 0
    return data.Example(tokens, mask, id=number, source="s", number=number + 1)


def segments(rows):
    """The examples that rows hold, read back by segment id."""
    found = []
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == segment
            found.append({name: array[inside] for name, array in row.items()})
    return found


@pytest.mark.parametrize("layout", [data.pack, data.pad])
@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, LENGTH), min_size=1, max_size=40))
def test_every_token_stands_exactly_once(layout, sizes):
    examples = [example(k, size) for k, size in enumerate(sizes)]
    rows = layout(examples, LENGTH, pad_id=7)
    found = sorted(segments(rows), key=lambda part: part["tokens"][0])
    assert len(found) == len(examples)
    for part, wanted in zip(found, examples, strict=True):
        np.testing.assert_array_equal(part["tokens"], wanted.tokens)
        np.testing.assert_array_equal(part["loss_mask"], wanted.loss_mask)
        np.testing.assert_array_equal(part["positions"], np.arange(len(wanted)))
    for row in rows:
        ids = row["segment_ids"]
        padded = ids == 0
        assert (row["tokens"][padded] == 7).all()
        assert not row["loss_mask"][padded].any()
        assert (row["positions"][padded] == 0).all()
        # Contiguous, in order, padding at the end.
        np.testing.assert_array_equal(np.diff(ids[~padded]) >= 0, True)
        assert not padded[: np.count_nonzero(~padded)].any()
        starts = np.flatnonzero(row["positions"][~padded] == 0)
        assert not row["loss_mask"][starts].any()
        assert {name: array.dtype for name, array in row.items()} == {
            "tokens": np.int32,
            "positions": np.int32,
            "segment_ids": np.int32,
            "loss_mask": np.bool_,
        }


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, LENGTH), min_size=1, max_size=40))
def test_best_fit_decreasing(sizes):
    rows = data.pack([example(k, size) for k, size in enumerate(sizes)], LENGTH)
    used: list[int] = []  # the plain way: longest first, into the fullest that fits
    for size in sorted(sizes, reverse=True):
        fitting = [k for k, total in enumerate(used) if total + size <= LENGTH]
        if fitting:
            used[max(fitting, key=lambda k: used[k])] += size
        else:
            used.append(size)
    filled = [np.count_nonzero(row["segment_ids"]) for row in rows]
    assert sorted(filled) == sorted(used)


def test_packing_by_hand():
    rows = data.pack([example(k, size) for k, size in enumerate([3, 6, 2, 5])], 8)
    np.testing.assert_array_equal(
        [row["segment_ids"] for row in rows],
        [[1, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2, 2, 2]],
    )
    np.testing.assert_array_equal(rows[0]["positions"], [0, 1, 2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(
        rows[0]["tokens"], [200, 201, 202, 203, 204, 205, 300, 301]
    )
    assert data.packing_efficiency(rows) == 1.0
    assert data.packing_efficiency([]) == 0.0


def test_packing_is_deterministic():
    examples = [example(k, 1 + (7 * k) % LENGTH) for k in range(50)]
    first, second = data.pack(examples, LENGTH), data.pack(examples, LENGTH)
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left["tokens"], right["tokens"])


def test_the_first_token_of_a_segment_is_never_trained_on():
    whole = data.Example(np.arange(4, dtype=np.int32), np.ones(4, bool))
    (row,) = data.pack([whole, whole], 8)
    np.testing.assert_array_equal(row["loss_mask"], [0, 1, 1, 1, 0, 1, 1, 1])


def test_padding_to_buckets():
    examples = [example(k, size) for k, size in enumerate([3, 9, 4, 16])]
    rows = data.pad(examples, [4, 10, 16])
    assert [row["tokens"].size for row in rows] == [4, 10, 4, 16]
    assert [row["tokens"][0] for row in rows] == [100, 200, 300, 400]
    batch = data.pad_batch(examples[:2], [4, 10, 16])
    assert batch["tokens"].shape == (2, 10)
    assert data.pad_batch(examples[:2])["tokens"].shape == (2, 9)
    assert data.pad_batch(examples[:2], 12)["loss_mask"].shape == (2, 12)


@pytest.mark.parametrize("layout", [data.pack, data.pad, data.pad_batch])
def test_what_does_not_fit_is_an_error(layout):
    with pytest.raises(
        ValueError, match="s, row 5: 9 tokens do not fit rows of 1 to 8"
    ):
        layout([example(4, 9)], 8)
    with pytest.raises(ValueError, match="0 tokens do not fit"):
        layout([example(0, 0)], 8)
    with pytest.raises(ValueError, match="at least 2 tokens, got length 1"):
        layout([example(0, 1)], 1)


def test_nothing_to_pad():
    with pytest.raises(ValueError, match="at least one example"):
        data.pad_batch([])
    with pytest.raises(ValueError, match="at least one length"):
        data.pad([example(0, 1)], [])
    with pytest.raises(ValueError, match="do not fit rows of 1 to 4"):
        data.pad_batch([example(0, 9)], [2, 4])
