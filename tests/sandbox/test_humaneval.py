"""HumanEval's own solutions pass, each in a sandbox."""

import pytest

from jaxpost import data, prompts, sandbox

LIMITS = sandbox.Limits(wall_s=60.0, cpu_s=30)  # however busy the machine is


@pytest.fixture(scope="module")
def tasks(shared_data):
    reason = sandbox.refusal()
    if reason is not None:
        pytest.skip(reason)
    rows = data.load_rows(shared_data / "prompts/HumanEval.jsonl.gz")
    found = [prompts.code_task(row.columns) for row in rows]
    assert len(found) == 164
    return found


def failures(tasks, answer):
    programs = [task.program(answer(task)) for task in tasks]
    results = sandbox.run_many(programs, limits=LIMITS)
    named = zip(tasks, results, strict=True)
    return {task.name: result.detail for task, result in named if not result.passed}


def test_some_canonical_solutions_pass_and_other_answers_do_not(tasks):
    some = tasks[::16]
    assert failures(some, lambda task: task.solution) == {}
    wrong = failures(some, lambda task: "    return None\n")
    assert set(wrong) == {task.name for task in some}


@pytest.mark.slow
def test_all_canonical_solutions_pass(tasks):
    assert failures(tasks, lambda task: task.solution) == {}
