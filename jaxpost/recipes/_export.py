"""Writes a trained model in Hugging Face layout and proves that it reloads."""

import jax
import jax.numpy as jnp

from jaxpost import models, parallel, training, weights
from jaxpost.recipes._run import Run


def export(run: Run, state: training.TrainState, *, method: str) -> None:
    """Saves `run.folder/export`, reloads it, compares logits, writes the receipt.

    Args:
        run: the finished run.
        state: its last state; the moving average is exported if there is one.
        method: for the model card, a sentence.
    """
    params = state.params if state.ema is None else state.ema
    params = parallel.gather_to_hosts(params)
    if jax.process_index() == 0:
        model = run.model.replace(params=jax.tree.map(jnp.asarray, params))
        _write(run, model, method)
    parallel.wait_for_processes("export")


def _write(run: Run, model: models.Model, method: str) -> None:
    """One process's part: files, and the proof that they reload."""
    section = run.config.export
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
    weights.verify_export(model, path, tolerance=1e-3 if stored_exactly else None)
