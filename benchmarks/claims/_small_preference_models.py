"""Small models of preferences, many trained side by side in one compiled program.

A log-linear softmax policy (DPO) and a perceptron with one hidden layer (reward model).
Every run of a grid `[S settings, F scenarios, R seeds]` has parameters of its own and
never meets the others: the sum of their losses has their gradients side by side.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import losses

ModelKind = Literal["policy", "reward"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model and its training.

    Fields:
        kind: `policy` or `reward`.
        width: features per answer, `D`.
        hidden: hidden units of the reward model.
        answers: answers per prompt that the policy chooses from, `K`.
        beta: of the DPO margin. For a log-linear policy it only scales parameters.
        steps, learning_rate: of Adam on all pairs at once, cosine decay to zero.
    """

    kind: ModelKind
    width: int
    hidden: int
    answers: int
    beta: float
    steps: int
    learning_rate: float

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        if self.kind == "policy":
            return self.width
        return self.hidden * (self.width + 2)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A loss, and the common penalty `l2 / 2 * |params|^2`."""

    loss: losses.PairwiseConfig
    l2: float


def init_params(sizes: Sizes, key: jax.Array) -> Any:
    """Parameters of one model: the policy starts at its reference."""
    if sizes.kind == "policy":
        return {"theta": jnp.zeros(sizes.width)}
    inner, outer = jax.random.split(key)
    return {
        "in": jax.random.normal(inner, (sizes.width, sizes.hidden)) / sizes.width**0.5,
        "bias": jnp.zeros(sizes.hidden),
        "out": jax.random.normal(outer, (sizes.hidden,)) / sizes.hidden**0.5,
    }


def scores(sizes: Sizes, params: Any, phi: jax.Array) -> jax.Array:
    """Implicit or plain rewards of answers, `[N, K, D] -> [N, K]`.

    The policy is `softmax over the K answers of phi . (theta_ref + theta)`, its reward
    `beta log(policy / reference)`. `theta_ref` is one on every feature: some policy
    that is not uniform.
    """
    if sizes.kind == "reward":
        return (
            jax.nn.relu(phi @ params["in"] + params["bias"][None, None]) @ params["out"]
        )
    reference = jnp.sum(phi, axis=-1)
    policy = reference + phi @ params["theta"]
    ratio = jax.nn.log_softmax(policy, axis=-1) - jax.nn.log_softmax(reference, axis=-1)
    return sizes.beta * ratio


def margins(sizes: Sizes, params: Any, phi: jax.Array) -> jax.Array:
    """Margin of the first answer over the second, `[N, K, D] -> [N]`."""
    if sizes.kind == "reward":
        both = scores(sizes, params, phi[:, :2])
        return both[:, 0] - both[:, 1]
    reference = jnp.sum(phi, axis=-1)
    policy = jax.nn.log_softmax(reference + phi @ params["theta"], axis=-1)
    reference = jax.nn.log_softmax(reference, axis=-1)
    return losses.dpo_margins(
        policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1], beta=sizes.beta
    )


def over_grid(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, phi)` for params `[S, F, R, ...]` and phi `[R, ...]`."""
    by_seed = jax.vmap(function)
    return jax.vmap(jax.vmap(by_seed, in_axes=(0, None)), in_axes=(0, None))


def train(
    sizes: Sizes,
    grid: Sequence[Sequence[Setting]],
    phi: np.ndarray,
    signs: np.ndarray,
    counts: Sequence[int],
    *,
    seed: int,
) -> Any:
    """Trains every model of a grid.

    Args:
        sizes: the model.
        grid: settings `[S][F]`.
        phi: features of training answers, `[R, N, K, D]`.
        signs: labels, +1 or -1, `[F, R, N]`.
        counts: how many of the `N` pairs each scenario uses, `[F]`.
        seed: of the starting points, which depend on nothing but the seed's number.

    Returns:
        Parameters, leaves `[S, F, R, ...]`.
    """
    frozen = tuple(tuple(row) for row in grid)
    return _train(sizes, frozen, tuple(counts), phi, signs, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(sizes, grid, counts, phi, signs, key):
    shape = (len(grid), len(counts))
    keys = jax.random.split(key, phi.shape[0])
    params = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape)),
        jax.vmap(functools.partial(init_params, sizes))(keys),
    )
    l2 = jnp.asarray([[setting.l2 for setting in row] for row in grid])
    find_margins = over_grid(functools.partial(margins, sizes))

    def total(params):
        found = find_margins(params, phi) * signs[None]  # [S, F, R, N]
        loss = jnp.zeros(())
        for s, row in enumerate(grid):
            for f, setting in _runs(row):
                pairwise = losses.pairwise_loss(setting.loss)
                values = pairwise(found[s, f]).values
                for j, count in enumerate(counts[f]):
                    loss += jnp.sum(values[j, :, :count]) / count
        squares = sum(
            jnp.sum(leaf**2, axis=tuple(range(2, leaf.ndim)))
            for leaf in jax.tree.leaves(params)
        )
        return loss + 0.5 * jnp.sum(l2 * squares)

    tx = optax.adam(optax.cosine_decay_schedule(sizes.learning_rate, sizes.steps))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(total)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=sizes.steps)
    return params


def _runs(row: Sequence[Setting]) -> list[tuple[slice, Setting]]:
    """Neighbouring scenarios with one loss, together: fewer operations to compile."""
    found: list[tuple[slice, Setting]] = []
    for f, setting in enumerate(row):
        if found and found[-1][1].loss == setting.loss:
            found[-1] = (slice(found[-1][0].start, f + 1), setting)
        else:
            found.append((slice(f, f + 1), setting))
    return found


@functools.partial(jax.jit, static_argnums=0)
def grid_margins(sizes: Sizes, params: Any, phi: jax.Array) -> jax.Array:
    """Margins of every model of a grid, `[S, F, R, N]`, for phi `[R, N, K, D]`."""
    return over_grid(functools.partial(margins, sizes))(params, phi)


@functools.partial(jax.jit, static_argnums=0)
def grid_scores(sizes: Sizes, params: Any, phi: jax.Array) -> jax.Array:
    """Rewards of every answer, `[S, F, R, N, K]`."""
    return over_grid(functools.partial(scores, sizes))(params, phi)
