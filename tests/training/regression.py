"""A two-term regression whose loss and gradient are known in closed form."""

import jax.numpy as jnp
import numpy as np

from jaxpost import ops
from jaxpost.typing import LossOutput, Metric, Term


def make_batch(rows=16, width=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, width)).astype(dtype),
        "y": rng.normal(size=(rows,)).astype(dtype),
        # Very uneven between microbatches: means of means would be far off.
        "mask": rng.random(rows) < np.linspace(0.2, 1.0, rows),
        "rare": np.arange(rows) < 2,
    }


def make_params(width=3, dtype=np.float32):
    rng = np.random.default_rng(7)
    return {
        "bias": jnp.asarray(rng.normal(), dtype),
        "kernel": jnp.asarray(rng.normal(size=(width,)), dtype),
    }


COEFFICIENT = 0.3


def loss_fn(params, method_state, batch, key):
    """Squared error on `mask`, plus 0.3 x absolute prediction on `rare`."""
    del key
    predicted = jnp.dot(batch["x"], params["kernel"]) + params["bias"]
    error = predicted - batch["y"]
    mask, rare = batch["mask"], batch["rare"]
    zero = jnp.zeros((), error.dtype)
    squares = jnp.where(mask, error**2, zero)
    sizes = jnp.where(rare, jnp.abs(predicted), zero)

    def count(where):
        return jnp.sum(where, dtype=error.dtype)

    return LossOutput(
        terms={
            "square": Term(ops.masked_sum(squares, mask), count(mask)),
            "size": Term(ops.masked_sum(sizes, rare), count(rare), COEFFICIENT),
        },
        metrics={
            "error_mean": Metric(jnp.sum(squares), count(mask)),
            "error_sum": Metric(jnp.sum(squares), kind="sum"),
            "error_max": Metric(jnp.max(jnp.abs(error)), kind="max"),
            "error_min": Metric(jnp.min(jnp.abs(error)), kind="min"),
        },
        method_state=method_state,
    )


def oracle(params, batch):
    """Loss by term and whole-batch gradient, float64 NumPy, row by row."""
    kernel = np.asarray(params["kernel"], np.float64)
    bias = float(params["bias"])
    totals = {"square": 0.0, "size": 0.0}
    weights = {"square": int(batch["mask"].sum()), "size": int(batch["rare"].sum())}
    grads = {"kernel": np.zeros_like(kernel), "bias": 0.0}
    for row in range(len(batch["y"])):
        x = np.asarray(batch["x"][row], np.float64)
        predicted = float(x @ kernel + bias)
        error = predicted - float(batch["y"][row])
        slope = 0.0
        if batch["mask"][row]:
            totals["square"] += error**2
            slope += 2 * error / weights["square"]
        if batch["rare"][row]:
            totals["size"] += abs(predicted)
            slope += COEFFICIENT * np.sign(predicted) / weights["size"]
        grads["kernel"] += slope * x
        grads["bias"] += slope
    terms = {name: totals[name] / weights[name] for name in totals}
    return terms["square"] + COEFFICIENT * terms["size"], terms, grads
