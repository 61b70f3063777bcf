"""The dtype in which log-probabilities, sums and losses are computed."""

import jax
import jax.numpy as jnp


def compute_dtype(*arrays: jax.Array | None) -> jnp.dtype:
    """`promote_types` of the arrays' dtypes and float32, so never narrower than it."""
    dtype = jnp.dtype(jnp.float32)
    # The caller's setting may forbid implicit promotion; this one is asked for.
    with jax.numpy_dtype_promotion("standard"):
        for array in arrays:
            if array is not None:
                dtype = jnp.promote_types(dtype, array.dtype)
    return dtype


def at_least_float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Bring arrays to their common dtype, float32 at least."""
    dtype = compute_dtype(*arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)
