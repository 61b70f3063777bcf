"""Moments and averages lie where their parameters lie."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpost import models, parallel, training

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_positions=16,
)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sgd"])
def test_state_lies_where_its_parameters_lie(name):
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    shapes = models.build(CONFIG, jax.random.key(0), abstract=True).params
    tx, _ = training.build_optimizer(training.OptimizerConfig(name=name), 10)
    state = jax.eval_shape(
        lambda params: training.init_state(params, tx, jax.random.key(0), ema=True),
        shapes,
    )
    axes = models.param_axes(CONFIG)
    placement = parallel.shardings(axes, mesh, shapes=shapes)
    found = parallel.shardings_like(state, shapes, placement)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert jax.tree.leaves(found.params) == jax.tree.leaves(placement)
    assert jax.tree.leaves(found.ema) == jax.tree.leaves(placement)
    assert found.step.spec == P()
    if name == "adafactor":
        return  # factored moments have other shapes
    large = [
        (leaf, sharding)
        for leaf, sharding in zip(
            jax.tree.leaves(state.opt_state),
            jax.tree.leaves(found.opt_state),
            strict=True,
        )
        if np.size(leaf) >= 32 * 32
    ]
    assert large
    assert all(sharding.spec != P() for _, sharding in large)


def test_same_path_of_another_shape_is_copied_everywhere():
    mesh = parallel.make_mesh({"fsdp": 8})
    params = {"w": np.zeros((16, 4))}
    placement = parallel.shardings({"w": ("embed", None)}, mesh)
    tree = {"mu": {"w": np.zeros((16, 4))}, "rows": {"w": np.zeros(16)}, "count": 0}
    found = parallel.shardings_like(tree, params, placement)
    assert found["mu"]["w"] == placement["w"]
    assert found["rows"]["w"].spec == found["count"].spec == P()
