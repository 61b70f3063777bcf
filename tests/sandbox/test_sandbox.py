"""Programs in sandboxes: how they end, what is kept, and where nothing is run."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from jaxpost import sandbox
from jaxpost.sandbox import _run

LIMITS = sandbox.Limits(wall_s=20.0)


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    reason = sandbox.refusal()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("print('seen')", "passed", ""),
        ("assert 1 + 1 == 3, 'sums'", "failed", "AssertionError: sums"),
        ("def f(:", "failed", "SyntaxError"),
        ("import sys; sys.exit(3)", "failed", "exit status 3"),
        ("import sys; sys.exit(0)", "failed", "before its last line"),
        ("import os; os._exit(0)", "failed", "before its last line"),
        ("import os; os.abort()", "killed", "SIGABRT"),
        ("import numpy", "failed", "ModuleNotFoundError"),
    ],
)
def test_how_a_program_ended(program, status, detail):
    result = sandbox.run(program, limits=LIMITS)
    assert result.status == status
    assert detail in result.detail
    assert result.isolated
    assert result.ran
    assert result.passed == (status == "passed")


def test_long_programs_and_half_characters_are_written():
    program = f"x = {'1' * 2_000_000!r}\nassert len(x) == 2_000_000  # \ud800"
    assert sandbox.run(program, limits=LIMITS).passed


def test_leaving_early_may_be_allowed():
    program = "import unittest, sys; sys.exit(0)"
    assert sandbox.run(program, limits=LIMITS, must_finish=False).passed


def test_the_ends_of_both_outputs_are_kept():
    limits = dataclasses.replace(LIMITS, tail_bytes=8)
    program = "import sys\nprint('0123456789')\nprint('abcdefghij', file=sys.stderr)"
    result = sandbox.run(program, limits=limits)
    assert result.stdout == "3456789\n"
    assert result.stderr == "defghij\n"


def test_a_traceback_is_the_programs_own():
    result = sandbox.run("def f():\n    1 / 0\n\nf()", limits=LIMITS)
    assert 'File "/program.py", line 2, in f' in result.stderr
    assert "driver" not in result.stderr


def test_a_program_is_a_module_of_its_own_and_reads_its_input():
    program = "import sys\nif __name__ == '__main__': print(input(), sys.argv[1:])"
    result = sandbox.run(program, stdin="a line\n", limits=LIMITS)
    assert result.stdout == "a line []\n"


def test_the_callers_environment_stays_outside(monkeypatch):
    monkeypatch.setenv("TOKEN_OF_THE_CALLER", "secret")
    result = sandbox.run("import os; print(sorted(os.environ))", limits=LIMITS)
    assert "TOKEN_OF_THE_CALLER" not in result.stdout


def test_it_is_no_root_and_cannot_become_root():
    program = """
import os
print(os.getuid(), os.geteuid(), os.getgid())
for become in (os.setuid, os.setgid):
    try:
        become(0)
    except PermissionError:
        print('no')
"""
    assert sandbox.run(program, limits=LIMITS).stdout == "1000 1000 1000\nno\nno\n"


def test_threads_and_children_within_the_limit_work():
    program = """
import subprocess, threading
found = []
threads = [threading.Thread(target=found.append, args=(i,)) for i in range(3)]
for t in threads: t.start()
for t in threads: t.join()
assert sorted(found) == [0, 1, 2]
assert subprocess.run(["true"], stdin=subprocess.DEVNULL).returncode == 0
"""
    result = sandbox.run(program, limits=LIMITS)
    assert result.passed, result.stderr


def test_many_programs_keep_their_order_and_report_progress():
    seen = []
    programs = [f"print({i}); assert {i} != 3" for i in range(5)]
    results = sandbox.run_many(
        programs, limits=LIMITS, workers=2, progress=lambda *done: seen.append(done)
    )
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(5)]
    assert [r.passed for r in results] == [True, True, True, False, True]
    assert seen == [(i, 5) for i in range(1, 6)]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert sandbox.run("open('x', 'w').write('y')", limits=LIMITS).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("report", "detail"),
    [
        (None, "the launcher did not answer: nothing for 30 s"),
        ({}, "the supervisor ended without a report"),
        (
            {"status": 127 << 8, "stderr": "sandbox: [Errno 11] again", "said": ""},
            "sandbox: [Errno 11] again",
        ),
    ],
)
def test_failures_of_the_sandbox_are_not_the_programs(monkeypatch, report, detail):
    monkeypatch.setattr(_run, "_launch", lambda *_: (report, "nothing for 30 s"))
    result = sandbox.run("", limits=LIMITS)
    assert not result.ran
    assert result.detail == detail


def test_going_over_a_limit_is_the_programs():
    limits = dataclasses.replace(LIMITS, wall_s=0.5)
    result = sandbox.run("while True: pass", limits=limits)
    assert (result.status, result.ran) == ("timeout", True)


def test_where_namespaces_are_refused_nothing_is_run(monkeypatch, tmp_path):
    mark = tmp_path / "ran"
    launch = _run._launch

    def refuse(task, timeout_s):
        if task["isolate"]:
            return {"refused": "new namespaces: Operation not permitted"}, ""
        return launch(task, timeout_s)

    monkeypatch.setattr(_run, "_launch", refuse)
    program = f"open({str(mark)!r}, 'w')"
    result = sandbox.run(program, limits=LIMITS)
    assert result.status == "refused"
    assert not result.ran
    assert "Operation not permitted" in result.detail
    assert "--unsafe-sandbox" in result.detail
    assert not mark.exists()
    result = sandbox.run(program, limits=LIMITS, unsafe=True)
    assert result.passed, result
    assert not result.isolated
    assert mark.exists()


def test_uncontained_programs_still_have_limits_and_end_with_their_children(tmp_path):
    mark = tmp_path / "still here"
    program = f"""
import subprocess, sys, time
later = "import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
subprocess.Popen([sys.executable, "-c", later], start_new_session=True)
while True: time.sleep(1)
"""
    limits = dataclasses.replace(LIMITS, wall_s=0.5)
    result = _run._run(program, limits, "", True, isolate=False)
    assert result.status == "timeout"
    assert result.peak_processes >= 1
    _run._run("import time; time.sleep(1.5)", LIMITS, "", True, isolate=False)
    assert not mark.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_can_use_it():
    """Without any privilege outside, and with one user only to give away inside."""
    pythons = [os.path.realpath(sys.executable), "/usr/bin/python3"]
    package = pathlib.Path(sandbox.__file__).parents[2]
    python = next(filter(open_to_all, pythons), None)
    if python is None or not open_to_all(__file__):
        pytest.skip("Python, or this folder, is closed to ordinary users here")
    code = f"""
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.path.insert(0, {str(package)!r})
from jaxpost import sandbox
fork_bomb = "import os\\nwhile True:\\n try: os.fork()\\n except OSError: pass"
for program in ("import os; print(os.getuid())", "open('/tmp/x', 'w')", fork_bomb):
    result = sandbox.run(program, limits=sandbox.Limits(wall_s=20.0, processes=8))
    print(result.status, result.isolated, result.stdout.strip(), result.detail)
"""
    out = subprocess.run(
        [python, "-S", "-B", "-c", code], capture_output=True, text=True, cwd="/"
    )
    first, second, third = out.stdout.splitlines() or [out.stderr] * 3
    assert first == "passed True 1000 "
    assert second == "passed True  "
    assert third.startswith("processes True")


def open_to_all(path):
    """Whether every user may read a file: it, and all folders above it."""
    whole = pathlib.Path(path).resolve()
    return whole.exists() and all(
        place.stat().st_mode & 0o001 for place in whole.parents
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wall_s": 0.0}, "wall_s must be positive"),
        ({"processes": 0}, "processes must be a whole number"),
        ({"memory_mb": 1.5}, "memory_mb must be a whole number"),
        ({"memory_mb": 32}, "memory_mb must be at least 64"),
    ],
)
def test_limits_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        sandbox.Limits(**change)


def test_workers_are_checked():
    with pytest.raises(ValueError, match="workers must be at least 1"):
        sandbox.run_many(["pass"], workers=0)


def test_examples_of_the_guide_run():
    guide = pathlib.Path(__file__).parents[2] / "docs" / "sandbox.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(guide), "exec"), names)
    assert sandbox.run(names["program"], limits=LIMITS).passed
