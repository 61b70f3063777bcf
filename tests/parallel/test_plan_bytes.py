"""Bytes by cause against real arrays, chips by name, and the roofline's arithmetic."""

import jax
import numpy as np
import pytest

from jaxpost import models, parallel, training
from jaxpost.recipes import _setup
from jaxpost.recipes._sections import MeshSection

TINY = models.DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=72,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)


def held(tree):
    """Bytes of real arrays on the fullest device."""
    by_device: dict = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            kept = by_device.get(shard.device, 0)
            by_device[shard.device] = kept + shard.data.nbytes
    return max(by_device.values())


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_exact_bytes_are_those_of_real_shards(mu_dtype):
    layout = _setup.open_layout(MeshSection(data=1, fsdp=4, tensor=2), 8)
    tx, _ = training.build_optimizer(training.OptimizerConfig(mu_dtype=mu_dtype), 10)
    model = models.build(TINY, jax.random.key(0), mesh=layout.mesh, rules=layout.rules)

    def make(params):
        return training.init_state(params, tx, jax.random.key(0), copy=False)

    shapes = jax.eval_shape(make, model.params)
    placement = layout.state_shardings(shapes, TINY)
    state = jax.jit(make, out_shardings=placement)(model.params)
    planned = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        shapes,
        placement,
    )
    for part in ("params", "opt_state"):
        expected = held(getattr(state, part))
        assert parallel.bytes_per_device(getattr(planned, part)) == expected
        assert parallel.bytes_per_device(getattr(state, part)) == expected
    batch = {
        "tokens": np.zeros((8, 16), np.int32),
        "loss_mask": np.zeros((8, 16), bool),
    }
    placed = layout.place_batch(batch)
    assert parallel.bytes_per_device(placed) == held(placed) == 2 * 16 * 5
    assert parallel.bytes_per_device(batch) == 8 * 16 * 5  # no sharding: whole


def test_a_narrow_dtype_scales_what_is_not_wide():
    estimate = parallel.estimate_temporaries
    assert estimate(1000, gradients=200, width=1.0) == 800
    assert estimate(1000, gradients=200, width=0.5, wide=300) == 300 + 250
    assert estimate(1000, gradients=200, width=0.5, wide=900, added=7) == 807
    assert estimate(100, gradients=200, width=0.5) == 0


def test_memory_adds_up_and_leaves_a_margin():
    memory = parallel.Memory(
        parameters=1, gradients=2, moments=3, frozen=4, other=5, batch=6, temporaries=79
    )
    assert (memory.total, memory.exact, memory.needed) == (100, 21, 115)


def test_roofline_is_the_slowest_of_three():
    chip = parallel.Chip("x", 100.0, 1, 10.0, 1.0, 8)
    found = parallel.roofline(
        chip, model_flops=300, executed_flops=400, memory_bytes=50, sent_bytes=1
    )
    assert (found.compute_s, found.memory_s, found.link_s) == (4.0, 5.0, 1.0)
    assert (found.step_s, found.limit) == (5.0, "memory")
    assert found.utilisation == pytest.approx(300 / 500)


def test_chips_by_any_spelling_and_the_nearest_for_a_wrong_one():
    assert parallel.find_chip("H200") is parallel.CHIPS["h200"]
    assert parallel.find_chip("NVIDIA H100").name == "h100"
    assert parallel.find_chip("TPU v5e").hbm_bytes == 16 * 10**9
    with pytest.raises(ValueError, match=r"no chip 'v5x'.*v5p or v5e|v5e or v5p"):
        parallel.find_chip("v5x")
    with pytest.raises(ValueError, match=r"no chip 'abacus'\. Known are a100"):
        parallel.find_chip("abacus")
