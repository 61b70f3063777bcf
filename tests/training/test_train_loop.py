"""The loop: what it logs, evaluates, saves, and how it fails."""

import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regression

from jaxpost import training
from jaxpost.typing import LossOutput, Term


class Batches:
    """Endless regression batches; `spoil` makes one of them infinite."""

    def __init__(self, spoil=None):
        self.row = 0
        self.spoil = spoil

    def __iter__(self):
        return self

    def __next__(self):
        self.row += 1
        batch = regression.make_batch(seed=self.row)
        if self.row == self.spoil:
            batch["y"][:] = np.inf
        return batch

    @property
    def epoch(self):
        return self.row / 4

    def state(self):
        return {"row": self.row}

    def restore(self, state):
        self.row = state["row"]


class Recorder:
    def __init__(self):
        self.logs, self.evals, self.ends = {}, {}, []

    def on_log(self, step, metrics):
        self.logs[step] = dict(metrics)

    def on_eval(self, step, metrics):
        self.evals[step] = dict(metrics)

    def on_end(self, step):
        self.ends.append(step)


def run(tmp_path, *, batches=None, params=None, total_steps=6, **options):
    config = training.OptimizerConfig(learning_rate=0.1, schedule="linear")
    tx, schedule = training.build_optimizer(config, total_steps)
    params = regression.make_params() if params is None else params
    state = training.init_state(params, tx, jax.random.key(0))
    options = {"schedule": schedule, "progress": "none"} | options
    with (
        training.create_run(tmp_path / "run", {}, resume=True) as folder,
        training.Checkpoints(folder.checkpoints) as checkpoints,
    ):
        return training.train(
            training.make_train_step(regression.loss_fn, tx),
            state,
            Batches() if batches is None else batches,
            total_steps=total_steps,
            run=folder,
            checkpoints=checkpoints,
            **options,
        )


def lines(tmp_path):
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_one_line_per_logged_step_with_all_numbers(tmp_path):
    recorder = Recorder()
    state = run(tmp_path, callbacks=[recorder], total_steps=5, log_every=2)
    assert int(state.step) == 5
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [2, 4, 5]
    for line in logged:
        assert line["learning_rate"] == pytest.approx(
            0.1 * (1 - (line["step"] - 1) / 5), rel=1e-5
        )
        assert line["epoch"] == line["step"] / 4
        assert line["num_tokens"] == 16 * line["step"]
        assert line["compile/traces"] == 1
        assert line["tokens/s"] > 0
        assert line["step_time"] > 0
        assert {"loss", "loss/square", "loss/size", "grad_norm", "error_max"} <= set(
            line
        )
        assert "nonfinite" not in line
    assert list(recorder.logs) == [2, 4, 5]
    assert recorder.logs[5] == logged[-1]
    assert recorder.ends == [5]


def test_logged_numbers_are_those_of_their_own_step(tmp_path):
    run(tmp_path, total_steps=4)
    config = training.OptimizerConfig(learning_rate=0.1, schedule="linear")
    tx, _ = training.build_optimizer(config, 4)
    state = training.init_state(regression.make_params(), tx, jax.random.key(0))
    step = jax.jit(training.make_train_step(regression.loss_fn, tx))
    for line, batch in zip(lines(tmp_path), Batches(), strict=False):
        state, metrics = step(state, batch)
        assert line["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_evaluates_and_keeps_the_best(tmp_path):
    held_out = [regression.make_batch(seed=100), regression.make_batch(seed=101)]
    scores = iter([0.9, 0.5, 0.7, 0.6])
    real = training.make_eval_fn(regression.loss_fn, lambda: held_out)

    def eval_fn(state):
        return real(state) | {"eval_loss": next(scores)}

    recorder = Recorder()
    run(tmp_path, eval_fn=eval_fn, eval_every=2, callbacks=[recorder])
    assert list(recorder.evals) == [0, 2, 4, 6]
    by_step = {line["step"]: line for line in lines(tmp_path)}
    assert by_step[2]["eval_loss"] == 0.5
    assert "loss" in by_step[2]  # one line, not two
    assert "eval_error_max" in by_step[4]
    assert "loss" not in by_step[0]
    checkpoints = training.Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.best() == 2
    assert checkpoints.latest() == 6
    checkpoints.close()


def test_evaluation_is_that_of_all_batches_as_one():
    params = regression.make_params()
    big = regression.make_batch(rows=24)
    parts = [{k: v[i : i + 8] for k, v in big.items()} for i in (0, 8, 16)]
    state = training.init_state(
        params,
        training.build_optimizer(training.OptimizerConfig(), 1)[0],
        jax.random.key(0),
    )
    values = training.make_eval_fn(regression.loss_fn, lambda: parts)(state)
    loss, terms, _ = regression.oracle(params, big)
    assert values["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert values["eval_loss/size"] == pytest.approx(terms["size"], rel=1e-5)
    with pytest.raises(ValueError, match="no batches"):
        training.make_eval_fn(regression.loss_fn, list)(state)
    with pytest.raises(ValueError, match=r"state\.ema is None"):
        training.make_eval_fn(regression.loss_fn, lambda: parts, use_ema=True)(state)


def test_a_bad_batch_stops_the_run_and_leaves_the_good_checkpoint(tmp_path):
    with pytest.raises(training.NonFiniteError) as caught:
        run(tmp_path, batches=Batches(spoil=4), save_every=2)
    assert caught.value.step == 4
    message = str(caught.value)
    assert "Step 4: loss term 'square' is not finite" in message
    assert "last good checkpoint is step 2" in message
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    checkpoints = training.Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [2]
    checkpoints.close()


def test_nan_in_the_weights_is_named(tmp_path):
    params = regression.make_params()
    params["kernel"] = params["kernel"].at[1].set(jnp.nan)
    with pytest.raises(
        training.NonFiniteError, match="Step 1: parameter 'kernel' is not finite"
    ):
        run(tmp_path, params=params)


def test_an_unlogged_bad_step_is_found_too(tmp_path):
    with pytest.raises(training.NonFiniteError, match="Step 3"):
        run(tmp_path, batches=Batches(spoil=3), log_every=100)


def test_a_bad_gradient_is_named(tmp_path):
    def loss(params, method_state, batch, key):
        del key
        total = params["fine"] + jnp.sqrt(params["root"] ** 2) * batch["x"][0, 0]
        return LossOutput({"a": Term(total, jnp.float32(1))}, {}, method_state)

    tx, _ = training.build_optimizer(training.OptimizerConfig(), 2)
    params = {"fine": jnp.float32(1), "root": jnp.float32(0)}
    state = training.init_state(params, tx, jax.random.key(0))
    step = training.make_train_step(loss, tx)
    with pytest.raises(training.NonFiniteError, match="gradient of 'root'"):
        training.train(step, state, Batches(), total_steps=2, progress="none")
    del tmp_path


def test_resume_goes_on_from_the_last_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", total_steps=6)
    with pytest.raises(training.NonFiniteError):
        run(tmp_path / "cut", batches=Batches(spoil=5), save_every=3)
    resumed = run(tmp_path / "cut", resume=True)
    for a, b in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(1, 7))
    # Nothing is left to do: nothing is done.
    assert int(run(tmp_path / "cut", resume=True).step) == 6


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    def eval_fn(state):
        return {"eval_loss": float(state.params["bias"])}

    with pytest.raises(training.NonFiniteError):
        run(tmp_path, batches=Batches(spoil=2), eval_fn=eval_fn)
    run(tmp_path, eval_fn=eval_fn, resume=True)
    assert [line["step"] for line in lines(tmp_path)] == list(range(7))


def test_batches_that_end_early_are_an_error(tmp_path):
    few = itertools.islice(Batches(), 2)
    with pytest.raises(ValueError, match="batches ended after step 2 of 6"):
        run(tmp_path, batches=few)
    with pytest.raises(ValueError, match="eval_every must be at least 1 or None"):
        run(tmp_path, eval_every=0)


def test_tokens_are_counted_without_padding():
    assert training.count_tokens({"segment_ids": np.asarray([[1, 1, 2, 0]])}) == 3
    assert training.count_tokens({"tokens": np.zeros((2, 5))}) == 10
    assert training.count_tokens({"x": np.zeros((4, 3))}) == 4


def test_plain_progress_and_performance_line(tmp_path, capsys):
    performance = training.Performance(
        flops_per_token=6e6, peak_flops=1e12, print_line=True
    )
    run(tmp_path, total_steps=2, progress="plain", performance=performance)
    output = capsys.readouterr().out
    assert "completed step: 2, seconds: " in output
    assert "total_weights: 16, loss: " in output
    assert "train 2/2  loss " in output
    assert "tokens/s  left 0:00" in output
    line = lines(tmp_path)[-1]
    flops = line["tokens/s"] * 6e6 / jax.device_count()
    assert line["tflops/device"] == pytest.approx(flops / 1e12)
    assert line["mfu"] == pytest.approx(flops / 1e12)


def test_rich_progress_draws_and_stops(capsys):
    progress = training.make_progress("rich", title="sft", start=2, total=4)
    progress.update(3, {"loss": 1.5, "tokens/s": 1234.0})
    progress.note("a line [1, 2]")
    progress.close()
    output = capsys.readouterr().out
    assert "sft" in output
    assert "3/4" in output
    assert "loss 1.5000  1,234 tokens/s" in output
    assert "a line [1, 2]" in output
    with pytest.raises(ValueError, match="progress must be auto"):
        training.make_progress("loud", title="", start=0, total=1)


def test_trackers_are_chosen_by_name(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **settings: calls.append(("init", settings))
    fake.log = lambda metrics, step: calls.append((step, metrics))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tracker = training.make_tracker("trackio", tmp_path / "mine", config={"a": 1})
    run(tmp_path, total_steps=2, callbacks=[tracker])
    assert calls[0] == (
        "init",
        {"project": "jaxpost", "name": "mine", "config": {"a": 1}},
    )
    assert [call[0] for call in calls[1:3]] == [1, 2]
    assert calls[1][1]["loss"] > 0
    assert calls[-1] == "finish"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        training.make_tracker("wandb", tmp_path)
    with pytest.raises(ValueError, match="tracker must be one of tensorboard"):
        training.make_tracker("comet", tmp_path)
