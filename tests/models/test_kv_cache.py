"""Cached decoding equals the full forward pass; rows are independent."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models import _cache

LENGTH = 9


@pytest.fixture(params=["apart", "stacked"])
def layers(request, monkeypatch):
    """How a cache holds its layers."""
    if request.param == "stacked":
        monkeypatch.setattr(_cache, "APART_BYTES", 0)
    return request.param


def setup(name, batch=2, length=LENGTH):
    config = families.CONFIGS[name]
    model = families.build(config)
    key = jax.random.key(8)
    tokens = jax.random.randint(key, (batch, length), 0, config.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return model, tokens, positions


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi4"])
def test_prefill_then_steps_equal_the_full_pass(name):
    model, tokens, positions = setup(name)
    full = model.apply(model.params, tokens, positions).hidden
    params = model.for_decoding(model.params)
    cache = model.init_cache(2, 13, jnp.float32)
    output = model.apply(params, tokens[:, :4], positions[:, :4], None, cache)
    found = [output.hidden]
    for t in range(4, LENGTH):
        output = model.apply(
            params,
            tokens[:, t : t + 1],
            positions[:, t : t + 1],
            None,
            output.cache,
        )
        found.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(found, 1), full, atol=1e-5, rtol=1e-5)


def test_padding_side_does_not_matter():
    """Prompts of 3 and 6 tokens, padded left or right, then two steps."""
    model, tokens, positions = setup("qwen2")
    full = model.apply(model.params, tokens, positions).hidden
    lengths = (3, 6)
    for side in ("left", "right"):
        prompt = np.full((2, 6), 30, np.int32)
        segments, places = np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32)
        for row, length in enumerate(lengths):
            where = slice(6 - length, 6) if side == "left" else slice(0, length)
            prompt[row, where] = tokens[row, :length]
            segments[row, where], places[row, where] = 1, np.arange(length)
        cache = model.init_cache(2, 8, jnp.float32)
        output = model.apply(model.params, prompt, places, segments, cache)
        for step in range(2):
            at = jnp.asarray(lengths, jnp.int32) + step
            next_tokens = tokens[jnp.arange(2), at][:, None]
            output = model.apply(
                model.params, next_tokens, at[:, None], None, output.cache
            )
            np.testing.assert_allclose(
                output.hidden[:, 0], full[jnp.arange(2), at], atol=1e-5
            )


def test_a_row_can_be_reused_and_a_finished_row_left_alone(layers):
    model, tokens, positions = setup("llama")
    cache = model.init_cache(2, LENGTH, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    output = model.apply(model.params, tokens, positions, None, cache)
    # Row 1 starts anew with another prompt, row 0 is not written (segment 0).
    other = tokens[:, ::-1][:, :4]
    segments = jnp.asarray([[0] * 4, [1] * 4], jnp.int32)
    again = model.apply(model.params, other, positions[:, :4], segments, output.cache)
    alone = model.apply(model.params, other, positions[:, :4]).hidden
    np.testing.assert_allclose(again.hidden[1], alone[1], atol=1e-5)
    left, before = (
        [leaf[..., 0, :, :, :] for leaf in jax.tree.leaves(cache)]
        for cache in (again.cache, output.cache)
    )
    jax.tree.map(np.testing.assert_array_equal, left, before)


def test_cache_shape_and_dtype(layers):
    model, tokens, positions = setup("llama")
    cache = model.init_cache(2, 16, jnp.bfloat16)
    layer = (2, 2, 16, 6)
    for part in cache:
        if layers == "apart":
            assert [leaf.shape for leaf in part] == [layer] * 3
        else:
            assert part.shape == (3, *layer)
    output = model.apply(model.params, tokens, positions, None, cache)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(output.cache))
    assert output.hidden.dtype == jnp.float32


def test_layers_apart_are_those_of_the_stack(layers):
    """Whichever way parameters and cache hold them, four ways in all."""
    model, tokens, positions = setup("llama")
    params, cache = model.params, model.init_cache(2, LENGTH)
    expected = model.apply(params, tokens, positions).hidden
    one_by_one = {
        **params,
        "layers": tuple(
            jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]) for n in range(3)
        ),
    }
    for given in (params, one_by_one):
        found = model.apply(given, tokens, positions, None, cache)
        np.testing.assert_allclose(found.hidden, expected, atol=1e-6)
    arranged = model.for_decoding(params)
    wanted = one_by_one if layers == "apart" else params
    jax.tree.map(np.testing.assert_array_equal, arranged, wanted)


def test_a_decoding_loop_holds_one_cache(layers):
    """No second cache beside the one carried by the loop, whatever its length."""
    model, _, _ = setup("llama")
    length = 4096

    def decode(params, cache, token):
        def step(carry):
            position, token, cache = carry
            output = model.apply(params, token, jnp.full((4, 1), position), None, cache)
            token = jnp.argmax(output.hidden, axis=-1).astype(jnp.int32)
            return position + 1, token, output.cache

        start = (jnp.int32(0), token, cache)
        return jax.lax.while_loop(lambda carry: carry[0] < 9, step, start)

    cache = jax.eval_shape(lambda: model.init_cache(4, length))
    token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    params = jax.eval_shape(model.for_decoding, model.params)
    compiled = jax.jit(decode, donate_argnums=1).lower(params, cache, token)
    extra = compiled.compile().memory_analysis().temp_size_in_bytes
    layer = jax.tree.leaves(cache.k)[0].size * 4
    layer //= 1 if layers == "apart" else 3
    # Copies of one layer's keys and values, for slots that are not finite; and, from a
    # stack, those that are read. A second cache would take six more.
    assert extra < (4 if layers == "apart" else 6) * layer
