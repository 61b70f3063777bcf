"""Ten problems of Hock & Schittkowski (1981) as plain functions, and what is known.

`KNOWN` holds the value at the start, the first KKT residual (zero multipliers), the
optimum, its multipliers (of `f + y . c`), and the outer iterations of the authors'
saved Gaussian-sketch runs, which are those of exact solves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def hs6(x):
    return (1.0 - x[0]) ** 2


def hs6_constraint(x):
    return 10.0 * (x[1] - x[0] ** 2)


def hs7(x):
    return jnp.log(1.0 + x[0] ** 2) - x[1]


def hs7_constraint(x):
    return (1.0 + x[0] ** 2) ** 2 + x[1] ** 2 - 4.0


def hs28(x):
    return (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2


def hs28_constraint(x):
    return x[0] + 2.0 * x[1] + 3.0 * x[2] - 1.0


def hs40(x):
    return -jnp.prod(x)


def hs40_constraint(x):
    return jnp.stack(
        [x[0] ** 3 + x[1] ** 2 - 1.0, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]]
    )


def hs42(x):
    return jnp.sum((x - jnp.arange(1.0, 5.0, dtype=x.dtype)) ** 2)


def hs42_constraint(x):
    return jnp.stack([x[0] - 2.0, x[2] ** 2 + x[3] ** 2 - 2.0])


def hs48(x):
    return (x[0] - 1.0) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2


def hs48_constraint(x):
    return jnp.stack([jnp.sum(x) - 5.0, x[2] - 2.0 * (x[3] + x[4]) + 3.0])


def hs51(x):
    return (
        (x[0] - x[1]) ** 2
        + (x[1] + x[2] - 2.0) ** 2
        + (x[3] - 1.0) ** 2
        + (x[4] - 1.0) ** 2
    )


def hs51_constraint(x):
    return jnp.stack([x[0] + 3.0 * x[1] - 4.0, x[2] + x[3] - 2.0 * x[4], x[1] - x[4]])


def hs52(x):
    return (
        (4.0 * x[0] - x[1]) ** 2
        + (x[1] + x[2] - 2.0) ** 2
        + (x[3] - 1.0) ** 2
        + (x[4] - 1.0) ** 2
    )


def hs52_constraint(x):
    return jnp.stack([x[0] + 3.0 * x[1], x[2] + x[3] - 2.0 * x[4], x[1] - x[4]])


def hs78(x):
    return jnp.prod(x)


def hs78_constraint(x):
    return jnp.stack(
        [
            jnp.sum(x**2) - 10.0,
            x[1] * x[2] - 5.0 * x[3] * x[4],
            x[0] ** 3 + x[1] ** 3 + 1.0,
        ]
    )


def hs79(x):
    return (
        (x[0] - 1.0) ** 2
        + (x[0] - x[1]) ** 2
        + (x[1] - x[2]) ** 2
        + (x[2] - x[3]) ** 4
        + (x[3] - x[4]) ** 4
    )


def hs79_constraint(x):
    root = np.sqrt(2.0)
    return jnp.stack(
        [
            x[0] + x[1] ** 2 + x[2] ** 3 - 2.0 - 3.0 * root,
            x[1] - x[2] ** 2 + x[3] + 2.0 - 2.0 * root,
            x[0] * x[4] - 2.0,
        ]
    )


class Known(NamedTuple):
    start: tuple[float, ...]
    value: float
    kkt: float
    optimum: float
    multipliers: Any
    iterations: int


KNOWN = {
    "hs6": Known((-1.2, 1.0), 4.84, 6.22254, 0.0, (0.0,), 9),
    "hs7": Known((2.0, 2.0), -0.390562, 25.0328, -1.7320508076, (0.288675135,), 10),
    "hs28": Known((-4.0, 1.0, 1.0), 13.0, 7.48331, 0.0, (0.0,), 1),
    "hs40": Known(
        (0.8,) * 4, -0.4096, 1.08638, -0.25, (0.5, 0.471937156, 0.353553391), 3
    ),
    "hs42": Known((1.0,) * 4, 14.0, 7.54983, 13.8578643763, (-2.0, 2.535533906), 4),
    "hs48": Known((3.0, 5.0, -3.0, 2.0, -2.0), 84.0, 25.6125, 0.0, (0.0, 0.0), 1),
    "hs51": Known((2.5, 0.5, 2.0, -1.0, 0.5), 8.5, 6.55744, 0.0, (0.0,) * 3, 1),
    "hs52": Known(
        (2.0,) * 5,
        42.0,
        49.558,
        1859 / 349,
        (3.277936963, 2.905444126, -7.747851003),
        2,
    ),
    "hs78": Known(
        (-2.0, 1.5, 2.0, -1.0, -1.0),
        -6.0,
        11.3227,
        -2.919700409,
        (0.744445931, -0.70357519, 0.096805525),
        4,
    ),
    "hs79": Known(
        (2.0,) * 5,
        1.0,
        8.29837,
        0.07877682087,
        (-0.038821049, -0.016726517, -0.000287328),
        4,
    ),
}


def problem(name: str):
    """`(objective, constraint, start, args)`, one pair of functions for each shape.

    `args` chooses among the problems of that shape: they share a compiled solve.
    """
    known = KNOWN[name]
    names, objective, constraint = _BY_SHAPE[_shape(name)]
    return objective, constraint, jnp.asarray(known.start), names.index(name)


def _shape(name):
    return len(KNOWN[name].start), len(KNOWN[name].multipliers)


def _chosen(functions):
    return lambda x, index: jax.lax.switch(index, functions, x)


def _grouped():
    groups: dict = {}
    for name in KNOWN:
        groups.setdefault(_shape(name), []).append(name)
    for shape, names in groups.items():
        objectives = [globals()[name] for name in names]
        constraints = [_as_vector(globals()[f"{name}_constraint"]) for name in names]
        groups[shape] = (names, _chosen(objectives), _chosen(constraints))
    return groups


def _as_vector(constraint):
    return lambda x: jnp.atleast_1d(constraint(x))


_BY_SHAPE = _grouped()
