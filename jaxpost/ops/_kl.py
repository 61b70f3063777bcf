"""Per-token estimators of the KL divergence between two policies."""

import jax
import jax.numpy as jnp

from jaxpost.ops._dtypes import at_least_float32

KINDS = ("k1", "k2", "k3")


def kl_estimate(logps: jax.Array, ref_logps: jax.Array, *, kind: str) -> jax.Array:
    """Estimate `KL(policy || ref)` from tokens that the policy sampled.

    With `d = logps - ref_logps`, one value per token:

    - `k1 = d`: unbiased, can be negative. As a loss, its expected gradient on the
      policy's own samples is zero; put it into a reward instead.
    - `k2 = d**2 / 2`: biased, never negative. Its expected gradient on the policy's own
      samples is exactly that of `KL(policy || ref)`.
    - `k3 = exp(-d) - 1 + d`: unbiased, never negative. Its expected gradient on the
      policy's own samples is that of `KL(ref || policy)`, the other divergence.

    Gradients flow to both arguments; pass a constant reference.

    Args:
        logps: log-probabilities under the policy, float `[...]`, nats.
        ref_logps: the same tokens' under the reference, same shape.
        kind: `"k1"`, `"k2"` or `"k3"`.

    Returns:
        Estimates, float32 or wider, same shape, nats.

    Raises:
        ValueError: unknown `kind`, or shapes differ.

    Source: J. Schulman (2020), "Approximating KL Divergence",
    http://joschu.net/blog/kl-approx.html, with `r = p_ref / p_policy`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if logps.shape != ref_logps.shape:
        raise ValueError(
            "logps and ref_logps must have one shape, got "
            f"{logps.shape} and {ref_logps.shape}."
        )
    policy, reference = at_least_float32(logps, ref_logps)
    log_ratio = policy - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio
