"""Rewards that raise, hang or die: counted, given up in time, never a zero."""

import os
import pathlib
import threading
import time

import numpy as np
import pytest

from jaxpost import rewards
from jaxpost.rewards import _calls

OWN = '''
import asyncio, os, subprocess, sys, time

calls = 0


def lengths(completions, **columns):
    return [float(len(text)) for text in completions]


def scaled(completions, factor, **columns):
    return [factor * len(text) for text in completions]


def strict(completions, *, factor=1.0):
    return [factor * len(text) for text in completions]


async def later(completions):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def counts(completions):
    global calls
    calls += 1
    return [float(calls)] * len(completions)


def process(completions):
    return [float(os.getpid())] * len(completions)


def broken(completions):
    raise KeyError("no such thing")


def leaves(completions):
    raise SystemExit(3)


def dies(completions):
    os._exit(3)


def unsendable(completions):
    return [lambda: 0.0] * len(completions)


def noisy(completions):
    print("what a reward prints does no harm")
    return [0.0] * len(completions)


def hangs_if_asked(completions, note):
    """Waits for a program of its own, whose id it notes."""
    if "hang" in completions:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(note, "w") as file:
            file.write(str(child.pid))
        child.wait()
    return [1.0] * len(completions)


number = 4
'''


@pytest.fixture(autouse=True)
def own_rewards(tmp_path, monkeypatch):
    """A user's module, found from the current folder."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def section(function, **options):
    return rewards.RewardSection(f"own_rewards:{function}", **options)


def ask(scorer, completions=("a", "bc")):
    count = len(completions)
    return scorer(["p"] * count, list(completions), [[1]] * count)


def gone(process_id, within_s=10.0):
    """Whether a process ends soon; one that has but is not waited for has ended."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        try:
            stat = pathlib.Path(f"/proc/{process_id}/stat").read_text()
        except FileNotFoundError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_ones_own_function_runs_in_one_process_for_all_calls(capfd):
    sections = [
        section("lengths"),
        section("scaled", settings={"factor": 3.0}),
        section("later"),
        section("counts"),
        section("process"),
        section("noisy"),
    ]
    with rewards.Scorer(sections) as scorer:
        first, second = ask(scorer), ask(scorer)
    np.testing.assert_array_equal(first.parts["lengths"], [1, 2])
    np.testing.assert_array_equal(first.parts["scaled"], [3, 6])
    np.testing.assert_array_equal(first.parts["later"], [1, 1])
    np.testing.assert_array_equal(first.parts["counts"], [1, 1])
    np.testing.assert_array_equal(second.parts["counts"], [2, 2])
    worker = int(first.parts["process"][0])
    assert worker == second.parts["process"][0] != os.getpid()
    assert gone(worker)
    assert "does no harm" in capfd.readouterr().out


@pytest.mark.parametrize("isolate", ["none", "thread", "process"])
def test_errors_are_counted_and_stop_the_run_when_they_go_on(isolate):
    scorer = rewards.Scorer(
        [section("broken", isolate=isolate, stop_after=2), section("lengths")]
    )
    with scorer:
        with pytest.warns(
            RuntimeWarning, match="'broken' gave no verdict on 2 answers"
        ):
            found = ask(scorer)
        assert not found.given.any()  # the lengths alone would teach something else
        assert np.isnan(found.rewards).all()
        np.testing.assert_array_equal(found.parts["lengths"], [1, 2])
        assert found.numbers["rewards/broken/errors"] == 1.0
        assert found.numbers["rewards/broken/timeouts"] == 0.0
        assert found.numbers["rewards/broken/no_verdict"] == 2.0
        assert "rewards/broken/mean" not in found.numbers
        with pytest.raises(
            rewards.RewardError,
            match=r"'broken' has failed 2 times in a row.*KeyError.*own_rewards.py:\d+",
        ):
            ask(scorer)


@pytest.mark.parametrize("isolate", ["thread", "process"])
def test_a_reward_that_leaves_is_counted(isolate):
    words = "SystemExit" if isolate == "thread" else "its process has ended"
    leaving = section("leaves", isolate=isolate, stop_after=1)
    error = pytest.raises(rewards.RewardError, match=f"failed once.*{words}")
    with rewards.Scorer([leaving]) as scorer, error:
        ask(scorer)


def test_a_process_that_died_is_started_anew():
    with rewards.Scorer([section("dies", stop_after=None)]) as scorer:
        for _ in range(2):
            with pytest.warns(RuntimeWarning, match="its process has ended"):
                found = ask(scorer)
            assert found.numbers["rewards/dies/errors"] == 1.0


def test_a_hang_ends_in_time_with_all_that_it_started(tmp_path):
    note = tmp_path / "process-id"
    hanging = section(
        "hangs_if_asked", settings={"note": str(note)}, deadline_s=1.5, stop_after=2
    )
    with rewards.Scorer([hanging]) as scorer:
        assert ask(scorer).given.all()
        start = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"no answer within 1.5 s; killed"):
            found = ask(scorer, ["a", "hang"])
        assert time.monotonic() - start < 10.0
        assert found.numbers["rewards/hangs_if_asked/timeouts"] == 1.0
        assert found.numbers["rewards/hangs_if_asked/errors"] == 0.0
        assert not found.given.any()
        assert gone(int(note.read_text()))
        # A fresh process takes the next call, and failures are counted in a row.
        assert ask(scorer).given.all()
        with pytest.warns(RuntimeWarning, match="killed"):
            ask(scorer, ["hang"])


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_a_module_that_takes_too_long_to_import_is_named(
    tmp_path, monkeypatch, deadline_s
):
    (tmp_path / "slow_rewards.py").write_text(
        "import time\ntime.sleep(60.0)\ndef ones(completions): return [1.0]\n"
    )
    monkeypatch.setattr(_calls, "START_S", 0.5)
    slow = rewards.RewardSection("slow_rewards:ones", deadline_s=deadline_s)
    error = pytest.raises(
        rewards.RewardError,
        match=r"'slow_rewards:ones' did not start.*no answer within 0.5 s; killed",
    )
    with error, rewards.Scorer([slow]):
        pass


def test_a_regular_expression_that_never_ends_is_killed():
    """It holds Python's lock, so nothing in the same process could stop it."""
    slow = rewards.regex(r"^(a+)+$")
    with rewards.combine({"slow": slow}, deadline_s=1.0, stop_after=1) as scorer:
        assert ask(scorer, ["aaa"]).rewards.tolist() == [1.0]
        with pytest.raises(rewards.RewardError, match="no answer within 1 s; killed"):
            ask(scorer, ["a" * 60 + "b"])


def test_a_function_without_a_name_is_left_behind_in_its_thread():
    release = threading.Event()

    def waits(completions):
        if "hang" in completions:
            release.wait(60.0)
        return [1.0] * len(completions)

    with rewards.combine({"waits": waits}, deadline_s=0.5, stop_after=None) as scorer:
        with pytest.warns(RuntimeWarning, match=r"no answer within 0.5 s; left behind"):
            found = ask(scorer, ["hang"])
        assert found.numbers["rewards/waits/timeouts"] == 1.0
        release.set()
        # What it answers late is not taken for the answer to another call.
        assert ask(scorer, ["a", "b", "c"]).rewards.tolist() == [1.0] * 3


def test_calls_run_at_once():
    barrier = threading.Barrier(2)  # passed only if both are there

    def meets(completions):
        barrier.wait(30.0)
        return [1.0] * len(completions)

    with rewards.combine({"one": meets, "two": meets}) as scorer:
        assert ask(scorer).given.all()


def test_a_result_that_cannot_be_sent_is_an_error():
    error = pytest.raises(rewards.RewardError, match="cannot be sent")
    with rewards.Scorer([section("unsendable", stop_after=1)]) as scorer, error:
        ask(scorer)


@pytest.mark.parametrize("isolate", ["thread", "process"])
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("no_such_module:f", {}, "no module 'no_such_module' in the current folder"),
        ("own_rewards:lenghts", {}, "own_rewards has no 'lenghts'; it has .*lengths"),
        ("own_rewards:number", {}, "is no function but int"),
        ("own_rewards:strict", {"factr": 2}, "takes no setting 'factr'.*factor"),
    ],
)
def test_what_is_not_there_is_found_out_before_the_first_call(
    isolate, name, settings, words
):
    one = rewards.RewardSection(name, settings=settings, isolate=isolate)
    with pytest.raises(rewards.RewardError, match=words), rewards.Scorer([one]):
        pass
