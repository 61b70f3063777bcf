"""Strings only: chat templates, what is read off answers, programs and their edits.

Knows no tokenizer or model.
"""

from jaxpost.prompts._answers import (
    answers_equal,
    exact_match,
    extract_final_answer,
    normalize_number,
    wrong_calculations,
)
from jaxpost.prompts._chat_templates import CHAT_TEMPLATES, CHATML, PLAIN
from jaxpost.prompts._code_edits import (
    TokenEdit,
    drop_comments,
    edit_items,
    rename_variables,
)
from jaxpost.prompts._code_tasks import (
    FUNCTION_ENDS,
    PROGRAM_ENDS,
    CodeTask,
    code_task,
)

__all__ = [
    "CHATML",
    "CHAT_TEMPLATES",
    "FUNCTION_ENDS",
    "PLAIN",
    "PROGRAM_ENDS",
    "CodeTask",
    "TokenEdit",
    "answers_equal",
    "code_task",
    "drop_comments",
    "edit_items",
    "exact_match",
    "extract_final_answer",
    "normalize_number",
    "rename_variables",
    "wrong_calculations",
]
