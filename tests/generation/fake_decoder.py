"""A one-layer decoder in plain JAX: generation takes functions, not models."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import models
from jaxpost.typing import Head, ModelOutput

WIDTH = 16
VOCAB = 31


class FakeCache(NamedTuple):
    """Keys and values by position, `[B, S, D]`."""

    k: jax.Array
    v: jax.Array


class FakeDecoder:
    """Embedding, learned positions, one causal attention, one residual."""

    def __init__(self, vocab: int = VOCAB, softcap: float | None = None):
        self.vocab = vocab
        self.softcap = softcap

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 6)
        shapes = {
            "embed": (self.vocab, WIDTH),
            "places": (256, WIDTH),
            "q": (WIDTH, WIDTH),
            "k": (WIDTH, WIDTH),
            "v": (WIDTH, WIDTH),
            "head": (WIDTH, self.vocab),
        }
        return {
            name: 0.7 * jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(
        self, params, tokens, positions, segment_ids=None, cache=None
    ) -> ModelOutput:
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        x = params["embed"][tokens] + params["places"][positions]
        query, key, value = (x @ params[name] for name in ("q", "k", "v"))
        if cache is None:
            keys, slots, live = key, positions, segment_ids[:, None, :] != 0
            values = value
        else:
            rows = jnp.arange(tokens.shape[0])[:, None]
            where = jnp.where(segment_ids != 0, positions, cache.k.shape[1])
            cache = FakeCache(
                cache.k.at[rows, where].set(key.astype(cache.k.dtype), mode="drop"),
                cache.v.at[rows, where].set(value.astype(cache.v.dtype), mode="drop"),
            )
            keys, values = cache.k.astype(x.dtype), cache.v.astype(x.dtype)
            slots = jnp.arange(keys.shape[1])[None]
            live = jnp.ones((1, 1, 1), bool)
        allowed = (positions[:, :, None] >= slots[:, None, :]) & live
        scores = jnp.einsum("btd,bsd->bts", query, keys) / WIDTH**0.5
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)
        mixed = jnp.einsum("bts,bsd->btd", weights, values)
        return ModelOutput(jnp.tanh(x + mixed), cache, {})

    def unembed(self, params) -> Head:
        return Head(params["head"], softcap=self.softcap)

    def init_cache(self, batch, length, dtype) -> FakeCache:
        shape = (batch, length, WIDTH)
        return FakeCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def tiny_llama() -> models.Model:
    """The library's own decoder, two layers; positions up to 64."""
    config = models.DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        max_positions=64,
    )
    # Sharper than a fresh head, so that greedy choices are no near-ties.
    built = models.build(config, jax.random.key(1))
    return built.replace(params=jax.tree.map(lambda leaf: 2.0 * leaf, built.params))
