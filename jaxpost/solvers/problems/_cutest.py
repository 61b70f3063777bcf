"""CUTEst problems with equality constraints, through `sif2jax` (extra `bench`).

Importing `sif2jax` takes about half a minute: it builds all its problems. It happens in
the functions that need it, once per process.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.solvers.problems._problem import Problem, need_float64

PUBLISHED_CUTEST = (
    *("HS6", "BT5", "BT9", "HS28", "BT10", "HIMMELBA", "BT12", "HS40", "BT3", "BT6"),
    *("BT11", "HS7", "GENHS28", "HS51", "SINVALNE", "BOOTH", "HS52", "HS47"),
    *("WAYSEA1NE", "HS48", "HS50", "RSNBRNE", "CUBENE", "HS77", "MWRIGHT", "ZANGWIL3"),
    *("TRIGON1NE", "BA-L1SP", "HS78", "HS56", "HELIXNE", "HS42", "HS79", "ORTHREGB"),
    *("HS100LNP", "GOTTFR", "HIMMELBE", "MOREBVNE", "WAYSEA2NE", "DENSCHNCNE"),
    *("DENSCHNFNE", "HIMMELBC", "PRICE4NE", "INTEQNE", "BA-L1", "MANCINONE", "BT2"),
)
"""The 47 problems of arXiv 2305.18379, in its order."""

# Where sif2jax has none, or a point off its own constraints (BT6, BT11, BT12), or fewer
# digits (HS77 to HS79). Those of BT3, BT5, BT6, BT11, BT12 agree with the paper's own
# runs; HS100LNP has that of HS100, whose active constraints it keeps.
_OPTIMA = {
    "BT2": 0.0325682002564,
    "BT3": 4.093023255814,
    "BT5": 961.7151721301,
    "BT6": 0.277044788784,
    "BT11": 0.824891778348,
    "BT12": 6.188118811881,
    "HS77": 0.241505128786,
    "HS78": -2.919700409115,
    "HS79": 0.078776820871,
    "HS100LNP": 680.6300573744,
}


def cutest_names() -> tuple[str, ...]:
    """Those of `PUBLISHED_CUTEST` that the installed `sif2jax` has, in that order.

    Takes half a minute where `sif2jax` is not imported yet.

    Raises:
        ImportError: `sif2jax` is not installed.
    """
    known = _known_problems()
    return tuple(name for name in PUBLISHED_CUTEST if name in known)


def from_sif2jax(name: str) -> Problem:
    """A problem of CUTEst by the name of its SIF file.

    Takes half a minute where `sif2jax` is not imported yet. The order of variables and
    constraints is that of `sif2jax`, which is not always CUTEst's; multipliers start at
    zero, as in the SIF files.

    Args:
        name: such as "HS6"; capitals do not matter.

    Raises:
        ImportError: `sif2jax` is not installed.
        UnknownProblemError: it has no such problem; the message lists close names.
        RuntimeError: JAX's 64-bit mode is off.
        ValueError: the problem has bounds, inequalities, no constraint, or fewer
            variables than constraints.

    Source: the suite of arXiv 2305.18379, Section 5.
    """
    need_float64("from_sif2jax")
    known = _known_problems()
    found = known.get(name.upper())
    if found is None:
        raise UnknownProblemError(_unknown(name, known))
    return _adapt(name.upper(), found)


class UnknownProblemError(KeyError, ValueError):
    """No problem has this name; the message lists those with close names."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it quoted


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    upper = name.upper()
    if upper in PUBLISHED_CUTEST:
        return (
            f"{upper} is one of the 47 published problems, but the installed sif2jax "
            "does not have it."
        )
    near = difflib.get_close_matches(upper, known, 5, 0.6)
    hint = f"close names: {', '.join(near)}" if near else "no name is close"
    return f"sif2jax has no problem {name!r}; {hint}."


def _known_problems() -> Mapping[str, Any]:
    try:
        import sif2jax
    except ImportError as error:
        raise ImportError(
            "CUTEst problems come from sif2jax, which is not installed: "
            "pip install 'jaxpost[bench]' (or pip install sif2jax)."
        ) from error
    return sif2jax.cutest.problems_dict


def _adapt(name: str, problem: Any) -> Problem:
    equalities, inequalities, bounds = _counts(problem)
    others = [
        text
        for count, text in ((inequalities, "inequalities"), (bounds, "bounds"))
        if count
    ]
    if others:
        raise ValueError(
            f"{name} has {' and '.join(others)}: only equality constraints."
        )
    x0 = jnp.asarray(problem.y0, jnp.float64)
    if not equalities:
        raise ValueError(
            f"{name} is unconstrained: use a solver for such problems, e.g. "
            "jax.scipy.optimize.minimize."
        )
    if equalities > x0.size:
        raise ValueError(
            f"{name} has {equalities} constraints on {x0.size} variables: at most as "
            "many constraints as variables."
        )

    def objective(x: jax.Array, args: Any) -> jax.Array:
        del args
        return jnp.asarray(problem.objective(x, problem.args), x.dtype)

    def constraint(x: jax.Array, args: Any) -> jax.Array:
        del args
        parts = jax.tree.leaves(problem.constraint(x)[0])
        return jnp.concatenate(
            [jnp.ravel(jnp.asarray(part, x.dtype)) for part in parts]
        )

    return Problem(
        name=name,
        objective=objective,
        constraint=constraint,
        x0=x0,
        multipliers=jnp.zeros(equalities, jnp.float64),
        optimum=_optimum(name, problem),
    )


def _counts(problem: Any) -> tuple[int, int, int]:
    """Numbers of equalities, inequalities and finite bounds."""
    equalities, inequalities, _ = (int(n) for n in problem.num_constraints())
    limits = getattr(problem, "bounds", None)
    finite = (jnp.sum(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(limits))
    return equalities, inequalities, int(sum(finite))


def _optimum(name: str, problem: Any) -> float | None:
    if name in _OPTIMA:
        return _OPTIMA[name]
    value = problem.expected_objective_value
    return None if value is None else float(value)
