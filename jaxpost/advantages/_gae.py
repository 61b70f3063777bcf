"""Generalised advantage estimation over the trained steps of a sequence."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    terminals: jax.Array | None = None,
    bootstrap: jax.Array | None = None,
    gamma: float,
    gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Exponentially weighted sums of temporal-difference errors, and their returns.

    `delta[t] = rewards[t] + gamma * values[t'] - values[t]` and
    `advantages[t] = delta[t] + gamma * gae_lambda * advantages[t']`, where `t'` is the
    *next position inside the mask*: what a prompt, a tool's answer or padding holds is
    skipped over, not taken as steps without reward. (As steps they would discount what
    comes after them, and mix in values that were never trained.)

    Args:
        rewards: of the step taken at each position, float `[B, T]`; put the reward of a
            whole answer on its last position *inside* the mask.
        values: expected return before each step, float `[B, T]`.
        mask: True where a step was taken, bool `[B, T]`; elsewhere anything, even NaN,
            in any argument.
        terminals: True where the step ended its episode, bool `[B, T]`: nothing after
            it counts. None: no step did.
        bootstrap: value of what follows the last step inside the mask, float `[B]`, for
            sequences that were cut off rather than finished. It is not read where that
            step is terminal. None: zero, as for finished answers.
        gamma: discount, in [0, 1].
        gae_lambda: 1 gives Monte-Carlo returns minus values, 0 the one-step error; in
            [0, 1].

    Returns:
        Advantages and returns (`advantages + values`, the target of a value loss), each
        float32 or wider, `[B, T]`, zero where masked, without gradient.

    Raises:
        ValueError: `gamma` or `gae_lambda` is outside [0, 1].
        AssertionError: shapes differ, or `mask` or `terminals` is not boolean.

    Source: Schulman et al. (2016), "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", arXiv 1506.02438, eqs. 11-16. Skipping the masked
    positions is ours.
    """
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}.")
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type(mask, bool)
    if terminals is None:
        terminals = jnp.zeros(mask.shape, bool)
    chex.assert_shape(terminals, mask.shape)
    chex.assert_type(terminals, bool)
    if bootstrap is None:
        bootstrap = jnp.zeros(mask.shape[:1], ops.compute_dtype(values))
    chex.assert_shape(bootstrap, mask.shape[:1])

    arrays = ops.at_least_float32(rewards, values, bootstrap)
    rewards, values, bootstrap = map(jax.lax.stop_gradient, arrays)
    zero = jnp.zeros((), values.dtype)
    rewards, values = (jnp.where(mask, x, zero) for x in (rewards, values))

    def step_back(following, now):
        next_value, next_advantage = following
        reward, value, taken, terminal = now
        # Selected, not multiplied: a bootstrap that is never read may be NaN.
        next_value = jnp.where(terminal, zero, next_value)
        next_advantage = jnp.where(terminal, zero, next_advantage)
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        carried = (
            jnp.where(taken, value, following[0]),
            jnp.where(taken, advantage, following[1]),
        )
        return carried, jnp.where(taken, advantage, zero)

    steps = tuple(jnp.swapaxes(x, 0, 1) for x in (rewards, values, mask, terminals))
    end = (bootstrap, jnp.zeros_like(bootstrap))
    _, advantages = jax.lax.scan(step_back, end, steps, reverse=True)
    advantages = jnp.swapaxes(advantages, 0, 1)
    return advantages, advantages + values
