"""The step of one outer iteration: solve the Newton system as exactly as needed.

Solve to the accuracy at hand and try the descent test; if it fails raise the penalties,
ask for more accuracy and go on from the same `z`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import lu_factor, lu_solve

from jaxpost.solvers._kkt import NewtonSystem
from jaxpost.solvers._merit import MeritGradient, is_descent
from jaxpost.solvers._minres import run_minres
from jaxpost.solvers._options import SolveOptions
from jaxpost.solvers._sketch import (
    Inner,
    gaussian_sketches,
    kaczmarz_sketches,
    run_blocks,
    run_vectors,
)


class Adaptive(NamedTuple):
    """What persists from one outer iteration to the next, float64 each."""

    eta1: jax.Array
    eta2: jax.Array
    delta: jax.Array

    @property
    def penalties(self) -> tuple[jax.Array, jax.Array]:
        return self.eta1, self.eta2


class Step(NamedTuple):
    """An accepted step, or the reason why there is none.

    Fields:
        z: `(dx, dy)`, `[n + m]`.
        residual_norm: of `A z - b`.
        inner_steps: that it took, int32.
        adaptive: penalties and accuracy as they now are.
        descends: the descent test holds.
        escaped: accepted because a penalty passed its bound.
        capped: `max_inner` was reached short of the accuracy, and the test fails.
    """

    z: jax.Array
    residual_norm: jax.Array
    inner_steps: jax.Array
    adaptive: Adaptive
    descends: jax.Array
    escaped: jax.Array
    capped: jax.Array


class _Trial(NamedTuple):
    """The loop's memory: a step that may not be good enough yet."""

    inner: Inner
    adaptive: Adaptive
    descends: jax.Array
    escaped: jax.Array
    capped: jax.Array


def newton_step(
    system: NewtonSystem,
    merit: MeritGradient,
    adaptive: Adaptive,
    theta: jax.Array,
    key: jax.Array,
    options: SolveOptions,
    preconditioner: Callable[[jax.Array], jax.Array] | None,
) -> Step:
    """The direction `z = (dx, dy)` at this iterate."""
    right_norm = jnp.linalg.norm(system.right)
    solve = _inner_solver(system, options, preconditioner)

    def accuracy_of(eta1, eta2, delta):
        bound = system.delta_bound(eta1, eta2)
        return jnp.maximum(jnp.minimum(delta, bound), options.delta_min)

    def advance(trial):
        eta1, eta2, delta = trial.adaptive
        asked = theta * delta * right_norm / system.scale

        def tolerance(z):
            # `asked` may lie below what rounding lets a residual reach.
            floor = system.rounding * jnp.linalg.norm(z)
            return jnp.maximum(asked, floor)

        inner = solve(trial.inner, tolerance)
        descends = is_descent(merit, inner.z, (eta1, eta2))
        beyond = (eta1 > options.penalty_constraint_max) | (
            eta2 < options.penalty_gradient_min
        )
        capped = (inner.steps >= options.max_inner) & ~descends
        again = ~descends & ~beyond & ~capped
        nu = options.penalty_factor
        tighter = accuracy_of(eta1 * nu**2, eta2 / nu, delta / nu**4)
        return _Trial(
            inner,
            Adaptive(
                jnp.where(again, eta1 * nu**2, eta1),
                jnp.where(again, eta2 / nu, eta2),
                jnp.where(again, tighter, delta),
            ),
            descends,
            beyond & ~descends,
            capped & ~beyond,
        )

    def unfinished(trial):
        return ~(trial.descends | trial.escaped | trial.capped)

    eta1, eta2, delta = adaptive
    no = jnp.asarray(False)
    inner = Inner(
        jnp.zeros_like(system.right), -system.right, jnp.zeros((), jnp.int32), key
    )
    start = _Trial(
        inner, Adaptive(eta1, eta2, accuracy_of(eta1, eta2, delta)), no, no, no
    )
    end = jax.lax.while_loop(unfinished, advance, start)
    norm = jnp.linalg.norm(end.inner.residual)
    return Step(end.inner.z, norm, end.inner.steps, *end[1:])


def _inner_solver(system, options, preconditioner):
    """`(inner, tolerance) -> inner` of the chosen method; what it prepares is kept."""
    method = options.method
    if method == "exact":
        exact = _factorised(system)
        return lambda inner, tolerance: exact(inner)
    if method == "hybrid":
        return _hybrid(system, options, preconditioner)
    if method == "minres":
        return lambda inner, tolerance: run_minres(
            system, inner, tolerance, options, preconditioner
        )
    if method in ("block_gaussian", "block_kaczmarz"):
        total = system.right.shape[0]
        size = min(options.block_size or -(-total // 2), total)
        return lambda inner, tolerance: run_blocks(
            system, inner, tolerance, options, size
        )
    if method == "gaussian":
        draw = gaussian_sketches(system, options.chunk)
    else:
        draw = kaczmarz_sketches(system, options.chunk, method == "kaczmarz_norm")
    return lambda inner, tolerance: run_vectors(system, draw, inner, tolerance, options)


def _factorised(system):
    """LU, and one step of refinement; done once, before penalties adapt."""
    inverse = system.inverse
    if inverse is None:
        factors = lu_factor(system.matrix)
        inverse = lambda v: lu_solve(factors, v)  # noqa: E731
    z = inverse(system.right)
    z = z + inverse(system.right - system.products(z))
    residual = system.products(z) - system.right
    return lambda inner: inner._replace(z=z, residual=residual)


def _hybrid(system, options, preconditioner):
    """MINRES while it is cheap: a step is `2 N^2` operations, LU `2 N^3 / 3`."""
    cheap = dataclasses.replace(options, max_inner=max(1, system.right.shape[0] // 12))

    def solve(inner, tolerance):
        tried = run_minres(system, inner, tolerance, cheap, preconditioner)
        short = jnp.linalg.norm(tried.residual) > tolerance(tried.z)
        return jax.lax.cond(short, lambda: _factorised(system)(tried), lambda: tried)

    return solve
