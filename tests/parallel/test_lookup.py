"""Rows of a table over a mesh: the same numbers; no more bytes than the table's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import parallel

V, D = 48, 32
SHAPES = (
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"tensor": 8},
    {"data": 8},
)


def setup(shape, rows, tokens, rules=None):
    mesh = parallel.make_mesh(shape)
    rng = np.random.default_rng(0)
    table = np.float32(rng.normal(size=(V, D)))
    ids = rng.integers(0, V, (rows, tokens)).astype(np.int32)
    weights = np.float32(rng.normal(size=(rows, tokens, D)))
    placed = (
        jax.device_put(table, parallel.shardings(("vocab", "embed"), mesh, rules)),
        *parallel.place((ids, weights), parallel.batch_sharding(mesh, rules)),
    )
    return mesh, (table, ids, weights), placed


def loss_of(lookup):
    def loss(table, ids, weights):
        found = lookup(table, ids)
        return jnp.sum(jnp.square(found) * weights), found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def sent(function, arguments):
    text = function.lower(*arguments).compile().as_text()
    return parallel.sum_by_kind(parallel.list_collectives(text))


@pytest.mark.parametrize("tokens", [2, 64], ids=["exchange", "gather"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_numbers_as_plain_indexing(shape, tokens):
    mesh, plain, placed = setup(shape, 8, tokens)
    (_, rows), grad = loss_of(lambda table, ids: table[ids])(*plain)
    (_, found), split = loss_of(parallel.split_lookup(mesh))(*placed)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_allclose(split, grad, rtol=0, atol=1e-5 * np.abs(grad).max())
    wanted = parallel.batch_sharding(mesh)
    assert found.sharding.is_equivalent_to(wanted, found.ndim)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_bytes_are_bounded_by_the_table(shape):
    few = setup(shape, 8, 1)
    mesh = few[0]
    run = loss_of(parallel.split_lookup(mesh))
    small = sent(run, few[2])
    many, more = (sent(run, setup(shape, 8, count)[2]) for count in (128, 512))
    tensor = mesh.shape["tensor"]
    if tensor == 1:
        assert many == more  # does not grow with the batch
    columns = V // tensor * D * 4
    weights = many["all-gather"] + many.get("reduce-scatter", 0)
    assert weights <= 2 * columns
    assert "all-to-all" not in many
    assert small["all-to-all"] < columns


@pytest.mark.parametrize(
    ("rows", "rules"),
    [
        (6, None),  # does not divide
        (8, {"vocab": "fsdp", "embed": None}),  # a mesh axis of the batch
        (8, {"embed": ("data", "fsdp")}),
        (8, {"batch": "data"}),
    ],
)
def test_other_rows_and_rules(rows, rules):
    mesh, (table, ids, _), _ = setup({"data": 2, "fsdp": 4}, 8, 4, rules)
    found = jax.jit(parallel.split_lookup(mesh, rules))(table, ids[:rows])
    np.testing.assert_array_equal(found, table[ids[:rows]])


def test_the_same_arguments_give_the_same_function():
    mesh = parallel.make_mesh({"fsdp": 8})
    assert parallel.split_lookup(None) is None
    first = parallel.split_lookup(mesh)
    assert parallel.split_lookup(parallel.make_mesh({"fsdp": 8})) is first
    assert parallel.split_lookup(mesh, {"vocab": "fsdp"}) is not first
