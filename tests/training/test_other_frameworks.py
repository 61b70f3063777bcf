"""Anyone's model: an Equinox module and a bare function, with Flax never imported."""

import os
import subprocess
import sys
import textwrap

import pytest

COMMON = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jaxpost import losses, ops, training
    from jaxpost.typing import LossOutput, Term

    V, D, B, T = 16, 8, 4, 6
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    batch = {"tokens": tokens, "loss_mask": np.ones((B, T), bool)}
    batch["loss_mask"][:, 0] = False

    def make_loss_fn(hidden_and_head):
        def loss_fn(params, method_state, batch, key):
            targets, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
            hidden, head = hidden_and_head(params, batch["tokens"])
            logps = ops.token_logps(jnp.einsum("btd,dv->btv", hidden, head), targets)
            values, weights = losses.sft(logps, mask)
            term = Term(jnp.sum(values), jnp.sum(weights))
            return LossOutput({"sft": term}, {}, method_state)
        return loss_fn

    def check(params, hidden_and_head):
        tx, _ = training.build_optimizer(
            training.OptimizerConfig(learning_rate=0.05, schedule="constant"), 30)
        state = training.init_state(params, tx, jax.random.key(0))
        step = training.compile_step(
            training.make_train_step(make_loss_fn(hidden_and_head), tx, accumulate=2))
        first = None
        for _ in range(30):
            state, metrics = step(state, batch)
            first = first or float(metrics["loss"])
        assert step.traces == 1
        assert float(metrics["loss"]) < 0.5 * first, (first, metrics["loss"])
        loaded = [name for name in ("flax", "transformers", "datasets", "orbax")
                  if name in sys.modules]
        assert not loaded, loaded
        print("trained")
"""

EQUINOX = """
    import equinox as eqx

    class Model(eqx.Module):
        embedding: jax.Array
        layer: eqx.nn.MLP
        head: jax.Array

        def __call__(self, tokens):
            return jax.vmap(jax.vmap(self.layer))(self.embedding[tokens])

    keys = jax.random.split(jax.random.key(0), 3)
    model = Model(jax.random.normal(keys[0], (V, D)),
                  eqx.nn.MLP(D, D, 16, 1, key=keys[1]),
                  jax.random.normal(keys[2], (D, V)))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def hidden_and_head(params, tokens):
        model = eqx.combine(params, static)
        return model(tokens), model.head

    check(params, hidden_and_head)
"""

PLAIN = """
    params = {"embedding": jnp.asarray(rng.normal(size=(V, D)), jnp.float32),
              "layers": [jnp.eye(D), jnp.eye(D)],
              "head": jnp.asarray(rng.normal(size=(D, V)), jnp.float32)}

    def hidden_and_head(params, tokens):
        hidden = params["embedding"][tokens]
        for kernel in params["layers"]:
            hidden = hidden + jnp.tanh(hidden @ kernel)
        return hidden, params["head"]

    check(params, hidden_and_head)
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(EQUINOX, marks=pytest.mark.slow, id="equinox"),
        pytest.param(PLAIN, id="plain"),
    ],
)
def test_trains_without_flax(script):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(script)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "trained\n"
