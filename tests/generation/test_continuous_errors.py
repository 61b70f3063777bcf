"""What `generate_stream` refuses, before it computes anything."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder

from jaxpost import generation
from jaxpost.generation import SamplingConfig
from jaxpost.generation._cache_rows import CacheAxes, cache_axes

CONFIG = SamplingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def fake():
    fns = FakeDecoder()
    return fns, fns.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("prompts", "kwargs", "match"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, VOCAB]], {}, rf"token 1 of prompt 1 is {VOCAB}, outside"),
        ([[-1]], {}, "token 0 of prompt 0 is -1"),
        ([[1.0]], {}, "prompt 0 must be a sequence of token ids, got float64"),
        ([[[1]]], {}, r"prompt 0 must be a sequence of token ids, got int64 \(1, 1\)"),
        (
            [[1] * 9],
            {"max_prompt_length": 8},
            "9 tokens, more than max_prompt_length=8",
        ),
        ([[1] * 8], {"context_length": 8}, "no room for an answer in context_length=8"),
        ([[1] * 9], {"context_length": 8}, "prompt 0 has 9 tokens"),
        ([[1]], {"slots": 0}, "slots must be an integer of at least 1"),
        ([[1]], {"samples_per_prompt": 0}, "samples_per_prompt must be"),
        ([[1]], {"refill_every": 0}, "refill_every must be"),
        (
            [[1]],
            {"limits": [5]},
            "limits must be one integer from 1 to max_new_tokens=4",
        ),
        ([[1]], {"limits": [0]}, "limits must be"),
        ([[1]], {"limits": [1, 1]}, "for each of 1 prompts"),
        ([[1]], {"sequence_ids": [1, 2]}, r"= \(1, 1\), got int64 \(2,\)"),
        ([[1]], {"sequence_ids": [0.5]}, "sequence_ids must be integer"),
        ([[1]], {"samples_per_prompt": 2, "sequence_ids": [1]}, r"= \(1, 2\)"),
        (
            [[1]],
            {"config": SamplingConfig(max_new_tokens=1, stop_ids=(VOCAB,))},
            "stop",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_named(fake, prompts, kwargs, match):
    before = generation.trace_counts()
    with pytest.raises(ValueError, match=match):
        generation.generate_stream(
            *fake, prompts, **{"config": CONFIG, "key": jax.random.key(0), **kwargs}
        )
    assert generation.trace_counts() == before


def test_rollout_too_narrow_is_named():
    numbers = np.zeros((4,), np.float32)
    answer = generation.Finished(
        prompt=0,
        sample=0,
        tokens=np.arange(4, dtype=np.int32),
        logps=numbers,
        sampling_logps=numbers,
        entropies=numbers,
        finish_reason="length",
        near=0,
    )
    with pytest.raises(ValueError, match="4 tokens, more than max_new_tokens=3"):
        generation.as_rollout([answer], max_new_tokens=3)
    assert not generation.as_rollout([answer], max_new_tokens=4).finished[0]
    empty = generation.as_rollout([], max_new_tokens=3)
    assert np.asarray(empty.tokens).shape == (0, 3)


def layout(make):
    return cache_axes(types.SimpleNamespace(init_cache=make), jnp.float32)  # pyright: ignore[reportArgumentType]


def test_layout_of_a_cache_is_found():
    def make(batch, length, dtype):
        return {
            "k": jnp.zeros((3, batch, 2, length, 5), dtype),
            "v": jnp.zeros((length, 7, batch), dtype),
            "state": jnp.zeros((batch, 9), dtype),
        }

    # Leaves in the order of their names.
    assert layout(make) == CacheAxes(batch=(1, 0, 2), length=(3, None, 0))


@pytest.mark.parametrize(
    "shape",
    [lambda b, s: (s, 4), lambda b, s: (b, b), lambda b, s: (b, s, s)],
    ids=["no rows", "rows twice", "positions twice"],
)
def test_unclear_layout_is_named(shape):
    with pytest.raises(ValueError, match="leaf 0 of the cache has shapes"):
        layout(lambda batch, length, dtype: jnp.zeros(shape(batch, length), dtype))
