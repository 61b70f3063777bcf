"""Several rewards together: totals, what has no verdict, and what is refused."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import policy as oracle

from jaxpost import advantages, rewards

nan = math.nan


def fixed(values):
    """A reward that says the same every time."""

    def reward(completions, **columns):
        return values

    return reward


def score(functions, prompts=None, **options):
    """Scores of four answers, the first two to one prompt."""
    prompts = prompts or ["p", "p", "q", "q"]
    with rewards.combine(functions, **options) as scorer:
        return scorer(prompts, ["a"] * len(prompts), [[1]] * len(prompts))


def test_total_is_the_weighted_sum():
    found = score(
        {"one": fixed([1, 0, 0.5, 1]), "two": fixed([0, 2, -2, 0])},
        weights={"two": 0.25},
    )
    np.testing.assert_array_equal(found.rewards, [1.0, 0.5, 0.0, 1.0])
    assert found.given.all()
    np.testing.assert_array_equal(found.parts["two"], [0, 2, -2, 0])
    assert found.numbers["rewards/one/mean"] == 0.625
    np.testing.assert_allclose(
        found.numbers["rewards/one/std"], np.std([1, 0, 0.5, 1], ddof=1)
    )
    assert found.numbers["rewards/one/no_verdict"] == 0.0


def test_none_is_no_verdict_and_no_zero():
    found = score({"one": fixed([1, None, None, None])})
    np.testing.assert_array_equal(found.rewards, [1, nan, nan, nan])
    assert found.given.tolist() == [True, False, False, False]
    assert found.numbers["rewards/one/mean"] == 1.0  # not 0.25
    assert found.numbers["rewards/one/std"] == 0.0
    assert found.numbers["rewards/one/no_verdict"] == 3.0
    assert "rewards/one/mean" not in score({"one": fixed([None] * 4)}).numbers


def test_an_answer_that_one_reward_could_not_judge_is_left_out():
    """But rewards may each judge prompts of their own."""
    found = score(
        {"maths": fixed([1, 0, None, None]), "code": fixed([None, None, 1, None])}
    )
    np.testing.assert_array_equal(found.rewards, [1, 0, 1, nan])
    found = score({"right": fixed([1, 0, 1, 1]), "style": fixed([1, None, 0, 1])})
    np.testing.assert_array_equal(found.rewards, [2, nan, 1, 2])


def test_a_reward_of_weight_zero_is_only_logged():
    found = score(
        {"one": fixed([1, 0, 1, 0]), "two": fixed([9, None, 9, 9])}, weights={"two": 0}
    )
    np.testing.assert_array_equal(found.rewards, [1, 0, 1, 0])
    assert found.numbers["rewards/two/mean"] == 9.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-3, 3)), min_size=6, max_size=6))
def test_masked_answers_leave_their_group_as_if_they_were_not_there(values):
    found = score({"one": fixed(values)}, prompts=["p"] * 6)
    totals, mask = jnp.asarray(found.rewards[None]), jnp.asarray(found.given[None])
    gains = advantages.group_relative(totals, mask=mask)[0]
    gains = np.asarray(gains)
    np.testing.assert_array_equal(gains[~found.given], 0.0)
    kept = np.array([[v for v in values if v is not None]], float)
    alone = oracle.group_relative(kept, np.ones(kept.shape, bool), 1e-6, 1)[0]
    np.testing.assert_allclose(gains[found.given], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        [True, False, True, True],
        (1, 0, 1.0, 1),
        np.array([1, 0, 1, 1]),
        np.array([1, 0, 1, 1], np.float32),
        jnp.array([1.0, 0.0, 1.0, 1.0]),
        [np.int64(1), np.float32(0), jnp.float32(1), np.bool_(True)],
    ],
)
def test_numbers_of_any_kind_are_taken(values):
    found = score({"one": fixed(values)})
    np.testing.assert_array_equal(found.rewards, [1, 0, 1, 1])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 0.0], "'one' returned 2 values for 4 answers: return one for each"),
        ([[1.0], 0, 0, 0], r"returned \[1.0\] \(list\) for answer 0: return a number"),
        (["1", 0, 0, 0], r"returned '1' \(str\) for answer 0: return a number"),
        ([0, nan, 0, 0], "returned nan for answer 1.*None where there is no verdict"),
        ([0, 0, math.inf, 0], "returned inf for answer 2"),
        (np.array([0, 0, 0, nan]), "returned nan for answer 3"),
        ("1234", "must return a list with a number or None.*got str"),
        ({0: 1}, "got dict"),
        (0.5, "got float"),
        (None, "got NoneType"),
        (iter([1, 2, 3, 4]), "got list_iterator"),
        (np.zeros((4, 2)), r"\(ndarray\) for answer 0"),
        ([1j, 0, 0, 0], "complex"),
    ],
)
def test_what_is_no_verdict_is_refused_by_name(values, words):
    with pytest.raises(rewards.RewardError, match=words):
        score({"one": fixed(values)}, stop_after=None)


def test_a_needed_column_that_is_missing_is_no_failure_to_count():
    def reward(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(rewards.RewardError, match="'one': it needs a column 'answer'"):
        score({"one": reward}, stop_after=None)


def test_functions_are_given_what_they_take():
    seen = {}

    def all_of_it(prompts, completions, completion_ids, **columns):
        seen["all"] = (prompts, completions, completion_ids, columns)
        return [0.0] * len(prompts)

    def some_of_it(answer, prompts=None):
        seen["some"] = (answer, prompts)
        return [0.0] * len(answer)

    with rewards.combine({"all": all_of_it, "some": some_of_it}) as scorer:
        scorer(["p", "q"], ["a", "b"], [[1], [2, 3]], answer=[4, 5], grade=[1, 2])
    columns = {"answer": [4, 5], "grade": [1, 2]}
    assert seen["all"] == (["p", "q"], ["a", "b"], [[1], [2, 3]], columns)
    assert seen["some"] == ([4, 5], ["p", "q"])


def test_built_in_rewards_by_sections():
    sections = [
        rewards.RewardSection(),
        rewards.RewardSection("format", weight=0.5, label="shape"),
        rewards.RewardSection("length", weight=0.1, settings={"longest": 2}),
    ]
    with rewards.Scorer(sections) as scorer:
        found = scorer(
            ["p"] * 3,
            ["#### 4", "#### 4 x", "4"],
            [[1], [1] * 3, [1]],
            answer=["4"] * 3,
        )
    np.testing.assert_allclose(found.rewards, [1.5, 0.9, 0.0])
    assert set(found.parts) == {"arithmetic", "shape", "length"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rewards.Scorer([]), "at least one reward"),
        (lambda: rewards.combine({"a": len}, weights={"a": 0.0}), "weight is not 0"),
        (
            lambda: rewards.combine({"a": len}, weights={"b": 1.0}),
            "names 'b', which is",
        ),
        (
            lambda: rewards.Scorer([rewards.RewardSection()] * 2),
            "two rewards are called 'arithmetic': give one of them a label",
        ),
        (lambda: rewards.RewardSection(weight=nan), "weight must be finite"),
        (lambda: rewards.RewardSection(deadline_s=0.0), "deadline_s must be positive"),
        (lambda: rewards.RewardSection(stop_after=0), "stop_after must be at least 1"),
        (
            lambda: rewards.Scorer([rewards.RewardSection("length")]),
            "'length' needs the setting 'longest'",
        ),
        (
            lambda: rewards.Scorer(
                [rewards.RewardSection("a", isolate="process")], {"a": fixed([])}
            ),
            "no name to find it by in another process",
        ),
        (
            lambda: rewards.Scorer(
                [rewards.RewardSection("a", settings={"x": 1})], {"a": fixed([])}
            ),
            "which has no settings",
        ),
    ],
)
def test_wrong_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_arguments_of_different_lengths_are_refused():
    scorer = rewards.combine({"one": fixed([1.0])})
    with pytest.raises(ValueError, match="completions has 2 values where there are 1"):
        scorer(["p"], ["a", "b"], [[1]])
    with pytest.raises(ValueError, match="answer has 0 values"):
        scorer(["p"], ["a"], [[1]], answer=[])
