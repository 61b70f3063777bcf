"""Programming tasks as text: what to complete, and the program that tests an answer.

Knows the columns of HumanEval and MBPP, and rows of prompt and tests; runs nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# Where an answer ends that is one function: at the next thing without indentation.
FUNCTION_ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")
# Where one ends that is a program and may define more than one function: at its tests.
PROGRAM_ENDS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/")


@dataclasses.dataclass(frozen=True)
class CodeTask:
    """One task.

    Fields:
        name: of the task.
        prompt: text that a model continues.
        solution: what a person wrote there; None if unknown.
        tests: source that fails if the answer is wrong, run after prompt and answer;
            None if there are none.
        alone: whether an answer is a program without the prompt before it.
    """

    name: str
    prompt: str
    solution: str | None = None
    tests: str | None = None
    alone: bool = False

    def source(self, answer: str) -> str:
        """The answer as a program, without the tests."""
        return answer if self.alone else self.prompt + answer

    def program(self, answer: str) -> str:
        """The answer followed by the tests.

        Raises:
            ValueError: the task has no tests.
        """
        if self.tests is None:
            raise ValueError(f"task {self.name!r} has no tests to run an answer with.")
        return f"{self.source(answer)}\n\n{self.tests}\n"


def code_task(columns: Mapping[str, Any], *, name: str = "") -> CodeTask:
    """A task of one row.

    Args:
        columns: HumanEval's (`prompt`, `entry_point`, `test`, `canonical_solution`),
            MBPP's (`text`, `test_list`, `code`), or `prompt` with `tests` (source, or a
            list of lines) and `completion`, both optional.
        name: of the task, where the row has no `task_id`.

    Raises:
        ValueError: the row has none of these prompts, or a column is not text.
    """
    name = str(columns.get("task_id", name))
    if "entry_point" in columns and "test" in columns:
        entry = _text(columns, "entry_point", name)
        return CodeTask(
            name=name,
            prompt=_text(columns, "prompt", name),
            solution=_optional(columns, "canonical_solution", name),
            tests=f"{_text(columns, 'test', name)}\n\ncheck({entry})",
        )
    if "test_list" in columns:
        tests = columns["test_list"]
        asked = _text(columns, "text" if "text" in columns else "prompt", name)
        shown = "\n".join(tests)
        setup = columns.get("test_setup_code") or ""
        return CodeTask(
            name=name,
            prompt=f'"""\n{asked}\n{shown}\n"""\n',
            solution=_optional(columns, "code", name),
            tests=f"{setup}\n{shown}",
            alone=True,
        )
    tests = columns.get("tests")
    if isinstance(tests, Sequence) and not isinstance(tests, str):
        tests = "\n".join(tests)
    return CodeTask(
        name=name,
        prompt=_text(columns, "prompt", name),
        solution=_optional(columns, "completion", name),
        tests=tests,
    )


def _text(columns: Mapping[str, Any], key: str, name: str) -> str:
    value = columns.get(key)
    if not isinstance(value, str):
        raise ValueError(
            f"task {name!r}: column {key!r} must be text, got "
            f"{type(value).__name__}; the row has {', '.join(columns)}."
        )
    return value


def _optional(columns: Mapping[str, Any], key: str, name: str) -> str | None:
    return None if columns.get(key) is None else _text(columns, key, name)
