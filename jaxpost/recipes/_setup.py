"""From the sections of a config to a tokenizer, a model and batches.

The rooms do the work; what is here only reads the config and says what was opened.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, models, ops, parallel, weights
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._sections import (
    DataSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ProcessesSection,
)
from jaxpost.typing import Batch, TokenStats

log = logging.getLogger("jaxpost")

BUILTIN_TOKENIZER = "builtin:words"


@dataclasses.dataclass(frozen=True)
class RowKind:
    """What the rows of a recipe are.

    Fields:
        name: of one of them, for the console.
        load: as `data.load_pairs`: from a source to items.
        pad: as `data.pad_pairs`: from items and lengths to rows. None packs or pads
            single texts, as the config says; else an item has several `texts`.
        joined: whether batches hold the texts of a row in one, their prompt only once
            (`data.join_answers`).
        answered: False for prompts, whose answers are yet to be drawn.
    """

    name: str
    load: Callable[..., list[Any]]
    pad: Callable[..., list[data.TokenRow]] | None = None
    joined: bool = False
    answered: bool = True


TEXTS = RowKind("example", data.load_examples)
PAIRS = RowKind("pair", data.load_pairs, data.pad_pairs, joined=True)
PROMPTS = RowKind("prompt", data.load_prompts, data.number_prompts, answered=False)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token examples of a run.

    Fields:
        train, eval: examples, pairs, ... in the order of their sources.
        bad_rows: what was skipped, by reason.
        fingerprints: sha256 by source, for `environment.json`.
    """

    train: list[Any]
    eval: list[Any]
    bad_rows: data.BadRows
    fingerprints: dict[str, str]

    @staticmethod
    def texts(items: list[Any]) -> list[data.Example]:
        """Single texts: the examples, or all answers of each pair, chosen first."""
        return [text for item in items for text in texts_of(item)]


def texts_of(item: Any) -> tuple[data.Example, ...]:
    """The texts of an item, the one to learn first."""
    return (item,) if isinstance(item, data.Example) else item.texts


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run's arrays live.

    Fields:
        mesh: the devices; None is the default device alone.
        rules: from logical axes to mesh axes.
    """

    mesh: jax.sharding.Mesh | None = None
    rules: parallel.Rules = dataclasses.field(default_factory=dict)

    @property
    def batch_parts(self) -> int:
        """How many devices hold different rows of a batch."""
        if self.mesh is None:
            return 1
        split = parallel.batch_sharding(self.mesh, self.rules)
        return self.mesh.size // split.shard_shape((self.mesh.size,))[0]

    @property
    def token_logps(self) -> Callable[..., TokenStats]:
        """`ops.linear_token_logps` for arrays that lie on these devices."""
        return parallel.split_vocabulary(ops.linear_token_logps, self.mesh, self.rules)

    @property
    def lookup(self) -> parallel.Lookup | None:
        """Rows of an embedding that lies on these devices, for `Model.with_lookup`."""
        return parallel.split_lookup(self.mesh, self.rules)

    @property
    def batch_share(self) -> tuple[int, int]:
        """Which slice of each batch this process reads, of how many slices.

        Processes that hold parts of the same rows read the same slice.
        """
        if self.mesh is None or jax.process_count() == 1:
            return 0, 1
        parts = self.batch_parts
        split = parallel.batch_sharding(self.mesh, self.rules)
        mine = split.addressable_devices_indices_map((parts,)).values()
        numbers = sorted(
            {(part or (slice(None),))[0].indices(parts)[0] for part in mine}
        )
        first, count = numbers[0], len(numbers)
        if numbers != list(range(first, first + count)) or first % count:
            raise ConfigError(
                f"process {jax.process_index()} would hold parts {numbers} of {parts} "
                "of each batch, which do not lie side by side; name the mesh axes of "
                "mesh.rules' batch in the order data, fsdp."
            )
        return first // count, parts // count

    @property
    def devices(self) -> int:
        """How many devices compute."""
        return 1 if self.mesh is None else self.mesh.size

    def count_tokens(self, batch: Batch) -> int:
        """Tokens that are not padding in the global batch, taken to be spread evenly
        over the slices."""
        return int(np.count_nonzero(batch["segment_ids"])) * self.batch_share[1]

    def place_batch(self, batch: Batch) -> Batch:
        """Splits this process's slice of a batch over the mesh axes of "batch"."""
        if self.mesh is None:
            return dict(batch)
        split = parallel.batch_sharding(self.mesh, self.rules)
        if jax.process_count() == 1:
            return parallel.place(dict(batch), split)
        return jax.tree.map(
            lambda part: jax.make_array_from_process_local_data(split, part),
            dict(batch),
        )

    def state_shardings(self, state: Any, config: models.DecoderConfig) -> Any:
        """Shardings of a training state, or None on one device.

        Leaves are found by their paths, so `state.params` may be any part of the
        model's parameters.
        """
        if self.mesh is None:
            return None
        shapes = models.build(config, abstract=True).params
        placement = parallel.shardings(
            models.param_axes(config), self.mesh, self.rules, shapes=shapes
        )
        return parallel.shardings_like(state, shapes, placement)

    def axes_shardings(self, axes: Any, shapes: Any) -> Any:
        """Shardings of arrays by their logical axes, or None on one device."""
        if self.mesh is None:
            return None
        return parallel.shardings(axes, self.mesh, self.rules, shapes=shapes)


def join_processes(section: ProcessesSection) -> None:
    """Joins the other hosts of the run, once and before JAX looks for devices.

    Raises:
        MissingProcessError: another process did not come in time.
        ConfigError: both an address and `auto`, or several processes without either.
    """
    if section.auto and section.coordinator is not None:
        raise ConfigError("give processes.coordinator or processes.auto, not both.")
    if section.count > 1 and section.coordinator is None:
        raise ConfigError(
            f"processes.count is {section.count}, but processes.coordinator is not "
            "given: the host and a free port of process 0."
        )
    if jax.distributed.is_initialized():
        return
    if section.auto:
        jax.distributed.initialize(
            initialization_timeout=max(int(section.deadline_s), 1)
        )
    elif section.coordinator is not None:
        parallel.start_processes(
            section.coordinator,
            section.count,
            section.index,
            deadline_s=section.deadline_s,
        )


def open_layout(section: MeshSection, batch_rows: int) -> Layout:
    """Arranges all devices as the config says.

    Args:
        section: the mesh of the config.
        batch_rows: rows that are placed together, a microbatch.

    Raises:
        ConfigError: a rule that names no axis, or rows that the mesh does not divide.
        ValueError: the mesh does not fit the number of devices.
    """
    shape = {"data": section.data, "fsdp": section.fsdp, "tensor": section.tensor}
    devices = jax.devices()
    if section.devices is not None and not 1 <= section.devices <= len(devices):
        raise ConfigError(
            f"mesh.devices is {section.devices}, but there are {len(devices)} devices."
        )
    if section.devices is not None and jax.process_count() > 1:
        raise ConfigError("mesh.devices cannot be given with several processes.")
    mesh = parallel.make_mesh(shape, devices=devices[: section.devices])
    rules = read_rules(section)
    if mesh.size == 1:
        return Layout()
    layout = Layout(mesh, rules)
    parts = layout.batch_parts
    if batch_rows % parts:
        below = max(batch_rows // parts, 1) * parts
        raise ConfigError(
            f"train.batch_size / train.accumulate is {batch_rows} rows, which do not "
            f"divide over the {parts} devices of the batch; the nearest that works is "
            f"{below} rows."
        )
    return layout


def read_rules(section: MeshSection) -> dict[str, tuple[str, ...]]:
    """`mesh.rules` of the config, with each rule's axes apart.

    Raises:
        ConfigError: a name that is no logical axis or no mesh axis.
    """
    return {name: _mesh_axes(name, text) for name, text in section.rules.items()}


def _mesh_axes(name: str, text: str) -> tuple[str, ...]:
    """`data+fsdp` as a tuple; `none` is no axis."""
    if name not in parallel.RULES:
        raise ConfigError(
            f"mesh.rules names the logical axis {name!r}; known are "
            f"{', '.join(sorted(parallel.RULES))}."
        )
    axes = tuple(part for part in text.split("+") if part != "none")
    for axis in axes:
        if axis not in parallel.AXES:
            raise ConfigError(
                f"mesh.rules gives {name!r} the mesh axis {axis!r}; known are "
                f"{', '.join(parallel.AXES)}, joined by +, or none."
            )
    return axes


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


def fresh_config(section: ModelSection, vocab_size: int) -> models.DecoderConfig:
    """What a fresh model of the config's sizes is."""
    return models.DecoderConfig(
        family=section.family,
        vocab_size=vocab_size,
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


def open_model(
    section: ModelSection,
    tokenizer: data.Tokenizer,
    key: jax.Array,
    *,
    layout: Layout | None = None,
) -> models.Model:
    """Loads or makes the model on its devices, master weights in float32.

    Raises:
        ValueError: the tokenizer has more ids than the model has embedding rows.
    """
    layout = layout or Layout()
    placed = {"mesh": layout.mesh, "rules": layout.rules}
    if section.path is not None:
        model = weights.load(section.path, dtype=jnp.float32, **placed)
        data.check_vocab(tokenizer, model.config.vocab_size)
        config = dataclasses.replace(model.config, remat=section.remat)
        return dataclasses.replace(model, config=config)
    config = fresh_config(section, tokenizer.vocab_size)
    return models.build(config, key, **placed)


def open_lora(
    section: LoraSection | None,
    model: models.Model,
    key: jax.Array,
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> models.Model:
    """The model with the adapters that the config asks for, or itself.

    The base is cast to `dtype`, the compute dtype: it is never updated, so it needs no
    wider master weights. A score head, which is trained whole, stays wide.
    """
    if section is None or section.rank == 0:
        return model
    layout = layout or Layout()
    head, base = models.split_trained(model.params)
    params = ops.join_trees(models.cast_params(base, dtype), head)
    model = model.replace(params=params)
    if section.quantize != "none":
        model = models.quantize_base(model, section.quantize)
    lora = models.LoraConfig(
        rank=section.rank, alpha=section.alpha, targets=section.targets
    )
    return models.add_lora(model, lora, key, mesh=layout.mesh, rules=layout.rules)


def open_head(
    head: Literal["vocabulary", "score"],
    model: models.Model,
    key: jax.Array,
    *,
    layout: Layout | None = None,
) -> models.Model:
    """The model with the head that a recipe needs: a fresh score head if it has none.

    Raises:
        ConfigError: a model that scores texts, for a recipe that needs a vocabulary.
    """
    if model.config.head == head:
        return model
    if head == "vocabulary":
        raise ConfigError(
            "model.path holds a reward model, which scores texts and has no output "
            "over the vocabulary; choose a language model."
        )
    layout = layout or Layout()
    return models.add_score_head(model, key, mesh=layout.mesh, rules=layout.rules)


def compute_dtype(section: ModelSection) -> jnp.dtype:
    """The dtype of activations and products that the config asks for."""
    if section.compute_dtype == "auto":
        on_cpu = jax.default_backend() == "cpu"
        return jnp.dtype("float32" if on_cpu else "bfloat16")
    return jnp.dtype(section.compute_dtype)


def open_examples(
    section: DataSection, tokenizer: data.Tokenizer, kind: RowKind = TEXTS
) -> Examples:
    """Reads and tokenises the rows of the config; held-out rows are the last ones.

    Raises:
        BadRow: a row cannot be used and `on_bad_row` is `stop`.
        ConfigError: so many rows are held out that none is left; or `loss_on` is set
            for pairs and the like, of which the answers are scored.
    """
    report = data.BadRows(emit=log.warning)
    options = encoding(section)
    if kind.pad is not None:
        loss_on = options.pop("loss_on")
        if loss_on != "auto":
            raise ConfigError(
                f"data.loss_on is {loss_on!r}, but of a {kind.name} the answers are "
                "scored; leave it out."
            )

    def load(of_eval: bool) -> list[Any]:
        return kind.load(
            tokenizer=tokenizer,
            report=report,
            **reading(section, of_eval=of_eval),
            **options,
        )

    train = load(of_eval=False)
    fingerprints = {
        section.train: data.fingerprint(section.train, split=section.train_split)
    }
    held_out: list[Any] = []
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
    examples: list[Any],
    section: DataSection,
    tokenizer: data.Tokenizer,
    kind: RowKind = TEXTS,
) -> list[data.TokenRow]:
    """Packed rows, or padded ones in a few lengths (each is one compiled program).

    Pairs and the like are padded: all answers in one row, `[2, T]`.
    """
    lengths = {section.max_length, section.max_length // 2, section.max_length // 4}
    if kind.pad is not None:
        return kind.pad(examples, sorted(lengths - {0, 1}), pad_id=tokenizer.pad_id)
    if section.packing:
        return data.pack(examples, section.max_length, pad_id=tokenizer.pad_id)
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
    names = ("text", "messages", "prompt", "completion", "chosen", "rejected")
    values = [row.columns.get(name) for name in names]
    negatives = row.columns.get("negatives")
    for value in [*values, *(negatives if isinstance(negatives, list) else ())]:
        if isinstance(value, str):
            yield value
        else:
            for message in value or ():
                yield str(message.get("content") or "")
