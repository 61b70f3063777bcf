"""Divergence of two heads' distributions, straight from their hidden states.

Of each chunk of tokens the logits of student and teacher are built, compared and
dropped; neither `[B, T, V]` array exists, forward or backward. With `S = softmax(z)`
the student's and `T` the teacher's probabilities of one token,

    d D / dz = S (r - sum S r),        r = d D / d S,

which is `S - T` for the forward divergence, `S (log S/T - D)` for the reverse one, and
`(1 - alpha) S (log S/M - KL(S || M))` between.
"""

import dataclasses
import functools
import math
from typing import Any

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
    inputs = sweep_inputs(walk, hidden, head, None)
    teacher = Inputs(
        walk.bring(teacher_hidden),
        teacher_head.weight,
        teacher_head.bias,
        inputs.targets,
        None,
        walk.trips,
    )
    inputs = chunks.vary_together(inputs, chunks.all_varying_axes(teacher))
    weights = None
    if grad_weights is not None:
        weights = walk.bring(grad_weights.astype(settings.dtype))
    of_teacher = dataclasses.replace(
        settings, scale=teacher_head.scale, softcap=teacher_head.softcap
    )
    values: Any = _divergence(
        (settings, of_teacher, float(alpha)),
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        (teacher, weights),
    )
    return walk.take_back(values)


def _check(
    hidden, head: Head, teacher_hidden, teacher_head: Head, alpha, mask, grad_weights
) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    check_widths(teacher_hidden, teacher_head)
    sizes = head.weight.shape[-1], teacher_head.weight.shape[-1]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's head has a vocabulary of {sizes[0]}, the teacher's of "
            f"{sizes[1]}; they must be the same."
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            "hidden and teacher_hidden must be [B, T, ...] of the same tokens, got "
            f"{hidden.shape} and {teacher_hidden.shape}."
        )
    if mask is not None and grad_weights is not None:
        raise ValueError(
            "give mask or grad_weights, not both: tokens of weight zero are masked."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(static, hidden, weight, bias, rest):
    return _walk_forward(static, hidden, weight, bias, rest, with_grads=False)[0]


def _forward(static, hidden, weight, bias, rest):
    with_grads = rest[1] is not None
    values, grads = _walk_forward(
        static, hidden, weight, bias, rest, with_grads=with_grads
    )
    return values, (hidden, weight, bias, rest, grads)


def _walk_forward(static, hidden, weight, bias, rest, *, with_grads: bool):
    """Values `[A, S]` and, if asked, the gradients of `sum(grad_weights * values)`."""
    settings, _, _ = static
    teacher, weights = rest
    inputs = Inputs(hidden, weight, bias, teacher.targets, None, teacher.trips)

    def body(i, carry):
        values, grads = carry
        part = chunks.take_chunk(hidden, i, settings.columns)
        scores, found, slopes = _compare(static, inputs, teacher, part, i)
        if grads is not None:
            factor = chunks.take_chunk(weights, i, settings.columns)
            of_chunk = chunks.slope_grads(
                settings, inputs, part, scores, slopes, factor
            )
            grads = chunks.with_chunk(grads, i, of_chunk)
        return chunks.put_chunk(values, i, found), grads

    axes = chunks.all_varying_axes(inputs) - {settings.vocab_axis}
    values = chunks.zeros_over(hidden.shape[:2], settings.dtype, axes)
    grads = chunks.zero_grads(settings, inputs) if with_grads else None
    return lax.fori_loop(0, inputs.trips, body, (values, grads))


def _backward(static, saved, values_bar):
    settings, _, _ = static
    hidden, weight, bias, rest, grads = saved
    teacher, weights = rest
    inputs = Inputs(hidden, weight, bias, teacher.targets, None, teacher.trips)
    if settings.vocab_axis is not None and not chunks.varying_axes(hidden):
        # An unchecked shard_map: a sum over devices is transposed to a sum.
        values_bar = lax.psum(values_bar, settings.vocab_axis)
    if grads is None:
        start, trips = chunks.zero_grads(settings, inputs), inputs.trips
    else:
        values_bar = jnp.where(weights == 0, 0, values_bar)
        start, trips = chunks.scale_if_foreseen(
            weights, inputs.trips, grads, values_bar, None
        )

    def body(i, grads):
        factor = chunks.take_chunk(values_bar, i, settings.columns)
        part = chunks.take_chunk(hidden, i, settings.columns)
        scores, _, slopes = _compare(static, inputs, teacher, part, i)
        # Zero times what is not finite would be NaN.
        slopes = jnp.where((factor != 0)[:, None], slopes, 0)
        part = jnp.where((factor != 0)[:, None], part, jnp.zeros((), part.dtype))
        of_chunk = chunks.slope_grads(settings, inputs, part, scores, slopes, factor)
        return chunks.with_chunk(grads, i, of_chunk)

    found = lax.fori_loop(0, trips, body, start)
    return (
        found.hidden.astype(hidden.dtype),
        found.weight.astype(weight.dtype),
        None if found.bias is None else found.bias.astype(bias.dtype),
        None,
    )


_divergence.defvjp(_forward, _backward)


def _compare(static, inputs: Inputs, teacher: Inputs, part, i):
    """Of one chunk: the student's scores `[C, V]`, the values `[C]`, and the slopes of
    these in the scores `[C, V]`."""
    settings, of_teacher, alpha = static
    scores = chunks.chunk_scores(settings, inputs, part)
    student = _log_softmax(settings, scores)
    hidden = chunks.take_chunk(teacher.hidden, i, settings.columns)
    other = _log_softmax(settings, chunks.chunk_scores(of_teacher, teacher, hidden))

    def mean(logps, of):
        """Sum over the vocabulary of `exp(logps) * of`; what is impossible adds 0."""
        terms = jnp.where(jnp.isneginf(logps), 0, jnp.exp(logps) * of)
        return chunks.over_vocab(settings, lax.psum, jnp.sum(terms, axis=1))

    if alpha == 0.0:
        values = mean(other, other - student)
        return scores, values, jnp.exp(student) - jnp.exp(other)
    if alpha == 1.0:
        values = gap = mean(student, student - other)
        surplus = student - other
    else:
        mixture = jnp.logaddexp(student + math.log1p(-alpha), other + math.log(alpha))
        surplus, gap = student - mixture, mean(student, student - mixture)
        values = (1.0 - alpha) * gap + alpha * mean(other, other - mixture)
    slopes = jnp.exp(student) * (surplus - gap[:, None])
    slopes = jnp.where(jnp.isneginf(student), 0, slopes)
    return scores, values, slopes if alpha == 1.0 else (1.0 - alpha) * slopes


def _log_softmax(settings: Settings, scores):
    top = chunks.over_vocab(settings, lax.pmax, jnp.max(scores, axis=1))
    exps = jnp.exp(scores - top[:, None])
    norm = chunks.over_vocab(settings, lax.psum, jnp.sum(exps, axis=1))
    return scores - (top + jnp.log(norm))[:, None]
