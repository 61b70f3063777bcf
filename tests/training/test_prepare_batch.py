"""Batches made between the steps, such as from answers of the present weights."""

import jax
import numpy as np
import optax
import regression

from jaxpost import training

TX = optax.sgd(0.1)


def targets_of(state, rows=16):
    """A target that depends on the weights."""
    return np.full(rows, float(state.params["bias"]), np.float32)


def test_the_loop_trains_on_what_prepare_makes():
    """Each batch from the number of its step and the state before it."""
    host = [regression.make_batch(seed=number) for number in range(4)]
    seen = []

    def prepare(number, state, batch):
        seen.append((number, int(state.step)))
        return batch | {"y": targets_of(state)} if number % 2 == 0 else batch

    state = training.init_state(regression.make_params(), TX, jax.random.key(0))
    step = training.make_train_step(regression.loss_fn, TX)
    found = training.train(
        step, state, iter(host), total_steps=4, prepare=prepare, progress="none"
    )
    assert seen == [(1, 0), (2, 1), (3, 2), (4, 3)]

    wanted = training.init_state(regression.make_params(), TX, jax.random.key(0))
    for number, batch in enumerate(host, start=1):
        if number % 2 == 0:
            batch = batch | {"y": targets_of(wanted)}
        wanted, _ = jax.jit(step)(wanted, batch)
    for name, leaf in wanted.params.items():
        np.testing.assert_array_equal(found.params[name], leaf)
