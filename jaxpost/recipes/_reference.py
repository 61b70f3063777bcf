"""The reference of a preference run: beside the policy, as columns, its base, or none.

Precomputed log-probabilities are a file of columns by example id, with a fingerprint of
everything they depend on; columns that no longer fit are refused by name.
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, parallel, training
from jaxpost.recipes import _pairs
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


def with_reference_columns(
    run: Run, score: _pairs.ScoreFn, *, path: str | None = None
) -> Run:
    """The run with reference log-probs in its rows, from a file or computed now.

    Args:
        run: not trained yet.
        score: from parameters and a batch to `logps` `[B, 2]`.
        path: the file; `reference.npz` in the run folder if None. Read if it is there,
            else computed in one pass over the training and held-out rows, and written.

    Returns:
        The run whose rows hold `ref_chosen_logps` and `ref_rejected_logps`, float32.

    Raises:
        StaleReferenceError: the file's fingerprint differs; names what changed.
        ConfigError: the file is damaged, or a log-probability is not finite.
    """
    file = pathlib.Path(path) if path else run.folder.path / FILE
    rows = [*run.rows, *run.eval_rows]
    wanted = fingerprint(run, rows)
    table = _read_together(file, wanted)
    if table is None:
        logps = _pairs.score_rows(run, rows, run.model.params, score)["logps"]
        ids = data.join_ids(_pairs.ids_of(rows))
        _check_finite(file, ids, logps)
        table = dict(zip(ids.tolist(), logps.astype(np.float32), strict=True))
        parallel.on_first_process(
            "reference columns", lambda: write_columns(file, table, wanted)
        )

    def extended(part: list[data.TokenRow]) -> list[data.TokenRow]:
        if not part:
            return part
        ids = data.join_ids(_pairs.ids_of(part))
        found = np.stack([table[id] for id in ids.tolist()])
        columns = {name: found[:, side] for side, name in enumerate(COLUMNS)}
        return data.with_columns(part, columns)

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
    file: pathlib.Path, table: dict[int, np.ndarray], wanted: dict[str, str]
) -> None:
    """Log-probs `[2]` by example id as a `.npz` without pickled objects, replaced
    whole."""
    logps = np.stack(list(table.values()))
    arrays = {name: logps[:, side] for side, name in enumerate(COLUMNS)}
    arrays["example_id"] = np.array(list(table), np.int64)
    arrays["fingerprint"] = np.array(json.dumps(wanted))
    part = file.with_name(f"{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as out:
        np.savez(out, allow_pickle=False, **arrays)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def read_columns(file: pathlib.Path, wanted: dict[str, str]) -> dict[int, np.ndarray]:
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
            logps = np.stack([stored[name] for name in COLUMNS], axis=1)
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
    file: pathlib.Path, wanted: dict[str, str]
) -> dict[int, np.ndarray] | None:
    """The columns if every process has them; None if any lacks them. What is wrong with
    the file of one is an error on all of them."""
    table, problem = None, None
    try:
        table = read_columns(file, wanted)
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
            f"{_pairs.name_ids(bad)}; check the model's weights and these rows."
        )


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
