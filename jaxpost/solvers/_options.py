"""Settings of the solver, checked when they are made."""

import dataclasses
import math
from typing import Literal, get_args

Method = Literal[
    "exact",
    "hybrid",
    "minres",
    "gaussian",
    "kaczmarz",
    "kaczmarz_norm",
    "block_gaussian",
    "block_kaczmarz",
]
Accuracy = Literal["theory", "relative"]
HessianCheck = Literal["reduced_eig", "descent", "none"]
HessianShift = Literal["frobenius", "smallest"]
Guard = Literal["scaled", "published", "none"]


@dataclasses.dataclass(frozen=True)
class SolveOptions:
    """How `solve` works; the defaults are the fast ones, `published()` the paper's.

    Fields (symbol of the paper in brackets):
        method: what solves the Newton system. `exact` factorises it (only the Jacobian,
            and no Hessian is formed, with as many constraints as variables and a
            relative accuracy); `minres` iterates; `hybrid` iterates for a quarter of a
            factorisation's arithmetic, and then factorises if that was not enough; the
            others sketch and project: `gaussian` vectors, single rows drawn evenly
            (`kaczmarz`) or by their squared norm (`kaczmarz_norm`), and blocks of
            either (`block_gaussian`, `block_kaczmarz`).
        matrix_free: no matrix is formed; products with it only. Needs a method that
            iterates (`minres`, `gaussian`, `kaczmarz`), `accuracy="relative"`,
            `guard="none"` and a `hessian_check` of `descent` or `none`.
        tolerance: the solve ends when the norm of (gradient of the Lagrangian,
            constraint) is at most this.
        max_iterations: outer iterations; also the length of the history.
        accuracy: how exact a step must be before it is tried. `theory` is the paper's
            `norm(A) Psi norm(r) <= theta delta norm(b)`, worst-case constants and all;
            `relative` is `norm(r) <= theta delta norm(b)`.
        delta, delta_min: first value and floor of the accuracy that adapts [delta].
        theta: factor on that accuracy [theta].
        theta_power: `theta` is multiplied by `min(1, kkt_k / kkt_0) ** theta_power`; 0
            keeps it, a positive power lets it go to zero: superlinear convergence.
        penalty_constraint, penalty_gradient: first weights of the squared constraint
            and of the squared gradient of the Lagrangian in the merit [eta1, eta2].
        penalty_factor: on failure of the descent test the former is multiplied by its
            square, the latter divided by it [nu].
        penalty_constraint_max, penalty_gradient_min: beyond these a step is accepted
            without the test.
        hessian_check: `reduced_eig` looks at the smallest eigenvalue of the Hessian of
            the Lagrangian on the null space of the Jacobian and shifts the Hessian when
            it is below `curvature_min`; `descent` shifts, tenfold more each time, when
            no penalties let the step pass the descent test; `none` never shifts.
        hessian_shift: `frobenius` adds the Hessian's Frobenius norm plus `shift_margin`
            [xi_B], as published; `smallest` adds just enough.
        guard: ends the solve when the Jacobian loses rank. `published`: smallest
            eigenvalue of `G G^T` [xi_G] below 1e-2, whatever the scale; `scaled`: that
            of the Jacobian with rows of norm one below `guard_min`.
        armijo, step_min: share of the foreseen decrease that a step must bring [beta],
            and the shortest step tried.
        max_inner: sketch or MINRES steps per outer iteration.
        block_size: rows of a block sketch; None takes half of the system.
        chunk: vector sketches whose steps are computed together. The iterates are those
            of one sketch after another; the residual is computed anew after each chunk.
    """

    method: Method = "exact"
    matrix_free: bool = False
    tolerance: float = 1e-4
    max_iterations: int = 200
    accuracy: Accuracy = "relative"
    delta: float = 0.1
    delta_min: float = 1e-6
    theta: float = 1.0
    theta_power: float = 0.0
    penalty_constraint: float = 1.0
    penalty_gradient: float = 0.1
    penalty_factor: float = 1.5
    penalty_constraint_max: float = 1e8
    penalty_gradient_min: float = 1e-8
    hessian_check: HessianCheck = "reduced_eig"
    hessian_shift: HessianShift = "smallest"
    curvature_min: float = 1e-6
    shift_margin: float = 0.1
    guard: Guard = "scaled"
    guard_min: float = 1e-14
    armijo: float = 0.1
    step_min: float = 2.0**-40
    max_inner: int = 100_000
    block_size: int | None = None
    chunk: int = 64

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        if self.matrix_free:
            _check_matrix_free(self)

    @classmethod
    def published(cls, method: Method = "gaussian", **changes) -> "SolveOptions":
        """The rule and constants of the paper's code (with its mistakes mended)."""
        settings = {
            "method": method,
            "accuracy": "theory",
            "hessian_shift": "frobenius",
            "guard": "published",
            **changes,
        }
        return cls(**settings)


def _check_choices(options: SolveOptions) -> None:
    for name, allowed in (
        ("method", Method),
        ("accuracy", Accuracy),
        ("hessian_check", HessianCheck),
        ("hessian_shift", HessianShift),
        ("guard", Guard),
    ):
        value = getattr(options, name)
        if value not in get_args(allowed):
            names = ", ".join(get_args(allowed))
            raise ValueError(f"{name} must be one of {names}; got {value!r}.")


def _check_numbers(options: SolveOptions) -> None:
    for name in (
        "tolerance",
        "delta",
        "delta_min",
        "theta",
        "penalty_constraint",
        "penalty_gradient",
        "penalty_constraint_max",
        "penalty_gradient_min",
        "shift_margin",
        "step_min",
    ):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"{name} must be positive and finite, got {value}.")
    for name in ("theta_power", "curvature_min", "guard_min"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
    if not options.penalty_factor > 1.0:
        raise ValueError(
            f"penalty_factor must be above 1, got {options.penalty_factor}: penalties "
            "would never change."
        )
    if not 0.0 < options.armijo < 0.5:
        raise ValueError(f"armijo must lie in (0, 1/2), got {options.armijo}.")
    for name in ("max_iterations", "max_inner", "chunk"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"{name} must be at least 1, got {getattr(options, name)}."
            )
    if options.block_size is not None and options.block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {options.block_size}.")


def _check_matrix_free(options: SolveOptions) -> None:
    needed = {
        "method": ("minres", "gaussian", "kaczmarz"),
        "accuracy": ("relative",),
        "hessian_check": ("descent", "none"),
        "guard": ("none",),
    }
    for name, allowed in needed.items():
        value = getattr(options, name)
        if value not in allowed:
            raise ValueError(
                f"matrix_free needs {name} in {allowed}, got {value!r}: it would take "
                "the matrix itself."
            )
