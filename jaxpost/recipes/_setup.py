"""From the sections of a config to a tokenizer, a model and batches.

The rooms do the work; what is here only reads the config and says what was opened.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import data, models, weights
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._sections import DataSection, ModelSection

log = logging.getLogger("jaxpost")

BUILTIN_TOKENIZER = "builtin:words"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token examples of a run.

    Fields:
        train, eval: examples, in the order of their sources.
        bad_rows: what was skipped, by reason.
        fingerprints: sha256 by source, for `environment.json`.
    """

    train: list[data.Example]
    eval: list[data.Example]
    bad_rows: data.BadRows
    fingerprints: dict[str, str]


def open_tokenizer(model: ModelSection, section: DataSection) -> data.Tokenizer:
    """The tokenizer that the config names.

    Raises:
        ConfigError: neither a tokenizer nor a model is named.
    """
    name = model.tokenizer or model.path
    if name is None:
        raise ConfigError(
            "model.tokenizer must be given for a fresh model: a folder, a hub name, or "
            f"{BUILTIN_TOKENIZER!r} to train one on the rows."
        )
    if name == BUILTIN_TOKENIZER:
        texts = [
            text for row in data.load_rows(**reading(section)) for text in _texts(row)
        ]
        return data.train_word_tokenizer(texts)
    return data.load_tokenizer(
        name, chat_template=section.chat_template, eos_tokens=section.eos_tokens
    )


def open_model(
    section: ModelSection,
    tokenizer: data.Tokenizer,
    key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> models.Model:
    """Loads or makes the model, master weights in float32.

    Raises:
        ValueError: the tokenizer has more ids than the model has embedding rows.
    """
    if section.path is not None:
        model = weights.load(section.path, dtype=jnp.float32, mesh=mesh)
        data.check_vocab(tokenizer, model.config.vocab_size)
        config = dataclasses.replace(model.config, remat=section.remat)
        return dataclasses.replace(model, config=config)
    config = models.DecoderConfig(
        family=section.family,
        vocab_size=tokenizer.vocab_size,
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_layers=section.num_layers,
        num_heads=section.num_heads,
        num_kv_heads=section.num_kv_heads,
        head_dim=section.head_dim or section.hidden_size // section.num_heads,
        max_positions=section.max_positions,
        tie_embeddings=section.tie_embeddings,
        qk_norm=section.family == "qwen3",
        attention_bias=section.family == "qwen2",
        remat=section.remat,
    )
    return models.build(config, key, mesh=mesh)


def compute_dtype(section: ModelSection) -> jnp.dtype:
    """The dtype of activations and products that the config asks for."""
    if section.compute_dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        return jnp.dtype("float32" if on_cpu else "bfloat16")
    return jnp.dtype(section.compute_dtype)


def open_examples(section: DataSection, tokenizer: data.Tokenizer) -> Examples:
    """Reads and tokenises the rows of the config; held-out rows are the last ones.

    Raises:
        BadRow: a row cannot be used and `on_bad_row` is `stop`.
        ConfigError: so many rows are held out that none is left.
    """
    report = data.BadRows(emit=log.warning)

    def load(of_eval: bool) -> list[data.Example]:
        return data.load_examples(
            tokenizer=tokenizer,
            report=report,
            **reading(section, of_eval=of_eval),
            **encoding(section),
        )

    train = load(of_eval=False)
    fingerprints = {
        section.train: data.fingerprint(section.train, split=section.train_split)
    }
    held_out: list[data.Example] = []
    if section.eval is not None:
        held_out = load(of_eval=True)
        fingerprints[f"{section.eval} (eval)"] = data.fingerprint(
            section.eval, split=section.eval_split
        )
    elif section.eval_rows:
        if section.eval_rows >= len(train):
            raise ConfigError(
                f"data.eval_rows holds out {section.eval_rows} of {len(train)} usable "
                "rows, which leaves none to train on; lower it."
            )
        train, held_out = train[: -section.eval_rows], train[-section.eval_rows :]
    return Examples(train, held_out, report, fingerprints)


def token_rows(
    examples: list[data.Example], section: DataSection, tokenizer: data.Tokenizer
) -> list[data.TokenRow]:
    """Packed rows, or padded ones in a few lengths (each is one compiled program)."""
    if section.packing:
        return data.pack(examples, section.max_length, pad_id=tokenizer.pad_id)
    lengths = {section.max_length, section.max_length // 2, section.max_length // 4}
    return data.pad(examples, sorted(lengths - {0}), pad_id=tokenizer.pad_id)


def reading(section: DataSection, *, of_eval: bool = False) -> dict[str, Any]:
    """Keyword arguments of `data.load_rows` for the rows that the config names."""
    return {
        "path_or_name": section.eval if of_eval else section.train,
        "split": section.eval_split if of_eval else section.train_split,
        "columns": section.columns,
        "format": section.format,
        "on_bad_row": section.on_bad_row,
        "limit": None if of_eval else section.max_rows,
        "prompt_suffix": section.prompt_suffix,
    }


def encoding(section: DataSection) -> dict[str, Any]:
    """Keyword arguments of `data.encode_row` that the config names."""
    return {
        "max_length": section.max_length,
        "loss_on": section.loss_on,
        "on_too_long": section.on_too_long,
    }


def _texts(row: data.Row) -> Iterator[str]:
    for name in ("text", "prompt", "completion"):
        if isinstance(value := row.columns.get(name), str):
            yield value
    for message in row.columns.get("messages") or ():
        yield str(message.get("content") or "")
