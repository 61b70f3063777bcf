"""Preference margins, and the plain losses of a margin.

A margin says by how much the model prefers the chosen answer: `dpo_margins`, or the
difference of two scalar rewards. Every loss here (and `r3m`, `adaptive_scaling`) is a
function of the margin alone, so each serves DPO and reward models alike.
"""

import jax
import jax.numpy as jnp

from jaxpost import ops


def dpo_margins(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    ref_chosen: jax.Array | None,
    ref_rejected: jax.Array | None,
    *,
    beta: float,
    chosen_lengths: jax.Array | None = None,
    rejected_lengths: jax.Array | None = None,
) -> jax.Array:
    """Implicit reward of the chosen answer minus that of the rejected one.

    With `s = log pi(y|x) - log pi_ref(y|x)`, the margin is `beta * (s_w - s_l)`. Given
    lengths, each `s` is divided by its answer's (length-normalised DPO). Without a
    reference (both None), `s = log pi(y|x)`; with lengths that is SimPO's margin before
    its target margin, which is subtracted from the result.

    Args:
        policy_chosen: log-probability of each chosen answer (sum over its tokens) under
            the policy, float `[B]`, nats.
        policy_rejected: the same for the rejected answers, same shape.
        ref_chosen: under the reference, same shape, or None. Taken as a constant: no
            gradient flows into it.
        ref_rejected: the same for the rejected answers; None if `ref_chosen` is.
        beta: strength of the pull to the reference, positive.
        chosen_lengths: completion tokens of each chosen answer, int or float, same
            shape, or None. A length below one (a padded row) counts as one.
        rejected_lengths: the same for the rejected; None if `chosen_lengths` is.

    Returns:
        Margins, float32 or wider, same shape. NaN where the log-probabilities of an
        answer are infinite under policy and reference alike.

    Raises:
        ValueError: `beta` is not positive and finite, shapes differ, or one of a pair
            of optional arrays is missing.

    Source: Rafailov et al. (2023), arXiv 2305.18290, eq. 7; without a reference, Meng
    et al. (2024), arXiv 2405.14734, eq. 6.
    """
    if not 0.0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta}.")
    scores = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    reference = _both_or_none(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    lengths = _both_or_none(
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    )
    _check_one_shape(scores | reference | lengths)
    arrays = ops.at_least_float32(*scores.values(), *reference.values())
    chosen, rejected = arrays[:2]
    if reference:
        chosen = chosen - jax.lax.stop_gradient(arrays[2])
        rejected = rejected - jax.lax.stop_gradient(arrays[3])
    if lengths:
        tokens = [jnp.asarray(n, chosen.dtype) for n in lengths.values()]
        chosen = chosen / jnp.maximum(tokens[0], 1.0)
        rejected = rejected / jnp.maximum(tokens[1], 1.0)
    return beta * (chosen - rejected)


def _both_or_none(**pair: jax.Array | None) -> dict[str, jax.Array]:
    given = {name: array for name, array in pair.items() if array is not None}
    if len(given) == 1:
        missing = next(name for name in pair if name not in given)
        raise ValueError(f"{next(iter(given))} was given without {missing}.")
    return given


def _check_one_shape(arrays: dict[str, jax.Array]) -> None:
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"arrays must have one shape, got {listed}.")


def check_bradley_terry(*, label_smoothing: float = 0.0) -> None:
    """ValueError for settings that `bradley_terry` refuses."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must lie in [0, 0.5), got {label_smoothing}: at 0.5 the "
            "labels say nothing, above it they say the opposite."
        )


def bradley_terry(margins: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Logistic loss of a margin: `-log sigmoid(margin)`.

    With `label_smoothing = e`: `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`, known as
    conservative DPO (cDPO). It is least at `m = logit(1 - e)`, so margins stop growing
    there. It is not `robust_dpo`, which corrects for the same flips without that pull.

    Args:
        margins: float `[B]`, or any shape.
        label_smoothing: share of labels believed flipped, in [0, 0.5).

    Returns:
        Values, float32 or wider, same shape, nats. The slope is `e - sigmoid(-m)`. At
        infinite margins: the limit (0 or infinity), with a finite slope. NaN stays NaN.

    Raises:
        ValueError: `label_smoothing` is outside [0, 0.5).

    Source: Bradley & Terry (1952); as a DPO loss, arXiv 2305.18290, eq. 7; smoothed,
    E. Mitchell (2023), "A note on DPO with noisy preferences".
    """
    check_bradley_terry(label_smoothing=label_smoothing)
    (margins,) = ops.at_least_float32(margins)
    if label_smoothing == 0.0:  # or 0 * inf makes NaN
        return jax.nn.softplus(-margins)
    kept = (1.0 - label_smoothing) * jax.nn.softplus(-margins)
    return kept + label_smoothing * jax.nn.softplus(margins)


def check_robust_dpo(*, flip_rate: float) -> None:
    """ValueError for settings that `robust_dpo` refuses."""
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(
            f"flip_rate must lie in [0, 0.5), got {flip_rate}: at 0.5 the labels say "
            "nothing, above it they say the opposite."
        )


def robust_dpo(margins: jax.Array, *, flip_rate: float) -> jax.Array:
    """Logistic loss corrected for labels flipped at a known rate.

    With `l(m) = -log sigmoid(m)` and flip rate `e`: `((1 - e) l(m) - e l(-m)) /
    (1 - 2e)`. If each label is flipped with probability `e`, its expectation over the
    flips is `l` of the clean margin: it is unbiased, where label smoothing is not. It
    falls without bound as the margin grows, at slope `-e / (1 - 2e)`.

    Args:
        margins: float `[B]`, or any shape.
        flip_rate: probability that a label is flipped, known beforehand, in [0, 0.5).

    Returns:
        Values, float32 or wider, same shape, nats; also negative ones. At infinite
        margins: the limit, with a finite slope. NaN stays NaN.

    Raises:
        ValueError: `flip_rate` is outside [0, 0.5).

    Source: Chowdhury, Kini & Natarajan (2024), "Provably Robust DPO", arXiv 2403.00409.
    """
    check_robust_dpo(flip_rate=flip_rate)
    (margins,) = ops.at_least_float32(margins)
    if flip_rate == 0.0:  # or 0 * inf makes NaN
        return jax.nn.softplus(-margins)
    kept = (1.0 - flip_rate) * jax.nn.softplus(-margins)
    flipped = flip_rate * jax.nn.softplus(margins)
    return (kept - flipped) / (1.0 - 2.0 * flip_rate)


def check_hinge() -> None:
    """The hinge loss has no settings."""


def hinge(margins: jax.Array) -> jax.Array:
    """Hinge loss of a margin: `max(0, 1 - margin)`.

    SLiC's threshold `d` scales the margin: `max(0, d - m)` is `d * hinge(m / d)`.

    Args:
        margins: float `[B]`, or any shape.

    Returns:
        Values, float32 or wider, same shape. The slope is -1 below margin 1 and 0 from
        there on. NaN stays NaN.

    Source: Zhao et al. (2023), SLiC-HF, arXiv 2305.10425.
    """
    (margins,) = ops.at_least_float32(margins)
    return jax.nn.relu(1.0 - margins)


def check_ipo(*, tau: float = 1.0) -> None:
    """ValueError for settings that `ipo` refuses."""
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"tau must be positive and finite, got {tau}.")


def ipo(margins: jax.Array, *, tau: float = 1.0) -> jax.Array:
    """Squared distance of the margin from a target: `(margin - 1 / (2 tau))**2`.

    The published loss takes the difference of log-ratios itself: margins of `beta = 1`,
    and its regularisation in `tau`. Margins scaled by `beta`, with `tau = 1`, give that
    loss at `tau = beta`, times `beta**2`: the same minimiser.

    Args:
        margins: float `[B]`, or any shape. With length-normalised ones this is what the
            authors report having used, and what TRL computes.
        tau: regularisation, positive.

    Returns:
        Values, float32 or wider, same shape. Infinite at infinite margins, and so is
        the slope. NaN stays NaN.

    Raises:
        ValueError: `tau` is not positive and finite.

    Source: Azar et al. (2023), arXiv 2310.12036, eq. 17.
    """
    check_ipo(tau=tau)
    (margins,) = ops.at_least_float32(margins)
    return jnp.square(margins - 0.5 / tau)


def reward_centering(
    chosen_rewards: jax.Array, rejected_rewards: jax.Array
) -> jax.Array:
    """Penalty that keeps rewards near zero: `(chosen + rejected)**2`.

    A pairwise loss fixes differences of rewards only; added with a small coefficient,
    this fixes their level.

    Args:
        chosen_rewards: float `[B]`, or any shape.
        rejected_rewards: float, same shape.

    Returns:
        Values, float32 or wider, same shape.

    Raises:
        ValueError: shapes differ.

    Source: Eisenstein et al. (2023), "Helping or Herding?", arXiv 2312.09244.
    """
    _check_one_shape(
        {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    )
    chosen, rejected = ops.at_least_float32(chosen_rewards, rejected_rewards)
    return jnp.square(chosen + rejected)
