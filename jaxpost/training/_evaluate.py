"""Held-out loss: totals and weights summed over batches, then divided once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import ops, parallel
from jaxpost.training._state import TrainState
from jaxpost.training._step import loss_metrics
from jaxpost.typing import Batch, LossFn, LossOutput


def make_eval_fn(
    loss_fn: LossFn,
    batches: Callable[[], Iterable[Batch]],
    *,
    use_ema: bool = False,
    place: Callable[[Batch], Batch] | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """Builds `eval_fn(state) -> {"eval_loss": ..., "eval_<metric>": ...}`.

    Args:
        loss_fn: as for training; its new `method_state` is dropped. Batch `i` gets the
            key `fold_in(state.key, i)`.
        batches: called at each evaluation; gives batches of one shape (or few), the
            last padded with masked rows.
        use_ema: evaluate the moving average instead of `params`.
        place: puts a batch on devices.

    Returns:
        The function; it raises ValueError if there was no batch.
    """

    @parallel.compile_together
    @jax.jit
    def outputs(params, frozen, method_state, batch, key):
        everything = ops.join_trees(params, frozen)
        output = loss_fn(everything, method_state, batch, key)
        return jax.tree.map(jnp.asarray, (output.terms, output.metrics))

    @parallel.compile_together
    @jax.jit
    def finish(stacked):
        terms, metrics = stacked
        weights = {name: jnp.sum(term.weight) for name, term in terms.items()}
        return loss_metrics(LossOutput(terms, metrics), weights)

    def eval_fn(state: TrainState) -> dict[str, float]:
        params = state.ema if use_ema else state.params
        if params is None:
            raise ValueError("use_ema is set but state.ema is None.")
        collected, running = [], None
        for index, batch in enumerate(batches()):
            batch = dict(batch) if place is None else place(batch)
            key = jax.random.fold_in(state.key, index)
            ahead = outputs(params, state.frozen, state.method_state, batch, key)
            if running is not None:  # one batch ahead of the device, never more
                collected.append(jax.device_get(running))
            running = ahead
        if running is None:
            raise ValueError("Evaluation got no batches: is the held-out set empty?")
        collected.append(jax.device_get(running))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *collected)
        values: Mapping[str, Any] = jax.device_get(finish(stacked))
        return {
            f"eval_{name}": float(value)
            for name, value in values.items()
            if name not in ("grad_norm", "nonfinite")
        }

    return eval_fn
