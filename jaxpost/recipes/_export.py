"""Writes a trained model in Hugging Face layout and proves that it reloads."""

import jax
import jax.numpy as jnp

from jaxpost import models, parallel, training, weights
from jaxpost.recipes._run import Run

SCORING = "text-classification"


def export(run: Run, state: training.TrainState, *, method: str) -> None:
    """Saves `run.folder/export`, reloads it, compares logits, writes the receipt.

    A model with adapters is exported with them merged in, or as its adapters alone to
    `run.folder/adapter`, or both, as `export.lora` says.

    Args:
        run: the finished run.
        state: its last state; the moving average is exported if there is one.
        method: for the model card, a sentence.
    """
    params = parallel.gather_to_hosts(run.model_params(state))

    def write() -> None:
        model = run.model.replace(params=jax.tree.map(jnp.asarray, params))
        chosen = run.config.export.lora
        if model.config.lora is not None and chosen in ("adapter", "both"):
            _write_adapter(run, model)
        if model.config.lora is None:
            _write(run, model, method)
        elif chosen in ("merged", "both"):
            merged = models.merge_lora(model)
            # In float32, so that it computes as its reload does.
            wide = models.cast_params(merged.params, jnp.float32)
            _write(run, merged.replace(params=wide), method)

    parallel.on_first_process("export", write)


def _write_adapter(run: Run, model: models.Model) -> None:
    """The adapters alone, which must come back from the folder as they were."""
    path = run.folder.path / "adapter"
    weights.save_adapter(model, path, base_name=run.config.model.path)
    reloaded = weights.load_adapter(models.without_lora(model), path)
    pairs = (models.split_trained(m.params)[0] for m in (model, reloaded))
    if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, *pairs))):
        raise weights.WeightsError(f"{path} does not reload as it was saved.")


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
        task="text-generation" if model.config.head == "vocabulary" else SCORING,
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
