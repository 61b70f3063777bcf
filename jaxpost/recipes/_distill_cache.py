"""What a teacher said of each example, in a file: its most likely tokens and the rest.

Entries are by example: an id of its tokens and of which of them are trained on, so that
packing, order and shape of the rows may change. The file has a fingerprint of all else
that it depends on, and is refused by name if that changed.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, ops, parallel
from jaxpost.recipes import _fingerprinted, _reference
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._distill_teacher import (
    COLUMNS,
    TeacherSection,
    common_vocabulary,
    cut_head,
    open_teacher,
    split_over,
)
from jaxpost.recipes._run import Run

FILE = "teacher.npz"


class StaleTeacherError(ConfigError):
    """A cache is of another teacher, tokenizer, template, setting or data."""


class Cache(NamedTuple):
    """What was said, of all examples one after another.

    Fields:
        ids: most likely tokens, int32 `[n, K]`.
        logps, tail: their log-probabilities and that of all others, float32 `[n, K]`
            and `[n]`, nats.
        places: first and one past the last entry of an example, by its id.
    """

    ids: np.ndarray
    logps: np.ndarray
    tail: np.ndarray
    places: dict[int, tuple[int, int]]


def with_cached_teacher(
    run: Run, section: TeacherSection, *, temperature: float
) -> Run:
    """The run with the teacher's words in its rows, from a file or computed now.

    Args:
        run: not trained yet.
        section: names the file, the teacher (left out: the file's is not compared with
            any), and how many tokens.
        temperature: divides the teacher's logits.

    Raises:
        StaleTeacherError: the file was made with something else; names what.
        ConfigError: the file is missing and no teacher is named, or it is damaged.
    """
    file = pathlib.Path(section.cache or run.folder.path / FILE)
    teacher = None if section.path is None else open_teacher(run, section)
    wanted = fingerprint(run, teacher, section, temperature)
    cache = _fingerprinted.read_together(
        file, wanted, _cache, what="a teacher's cache", stale=StaleTeacherError
    )
    if cache is None:
        if teacher is None:
            raise ConfigError(
                f"{file}: no such cache of a teacher; give teacher.path to make it."
            )
        cache = _compute(run, teacher, section, temperature)
        arrays = _arrays(cache)
        parallel.on_first_process(
            "teacher's cache",
            lambda: _fingerprinted.write_arrays(file, arrays, wanted),
        )
    if cache.ids.size and cache.ids.max() >= run.model.config.vocab_size:
        raise ConfigError(
            f"{file}: has the token {cache.ids.max()}, but the student's head only "
            f"{run.model.config.vocab_size}; use a student of the same vocabulary."
        )
    rows = [*run.rows, *run.eval_rows]
    _check_complete(file, cache, rows)
    return run.with_rows(
        *([_extended(row, cache) for row in part] for part in (run.rows, run.eval_rows))
    )


def fingerprint(
    run: Run,
    teacher: models.Model | None,
    section: TeacherSection,
    temperature: float,
) -> dict[str, str]:
    """What a cache depends on but for the examples; without a teacher, not on it."""
    model = run.model if teacher is None else teacher
    found = _reference.fingerprint(dataclasses.replace(run, model=model), [])
    about = {name: found[name] for name in ("tokenizer", "chat template")}
    if teacher is not None:
        vocab = common_vocabulary(run, teacher)
        about["teacher"] = f"{found['model']} {vocab}"
    return about | {"top_k": str(section.top_k), "temperature": repr(temperature)}


def examples_of(row: data.TokenRow) -> Iterator[tuple[int, np.ndarray]]:
    """The id of each example of a row, and its positions before a trained token."""
    segments, tokens, mask = (
        row[name] for name in ("segment_ids", "tokens", "loss_mask")
    )
    for segment in range(1, int(segments.max(initial=0)) + 1):
        (places,) = np.nonzero(segments == segment)
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(tokens[places], np.int32).data)
        digest.update(np.ascontiguousarray(mask[places]).data)
        trained = places[mask[places]]
        yield int.from_bytes(digest.digest(), "big") >> 1, trained - 1


def _arrays(cache: Cache) -> dict[str, np.ndarray]:
    return {
        "ids": cache.ids,
        "logps": cache.logps,
        "tail": cache.tail,
        "example_id": np.array(list(cache.places), np.int64),
        "places": np.array(list(cache.places.values()), np.int64).reshape(-1, 2),
    }


def _cache(stored: Mapping[str, np.ndarray]) -> Cache:
    """What `_arrays` took apart."""
    places = [(int(a), int(b)) for a, b in stored["places"]]
    found = dict(zip(stored["example_id"].tolist(), places, strict=True))
    return Cache(stored["ids"], stored["logps"], stored["tail"], found)


def _compute(
    run: Run, teacher: models.Model, section: TeacherSection, temperature: float
) -> Cache:
    """One pass of the teacher over the training and held-out rows."""
    assert section.top_k is not None
    rows, top_k = [*run.rows, *run.eval_rows], section.top_k
    vocab = common_vocabulary(run, teacher)
    if top_k > vocab:
        raise ConfigError(f"teacher.top_k is {top_k}, but there are {vocab} tokens.")
    reader = teacher.with_lookup(run.layout.lookup)

    def top(heads, arrays, *, vocab_axis) -> ops.Support:
        hidden, mask = arrays
        return ops.linear_top_logps(
            hidden,
            heads[0],
            top_k,
            mask=mask,
            temperature=temperature,
            vocab_axis=vocab_axis,
        )

    split_top = split_over(run.layout)(top)

    @jax.jit
    def read(params, batch):
        hidden = reader.apply(
            params, batch["tokens"], batch["positions"], batch["segment_ids"]
        ).hidden
        _, mask = ops.shift_targets(batch["tokens"], batch["loss_mask"])
        found = split_top((cut_head(reader.unembed(params), vocab),), (hidden, mask))
        names = ("segment_ids", "tokens", "loss_mask")
        return {name: batch[name] for name in names}, found._replace(
            logps=found.logps.astype(jnp.float32), tail=found.tail.astype(jnp.float32)
        )

    compiled = parallel.compile_together(read)
    parts = run.layout.batch_parts
    size = run.config.train.batch_size // run.config.train.accumulate
    size = min(size, -(-len(rows) // parts) * parts)
    batches = run.batches_of(rows, size, shuffle=False, drop_remainder=False, epochs=1)
    pieces: dict[int, tuple[np.ndarray, ...]] = {}
    for batch in batches:
        result = compiled(teacher.params, run.layout.place_batch(batch))
        arrays, found = jax.device_get(parallel.gather_to_hosts(result))
        for place in range(len(arrays["tokens"])):
            row = {name: array[place] for name, array in arrays.items()}
            for id, at in examples_of(row):
                pieces[id] = tuple(x[place][at] for x in found)
    return _joined(pieces)


def _joined(pieces: dict[int, tuple[np.ndarray, ...]]) -> Cache:
    bad = [id for id, piece in pieces.items() if np.isnan(piece[1]).any()]
    if bad:
        raise ConfigError(
            f"the teacher gives log-probs that are not numbers to {len(bad)} of "
            f"{len(pieces)} examples; check its weights."
        )
    ends = np.cumsum([len(piece[0]) for piece in pieces.values()]).tolist()
    ids, logps, tail = map(np.concatenate, zip(*pieces.values(), strict=True))
    starts = [0, *ends[:-1]]
    places = dict(zip(pieces, zip(starts, ends, strict=True), strict=True))
    return Cache(ids, logps, tail, places)


def _check_complete(
    file: pathlib.Path, cache: Cache, rows: Sequence[data.TokenRow]
) -> None:
    ids = [id for row in rows for id, _ in examples_of(row)]
    missing = sum(id not in cache.places for id in ids)
    if missing:
        raise StaleTeacherError(
            f"{file}: stale, as it was made with other data: {missing} of {len(ids)} "
            "examples are not in it; delete the file to compute it anew."
        )


def _extended(row: data.TokenRow, cache: Cache) -> data.TokenRow:
    """The row with the teacher's words before each trained token, zeros elsewhere."""
    shape = (*row["tokens"].shape, cache.ids.shape[1])
    columns = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape[:-1], np.float32),
    )
    for id, at in examples_of(row):
        start, end = cache.places[id]
        for column, stored in zip(columns, cache[:3], strict=True):
            column[at] = stored[start:end]
    return row | dict(zip(COLUMNS, columns, strict=True))
