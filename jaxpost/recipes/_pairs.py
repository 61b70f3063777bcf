"""Pairs of answers under a model: log-probabilities, metrics, and one pass over all.

What the recipes of preference pairs share. Batches are those of `data.pad_pairs`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, losses, models, ops, parallel, training
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch, Metric, Params, TokenStats

TokenLogps = Callable[..., TokenStats]
ScoreFn = Callable[[Params, Batch], Mapping[str, jax.Array]]


class PairLogps(NamedTuple):
    """Log-probabilities of the answers of a batch of pairs.

    Fields:
        logps: of each whole answer, float32 or wider `[B, 2]`, chosen first, nats.
        lengths: tokens of each answer that were scored, float32 `[B, 2]`.
    """

    logps: jax.Array
    lengths: jax.Array


def pair_logps(
    model: models.Model,
    params: Params,
    batch: Batch,
    *,
    token_logps: TokenLogps = ops.linear_token_logps,
) -> PairLogps:
    """Both answers of each pair in one forward pass; prompts cost no head product.

    Args:
        model: gives `apply` and `unembed`.
        params: its parameters, in the dtype to compute in.
        batch: `tokens`, `positions`, `segment_ids` and `loss_mask`, each `[B, 2, T]`.
        token_logps: on a mesh, from `parallel.split_vocabulary`.
    """
    flat = flatten(batch)
    hidden = model.apply(
        params, flat["tokens"], flat["positions"], flat["segment_ids"]
    ).hidden
    targets, mask = ops.shift_targets(flat["tokens"], flat["loss_mask"])
    stats = token_logps(hidden, model.unembed(params), targets, mask=mask)
    pairs = mask.shape[0] // 2
    return PairLogps(
        jnp.sum(stats.logps, axis=-1).reshape(pairs, 2),
        jnp.sum(mask, axis=-1, dtype=jnp.float32).reshape(pairs, 2),
    )


def flatten(batch: Batch) -> dict[str, jax.Array]:
    """The token arrays of pairs as sequences, `[2B, T]`: 2i is chosen, 2i + 1 not.

    The axis of pairs leads, so sequences stay on the devices that hold their pairs.
    """
    names = ("tokens", "positions", "segment_ids", "loss_mask")
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}


def real_pairs(batch: Batch) -> jax.Array:
    """True where a row is a pair, False where it fills up a batch; bool `[B]`."""
    return jnp.any(batch["loss_mask"], axis=(1, 2))


def pairwise_values(
    loss: Callable[[jax.Array], losses.PairwiseOutput],
    margins: jax.Array,
    real: jax.Array,
) -> losses.PairwiseOutput:
    """The loss of each margin, zero where there is no pair.

    An infinite margin makes its loss NaN, so that the training step refuses it: many
    losses are finite there, and would hide it.
    """
    values, extras = loss(jnp.where(real, margins, 0.0))
    values = jnp.where(jnp.isfinite(margins), values, jnp.nan)
    return losses.PairwiseOutput(jnp.where(real, values, 0.0), extras)


def margin_metrics(
    rewards: jax.Array, margins: jax.Array, real: jax.Array
) -> dict[str, Metric]:
    """TRL's `rewards/...`: means over pairs.

    Args:
        rewards: of both answers, float `[B, 2]`.
        margins: float `[B]`; a pair counts as right where it is above 0.
        real: from `real_pairs`.
    """
    mean = _mean_over(real)
    return {
        "rewards/chosen": mean(rewards[:, data.CHOSEN]),
        "rewards/rejected": mean(rewards[:, data.REJECTED]),
        "rewards/accuracies": mean((margins > 0.0).astype(jnp.float32)),
        "rewards/margins": mean(margins),
    }


def extras_metrics(
    config: losses.PairwiseConfig, extras: Mapping[str, jax.Array], real: jax.Array
) -> dict[str, Metric]:
    """Statistics of what a loss knows of each pair: R³M's delta, adaptive tau."""
    mean = _mean_over(real)
    found = {f"{name}/mean": mean(values) for name, values in extras.items()}
    if "delta" in extras:
        found["delta/share"] = mean((extras["delta"] > 0.0).astype(jnp.float32))
    if "tau" in extras:
        for name, inside in at_bounds(config, extras["tau"]).items():
            found[f"tau/share_at_{name}"] = mean(inside.astype(jnp.float32))
    return found


def at_bounds(config: losses.PairwiseConfig, tau: Any) -> dict[str, Any]:
    """Where `tau` lies at its bounds: bool arrays by `min` and, if there is one, `max`.

    Bounds are compared with a relative slack of 1e-6, as `tau` is float32.
    """
    bounds = {}
    if config.tau_min is not None:
        bounds["min"] = tau <= config.tau_min * (1.0 + 1e-6)
    if config.tau_max is not None:
        bounds["max"] = tau >= config.tau_max * (1.0 - 1e-6)
    return bounds


def _mean_over(real: jax.Array) -> Callable[[jax.Array], Metric]:
    count = jnp.sum(real, dtype=jnp.float32)

    def mean(values: jax.Array) -> Metric:
        return Metric(jnp.sum(jnp.where(real, values, 0.0)), count)

    return mean


def score_rows(
    run: Run, rows: Sequence[data.TokenRow], params: Params, score: ScoreFn
) -> dict[str, np.ndarray]:
    """`score` of every row, on the run's devices, in the order of the rows.

    Args:
        run: says where, and how many rows at a time (those of a microbatch).
        rows: of `data.pad_pairs`, perhaps with columns.
        params: the first argument of `score`.
        score: a pure function of parameters and a batch; arrays `[B, ...]` by name.

    Returns:
        NumPy arrays `[n, ...]` by name, on every process. Rows of one id are taken to
        be the same row.
    """
    compiled = parallel.compile_together(
        jax.jit(
            lambda params, batch: (
                {"example_id": batch["example_id"]} | dict(score(params, batch))
            )
        )
    )
    parts = run.layout.batch_parts
    size = run.config.train.batch_size // run.config.train.accumulate
    size = min(size, -(-len(rows) // parts) * parts)
    batches = run.batches_of(rows, size, shuffle=False, drop_remainder=False, epochs=1)
    found = []
    for batch in batches:
        scored = compiled(params, run.layout.place_batch(batch))
        found.append(jax.device_get(parallel.gather_to_hosts(scored)))
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    place = {id: at for at, id in enumerate(data.join_ids(joined.pop("example_id")))}
    order = [place[id] for id in data.join_ids(ids_of(rows))]
    return {name: array[order] for name, array in joined.items()}


def ids_of(rows: Sequence[data.TokenRow]) -> np.ndarray:
    """The rows' ids in halves, uint32 `[n, 2]`."""
    return np.stack([row["example_id"] for row in rows])


@contextlib.contextmanager
def naming_pairs(run: Run, margins: ScoreFn) -> Iterator[None]:
    """Adds to a NonFiniteError which pairs of that step had a margin not finite.

    Args:
        run: whose `train` is called inside.
        margins: gives `margins` `[B]`; see `score_rows`.
    """
    try:
        yield
    except training.NonFiniteError as error:
        if error.state is None:
            raise
        batch = run.layout.place_batch(run.batches.at(error.step - 1))
        values = jax.jit(
            lambda params, batch: (batch["example_id"], margins(params, batch))
        )(error.state.joined(), batch)
        halves, found = jax.device_get(parallel.gather_to_hosts(values))
        ids = data.join_ids(halves)[~np.isfinite(found["margins"])]
        if len(ids):
            error.add_detail(f"Margins not finite of {name_ids(ids)}.")
        raise


def name_ids(ids: Sequence[int] | np.ndarray, limit: int = 5) -> str:
    """`example ids 1, 2, 3` and how many more."""
    shown = ", ".join(str(int(id)) for id in ids[:limit])
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return f"example id{'s' * (len(ids) > 1)} {shown}{more}"
