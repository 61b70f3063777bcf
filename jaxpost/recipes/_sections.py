"""Sections that the configs of several recipes share, as frozen dataclasses."""

import dataclasses
from typing import Literal

from jaxpost import models


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Which model to train.

    Attributes:
        path: Folder or hub name of a model in Hugging Face layout; none makes a fresh
            one from the sizes below.
        tokenizer: Folder or hub name of the tokenizer; `path` if not given.
        compute_dtype: Of activations and matrix products; `auto` is float32 on CPU and
            bfloat16 on accelerators. Master weights and moments stay float32.
        remat: What the backward pass recomputes: nothing, all but matrix products, or
            whole layers.
        family: Architecture of a fresh model.
        hidden_size: Width D of a fresh model.
        intermediate_size: Feed-forward width F of a fresh model.
        num_layers: Layers L of a fresh model.
        num_heads: Query heads N of a fresh model.
        num_kv_heads: Key/value heads K of a fresh model.
        head_dim: Head width H of a fresh model; D / N if not given.
        max_positions: Longest sequence of a fresh model, tokens.
        tie_embeddings: Use the embedding as output projection in a fresh model.
    """

    path: str | None = None
    tokenizer: str | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"] = "llama"
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int | None = None
    max_positions: int = 1024
    tie_embeddings: bool = True


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Train low-rank adapters beside a frozen base; see docs/training.md.

    Attributes:
        rank: Of the adapters; 0 trains the whole model instead.
        alpha: The adapters' part is multiplied by alpha / rank.
        targets: Which matrix products have one: q, k, v, o, gate, up, down (or Hugging
            Face's q_proj, ...), or all-linear.
        quantize: How the base's kernels are held; int8 and nf4 need the extra `quant`.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)
    quantize: Literal["none", "int8", "nf4"] = "none"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}.")
        if self.rank == 0 and self.quantize != "none":
            raise ValueError(
                f"quantize is {self.quantize}, but rank is 0: a quantised model cannot "
                "be trained whole; set rank."
            )
        if self.rank:
            models.LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Which rows to train on, and how they become tokens.

    Attributes:
        train: File (.jsonl, .jsonl.gz, .parquet), hub name, or `builtin:arithmetic`.
        train_split: Of built-in and hub data; `train` if not given.
        eval: Held-out rows in the same form; none holds out rows of `train`.
        eval_split: Of built-in and hub data.
        eval_rows: How many rows of `train` to hold out (the last ones) if `eval` is
            none; 0 evaluates nothing.
        max_rows: Read at most this many rows of `train`.
        format: Layout of the rows: TRL's columns, or one that is rewritten to them.
        columns: Renames of columns, e.g. {question: prompt, answer: completion}.
        prompt_suffix: Text between a plain-text prompt and its completion.
        loss_on: Tokens to train on; `auto` takes the completion of prompt and
            completion, the assistant's turns of messages, and all of plain text.
        chat_template: Built-in name or file; the tokenizer's own if not given.
        eos_tokens: Tokens that end a turn, besides the tokenizer's own.
        max_length: Longest example, tokens.
        on_too_long: Treat a longer row as a bad row, or cut its end off.
        packing: Put several examples in one row of `max_length` tokens (best fit).
        on_bad_row: Stop at the first bad row, or skip and count them.
    """

    train: str = "builtin:arithmetic"
    train_split: str | None = None
    eval: str | None = None
    eval_split: str = "test"
    eval_rows: int = 0
    max_rows: int | None = None
    format: Literal["trl", "alpaca", "sharegpt"] = "trl"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    prompt_suffix: str = ""
    loss_on: Literal["auto", "all", "completion", "assistant", "last"] = "auto"
    chat_template: str | None = None
    eos_tokens: tuple[str, ...] = ()
    max_length: int = 512
    on_too_long: Literal["refuse", "truncate"] = "refuse"
    packing: bool = True
    on_bad_row: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """How long to train, and what to do on the way.

    Attributes:
        steps: Optimizer steps; none takes `epochs` instead.
        epochs: Passes over the data if `steps` is none.
        batch_size: Rows per optimizer step, over all devices.
        accumulate: Microbatches per optimizer step.
        log_every: Steps between log lines.
        eval_every: Steps between evaluations; 0 evaluates at the start and end only.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_last: Newest checkpoints to keep, besides the best.
        keep_every: Also keep each checkpoint whose step is a multiple of this; none
            keeps no more.
        ema_decay: Of an exponential moving average of the weights; none keeps none.
        sample_prompts: Held-out prompts answered at each evaluation, for
            `samples.jsonl`; 0 answers none.
        sample_tokens: Longest such answer, tokens.
        trackers: Where to log besides the run folder.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep_last: int = 2
    keep_every: int | None = None
    ema_decay: float | None = None
    sample_prompts: int = 3
    sample_tokens: int = 64
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of accumulate "
                f"({self.accumulate})."
            )


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How the devices are arranged; see docs/meshes.md.

    Attributes:
        data: Copies of the model, each with its share of the batch; -1 takes all
            devices that are left.
        fsdp: Parts that each parameter is stored in; the batch is split over them too.
        tensor: Parts that heads, feed-forward and vocabulary are computed in.
        devices: Use only the first so many devices; all of them if not given.
        rules: Which mesh axes a logical axis takes, instead of the table in
            `jaxpost.parallel.RULES`, e.g. {embed: data+fsdp, vocab: none}.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    devices: int | None = None
    rules: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ProcessesSection:
    """One run on several hosts: each runs the same command, but for `index`.

    Attributes:
        coordinator: host:port of process 0, a free port there; none is one process.
        count: How many processes.
        index: Which one this is, from 0.
        auto: Let JAX find all three (SLURM, Kubernetes, Open MPI, Cloud TPU).
        deadline_s: How long to wait for the other processes, seconds.
    """

    coordinator: str | None = None
    count: int = 1
    index: int = 0
    auto: bool = False
    deadline_s: float = 60.0


@dataclasses.dataclass(frozen=True)
class PairReportSection:
    """Preference pairs listed one by one at the end, in `pairs/` of the run folder.

    Attributes:
        pairs: How many training pairs, and how many held-out ones, are scored; 0 lists
            none.
        outliers: How many of them are shown with their texts: the largest delta of R3M,
            else the most negative margins.
    """

    pairs: int = 2000
    outliers: int = 20

    def __post_init__(self) -> None:
        for name in ("pairs", "outliers"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name} must be at least 0, got {getattr(self, name)}."
                )


@dataclasses.dataclass(frozen=True)
class ExportSection:
    """What is written when training ends.

    Attributes:
        enabled: Write the model in Hugging Face layout to `export/` in the run folder.
        lora: Of a run with adapters: the base with them merged in, to `export/`; the
            adapters alone in PEFT's layout, to `adapter/`; or both.
        dtype: Data type of the stored weights.
        max_shard_bytes: Largest size of one safetensors file, bytes.
        license: Of the result, for the model card.
    """

    enabled: bool = True
    lora: Literal["merged", "adapter", "both"] = "merged"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_shard_bytes: int = 5_000_000_000
    license: str | None = None
