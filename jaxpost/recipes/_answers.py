"""Several answers to a prompt under a model: log-probabilities, and a pass over all.

What the recipes share whose rows are `[A, T]`: pairs (`data.pad_pairs`, A = 2), or an
answer beside sampled ones (`data.pad_answers`); or these joined, `[W]`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, ops, parallel, training
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch, Metric, Params, TokenStats

TokenLogps = Callable[..., TokenStats]
ScoreFn = Callable[[Params, Batch], Mapping[str, jax.Array]]
TOKENS = ("tokens", "positions", "segment_ids", "loss_mask")


class AnswerLogps(NamedTuple):
    """Log-probabilities of the answers of a batch.

    Fields:
        logps: of each whole answer, float32 or wider `[B, A]`, nats.
        lengths: tokens of each answer that were scored, float32 `[B, A]`.
    """

    logps: jax.Array
    lengths: jax.Array


def answer_logps(
    model: models.Model,
    params: Params,
    batch: Batch,
    *,
    answers: int | None = None,
    foresee: Callable[..., jax.Array] | None = None,
    operands: tuple = (),
    token_logps: TokenLogps = ops.linear_token_logps,
) -> AnswerLogps:
    """All answers of each row in one forward pass; prompts cost no head product.

    Args:
        model: gives `apply` and `unembed`.
        params: its parameters, in the dtype to compute in.
        batch: `tokens`, `positions`, `segment_ids` and `loss_mask`, each `[B, A, T]`;
            or `[B, W]`, joined by `data.join_answers`: then prompts cost once.
        answers: A; needed if they are joined.
        foresee, operands: what the loss multiplies the log-probs `[B, A]` with, which
            makes gradients cheaper; see `ops.linear_sequence_logps`.
        token_logps: on a mesh, from `parallel.split_vocabulary`.
    """
    joined = batch["tokens"].ndim == 2
    count = answers if joined else batch["tokens"].shape[1]
    if count is None:
        raise ValueError("rows of joined answers need the number of `answers`.")
    flat = batch if joined else flatten(batch)
    tokens, segments = flat["tokens"], flat["segment_ids"]
    hidden = model.apply(params, tokens, flat["positions"], segments).hidden
    # What predicts each token, and whose it is: of the row's answers 0 to A - 1.
    places = ops.predictors(segments)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(places, 0)[..., None], axis=1)
    if joined:
        answer = ops.branch_numbers(segments) - 1
    else:
        answer = jnp.arange(len(tokens), dtype=jnp.int32)[:, None] % count
    scored = flat["loss_mask"] & (places >= 0)
    ids = jnp.where(scored, answer, -1).reshape(len(batch["tokens"]), -1)
    logps = ops.linear_sequence_logps(
        hidden.reshape(*ids.shape, -1),
        model.unembed(params),
        tokens.reshape(ids.shape),
        ids,
        count,
        foresee=foresee,
        operands=operands,
        token_logps=token_logps,
    )
    return AnswerLogps(logps, _count(ids, count))


def answer_lengths(batch: Batch, answers: int) -> jax.Array:
    """Tokens of each answer that are scored, float32 `[B, A]`; see `answer_logps`."""
    if batch["tokens"].ndim == 3:
        return jnp.sum(batch["loss_mask"], axis=2, dtype=jnp.float32)
    ids = ops.branch_numbers(batch["segment_ids"]) - 1
    return _count(jnp.where(batch["loss_mask"], ids, -1), answers)


def _count(ids: jax.Array, answers: int) -> jax.Array:
    which = ids[..., None] == jnp.arange(answers)[None, None]
    return jnp.sum(which, axis=1, dtype=jnp.float32)


def flatten(batch: Batch) -> dict[str, jax.Array]:
    """The token arrays of rows as sequences, `[A B, T]`: those of row i from A i on.

    The axis of rows leads, so sequences stay on the devices that hold their rows.
    """
    return {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in TOKENS}


def real_rows(batch: Batch) -> jax.Array:
    """True where a row has answers, False where it fills up a batch; bool `[B]`."""
    mask = batch["loss_mask"]
    return jnp.any(mask.reshape(len(mask), -1), axis=1)


def mean_over(real: jax.Array) -> Callable[[jax.Array], Metric]:
    """Makes metrics: the mean of values where `real`, of the same shape."""
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
        rows: of `data.pad_pairs` or `data.pad_answers`, perhaps with columns.
        params: the first argument of `score`.
        score: a pure function of parameters and a batch; arrays `[B, ...]` by name.

    Returns:
        NumPy arrays `[n, ...]` by name, on every process. Rows of one id are taken to
        be the same row.
    """

    def with_names(params: Params, batch: Batch) -> dict[str, jax.Array]:
        names = {"example_id": batch["example_id"], "real": real_rows(batch)}
        return names | dict(score(params, batch))

    compiled = parallel.compile_together(jax.jit(with_names))
    parts = run.layout.batch_parts
    size = run.config.train.batch_size // run.config.train.accumulate
    size = min(size, -(-len(rows) // parts) * parts)
    batches = run.batches_of(rows, size, shuffle=False, drop_remainder=False, epochs=1)
    found = []
    for batch in batches:
        scored = compiled(params, run.layout.place_batch(batch))
        found.append(jax.device_get(parallel.gather_to_hosts(scored)))
    real = np.concatenate([part.pop("real") for part in found])
    joined = {
        name: np.concatenate([part[name] for part in found])[real] for name in found[0]
    }
    place = {id: at for at, id in enumerate(data.join_ids(joined.pop("example_id")))}
    order = [place[id] for id in data.join_ids(ids_of(rows))]
    return {name: array[order] for name, array in joined.items()}


def ids_of(rows: Sequence[data.TokenRow]) -> np.ndarray:
    """The rows' ids in halves, uint32 `[n, 2]`."""
    return np.stack([row["example_id"] for row in rows])


@contextlib.contextmanager
def naming_rows(run: Run, score: ScoreFn, name: str, words: str) -> Iterator[None]:
    """Adds to a NonFiniteError which rows of that step had a number not finite.

    Args:
        run: whose `train` is called inside.
        score: gives `name`, float `[B, ...]`; see `score_rows`.
        name: what to look at.
        words: what to call it, such as `Margins`.
    """
    try:
        yield
    except training.NonFiniteError as error:
        if error.state is None:
            raise
        batch = run.layout.place_batch(run.batches.at(error.step - 1))
        values = jax.jit(
            lambda params, batch: (batch["example_id"], score(params, batch)[name])
        )(error.state.joined(), batch)
        halves, found = jax.device_get(parallel.gather_to_hosts(values))
        finite = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
        ids = data.join_ids(halves)[~finite]
        if len(ids):
            error.add_detail(f"{words} not finite of {name_ids(ids)}.")
        raise


def name_ids(ids: Sequence[int] | np.ndarray, limit: int = 5) -> str:
    """`example ids 1, 2, 3` and how many more."""
    shown = ", ".join(str(int(id)) for id in ids[:limit])
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return f"example id{'s' * (len(ids) > 1)} {shown}{more}"
