"""The reference of a run on answers: beside the policy, as columns, its base, or none.

Precomputed log-probabilities are a file of columns by example id, with a fingerprint of
everything they depend on; columns that no longer fit are refused by name.
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, parallel, training
from jaxpost.recipes import _answers
from jaxpost.recipes._config import ConfigError
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
    table = _read_together(file, wanted, columns)
    if table is None:
        logps = _answers.score_rows(run, rows, run.model.params, score)["logps"]
        ids = data.join_ids(_answers.ids_of(rows))
        _check_finite(file, ids, logps)
        table = dict(zip(ids.tolist(), logps.astype(np.float32), strict=True))
        parallel.on_first_process(
            "reference columns", lambda: write_columns(file, table, wanted, columns)
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
        "model": _digest(
            training.fingerprint_params(params), config, str(run.compute_dtype)
        ),
        "tokenizer": _digest(tokenizer.backend.to_str(), json.dumps(special)),
        "chat template": _digest(tokenizer.chat_template or ""),
        "data": tokens.hexdigest(),
    }


def write_columns(
    file: pathlib.Path,
    table: dict[int, np.ndarray],
    wanted: dict[str, str],
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Log-probs `[A]` by example id as a `.npz` without pickled objects, replaced
    whole."""
    arrays = _split(np.stack(list(table.values())), columns)
    arrays["example_id"] = np.array(list(table), np.int64)
    arrays["fingerprint"] = np.array(json.dumps(wanted))
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as out:
        np.savez(out, allow_pickle=False, **arrays)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def _split(logps: np.ndarray, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Log-probs `[n, A]` by name: each answer's, or all under one name."""
    if len(columns) == 1:
        return {columns[0]: logps}
    return {name: logps[:, place] for place, name in enumerate(columns)}


def read_columns(
    file: pathlib.Path, wanted: dict[str, str], columns: Sequence[str] = COLUMNS
) -> dict[int, np.ndarray]:
    """What `write_columns` wrote, if it still fits.

    Raises:
        FileNotFoundError: there is no such file.
        StaleReferenceError: the fingerprint differs; names what changed.
        ConfigError: the file cannot be read.
    """
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            found: dict[str, Any] = json.loads(str(stored["fingerprint"]))
            ids = stored["example_id"]
            parts = [stored[name] for name in columns]
            logps = parts[0] if len(columns) == 1 else np.stack(parts, axis=1)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{file}: not a file of reference columns ({error}); delete it to compute "
            "them anew."
        ) from error
    changed = [name for name, digest in wanted.items() if found.get(name) != digest]
    if changed:
        raise StaleReferenceError(
            f"{file}: its log-probs are stale, as they were computed with another "
            f"{' and another '.join(changed)}; delete the file to compute them anew."
        )
    _check_finite(file, ids, logps)
    return dict(zip(ids.tolist(), logps, strict=True))


def _read_together(
    file: pathlib.Path, wanted: dict[str, str], columns: Sequence[str]
) -> dict[int, np.ndarray] | None:
    """The columns if every process has them; None if any lacks them. What is wrong with
    the file of one is an error on all of them."""
    table, problem = None, None
    try:
        table = read_columns(file, wanted, columns)
    except FileNotFoundError:
        pass
    except ConfigError as error:
        problem = error
    state = np.array([2 if problem else int(table is not None)])
    states = np.asarray(parallel.gather_to_hosts(state))
    if states.max() == 2:
        raise problem or ConfigError(
            f"{file}: process {int(states.argmax())} cannot use its copy; see there."
        )
    return table if states.min() == 1 else None


def _check_finite(file: pathlib.Path, ids: np.ndarray, logps: np.ndarray) -> None:
    bad = ids[~np.isfinite(logps).all(axis=1)]
    if len(bad):
        raise ConfigError(
            f"{file}: the reference gives log-probs that are not finite to "
            f"{_answers.name_ids(bad)}; check the model's weights and these rows."
        )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
