"""Word problems: right, varied, reproducible, and held out by their numbers."""

import collections
import itertools
import random

import pytest

from jaxpost.data import _arithmetic as arithmetic
from jaxpost.prompts import extract_final_answer, wrong_calculations


@pytest.fixture(scope="module")
def rows():
    return list(arithmetic.arithmetic_rows("train", count=8000, seed=5))


def test_worked_answers_are_right_and_have_one_line_per_step(rows):
    for row in rows[:4000]:
        *lines, last = row["completion"].split("\n")
        assert last == f"#### {row['answer']}"
        assert len(lines) == row["grade"]
        assert all(line.count(" = ") == 1 for line in lines)
        assert not wrong_calculations(row["completion"])
        result = lines[-1].split(" = ")[1].split()[0]
        assert result == extract_final_answer(row["completion"])


def test_questions_are_complete_sentences(rows):
    for row in rows[:1000]:
        question = row["prompt"]
        assert question.endswith("?\n")
        assert not set("{}") & set(question)
        assert all(part[0].isupper() for part in question[:-2].split(". "))


def test_numbers_of_the_first_calculation_stand_in_the_question(rows):
    for row in rows[:1000]:
        words = row["prompt"].replace(".", " ").replace(",", " ").split()
        left, _, right, *_ = (
            word
            for word in row["completion"].split("\n")[0].split()
            if word[0] in "0123456789+-*/="
        )
        assert left in words
        assert right in words


@pytest.mark.parametrize("grade", arithmetic.GRADES)
def test_no_answer_is_common(rows, grade):
    answers = [row["answer"] for row in rows if row["grade"] == grade]
    assert len(answers) == 2000
    (_, most), *_ = collections.Counter(answers).most_common(1)
    assert most <= 0.05 * len(answers)


def test_most_problems_take_two_or_more_steps(rows):
    assert sum(row["grade"] >= 2 for row in rows) > len(rows) / 2


@pytest.mark.parametrize("grade", arithmetic.GRADES)
def test_over_a_million_problems_exist(grade):
    # Of n draws from s equally likely problems, n (n - 1) / 2 s are expected to repeat
    # an earlier one; unequal chances give more repeats.
    rng = random.Random(grade)
    n, s = 24_000, 10**6
    drawn = {arithmetic.arithmetic_problem(grade, rng).question for _ in range(n)}
    expected = n * (n - 1) / (2 * s)
    assert n - len(drawn) < expected - 3 * expected**0.5


def test_splits_share_no_calculations_for_any_seed():
    def signatures(split, seed):
        return {p.signature for p in arithmetic._draw(split, 1500, seed, (1, 2, 3, 4))}

    train = signatures("train", 0) | signatures("train", 1)
    test = signatures("test", 0) | signatures("test", 7)
    assert not train & test
    assert {arithmetic.arithmetic_split(s) for s in test} == {"test"}
    everything = [
        arithmetic.arithmetic_split(f"{a}+{b};{b}-2")
        for a, b in itertools.product(range(60), repeat=2)
    ]
    assert 0.08 < everything.count("test") / len(everything) < 0.12


def test_signature_forgets_the_order_of_terms():
    rng = random.Random(0)
    for problem in (arithmetic.arithmetic_problem(2, rng) for _ in range(200)):
        for calculation in problem.signature.split(";"):
            for sign in "+*":
                if sign in calculation:
                    left, right = calculation.split(sign)
                    assert int(left) <= int(right)


def test_rows_are_reproducible_and_prefixes_agree(rows):
    again = list(arithmetic.arithmetic_rows("train", count=50, seed=5))
    assert again == rows[:50]
    assert again != list(arithmetic.arithmetic_rows("train", count=50, seed=6))
    # Frozen: the same on every machine and Python. Change it only with the templates.
    first = next(arithmetic.arithmetic_rows("test", count=1))
    assert first["prompt"] + first["completion"] == FIRST_TEST_ROW


def test_no_question_comes_twice(rows):
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_text_rows_have_no_worked_answers():
    worked = arithmetic.arithmetic_rows("train", count=40, seed=3)
    text = arithmetic.arithmetic_text_rows("train", count=40, seed=3)
    for row, plain in zip(worked, text, strict=True):
        assert plain == {"text": row["prompt"]}
        assert "=" not in plain["text"]


def test_one_grade():
    grades = {
        row["grade"] for row in arithmetic.arithmetic_rows("test", count=9, grades=3)
    }
    assert grades == {3}


def test_checkers(rows):
    row = rows[3]
    assert arithmetic.check_arithmetic(row["completion"], row["answer"])
    assert arithmetic.check_arithmetic_work(row["completion"], row["answer"])
    lucky = f"2 + 2 = 5\n#### {row['answer']}"
    assert arithmetic.check_arithmetic(lucky, row["answer"])
    assert not arithmetic.check_arithmetic_work(lucky, row["answer"])
    assert not arithmetic.check_arithmetic("no idea", row["answer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be"),
        ({"count": -1}, "count must be"),
        ({"grades": (1, 5)}, "grades must be"),
        ({"grades": ()}, "grades must be"),
        ({"form": "essay"}, "form must be"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.arithmetic_rows(arguments.pop("split", "train"), **arguments)


def test_wrong_grade():
    with pytest.raises(ValueError, match="grade must be"):
        arithmetic.arithmetic_problem(0, random.Random(0))


FIRST_TEST_ROW = (
    "Anna has 2 boxes with 8 comics in each. How many comics are there now?\n"
    "Anna has 2 * 8 = 16 comics.\n"
    "#### 16"
)
