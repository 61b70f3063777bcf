"""The reference of a run on answers: beside the policy, as columns, its base, or none.

Precomputed log-probabilities are a file of columns by example id, with a fingerprint of
everything they depend on; columns that no longer fit are refused by name.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, parallel, training
from jaxpost.recipes import _answers, _fingerprinted
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._fingerprints import digest
from jaxpost.recipes._run import Run
from jaxpost.typing import Params

ReferenceName = Literal["auto", "live", "precomputed", "none", "lora_base"]
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
FILE = "reference.npz"


class StaleReferenceError(ConfigError):
    """Reference columns belong to another model, tokenizer, template or data."""


def check_reference(name: ReferenceName, *, lora: bool, columns: str | None) -> None:
    """Refuses settings of a reference that contradict each other.

    Raises:
        ValueError: the message names the key.
    """
    if name == "lora_base" and not lora:
        raise ValueError("reference is lora_base, but there are no adapters: set lora.")
    if name == "live" and lora:
        raise ValueError(
            "reference is live, a second copy of the model, but with adapters the base "
            "is the reference already: set reference to lora_base."
        )
    if columns is not None and name != "precomputed":
        raise ValueError(
            f"reference_columns is given, but reference is {name}: set it to "
            "precomputed."
        )


def resolve(name: ReferenceName, *, lora: bool) -> ReferenceName:
    """`auto` is the base under adapters, else a live copy."""
    if name == "auto":
        return "lora_base" if lora else "live"
    return name


def live_copy(run: Run) -> Params:
    """The model as it is, for `TrainState.frozen`; its own arrays, compute dtype."""

    def copy(leaf: jax.Array) -> jax.Array:
        narrow = run.compute_dtype
        if narrow is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(narrow)
        return jnp.copy(leaf)

    return jax.tree.map(copy, run.model.params)


def policy_params(params: Params) -> Params:
    """What is left of the parameters without a live reference."""
    return {name: value for name, value in params.items() if name != "reference"}


def under_reference(
    name: ReferenceName,
    model: models.Model,
    params: Params,
    logps_of: Callable[[models.Model, Params], jax.Array],
) -> jax.Array:
    """What `logps_of` gives for a reference that is a model, without gradient.

    Args:
        name: `live`, the parameters under `reference`; or `lora_base`, those without
            adapters.
        model: the policy's.
        params: as the loss is given them.
        logps_of: from a model and its parameters to log-probabilities.
    """
    if name == "live":
        found = logps_of(model, params["reference"])
    elif name == "lora_base":
        found = logps_of(models.without_lora(model), models.split_lora(params)[1])
    else:
        raise ValueError(f"a reference {name!r} is no model to compute with.")
    return jax.lax.stop_gradient(found)


def with_reference_columns(
    run: Run,
    score: _answers.ScoreFn,
    *,
    path: str | None = None,
    columns: Sequence[str] = COLUMNS,
) -> Run:
    """The run with reference log-probs in its rows, from a file or computed now.

    Args:
        run: not trained yet.
        score: from parameters and a batch to `logps` `[B, A]`.
        path: the file; `reference.npz` in the run folder if None. Read if it is there,
            else computed in one pass over the training and held-out rows, and written.
        columns: names of the `A` numbers in the rows; or one name for them together.

    Returns:
        The run whose rows hold these columns, float32.

    Raises:
        StaleReferenceError: the file's fingerprint differs; names what changed.
        ConfigError: the file is damaged, or a log-probability is not finite.
    """
    file = pathlib.Path(path) if path else run.folder.path / FILE
    rows = [*run.rows, *run.eval_rows]
    wanted = fingerprint(run, rows)

    def parse(stored: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        found = _table(stored, columns)
        _check_finite(file, found)
        return found

    table = _fingerprinted.read_together(
        file,
        wanted,
        parse,
        what="a file of reference columns",
        stale=StaleReferenceError,
    )
    if table is None:
        logps = _answers.score_rows(run, rows, run.model.params, score)["logps"]
        ids = data.join_ids(_answers.ids_of(rows))
        table = dict(zip(ids.tolist(), logps.astype(np.float32), strict=True))
        _check_finite(file, table)
        arrays = _arrays(table, columns)
        parallel.on_first_process(
            "reference columns",
            lambda: _fingerprinted.write_arrays(file, arrays, wanted),
        )

    def extended(part: list[data.TokenRow]) -> list[data.TokenRow]:
        if not part:
            return part
        ids = data.join_ids(_answers.ids_of(part))
        found = np.stack([table[id] for id in ids.tolist()])
        return data.with_columns(part, _split(found, columns))

    return run.with_rows(extended(run.rows), extended(run.eval_rows))


def fingerprint(run: Run, rows: list[data.TokenRow]) -> dict[str, str]:
    """What reference log-probs depend on, a digest each: model, tokenizer, chat
    template, and data (the tokens, and which of them are scored)."""
    tokenizer, model = run.tokenizer, run.model
    params = models.split_lora(model.params)[1]
    config = repr(model.config.replace(remat="none", lora=None))
    tokens = hashlib.sha256()
    for row in rows:
        for name in ("example_id", "tokens", "loss_mask", "segment_ids"):
            tokens.update(np.ascontiguousarray(row[name]).data)
    special = [tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos]
    return {
        "model": digest(
            training.fingerprint_params(params), config, str(run.compute_dtype)
        ),
        "tokenizer": digest(tokenizer.backend.to_str(), json.dumps(special)),
        "chat template": digest(tokenizer.chat_template or ""),
        "data": tokens.hexdigest(),
    }


def _arrays(
    table: dict[int, np.ndarray], columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Log-probs `[A]` by example id as columns, with the ids."""
    ids = np.array(list(table), np.int64)
    return _split(np.stack(list(table.values())), columns) | {"example_id": ids}


def _split(logps: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Log-probs `[n, A]` by name: each answer's, or all under one name."""
    if len(columns) == 1:
        return {columns[0]: logps}
    return {name: logps[:, place] for place, name in enumerate(columns)}


def _table(
    stored: Mapping[str, np.ndarray], columns: Sequence[str]
) -> dict[int, np.ndarray]:
    """The log-probs by example id that `_arrays` put into columns."""
    parts = [stored[name] for name in columns]
    logps = parts[0] if len(columns) == 1 else np.stack(parts, axis=1)
    return dict(zip(stored["example_id"].tolist(), logps, strict=True))


def _check_finite(file: pathlib.Path, table: dict[int, np.ndarray]) -> None:
    bad = np.array([id for id, logps in table.items() if not np.isfinite(logps).all()])
    if len(bad):
        raise ConfigError(
            f"{file}: the reference gives log-probs that are not finite to "
            f"{_answers.name_ids(bad)}; check the model's weights and these rows."
        )
