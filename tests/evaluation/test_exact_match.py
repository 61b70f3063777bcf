"""Exact match by group, against counts made by hand."""

import math

import pytest

from jaxpost import evaluation

ROWS = [
    {"prompt": "a", "answer": "1", "grade": 1},
    {"prompt": "b", "answer": "2", "grade": 1},
    {"prompt": "c", "answer": "3", "grade": 2},
    {"prompt": "d", "answer": "4", "grade": 2},
    {"prompt": "e", "answer": "5", "grade": 2},
    {"prompt": "f", "answer": "6", "grade": 2},
]
ANSWERS = dict(zip("abcdef", ("1", "9", "3", "4.0", "5", "junk"), strict=True))


def answer(prompts):
    return [f"work\n#### {ANSWERS[prompt]}" for prompt in prompts]


def test_accuracy_by_group_and_their_unweighted_mean():
    result = evaluation.evaluate_exact_match(answer, ROWS, group="grade")
    assert result.groups() == (1, 2)
    assert [result.count(g) for g in (1, 2)] == [2, 4]
    assert [result.accuracy(g) for g in (1, 2)] == [0.5, 0.75]
    assert result.mean_accuracy() == 0.625
    assert result.standard_error(2) == math.sqrt(0.75 * 0.25 / 4)
    assert result.metrics() == {
        "exact_match": 0.625,
        "exact_match/1": 0.5,
        "exact_match/2": 0.75,
    }
    assert [item.correct for item in result.judged] == [1, 0, 1, 1, 1, 0]


def test_one_group_and_another_checker():
    result = evaluation.evaluate_exact_match(
        answer, ROWS, check=lambda completion, _: "junk" in completion
    )
    assert result.groups() == ("all",)
    assert result.accuracy("all") == 1 / 6
    assert math.isnan(result.accuracy("none"))


def test_errors():
    with pytest.raises(ValueError, match="at least one"):
        evaluation.evaluate_exact_match(answer, [])
    with pytest.raises(ValueError, match="returned 1 completions for 6"):
        evaluation.evaluate_exact_match(lambda _: ["x"], ROWS)
    with pytest.raises(KeyError):
        evaluation.evaluate_exact_match(answer, ROWS, group="level")
