"""Strings only: chat templates, and what is read off answers.

Knows no tokenizer, model or data set.
"""

from jaxpost.prompts._answers import (
    answers_equal,
    exact_match,
    extract_final_answer,
    normalize_number,
    wrong_calculations,
)
from jaxpost.prompts._chat_templates import CHAT_TEMPLATES, CHATML, PLAIN

__all__ = [
    "CHATML",
    "CHAT_TEMPLATES",
    "PLAIN",
    "answers_equal",
    "exact_match",
    "extract_final_answer",
    "normalize_number",
    "wrong_calculations",
]
