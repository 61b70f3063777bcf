"""Logical axes to shardings, and placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost import parallel


@pytest.fixture
def mesh():
    return parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def spec_of(sharding):
    return tuple(sharding.spec)


def test_default_rules(mesh):
    axes = {
        "embedding": ("vocab", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "scale": ("embed",),
        "loose": (None, "mlp"),
    }
    found = jax.tree.map(spec_of, parallel.shardings(axes, mesh))
    assert found == {
        "embedding": ("tensor", "fsdp"),
        "q": (None, "fsdp", "tensor", None),
        "scale": ("fsdp",),
        "loose": (None, "tensor"),
    }
    assert spec_of(parallel.batch_sharding(mesh)) == (("data", "fsdp"),)


def test_rules_can_be_changed(mesh):
    axes = ("vocab", "embed")
    rules = {"embed": ("fsdp", "data"), "vocab": None}
    assert spec_of(parallel.shardings(axes, mesh, rules)) == (None, ("fsdp", "data"))


def test_a_mesh_axis_is_used_once(mesh):
    assert spec_of(parallel.shardings(("heads", "mlp"), mesh)) == ("tensor", None)


def test_sizes_that_do_not_divide_stay_whole(mesh):
    axes, shapes = ("vocab", "embed"), jax.ShapeDtypeStruct((37, 20), jnp.float32)
    found = parallel.shardings(axes, mesh, shapes=shapes)
    assert spec_of(found) == (None, "fsdp")


def test_place(mesh):
    tree = {"a": np.arange(8.0, dtype=np.float32), "b": np.ones((4, 3), np.float32)}
    placed = parallel.place(tree, parallel.batch_sharding(mesh))
    expected = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        np.testing.assert_array_equal(array, tree[name])
    each = {"a": expected, "b": NamedSharding(mesh, PartitionSpec("tensor"))}
    placed = parallel.place(tree, each)
    assert placed["b"].addressable_shards[0].data.shape == (2, 3)


def test_errors(mesh):
    with pytest.raises(ValueError, match="no rule for the logical axis 'width'"):
        parallel.shardings(("width",), mesh)
    with pytest.raises(ValueError, match="names the mesh axis 'expert'; this mesh has"):
        parallel.shardings(("mlp",), mesh, {"mlp": "expert"})
    with pytest.raises(
        ValueError, match=r"name 1 axes, but the array has shape \(2, 3"
    ):
        parallel.shardings(("mlp",), mesh, shapes=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"place: \['x'\]"):
        parallel.place({"x": np.ones(7)}, parallel.batch_sharding(mesh))
