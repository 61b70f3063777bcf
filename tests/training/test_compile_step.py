"""Jitted steps: donation, counted traces, the compilation cache."""

import jax
import jax.experimental.compilation_cache.compilation_cache
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regression

from jaxpost import training


def compiled(**options):
    tx = optax.adam(0.1)
    state = training.init_state(regression.make_params(), tx, jax.random.key(0))
    step = training.make_train_step(regression.loss_fn, tx)
    return training.compile_step(step, **options), state


def test_second_call_does_not_retrace():
    step, state = compiled()
    for seed in range(3):
        state, _ = step(state, regression.make_batch(seed=seed))
    assert step.traces == 1
    assert step.compile_s > 0.0


def test_a_retrace_raises_and_names_the_shapes():
    step, state = compiled()
    state, _ = step(state, regression.make_batch(rows=16))
    with pytest.raises(training.RetraceError) as caught:
        step(state, regression.make_batch(rows=24))
    message = str(caught.value)
    assert "traced 2 times, allowed: 1" in message
    assert "batch/x: f32[16,3] -> f32[24,3]" in message
    assert "state" not in message
    # The refused call took nothing: training can go on with known shapes.
    step(state, regression.make_batch(rows=16))
    assert step.traces == 1


def test_as_many_buckets_as_allowed():
    step, state = compiled(max_traces=2)
    for rows in (16, 24, 16, 24):
        state, _ = step(state, regression.make_batch(rows=rows))
    assert step.traces == 2
    with pytest.raises(training.RetraceError, match="allowed: 2"):
        step(state, regression.make_batch(rows=8))
    with pytest.raises(ValueError, match="max_traces must be at least 1, got 0"):
        compiled(max_traces=0)


@pytest.mark.parametrize("donate", [True, False])
def test_donation(donate):
    step, state = compiled(donate=donate)
    batch = regression.make_batch()
    memory = step.lower(state, batch).compile().memory_analysis()
    leaves = jax.tree.leaves((state.params, state.opt_state))
    size = sum(leaf.nbytes for leaf in leaves)
    assert memory.alias_size_in_bytes >= size if donate else True
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() == donate for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_the_compilation_cache_is_filled(tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    try:
        folder = training.enable_compilation_cache(tmp_path / "new", min_compile_s=0)
        # The cache opens its folder once per process.
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
        jax.jit(lambda x: jnp.tan(x) * 1.2345)(np.ones(3, np.float32))
        assert any(folder.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
