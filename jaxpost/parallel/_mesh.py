"""The one place where device meshes are made."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    shape: Mapping[str, int] | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arrange devices into named axes.

    Args:
        shape: size of each mesh axis in order, e.g. `{"data": -1, "fsdp": 4}`; -1, at
            most once, takes all that is left. Axes of `AXES` that are not named get
            size 1, so every rule applies to every mesh. None is `{"data": -1}`.
        devices: which devices, in order; None takes all of them.

    Returns:
        A mesh whose axes are `Auto`: sharding is propagated by the compiler.

    Raises:
        ValueError: a size is not positive, -1 is given twice, or the product is not the
            number of devices (the message has both and the nearest shape that works).
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1} if shape is None else dict(shape)
    for axis in AXES:
        sizes.setdefault(axis, 1)
    _check_sizes(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    count = len(devices)
    if count % fixed or (not free and fixed != count):
        raise ValueError(
            f"make_mesh: the shape {_write(sizes)} needs "
            f"{'a multiple of ' if free else ''}{fixed} devices, but there are "
            f"{count}; the nearest shape that works is "
            f"{_write(_nearest(sizes, count))}."
        )
    if free:
        sizes[free[0]] = count // fixed
    grid = np.asarray(devices, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_sizes(sizes: dict[str, int]):
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"make_mesh: axis {axis!r} must have a positive size or -1, got {size}."
            )
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ValueError(f"make_mesh: only one axis may be -1, got {_write(sizes)}.")


def _nearest(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Fixed axes shrunk to divisors; what is left goes to -1 or the first axis."""
    left, result = count, {}
    for axis, size in reversed(sizes.items()):
        if size == -1:
            continue
        result[axis] = max(d for d in range(1, size + 1) if left % d == 0)
        left //= result[axis]
    free = next((axis for axis, size in sizes.items() if size == -1), next(iter(sizes)))
    result[free] = result.get(free, 1) * left
    return {axis: result[axis] for axis in sizes}


def _write(sizes: Mapping[str, int]) -> str:
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items()) + "}"
