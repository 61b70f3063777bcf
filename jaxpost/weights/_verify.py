"""The receipt of an export: reload it, compare logits, write what was found.

A model with a score head has one logit per sequence, its score.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models, ops
from jaxpost.weights._atomic import replace_file
from jaxpost.weights._errors import WeightsError
from jaxpost.weights._load import load
from jaxpost.weights._save import REPORT_NAME
from jaxpost.weights._source import open_folder
from jaxpost.weights._special import special_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export_report.json` holds.

    Fields:
        path: the folder, as it was given.
        family: of the model.
        tensors, parameters: how many the files hold.
        total_bytes: size of all weight files.
        dtypes: stored data types.
        probe_tokens: how many tokens the logits were compared on.
        max_logit_difference: between the model in memory and the reloaded one.
        max_logit: largest logit of the model in memory, for scale.
        transformers_used: whether transformers and torch read the folder too.
        transformers_max_logit_difference: between their logits and the reloaded
            model's, both in float32; None if they were not used.
        versions: of the libraries involved.
    """

    path: str
    family: str
    tensors: int
    parameters: int
    total_bytes: int
    dtypes: tuple[str, ...]
    probe_tokens: int
    max_logit_difference: float
    max_logit: float
    transformers_used: bool
    transformers_max_logit_difference: float | None
    versions: dict[str, str]


def verify_export(
    model: models.Model,
    path: str | os.PathLike[str],
    *,
    probe_tokens: np.ndarray | None = None,
    tolerance: float | None = 1e-3,
    with_transformers: bool | None = None,
) -> ExportReport:
    """Reload an export, compare its logits with the model's, write the report.

    Args:
        model: what was saved.
        path: where it was saved; `export_report.json` is written there.
        probe_tokens: int32 `[B, T]` to compare on; None takes a fixed draw of ids.
        tolerance: largest logit difference that passes; None only records it. An
            export to a narrower dtype differs by rounding.
        with_transformers: also read the folder with transformers on torch; None does
            so if torch is installed.

    Returns:
        The report.

    Raises:
        WeightsError: the folder does not load, or its logits differ by more than
            `tolerance`; the report is written all the same in the latter case.
    """
    folder = pathlib.Path(path)
    if probe_tokens is None:
        probe_tokens = _probe(model.config)
    reloaded, pad_id = load(folder), special_ids(folder).pad
    if model.config.head == "score":
        probe_tokens = _padded(probe_tokens, pad_id, model.config.vocab_size)
    expected = _logits(model, probe_tokens, pad_id)
    found = _logits(reloaded, probe_tokens, pad_id)
    if with_transformers is None:
        with_transformers = importlib.util.find_spec("torch") is not None
    theirs = None
    if with_transformers:
        wide = reloaded.replace(
            params=jax.tree.map(lambda x: x.astype(jnp.float32), reloaded.params)
        )
        other = _transformers_logits(folder, probe_tokens, reloaded.config.head)
        theirs = _difference(_logits(wide, probe_tokens, pad_id), other)
    with open_folder(folder) as source:
        names = list(source.shapes)
        report = ExportReport(
            path=str(path),
            family=model.config.family,
            tensors=len(names),
            parameters=sum(int(np.prod(source.shapes[name])) for name in names),
            total_bytes=sum(
                os.path.getsize(file) for file in {source.place(name) for name in names}
            ),
            dtypes=tuple(sorted({source.dtype(name).name for name in names})),
            probe_tokens=int(probe_tokens.size),
            max_logit_difference=_difference(expected, found),
            max_logit=float(np.max(np.abs(expected))),
            transformers_used=with_transformers,
            transformers_max_logit_difference=theirs,
            versions=_versions(with_transformers),
        )
    text = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
    replace_file(folder / REPORT_NAME, text)
    _judge(report, tolerance)
    return report


def _judge(report: ExportReport, tolerance: float | None) -> None:
    if tolerance is None:
        return
    for what, difference in (
        ("the model in memory", report.max_logit_difference),
        ("transformers", report.transformers_max_logit_difference),
    ):
        # Written so that a NaN fails too.
        if difference is not None and not difference <= tolerance:
            raise WeightsError(
                f"{report.path}: logits of the reloaded export differ from those of "
                f"{what} by {difference:.3g}, more than {tolerance:.3g}."
            )


def _probe(config: models.DecoderConfig) -> np.ndarray:
    length = min(16, config.max_positions)
    draw = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    return draw.astype(np.int32)


def _padded(tokens: np.ndarray, pad_id: int | None, vocab_size: int) -> np.ndarray:
    """The same rows, every second one cut short and filled up at the right."""
    if pad_id is None:
        raise WeightsError(
            "config.json of a sequence classifier needs a pad_token_id: its score is "
            "read at the last token that is not padding."
        )
    tokens = np.where(tokens == pad_id, (pad_id + 1) % vocab_size, tokens)
    tokens[1::2, tokens.shape[1] // 2 :] = pad_id
    return tokens.astype(np.int32)


def _logits(model: models.Model, tokens: np.ndarray, pad_id: int | None) -> np.ndarray:
    """`[B, T, V]`, or scores `[B, 1]`."""
    batch = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(
        jnp.arange(batch.shape[1], dtype=jnp.int32)[None, :], batch.shape
    )
    if model.config.head == "vocabulary":
        hidden = model.apply(model.params, batch, positions).hidden
        return np.asarray(ops.logits(hidden, model.unembed(model.params)))
    real = batch != pad_id
    hidden = model.apply(model.params, batch, positions, real.astype(jnp.int32)).hidden
    return np.asarray(models.scores(model.params, ops.last_token(hidden, real)))[
        :, None
    ]


def _transformers_logits(
    folder: pathlib.Path, tokens: np.ndarray, head: str
) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports] (extra `parity`)
    import transformers

    kinds: dict[str, Any] = {
        "vocabulary": transformers.AutoModelForCausalLM,
        "score": transformers.AutoModelForSequenceClassification,
    }
    model: Any = kinds[head].from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    options = {}
    if head == "score":
        options["attention_mask"] = (ids != model.config.pad_token_id).long()
    with torch.no_grad():
        return model(ids, **options).logits.numpy()


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first.astype(np.float64) - second)))


def _versions(with_transformers: bool) -> dict[str, str]:
    names = ["jaxpost", "jax", "numpy"]
    names += ["torch", "transformers"] if with_transformers else []
    return {name: importlib.metadata.version(name) for name in names}
