"""What users can hold their own code to: a training step is the same on every mesh.

Needs as many devices as the largest mesh; on a CPU set
`XLA_FLAGS=--xla_force_host_platform_device_count=8` and `NPROC=32` (threads for them,
see `parallel.give_virtual_devices_threads`) before JAX is imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import parallel
from jaxpost.training import TrainState

MESHES: tuple[dict[str, int], ...] = (
    {"data": 1},
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
)
"""One device, then 8 x 1, 4 x 2, 2 x 4 and 2 x 2 x 2."""

TINY_GRADIENT = 1e-3


class RecordedGradients(NamedTuple):
    """Optax state that holds the last gradients, as `record_gradients` keeps it."""

    gradients: Any


def record_gradients() -> optax.GradientTransformation:
    """Keeps each step's gradients in the optimizer's state, for a comparison.

    Put it in front: `optax.chain(record_gradients(), optax.sgd(0.1))`.
    """

    def init(params):
        return RecordedGradients(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del state, params
        return updates, RecordedGradients(updates)

    return optax.GradientTransformation(init, update)


def assert_mesh_invariant(
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    state: TrainState,
    batch: Any,
    meshes: Sequence[Mapping[str, int]] = MESHES,
    *,
    axes: Any = None,
    rules: parallel.Rules | None = None,
    tolerance: float = 1e-5,
    adaptive: bool = False,
) -> None:
    """Runs one step on one device and on every mesh, and compares what comes out.

    Compared are the metrics, the loss among them; the gradients, if the optimizer has
    `record_gradients` in it; and the parameters after the step. Arrays `a` and `b` are
    equal if `max |a - b| <= tolerance * max |a|`: sums over devices are rounded in
    another order. Under an optimizer that divides by the gradient's size (Adam), an
    update of a tiny gradient is rounding noise: `adaptive` compares parameters only
    where `|g| > 1e-3 max |g|`. And no device may hold more than 1.1 times its share,
    1 / (fsdp * tensor), of the parameters' bytes, before or after the step: copying
    everything to every device would be the same run too, but not a sharded one.

    Args:
        step: not jitted, such as `training.make_train_step` returns.
        state: from `training.init_state`; not donated.
        batch: mapping to arrays `[B, ...]`, split over the mesh axes of "batch".
        meshes: shapes, see `parallel.make_mesh`; each takes the first devices.
        axes: logical axes of what the loss is given, `state.params` with any
            `state.frozen`, e.g. `models.param_axes(config)`. None splits the longest
            axis of each parameter over "tensor" and the next over "fsdp", a single one
            over "fsdp".
        rules: from logical axes to mesh axes, instead of `parallel.RULES`.
        tolerance: see above.
        adaptive: see above; needs recorded gradients.

    Raises:
        AssertionError: names the mesh, what differs, and by how much.
        ValueError: too few devices for a mesh, or `adaptive` without gradients.
    """
    reference = _outcome(*jax.jit(step)(state, batch))
    if adaptive and reference.gradients is None:
        raise ValueError(
            "adaptive=True compares by the gradients: put testing.record_gradients() "
            "in front of the optimizer, optax.chain(record_gradients(), optax.adam(1))."
        )
    if axes is None:
        axes = jax.tree.map(lambda leaf: _guess_axes(leaf.shape), state.joined())
    for shape in meshes:
        mesh = _mesh(shape)
        placement = parallel.shardings(axes, mesh, rules, shapes=state.joined())
        state_placement = parallel.shardings_like(state, state.joined(), placement)
        placed = parallel.place(state, state_placement)
        rows = parallel.place(batch, parallel.batch_sharding(mesh, rules))
        # The state must come back as it went in, or the next step would retrace.
        run = jax.jit(step, out_shardings=(state_placement, None))
        after, metrics = run(placed, rows)
        name = ", ".join(f"{axis}: {size}" for axis, size in shape.items())
        for when, held in (("before", placed), ("after", after)):
            _check_bytes(
                held.joined(), mesh, f"on the mesh {{{name}}}, {when} the step"
            )
        found = _outcome(after, metrics)
        _compare(reference, found, f"on the mesh {{{name}}}", tolerance, adaptive)


class _Outcome(NamedTuple):
    """What a step gave, on the host: flat, by name."""

    metrics: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray] | None
    params: dict[str, np.ndarray]


def _outcome(state: TrainState, metrics: Mapping[str, Any]) -> _Outcome:
    recorded = [
        node.gradients
        for node in jax.tree.leaves(
            state.opt_state, is_leaf=lambda node: isinstance(node, RecordedGradients)
        )
        if isinstance(node, RecordedGradients)
    ]
    return _Outcome(
        _flat(dict(metrics)),
        _flat(recorded[0]) if recorded else None,
        _flat(state.params),
    )


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    }


def _guess_axes(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The longest axis for "tensor", the next for "fsdp"; a vector's for "fsdp"."""
    names: list[str | None] = [None] * len(shape)
    by_length = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    wanted = ("embed",) if len(shape) == 1 else ("mlp", "embed")
    for axis, name in zip(by_length, wanted, strict=False):
        names[axis] = name
    return tuple(names)


def _mesh(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    wanted, devices = math.prod(shape.values()), jax.devices()
    if wanted > len(devices):
        raise ValueError(
            f"assert_mesh_invariant: the mesh {dict(shape)} needs {wanted} devices, "
            f"there are {len(devices)}. On a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} before JAX is "
            "imported, or leave this mesh out."
        )
    return parallel.make_mesh(shape, devices=devices[:wanted])


def _check_bytes(params: Any, mesh: jax.sharding.Mesh, where: str) -> None:
    leaves = jax.tree.leaves(params)
    total = sum(leaf.nbytes for leaf in leaves)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    held: dict[Any, int] = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    most = max(held.values())
    if most > 1.1 * total / parts:
        raise AssertionError(
            f"{where}, a device holds {most:,} bytes of parameters; its share of "
            f"{total:,} bytes over fsdp x tensor = {parts} is {total // parts:,}. Some "
            "parameter is not split: look at its logical axes and the rules."
        )


def _compare(
    wanted: _Outcome, found: _Outcome, where: str, tolerance: float, adaptive: bool
) -> None:
    problems = []
    for kind, before, after in zip(_Outcome._fields, wanted, found, strict=True):
        if before is None or after is None:
            continue
        for name, value in before.items():
            counted = np.ones(value.shape, bool)
            if kind == "params" and adaptive and wanted.gradients is not None:
                size = np.abs(wanted.gradients[name])
                counted = size > TINY_GRADIENT * size.max(initial=0.0)
            gap = np.where(counted, np.abs(value - after[name]), 0.0).max(initial=0.0)
            scale = np.abs(value).max(initial=0.0)
            if not gap <= tolerance * scale:
                problems.append(
                    f"  {kind} {name}: differs by {gap:.2e}, largest value {scale:.2e}"
                )
    if problems:
        raise AssertionError(
            f"{where}, the step is not the same as on one device:\n"
            + "\n".join(problems)
        )
