"""The order of training: rows shuffled anew each epoch, and a cursor that can be saved.

`grain` shuffles and batches; the arrays stay in memory. Knows rows as arrays of one or
several lengths, not what they mean.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches whose place can be saved and restored exactly.

    Batch number `k` depends on the rows, `seed` and `batch_size` only, not on what was
    read before nor on the number of processes: each process takes its own slice of the
    same global batch.

    Args:
        rows: arrays by name, such as `pack` and `pad` give. Rows of several lengths are
            batched by length, and batches of all lengths are mixed.
        batch_size: rows per global batch.
        seed: of the shuffle, any whole number from 0.
        epochs: how often to go through the rows; None never ends.
        shuffle: False keeps the order of the rows in every epoch.
        drop_remainder: True leaves out, in each epoch, the last rows that fill no batch
            (others each time, as the order changes). False fills the batch up with rows
            of padding: zeros, thus of segment 0 and outside the loss.
        process_index: which slice of the batch to give, from 0.
        process_count: how many slices there are.
        finish: what becomes of each batch, such as `join_answers`; None leaves it.

    Attributes:
        batches_per_epoch: batches in one epoch.
        step: batches given so far.

    Raises:
        ValueError: there are no rows, or none makes a batch; `batch_size` is no
            multiple of `process_count`; or another number is out of range.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, np.ndarray]],
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        drop_remainder: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    ):
        _check(len(rows), batch_size, seed, epochs, process_index, process_count)
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._epochs = epochs
        self._shuffle = shuffle
        self._drop_remainder = drop_remainder
        share = batch_size // process_count
        self._slice = slice(process_index * share, (process_index + 1) * share)
        self._finish = finish
        self._digest: str | None = None
        self._dataset = self._order()
        self.step = 0
        self.batches_per_epoch = len(self._dataset)
        if not self.batches_per_epoch:
            raise ValueError(
                f"{len(rows)} rows make no batch of {batch_size}; lower the batch "
                "size, add data, or set drop_remainder=False."
            )

    def _order(self) -> Any:
        """Global batches as arrays of row numbers: a grain data set."""
        import grain

        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(self._rows):
            shape = tuple(sorted((name, array.shape) for name, array in row.items()))
            groups.setdefault(shape, []).append(index)
        # grain uses seed + epoch: neighbouring seeds must not share epochs.
        seeds = np.random.SeedSequence(self._seed).generate_state(len(groups) + 1)
        parts = []
        for members, seed in zip(groups.values(), seeds[1:], strict=True):
            part = grain.MapDataset.source(members)
            if self._shuffle:
                part = part.shuffle(seed=int(seed))
            part = part.batch(
                self._batch_size,
                drop_remainder=self._drop_remainder,
                batch_fn=np.asarray,
            )
            if len(part):
                parts.append(part)
        if not parts:
            return ()
        if len(parts) == 1:
            return parts[0]
        mixed = grain.MapDataset.concatenate(parts)
        return mixed.shuffle(seed=int(seeds[0])) if self._shuffle else mixed

    @property
    def epoch(self) -> float:
        """Epochs done so far, with the fraction of the present one."""
        return self.step / self.batches_per_epoch

    @property
    def total_steps(self) -> int | None:
        """Batches in all epochs, None if it never ends."""
        return None if self._epochs is None else self._epochs * self.batches_per_epoch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.total_steps is not None and self.step >= self.total_steps:
            raise StopIteration
        batch = self.at(self.step)
        self.step += 1
        return batch

    def at(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`, from 0, wherever the cursor is."""
        batch = self._stacked(step)
        return batch if self._finish is None else self._finish(batch)

    def _stacked(self, step: int) -> dict[str, np.ndarray]:
        indices = self._dataset[step]  # once: grain's shuffle is slow for few rows
        share = self._slice.stop - self._slice.start
        rows = [self._rows[int(index)] for index in indices[self._slice]]
        batch = {}
        for name, first in self._rows[int(indices[0])].items():
            batch[name] = np.zeros((share, *first.shape), first.dtype)
            for place, row in enumerate(rows):
                batch[name][place] = row[name]
        return batch

    def restart(self) -> "Batches":
        """Puts the cursor back to the first batch; returns itself."""
        self.step = 0
        return self

    def state(self) -> dict[str, Any]:
        """The cursor and what it belongs to: JSON values."""
        return {"step": self.step, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken, on any number of processes.

        Raises:
            ValueError: it was taken with other rows, another seed or batch size; the
                message names the difference.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume the data order: {name} was {state.get(name)!r} and "
                    f"is {value!r}; use the data and settings of the first run, or "
                    "start a new one."
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        if self._digest is None:
            digest = hashlib.blake2b(digest_size=16)
            for row in self._rows:
                for name in sorted(row):
                    digest.update(np.ascontiguousarray(row[name]).data)
            self._digest = digest.hexdigest()
        return {
            "rows": len(self._rows),
            "batch_size": self._batch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "drop_remainder": self._drop_remainder,
            "data": self._digest,
        }


def _check(
    rows: int,
    batch_size: int,
    seed: int,
    epochs: int | None,
    process_index: int,
    process_count: int,
) -> None:
    if not rows:
        raise ValueError("there are no rows to batch; the data set is empty.")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1 or None, got {epochs}.")
    if process_count < 1 or batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must lie in [0, {process_count}), got {process_index}."
        )
