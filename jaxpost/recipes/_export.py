"""Writes a trained model in Hugging Face layout and proves that it reloads."""

import jax
import jax.numpy as jnp

from jaxpost import training, weights
from jaxpost.recipes._run import Run


def export(
    run: Run, state: training.TrainState, *, method: str
) -> weights.ExportReport:
    """Saves `run.folder/export`, reloads it and compares logits.

    Args:
        run: the finished run.
        state: its last state; the moving average is exported if there is one.
        method: for the model card, a sentence.

    Returns:
        The receipt, also written as `export_report.json`.
    """
    section = run.config.export
    params = state.params if state.ema is None else state.ema
    model = run.model.replace(params=jax.tree.map(jnp.asarray, params))
    path = run.folder.path / "export"
    sources = run.examples.fingerprints
    card = weights.ModelCard(
        title=run.config.name,
        licence=section.license or "other",
        data={name: "see its source" for name in sources},
        method=method,
        base_model=run.config.model.path,
    )
    weights.save(
        model,
        path,
        tokenizer=run.tokenizer,
        dtype=jnp.dtype(section.dtype),
        max_shard_bytes=section.max_shard_bytes,
        card=card,
    )
    stored_exactly = section.dtype == "float32"
    return weights.verify_export(
        model, path, tolerance=1e-3 if stored_exactly else None
    )
