"""`ops.attention`: oracle, masks, gradients, every implementation alike."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles import attention as oracle

from jaxpost import ops
from jaxpost.ops import _attention_chunked as chunked
from jaxpost.ops._attention_chunked import chunked_attention
from jaxpost.typing import BRANCH

IMPLEMENTATIONS = ("xla", "chunked")
SMALL_BLOCK = 5  # makes several uneven blocks out of toy lengths


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("softcap", "scale", "implementation")
)
def attend(implementation, query, key, value, **options):
    """`ops.attention`, with blocks small enough to matter where there are blocks."""
    if implementation == "xla":
        return ops.attention(query, key, value, implementation="xla", **options)
    mask = tuple(
        options.get(name)
        for name in (
            "query_positions",
            "key_positions",
            "query_segments",
            "key_segments",
            "window",
        )
    )
    return chunked_attention(
        query,
        key,
        value,
        mask,
        softcap=options.get("softcap"),
        scale=options.get("scale") or query.shape[-1] ** -0.5,
        block=SMALL_BLOCK,
    )


def inputs(length=13, keys=13, *, heads=6, kv_heads=2, width=4, dtype=jnp.float32):
    """Two rows of queries, keys and values."""
    key_q, key_k, key_v = jax.random.split(jax.random.key(7), 3)
    query = jax.random.normal(key_q, (2, length, heads, width), dtype)
    key = jax.random.normal(key_k, (2, keys, kv_heads, width), dtype)
    value = jax.random.normal(key_v, (2, keys, kv_heads, width), dtype)
    return query, key, value


def packed(length=13):
    """Row 0: two segments, then padding; row 1: padding, then one segment."""
    segments = np.zeros((2, length), np.int32)
    positions = np.zeros((2, length), np.int32)
    segments[0, :5], segments[0, 5:11] = 1, 2
    positions[0, :5], positions[0, 5:11] = np.arange(5), np.arange(6)
    segments[1, 4:], positions[1, 4:] = 1, np.arange(length - 4)
    return {
        "query_positions": jnp.asarray(positions),
        "key_positions": jnp.asarray(positions),
        "query_segments": jnp.asarray(segments),
        "key_segments": jnp.asarray(segments),
    }


OPTIONS = [{}, {"window": 3}, {"window": 7, "softcap": 1.5, "scale": 0.6}]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_oracle(implementation, options, strict_dtypes):
    arrays = inputs()
    found = attend(implementation, *arrays, **packed(), **options)
    expected = oracle.attention(*arrays, **packed(), **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_in_the_middle_of_longer_keys(implementation):
    query, key, value = inputs(3, 17)
    options = {
        "query_positions": jnp.asarray([[4, 5, 6], [11, 12, 13]], jnp.int32),
        "key_positions": jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32), (2, 17)),
        "query_segments": jnp.asarray([[1, 1, 1], [0, 1, 1]], jnp.int32),
    }
    found = attend(implementation, query, key, value, **options)
    expected = oracle.attention(query, key, value, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        arrays = inputs(dtype=jnp.float64)
        found = attend(implementation, *arrays, **packed(), softcap=2.0)
        assert found.dtype == jnp.float64
        expected = oracle.attention(*arrays, **packed(), softcap=2.0)
        np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_close_to_float32(implementation):
    arrays = inputs()
    half = [x.astype(jnp.bfloat16) for x in arrays]
    found = attend(implementation, *half, **packed())
    assert found.dtype == jnp.bfloat16
    expected = oracle.attention(*half, **packed())
    # Inputs are rounded to 8 bits in both; weights and the output once more in ours.
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunked_gradient_equals_dense_gradient(options):
    arrays = inputs()
    weight = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def total(implementation, *arrays):
        return jnp.sum(attend(implementation, *arrays, **packed(), **options) * weight)

    found, expected = (
        jax.grad(functools.partial(total, implementation), argnums=(0, 1, 2))(*arrays)
        for implementation in ("chunked", "xla")
    )
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_equals_finite_differences(implementation):
    arrays = inputs(5, 5, heads=2, kv_heads=1, width=2)
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))

    def f(*arrays):
        options = {"query_positions": positions, "key_positions": positions}
        return attend(implementation, *arrays, **options, softcap=1.0, window=3)

    with jax.enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in arrays]
        check_grads(f, arrays, order=1, modes=["rev"], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_keys_are_zero_with_zero_gradient(implementation):
    query, key, value = inputs()
    options = packed()
    padded = np.asarray(options["query_segments"]) == 0

    def total(*arrays):
        out = attend(implementation, *arrays, **options)
        return jnp.sum(jnp.sin(out) + out), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    chex.assert_tree_all_finite(gradients)
    assert np.all(np.asarray(out)[padded] == 0)
    for gradient in gradients:
        assert np.all(np.asarray(gradient)[padded] == 0)
        assert np.any(np.asarray(gradient)[~padded] != 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_padding_changes_nothing(implementation):
    arrays, options = inputs(), packed()
    padded = (options["query_segments"] == 0)[:, :, None, None]
    dirty = [jnp.where(padded, jnp.nan, x) for x in arrays]

    def both(*arrays):
        return jax.vjp(lambda *a: attend(implementation, *a, **options), *arrays)

    out, pull = both(*arrays)
    dirty_out, dirty_pull = both(*dirty)
    chex.assert_trees_all_equal(out, dirty_out)
    cotangent = jnp.where(padded, jnp.nan, out)
    chex.assert_trees_all_equal(pull(out), dirty_pull(cotangent))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_nan_stays_with_those_who_see_it(which):
    """A NaN in the second segment: the first keeps its outputs and gradients."""
    arrays, options = list(inputs()), packed()
    first = (options["query_segments"] == 1)[:, :, None, None]
    dirty = list(arrays)
    dirty[which] = arrays[which].at[0, 7].set(jnp.nan)
    for implementation in IMPLEMENTATIONS:
        clean = attend(implementation, *arrays, **options)
        found = attend(implementation, *dirty, **options)
        np.testing.assert_array_equal(found[0, :7], clean[0, :7])
        np.testing.assert_array_equal(found[1], clean[1])
        assert np.isnan(found[0, 7]).all(), "what sees NaN must say so"
    cotangent = jnp.where(first, clean, 0.0)
    _, pull = jax.vjp(lambda *a: attend("chunked", *a, **options), *arrays)
    _, dirty_pull = jax.vjp(lambda *a: attend("chunked", *a, **options), *dirty)
    chex.assert_trees_all_equal(pull(cotangent), dirty_pull(cotangent))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_future_keys_change_nothing(implementation):
    query, key, value = inputs()
    positions = jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32), (2, 13))
    options = {"query_positions": positions, "key_positions": positions}
    clean = attend(implementation, query, key, value, **options)
    dirty = attend(
        implementation,
        query,
        key.at[:, 6:].set(jnp.nan),
        value.at[:, 6:].set(jnp.inf),
        **options,
    )
    np.testing.assert_array_equal(clean[:, :6], dirty[:, :6])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_window_may_be_traced(implementation):
    arrays, options = inputs(), packed()
    f = jax.jit(
        lambda window: attend(implementation, *arrays, **options, window=window)
    )
    for window in (1, 4, 2**31 - 1):
        expected = oracle.attention(*arrays, **options, window=window)
        np.testing.assert_allclose(f(jnp.int32(window)), expected, atol=1e-5)


def test_one_query_equals_the_oracle():
    query, key, value = inputs(1, 9)
    options = {
        "query_positions": jnp.asarray([[4], [8]], jnp.int32),
        "key_positions": jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9)),
    }
    stale = value.at[0, 5:].set(jnp.nan)
    found = ops.attention(query, key, stale, **options)
    expected = oracle.attention(query, key, value, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jit_and_vmap(implementation):
    arrays, options = inputs(), packed()

    def f(arrays, options):
        return attend(implementation, *arrays, **options)

    eager = f(arrays, options)
    np.testing.assert_allclose(jax.jit(f)(arrays, options), eager, atol=1e-6)
    one_by_one = jax.tree.map(lambda x: x[:, None], (arrays, options))
    mapped = jax.vmap(f)(*one_by_one)[:, 0]
    np.testing.assert_allclose(mapped, eager, atol=1e-6)


def branches(*lengths):
    """Positions and segments of a row whose first part is followed by answers to it."""
    first = lengths[0]
    starts = [0] + [first] * (len(lengths) - 1)
    positions = [start + np.arange(n) for start, n in zip(starts, lengths, strict=True)]
    segments = np.repeat(1 + BRANCH * np.arange(len(lengths)), lengths)
    return np.concatenate(positions).astype(np.int32), segments.astype(np.int32)


def seen_blocks(mask, count):
    """The key blocks that each query block looks at, and those that it needs to."""
    layout = chunked._Layout(count, count, 1, 1, None, 1.0)
    numbers, counts = chunked._seen_blocks(chunked._mask_blocks(mask, layout))
    found = [set(row[:n].tolist()) for row, n in zip(numbers, counts, strict=True)]
    allowed = np.any(chunked.allowed_pairs(*mask), axis=0)
    blocks = allowed.reshape(count, len(allowed) // count, count, -1).any(axis=(1, 3))
    return found, [set(np.flatnonzero(row).tolist()) for row in blocks]


@pytest.mark.parametrize(
    ("rows", "looked_at"),
    [
        ([(8, 8, 8, 8)], [{0}, {0, 1}, {0, 2}, {0, 3}]),
        ([(3, 9, 7, 13)], [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}]),
        ([(8, 8, 8, 8), (8, 16, 8)], [{0}, {0, 1}, {0, 1, 2}, {0, 3}]),
    ],
    ids=["whole blocks", "uneven", "two rows"],
)
def test_blocks_of_other_answers_are_skipped(rows, looked_at):
    positions, segments = map(
        jnp.stack, zip(*[branches(*row) for row in rows], strict=True)
    )
    mask = (positions, positions, segments, segments, None)
    found, needed = seen_blocks(mask, 4)
    assert found == looked_at
    assert all(row <= blocks for row, blocks in zip(needed, found, strict=True))


def test_packed_texts_look_at_no_block_that_comes_later():
    lengths = (11, 6, 9, 6)
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    segments = jnp.repeat(jnp.arange(1, 5), jnp.asarray(lengths))[None]
    found, needed = seen_blocks((positions, positions, segments, segments, None), 4)
    assert found == needed == [{0}, {0, 1}, {1, 2}, {2, 3}]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_in_any_order_look_at_every_block_they_need(seed):
    rng = np.random.default_rng(seed)
    positions, segments = branches(6, 9, 7, 10)
    segments = np.where(rng.random(32) < 0.2, 0, segments)
    order = np.arange(32)
    kind = seed % 4
    if kind == 0:
        order = rng.permutation(32)
    elif kind == 1:  # the trunk after its branches
        order = np.roll(order, -6)
    elif kind == 2:  # one answer from its end
        order[15:22] = order[15:22][::-1]
    else:  # one answer in two pieces
        order[8:20] = np.concatenate([order[12:20], order[8:12]])
    positions, segments = jnp.asarray(positions[order]), jnp.asarray(segments[order])
    plain = branches(6, 9, 7, 10)
    rows = (jnp.stack([positions, plain[0]]), jnp.stack([segments, plain[1]]))
    found, needed = seen_blocks((rows[0], rows[0], rows[1], rows[1], None), 4)
    assert all(row <= blocks for row, blocks in zip(needed, found, strict=True))
    # Nor may queries that are not the keys, or keys that are not the queries.
    for mask in (
        (plain[0][None], positions[None], plain[1][None], segments[None], None),
        (positions[None], plain[0][None], segments[None], plain[1][None], None),
    ):
        found, needed = seen_blocks(mask, 4)
        assert all(row <= blocks for row, blocks in zip(needed, found, strict=True))


def test_chunked_stores_no_scores():
    length = 1024
    shapes = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (4, 2, 2)]
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def extra_bytes(implementation):
        def total(*arrays):
            out = ops.attention(
                *arrays,
                query_positions=positions,
                key_positions=positions,
                implementation=implementation,
            )
            return jnp.sum(jnp.square(out))

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * length * length * 4
    assert extra_bytes("xla") > scores
    assert extra_bytes("chunked") < scores / 4


@pytest.mark.slow
def test_forward_mode_and_second_order_work_densely():
    query, key, value = inputs(4, 4, heads=2, kv_heads=2)
    positions = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4))

    def f(query):
        out = ops.attention(
            query,
            key,
            value,
            query_positions=positions,
            key_positions=positions,
            implementation="xla",
        )
        return jnp.sum(jnp.square(out))

    _, curvature = jax.jvp(jax.grad(f), (query,), (query,))
    chex.assert_tree_all_finite(curvature)


def test_errors():
    query, key, value = inputs()
    options = packed()
    with pytest.raises(ValueError, match="xla, chunked, cudnn"):
        ops.attention(query, key, value, **options, implementation="flash")
    with pytest.raises(ValueError, match="not a multiple of the 2 heads"):
        ops.attention(query[:, :, :5], key, value, **options)
    with pytest.raises(NotImplementedError, match="soft cap"):
        ops.attention(query, key, value, **options, softcap=1.0, implementation="cudnn")
    with pytest.raises(AssertionError):
        ops.attention(query, key[:, 1:], value, **options)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
            ops.attention(query, key, value, **options, implementation="cudnn")
