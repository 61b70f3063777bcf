"""Distance of a student's next-token distribution from a teacher's."""

import math

import jax
import jax.numpy as jnp

from jaxpost import ops


def divergence(
    student_logps: jax.Array, teacher_logps: jax.Array, *, alpha: float
) -> jax.Array:
    """Generalised Jensen-Shannon divergence, with the two KL divergences at its ends.

    - `alpha = 0`: forward, `KL(teacher || student)`.
    - `alpha = 1`: reverse, `KL(student || teacher)`.
    - between: `(1 - alpha) KL(student || M) + alpha KL(teacher || M)` with
      `M = (1 - alpha) student + alpha teacher`.

    The ends are cases of their own: the form between them tends to zero at both, not to
    a KL divergence, and so does its gradient.

    For a temperature, pass `log_softmax(logps / temperature)` of both; customarily the
    loss is then multiplied by its square. Any distributions will do, also the most
    likely tokens with one entry for the rest.

    Args:
        student_logps: normalised log-probabilities, float `[..., V]`, nats; `-inf` for
            an impossible token.
        teacher_logps: the teacher's, same shape. Taken as a constant: no gradient flows
            into it.
        alpha: which divergence, in [0, 1].

    Returns:
        Values, float32 or wider, `[...]`, nats, never negative but for rounding; at
        most log 2 between the ends. Infinite at an end where the second distribution of
        the KL divergence lacks a token of the first. A token that both lack adds
        nothing.

    Raises:
        ValueError: `alpha` is outside [0, 1], or shapes differ (such as two
            vocabularies).

    Source: Agarwal et al. (2024), "On-Policy Distillation of Language Models", arXiv
    2306.13649, with the ends as in arXiv 2605.12741.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    if student_logps.shape != teacher_logps.shape:
        raise ValueError(
            "student_logps and teacher_logps must have one shape, got "
            f"{student_logps.shape} and {teacher_logps.shape}; the last axis is the "
            "vocabulary, which must be the same."
        )
    student, teacher = ops.at_least_float32(student_logps, teacher_logps)
    teacher = jax.lax.stop_gradient(teacher)
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
