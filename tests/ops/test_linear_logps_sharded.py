"""A vocabulary split over eight devices, by `shard_map` and by sharding alone."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import ops
from jaxpost.typing import Head

B, T, D, V = 4, 6, 8, 32
RNG = np.random.default_rng(0)
HIDDEN = np.float32(RNG.normal(size=(B, T, D)))
WEIGHT = np.float32(RNG.normal(size=(D, V)))
BIAS = np.float32(RNG.normal(size=V))
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
MASK = RNG.random((B, T)) < 0.6


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    devices = jax.devices()[:8]
    return jax.make_mesh(
        (2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def stats_of(hidden, weight, bias, mask, *, vocab_axis, implementation, name, targets):
    found = ops.linear_token_logps(
        hidden,
        Head(weight, bias, softcap=3.0),
        targets,
        chunk_size=8,
        temperature=0.7,
        with_entropy=True,
        with_top1=True,
        vocab_axis=vocab_axis,
        implementation=implementation,
        **({name: mask} if name else {}),
    )
    return tuple(found)


def sharded_stats(mesh, name, check_vma):
    def local(hidden, weight, bias, mask, targets):
        return stats_of(
            hidden,
            weight,
            bias,
            mask,
            vocab_axis="vocab",
            implementation=None,
            name=name,
            targets=targets,
        )

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data"), P(None, "vocab"), P("vocab"), P("data"), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )


def value_and_grads(stats, foreseen):
    def loss(hidden, weight, bias):
        logps, entropy, top1 = stats(hidden, weight, bias)
        total = 2.5 * jnp.sum(jnp.where(MASK, logps, 0.0))
        if not foreseen:
            total += jnp.sum(entropy * logps)
        return total, (logps, entropy, top1)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", [None, "grad_weights"])
@pytest.mark.parametrize("foreseen", [True, False])
def test_shard_map_equals_one_device(mesh, name, check_vma, foreseen):
    sharded = sharded_stats(mesh, name, check_vma)
    found = value_and_grads(lambda *a: sharded(*a, MASK, TARGETS), foreseen)
    dense = functools.partial(
        stats_of,
        mask=jnp.asarray(MASK),
        vocab_axis=None,
        implementation="dense",
        name=name,
        targets=jnp.asarray(TARGETS),
    )
    wanted = value_and_grads(dense, foreseen)
    inputs = HIDDEN, WEIGHT, BIAS
    chex.assert_trees_all_close(found(*inputs), wanted(*inputs), rtol=1e-5, atol=1e-5)


def collectives(compiled):
    """`(kind, elements)` of each collective in a compiled program."""
    kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    found = re.findall(rf"= \(?\w+\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", compiled)
    return [
        (kind, int(np.prod([int(n) for n in s.split(",") if n]))) for s, kind in found
    ]


def test_shard_map_communicates_per_token_only(mesh):
    sharded = sharded_stats(mesh, "grad_weights", True)
    step = value_and_grads(lambda *a: sharded(*a, MASK, TARGETS), True)
    found = collectives(step.lower(HIDDEN, WEIGHT, BIAS).compile().as_text())
    assert found, "no collective recognised"
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Per-token numbers, the gradient of hidden states (over the vocabulary) and that of
    # the head's local part (over the data): never logits, never the head itself.
    largest = max(B * T * D // 2, D * V // 4)
    assert max(size for _, size in found) <= largest


def test_a_sharded_head_needs_no_shard_map(mesh):
    """Under `jit` with shardings alone, the head and the logits are not gathered."""

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden,
            weight,
            jnp.asarray(TARGETS),
            grad_weights=jnp.asarray(MASK),
            chunk_size=8,
        )
        return jnp.sum(stats.logps)

    placed = (
        jax.device_put(HIDDEN, NamedSharding(mesh, P("data"))),
        jax.device_put(WEIGHT, NamedSharding(mesh, P(None, "vocab"))),
    )
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    compiled = step.lower(*placed).compile()
    gathered = [
        n for kind, n in collectives(compiled.as_text()) if kind != "all-reduce"
    ]
    assert max(gathered, default=0) <= 2 * B * T
    chex.assert_trees_all_close(
        compiled(*placed), step(HIDDEN, WEIGHT), rtol=1e-5, atol=1e-5
    )
