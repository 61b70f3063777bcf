"""`builtin:arithmetic`: word problems in four grades with worked answers.

A problem of grade `g` takes `g` calculations. Every number in it lies in 2..`LIMIT`.
Worked answers have one calculation per line and end in `#### N`, the form of GSM8K
(its `<<...>>` calculator marks are left out).

Whether a problem is a training or a test problem depends on its calculations alone, by
a hash: no test problem has the numbers and operations of any training problem, under
other names, in other words, or with the terms of a sum swapped. This holds for every
seed and count, so training and test rows may be drawn independently.

Knows nothing of tokens, models or files.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jaxpost.prompts import exact_match, wrong_calculations

Split = Literal["train", "test"]

GRADES = (1, 2, 3, 4)
LIMIT = 99
"""The largest number in a problem or its worked answer."""

_PRODUCT = 12  # largest factor

_TEST_SHARE = 26 / 256  # of all distinct calculations

_SHE = ("Mia", "Anna", "Sara", "Lena", "Zoe", "Ruth", "Nora", "Ivy", "Clara", "Maya")
_HE = ("Tom", "Ben", "Omar", "Leo", "Sam", "Hugo", "Ravi", "Finn", "Paul", "Noah")
_THINGS = tuple(
    """
    apples pears plums lemons oranges peaches cherries figs nuts grapes
    stamps coins cards marbles shells stones stickers buttons beads badges
    books pencils pens crayons comics posters balloons candles ribbons
    cookies muffins sweets eggs roses tulips seeds leaves feathers keys toys
    """.split()  # noqa: SIM905 - a list literal is forty lines
)
_WARES = tuple(
    "book scarf lamp hat mug bag clock kite puzzle ball cap vase toy belt".split()  # noqa: SIM905
)
_HOLDERS = ("boxes", "bags", "baskets", "jars", "packs", "bowls")

# Fields: {n} a child, {s} she, {S} She, {h} her, {f} another, {t} things, {b} number,
# {o} place in the order of events.
_STARTS = (
    "{n} has {b} {t}.",
    "{n} starts the day with {b} {t}.",
    "{n} owns {b} {t}.",
    "In the morning {n} counts {b} {t}.",
)
_GROUP_STARTS = (
    "{n} has {a} {c} with {b} {t} in each.",
    "{n} buys {a} {c} of {b} {t} each.",
    "{n} fills {a} {c} with {b} {t} each.",
)
_ORDER = ("Then", "Next", "Later", "Finally")  # also begins the line of the answer
_MORE = (
    "{o} {f} gives {h} {b} more {t}.",
    "{o} {s} buys {b} more {t}.",
    "{o} {s} finds {b} more {t}.",
    "{o} {s} gets {b} new {t} from {f}.",
    "{o} {s} collects {b} more.",
)
_LESS = (
    "{o} {s} gives {b} of them to {f}.",
    "{o} {s} loses {b} {t}.",
    "{o} {s} sells {b} of the {t}.",
    "{o} {f} takes {b} of the {t}.",
    "{o} {s} puts {b} of them away.",
)
_TIMES = (
    "{o} {s} makes it {b} times as many.",
    "{o} {s} trades them for {b} times as many {t}.",
)
_SHARES = (
    "{o} {s} sorts them into {b} equal piles and keeps one pile.",
    "{o} {s} splits them equally among {b} children and keeps only one share.",
)
_TICKETS = (
    "{S} also gets {a} tickets to the fair at {b} dollars each.",
    "{S} also pays for {a} bus tickets at {b} dollars each.",
)
_INVENTORY_QUESTIONS = (
    "How many {t} does {n} have now?",
    "How many {t} does {n} have in the end?",
    "How many {t} are there now?",
)


class Problem(NamedTuple):
    """One word problem.

    Fields:
        grade: number of calculations, 1 to 4.
        question: the statement, one paragraph without a line break.
        solution: the worked answer; its last line is `#### answer`.
        answer: the final number.
        signature: its calculations, the terms of sums and products in order; decides
            the split.
    """

    grade: int
    question: str
    solution: str
    answer: int
    signature: str


class _OutOfRangeError(Exception):
    """A draft left 2..LIMIT; another is drawn."""


class _Draft:
    """Sentences, worked lines and calculations of a problem in the making."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.calculations: list[str] = []
        self.name, self.friend, self.third = rng.sample(_SHE + _HE, 3)
        female = self.name in _SHE
        things = rng.choice(_THINGS)
        self.words = {
            "n": self.name,
            "f": self.friend,
            "s": "she" if female else "he",
            "S": "She" if female else "He",
            "h": "her" if female else "him",
            "t": things,
        }

    def say(self, choices: Sequence[str], **more: object) -> None:
        """Append a sentence to the question."""
        self.sentences.append(self.rng.choice(choices).format(**self.words, **more))

    def work(self, left: int, sign: str, right: int, line: str, **more: object) -> int:
        """Append a line to the worked answer; `{w}` in it is the calculation."""
        result = {
            "+": left + right,
            "-": left - right,
            "*": left * right,
            "/": left // right,
        }[sign]
        if not 2 <= result <= LIMIT or (sign == "/" and result * right != left):
            raise _OutOfRangeError
        calculation = f"{left} {sign} {right} = {result}"
        self.lines.append(line.format(**self.words, **more, w=calculation))
        ordered = sorted((left, right)) if sign in "+*" else (left, right)
        self.calculations.append(f"{ordered[0]}{sign}{ordered[1]}")
        return result

    def number(self, low: int, high: int) -> int:
        """A number in `low`..`high`; the draft is given up where there is none."""
        if high < low:
            raise _OutOfRangeError
        return self.rng.randint(low, high)

    def change(self, high: int) -> int:
        """A number up to `high` to add or take away: mostly of one digit."""
        most = 9 if self.rng.random() < 0.75 else 20
        return self.number(2, min(most, high))

    def round_number(self) -> int:
        """A multiple of ten."""
        return 10 * self.number(1, LIMIT // 10)


def _inventory(draft: _Draft, steps: int) -> int:
    """One child's things grow and shrink, `steps` times."""
    if draft.rng.random() < 0.25:
        groups = draft.number(2, 9)
        each = draft.number(2, min(_PRODUCT, LIMIT // groups))
        draft.say(_GROUP_STARTS, a=groups, b=each, c=draft.rng.choice(_HOLDERS))
        count = draft.work(groups, "*", each, "{n} has {w} {t}.")
        steps -= 1
    else:
        count = draft.number(2, LIMIT - 2)
        draft.say(_STARTS, b=count)
    for order in _ORDER[:steps]:
        count = _event(draft, count, order)
    draft.say(_INVENTORY_QUESTIONS)
    return count


def _event(draft: _Draft, count: int, order: str) -> int:
    """One thing that happens to a number of things."""
    kind = draft.rng.choices("+-*/", weights=(8, 8, 3, 3))[0]
    if kind == "+":
        by, choices, line = draft.change(LIMIT - count), _MORE, "{o} {s} has {w} {t}."
    elif kind == "-":
        by, choices, line = draft.change(count - 2), _LESS, "{o} {s} has {w} {t} left."
    elif kind == "*":
        by, choices = draft.number(2, min(5, LIMIT // count)), _TIMES
        line = "{o} {s} has {w} {t}."
    else:
        divisors = [d for d in range(2, 10) if count % d == 0 and count // d >= 2]
        if not divisors:
            raise _OutOfRangeError
        by, choices, line = (
            draft.rng.choice(divisors),
            _SHARES,
            "{o} {s} keeps {w} {t}.",
        )
    draft.say(choices, b=by, o=order)
    return draft.work(count, kind, by, line, o=order)


def _relation(draft: _Draft, first: str, count: int, second: str) -> int:
    """How many `second` has, told by how many `first` has."""
    kind = draft.rng.choices("+-*", weights=(3, 3, 1))[0]
    if kind == "*":
        by = draft.number(2, min(5, LIMIT // count))
        sentence = "{y} has {b} times as many {t} as {x}."
    elif kind == "+":
        by = draft.change(LIMIT - count)
        sentence = "{y} has {b} more {t} than {x}."
    else:
        by = draft.change(count - 2)
        sentence = "{y} has {b} fewer {t} than {x}."
    draft.say((sentence,), x=first, y=second, b=by)
    return draft.work(count, kind, by, "{y} has {w} {t}.", y=second)


def _compare(draft: _Draft, steps: int) -> int:
    """Two or three children's things, told by their differences and then added up."""
    a, b, c = draft.name, draft.friend, draft.third
    is_round = draft.rng.random() < 0.5
    count_a = draft.round_number() if is_round else draft.number(2, LIMIT // 2)
    draft.say(_STARTS[:3:2], b=count_a)
    count_b = _relation(draft, a, count_a, b)
    if steps == 1:
        draft.say(("How many {t} does {f} have?", "How many {t} has {f} got?"))
        return count_b
    if steps == 2:
        draft.say(("How many {t} do {n} and {f} have together?",))
        return draft.work(count_a, "+", count_b, "Together they have {w} {t}.")
    count_c = _relation(draft, b, count_b, c)
    if steps == 3:
        draft.say(("How many {t} do {f} and {c} have together?",), c=c)
        return draft.work(count_b, "+", count_c, "Together they have {w} {t}.")
    draft.say(("How many {t} do all three children have?",))
    both = draft.work(count_a, "+", count_b, "{n} and {f} have {w} {t}.")
    return draft.work(both, "+", count_c, "All three have {w} {t}.")


def _shopping(draft: _Draft, steps: int) -> int:
    """Things bought at a price each, another ware, and the change."""
    many = draft.number(2, 9)
    price = draft.number(2, min(_PRODUCT, LIMIT // many))
    draft.say(("{n} buys {a} {t} at {b} dollars each.",), a=many, b=price)
    cost = draft.work(many, "*", price, "The {t} cost {w} dollars.")
    if steps == 1:
        draft.say(("How many dollars does {n} spend?", "How much do the {t} cost?"))
        return cost
    if steps == 4:
        tickets = draft.number(2, 5)
        each = draft.number(2, min(_PRODUCT, LIMIT // tickets))
        draft.say(_TICKETS, a=tickets, b=each)
        other = draft.work(tickets, "*", each, "The tickets cost {w} dollars.")
    else:
        other = draft.change(LIMIT - cost)
        draft.say(
            ("{S} also buys a {c} for {b} dollars.",),
            b=other,
            c=draft.rng.choice(_WARES),
        )
    total = draft.work(cost, "+", other, "{S} spends {w} dollars.")
    if steps == 2:
        draft.say(("How many dollars does {n} spend in all?",))
        return total
    paid = draft.round_number()  # where it is too little, the draft is given up
    draft.say(("{S} came with {b} dollars.", "At first {s} had {b} dollars."), b=paid)
    draft.say(("How many dollars are left?", "How many dollars does {s} keep?"))
    return draft.work(paid, "-", total, "{S} has {w} dollars left.")


_Scene = Callable[[_Draft, int], int]
_SCENES: tuple[_Scene, ...] = (_inventory, _compare, _shopping)
_WEIGHTS = (4, 2, 2)


def arithmetic_problem(grade: int, rng: random.Random) -> Problem:
    """Draw one problem of a grade, for either split.

    Args:
        grade: 1 to 4, the number of calculations.
        rng: advanced by an amount that varies.

    Returns:
        The problem.

    Raises:
        ValueError: there is no such grade.
    """
    if grade not in GRADES:
        raise ValueError(f"grade must be one of {GRADES}, got {grade!r}.")
    while True:
        draft = _Draft(rng)
        try:
            answer = rng.choices(_SCENES, weights=_WEIGHTS)[0](draft, grade)
        except _OutOfRangeError:
            continue
        return Problem(
            grade=grade,
            question=" ".join(draft.sentences),
            solution="\n".join([*draft.lines, f"#### {answer}"]),
            answer=answer,
            signature=";".join(draft.calculations),
        )


def arithmetic_split(signature: str) -> Split:
    """Which split a problem belongs to: about one in ten signatures is for tests.

    Args:
        signature: `Problem.signature`.

    Returns:
        "train" or "test", the same on every machine and for every seed.
    """
    digest = hashlib.sha256(signature.encode()).digest()
    return "test" if digest[0] < 256 * _TEST_SHARE else "train"


def arithmetic_rows(
    split: Split,
    *,
    count: int = 10_000,
    seed: int = 0,
    grades: int | Sequence[int] = GRADES,
    form: Literal["worked", "question"] = "worked",
) -> Iterator[dict[str, Any]]:
    """Problems as rows, in TRL's columns.

    Args:
        split: "train" or "test"; disjoint in numbers and operations, for all seeds.
        count: how many rows.
        seed: other seeds give other rows of the same split.
        grades: which grades, in the order in which they take turns.
        form: "worked" for prompts and completions, "question" for plain text.

    Returns:
        An iterator of rows. Worked: `prompt` (the question and a line break),
        `completion` (the worked answer, ends in `#### N`), `answer` (N as a string) and
        `grade` (int). Question: `text`, the prompt of that row (same seed) and
        nothing else.

    Raises:
        ValueError: an unknown split, grade or form, no grade, or a negative count.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}.")
    chosen = (grades,) if isinstance(grades, int) else tuple(grades)
    if not chosen or not set(chosen) <= set(GRADES):
        raise ValueError(f"grades must be some of {GRADES}, got {chosen!r}.")
    if form not in _FORMS:
        raise ValueError(f"form must be one of {tuple(_FORMS)}, got {form!r}.")
    problems = _draw(split, count, seed, chosen)
    return map(_FORMS[form], problems)


def arithmetic_text_rows(
    split: Split,
    *,
    count: int = 10_000,
    seed: int = 0,
    grades: int | Sequence[int] = GRADES,
) -> Iterator[dict[str, Any]]:
    """The questions alone: `arithmetic_rows(..., form="question")`."""
    return arithmetic_rows(
        split, count=count, seed=seed, grades=grades, form="question"
    )


def _draw(
    split: Split, count: int, seed: int, grades: Sequence[int]
) -> Iterator[Problem]:
    """Distinct problems, the grades in turn; a shorter call gives a prefix."""
    # A string seed is hashed with SHA-512: the same stream on every machine.
    rng = random.Random(f"jaxpost arithmetic {seed} {split}")
    seen: set[str] = set()
    for index in range(count):
        while True:
            problem = arithmetic_problem(grades[index % len(grades)], rng)
            if problem.question in seen:
                continue
            if arithmetic_split(problem.signature) == split:
                break
        seen.add(problem.question)
        yield problem


def _worked_row(problem: Problem) -> dict[str, Any]:
    return {
        "prompt": problem.question + "\n",
        "completion": problem.solution,
        "answer": str(problem.answer),
        "grade": problem.grade,
    }


def _question_row(problem: Problem) -> dict[str, Any]:
    return {"text": problem.question + "\n"}


_FORMS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "worked": _worked_row,
    "question": _question_row,
}


def check_arithmetic(completion: str, answer: object) -> bool:
    """Whether a worked answer ends in the right number.

    Args:
        completion: generated text.
        answer: the row's `answer`.

    Returns:
        True for the right final number, whatever the lines before it say.
    """
    return exact_match(completion, answer)


def check_arithmetic_work(completion: str, answer: object) -> bool:
    """Whether a worked answer ends in the right number and every calculation holds.

    Args:
        completion: generated text.
        answer: the row's `answer`.

    Returns:
        True where `check_arithmetic` is and no `a op b = c` in the text is wrong.
    """
    return exact_match(completion, answer) and not wrong_calculations(completion)
