"""Divergence of two heads' distributions, straight from their hidden states.

Of each chunk of tokens the logits of student and teacher are built, compared and
dropped; neither `[B, T, V]` array exists, forward or backward. With `S = softmax(z)`
the student's and `T` the teacher's probabilities of one token,

    d D / dz = S (r - sum S r),        r = d D / d S,

which is `S - T` for the forward divergence, `S (log S/T - D)` for the reverse one, and
`(1 - alpha) S (log S/M - KL(S || M))` between.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpost.ops import _linear_chunk as chunks
from jaxpost.ops._linear_chunk import Inputs, Settings
from jaxpost.ops._linear_support import check_sweep, plan_sweep, sweep_inputs
from jaxpost.ops._logits import as_head, check_widths
from jaxpost.typing import Head


def linear_divergence(
    hidden: jax.Array,
    head: Head | jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: Head | jax.Array,
    *,
    alpha: float,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    grad_weights: jax.Array | None = None,
    chunk_size: int | None = None,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Divergence of the teacher from the student at each token, over all of `V`.

    That of `losses.divergence`, of `softmax(logits / temperature)` of both. Gradients
    reach `hidden` and `head`, none the teacher. They cost six products of the size of
    the logits' in all, since the backward pass builds each chunk's logits of both
    again; with `grad_weights`, four. Reverse mode only.

    Args:
        hidden: the student's states after the last norm, float `[B, T, D]` (any axes
            before `D`).
        head: the student's `Head`, or its bare weight `[D, V]`.
        teacher_hidden: the teacher's states of the same tokens, `[B, T, D']`.
        teacher_head: the teacher's, `[D', V]`.
        alpha: 0 is `KL(teacher || student)`, 1 `KL(student || teacher)`, between them
            the generalised Jensen-Shannon divergence.
        temperature: divides the (capped) logits of both.
        mask: tokens to compare, bool `[B, T]`; None for all. The others cost no product
            with a head, their values are zero, and whatever they hold, even NaN,
            reaches no result and no gradient.
        grad_weights: what the loss will multiply the values with, up to one factor
            common to all tokens; also the mask. A hint, as in `linear_token_logps`.
        chunk_size: tokens per chunk; see `linear_token_logps`.
        vocab_axis: inside `shard_map`, the mesh axis over which the `V` of both heads
            is split into equal parts in order.

    Returns:
        Values, float32 or wider, `[B, T]`, nats.

    Raises:
        ValueError: `alpha` outside [0, 1]; two vocabularies; shapes that do not fit; a
            temperature or chunk size that is not positive; both `mask` and
            `grad_weights`.

    Source: see `losses.divergence`; chunks as in `linear_token_logps`.
    """
    head, teacher_head = as_head(head), as_head(teacher_head)
    _check(hidden, head, teacher_hidden, teacher_head, alpha, mask, grad_weights)
    if grad_weights is not None:
        grad_weights = lax.stop_gradient(grad_weights)
        mask = grad_weights.astype(bool)
    check_sweep(hidden, head, mask, chunk_size, temperature)
    settings, walk = plan_sweep(hidden, head, mask, temperature, chunk_size, vocab_axis)
    teacher_hidden, teacher_head = lax.stop_gradient((teacher_hidden, teacher_head))
    teacher = Inputs(
        walk.bring(teacher_hidden),
        teacher_head.weight,
        teacher_head.bias,
        walk.mask,
        None,
        walk.trips,
    )
    inputs = sweep_inputs(walk, hidden, head, None)
    axes = chunks._varying_axes((inputs, teacher))
    weights = None
    if grad_weights is not None:
        weights = walk.bring(grad_weights.astype(settings.dtype))
    static = _Static(
        settings,
        settings._replace_head(teacher_head) if False else _of_head(settings, teacher_head),
        float(alpha),
    )
    values: Any = _divergence(
        static,
        *(
            None if x is None else chunks.vary_over(x, axes)
            for x in (inputs.hidden, inputs.weight, inputs.bias)
        ),
        (teacher, weights),
    )
    return walk.take_back(values)
