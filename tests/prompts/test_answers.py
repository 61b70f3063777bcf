"""Final answers: the forms of GSM8K, junk, and calculations that do not hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.prompts import _answers as answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 5\nno, wait\n#### 6", "6"),
        ("####8", "8"),
        ("#### 1,250", "1250"),
        ("#### $1,250.00", "1250"),
        ("#### -3", "-3"),
        ("#### \u22123", "-3"),
        ("#### $-3.50 dollars", "-3.5"),
        ("#### +12.", "12"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 12,34", "12"),  # not a thousands separator
        ("the answer is 7", None),
        ("####", None),
        ("#### seven 7", None),
        ("#### -", None),
        ("", None),
        ("#### " + "9" * 500, None),
        ("#### \u0663", None),  # digits of other scripts are not guessed at
    ],
)
def test_final_answer(text, expected):
    assert answers.extract_final_answer(text) == expected


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (7, "7", True),
        ("7.0", 7, True),
        ("1,000", "1000", True),
        ("7", "8", False),
        ("7", "-7", False),
        (None, None, False),
        ("x", "x", False),
        (0.5, ".50", True),
    ],
)
def test_answers_equal(left, right, equal):
    assert answers.answers_equal(left, right) is equal


def test_exact_match_reads_only_the_last_mark():
    assert answers.exact_match("3 + 4 = 7\n#### 7", 7)
    assert not answers.exact_match("#### 7\n#### 9", "7")
    assert not answers.exact_match("7", 7)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_junk_is_never_an_error(text):
    found = answers.extract_final_answer("#### " + text)
    assert found is None or answers.answers_equal(found, found)
    answers.wrong_calculations(text)


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=100, deadline=None)
def test_integers_survive_separators_and_decimals(number):
    assert answers.extract_final_answer(f"#### {number:,}.00") == str(number)


def test_wrong_calculations_are_named():
    text = "12 + 5 = 17, 17 * 2 = 35 and 8 / 2 = 4; 9 / 0 = 0. 1.5 x 2 = 3"
    assert answers.wrong_calculations(text) == ["17 * 2 = 35", "9 / 0 = 0"]
