"""What one optimizer step of a config costs each device, without the devices.

The real step is built from shapes alone and compiled ahead of time for virtual CPU
devices; no weight, row or large array is ever made. Runs in a child process, see
`plan`.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxpost import models, ops, parallel, training, weights
from jaxpost.recipes import _setup
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes.sft import sft_loss

FLOAT32 = 4
HORIZON = 10**6
"""Steps of the schedule: it costs nothing, but must hold the warm-up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What `jaxpost plan` found; all figures are of one device unless said otherwise.

    Fields:
        model: its family.
        parameters, trained: numbers of parameters of the whole model.
        mesh: sizes by axis.
        compute_dtype: of activations and products.
        tokens: of one optimizer step on all devices, padding included.
        row_tokens: length of a row; the longest, if there are several.
        programs: how many row lengths there are, each compiled once.
        memory: bytes by cause.
        temporaries_float32: temporary bytes of the float32 compile, gradients
            included; what the estimate was made from.
        logits_avoided: bytes that the logits of one microbatch would have taken.
        model_flops: forward and backward, nothing recomputed: 6 for each parameter of
            a product and each token, and causal attention over whole rows.
        executed_flops: with what is recomputed; products of the layers as compiled.
        memory_traffic: least bytes from and to the device's memory.
        sent: bytes sent to other devices, by kind of collective.
        compile_s: of the float32 compile on this machine.
    """

    model: str
    parameters: int
    trained: int
    mesh: dict[str, int]
    compute_dtype: str
    tokens: int
    row_tokens: int
    programs: int
    memory: parallel.Memory
    temporaries_float32: int
    logits_avoided: int
    model_flops: float
    executed_flops: float
    memory_traffic: float
    sent: dict[str, int]
    compile_s: float

    @property
    def devices(self) -> int:
        """How many devices compute."""
        return math.prod(self.mesh.values())


@dataclasses.dataclass(frozen=True)
class _Abstract:
    """A config's run as shapes.

    Fields:
        layout: the mesh; None stands for one device.
        model: parameters are `jax.ShapeDtypeStruct` in float32.
        tx: the optimizer.
        state, batch: what the step takes, with their shardings.
        placement: shardings of the state, or None.
    """

    layout: _setup.Layout
    model: models.Model
    tx: Any
    state: training.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    placement: Any


def model_config(
    config: Any, vocab_size: int | None, folder: pathlib.Path
) -> models.DecoderConfig:
    """The decoder of a run's config; reads no weights and fetches nothing.

    Args:
        config: a recipe's config.
        vocab_size: of a fresh model; None takes the tokenizer's.
        folder: where a relative `model.path` may also lie.

    Raises:
        ConfigError: `model.path` leads to no config.json.
        WeightsError: the file describes no supported model.
    """
    section = config.model
    if section.path is None:
        if vocab_size is None:
            tokenizer = _setup.open_tokenizer(section, config.data)
            vocab_size = tokenizer.vocab_size
        return _with_lora(
            _setup.fresh_config(section, vocab_size), getattr(config, "lora", None)
        )
    path = _find_config(section.path, folder)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: must hold a JSON object.")
    decoder = weights.from_hf_config(contents).replace(remat=section.remat)
    return _with_lora(decoder, getattr(config, "lora", None))


def _with_lora(decoder: models.DecoderConfig, section: Any) -> models.DecoderConfig:
    if section is None or section.rank == 0:
        return decoder
    if section.quantize != "none":
        raise ConfigError(
            f"lora.quantize is {section.quantize}: a plan knows no quantised base yet; "
            "plan with none, which takes more."
        )
    lora = models.LoraConfig(
        rank=section.rank, alpha=section.alpha, targets=section.targets
    )
    return decoder.replace(lora=lora)


def _find_config(name: str, folder: pathlib.Path) -> pathlib.Path:
    for path in (pathlib.Path(name), folder / name):
        if path.is_dir() and (path / "config.json").is_file():
            return path / "config.json"
        if path.is_file():
            return path
    if name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        known = try_to_load_from_cache(name.partition("@")[0], "config.json")
        if isinstance(known, str):
            return pathlib.Path(known)
    raise ConfigError(
        f"model.path: no config.json at {name!r}. A plan fetches nothing: give a "
        "config.json, or a folder that holds one (configs/plan/ has some)."
    )


def exact_memory(
    config: Any, decoder: models.DecoderConfig, *, on_cpu: bool
) -> parallel.Memory:
    """The bytes that need no compiler, temporaries left at 0.

    Works for any number of devices; the sizes of the mesh must all be given.
    """
    section = config.mesh
    sizes = (section.data, section.fsdp, section.tensor)
    layout = _setup.Layout()
    if math.prod(sizes) > 1:
        kinds = (AxisType.Auto,) * len(sizes)
        mesh: Any = AbstractMesh(sizes, parallel.AXES, axis_types=kinds)
        layout = _setup.Layout(mesh, _setup.read_rules(section))
    run = _abstract(config, decoder, layout)
    return _exact(run, _compute_dtype(config, on_cpu))


def make_forecast(
    config: Any, decoder: models.DecoderConfig, *, on_cpu: bool
) -> Forecast:
    """Compiles the step of `config` for the devices of this process.

    Args:
        config: a recipe's config; its mesh must fit `jax.devices()`.
        decoder: from `model_config`.
        on_cpu: plan for CPUs; otherwise for accelerators, where "auto" computes in
            bfloat16.

    Raises:
        ConfigError: rows that the mesh does not divide, or that are longer than the
            model's positions.
        ValueError: the mesh does not fit the devices.
    """
    if config.data.max_length > decoder.max_positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the model has "
            f"{decoder.max_positions} positions; lower it."
        )
    micro_rows = config.train.batch_size // config.train.accumulate
    layout = _setup.open_layout(config.mesh, micro_rows)
    run = _abstract(config, decoder, layout)
    mesh: dict[str, int] = {axis: 1 for axis in parallel.AXES}
    if layout.mesh is not None:
        mesh = {str(axis): size for axis, size in layout.mesh.shape.items()}
    dtype = _compute_dtype(config, on_cpu)
    width = dtype.itemsize / FLOAT32
    micro_tokens = micro_rows * config.data.max_length // layout.batch_parts
    vocab = _local(decoder.vocab_size, mesh["tensor"])
    chunk = min(
        ops.default_chunk_size(vocab, FLOAT32, on_cpu=on_cpu), max(micro_tokens, 1)
    )
    compiled, compile_s = _compile(config, run, chunk)
    text = compiled.as_text()
    # The head's loops have as many rounds as there are scored tokens; its second sweep
    # is for losses that weigh tokens otherwise than they announced.
    loops = {
        "transpose(jvp())/shard_map/while": 0,
        "jvp()/shard_map/while": -(-micro_tokens // chunk),
    }
    exact = _exact(run, dtype)
    measured = compiled.memory_analysis().temp_size_in_bytes
    temporaries = parallel.estimate_temporaries(
        measured,
        gradients=exact.gradients,
        width=width,
        wide=(decoder.hidden_size + 2 * chunk) * vocab * FLOAT32,
        # The loss casts what is trained; what is frozen is kept narrow.
        added=round(exact.parameters * width) if width < 1 else 0,
    )
    memory = dataclasses.replace(exact, temporaries=temporaries)
    trained, total = _counts(run)
    model_flops, attention = _model_flops(config, decoder, trained, total)
    head = 6.0 * decoder.vocab_size * decoder.hidden_size * _tokens(config)
    return Forecast(
        model=decoder.family,
        parameters=total,
        trained=trained,
        mesh=mesh,
        compute_dtype=dtype.name,
        tokens=_tokens(config),
        row_tokens=config.data.max_length,
        programs=len(_lengths(config)),
        memory=memory,
        temporaries_float32=measured,
        logits_avoided=micro_tokens * vocab * FLOAT32,
        model_flops=model_flops / layout.devices,
        executed_flops=_layer_flops(text, loops)
        + (head + attention * (4 / 3)) / layout.devices,
        memory_traffic=_traffic(config, memory, mesh, total, width),
        sent=parallel.sum_by_kind(parallel.list_collectives(text, loops=loops), width),
        compile_s=compile_s,
    )


def _abstract(
    config: Any, decoder: models.DecoderConfig, layout: _setup.Layout
) -> _Abstract:
    model = models.build(decoder, mesh=layout.mesh, rules=layout.rules, abstract=True)
    tx, _ = training.build_optimizer(config.optimizer, HORIZON)

    def make(params: Any) -> training.TrainState:
        return training.init_state(
            params,
            tx,
            jax.random.key(0),
            ema=config.train.ema_decay is not None,
            copy=False,
        )

    params, frozen = model.params, None
    if decoder.lora is not None:
        params, frozen = models.split_lora(params)
    state = jax.eval_shape(make, params)._replace(frozen=frozen)
    placement = layout.state_shardings(state, model.config)
    rows = None
    if placement is not None:
        state = jax.tree.map(_with_sharding, state, placement)
        rows = parallel.batch_sharding(layout.mesh, layout.rules)  # type: ignore[arg-type]
    shape = (config.train.batch_size, config.data.max_length)
    kinds = dict.fromkeys(("tokens", "positions", "segment_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=rows)
        for name, kind in (kinds | {"loss_mask": jnp.bool_}).items()
    }
    return _Abstract(layout, model, tx, state, batch, placement)


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _exact(run: _Abstract, dtype: Any) -> parallel.Memory:
    """All but the temporaries. A frozen base is held in the compute dtype."""
    state = run.state
    rest = (state.step, state.key, state.method_state, state.ema)
    frozen = parallel.bytes_per_device(state.frozen)
    return parallel.Memory(
        parameters=parallel.bytes_per_device(state.params),
        gradients=parallel.bytes_per_device(state.params),
        moments=parallel.bytes_per_device(state.opt_state),
        frozen=frozen * dtype.itemsize // FLOAT32,
        other=parallel.bytes_per_device(rest),
        batch=parallel.bytes_per_device(run.batch),
        temporaries=0,
    )


def _compile(config: Any, run: _Abstract, chunk: int) -> tuple[Any, float]:
    """The step in float32, for the chunks of logits that the target will have."""
    token_logps = functools.partial(ops.linear_token_logps, chunk_size=chunk)
    layout = run.layout
    loss_fn = sft_loss(
        run.model.with_lookup(layout.lookup),
        token_logps=parallel.split_vocabulary(token_logps, layout.mesh, layout.rules),
    )
    step = training.make_train_step(
        loss_fn,
        run.tx,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema_decay,
    )
    start = time.perf_counter()
    compiled = (
        training.compile_step(step, state_shardings=run.placement)
        .lower(run.state, run.batch)
        .compile()
    )
    return compiled, time.perf_counter() - start


def _compute_dtype(config: Any, on_cpu: bool) -> Any:
    chosen = config.model.compute_dtype
    if chosen == "auto":
        chosen = "float32" if on_cpu else "bfloat16"
    return jnp.dtype(chosen)


def _local(size: int, parts: int) -> int:
    """One part of an axis, or all of it if it does not divide."""
    return size // parts if size % parts == 0 else size


def _tokens(config: Any) -> int:
    return config.train.batch_size * config.data.max_length


def _lengths(config: Any) -> set[int]:
    """Row lengths; see `_setup.token_rows`."""
    longest = config.data.max_length
    if config.data.packing:
        return {longest}
    return {longest, longest // 2, longest // 4} - {0}


def _counts(run: _Abstract) -> tuple[int, int]:
    """Trained parameters, and all."""
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.state.params))
    return trained, max(trained, run.model.param_count())


def _model_flops(
    config: Any, decoder: models.DecoderConfig, trained: int, total: int
) -> tuple[float, float]:
    """FLOPs of a step on all devices, forward and backward; and attention's share.

    An untied embedding is looked up, not multiplied. Rows count as one document each:
    with packing, attention is less.
    """
    looked_up = (
        0 if decoder.tie_embeddings else decoder.vocab_size * decoder.hidden_size
    )
    length = config.data.max_length
    seen = 0.0
    for layer in range(decoder.num_layers):
        window = decoder.window_of(layer) or length
        # Keys that a token sees, on average over the row.
        full = max(length - window, 0)
        short = length - full
        seen += (full * window + short * (short + 1) / 2) / length
    forward = 4.0 * seen * decoder.num_heads * decoder.head_dim
    attention = 3.0 * forward * _tokens(config)
    dense = (4.0 * (total - looked_up) + 2.0 * trained) * _tokens(config)
    if trained == total:
        dense = 6.0 * (total - looked_up) * _tokens(config)
    return dense + attention, attention


def _layer_flops(text: str, loops: dict[str, int]) -> float:
    """Products of the layers as compiled. Attention's (they carry the letters of their
    sums) and the head's are left out: the lengths of their loops depend on the data."""
    return sum(
        one.flops * one.times
        for one in parallel.list_products(text, loops=loops)
        if one.bounded and "(apply)" in one.where and "," not in one.where
    )


def _traffic(
    config: Any,
    memory: parallel.Memory,
    mesh: dict[str, int],
    parameters: int,
    width: float,
) -> float:
    """Least bytes from and to memory: the state is read and written once; the weights
    of a device's part of each product are read in every pass, and written first where
    they were gathered; temporaries are written and read once."""
    passes = 3 + (config.model.remat == "full")
    held = parameters * FLOAT32 * width / mesh["tensor"]
    weights_read = config.train.accumulate * passes * held
    weights_read *= 2 if mesh["fsdp"] > 1 else 1
    state = memory.parameters + memory.moments + memory.other + memory.gradients
    return 2.0 * state + weights_read + 2.0 * memory.temporaries
