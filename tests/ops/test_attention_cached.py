"""`ops.cached_attention`: oracle, what may lie in unseen slots, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles import attention as oracle

from jaxpost import ops
from jaxpost.ops import _attention_cached

SLOTS = 11
POSITIONS = jnp.asarray([4, 10, 0], jnp.int32)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def backend(request, monkeypatch):
    """Both ways to keep unseen slots out; the other backend's runs here as well."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def inputs(*, heads=6, kv_heads=2, width=4, dtype=jnp.float32):
    """Three rows of a query `[B, N, H]`, keys and values `[B, K, S, H]`."""
    key_q, key_k, key_v = jax.random.split(jax.random.key(3), 3)
    query = jax.random.normal(key_q, (3, heads, width), dtype)
    key = jax.random.normal(key_k, (3, kv_heads, SLOTS, width), dtype)
    value = jax.random.normal(key_v, (3, kv_heads, SLOTS, width), dtype)
    return query, key, value


def attend(query, key, value, **options):
    options = {"positions": POSITIONS} | options
    return ops.cached_attention(query, key.swapaxes(2, 3), value, **options)


def expected(query, key, value, segments=None, **options):
    slots = np.broadcast_to(np.arange(SLOTS), (3, SLOTS))
    return oracle.attention(
        query[:, None],
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        query_positions=POSITIONS[:, None],
        key_positions=slots,
        query_segments=None if segments is None else segments[:, None],
        **options,
    )[:, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 3}, {"softcap": 1.5, "scale": 0.6}],
    ids=str,
)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_equals_the_oracle(heads, options, strict_dtypes):
    arrays = inputs(heads=heads[0], kv_heads=heads[1])
    found = attend(*arrays, **options)
    np.testing.assert_allclose(found, expected(*arrays, **options), atol=1e-5)


@pytest.mark.parametrize("last", [0, 2, 3, 6, 7, 15])
def test_long_caches_are_read_as_far_as_they_are_used(last, backend, monkeypatch):
    """Parts end at slots 4, 8 and 16; a padded row does not count."""
    if backend == "cpu":
        # Whoever reads further meets a NaN, and then takes this way.
        found = lambda query, *_: jnp.full_like(query, 7.0)  # noqa: E731
        monkeypatch.setattr(_attention_cached, "_mix_seen", found)
    monkeypatch.setattr(_attention_cached, "LONG_CACHE", 8)
    query, key, value = inputs()
    key, value = (jnp.tile(x, (1, 1, 2, 1))[:, :, :16] for x in (key, value))
    end = next(size for size in (4, 8, 16) if last < size)
    value = value.at[:, :, end:].set(jnp.nan)
    positions = jnp.asarray([last, 0, 15], jnp.int32)
    segments = jnp.asarray([1, 1, 0], jnp.int32)
    found = attend(query, key, value, positions=positions, segments=segments)
    for row in range(2):
        seen = slice(0, int(positions[row]) + 1)
        alone = oracle.attention(
            query[row : row + 1, None],
            key[row : row + 1, :, seen].swapaxes(1, 2),
            value[row : row + 1, :, seen].swapaxes(1, 2),
            query_positions=positions[row : row + 1, None],
            key_positions=np.arange(seen.stop)[None],
        )
        np.testing.assert_allclose(found[row], alone[0, 0], atol=1e-5)
    np.testing.assert_array_equal(found[2], 0.0)


def test_padded_rows_are_zero(strict_dtypes):
    arrays, segments = inputs(), jnp.asarray([1, 0, 2], jnp.int32)
    found = attend(*arrays, segments=segments)
    np.testing.assert_allclose(found, expected(*arrays, segments=segments), atol=1e-5)
    np.testing.assert_array_equal(found[1], 0.0)


def test_what_is_padded_reaches_no_gradient():
    (query, key, value), segments = inputs(), jnp.asarray([1, 0, 2], jnp.int32)
    spoilt = [x.at[1].set(jnp.nan) for x in (query, key, value)]

    def loss(*arrays):
        return jnp.sum(attend(*arrays, segments=segments) ** 2)

    found = jax.grad(loss, (0, 1, 2))(*spoilt)
    clean = jax.grad(loss, (0, 1, 2))(query, key, value)
    for got, wanted in zip(found, clean, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
        np.testing.assert_array_equal(got[1], 0.0)


def test_window_may_be_traced():
    arrays = inputs()
    f = jax.jit(lambda window: attend(*arrays, window=window))
    for window in (1, 4, 2**31 - 1):
        found = f(jnp.int32(window))
        np.testing.assert_allclose(found, expected(*arrays, window=window), atol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        arrays = inputs(dtype=jnp.float64)
        found = attend(*arrays, softcap=2.0)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected(*arrays, softcap=2.0), atol=1e-13)


def test_the_cache_may_be_narrower_than_the_query():
    query, key, value = inputs()
    narrow = key.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    found = attend(query, *narrow)
    assert found.dtype == jnp.float32
    widened = [x.astype(jnp.float32) for x in narrow]
    np.testing.assert_allclose(found, expected(query, *widened), atol=1e-5)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("place", ["key", "value"])
def test_unseen_slots_may_hold_anything(junk, place):
    query, key, value = inputs()
    stale = {"key": key, "value": value}
    stale[place] = stale[place].at[0, :, 5:].set(junk).at[2, :, 1:].set(junk)
    found = attend(query, stale["key"], stale["value"])
    np.testing.assert_allclose(found, expected(query, key, value), atol=1e-5)

    def loss(query, key, value):
        return jnp.sum(attend(query, key, value) ** 2)

    clean = jax.grad(loss, (0, 1, 2))(query, key, value)
    got = jax.grad(loss, (0, 1, 2))(query, stale["key"], stale["value"])
    for a, b in zip(got, clean, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_array_equal(got[1][0, :, 5:], 0.0)
    np.testing.assert_array_equal(got[2][0, :, 5:], 0.0)


@pytest.mark.parametrize("place", ["key", "value"])
def test_a_seen_nan_harms_its_own_row_only(place):
    query, key, value = inputs()
    spoilt = {"key": key, "value": value}
    spoilt[place] = spoilt[place].at[1, 0, 2].set(jnp.nan)
    found = attend(query, spoilt["key"], spoilt["value"])
    clean = expected(query, key, value)
    assert np.isnan(found[1, :3]).all()
    np.testing.assert_allclose(found[1, 3:], clean[1, 3:], atol=1e-5)
    np.testing.assert_allclose(found[::2], clean[::2], atol=1e-5)


def test_gradients():
    with jax.enable_x64(True):
        arrays = inputs(dtype=jnp.float64)
        check_grads(
            lambda *arrays: attend(*arrays, window=4, softcap=2.0),
            arrays,
            order=1,
            modes=["rev"],
            atol=1e-6,
            rtol=1e-6,
        )


def test_vmap():
    arrays = inputs()
    one_by_one = jax.tree.map(lambda x: x[:, None], (arrays, POSITIONS))
    mapped = jax.vmap(lambda arrays, at: attend(*arrays, positions=at))(*one_by_one)
    np.testing.assert_allclose(mapped[:, 0], attend(*arrays), atol=1e-6)


def test_bad_shapes():
    query, key, value = inputs()
    with pytest.raises(ValueError, match="5 heads, which is not a multiple of the 2"):
        attend(query[:, :5], key, value)
    with pytest.raises(AssertionError):
        attend(query, key[:, :, :5], value)
    with pytest.raises(AssertionError):
        attend(query[0], key, value)
    with pytest.raises(AssertionError):
        attend(query, key, value, segments=jnp.ones((1,), jnp.int32))
