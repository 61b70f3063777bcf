"""Answers of one prompt in one row: the same tokens, each once, and their places."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxpost import data
from jaxpost.typing import BRANCH


def rows_of(groups, size):
    """A batch `[B, A, T]` of `(prompt, [answers])`, answers scored, empty left out."""
    shape = (len(groups), len(groups[0][1]), size)
    batch = {
        n: np.zeros(shape, np.int32) for n in ("tokens", "positions", "segment_ids")
    }
    batch["loss_mask"] = np.zeros(shape, bool)
    for row, (prompt, answers) in enumerate(groups):
        for place, answer in enumerate(answers):
            if not answer:
                continue
            text = [*prompt, *answer]
            at = (row, place, slice(0, len(text)))
            batch["tokens"][at] = text
            batch["positions"][at] = np.arange(len(text))
            batch["segment_ids"][at] = 1
            batch["loss_mask"][row, place, len(prompt) : len(text)] = True
    return batch


def test_by_hand():
    batch = rows_of([([5, 6], [[7], [7, 8]]), ([1, 2, 3], [[4, 9], []])], 5)
    batch["example_id"] = np.array([[0, 1], [0, 2]])
    found = data.join_answers(batch, 6)
    one, two = 1 + BRANCH, 1 + 2 * BRANCH
    assert found["tokens"].tolist() == [[5, 6, 7, 7, 8, 0], [1, 2, 3, 4, 9, 0]]
    assert found["positions"].tolist() == [[0, 1, 2, 2, 3, 0], [0, 1, 2, 3, 4, 0]]
    assert found["segment_ids"].tolist() == [
        [1, 1, one, two, two, 0],
        [1, 1, 1, one, one, 0],
    ]
    assert found["loss_mask"].astype(int).tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
    ]
    assert found["example_id"] is batch["example_id"]


def test_prompts_that_differ_are_not_shared():
    """Only what all begin with is; the rest of each prompt is in its branch."""
    batch = rows_of([([5, 6], [[7], [8]])], 4)
    batch["tokens"][0, 1, 1] = 9
    found = data.join_answers(batch, 8)
    assert found["tokens"][0].tolist() == [5, 6, 7, 9, 8, 0, 0, 0]
    assert (found["segment_ids"][0] // BRANCH).tolist() == [0, 1, 1, 2, 2, 0, 0, 0]
    assert (
        found["loss_mask"][0].tolist()
        == [False, False, True, False, True] + [False] * 3
    )


def test_rows_of_padding_stay_padding():
    batch = rows_of([([5, 6], [[7], [8]])], 4)
    empty = {name: np.zeros_like(array) for name, array in batch.items()}
    assert not any(array.any() for array in data.join_answers(empty, 8).values())


def test_too_narrow():
    with pytest.raises(ValueError, match="has 4 tokens, its prompt counted once"):
        data.join_answers(rows_of([([5, 6], [[7], [8]])], 4), 3)


TOKENS = st.lists(st.integers(1, 3), max_size=5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(TOKENS, st.lists(TOKENS, min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_each_answer_can_be_read_back(groups):
    size = 12
    batch = rows_of(groups, size)
    rows = [
        {name: array[i] for name, array in batch.items()} for i in range(len(groups))
    ]
    widths = data.joined_widths(rows)
    assert widths[size] == 64
    found = data.join_answers(batch, widths)
    for row in range(len(groups)):
        segments = found["segment_ids"][row]
        for answer in range(3):
            own = (segments == 1) | (segments == 1 + (answer + 1) * BRANCH)
            there = batch["segment_ids"][row, answer] != 0
            if not there.any():
                assert not (segments == 1 + (answer + 1) * BRANCH).any()
                continue
            for name in ("tokens", "positions", "loss_mask"):
                expected = batch[name][row, answer][there]
                np.testing.assert_array_equal(found[name][row][own], expected)


def test_width_for_a_choice_of_answers_holds_any_choice():
    groups = [([1] * 10, [[2] * 30, [3] * 40, [2] * 20, [4] * 70])]
    batch = rows_of(groups, 100)
    rows = [{name: array[0] for name, array in batch.items()}]
    assert data.joined_widths(rows) == {100: 192}  # 170 in steps of 64
    assert data.joined_widths(rows, answers=2) == {100: 128}  # 10 + 30 + 70
    for other in (1, 2, 3):
        chosen = {name: array[:, [0, other]] for name, array in batch.items()}
        data.join_answers(chosen, {100: 128})


def test_samples_lie_as_joined_answers_do():
    groups = [([5, 6], [[7], [7, 8]]), ([1, 2, 3], [[4, 9], [3]])]
    wanted = data.join_answers(rows_of(groups, 5), 7)
    found = data.join_samples(
        [np.array(prompt) for prompt, _ in groups],
        [[np.array(answer) for answer in answers] for _, answers in groups],
        7,
        {"tenth": [[np.array(a) / 10 for a in answers] for _, answers in groups]},
    )
    tenth = found.pop("tenth")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    scored = found["loss_mask"]
    np.testing.assert_allclose(tenth[scored], found["tokens"][scored] / 10)
    assert not tenth[~scored].any()


def test_answers_begin_at_multiples():
    prompts, answers = [[5, 6, 7], [5]], [[[1, 2], [3]], [[4], [8, 9]]]
    found = data.join_samples(prompts, answers, 12, pad_id=0, align=4)
    wanted = [[5, 6, 7, 0, 1, 2, 0, 0, 3], [5, 0, 0, 0, 4, 0, 0, 0, 8, 9]]
    for row, tokens in enumerate(wanted):
        np.testing.assert_array_equal(found["tokens"][row, : len(tokens)], tokens)
        assert not found["tokens"][row, len(tokens) :].any()
        assert data.joined_length(prompts[row], answers[row], align=4) == len(tokens)
    np.testing.assert_array_equal(found["segment_ids"] != 0, found["tokens"] != 0)
    plain = data.join_samples(prompts, answers, 12)
    for name, array in plain.items():
        for row in range(2):
            np.testing.assert_array_equal(
                found[name][row][found["segment_ids"][row] != 0],
                array[row][plain["segment_ids"][row] != 0],
                err_msg=name,
            )
    with pytest.raises(ValueError, match="row 0 has 9 tokens"):
        data.join_samples(prompts, answers, 8, align=4)
    with pytest.raises(ValueError, match="align must be at least 1 column, got 0"):
        data.join_samples(prompts, answers, 8, align=0)


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="row 0 has 5 tokens.*where 4 fit"):
        data.join_samples([np.arange(2)], [[np.arange(2), np.arange(1)]], 4)
