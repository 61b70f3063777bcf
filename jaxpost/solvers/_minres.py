"""Preconditioned MINRES on `A z = b`, `A` symmetric, indefinite, by products alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.solvers._kkt import NewtonSystem
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._sketch import Inner

Products = Callable[[jax.Array], jax.Array]


class _Krylov(NamedTuple):
    """One Lanczos step's memory: seven vectors, whatever the number of steps.

    `lanczos*` are the unnormalised Lanczos vectors, `solved` the newest after the
    preconditioner, `direction*` and `image*` the last directions and `A` times them.
    """

    z: jax.Array
    residual: jax.Array
    lanczos_old: jax.Array
    lanczos: jax.Array
    solved: jax.Array
    direction_old: jax.Array
    direction: jax.Array
    image_old: jax.Array
    image: jax.Array
    gamma_old: jax.Array
    gamma: jax.Array
    cosines: tuple[jax.Array, jax.Array]
    sines: tuple[jax.Array, jax.Array]
    left: jax.Array  # signed residual in the preconditioner's norm
    steps: jax.Array


def run_minres(
    system: NewtonSystem,
    inner: Inner,
    tolerance: Callable[[jax.Array], jax.Array],
    options: SolveOptions,
    preconditioner: Products | None = None,
) -> Inner:
    """Steps until the residual's 2-norm is `tolerance(z)`, or the cap.

    The residual follows the steps and is computed anew at the end of a run; a run that
    drifted is followed by another one from there.

    Source: Paige & Saunders (1975), "Solution of Sparse Indefinite Systems of Linear
    Equations"; preconditioned as in Elman, Silvester & Wathen (2014), "Finite Elements
    and Fast Iterative Solvers", Algorithm 4.1.
    """
    precondition = preconditioner or (lambda v: v)

    def one_run(state):
        inner, before, _ = state
        krylov = _krylov_run(system, precondition, inner, tolerance, options)
        residual = system.products(krylov.z) - system.right
        after = jnp.linalg.norm(residual)
        better = after < before
        z = jnp.where(better, krylov.z, inner.z)
        residual = jnp.where(better, residual, inner.residual)
        inner = Inner(z, residual, krylov.steps, inner.key)
        return inner, jnp.minimum(after, before), after <= 0.5 * before

    def unfinished(state):
        inner, norm, progress = state
        return (
            (norm > tolerance(inner.z)) & progress & (inner.steps < options.max_inner)
        )

    start = (inner, jnp.linalg.norm(inner.residual), jnp.asarray(True))
    return jax.lax.while_loop(unfinished, one_run, start)[0]


def _krylov_run(system, precondition, inner, tolerance, options) -> _Krylov:
    zero = jnp.zeros_like(inner.z)
    lanczos = -inner.residual
    solved = precondition(lanczos)
    gamma = jnp.sqrt(jnp.maximum(solved @ lanczos, 0.0))
    none, full = jnp.zeros_like(gamma), jnp.ones_like(gamma)
    start = _Krylov(
        z=inner.z,
        residual=inner.residual,
        lanczos_old=zero,
        lanczos=lanczos,
        solved=solved,
        direction_old=zero,
        direction=zero,
        image_old=zero,
        image=zero,
        gamma_old=full,
        gamma=gamma,
        cosines=(full, full),
        sines=(none, none),
        left=gamma,
        steps=inner.steps,
    )
    breakdown = jnp.finfo(gamma.dtype).eps * gamma

    def unfinished(k):
        far = jnp.linalg.norm(k.residual) > tolerance(k.z)
        return far & (k.gamma > breakdown) & (k.steps < options.max_inner)

    def step(k):
        return _lanczos_step(system.products, precondition, k)

    return jax.lax.while_loop(unfinished, step, start)


def _lanczos_step(products: Products, precondition: Products, k: _Krylov) -> _Krylov:
    solved = k.solved / k.gamma
    product = products(solved)
    overlap = product @ solved
    lanczos = (
        product
        - (overlap / k.gamma) * k.lanczos
        - (k.gamma / k.gamma_old) * k.lanczos_old
    )
    next_solved = precondition(lanczos)
    gamma = jnp.sqrt(jnp.maximum(next_solved @ lanczos, 0.0))
    (cos_old, cos), (sin_old, sin) = k.cosines, k.sines
    top = cos * overlap - cos_old * sin * k.gamma
    length = jnp.hypot(top, gamma)
    length = jnp.where(length > 0.0, length, 1.0)
    above = sin * overlap + cos_old * cos * k.gamma
    far_above = sin_old * k.gamma
    next_cos, next_sin = top / length, gamma / length
    direction = (solved - far_above * k.direction_old - above * k.direction) / length
    image = (product - far_above * k.image_old - above * k.image) / length
    return _Krylov(
        z=k.z + next_cos * k.left * direction,
        residual=k.residual + next_cos * k.left * image,
        lanczos_old=k.lanczos,
        lanczos=lanczos,
        solved=next_solved,
        direction_old=k.direction,
        direction=direction,
        image_old=k.image,
        image=image,
        gamma_old=k.gamma,
        gamma=gamma,
        cosines=(cos, next_cos),
        sines=(sin, next_sin),
        left=-next_sin * k.left,
        steps=k.steps + 1,
    )
