"""Preference pairs to rows: both answers of a pair in one row, `[2, T]`.

A batch is `[B, 2, T]`: however its pairs are split over devices or microbatches, the
two answers of a pair stay together, and the margin is computed where they lie. Knows no
order of training and no loss.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.data._encode import Example, Pair
from jaxpost.data._packing import TokenRow, pad, stack

CHOSEN, REJECTED = 0, 1
"""Places of the two answers along the axis of 2."""


def pad_pairs(
    pairs: Sequence[Pair], length: int | Sequence[int], *, pad_id: int = 0
) -> list[TokenRow]:
    """Puts each pair into a row of its own, both answers filled up at the right.

    Args:
        pairs: no answer, with its prompt, longer than the greatest length.
        length: tokens per answer; or several lengths (buckets), of which each pair gets
            the smallest that holds both its answers.
        pad_id: token put where nothing is.

    Returns:
        Rows in the order of the pairs: `tokens`, `positions`, `segment_ids` int32
        `[2, T]` and `loss_mask` bool `[2, T]`, chosen first; and `example_id`, uint32
        `[2]`, the halves of the pair's id (`join_ids` puts them back).

    Raises:
        ValueError: an answer is empty or longer than the greatest length.
    """
    return pad_together(
        [pair.texts for pair in pairs], [pair.id for pair in pairs], length, pad_id
    )


def pad_together(
    groups: Sequence[Sequence[Example]],
    ids: Sequence[int],
    length: int | Sequence[int],
    pad_id: int,
) -> list[TokenRow]:
    """Each group of texts in a row, `[texts, T]`; see `pad_pairs`."""
    buckets = sorted({length} if isinstance(length, int) else set(length))
    if not buckets:
        raise ValueError("rows need at least one length.")
    rows: list[TokenRow] = []
    for texts, id in zip(groups, ids, strict=True):
        longest = max(map(len, texts))
        bucket = next((b for b in buckets if b >= longest), buckets[-1])
        rows.append(stack(pad(texts, bucket, pad_id=pad_id)))
        rows[-1]["example_id"] = split_id(id)
    return rows


def split_id(id: int) -> np.ndarray:
    """An example's id in `[0, 2**64)` as uint32 `[2]`: JAX would cut 64 bits to 32."""
    return np.array([id >> 32, id & 0xFFFFFFFF], np.uint32)


def join_ids(halves: np.ndarray) -> np.ndarray:
    """Ids, int64 `[...]`, of their halves, uint32 `[..., 2]`; 0 in rows of padding."""
    halves = np.asarray(halves).astype(np.int64)
    return (halves[..., 0] << 32) | halves[..., 1]


def with_columns(
    rows: Sequence[TokenRow], columns: Mapping[str, np.ndarray]
) -> list[TokenRow]:
    """The rows with one number more of each column, such as a reference's log-probs.

    Args:
        rows: `n` rows.
        columns: arrays `[n, ...]` by name.

    Raises:
        ValueError: a column has another length, or the name of one that is there.
    """
    for name, column in columns.items():
        if len(column) != len(rows):
            raise ValueError(
                f"column {name!r} has {len(column)} entries for {len(rows)} rows."
            )
        if rows and name in rows[0]:
            raise ValueError(f"the rows have a column {name!r} already.")
    return [
        row | {name: np.asarray(column[index]) for name, column in columns.items()}
        for index, row in enumerate(rows)
    ]
