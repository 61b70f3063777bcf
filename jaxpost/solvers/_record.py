"""The history while a solve runs: one array, so that a row is one update."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpost.solvers._result import History

_OF_ITERATE = (
    "kkt_residual",
    "objective",
    "constraint_norm",
    "jacobian_eigenvalue",
)
_OF_STEP = History._fields[len(_OF_ITERATE) :]
_INTEGERS = ("inner_steps", "escaped")
assert History._fields[: len(_OF_ITERATE)] == _OF_ITERATE


def empty_record(max_iterations: int, dtype: Any) -> jax.Array:
    """NaN, `[max_iterations + 1, fields of History]`."""
    return jnp.full((max_iterations + 1, len(History._fields)), jnp.nan, dtype)


def record_iterate(
    record: jax.Array, entries: dict[str, jax.Array], row: Any
) -> jax.Array:
    """Row `row` with what is known of the iterate."""
    return _write(record, entries, _OF_ITERATE, row, 0)


def record_step(
    record: jax.Array, entries: dict[str, jax.Array], row: Any
) -> jax.Array:
    """Row `row` with what is known of the step from it."""
    return _write(record, entries, _OF_STEP, row, len(_OF_ITERATE))


def unpack_record(record: jax.Array) -> History:
    """By field; counts as int32, -1 where there are none."""
    columns = {}
    for index, name in enumerate(History._fields):
        column = record[:, index]
        if name in _INTEGERS:
            column = jnp.where(jnp.isnan(column), -1.0, column).astype(jnp.int32)
        columns[name] = column
    return History(**columns)


def _write(record, entries, names, row, column) -> jax.Array:
    values = jnp.stack([entries[name].astype(record.dtype) for name in names])
    place = (jnp.asarray(row, jnp.int32), jnp.asarray(column, jnp.int32))
    return jax.lax.dynamic_update_slice(record, values[None], place)
