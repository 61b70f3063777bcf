"""What the split vocabulary sends between devices, read off the compiled program."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops, parallel
from jaxpost.typing import Head

B, T, D, V = 8, 16, 32, 1048  # no two arrays have the same size
SHAPES = ({"fsdp": 4, "tensor": 2}, {"fsdp": 1, "tensor": 8})
SENT = re.compile(
    r"= \(?(?P<shapes>.*?)\)? (?P<kind>all-gather|all-reduce|reduce-scatter|"
    r"all-to-all|collective-permute)(-start)?\("
)


def sent(program):
    """(kind, number of elements) of every array that a collective moves."""
    # A sum over a mesh axis of one device stays in the program but moves nothing.
    lines = [
        line for line in program.splitlines() if "replica_groups={{0}," not in line
    ]
    return [
        (match["kind"], math.prod(map(int, filter(None, dims.split(",")))))
        for match in SENT.finditer("\n".join(lines))
        for dims in re.findall(r"\w+\[([\d,]*)\]", match["shapes"])
    ]


def arguments(mesh):
    rng = np.random.default_rng(0)
    hidden = np.float32(rng.normal(size=(B, T, D)))
    weight = np.float32(rng.normal(size=(D, V)))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    rows = parallel.batch_sharding(mesh)
    return (
        jax.device_put(hidden, rows),
        jax.device_put(weight, parallel.shardings(("embed", "vocab"), mesh)),
        jax.device_put(targets, rows),
    )


def loss_of(token_logps):
    def loss(hidden, weight, targets):
        stats = token_logps(
            hidden,
            Head(weight),
            targets,
            grad_weights=jnp.ones(targets.shape, bool),
            with_entropy=True,
            with_top1=True,
        )
        return -jnp.mean(stats.logps), stats

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neither_logits_nor_a_whole_head_are_sent(shape):
    mesh = parallel.make_mesh(shape)
    split = jax.jit(loss_of(parallel.split_vocabulary(ops.linear_token_logps, mesh)))
    args = arguments(mesh)
    moved = sent(split.lower(*args).compile().as_text())
    rows = B // shape["fsdp"]
    part = D * V // shape["tensor"]
    assert moved  # or the pattern matches nothing
    for kind, size in moved:
        if size in (part, part // shape["fsdp"]):
            # FSDP's own: a device's columns of the head, gathered over its rows before
            # use, and their gradient summed; never more than its own columns.
            assert shape["fsdp"] > 1
            assert kind in ("all-gather", "all-reduce", "reduce-scatter")
        else:
            assert kind == "all-reduce"
            assert size <= rows * T * D  # statistics, and the gradient of hidden
    if shape["fsdp"] == 1:
        assert not any(kind == "all-gather" for kind, _ in moved)
        assert sum(size for _, size in moved) <= rows * T * (D + 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_numbers_as_on_one_device(shape):
    mesh = parallel.make_mesh(shape)
    split = jax.jit(loss_of(parallel.split_vocabulary(ops.linear_token_logps, mesh)))
    args = arguments(mesh)
    plain = jax.jit(loss_of(ops.linear_token_logps))(*map(np.asarray, args))
    for old, new in zip(
        jax.tree.leaves(plain), jax.tree.leaves(split(*args)), strict=True
    ):
        scale = np.abs(old).max()
        np.testing.assert_allclose(np.asarray(new), old, rtol=0, atol=1e-5 * scale)


def test_a_vocabulary_that_does_not_divide_stays_whole():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    hidden, _, targets = arguments(mesh)
    weight = np.float32(np.random.default_rng(0).normal(size=(D, V + 1)))
    split = jax.jit(parallel.split_vocabulary(ops.linear_token_logps, mesh))
    wanted = ops.linear_token_logps(np.asarray(hidden), weight, np.asarray(targets))
    found = split(hidden, weight, targets)
    np.testing.assert_allclose(found.logps, wanted.logps, rtol=1e-5, atol=1e-5)


def test_one_device_changes_nothing_and_bad_rules_are_refused():
    assert (
        parallel.split_vocabulary(ops.linear_token_logps, None)
        is ops.linear_token_logps
    )
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    for axes in (("fsdp", "tensor"), "fsdp"):
        with pytest.raises(ValueError, match="none of the batch's"):
            parallel.split_vocabulary(ops.linear_token_logps, mesh, {"vocab": axes})
