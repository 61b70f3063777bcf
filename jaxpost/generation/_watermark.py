"""Embedding a watermark: more probability for green tokens where the model wavers.

SWEET raises the logits of green tokens at positions of high entropy only, since code
breaks where there is but one good token. Without that threshold it is WLLM.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxpost.generation._processors import ProcessorState
from jaxpost.generation._sampling import spread
from jaxpost.generation._watermark_hash import WatermarkKey, green_count, green_rows

NO_THRESHOLD = -1.0
"""The `tau` of WLLM: every entropy is above it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WatermarkProcessor:
    """A `Processor` that embeds a watermark; made by `watermark_processor`.

    Another key, `gamma`, `delta` or `tau` compiles nothing anew; another vocabulary, or
    a change from SWEET to WLLM, does. Put it before processors that change logits, or
    the entropies that it sees will not be those that the detector computes.

    Fields:
        words: the key's, uint32 `[3, 2]`.
        count: green ids, uint32 scalar.
        delta: added to green logits, float32 scalar.
        tau: entropy above which they are raised, nats, float32 scalar.
        vocab_size: ids that can be green; static.
        selective: whether there is a threshold; WLLM computes no entropy; static.
    """

    words: Any
    count: Any
    delta: Any
    tau: Any
    vocab_size: int = dataclasses.field(metadata={"static": True})
    selective: bool = dataclasses.field(metadata={"static": True})

    def __call__(
        self, logits: jax.Array, state: ProcessorState
    ) -> tuple[jax.Array, ProcessorState]:
        latest = state.position[:, None] - 1
        prev_ids = jnp.take_along_axis(state.tokens, latest, axis=1)[:, 0]
        return raise_green(self, logits, prev_ids), state


def watermark_processor(
    key: WatermarkKey, *, gamma: float, delta: float, tau: float
) -> WatermarkProcessor:
    """The logits processor that embeds a watermark while generating.

    Args:
        key: the watermark's.
        gamma: fraction of ids that are green, in (0, 1).
        delta: added to their logits before the temperature divides them, at least 0.
        tau: entropy of the raw distribution that must be exceeded, nats; -1 marks
            everywhere (WLLM).

    Returns:
        A processor for `generate`, `generate_stream` and `generate_text`.

    Raises:
        ValueError: `gamma` (see `green_count`), `delta` or `tau` is out of range.

    Warns:
        UserWarning: `tau` is at least `log V`: nothing will ever be marked.

    Source: Lee et al. (2024), "Who Wrote this Code? Watermarking for Code Generation",
    section 3.2 (SWEET); Kirchenbauer et al. (2023), "A Watermark for Large Language
    Models", algorithm 2 (WLLM).
    """
    count = green_count(gamma, key.vocab_size)
    if not (math.isfinite(delta) and delta >= 0.0):
        raise ValueError(f"delta must be finite and at least 0, got {delta}.")
    check_tau(tau, key.vocab_size)
    return WatermarkProcessor(
        key.words,
        np.uint32(count),
        np.float32(delta),
        np.float32(tau),
        key.vocab_size,
        selective=tau >= 0.0,
    )


def check_tau(tau: float, vocab_size: int) -> None:
    """Raises for a threshold that is no number, warns of one that is never exceeded."""
    if math.isnan(tau):
        raise ValueError("tau must be a number of nats, got nan.")
    if tau >= math.log(vocab_size):
        warnings.warn(
            f"tau={tau} nats is at least log({vocab_size}) = "
            f"{math.log(vocab_size):.3f}, the largest entropy there is: nothing is "
            "ever marked or scored.",
            stacklevel=3,
        )


def watermark_logits(
    logits: jax.Array,
    prev_ids: jax.Array,
    key: WatermarkKey,
    *,
    gamma: float,
    delta: float,
    tau: float,
) -> jax.Array:
    """Raw logits with `delta` added to green ones, in rows of high entropy.

    Args:
        logits: the model's, before temperature and filters, float `[B, W]` with
            `W >= V`; minus infinity forbids a token.
        prev_ids: the latest token of each row, integer `[B]`.
        key, gamma, delta, tau: as in `watermark_processor`.

    Returns:
        Logits, float32 or wider, `[B, W]`; rows whose entropy is at most `tau` are
        unchanged.

    Raises:
        ValueError: as `watermark_processor`; shapes do not fit; the key's vocabulary
            is wider than the logits; outside of `jit`: logits have NaN or infinity, or
            a row is minus infinity throughout.
    """
    processor = watermark_processor(key, gamma=gamma, delta=delta, tau=tau)
    logits, prev_ids = jnp.asarray(logits), jnp.asarray(prev_ids)
    if logits.ndim != 2 or prev_ids.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be [B, W] and prev_ids [B], got "
            f"{logits.shape} and {prev_ids.shape}."
        )
    if not isinstance(logits, Tracer):
        bad = ~np.isfinite(np.max(np.asarray(logits, np.float32), axis=-1))
        if bad.any():
            raise ValueError(
                f"logits of rows {np.flatnonzero(bad).tolist()[:8]} are not finite: "
                "look for NaN or infinity in the model's parameters or inputs."
            )
    return _raise_green(processor, logits, prev_ids)


def raise_green(
    processor: WatermarkProcessor, logits: jax.Array, prev_ids: jax.Array
) -> jax.Array:
    """`watermark_logits` after its checks."""
    width, vocab_size = logits.shape[-1], processor.vocab_size
    if vocab_size > width:
        raise ValueError(
            f"the watermark's key is for a vocabulary of {vocab_size} ids, but the "
            f"model has logits of {width}: do tokenizer and model belong together?"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    raised = functools.partial(_raised, processor, logits, prev_ids)
    if not processor.selective:
        return raised(jnp.ones(prev_ids.shape, jnp.bool_))
    marked = spread(logits).entropies > processor.tau
    # Often no row wavers; and a hash fused into what reads the logits would run once
    # for each of its readers.
    return jax.lax.cond(jnp.any(marked), raised, lambda _: logits, marked)


def _raised(
    processor: WatermarkProcessor,
    logits: jax.Array,
    prev_ids: jax.Array,
    marked: jax.Array,
) -> jax.Array:
    """Logits with green ones raised in the rows that are `marked`."""
    width, vocab_size = logits.shape[-1], processor.vocab_size
    green = green_rows(processor.words, prev_ids, processor.count, vocab_size)
    green = jnp.pad(green, ((0, 0), (0, width - vocab_size)))
    bonus = jnp.asarray(processor.delta, logits.dtype)
    return jnp.where(marked[:, None] & green, logits + bonus, logits)


_raise_green = jax.jit(raise_green)
