"""Saving and restoring a run; the one module that knows Orbax.

A checkpoint is a folder `step_00000010/` that appears by one rename once everything
in it is on disk, so a crash leaves either a complete checkpoint or none. It holds the
train state (leaves by key path) and arrays of the host, such as a round of rollouts;
and as JSON: the place in the data, the state of a NumPy generator, the user's values,
metrics, and the leaves' shapes and dtypes. Frozen parameters of a `TrainState` are not
stored, only their fingerprint.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.training._fingerprint import FrozenFingerprint, differences
from jaxpost.training._manifest import find_damage, write_manifest
from jaxpost.training._state import TrainState, split_frozen
from jaxpost.training._step import leaf_name

log = logging.getLogger("jaxpost")

_STEP = re.compile(r"step_(\d{8,})")
# Before the names of arrays of the host, beside those of the state's leaves.
_HOST = "host:"
# What Orbax and TensorStore raise on a failed write or read.
_IO_ERRORS = (OSError, ValueError, RuntimeError, KeyError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, read, or fitted to the caller's tree."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Fields:
        step: optimizer steps taken when it was saved.
        state: the state, on the shapes, dtypes and shardings asked for.
        data: the place in the data, or None.
        host_rng: state of the NumPy generator, or None.
        user: the user's JSON value, or None.
        metrics: what was evaluated at that step.
        arrays: of the host, by name.
    """

    step: int
    state: Any
    data: Any
    host_rng: Any
    user: Any
    metrics: dict[str, float]
    arrays: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run; a context manager that finishes saving on exit.

    Args:
        folder: made if missing; leftovers of interrupted saves are removed.
        keep_last: newest complete checkpoints to keep.
        keep_every: also keep each whose step is a multiple of this, or None.
        keep_best: those with the lowest `best_metric` to keep as well.
        best_metric: which of the saved metrics; lower is better.

    Raises:
        ValueError: `keep_last` or `keep_every` is below 1, or `keep_best` below 0.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_best: int = 1,
        best_metric: str = "eval_loss",
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                "keep_last must be at least 1 and keep_best at least 0, got "
                f"{keep_last} and {keep_best}."
            )
        if keep_every is not None and keep_every < 1:
            raise ValueError(
                f"keep_every must be at least 1 or None, got {keep_every}."
            )
        self.folder = pathlib.Path(folder).absolute()
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._keep_best = keep_best
        self._best_name = best_metric
        self._infos: dict[int, dict[str, Any]] = {}
        self._saving: int | None = None
        self._checkpointer: Any = None
        self._fingerprint = FrozenFingerprint()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Any = None,
        host_rng: np.random.Generator | None = None,
        user: Any = None,
        metrics: Mapping[str, float] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Starts saving; returns once `state` may be donated.

        Args:
            step: optimizer steps taken. One already saved at this step is replaced.
            state: pytree of JAX and NumPy arrays, PRNG keys and Python numbers; of the
                `frozen` part of a `TrainState`, only the fingerprint is saved.
            data: place in the data, a JSON value.
            host_rng: NumPy generator to go on with after a restore.
            user: any JSON value.
            metrics: values at this step; `best_metric` among them ranks it.
            arrays: of the host by name, of any shapes; the same in each process.

        Raises:
            CheckpointError: this save could not start, or the one before had failed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        state, frozen = split_frozen(state)
        leaves = _named_leaves(state)
        info = {
            "format": 1,
            "step": int(step),
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "frozen": None if frozen is None else self._fingerprint(frozen),
            "data": data,
            "host_rng": None if host_rng is None else host_rng.bit_generator.state,
            "user": user,
            "metrics": {name: float(v) for name, v in (metrics or {}).items()},
            "arrays": {name: _describe(a) for name, a in (arrays or {}).items()},
        }
        stored = {
            name: _storable(leaf) for name, leaf in leaves.items() if np.size(leaf)
        }
        stored |= {
            _HOST + name: np.array(a) for name, a in (arrays or {}).items() if a.size
        }
        try:
            self._orbax().save(
                self.path(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(stored),
                    info=ocp.args.JsonSave(info),
                ),
                force=True,
            )
        except _IO_ERRORS as error:
            raise self._save_failed(step, error) from error
        self._infos.pop(step, None)
        self._saving = step

    def wait(self) -> None:
        """Returns once the save under way, if any, is complete; removes old ones.

        Raises:
            CheckpointError: it failed; earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._orbax().wait_until_finished()
        except _IO_ERRORS as error:
            raise self._save_failed(step, error) from error
        if jax.process_index() == 0:
            try:
                write_manifest(self.path(step))
            except OSError as error:
                raise self._save_failed(step, error) from error
        self._prune()

    def restore(self, like: Any, *, step: int | None = None) -> Restored:
        """Reads a checkpoint onto the caller's tree.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct`, the structure, shapes,
                dtypes and shardings of the result; values are not read. Leaves that are
                not committed to devices stay uncommitted. The `frozen` part of a
                `TrainState` becomes the result's, once it is found to be what the run
                was saved with.
            step: which; None is the newest complete one whose checksums hold. Newer
                ones that are damaged are named in a warning and renamed to `damaged_*`.

        Raises:
            CheckpointError: there is none; it cannot be read; its leaves differ from
                `like`, naming each missing, extra or mis-shaped leaf; or so do the
                values of frozen ones.
        """
        import orbax.checkpoint as ocp

        self.wait()
        newest = step is None
        step = self._newest_sound() if step is None else step
        if step is None or step not in self.steps():
            raise CheckpointError(
                f"{self.folder} holds no complete checkpoint"
                f"{'' if step is None else f' of step {step}'}; "
                f"complete ones: {self.steps() or 'none'}."
            )
        if (damage := find_damage(self.path(step))) is not None:
            raise CheckpointError(
                f"Cannot read {self.path(step)}: it is damaged: {damage}. Complete "
                f"ones: {self.steps()}."
            )
        if newest and jax.process_index() == 0:
            self._set_aside(step)
        info = self._info(step)
        like, frozen = split_frozen(like)
        wanted = _named_leaves(like)
        self._check_fits(step, info["leaves"], wanted)
        if isinstance(like, TrainState):
            self._check_frozen(step, info.get("frozen"), frozen)
        templates = {
            name: _template(leaf) for name, leaf in wanted.items() if np.size(leaf)
        }
        arrays = {
            name: np.empty(shape, dtype)
            for name, (shape, dtype) in info.get("arrays", {}).items()
        }
        templates |= {_HOST + name: a for name, a in arrays.items() if a.size}
        try:
            stored = self._orbax().restore(
                self.path(step),
                args=ocp.args.Composite(state=ocp.args.StandardRestore(templates)),
            )["state"]
        except _IO_ERRORS as error:
            raise CheckpointError(f"Cannot read {self.path(step)}: {error}") from error
        leaves = [_restored(leaf, stored.get(name)) for name, leaf in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)
        if frozen is not None:
            state = state._replace(frozen=frozen)
        return Restored(
            step=step,
            state=state,
            data=info["data"],
            host_rng=info["host_rng"],
            user=info["user"],
            metrics=info["metrics"],
            arrays={
                name: np.asarray(stored.get(_HOST + name, empty))
                for name, empty in arrays.items()
            },
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        names = (
            _STEP.fullmatch(entry.name)
            for entry in self.folder.iterdir()
            if entry.is_dir() and (entry / "_CHECKPOINT_METADATA").exists()
        )
        return sorted(int(name[1]) for name in names if name)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Step of the one with the lowest `best_metric`, or None if none has it."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def best_metric(self) -> float | None:
        """The lowest `best_metric` among the complete checkpoints, or None."""
        best = self.best()
        return None if best is None else self._info(best)["metrics"][self._best_name]

    def path(self, step: int) -> pathlib.Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / f"step_{step:08d}"

    def close(self) -> None:
        """Finishes saving and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _orbax(self) -> Any:
        if self._checkpointer is None:
            import orbax.checkpoint as ocp

            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._checkpointer

    def _newest_sound(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            damage = find_damage(self.path(step))
            if damage is None:
                return step
            log.warning("%s is damaged and left out: %s.", self.path(step), damage)
        return steps[-1] if steps else None  # all damaged: the newest is complained of

    def _set_aside(self, kept: int) -> None:
        """Renames damaged checkpoints after `kept`, so that none counts as the best."""
        for step in self.steps():
            if step > kept:
                self._infos.pop(step, None)
                aside = self.folder / f"damaged_{step:08d}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)

    def _info(self, step: int) -> dict[str, Any]:
        if step not in self._infos:
            # Read without Orbax, whose reads wait for all processes: only one prunes.
            file = self.path(step) / "info" / "metadata"
            try:
                self._infos[step] = json.loads(file.read_text(encoding="utf-8"))
            except _IO_ERRORS as error:
                raise CheckpointError(f"Cannot read {file}: {error}") from error
        return self._infos[step]

    def _ranked(self) -> list[int]:
        """Steps that have the metric, best first; of equals the earliest."""
        scores = {
            step: self._info(step)["metrics"].get(self._best_name)
            for step in self.steps()
        }
        finite = {s: v for s, v in scores.items() if v is not None and np.isfinite(v)}
        return sorted(finite, key=lambda step: (finite[step], step))

    def _prune(self) -> None:
        if jax.process_index() != 0:
            return
        kept = set(self.steps()[-self._keep_last :])
        kept |= set(self._ranked()[: self._keep_best])
        if self._keep_every is not None:
            kept |= {step for step in self.steps() if step % self._keep_every == 0}
        for step in set(self.steps()) - kept:
            self._infos.pop(step, None)
            # Renamed first: half a deleted checkpoint must not look complete.
            doomed = self.folder / f"removing_{step}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def _remove_unfinished(self) -> None:
        if jax.process_index() != 0:
            return
        for entry in self.folder.iterdir():
            if ".orbax-checkpoint-tmp" in entry.name or re.fullmatch(
                r"removing_\d+", entry.name
            ):
                shutil.rmtree(entry, ignore_errors=True)

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        # The broken checkpointer would raise again for ever.
        self._checkpointer = None
        self._saving = None
        self._remove_unfinished()
        latest = self.latest()
        left = (
            "There is no earlier checkpoint."
            if latest is None
            else f"The last good checkpoint is step {latest}: {self.path(latest)}"
        )
        return CheckpointError(
            f"Saving step {step} to {self.folder} failed: {_cause(error)} {left}"
        )

    def _check_fits(
        self, step: int, stored: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> None:
        problems = [
            f"  {name}: in the checkpoint, not in the tree asked for"
            for name in stored.keys() - wanted.keys()
        ]
        for name, leaf in wanted.items():
            if name not in stored:
                problems.append(f"  {name}: not in the checkpoint")
            elif stored[name] != _describe(leaf):
                has, asked = _show(stored[name]), _show(_describe(leaf))
                problems.append(f"  {name}: stored {has}, asked for {asked}")
        if problems:
            shown = sorted(problems)[:20]
            more = len(problems) - len(shown)
            raise CheckpointError(
                f"The checkpoint {self.path(step)} does not fit the state asked for "
                "(another model, optimizer or method?):\n"
                + "\n".join(shown)
                + (f"\n  ... and {more} more" if more else "")
            )

    def _check_frozen(self, step: int, stored: Any, frozen: Any) -> None:
        found = {} if frozen is None else self._fingerprint(frozen)
        if problems := differences(stored or {}, found):
            more = len(problems) - 20
            raise CheckpointError(
                f"The checkpoint {self.path(step)} was trained beside other frozen "
                "parameters (another base or reference model?):\n"
                + "\n".join(problems[:20])
                + (f"\n  ... and {more} more" if more > 0 else "")
            )


def checkpoint_hashes(
    folder: str | os.PathLike, step: int
) -> tuple[dict[str, str], Any]:
    """SHA-256 of every array of a checkpoint, and its place in the data.

    For comparing two runs: needs no model, and any number of devices will do.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    with Checkpoints(folder) as checkpoints:
        leaves = checkpoints._info(step)["leaves"] if step else {}
        key = jax.random.key(0)
        like = {}
        for name, (shape, dtype) in leaves.items():
            if dtype == str(key.dtype):
                like[name] = jax.ShapeDtypeStruct(tuple(shape), key.dtype)
            else:
                like[name] = np.empty(shape, dtype)
        restored = checkpoints.restore(like, step=step)
    hashes = {}
    for name, leaf in restored.state.items():
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        hashes[name] = hashlib.sha256(np.asarray(data).tobytes()).hexdigest()
    return hashes, restored.data


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by key path, in tree order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {leaf_name(path): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        # Only where a dictionary key holds a slash.
        named = {jax.tree_util.keystr(path): leaf for path, leaf in pairs}
    return named


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> list[Any]:
    """`[shape, dtype]` as JSON values."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return [list(np.shape(leaf)), str(dtype)]


def _show(description: list[Any]) -> str:
    shape, dtype = description
    return f"{dtype}[{','.join(map(str, shape))}]"


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    # The CPU backend may hand Orbax the array's own memory, which the next step, its
    # donated owner, overwrites while it is being written out.
    on_cpu = next(iter(leaf.sharding.device_set)).platform == "cpu"
    return jnp.copy(leaf) if on_cpu else leaf


def _template(leaf: Any) -> Any:
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(data.shape, data.dtype)
    placed = getattr(leaf, "committed", True) and getattr(leaf, "sharding", None)
    if placed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return np.empty(np.shape(leaf), dtype)


def _restored(leaf: Any, stored: Any) -> Any:
    """The stored value as the kind of leaf asked for."""
    if stored is None:  # of size 0: never stored
        stored = np.empty(np.shape(leaf), leaf.dtype)
    if _is_key(leaf):
        wrap = functools.partial(jax.random.wrap_key_data, impl=leaf.dtype._impl)
        placed = getattr(leaf, "committed", True) and getattr(leaf, "sharding", None)
        if not placed:
            return wrap(jnp.asarray(stored))
        # Compiled: it may lie on devices of other hosts, where nothing can be put.
        return jax.jit(wrap, out_shardings=leaf.sharding)(np.asarray(stored))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jnp.asarray(stored)
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(stored)
    return type(leaf)(np.asarray(stored).item())


def _cause(error: Exception) -> str:
    """The system's reason in a word, then TensorStore's own message, shortened."""
    text = " ".join(str(error).split())
    if "No space left" in text or "os_error_code='28'" in text:
        return f"the disk is full: free some space. ({text[-300:]})"
    if "File too large" in text or "os_error_code='27'" in text:
        return f"a file is larger than the limit allows. ({text[-300:]})"
    if "os_error_code='122'" in text or "quota" in text.lower():
        return f"the disk quota is used up. ({text[-300:]})"
    return text[-600:]
