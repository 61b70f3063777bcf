"""Training adapters is the same run on one device and on eight."""

import jax
import numpy as np
import optax
import pytest

from jaxpost import models, testing, training
from jaxpost.recipes import sft

# As in tests/test_mesh_kit.py: whole models over eight virtual devices.
pytestmark = pytest.mark.slow

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=16,
    tie_embeddings=False,
)


def batch(rows=16, length=16):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, length + 1, rows)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    real = positions < lengths[:, None]
    return {
        "tokens": np.where(real, rng.integers(3, 64, (rows, length)), 0).astype("i4"),
        "positions": positions,
        "segment_ids": real.astype(np.int32),
        "loss_mask": real & (positions > 0),
    }


def adapted():
    model = models.build(CONFIG, jax.random.key(0))
    # A factor of 16 would make the random adapters below drown the base.
    lora = models.LoraConfig(rank=1, alpha=1.0)
    model = models.add_lora(model, lora, jax.random.key(1))
    # Away from B = 0, where A has no gradient.
    adapters, frozen = models.split_lora(model.params)
    keys = iter(jax.random.split(jax.random.key(2), 14))
    adapters = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(next(keys), x.shape), adapters
    )
    return model, adapters, frozen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fine_tuning_adapters(accumulate):
    model, adapters, frozen = adapted()
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    step = training.make_train_step(sft.sft_loss(model), tx, accumulate=accumulate)
    state = training.init_state(adapters, tx, jax.random.key(3), frozen=frozen)
    testing.assert_mesh_invariant(
        step,
        state,
        batch(),
        testing.MESHES[2:3],
        axes=models.param_axes(model.config),
    )


def test_an_unsplit_base_is_refused():
    model, adapters, frozen = adapted()
    tx = optax.sgd(0.1)
    step = training.make_train_step(sft.sft_loss(model), tx)
    state = training.init_state(adapters, tx, jax.random.key(3), frozen=frozen)
    axes = jax.tree.map(
        lambda names: (None,) * len(names),
        models.param_axes(model.config),
        is_leaf=lambda names: isinstance(names, tuple),
    )
    with pytest.raises(AssertionError, match=r"holds .* bytes of parameters"):
        testing.assert_mesh_invariant(
            step, state, batch(), testing.MESHES[2:3], axes=axes
        )
