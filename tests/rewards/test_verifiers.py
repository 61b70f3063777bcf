"""Rewards that check texts and lengths."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost import data, rewards


def judge(reward, completions, ids=None, **columns) -> list[Any]:
    count = len(completions)
    return reward(["p"] * count, completions, ids or [[1]] * count, **columns)


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("2 + 2 = 4\n#### 4", "4", 1.0),
        ("2 + 2 = 4\n#### 4</s>", 4, 1.0),
        ("#### $1,250.00", "1250", 1.0),
        ("#### 4", "4 apples\n#### 4", 1.0),  # a worked answer, GSM8K's own
        ("#### 5", "so it is 4\n#### 4", 0.0),
        ("#### 4\n#### 5", "4", 0.0),
        ("4", "4", 0.0),
        ("", "4", 0.0),
        ("#### ", "4", 0.0),
        ("#### 4", None, None),
        ("#### 4", "four", None),
        ("#### 4", "none\n#### four", None),
    ],
)
def test_arithmetic(completion, answer, verdict):
    assert judge(rewards.arithmetic(), [completion], answer=[answer]) == [verdict]


def test_arithmetic_can_check_the_steps():
    answers = ["2 + 2 = 4\n#### 4", "2 + 2 = 5\n#### 4", "2 + 2 = 4\n#### 5"]
    wanted = {"answer": ["4"] * 3}
    assert judge(rewards.arithmetic(), answers, **wanted) == [1.0, 1.0, 0.0]
    strict = rewards.arithmetic(check_steps=True)
    assert judge(strict, answers, **wanted) == [1.0, 0.0, 0.0]


def test_worked_answers_of_the_built_in_problems_are_right():
    rows = list(data.arithmetic_rows("train", count=50))
    completions = [row["completion"] for row in rows]
    columns = {"answer": [row["answer"] for row in rows]}
    strict = rewards.arithmetic(check_steps=True)
    assert judge(strict, completions, **columns) == [1.0] * 50
    assert judge(rewards.format(), completions) == [1.0] * 50
    wrong = {"answer": [*columns["answer"][1:], "-1"]}
    assert np.mean(judge(strict, completions, **wrong)) < 0.2


def test_exact_match():
    answers = ["Yes ", "yes", "Yes, it is", ""]
    wanted = {"answer": ["Yes", "Yes", "Yes", None]}
    assert judge(rewards.exact_match(), answers, **wanted) == [1.0, 0.0, 0.0, None]
    loose = rewards.exact_match("label", ignore_case=True)
    assert judge(loose, answers, label=["Yes"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_regex():
    answers = ["it is 4", "it is four", "4 or 5", "<b>7</b>"]
    assert judge(rewards.regex(r"\d"), answers) == [1.0, 0.0, 1.0, 1.0]
    assert judge(rewards.regex(r"(?i)^IT IS"), answers) == [1.0, 1.0, 0.0, 0.0]
    # With a column, the last place found must say the same.
    last = rewards.regex(r"\d", column="answer")
    assert judge(last, answers, answer=[4, "4", "4", None]) == [1.0, 0.0, 0.0, None]
    group = rewards.regex(r"<b>(.*?)</b>", column="answer")
    assert judge(group, answers, answer=["7"] * 4) == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("2 + 2 = 4\n#### 4", 1.0),
        ("#### $1,250.50\n", 1.0),
        ("#### 4\nand so on", 0.0),
        ("#### 4 apples", 0.0),
        ("#### 4\n#### 4", 0.0),
        ("I write #### once\n#### 4", 0.0),
        ("it is #### 4", 0.0),
        ("#### four", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_format(completion, verdict):
    assert judge(rewards.format(), [completion]) == [verdict]
    other = completion.replace("####", "=>")
    assert judge(rewards.format(mark="=>"), [other]) == [verdict]


def test_length_is_the_papers():
    """DAPO, eq. 13, case by case."""
    longest, soft = 10, 4

    def wanted(tokens):
        if tokens <= longest - soft:
            return 0.0
        if tokens <= longest:
            return ((longest - soft) - tokens) / soft
        return -1.0

    ids = [[0] * tokens for tokens in range(14)]
    found = judge(rewards.length(longest, soft=soft), [""] * 14, ids)
    assert found == [wanted(tokens) for tokens in range(14)]
    assert found[10] == -1.0
    assert judge(rewards.length(10), [""] * 14, ids) == [0.0] * 11 + [-1.0] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_longer_is_never_better(longest, data):
    soft = data.draw(st.integers(0, longest))
    ids = [[0] * tokens for tokens in range(longest + 3)]
    found = judge(rewards.length(longest, soft=soft), [""] * len(ids), ids)
    assert sorted(found, reverse=True) == found
    assert min(found) == -1.0


def test_target_length_is_the_distance():
    """L1's second term, with its alpha as 1 / scale."""
    ids = [[0] * tokens for tokens in (0, 3, 4, 5, 12)]
    found = judge(rewards.target_length(4), [""] * 5, ids)
    assert found == [-1.0, -0.25, 0.0, -0.25, -2.0]
    found = judge(rewards.target_length(4, scale=0.5), [""] * 5, ids)
    assert found == [-8.0, -2.0, 0.0, -2.0, -16.0]


def test_each_row_may_have_its_own_target_length():
    ids = [[0] * tokens for tokens in (2, 6, 6, 6)]
    own = rewards.target_length(column="wanted")
    assert judge(own, [""] * 4, ids, wanted=[4, "8", 6.0, None]) == [
        -0.5,
        -0.25,
        0.0,
        None,
    ]
    with pytest.raises(rewards.RewardError, match="'wanted'.*rows have 'answer'"):
        judge(own, [""] * 4, ids, answer=[1] * 4)
    for wrong in (0, 2.5, "long", float("inf"), [4]):
        with pytest.raises(rewards.RewardError, match="column 'wanted': a target leng"):
            judge(own, [""], [[0]], wanted=[wrong])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=10))
def test_no_text_breaks_them(completion, answer):
    for reward in (
        rewards.arithmetic(check_steps=True),
        rewards.exact_match(),
        rewards.regex(r"(\w+)$", column="answer"),
        rewards.format(),
    ):
        (verdict,) = judge(reward, [completion], answer=[answer])
        assert verdict in (0.0, 1.0, None)


def test_messages_are_read_like_texts():
    said = [
        {"role": "user", "content": "#### 5"},
        {"role": "assistant", "content": "#### 4"},
    ]
    found = judge(rewards.arithmetic(), [said[1:], said, []], answer=["4"] * 3)
    assert found == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rewards.regex("(a"), r"pattern '\(a' is not valid"),
        (lambda: rewards.format(mark=" "), "mark must not be empty"),
        (lambda: rewards.length(0), "longest must be at least 1"),
        (lambda: rewards.length(4, soft=5), "between 0 and longest 4, got 5"),
        (lambda: rewards.target_length(), "give target or column, one of them"),
        (lambda: rewards.target_length(3, column="a"), "one of them; got 3, 'a'"),
        (lambda: rewards.target_length(0), "target: a target length must be a whole"),
        (lambda: rewards.target_length(3, scale=0.0), "scale must be positive"),
        (lambda: judge(rewards.arithmetic("total"), ["4"], answer=["4"]), "'total'"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(rewards.RewardError, match="'answer'.*rows have 'a', 'b'"):
        judge(rewards.arithmetic(), ["#### 4"], b=[1], a=[2])


def test_by_name():
    reward = rewards.by_name("length", longest=2)
    assert judge(reward, ["", ""], [[1], [1, 2, 3]]) == [0.0, -1.0]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("aritmetic", {}, "no reward 'aritmetic'.*Did you mean 'arithmetic'"),
        ("arithmetic", {"columns": "x"}, "no setting 'columns'; it has column, check"),
        ("length", {}, "needs the setting 'longest'"),
        ("regex", {"pattern": "("}, "not valid"),
    ],
)
def test_wrong_names_and_settings_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=words):
        rewards.by_name(name, **settings)
