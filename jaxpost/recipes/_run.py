"""One training run from its config: folder, data, model, optimizer, loop.

Every recipe opens a run, makes its own loss function and hands both to `Run.train`.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import data, evaluation, models, parallel, training
from jaxpost.recipes import _setup
from jaxpost.recipes._config import ConfigError, to_mapping
from jaxpost.recipes._samples import EvalFn, with_samples
from jaxpost.typing import Batch, LossFn, Params

SHOWN_TOKENS = 160
SHOWN_TEXTS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """What a recipe needs besides its loss.

    Fields:
        config: the recipe's config; has the shared sections.
        kind: what the rows are.
        folder: where everything is written.
        tokenizer, examples: of the data section.
        layout: the devices and what each holds.
        model: its functions; `train` donates its first parameters, but with adapters
            only these.
        tx, schedule: the optimizer and its learning rate by steps taken.
        compute_dtype: to cast parameters to in the loss; None leaves them alone.
        rows: the training rows.
        batches: their batches with the cursor.
        eval_rows: held-out token rows; empty if there are none.
        total_steps: optimizer steps of the whole run.
        lengths: how many row lengths there are, each a compiled program.
        resume: go on from the last complete checkpoint.
    """

    config: Any
    kind: _setup.RowKind
    folder: training.RunFolder
    tokenizer: data.Tokenizer
    examples: _setup.Examples
    layout: _setup.Layout
    model: models.Model
    tx: optax.GradientTransformation
    schedule: Any
    compute_dtype: jnp.dtype | None
    rows: list[data.TokenRow]
    batches: data.Batches
    eval_rows: list[data.TokenRow]
    total_steps: int
    lengths: int
    resume: bool

    def train(
        self,
        step: Callable,
        loss_fn: LossFn,
        *,
        method_state: Any = None,
        method_axes: Any = None,
        frozen: Params | None = None,
        prepare: Callable[..., Any] | None = None,
        batches: Iterator[Batch] | None = None,
        eval_fn: EvalFn | None = None,
    ) -> training.TrainState:
        """Runs the loop: evaluation, checkpoints, logs, trackers.

        Args:
            step: from `training.make_train_step`.
            loss_fn: evaluated on the held-out rows.
            method_state: the method's memory before the first step.
            method_axes: logical axes of its arrays, such as `{"log_u": ("batch",)}`;
                None keeps it whole on every device.
            frozen: what else the loss reads, such as `{"reference": ...}`, beside the
                model's own parameters; shares no array with those that are trained.
            prepare: makes the batch that is trained on, see `training.train`.
            batches: to train on instead of the run's own.
            eval_fn: instead of `loss_fn` on the held-out rows.

        Returns:
            The state after the last step.
        """
        section = self.config.train
        state, placement = self._first_state(method_state, method_axes, frozen)
        trackers = [
            training.make_tracker(
                name, self.folder.path, config=to_mapping(self.config)
            )
            for name in section.trackers
        ]
        saved = training.Checkpoints(
            self.folder.checkpoints,
            keep_last=section.keep_last,
            keep_every=section.keep_every,
        )
        with saved as checkpoints:
            return training.train(
                training.compile_step(
                    step, max_traces=self.lengths, state_shardings=placement
                ),
                state,
                self.batches if batches is None else batches,
                total_steps=self.total_steps,
                prepare=prepare,
                place=self.layout.place_batch,
                count=self.layout.count_tokens,
                schedule=self.schedule,
                eval_fn=eval_fn or self._eval_fn(loss_fn),
                eval_every=section.eval_every or None,
                save_every=section.save_every or None,
                log_every=section.log_every,
                checkpoints=checkpoints,
                resume=self.resume,
                run=self.folder,
                callbacks=trackers,
                performance=training.Performance(
                    flops_per_token=self._flops_per_token(),
                    devices=self.layout.devices,
                ),
                title=self.config.name,
            )

    def _flops_per_token(self) -> float:
        """Forward 2 per parameter, backward 2 and, where it is trained, 2 more."""
        trained, total = _counts(self.model)
        return 4.0 * total + 2.0 * trained

    def model_params(self, state: training.TrainState) -> Params:
        """The model's own parameters in a state, adapters and base, without what else
        is frozen; the moving average, if there is one."""
        params = state.joined(use_ema=state.ema is not None)
        return {name: params[name] for name in self.model.params}

    def with_rows(
        self, rows: list[data.TokenRow], eval_rows: list[data.TokenRow]
    ) -> "Run":
        """The run with other rows of the same shapes, such as with columns added."""
        return dataclasses.replace(
            self,
            rows=rows,
            eval_rows=eval_rows,
            batches=self.batches_of(
                rows, self.config.train.batch_size, seed=self.config.seed
            ),
        )

    def batches_of(
        self, rows: Sequence[data.TokenRow], size: int, **options: Any
    ) -> data.Batches:
        """This process's slices of batches of `size` rows; see `data.Batches`."""
        return _batches(rows, size, self.layout, self.kind, **options)

    def _first_state(
        self, method_state: Any, method_axes: Any, frozen: Params | None
    ) -> tuple[training.TrainState, Any]:
        """The state before the first step and its shardings (None on one device)."""
        params = self.model.params
        if self.model.config.lora is not None:
            params, base = models.split_trained(params)
            frozen = base | (frozen or {})

        def make(params: Params) -> training.TrainState:
            return training.init_state(
                params,
                self.tx,
                jax.random.key(self.config.seed),
                method_state=method_state,
                ema=self.config.train.ema_decay is not None,
                copy=False,  # the model's own arrays are donated: one copy, not two
            )

        if self.layout.mesh is None:
            return make(params)._replace(frozen=frozen), None
        shapes = jax.eval_shape(make, params)
        placement = self.layout.state_shardings(shapes, self.model.config)
        if method_axes is not None:
            held = self.layout.axes_shardings(method_axes, shapes.method_state)
            placement = placement._replace(method_state=held)
        # Compiled, so that no moment is ever whole on one device.
        state = jax.jit(make, out_shardings=placement, donate_argnums=0)(params)
        return state._replace(frozen=frozen), placement

    def _eval_fn(self, loss_fn: LossFn) -> Any:
        if not self.eval_rows:
            return None
        # Padding fills the last batch, so it may be too long but not uneven.
        parts = self.layout.batch_parts
        needed = -(-len(self.eval_rows) // parts) * parts
        size = min(self.config.train.batch_size, needed)

        def batches() -> data.Batches:
            return self.batches_of(
                self.eval_rows, size, shuffle=False, drop_remainder=False, epochs=1
            )

        evaluate = training.make_eval_fn(
            loss_fn,
            batches,
            use_ema=self.config.train.ema_decay is not None,
            place=self.layout.place_batch,
        )
        constants = self._unigram_loss() | self.examples.bad_rows.metrics()
        texts = [_setup.texts_of(item)[0] for item in self.examples.eval]
        return with_samples(
            lambda state: evaluate(state) | constants,
            self.model,
            self.tokenizer,
            texts,
            params_of=self.model_params,
            write=self.folder.log_sample,
            count=self.config.train.sample_prompts if self._can_sample() else 0,
            max_new_tokens=self.config.train.sample_tokens,
        )

    def _can_sample(self) -> bool:
        # Answers would have to be gathered from all hosts; one host's run has them.
        return jax.process_count() == 1 and self.model.config.head == "vocabulary"

    def _unigram_loss(self) -> dict[str, float]:
        """What the loss would be without context; pairs have no such baseline."""
        train, held_out = self.examples.train, self.examples.eval
        if not isinstance(train[0], data.Example):
            return {}
        loss = evaluation.unigram_loss(
            [(e.tokens, e.loss_mask) for e in train],
            [(e.tokens, e.loss_mask) for e in held_out],
            vocab_size=self.model.config.vocab_size,
        )
        return {"eval_unigram_loss": loss}


@contextlib.contextmanager
def open_run(
    config: Any,
    *,
    resume: bool = False,
    kind: _setup.RowKind = _setup.TEXTS,
    head: Literal["vocabulary", "score"] = "vocabulary",
    updates: int = 1,
) -> Iterator[Run]:
    """Opens everything a config names, and writes the head of the run folder.

    Args:
        config: a recipe's config with the shared sections.
        resume: the run folder may exist and is gone on with.
        kind: what the rows are: single texts, preference pairs, ...
        head: what the model ends in; a score head is made if it has none.
        updates: optimizer steps per batch of rows.

    Raises:
        ConfigError: `resume` without a run, or settings that do not fit the data.
    """
    parallel.give_virtual_devices_threads()
    _setup.join_processes(config.processes)
    path = pathlib.Path(config.run_root) / config.name
    parallel.on_first_process(
        f"looking for {path}", lambda: _check_folder(path, resume)
    )
    key_model = jax.random.fold_in(jax.random.key(config.seed), 1)
    tokenizer = _setup.open_tokenizer(config.model, config.data)
    layout = _setup.open_layout(
        config.mesh, config.train.batch_size // config.train.accumulate
    )
    model = _setup.open_model(config.model, tokenizer, key_model, layout=layout)
    if config.data.max_length > model.config.max_positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the model has "
            f"{model.config.max_positions} positions; lower it."
        )
    dtype = _setup.compute_dtype(config.model)
    model = _setup.open_lora(
        getattr(config, "lora", None),
        model,
        jax.random.fold_in(key_model, 1),
        dtype=dtype,
        layout=layout,
    )
    model = _setup.open_head(
        head, model, jax.random.fold_in(key_model, 2), layout=layout
    )
    examples = _setup.open_examples(config.data, tokenizer, kind)
    rows = _setup.token_rows(examples.train, config.data, tokenizer, kind)
    batches = _batches(rows, config.train.batch_size, layout, kind, seed=config.seed)
    total_steps = config.train.steps or max(
        1, math.floor(config.train.epochs * batches.batches_per_epoch) * updates
    )
    tx, schedule = training.build_optimizer(config.optimizer, total_steps)
    folder = training.create_run(
        path,
        to_mapping(config),
        seeds={"seed": config.seed},
        data=examples.fingerprints,
        resume=resume,
    )
    with folder:
        _show(config, tokenizer, examples, rows, model, kind)
        yield Run(
            config=config,
            kind=kind,
            folder=folder,
            tokenizer=tokenizer,
            examples=examples,
            layout=layout,
            model=model,
            tx=tx,
            schedule=schedule,
            compute_dtype=None if dtype == jnp.float32 else dtype,
            rows=rows,
            batches=batches,
            eval_rows=_setup.token_rows(examples.eval, config.data, tokenizer, kind)
            if examples.eval
            else [],
            total_steps=total_steps,
            lengths=len({tuple(a.shape for a in row.values()) for row in rows}),
            resume=resume,
        )


def _check_folder(path: pathlib.Path, resume: bool) -> None:
    """Before anything is loaded; `create_run` looks again."""
    if resume and not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} holds no run to resume; leave out --resume.")
    if not resume and (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} already holds a run: go on with it (--resume), or choose another "
            "name (--name NAME)."
        )


def _batches(
    rows: Sequence[data.TokenRow],
    size: int,
    layout: _setup.Layout,
    kind: _setup.RowKind,
    **options: Any,
) -> data.Batches:
    """This process's slices of the batches."""
    index, count = layout.batch_share
    if kind.joined:
        widths = data.joined_widths(rows)
        options["finish"] = functools.partial(data.join_answers, width=widths)
    return data.Batches(rows, size, process_index=index, process_count=count, **options)


def _counts(model: models.Model) -> tuple[int, int]:
    """How many parameters are trained, of how many."""
    total = model.param_count()
    if model.config.lora is None:
        return total, total
    trained, _ = models.split_trained(model.params)
    return model.replace(params=trained).param_count(), total


def _show(
    config: Any,
    tokenizer: data.Tokenizer,
    examples: _setup.Examples,
    rows: list[data.TokenRow],
    model: models.Model,
    kind: _setup.RowKind,
) -> None:
    """Says what was opened, with one example as the model will see it."""
    import rich.console

    if jax.process_index() != 0:
        return
    console = rich.console.Console()
    console.print(
        f"model: {model.config.family}, {model.param_count():,} parameters; "
        f"tokenizer: {tokenizer.vocab_size:,} ids"
    )
    if (lora := model.config.lora) is not None:
        trained, total = _counts(model)
        scored = ", and the score head" if model.config.head == "score" else ""
        console.print(
            f"trained: {trained:,} of {total:,} parameters "
            f"({100 * trained / total:.2f}%), adapters of rank {lora.rank} on "
            f"{', '.join(lora.targets)}{scored}",
            highlight=False,
        )
    console.print(f"data: {examples.bad_rows.summary()}", highlight=False)
    word, texts = kind.name, examples.texts(examples.train)
    tokens = sum(len(text) for text in texts)
    full = (
        f" ({100 * data.packing_efficiency(rows):.0f}% full)" if kind.answered else ""
    )
    console.print(
        f"train: {len(examples.train):,} {word}s, {tokens:,} tokens in {len(rows):,} "
        f"rows{full}; held out: {len(examples.eval):,} {word}s"
    )
    console.print(f"first {word} (green is trained on):", style="dim")
    for text in _setup.texts_of(examples.train[0])[:SHOWN_TEXTS]:
        console.print(data.render_text(text, tokenizer, limit=SHOWN_TOKENS))
    if kind.answered:
        share = np.mean([text.loss_mask.mean() for text in texts])
        console.print(f"trained on: {100 * share:.0f}% of a text's tokens on average")
