"""Discriminative fine-tuning: raise an answer over answers sampled from the base model.

The sum over all answers in the likelihood is estimated by a moving average per training
example, `u`, kept as its logarithm: the method's only memory. The caller stores it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops


class DiscriminativeOutput(NamedTuple):
    """What `discriminative` returns.

    Fields:
        values: surrogate per example, float32 or wider `[N]`. Only its gradient means
            anything; the objective is about `-score + tau * log_u`.
        log_u: the moving averages after this visit, same dtype `[N]`, no gradient.
        weights: the paper's `exp(s / tau) / (P0 u)` of each negative, same dtype
            `[N, B]`, no gradient: at least 0, at most `B / gamma`, and their mean over
            an example at most `1 / gamma`. Zero where masked.
    """

    values: jax.Array
    log_u: jax.Array
    weights: jax.Array


def init_log_u(count: int, *, initial: float = 0.0) -> jax.Array:
    """The moving averages before the first visit, one per training example.

    Args:
        count: training examples.
        initial: logarithm of each; 0 is the paper's `u = 1`.

    Returns:
        float32 `[count]`, whatever the model's dtype: `u` itself may be `exp(600)`.

    Raises:
        ValueError: `count` is below 1, or `initial` is not finite.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    if not math.isfinite(initial):
        raise ValueError(f"initial must be finite, got {initial}.")
    return jnp.full((count,), initial, jnp.float32)


def check_discriminative(*, tau: float, gamma: float) -> None:
    """ValueError for settings that `discriminative` refuses."""
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"tau must be positive and finite, got {tau}.")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(
            f"gamma must lie in (0, 1], got {gamma}: it is the share of the new value "
            "in the moving average; 1 remembers nothing."
        )


def discriminative(
    pos_logps: jax.Array,
    neg_logps: jax.Array,
    log_u: jax.Array,
    *,
    tau: float,
    gamma: float,
    ref_neg_logps: jax.Array | None = None,
    pos_lengths: jax.Array | None = None,
    neg_lengths: jax.Array | None = None,
    neg_mask: jax.Array | None = None,
) -> DiscriminativeOutput:
    """Surrogate with the gradient of `-s(y) + tau log sum over y' of exp(s(y') / tau)`.

    The score `s` is the answer's log-probability (DFT) or, given lengths, that divided
    by its tokens (DFT2). With `d = s / tau - log P0` for each negative:

    1. `u <- (1 - gamma) u + gamma mean(exp(d))`, in logarithms, before it is used;
    2. weights `c = exp(d - log u)`, constants;
    3. value `-s(y) + mean(c s(negative))`. `tau` cancels: it multiplies neither term.

    Only examples that are passed are updated. The positive is not among the negatives.

    Args:
        pos_logps: log-probability of each example's answer under the policy (sum over
            its tokens), float `[N]`, nats.
        neg_logps: of the sampled answers, float `[N, B]`.
        log_u: moving averages of these examples, float `[N]`: rows of the table that
            `init_log_u` began, looked up by example, never by place in the batch.
        tau: temperature, positive.
        gamma: share of the new value in the moving average, in (0, 1].
        ref_neg_logps: log-probability of each negative under what sampled it, `log P0`,
            float `[N, B]`, taken as a constant. None leaves `P0` out, as DFT2 does,
            which takes it to be the same for all negatives.
        pos_lengths: tokens of each answer, int or float `[N]`, or None.
        neg_lengths: of each negative, `[N, B]`; None if `pos_lengths` is.
        neg_mask: negatives that count, bool `[N, B]`; None for all. Means are over
            these; the others, even NaN, change nothing. An example without any keeps
            its `log_u` and has the value `-s(y)`.

    Returns:
        `DiscriminativeOutput(values, log_u, weights)`. A value is NaN where a number
        of its example is not finite, or a length is below one: some such numbers would
        otherwise pass unseen as a weight of zero.

    Raises:
        ValueError: `tau` or `gamma` is out of range, shapes differ, one of the lengths
            is missing, or there are neither lengths nor `ref_neg_logps`.

    Source: Guo et al. (2025), "Discriminative Finetuning of Generative Large Language
    Models without Reward Models and Human Preference Data", arXiv 2502.18679; the
    steps in log space and the order (`u` before its use) are those of its code.
    """
    check_discriminative(tau=tau, gamma=gamma)
    _check_arrays(pos_logps, neg_logps, log_u, ref_neg_logps, neg_mask)
    _check_lengths(pos_logps, neg_logps, pos_lengths, neg_lengths)
    if ref_neg_logps is None and neg_lengths is None:
        raise ValueError(
            "DFT needs ref_neg_logps, the log-probs of the negatives under what drew "
            "them; give pos_lengths and neg_lengths for DFT2, which does without."
        )
    positive, negative, old = ops.at_least_float32(pos_logps, neg_logps, log_u)
    dtype = positive.dtype
    old = jax.lax.stop_gradient(old)
    if neg_mask is None:
        neg_mask = jnp.ones(negative.shape, bool)
    negative = jnp.where(neg_mask, negative, 0.0)
    if pos_lengths is not None and neg_lengths is not None:
        tokens = jnp.where(neg_mask, jnp.asarray(neg_lengths, dtype), 1.0)
        positive = _mean_score(positive, jnp.asarray(pos_lengths, dtype))
        negative = _mean_score(negative, tokens)

    ratios = jax.lax.stop_gradient(negative) / tau  # d
    if ref_neg_logps is not None:
        reference = jnp.asarray(ref_neg_logps, dtype)
        ratios = ratios - jax.lax.stop_gradient(jnp.where(neg_mask, reference, 0.0))
    new = _update(old, ratios, neg_mask, gamma)
    weights = jnp.where(neg_mask, jnp.exp(ratios - new[:, None]), 0.0)
    count = jnp.sum(neg_mask, axis=1, dtype=dtype)
    values = ops.ratio(jnp.sum(weights * negative, axis=1), count) - positive
    finite = jnp.isfinite(positive) & jnp.isfinite(old)
    finite &= jnp.all(jnp.isfinite(ratios), axis=1)
    values = jnp.where(finite, values, jnp.nan)
    return DiscriminativeOutput(values, new, weights)


def _update(
    old: jax.Array, ratios: jax.Array, mask: jax.Array, gamma: float
) -> jax.Array:
    """`log((1 - gamma) u + gamma mean(exp(d)))`; the old value where nothing counts."""
    count = jnp.sum(mask, axis=1, dtype=ratios.dtype)
    total = jax.nn.logsumexp(jnp.where(mask, ratios, -jnp.inf), axis=1)
    new = total - jnp.log(jnp.maximum(count, 1.0)) + math.log(gamma)
    if gamma < 1.0:  # at 1 the old value, whatever it is, is forgotten
        new = jnp.logaddexp(math.log1p(-gamma) + old, new)
    return jnp.where(count > 0.0, new, old)


def _mean_score(logps: jax.Array, lengths: jax.Array) -> jax.Array:
    """Log-probability per token; NaN for an answer without tokens."""
    return logps / jnp.where(lengths >= 1.0, lengths, jnp.nan)


def _check_arrays(
    pos_logps: jax.Array,
    neg_logps: jax.Array,
    log_u: jax.Array,
    ref_neg_logps: jax.Array | None,
    neg_mask: jax.Array | None,
) -> None:
    shape = jnp.shape(neg_logps)
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"neg_logps must be [N, B] with B at least 1, got {shape}.")
    for name, array, wanted in (
        ("pos_logps", pos_logps, shape[:1]),
        ("log_u", log_u, shape[:1]),
        ("ref_neg_logps", ref_neg_logps, shape),
        ("neg_mask", neg_mask, shape),
    ):
        if array is not None and jnp.shape(array) != wanted:
            raise ValueError(
                f"{name} must have shape {wanted} beside neg_logps {shape}, got "
                f"{jnp.shape(array)}."
            )
    if neg_mask is not None and neg_mask.dtype != jnp.bool_:
        raise ValueError(f"neg_mask must be boolean, got dtype {neg_mask.dtype}.")


def _check_lengths(
    pos_logps: jax.Array,
    neg_logps: jax.Array,
    pos_lengths: jax.Array | None,
    neg_lengths: jax.Array | None,
) -> None:
    given = {"pos_lengths": pos_lengths, "neg_lengths": neg_lengths}
    missing = [name for name, array in given.items() if array is None]
    if len(missing) == 1:
        (other,) = set(given) - set(missing)
        raise ValueError(f"{other} was given without {missing[0]}.")
    for name, array, logps in (
        ("pos_lengths", pos_lengths, pos_logps),
        ("neg_lengths", neg_lengths, neg_logps),
    ):
        if array is not None and jnp.shape(array) != jnp.shape(logps):
            raise ValueError(
                f"{name} must have shape {jnp.shape(logps)}, got {jnp.shape(array)}."
            )
