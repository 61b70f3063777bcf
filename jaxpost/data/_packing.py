"""Token examples to rows of one length: packed or padded.

Both give the arrays of a language-model batch (see `jaxpost.typing.Batch`), so that a
packed and a padded run differ in nothing but layout. Knows no order of training.
"""

from collections.abc import Sequence

import numpy as np

from jaxpost.data._encode import Example

TokenRow = dict[str, np.ndarray]
"""`tokens`, `positions`, `segment_ids` int32 `[T]` and `loss_mask` bool `[T]`."""


def pack(
    examples: Sequence[Example], length: int, *, pad_id: int = 0
) -> list[TokenRow]:
    """Puts several examples into each row, as few rows as best fit decreasing finds.

    Longest first, each into the fullest row that still holds it; the same examples in
    the same order give the same rows. Segments are numbered from 1 and positions
    restart at 0 in each; segment 0 is padding.

    Args:
        examples: none longer than `length`.
        length: tokens per row.
        pad_id: token put where nothing is.

    Returns:
        Rows; each is a view into arrays that hold all of them.

    Raises:
        ValueError: an example is empty or longer than `length`.
    """
    _check_lengths(examples, length)
    bins = _best_fit_decreasing([len(example) for example in examples], length)
    return _fill([[examples[i] for i in members] for members in bins], length, pad_id)


def pad(
    examples: Sequence[Example],
    length: int | Sequence[int],
    *,
    pad_id: int = 0,
) -> list[TokenRow]:
    """Puts each example into a row of its own, filled up at the right.

    Args:
        examples: none longer than the greatest length.
        length: tokens per row; or several lengths (buckets), of which each example gets
            the smallest that holds it.
        pad_id: token put where nothing is.

    Returns:
        Rows in the order of the examples.

    Raises:
        ValueError: an example is empty or longer than the greatest length.
    """
    buckets = sorted({length} if isinstance(length, int) else set(length))
    if not buckets:
        raise ValueError("pad needs at least one length.")
    _check_lengths(examples, buckets[-1])
    rows: list[TokenRow] = [{}] * len(examples)
    by_bucket: dict[int, list[int]] = {bucket: [] for bucket in buckets}
    for index, example in enumerate(examples):
        by_bucket[next(b for b in buckets if len(example) <= b)].append(index)
    for bucket, members in by_bucket.items():
        filled = _fill([[examples[i]] for i in members], bucket, pad_id)
        for index, row in zip(members, filled, strict=True):
            rows[index] = row
    return rows


def pad_batch(
    examples: Sequence[Example],
    length: int | Sequence[int] | None = None,
    *,
    pad_id: int = 0,
) -> TokenRow:
    """One padded batch, arrays `[B, T]`.

    Args:
        examples: at least one.
        length: tokens per row; or several lengths, of which the smallest that holds all
            is taken; None takes the longest example's.
        pad_id: token put where nothing is.

    Raises:
        ValueError: there are no examples, or one is longer than the greatest length.
    """
    if not examples:
        raise ValueError("pad_batch needs at least one example.")
    longest = max(len(example) for example in examples)
    if length is None:
        length = longest
    elif not isinstance(length, int):
        length = min((n for n in length if n >= longest), default=max(length))
    return stack(pad(examples, length, pad_id=pad_id))


def stack(rows: Sequence[TokenRow]) -> TokenRow:
    """Rows of one length as a batch, arrays `[B, T]`."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def packing_efficiency(rows: Sequence[TokenRow]) -> float:
    """Share of the rows' tokens that is not padding, in `[0, 1]`."""
    total = sum(row["tokens"].size for row in rows)
    real = sum(int(np.count_nonzero(row["segment_ids"])) for row in rows)
    return real / total if total else 0.0


def _check_lengths(examples: Sequence[Example], length: int) -> None:
    if length < 2:
        raise ValueError(f"rows must hold at least 2 tokens, got length {length}.")
    for example in examples:
        if not 0 < len(example) <= length:
            raise ValueError(
                f"{example.source or 'an example'}, row {example.number}: "
                f"{len(example)} tokens do not fit rows of 1 to {length}; encode with "
                f"max_length={length}."
            )


def _best_fit_decreasing(sizes: Sequence[int], length: int) -> list[list[int]]:
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # stable
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]
    open_spaces = 0  # bit s is set where some bin has s tokens of space
    for index in order:
        size = sizes[index]
        fitting = open_spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                open_spaces ^= 1 << space
            bins[chosen].append(index)
        else:
            space, chosen = length, len(bins)
            bins.append([index])
        by_space[space - size].append(chosen)
        if space > size:
            open_spaces |= 1 << (space - size)
    return bins


def _fill(
    groups: Sequence[Sequence[Example]], length: int, pad_id: int
) -> list[TokenRow]:
    shape = (len(groups), length)
    arrays = {
        "tokens": np.full(shape, pad_id, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, bool),
    }
    for row, members in enumerate(groups):
        start = 0
        for segment, example in enumerate(members, start=1):
            end = start + len(example)
            arrays["tokens"][row, start:end] = example.tokens
            arrays["positions"][row, start:end] = np.arange(end - start)
            arrays["segment_ids"][row, start:end] = segment
            arrays["loss_mask"][row, start:end] = example.loss_mask
            # Before it stands another example's token, which must not predict it.
            arrays["loss_mask"][row, start] = False
            start = end
    return [
        {name: array[row] for name, array in arrays.items()}
        for row in range(len(groups))
    ]
