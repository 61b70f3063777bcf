"""SIGTERM: the step under way ends and is saved; the run goes on as if never cut."""

import itertools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from regression import loss_fn, make_batch, make_params

from jaxpost import training


class Kill:
    """Sends this process a SIGTERM when a step is logged."""

    def __init__(self, step):
        self.step = step

    def on_log(self, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_eval(self, step, metrics): ...

    def on_end(self, step): ...


def run(folder, *, resume=False, callbacks=()):
    tx = optax.adam(1e-2)
    with training.Checkpoints(folder) as checkpoints:
        return training.train(
            training.make_train_step(loss_fn, tx),
            training.init_state(make_params(), tx, jax.random.key(0)),
            itertools.repeat(make_batch()),
            total_steps=8,
            checkpoints=checkpoints,
            resume=resume,
            callbacks=callbacks,
            progress="none",
        )


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(training.PreemptedError, match="go on with --resume") as caught:
        run(tmp_path / "cut", callbacks=(Kill(3),))
    assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.status == 143
    assert 3 < caught.value.step < 8
    with training.Checkpoints(tmp_path / "cut") as checkpoints:
        assert checkpoints.steps() == [caught.value.step]
    resumed, whole = run(tmp_path / "cut", resume=True), run(tmp_path / "whole")
    for left, right in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with (
        training.create_run(tmp_path / "run", {}),
        pytest.raises(FileExistsError, match="being written by another run"),
    ):
        training.create_run(tmp_path / "run", {}, resume=True)
    with training.create_run(tmp_path / "run", {}, resume=True):
        pass
