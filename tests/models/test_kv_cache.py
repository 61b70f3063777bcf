"""Cached decoding equals the full forward pass; rows are independent."""

from typing import NamedTuple

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

LENGTH = 9


def setup(name, batch=2, length=LENGTH):
    config = families.CONFIGS[name]
    model = families.build(config)
    key = jax.random.key(8)
    tokens = jax.random.randint(key, (batch, length), 0, config.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return model, tokens, positions


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "phi4"])
def test_prefill_then_steps_equal_the_full_pass(name, by_layer):
    model, tokens, positions = setup(name)
    full = model.apply(model.params, tokens, positions).hidden
    cache = model.init_cache(2, 13, jnp.float32, by_layer=by_layer)
    output = model.apply(model.params, tokens[:, :4], positions[:, :4], None, cache)
    found = [output.hidden]
    for t in range(4, LENGTH):
        output = model.apply(
            model.params,
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


def test_a_row_can_be_reused_and_a_finished_row_left_alone():
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
    for one, other in zip(again.cache.k, output.cache.k, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
    for one, other in zip(again.cache.v, output.cache.v, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_cache_shape_and_dtype():
    model, tokens, positions = setup("llama")
    cache = model.init_cache(2, 16, jnp.bfloat16, by_layer=False)
    assert cache.k.shape == (3, 2, 2, 6, 16)
    assert cache.v.shape == (3, 2, 2, 16, 6)
    output = model.apply(model.params, tokens, positions, None, cache)
    assert output.cache.k.dtype == jnp.bfloat16
    assert output.hidden.dtype == jnp.float32
    by_layer = model.init_cache(2, 16, jnp.bfloat16, by_layer=True)
    assert [k.shape for k in by_layer.k] == [(2, 2, 6, 16)] * 3
    assert jax.tree.leaves(by_layer)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_parameters_for_decoding_give_the_same(name):
    model, tokens, positions = setup(name)
    params = model.for_decoding(model.params)
    assert isinstance(params["layers"], tuple)
    assert model.for_decoding(params) is params
    full = model.apply(model.params, tokens, positions).hidden
    for cache in (None, model.init_cache(2, LENGTH, by_layer=True)):
        found = model.apply(params, tokens, positions, None, cache).hidden
        np.testing.assert_allclose(found, full, atol=1e-5, rtol=1e-5)
    cache = model.init_cache(2, LENGTH, by_layer=True)
    for at in range(tokens.shape[1]):
        one = (tokens[:, at : at + 1], positions[:, at : at + 1])
        hidden, cache, _ = model.apply(params, *one, None, cache)
        np.testing.assert_allclose(hidden[:, 0], full[:, at], atol=1e-5, rtol=1e-5)


def test_on_accelerators_layers_stay_stacked(monkeypatch):
    model, _, _ = setup("llama")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert model.for_decoding(model.params) is model.params
    assert not model.init_cache(2, 8).by_layer


class Narrow(NamedTuple):
    """Passes for a quantised kernel, whose attribute this is."""

    qvalue: jax.Array
    scale: jax.Array


def test_a_quantised_base_stays_stacked():
    """Layer by layer, all kernels would be widened ahead of a decoding loop."""
    model, _, _ = setup("llama")
    params = jax.tree.map(lambda x: x, model.params)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    params["layers"]["mlp"]["up"]["kernel"] = Narrow(kernel, kernel)
    narrow = model.replace(params=params)
    assert narrow.for_decoding(params) is params
    assert not narrow.init_cache(2, 8).by_layer
    assert narrow.init_cache(2, 8, by_layer=True).by_layer


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_decoding_loop_holds_one_cache(by_layer, monkeypatch):
    """No second cache beside the one carried by the loop, whatever its length."""
    if not by_layer:  # as it runs where caches are stacked
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
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

    cache = jax.eval_shape(lambda: model.init_cache(4, length, by_layer=by_layer))
    token = jax.ShapeDtypeStruct((4, 1), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=1).lower(model.params, cache, token)
    extra = compiled.compile().memory_analysis().temp_size_in_bytes
    one = jax.eval_shape(lambda: model.init_cache(4, length, by_layer=True))
    layer = one.k[0].size * 4
    # Reading copies one layer's keys and values at most, not the whole cache.
    assert extra < 3 * layer
