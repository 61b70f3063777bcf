"""The order of training: epochs, exact resume, shards, remainders."""

import json
from itertools import chain, islice

import numpy as np
import pytest

from jaxpost import data


def make_rows(count, length=4, first=1):
    return [
        {
            "tokens": np.full(length, first + k, np.int32),
            "segment_ids": np.ones(length, np.int32),
            "loss_mask": np.ones(length, bool),
        }
        for k in range(count)
    ]


def numbers(batch):
    return batch["tokens"][:, 0].tolist()


def epoch_of(batches):
    return [numbers(next(batches)) for _ in range(batches.batches_per_epoch)]


def test_each_epoch_holds_every_row_once_in_another_order():
    batches = data.Batches(make_rows(12), 4)
    epochs = [list(chain.from_iterable(epoch_of(batches))) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 13))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert batches.epoch == 3.0
    next(batches)
    assert batches.epoch == pytest.approx(10 / 3)


def test_arrays_are_stacked_with_their_types():
    batch = next(data.Batches(make_rows(5), 3))
    assert batch["tokens"].shape == (3, 4)
    assert batch["tokens"].dtype == np.int32
    assert batch["loss_mask"].dtype == bool


def test_seeds_differ_in_every_epoch():
    # grain's own seed + epoch would make epoch 1 of seed 0 that of seed 1.
    orders = set()
    for seed in range(3):
        batches = data.Batches(make_rows(20), 20, seed=seed)
        orders |= {tuple(numbers(next(batches))) for _ in range(3)}
    assert len(orders) == 9


def test_unshuffled_and_finite():
    batches = data.Batches(make_rows(6), 2, shuffle=False, epochs=2)
    assert batches.total_steps == 6
    assert [numbers(batch) for batch in batches] == [[1, 2], [3, 4], [5, 6]] * 2
    with pytest.raises(StopIteration):
        next(batches)
    assert numbers(next(batches.restart())) == [1, 2]


def test_remainder_dropped_or_padded():
    dropped = data.Batches(make_rows(7), 3, shuffle=False, epochs=1)
    assert [numbers(batch) for batch in dropped] == [[1, 2, 3], [4, 5, 6]]
    padded = data.Batches(
        make_rows(7), 3, shuffle=False, epochs=1, drop_remainder=False
    )
    batches = list(padded)
    assert [numbers(batch) for batch in batches] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert not batches[2]["segment_ids"][1:].any()
    assert not batches[2]["loss_mask"][1:].any()


def test_dropped_rows_are_others_each_epoch():
    batches = data.Batches(make_rows(7), 3)
    left_out = set()
    for _ in range(20):
        left_out |= set(range(1, 8)) - set(chain.from_iterable(epoch_of(batches)))
    assert left_out == set(range(1, 8))


@pytest.mark.parametrize("done", [0, 2, 5, 11])
def test_resume_is_exact_in_the_middle_of_an_epoch(done):
    rows = make_rows(13)
    batches = data.Batches(rows, 3, seed=5)
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    wanted = [numbers(next(batches)) for _ in range(9)]
    again = data.Batches(make_rows(13), 3, seed=5)
    again.restore(state)
    assert again.step == done
    assert [numbers(next(again)) for _ in range(9)] == wanted
    # Taking the state changed nothing.
    fresh = data.Batches(rows, 3, seed=5)
    assert [numbers(next(fresh)) for _ in range(done + 9)][done:] == wanted


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (data.Batches(make_rows(12), 3, seed=1), "seed was 0 and is 1"),
        (data.Batches(make_rows(12), 4), "batch_size was 3 and is 4"),
        (data.Batches(make_rows(11), 3), "rows was 12 and is 11"),
        (data.Batches(make_rows(12, first=2), 3), "data was"),
        (data.Batches(make_rows(12), 3, shuffle=False), "shuffle was True"),
    ],
)
def test_a_state_of_another_run_is_refused(other, name):
    state = data.Batches(make_rows(12), 3).state()
    with pytest.raises(ValueError, match=f"cannot resume the data order: {name}"):
        other.restore(state)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_shards_are_slices_of_the_same_global_batch(count, drop_remainder):
    rows = make_rows(14)
    settings = {"seed": 3, "drop_remainder": drop_remainder}
    whole = data.Batches(rows, 4, **settings)
    shards = [
        data.Batches(rows, 4, **settings, process_index=k, process_count=count)
        for k in range(count)
    ]
    for _ in range(9):
        parts = [numbers(next(shard)) for shard in shards]
        assert all(len(part) == 4 // count for part in parts)
        assert list(chain.from_iterable(parts)) == numbers(next(whole))
    # A run goes on on another number of processes.
    shards[0].restore(whole.state())
    assert shards[0].step == 9


def test_lengths_are_batched_apart_and_mixed():
    rows = [*make_rows(9, length=4), *make_rows(8, length=8, first=101)]
    batches = data.Batches(rows, 2, drop_remainder=False)
    assert batches.batches_per_epoch == 5 + 4
    for _ in range(3):
        epoch = [next(batches) for _ in range(9)]
        shapes = [batch["tokens"].shape[1] for batch in epoch]
        assert sorted(shapes) == [4] * 5 + [8] * 4
        assert shapes != sorted(shapes)  # mixed
        seen = [n for batch in epoch for n in numbers(batch) if n]
        assert sorted(seen) == [*range(1, 10), *range(101, 109)]


def test_lengths_without_a_full_batch_are_dropped():
    rows = [*make_rows(4), *make_rows(1, length=8, first=101)]
    batches = data.Batches(rows, 2)
    assert batches.batches_per_epoch == 2
    assert all(batch["tokens"].shape == (2, 4) for batch in islice(batches, 6))


@pytest.mark.parametrize(
    ("rows", "size", "settings", "message"),
    [
        (0, 1, {}, "no rows to batch; the data set is empty"),
        (3, 4, {}, "3 rows make no batch of 4; lower the batch size"),
        (3, 0, {}, "batch_size 0 must be a positive multiple"),
        (
            9,
            3,
            {"process_count": 2},
            "batch_size 3 must be a positive multiple of the 2",
        ),
        (
            9,
            4,
            {"process_count": 2, "process_index": 2},
            r"must lie in \[0, 2\), got 2",
        ),
        (9, 3, {"seed": -1}, "seed must be at least 0, got -1"),
        (9, 3, {"epochs": 0}, "epochs must be at least 1 or None, got 0"),
    ],
)
def test_errors(rows, size, settings, message):
    with pytest.raises(ValueError, match=message):
        data.Batches(make_rows(rows), size, **settings)
