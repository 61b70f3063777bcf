"""Final answers of worked solutions: find, normalise, compare; check their sums.

Strings in, strings or truth values out. Knows the GSM8K form (`#### 42` on the last
line) and plain decimal numbers; knows no data set, tokenizer or reward.
"""

import operator
import re
from collections.abc import Callable
from fractions import Fraction

_MARK = "####"
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)\s*[$\u20ac\u00a3]?\s*(?P<sign2>[-+\u2212]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?",
    re.ASCII,
)
_CALCULATION = re.compile(
    r"(?<![\w.)])(-?\d+(?:\.\d+)?)\s*([-+*/x\u00d7\u00f7])\s*(\d+(?:\.\d+)?)"
    r"\s*=\s*(-?\d+(?:\.\d+)?)",
    re.ASCII,
)
_MAX_DIGITS = 64  # longer runs of digits are junk, and slow to convert


def _divide(left: Fraction, right: Fraction) -> Fraction | None:
    return left / right if right else None


_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction | None]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "x": operator.mul,
    "\u00d7": operator.mul,
    "/": _divide,
    "\u00f7": _divide,
}


def extract_final_answer(text: str) -> str | None:
    """The number after the last `####` of a worked answer, in normal form.

    Normal form has no thousands separators, currency sign, plus sign, leading zeros or
    trailing zeros after the point: `#### $1,250.00` gives `1250`.

    Args:
        text: a worked answer; anything may stand before the mark or after the number.

    Returns:
        The number as a string such as `-3`, `0.5` or `1250`, or None where there is no
        mark or no number of at most 64 digits right after the last one.

    Source: Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems"; the
    mark is that of its data set, GSM8K.
    """
    _, mark, rest = text.rpartition(_MARK)
    if not mark:
        return None
    return normalize_number(rest)


def normalize_number(text: str) -> str | None:
    """The decimal number that `text` starts with, in normal form.

    Args:
        text: begins with a number, after optional blanks, signs and a currency sign.

    Returns:
        The number as in `extract_final_answer`, or None where `text` starts otherwise.
    """
    match = _NUMBER.match(text.lstrip())
    if match is None:
        return None
    whole = (match["whole"] or "").replace(",", "")
    part = (match["part"] or "").removeprefix(".")
    if (not whole and not part) or len(whole) + len(part) > _MAX_DIGITS:
        return None
    whole = whole.lstrip("0") or "0"
    part = part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    minus = sum(match[name] in ("-", "\u2212") for name in ("sign", "sign2")) == 1
    return f"-{number}" if minus and number != "0" else number


def answers_equal(left: object, right: object) -> bool:
    """Whether two answers are the same number.

    Args:
        left: a number, or a string that starts with one; None never equals anything.
        right: likewise.

    Returns:
        True where both are numbers of the same normal form; False for any junk.
    """
    if left is None or right is None:
        return False
    first, second = normalize_number(str(left)), normalize_number(str(right))
    return first is not None and first == second


def exact_match(completion: str, answer: object) -> bool:
    """Whether a worked answer ends in the right number.

    Args:
        completion: generated text; junk is wrong, never an error.
        answer: the right number, as a number or a string.

    Returns:
        True where the number after the last `####` equals `answer`.
    """
    return answers_equal(extract_final_answer(completion), answer)


def wrong_calculations(text: str) -> list[str]:
    """The calculations `a op b = c` of a worked answer that do not hold.

    Args:
        text: a worked answer; `+ - * x × / ÷` and decimal numbers are understood,
            longer chains and everything else are left alone.

    Returns:
        Each calculation that is wrong, or divides by zero, as written.
    """
    wrong = []
    for match in _CALCULATION.finditer(text):
        if len(match[0]) > 4 * _MAX_DIGITS:
            continue
        left, right, result = (Fraction(match[n]) for n in (1, 3, 4))
        if _OPERATIONS[match[2]](left, right) != result:
            wrong.append(match[0])
    return wrong
