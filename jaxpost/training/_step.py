"""One optimizer step as a pure function, with exact gradient accumulation.

Takes any `LossFn`; knows no model, no method and no mesh axis. Sharded batches work as
they are: sums over the batch become sums over devices under `jit`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost import ops
from jaxpost.training._state import TrainState
from jaxpost.typing import Batch, LossFn, LossOutput, Metric, Params

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
) -> StepFn:
    """Builds `step(state, batch) -> (state, metrics)`; not jitted (see `compile_step`).

    The loss is `sum over terms of coefficient * total / weight`, totals and weights
    summed over the whole batch before the one division; a term of weight 0 is 0. With
    `accumulate = A`, microbatch `a` holds rows `a, a + A, a + 2A, ...`: interleaved, so
    that a batch sharded over its rows gives microbatches sharded over theirs without
    moving data, and unlike lengths spread evenly. Weights of all microbatches are
    summed first, in a pass that differentiates nothing and from which XLA drops all
    that the weights do not depend on (they depend on masks, not on `params`); then each
    microbatch's share of the one loss is differentiated. So the gradient is that of the
    whole batch, not a mean of means.

    Randomness: microbatch `a` of step `s` gets `fold_in(fold_in(state.key, s), a)`.
    `method_state` passes through the microbatches in order.

    With `state.frozen`, `loss_fn` is given the union of `state.params` and it as its
    `params`; the gradient is that of `state.params` alone.

    A step whose loss terms or gradient are not finite changes nothing: the state comes
    back as it was, and `metrics["nonfinite"]` says what broke.

    Args:
        loss_fn: what is differentiated; returns totals and weights, see `LossFn`.
        tx: Optax optimizer.
        accumulate: microbatches per step; must divide the batch's rows.
        ema_decay: decay in [0, 1) of the moving average `state.ema`, or None for none.

    Returns:
        The step. Its metrics are float32 scalars: `loss`; `loss/<term>` (mean before
        its coefficient); `grad_norm` (global, before clipping); `nonfinite` (0, or 1 +
        the index of the first bad tensor, see `describe_nonfinite`); and the
        `loss_fn`'s metrics, reduced by their kind.

    Raises:
        ValueError: `accumulate` or `ema_decay` out of range; while tracing: batch rows
            not divisible, no loss terms, changed structure of `method_state`, a
            metric that would hide one of ours, or a leaf both trained and frozen.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}.")
    if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}.")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if ema_decay is not None and state.ema is None:
            raise ValueError(
                "ema_decay is set but state.ema is None: init_state(ema=True)."
            )
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            grads, output, weights = _whole_batch(loss_fn, state, batch, key)
        else:
            micro = _split(batch, accumulate)
            grads, output, weights = _accumulated(
                loss_fn, state, micro, key, accumulate
            )
        _check_method_state(state.method_state, output.method_state)
        metrics, ok = _report(output, weights, grads)

        def update():
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema: Any = state.ema
            if ema_decay is not None:
                ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
            return state.step + 1, params, opt_state, output.method_state, ema

        def keep():
            return (
                state.step,
                state.params,
                state.opt_state,
                state.method_state,
                state.ema,
            )

        # A branch, not a select: that would keep a second copy of the weights alive.
        count, params, opt_state, method_state, ema = jax.lax.cond(ok, update, keep)
        return (
            TrainState(
                count, params, opt_state, state.key, method_state, ema, state.frozen
            ),
            metrics,
        )

    return step


def describe_nonfinite(
    code: float, params: Params, term_names: tuple[str, ...] | list[str]
) -> str | None:
    """Names the first tensor that was not finite in a step; None if all were.

    Args:
        code: `metrics["nonfinite"]` of that step.
        params: the parameters, or any tree of their structure.
        term_names: names of the loss terms.
    """
    index = int(code) - 1
    if index < 0:
        return None
    terms = sorted(term_names)
    if index < len(terms):
        return f"loss term {terms[index]!r}"
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return f"gradient of {leaf_name(paths[index - len(terms)])!r}"


def leaf_name(path: Any) -> str:
    """A leaf's key path as `layers/mlp/gate/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def objective(output: LossOutput, weights: Mapping[str, jax.Array]) -> jax.Array:
    """`sum of coefficient * total / weight`, given the whole batch's weights."""
    if not output.terms:
        raise ValueError("The loss function returned no terms.")
    parts = [
        term.coefficient * ops.ratio(term.total, jax.lax.stop_gradient(weights[name]))
        for name, term in sorted(output.terms.items())
    ]
    return sum(parts[1:], start=parts[0])


def _whole_batch(loss_fn, state, batch, key):
    """One forward and backward pass; weights come from the same pass."""

    def loss(params):
        everything = ops.join_trees(params, state.frozen)
        output = loss_fn(
            everything, state.method_state, batch, jax.random.fold_in(key, 0)
        )
        weights = {name: term.weight for name, term in output.terms.items()}
        return objective(output, weights), (output, weights)

    grads, (output, weights) = jax.grad(loss, has_aux=True)(state.params)
    return grads, _with_axis(output), weights


def _accumulated(loss_fn, state, micro, key, count):
    """Weights of all microbatches first, then each one's share of the gradient."""
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(count))

    def add_weights(method_state, item):
        output = loss_fn(state.joined(), method_state, *item)
        weights = {name: term.weight for name, term in output.terms.items()}
        return output.method_state, weights

    _, weights = jax.lax.scan(add_weights, state.method_state, (micro, keys))
    weights = jax.tree.map(lambda weight: jnp.sum(weight, axis=0), weights)
    weights = jax.lax.stop_gradient(weights)

    def loss(params, method_state, item):
        everything = ops.join_trees(params, state.frozen)
        output = loss_fn(everything, method_state, *item)
        return objective(output, weights), output

    def add_gradient(carry, item):
        total, method_state = carry
        grads, output = jax.grad(loss, has_aux=True)(state.params, method_state, item)
        total = jax.tree.map(
            lambda sum_, grad: sum_ + grad.astype(sum_.dtype), total, grads
        )
        return (total, output.method_state), output._replace(method_state=None)

    zeros = jax.tree.map(
        lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)),
        state.params,
    )
    carry = (zeros, state.method_state)
    (grads, method_state), outputs = jax.lax.scan(add_gradient, carry, (micro, keys))
    grads = jax.tree.map(lambda grad, p: grad.astype(p.dtype), grads, state.params)
    return grads, outputs._replace(method_state=method_state), weights


def _with_axis(output: LossOutput) -> LossOutput:
    """Terms and metrics as if stacked over one microbatch."""
    terms, metrics = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[None], (output.terms, output.metrics)
    )
    return LossOutput(terms, metrics, output.method_state)


def _split(batch: Batch, count: int) -> Batch:
    """`[B, ...]` to `[A, B / A, ...]`, microbatch `a` taking rows `a::A`."""

    def split(path, leaf):
        leaf = jnp.asarray(leaf)
        if leaf.ndim == 0 or leaf.shape[0] % count:
            raise ValueError(
                f"batch[{leaf_name(path)!r}] has shape {leaf.shape}: its rows cannot "
                f"be split into accumulate={count} equal microbatches."
            )
        rows = leaf.shape[0] // count
        return jnp.moveaxis(leaf.reshape(rows, count, *leaf.shape[1:]), 1, 0)

    return jax.tree_util.tree_map_with_path(split, dict(batch))


def _check_method_state(before: Any, after: Any) -> None:
    was, now = jax.tree.structure(before), jax.tree.structure(after)
    if was != now:
        raise ValueError(
            "loss_fn must return method_state with the structure it was given: "
            f"got {now}, expected {was}."
        )


def reduce_metric(metric: Metric) -> jax.Array:
    """A metric stacked over microbatches `[A]` as one float32 scalar."""
    value = jnp.asarray(metric.value)
    if metric.kind == "mean":
        result = ops.ratio(jnp.sum(value), jnp.sum(jnp.asarray(metric.weight)))
    elif metric.kind == "sum":
        result = jnp.sum(value)
    elif metric.kind == "max":
        result = jnp.max(value)
    elif metric.kind == "min":
        result = jnp.min(value)
    else:
        raise ValueError(
            f"metric kind must be mean, sum, max or min, got {metric.kind!r}."
        )
    return result.astype(jnp.float32)


def loss_metrics(output: LossOutput, weights: Mapping[str, jax.Array]) -> Metrics:
    """`loss`, `loss/<term>` and the loss function's metrics, from stacked outputs."""
    totals = {name: jnp.sum(term.total) for name, term in output.terms.items()}
    per_microbatch = jax.vmap(lambda terms: objective(LossOutput(terms), weights))
    metrics = {"loss": jnp.sum(per_microbatch(output.terms))}
    for name, total in totals.items():
        metrics[f"loss/{name}"] = ops.ratio(total, weights[name])
    metrics |= {"grad_norm": jnp.zeros(()), "nonfinite": jnp.zeros(())}
    clash = [
        name for name in output.metrics if name in metrics or name.startswith("loss/")
    ]
    if clash:
        raise ValueError(
            f"loss_fn's metrics {clash} have names that the step uses itself: loss, "
            "loss/<term>, grad_norm, nonfinite."
        )
    metrics |= {name: reduce_metric(metric) for name, metric in output.metrics.items()}
    return {name: v.astype(jnp.float32) for name, v in metrics.items()}


def _report(output, weights, grads) -> tuple[Metrics, jax.Array]:
    metrics = loss_metrics(output, weights)
    squares = [
        jnp.sum(
            jnp.square(jnp.abs(leaf.astype(jnp.promote_types(leaf.dtype, "float32"))))
        )
        for leaf in jax.tree.leaves(grads)
    ]
    # The squares are needed for the norm anyway, so naming the bad leaf is free.
    checked = [metrics[f"loss/{name}"] for name in sorted(output.terms)] + squares
    bad = ~jnp.stack([jnp.isfinite(value) for value in checked])
    code = jnp.where(jnp.any(bad), jnp.argmax(bad) + 1, 0)
    metrics["grad_norm"] = jnp.sqrt(sum(squares)).astype(jnp.float32)
    metrics["nonfinite"] = code.astype(jnp.float32)
    return metrics, code == 0
