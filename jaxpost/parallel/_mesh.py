"""The one place where device meshes are made."""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")

THREADS_PER_DEVICE = 4
"""Of a virtual CPU device: it waits for collectives, and computes, in a shared pool."""


def give_virtual_devices_threads() -> None:
    """Lets XLA have threads for all virtual CPU devices; call before JAX finds devices.

    All CPU devices of a process compute in one pool of as many threads as there are
    cores. A device that waits for the others in a collective keeps its thread, so on a
    machine with few cores `XLA_FLAGS=--xla_force_host_platform_device_count=8` can
    leave none for those that are waited for, and XLA ends the process after a minute.
    XLA reads the size of the pool from `NPROC`, which this sets unless it is set.
    """
    count = re.search(
        r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    needed = THREADS_PER_DEVICE * int(count[1]) if count else 0
    if needed > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(needed))


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

    Warns:
        RuntimeWarning: virtual CPU devices with too few threads, see
            `give_virtual_devices_threads`.
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
    _check_threads(devices)
    grid = np.asarray(devices, dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _check_threads(devices: Sequence[Any]):
    count = sum(device.process_index == jax.process_index() for device in devices)
    if devices[0].platform != "cpu" or count == 1:
        return
    threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
    if threads < 2 * count:
        warnings.warn(
            f"make_mesh: {count} virtual CPU devices share {threads} threads, so their "
            f"collectives may wait for each other for ever. Set the environment "
            f"variable NPROC={THREADS_PER_DEVICE * count} before JAX finds devices, or "
            "call jaxpost.parallel.give_virtual_devices_threads().",
            RuntimeWarning,
            stacklevel=3,
        )


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
