"""Pendulum as pure functions of arrays: ours, or `gymnax`'s behind the same two calls.

Knows nothing of policies, preferences or training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EPISODE_STEPS = 200
MAX_TORQUE = 2.0
OBSERVATIONS = 3


class Environment(NamedTuple):
    """One environment; `vmap` for several.

    Fields:
        reset: key -> state.
        step: (state, torque, N m) -> (state, reward), scalars. The reward is that of
            the state *before* the step.
        observe: state -> `[cos theta, sin theta, speed / 8]`, each in [-1, 1].
    """

    reset: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    observe: Callable[[Any], jax.Array]


class PendulumState(NamedTuple):
    """Angle from upright, rad, and angular speed, rad/s; scalars."""

    theta: jax.Array
    speed: jax.Array


_MAX_SPEED = 8.0
_DT_S = 0.05
_GRAVITY = 10.0  # with mass and length 1


def pendulum() -> Environment:
    """Swing a pendulum up and hold it: Gymnasium's `Pendulum-v1` from its equations.

    Reward `-(theta² + 0.1 speed² + 0.001 torque²)` with the angle in [-pi, pi); an
    episode has 200 steps and no terminal state.
    """
    return Environment(_reset, _step, _observe)


def _reset(key: jax.Array) -> PendulumState:
    high = jnp.array([jnp.pi, 1.0])
    theta, speed = jax.random.uniform(key, (2,), minval=-high, maxval=high)
    return PendulumState(theta, speed)


def _step(state: PendulumState, torque: jax.Array) -> tuple[PendulumState, jax.Array]:
    torque = jnp.clip(torque, -MAX_TORQUE, MAX_TORQUE)
    angle = (state.theta + jnp.pi) % (2.0 * jnp.pi) - jnp.pi
    cost = angle**2 + 0.1 * state.speed**2 + 0.001 * torque**2
    speed = state.speed + _DT_S * (1.5 * _GRAVITY * jnp.sin(state.theta) + 3.0 * torque)
    speed = jnp.clip(speed, -_MAX_SPEED, _MAX_SPEED)
    return PendulumState(state.theta + _DT_S * speed, speed), -cost


def _observe(state: PendulumState) -> jax.Array:
    return jnp.stack(
        [jnp.cos(state.theta), jnp.sin(state.theta), state.speed / _MAX_SPEED]
    )


def gymnax_pendulum() -> Environment:
    """The same from the `gymnax` library (extra `control`).

    Raises:
        ImportError: gymnax is not installed.
    """
    try:
        import gymnax  # pyright: ignore[reportMissingImports] (extra `control`)
    except ImportError as error:
        raise ImportError(
            "environment: gymnax needs the library gymnax: pip install "
            "'jaxpost[control]', or set environment: builtin (the same equations)."
        ) from error
    environment, params = gymnax.make("Pendulum-v1")

    def reset(key: jax.Array) -> Any:
        return environment.reset_env(key, params)[1]

    def step(state: Any, torque: jax.Array) -> tuple[Any, jax.Array]:
        # The environment draws nothing in a step; the key is part of its interface.
        _, state, reward, *_ = environment.step_env(
            jax.random.key(0), state, torque, params
        )
        return state, reward

    def observe(state: Any) -> jax.Array:
        return environment.get_obs(state) / jnp.array([1.0, 1.0, _MAX_SPEED])

    return Environment(reset, step, observe)


ENVIRONMENTS = {"builtin": pendulum, "gymnax": gymnax_pendulum}
