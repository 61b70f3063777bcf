"""Distance of a student's next-token distribution from a teacher's."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxpost import ops

Rest = Literal["bucket", "renormalize", "teacher"]
"""What becomes of the tokens outside a support; see `support_divergence`."""


def divergence(
    student_logps: jax.Array,
    teacher_logps: jax.Array,
    *,
    alpha: float,
    temperature: float = 1.0,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence, with the two KL divergences at its ends.

    - `alpha = 0`: forward, `KL(teacher || student)`.
    - `alpha = 1`: reverse, `KL(student || teacher)`.
    - between: `(1 - alpha) KL(student || M) + alpha KL(teacher || M)` with
      `M = (1 - alpha) student + alpha teacher`.

    The ends are cases of their own: the form between them tends to zero at both, not to
    a KL divergence, and so does its gradient.

    Any distributions will do, also the most likely tokens with one entry for the rest
    (`support_divergence`). For whole vocabularies of whole batches,
    `ops.linear_divergence` gives the same values without holding `[B, T, V]`.

    Args:
        student_logps: normalised log-probabilities, float `[..., V]`, nats; `-inf` for
            an impossible token.
        teacher_logps: the teacher's, same shape. Taken as a constant: no gradient flows
            into it.
        alpha: which divergence, in [0, 1].
        temperature: other than 1, both are replaced by `log_softmax(logps /
            temperature)` (so logits will do): only for whole vocabularies, since a
            bucket of several tokens has no temperature. Gradients shrink with its
            square, with which the loss is therefore often multiplied; not here.

    Returns:
        Values, float32 or wider, `[...]`, nats, never negative but for rounding; at
        most log 2 between the ends. Infinite at an end where the second distribution of
        the KL divergence lacks a token of the first. A token that both lack adds
        nothing.

    Raises:
        ValueError: `alpha` is outside [0, 1], `temperature` is not positive, or shapes
            differ (such as two vocabularies).

    Source: Agarwal et al. (2024), "On-Policy Distillation of Language Models", arXiv
    2306.13649, with the ends as in arXiv 2605.12741.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if student_logps.shape != teacher_logps.shape:
        raise ValueError(
            "student_logps and teacher_logps must have one shape, got "
            f"{student_logps.shape} and {teacher_logps.shape}; the last axis is the "
            "vocabulary, which must be the same."
        )
    student, teacher = ops.at_least_float32(student_logps, teacher_logps)
    teacher = jax.lax.stop_gradient(teacher)
    if temperature != 1.0:
        student, teacher = (
            jax.nn.log_softmax(x / temperature) for x in (student, teacher)
        )
    # A token that both lack is set aside first, so that gradients stay finite.
    zero = jnp.zeros((), student.dtype)
    present = ~(jnp.isneginf(student) & jnp.isneginf(teacher))
    student, teacher = (jnp.where(present, x, zero) for x in (student, teacher))
    if alpha == 0.0:
        return _kl(teacher, student, present)
    if alpha == 1.0:
        return _kl(student, teacher, present)
    mixture = jnp.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
    return (1.0 - alpha) * _kl(student, mixture, present) + alpha * _kl(
        teacher, mixture, present
    )


def _kl(logps: jax.Array, other: jax.Array, present: jax.Array) -> jax.Array:
    """`KL(p || q)` over the last axis; tokens impossible under `p` add nothing."""
    zero = jnp.zeros((), logps.dtype)
    counted = present & ~jnp.isneginf(logps)
    logps, other = (jnp.where(counted, x, zero) for x in (logps, other))
    terms = jnp.exp(logps) * (logps - other)
    return jnp.sum(jnp.where(counted, terms, zero), axis=-1)


def support_divergence(
    student: ops.Support, teacher: ops.Support, *, alpha: float, rest: Rest = "bucket"
) -> jax.Array:
    """`divergence` of two distributions that are known on some tokens and the rest.

    - `rest = "bucket"`: all other tokens are one event more. Never above the divergence
      over the whole vocabulary, and equal to it where the support is all of it.
    - `"renormalize"`: both are normalised on the support; the others do not count.
    - `"teacher"`: only the teacher is; the student keeps its probability in the whole
      vocabulary. So it loses by what it gives to other tokens, also where it agrees
      with the teacher on the support: the gradient is not zero even where both models
      are the same. Not for `alpha = 1`, which is infinite then.

    Args:
        student: from `ops.linear_support_logps`, `[..., K]`.
        teacher: at the same tokens, such as from `ops.linear_top_logps` or from a file.
            Taken as a constant.
        alpha: which divergence, in [0, 1].
        rest: what becomes of the tokens outside the support.

    Returns:
        Values, float32 or wider, `[...]`, nats.

    Raises:
        ValueError: `alpha` is outside [0, 1] or does not go with `rest`; `rest` is
            unknown; or shapes differ.

    Source: "bucket": arXiv 2605.12741, `compute_self_distillation_loss` of its code,
    whose tail is `log(1 - sum p)` where this one is summed; "teacher": distillation on
    the teacher's eight largest logits, arXiv 2506.18349 (the form is a reading: it says
    neither which side is normalised nor how).
    """
    if rest not in get_args(Rest):
        raise ValueError(
            f"rest must be one of {', '.join(get_args(Rest))}, got {rest!r}."
        )
    if rest == "teacher" and alpha == 1.0:
        raise ValueError(
            "rest is 'teacher', which leaves the teacher nothing outside the support, "
            "so alpha = 1 would be infinite; choose a smaller alpha."
        )
    if rest == "renormalize":
        pair = tuple(jax.nn.log_softmax(x.logps) for x in (student, teacher))
        return divergence(*pair, alpha=alpha)
    tail = teacher.tail
    logps = teacher.logps
    if rest == "teacher":
        logps, tail = jax.nn.log_softmax(logps), jnp.full_like(tail, -jnp.inf)
    return divergence(
        _with_tail(student.logps, student.tail), _with_tail(logps, tail), alpha=alpha
    )


def _with_tail(logps: jax.Array, tail: jax.Array) -> jax.Array:
    """`[..., K]` and `[...]` as `[..., K + 1]`."""
    return jnp.concatenate([logps, tail[..., None]], axis=-1)
