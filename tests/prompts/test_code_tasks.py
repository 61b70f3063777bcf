"""Rows of HumanEval, MBPP and plain prompts as tasks."""

import pytest

from jaxpost import prompts


def run(source):
    exec(compile(source, "task", "exec"), {})


def test_humaneval_rows():
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def double(x):\n",
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }
    task = prompts.code_task(row)
    assert task.name == "HumanEval/0"
    run(task.program(task.solution))
    with pytest.raises(AssertionError):
        run(task.program("    return x\n"))


def test_mbpp_rows():
    row = {
        "task_id": 7,
        "text": "Double a number.",
        "code": "def double(x):\n    return 2 * x",
        "test_list": ["assert double(2) == 4", "assert double(n) == 6"],
        "test_setup_code": "n = 3",
    }
    task = prompts.code_task(row)
    assert "Double a number.\nassert double(2) == 4" in task.prompt
    run(task.program(task.solution))
    with pytest.raises(AssertionError):
        run(task.program("def double(x): return x"))


def test_plain_rows():
    task = prompts.code_task({"prompt": "x = ", "tests": ["assert x", "assert x > 1"]})
    run(task.program("2"))
    with pytest.raises(AssertionError):
        run(task.program("1"))
    bare = prompts.code_task({"prompt": "x = ", "completion": "1"}, name="row 3")
    assert (bare.name, bare.solution, bare.source("2")) == ("row 3", "1", "x = 2")
    with pytest.raises(ValueError, match="'row 3' has no tests"):
        bare.program("1")


def test_a_row_without_a_prompt():
    with pytest.raises(ValueError, match="column 'prompt' must be text, got NoneType"):
        prompts.code_task({"question": "?"}, name="row 1")
