"""Several answers to one prompt in one row, the prompt's tokens only once.

Rows `[A, T]` repeat the prompt in each of A sequences. Joined, `[W]`, they hold it
once, as the trunk, and the answers as its branches; segment ids tell them apart (see
`ops.predictors`). Knows tokens only: the prompt is what the sequences begin with alike,
up to the first token that is scored.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpost.data._packing import TokenRow
from jaxpost.typing import BRANCH

STEP = 64
"""Widths are multiples of it, so that few more rows make no new shape."""


def join_answers(
    batch: Mapping[str, np.ndarray], width: int | Mapping[int, int]
) -> dict[str, np.ndarray]:
    """A batch of rows `[A, T]` with each row's sequences in one, `[W]`.

    Args:
        batch: `tokens`, `positions`, `segment_ids` and `loss_mask`, each `[B, A, T]`,
            as `pad_pairs` and `pad_answers` give; sequence `a` of a row becomes branch
            `a + 1`. An empty sequence (padding only) becomes an empty branch. Other
            arrays stay as they are.
        width: W, or W by T.

    Returns:
        The batch with these four arrays `[B, W]`.

    Raises:
        ValueError: a row needs more than W tokens.
    """
    size = batch["tokens"].shape[-1]
    width = width if isinstance(width, int) else width[size]
    real = batch["segment_ids"] != 0
    prompts = _prompts(batch, real)
    own = real & (np.arange(size) >= prompts[:, None, None])
    lengths = own.sum(axis=2)
    ends = prompts[:, None] + lengths.cumsum(axis=1)
    longest = int(ends.max(initial=0))
    if longest > width:
        raise ValueError(
            f"a row of answers has {longest} tokens, its prompt counted once, where "
            f"{width} fit."
        )
    # Of each sequence, and of the trunk, which is that of the first one that is there.
    rows, answers, places = np.nonzero(own)
    starts = (ends - lengths)[rows, answers] - prompts[rows]
    first = _first_there(real)
    trunk_rows, trunk_places = np.nonzero(np.arange(size) < prompts[:, None])
    trunk = (trunk_rows, first[trunk_rows], trunk_places)
    joined = dict(batch)
    for name in ("tokens", "positions", "segment_ids", "loss_mask"):
        values = batch[name]
        if name == "segment_ids":
            number = np.arange(1, values.shape[1] + 1, dtype=values.dtype)[:, None]
            values = values + BRANCH * np.broadcast_to(number, values.shape)
        joined[name] = np.zeros((len(prompts), width), values.dtype)
        joined[name][rows, starts + places] = values[rows, answers, places]
        joined[name][trunk_rows, trunk_places] = batch[name][trunk]
    return joined


def join_samples(
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[np.ndarray]],
    width: int,
    columns: Mapping[str, Sequence[Sequence[np.ndarray]]] | None = None,
    *,
    pad_id: int = 0,
    align: int = 1,
) -> dict[str, np.ndarray]:
    """Prompts with answers just sampled: one row each, the answers as its branches.

    Args:
        prompts: token ids, one integer array per row.
        answers: of each row its answers' tokens, not empty.
        width: columns W.
        columns: numbers of each token of each answer, by name.
        pad_id: token put where nothing is.
        align: each answer begins at a multiple of it, with padding before; at least 1.

    Returns:
        `tokens`, `positions`, `segment_ids` int32 `[R, W]` and `loss_mask` bool `[R,
        W]`, True on the answers' tokens, answer `a` in branch `a + 1`; and the columns,
        float32 `[R, W]`, each number at its token, 0 elsewhere.

    Raises:
        ValueError: a row needs more than W tokens; `align` is below 1.
    """
    shape = (len(prompts), width)
    batch = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    batch["tokens"][:] = pad_id
    batch["loss_mask"] = np.zeros(shape, bool)
    columns = columns or {}
    batch |= {name: np.zeros(shape, np.float32) for name in columns}
    for row, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        start, needed = len(prompt), joined_length(prompt, group, align=align)
        if needed > width:
            raise ValueError(
                f"row {row} has {needed} tokens, its prompt counted once, where "
                f"{width} fit."
            )
        batch["tokens"][row, :start] = prompt
        batch["positions"][row, :start] = np.arange(start)
        batch["segment_ids"][row, :start] = 1
        for branch, answer in enumerate(group, 1):
            start = -(-start // align) * align
            here = slice(start, start + len(answer))
            batch["tokens"][row, here] = answer
            batch["positions"][row, here] = len(prompt) + np.arange(len(answer))
            batch["segment_ids"][row, here] = 1 + branch * BRANCH
            batch["loss_mask"][row, here] = True
            for name, values in columns.items():
                batch[name][row, here] = values[row][branch - 1]
            start = here.stop
    return batch


def joined_length(
    prompt: Sequence[int] | np.ndarray,
    answers: Sequence[Sequence[int] | np.ndarray],
    *,
    align: int = 1,
) -> int:
    """Columns that `join_samples` needs for one row.

    Args:
        prompt: its token ids.
        answers: token ids of each of its answers.
        align: each answer begins at a multiple of it.

    Raises:
        ValueError: `align` is below 1.
    """
    if align < 1:
        raise ValueError(f"align must be at least 1 column, got {align}.")
    end = len(prompt)
    for answer in answers:
        end = -(-end // align) * align + len(answer)
    return end


def joined_widths(
    rows: Sequence[TokenRow], answers: int | None = None
) -> dict[int, int]:
    """The width that `join_answers` needs for rows of each length T.

    Args:
        rows: each `[A, T]`.
        answers: how many sequences of a row are joined at a time, the first one always
            among them, if not all A; the longest of the others are reckoned with.

    Returns:
        Widths by T, multiples of 64.
    """
    widths: dict[int, int] = {}
    for row in rows:
        total, size = row["tokens"].shape
        batch = {
            name: row[name][None] for name in ("tokens", "segment_ids", "loss_mask")
        }
        real = batch["segment_ids"] != 0
        taken = total if answers is None else answers
        # A choice of them may have more in common than all, which makes it no longer.
        prompt = int(_prompts(batch, real)[0])
        own = np.maximum(real[0].sum(axis=1) - prompt, 0)
        needed = prompt + int(own[0] + np.sort(own[1:])[::-1][: taken - 1].sum())
        widths[size] = max(widths.get(size, 0), needed)
    return {size: -(-max(needed, 1) // STEP) * STEP for size, needed in widths.items()}


def _prompts(batch: Mapping[str, np.ndarray], real: np.ndarray) -> np.ndarray:
    """Tokens that a row's sequences begin with alike and none scores, `[B]`."""
    there = np.any(real, axis=2, keepdims=True)
    first = _first_there(real)[:, None, None]
    example = np.take_along_axis(batch["tokens"], first, axis=1)
    shared = real & ~batch["loss_mask"] & (batch["tokens"] == example)
    alike = np.all(shared | ~there, axis=1) & np.any(there, axis=1)
    return np.cumprod(alike, axis=1).sum(axis=1)


def _first_there(real: np.ndarray) -> np.ndarray:
    """The first sequence of each row that has tokens, else 0, `[B]`."""
    return np.argmax(np.any(real, axis=2), axis=1)
