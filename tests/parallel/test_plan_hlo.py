"""Collectives and products read off HLO text: written by hand, and a real program's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpost import parallel

PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%cut (whole: f32[8,16], at: s32[]) -> f32[2,16] {
  %whole = f32[8,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={2,16}
}

%inner (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[4]{0} get-tuple-element(%state), index=1
  %r = f32[4]{0} all-reduce(%v), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %r)
}

%body (carry: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %carry = (s32[], bf16[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %w = bf16[4,8]{1,0} get-tuple-element(%carry), index=1
  %g = bf16[32,8]{1,0} all-gather(%w), replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}
  %p = bf16[4,4]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %start = (s32[], f32[4]{0}) tuple(%n)
  %turn = (s32[], f32[4]{0}) while(%start), condition=%more, body=%inner, metadata={op_name="head/while"}
  ROOT %out = (s32[], bf16[4,8]{1,0}) tuple(%n, %w)
}

%more (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8,16], b: bf16[4,8], n: s32[]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %begin = (s32[], bf16[4,8]{1,0}) tuple(%n, %b)
  %loop = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[8,16]{1,0}, /*index=1*/f32[8,16]{1,0}) all-reduce(%a, %a), replica_groups=[2,4]<=[8], to_apply=%add
  %kept = f32[8,16]{1,0} get-tuple-element(%both), index=0
  %used = f32[8,16]{1,0} get-tuple-element(%both), index=1
  %mine = f32[2,16]{1,0} fusion(%kept, %n), kind=kLoop, calls=%cut
  %twice = f32[8,16]{1,0} add(%used, %used)
  %sent = f32[8,16]{1,0} collective-permute(%twice), source_target_pairs={{0,1},{1,0}}
  %stay = f32[8,16]{1,0} collective-permute(%twice), source_target_pairs={{0,0},{1,1}}
  %alone = f32[8,16]{1,0} all-reduce(%twice), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %x = (f32[8,16]{1,0}) all-to-all(%sent), replica_groups={}
  ROOT %result = f32[2,16]{1,0} copy(%mine)
}
"""  # noqa: E501


def by_kind(found):
    return {(one.kind, one.group): one for one in found}


def test_every_collective_of_a_program_written_by_hand():
    found = by_kind(parallel.list_collectives(PROGRAM))
    assert len(found) == len(parallel.list_collectives(PROGRAM)) == 6
    gather = found["all-gather", 8]
    assert (gather.input_bytes, gather.times, gather.bounded) == (4 * 8 * 2, 3, True)
    assert gather.sent_bytes == 7 * 64 * 3
    # One of the two arrays that travel together is cut to a quarter: each device of a
    # group of four keeps its own part only.
    assert found["reduce-scatter", 4].sent_bytes == 3 / 4 * 512
    assert found["all-reduce", 4].sent_bytes == 2 * 3 / 4 * 512
    assert found["all-to-all", 8].sent_bytes == 7 / 8 * 512  # no groups: all devices
    assert found["collective-permute", 2].sent_bytes == 512  # the other goes nowhere
    inner = found["all-reduce", 2]
    assert (inner.times, inner.bounded) == (3, False)
    assert parallel.sum_by_kind(found.values(), 0.5)["all-gather"] == 7 * 64 * 3 / 2


def test_the_caller_may_know_the_length_of_a_loop():
    known = parallel.list_collectives(PROGRAM, loops={"head/while": 5})
    inner = by_kind(known)["all-reduce", 2]
    assert (inner.times, inner.bounded, inner.sent_bytes) == (15, True, 15 * 16)
    none = parallel.list_collectives(PROGRAM, loops={"head/while": 0})
    assert ("all-reduce", 2) not in by_kind(none)


def test_products_count_as_often_as_their_loop_runs():
    (product,) = parallel.list_products(PROGRAM)
    assert (product.flops, product.times) == (2 * 4 * 4 * 8, 3)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parallel.list_collectives("HloModule nothing\n")


def test_a_real_program_with_a_sum_in_a_loop():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})

    def local(x, w):
        def turn(_, x):
            return jax.lax.psum(jnp.tanh(x @ w), "tensor")

        x = jax.lax.fori_loop(0, 5, turn, x)
        return x, jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    rows = P("fsdp")
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, P(None, None)),
        out_specs=(rows, P(None, "fsdp")),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=NamedSharding(mesh, rows))
    w = jax.ShapeDtypeStruct((16, 16), np.float32)
    text = jax.jit(run).lower(x, w).compile().as_text()
    found = parallel.list_collectives(text)
    sums = [one for one in found if one.group == 2]
    assert [(one.kind, one.input_bytes, one.times) for one in sums] == [
        ("all-reduce", 2 * 16 * 4, 5)
    ]
    assert sum(one.sent_bytes for one in sums) == 5 * 128
    scattered = [one for one in found if one.group == 4]
    assert [one.kind for one in scattered] == ["reduce-scatter"]
    flops = [one.flops * one.times for one in parallel.list_products(text)]
    assert sum(flops) == 5 * 2 * 2 * 16 * 16


def test_a_gradient_that_is_cut_up_is_a_reduce_scatter():
    """XLA for CPUs sums whole gradients; each device then keeps its part."""
    mesh = parallel.make_mesh({"fsdp": 8})
    x = jax.ShapeDtypeStruct(
        (16, 32), np.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    split = NamedSharding(mesh, P("fsdp", None))
    w = jax.ShapeDtypeStruct((32, 24), np.float32, sharding=split)
    grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), out_shardings=split)
    found = parallel.list_collectives(grad.lower(w, x).compile().as_text())
    assert {(one.kind, one.input_bytes) for one in found} == {
        ("all-gather", 32 * 24 * 4 // 8),
        ("reduce-scatter", 32 * 24 * 4),
    }
