"""`jaxpost watermark eval` on a model that knows nothing and tasks whose verdicts are
known, and its parts."""

import dataclasses
import json
import math

import pytest
from toy_models import save_pair

from jaxpost import cli, data, evaluation, prompts, sandbox
from jaxpost.recipes import _watermark_report as report
from jaxpost.recipes._watermark_answers import parses
from jaxpost.recipes._watermark_edits import KINDS, RATES, edits
from jaxpost.recipes._watermark_judge import _run_programs, settings_of
from jaxpost.recipes.watermark_eval import (
    WatermarkEvalConfig,
    open_bench,
    run_watermark_eval,
    stop_of,
)

GAMMA, TOKENS = 0.25, 12


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, and tasks: an answer is a comment, so the tests alone decide."""
    root = tmp_path_factory.mktemp("watermark")
    rows = [
        {"task_id": name, "prompt": "pass  #", "completion": " of a person", "tests": t}
        for name, t in (("right", "assert True"), ("wrong", "assert False"))
    ]
    path = root / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return root, save_pair(root)["base"], str(path)


@pytest.fixture(scope="module")
def found(places):
    if sandbox.refusal() is not None:
        pytest.skip(str(sandbox.refusal()))
    root, model, tasks = places
    flags = [
        *(model, "--tasks", tasks, "--run-root", str(root), "--name", "run"),
        *("--gammas", str(GAMMA), "--deltas", "40", "--tau", "0.5"),
        *("--robust-gamma", str(GAMMA), "--robust-delta", "40"),
        *("--samples", "2", "--k", "1", "2", "--max-new-tokens", str(TOKENS)),
        *("--temperature", "1.0", "--stop", "\n", "--batch-size", "4"),
    ]
    assert cli.main(["watermark", "eval", *flags]) == 0
    folder = root / "run"
    answers = (folder / "answers.jsonl").read_text("utf-8").splitlines()
    return (
        folder,
        json.loads((folder / "results.json").read_text("utf-8")),
        [json.loads(line) for line in answers],
    )


def test_every_way_to_mark_is_measured(found):
    folder, results, rows = found
    names = [line["method"] for line in results["settings"]]
    assert names == ["unmarked", "sweet", "wllm"]
    assert len(rows) == 3 * 2 * 2
    for line in results["settings"]:
        assert line["pass@1"] == line["pass@2"] == 0.5
        assert line["parse_rate"] == 1.0
        assert line["statuses"] == {"passed": 2, "failed": 2}
    assert {(row["task"], row["status"]) for row in rows} == {
        ("right", "passed"),
        ("wrong", "failed"),
    }
    assert (folder / "pareto.svg").read_text("utf-8").startswith("<?xml")
    table = (folder / "table.md").read_text("utf-8")
    assert "| wllm | 0.25 | 40 |" in table
    assert "| 2 passed, 2 failed |" in table
    assert results["config"]["stop"] == ["\n"]


def test_the_secret_is_not_written(found):
    folder, results, _ = found
    for path in folder.iterdir():
        assert str(WatermarkEvalConfig("m", "t").secret) not in path.read_text("utf-8")
    assert len(results["config"]["secret"]) == 16


def test_a_mark_that_leaves_no_choice_is_found(found):
    _, results, rows = found
    for row in rows:
        if row["setting"].startswith("wllm"):
            scored = row["scored"]
            assert scored == row["tokens"]
            expected = math.sqrt(scored * (1.0 - GAMMA) / GAMMA)  # all are green
            assert row["z"] == pytest.approx(expected, rel=1e-6)
    sweet, wllm = results["settings"][1:]
    for line in (sweet, wllm):
        assert line["auroc"] == line["auroc_unmarked"] == 1.0
        assert line["tpr@0"] == line["tpr@0.05"] == 1.0
    firsts = [r["z"] for r in rows if r["sample"] == 0 and r["setting"][:4] == "wllm"]
    assert wllm["mean_z"] == pytest.approx(sum(firsts) / 2)


def test_edits_are_detected_one_by_one(found):
    _, results, _ = found
    lines = results["robustness"]
    assert len(lines) == 2 * (3 + len(KINDS) * len(RATES))
    by_edit = {line["edit"]: line for line in lines if line["method"] == "wllm"}
    # The comment that an answer goes on with begins in the prompt, which is left alone.
    assert by_edit["drop comments"]["mean_z"] == by_edit["none"]["mean_z"]
    assert by_edit["none"]["mean_z"] > by_edit["substitute 30%"]["mean_z"]


def test_a_folder_is_not_written_twice(places, found):
    root, model, tasks = places
    config = WatermarkEvalConfig(model, tasks, name="run", run_root=str(root))
    with pytest.raises(FileExistsError, match="choose another --name"):
        run_watermark_eval(config)


def test_generated_programs_are_not_run_uncontained(places, monkeypatch):
    root, model, tasks = places
    monkeypatch.setattr(sandbox, "refusal", lambda: "untrusted code is not run: no")
    config = WatermarkEvalConfig(model, tasks, name="none", run_root=str(root))
    with pytest.raises(ValueError, match="untrusted code is not run"):
        run_watermark_eval(config)
    assert not (root / "none").exists()


def test_programs_that_the_sandbox_did_not_run_are_tried_again(monkeypatch):
    lost = sandbox.SandboxResult("killed", "the launcher did not answer", ran=False)
    calls, failures = [], 1

    def run_many(programs, *, workers, **_):
        calls.append((list(programs), workers))
        failed = lost if len(calls) <= failures else sandbox.SandboxResult("passed")
        return [
            failed if p == "two" else sandbox.SandboxResult("failed") for p in programs
        ]

    monkeypatch.setattr(sandbox, "run_many", run_many)
    config = WatermarkEvalConfig("model", "tasks", workers=3)
    asked = (config, ["one", "two"], ["task a, sample 0", "task b, sample 0"], None)
    found = _run_programs(*asked)
    assert [result.status for result in found] == ["failed", "passed"]
    assert calls == [(["one", "two"], 3), (["two"], 1)]
    calls, failures = [], 2
    with pytest.raises(
        OSError, match="task b, sample 0: the sandbox failed twice .*did"
    ):
        _run_programs(*asked)


HUMANEVAL = {"prompt": "def f():", "entry_point": "f", "test": "def check(f): pass"}
MBPP = {"text": "Return 1.", "test_list": ["assert f() == 1"]}


def test_answers_end_where_their_kind_of_task_does():
    one, several = (prompts.code_task(row) for row in (HUMANEVAL, MBPP))
    config = WatermarkEvalConfig("model", "tasks")
    assert stop_of(config, [one, one]) == prompts.FUNCTION_ENDS
    ends = stop_of(config, [several])
    helper = "def g():\n    return 1\n\n# uses it\n@cache\ndef f():\n    return g()\n"
    assert not any(end in helper for end in ends)
    assert any(end in f"{helper}assert f() == 1" for end in ends)
    with pytest.raises(ValueError, match="tasks has tasks .* give --stop"):
        stop_of(config, [one, several])
    given = dataclasses.replace(config, stop=("END",))
    assert stop_of(given, [one, several]) == ("END",)


def test_answers_must_fit(places):
    root, model, tasks = places
    config = WatermarkEvalConfig(model, tasks, max_new_tokens=128, run_root=str(root))
    with pytest.raises(ValueError, match="task right: .* 128 new ones are more than"):
        run_watermark_eval(config)


def test_tasks_that_do_not_fit_may_be_left_out(places, tmp_path):
    _, model, tasks = places
    long = {"task_id": "long", "prompt": "# long " * 40, "completion": "x"}
    with open(tasks, encoding="utf-8") as file:
        text = json.dumps(long) + "\n" + file.read()
    path = tmp_path / "tasks.jsonl"
    path.write_text(text, "utf-8")
    config = WatermarkEvalConfig(
        model, str(path), max_new_tokens=TOKENS, max_tasks=1, skip_long=True
    )
    bench = open_bench(config)
    assert [task.name for task in bench.tasks] == ["right"]
    assert len(bench.prompts) == 1
    with pytest.raises(ValueError, match="task long: .* leave such tasks out"):
        open_bench(dataclasses.replace(config, skip_long=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"k": (2,)}, "k must lie between 1 and samples=1"),
        ({"gammas": ()}, "gammas is empty"),
        ({"robust_delta": 2.5}, "must be on the grid"),
        ({"memory_mb": 1}, "memory_mb must be at least 64"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        WatermarkEvalConfig("model", "tasks", **change)


def test_the_grid_begins_without_a_mark():
    found = settings_of(("sweet", "wllm"), (0.1, 0.5), (1.0,), tau=0.9)
    assert [s.name for s in found] == [
        "unmarked",
        "sweet gamma=0.1 delta=1",
        "sweet gamma=0.5 delta=1",
        "wllm gamma=0.1 delta=1",
        "wllm gamma=0.5 delta=1",
    ]
    assert [s.tau for s in found[1:]] == [0.9, 0.9, -1.0, -1.0]


@pytest.mark.parametrize(
    ("source", "complete", "expected"),
    [
        ("def f():\n    return 1", True, True),
        ("def f():\n    return (1", True, False),
        ("def f():\n    x = 1\n    return (1", False, True),
        ("def f():\n    return (1\n    x", False, False),
        ("x\0", True, False),
        ("", True, True),
    ],
)
def test_parsing(source, complete, expected):
    assert parses(source, complete=complete) is expected


def test_a_frontier_holds_what_nothing_beats():
    points = [(0.5, 1.0), (0.6, 0.9), (0.6, 0.8), (0.55, 0.9), (0.9, 0.1), (0.4, 1.0)]
    assert report.frontier(points) == [(0.5, 1.0), (0.6, 0.9), (0.9, 0.1)]


def test_quality_is_passing_where_there_are_tests():
    assert report.quality_of([{"pass@10": 1, "pass@1": 0, "parse_rate": 1}]) == "pass@1"
    assert report.quality_of([{"parse_rate": 1}]) == "parse_rate"


def test_edits_leave_the_prompt_alone_and_keep_what_programs_do():
    words = data.train_word_tokenizer(["def f ( ) : total = 1 return"])
    task = prompts.CodeTask("t", "def f(n):\n    # prompt\n")
    text = "    total = n  # mine\n    return total\n"
    broken = "    return (\n"
    found = {e.name: e.texts for e in edits(words, [task] * 2, [text, broken], seed=0)}
    assert found["none"] == [text, broken]
    assert found["rename variables"] == ["    v1 = n  # mine\n    return v1\n", None]
    assert found["drop comments"] == ["    total = n\n    return total\n", None]
    assert found["delete 30%"][0] != text
    again = {e.name: e.texts for e in edits(words, [task], [text], seed=0)}
    assert again["insert 10%"][0] == found["insert 10%"][0]


def test_detection_of_the_recipe_is_that_of_evaluation():
    assert f"tpr@{evaluation.FALSE_POSITIVE_RATES[-1]:g}" == report.TPR
