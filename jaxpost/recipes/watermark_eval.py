"""How good a watermark is, and what it costs: `jaxpost watermark eval`.

Answers programming tasks without and with the mark, by SWEET and by WLLM over a grid
of strengths; runs them in the sandbox where the tasks have tests; detects the mark,
also after edits; and draws quality against detection.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tyro.conf import Positional

from jaxpost import data, generation, prompts, sandbox, weights
from jaxpost.generation import watermark
from jaxpost.recipes import _watermark_report
from jaxpost.recipes._watermark_answers import Answers, answer, read_texts
from jaxpost.recipes._watermark_judge import (
    UNMARKED,
    Bench,
    Setting,
    judge,
    robust,
    settings_of,
)

Method = Literal["sweet", "wllm"]


@dataclasses.dataclass(frozen=True)
class WatermarkEvalConfig:
    """Measure what a watermark costs and how well it is found, on programming tasks.

    Attributes:
        model: Folder or hub name of the model.
        tasks: File, hub name or built-in of rows: HumanEval's, MBPP's, or `prompt` with
            `completion` (what a person wrote) and `tests`, both optional.
        split: Split of a hub or built-in data set.
        max_tasks: Answer at most so many.
        skip_long: Leave out tasks that do not fit the model, instead of stopping.
        name: Of the run folder.
        run_root: Folder of the run folders.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        methods: SWEET marks and scores tokens of an entropy above `tau` only, WLLM all.
        gammas: Shares of the vocabulary that are green.
        deltas: What is added to green logits.
        tau: Entropy threshold of SWEET, nats.
        secret: The watermark's key; keep one that marks real text to yourself.
        samples: Answers to each task.
        k: Of pass@k, each at most `samples`.
        max_new_tokens: Longest answer, tokens.
        temperature: 0 takes the most likely token each time.
        top_p: Keep the smallest set of tokens with this probability.
        stop: Strings that end an answer; if not given, what begins something else
            after one function, or (MBPP) after a program of several.
        unique: Score only the first of equal pairs of tokens of a text.
        robust_gamma: Strength at which edited answers are detected.
        robust_delta: Likewise; both must be on the grid.
        seed: Of the sampler and of the edits.
        batch_size: Answers decoded at a time.
        wall_s: Time that a program has, seconds.
        memory_mb: Memory that it has, MiB.
        workers: Programs run at a time; one per processor if not given.
        unsafe_sandbox: Run generated programs even where they cannot be contained.
        dtype: Data type of the weights and the cache.
    """

    model: Positional[str]
    tasks: str
    split: str | None = None
    max_tasks: int | None = None
    skip_long: bool = False
    name: str = "watermark_eval"
    run_root: str = "runs"
    tokenizer: str | None = None
    methods: tuple[Method, ...] = ("sweet", "wllm")
    gammas: tuple[float, ...] = (0.1, 0.25, 0.5)
    deltas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0)
    tau: float = 0.9
    secret: int = 15485863
    samples: int = 1
    k: tuple[int, ...] = (1,)
    max_new_tokens: int = 256
    temperature: float = 0.2
    top_p: float | None = 0.95
    stop: tuple[str, ...] | None = None
    unique: bool = False
    robust_gamma: float = 0.25
    robust_delta: float = 3.0
    seed: int = 0
    batch_size: int = 32
    wall_s: float = 10.0
    memory_mb: int = 512
    workers: int | None = None
    unsafe_sandbox: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        for name in ("methods", "gammas", "deltas", "k"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one.")
        if not all(1 <= k <= self.samples for k in self.k):
            raise ValueError(
                f"k must lie between 1 and samples={self.samples}, got {self.k}."
            )
        if self.robust_gamma not in self.gammas or self.robust_delta not in self.deltas:
            raise ValueError(
                f"robust_gamma={self.robust_gamma} and robust_delta="
                f"{self.robust_delta} must be on the grid of gammas {self.gammas} and "
                f"deltas {self.deltas}."
            )
        sandbox.Limits(wall_s=self.wall_s, memory_mb=self.memory_mb)


def run_watermark_eval(config: WatermarkEvalConfig) -> dict[str, Any]:
    """Answers, runs, detects and edits as `config` says; writes the run folder.

    The folder gets `answers.jsonl` (every answer with its verdict and z),
    `results.json`, `table.md` and `pareto.svg` (with the extra `report`).

    Returns:
        `settings`: one entry per way to mark; `robustness`: one per method and edit.

    Raises:
        FileExistsError: the run folder exists.
        ValueError: there are no tasks; a prompt and its answer do not fit the model;
            tasks have tests and programs cannot be contained here.
    """
    folder = pathlib.Path(config.run_root) / config.name
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another --name.")
    bench = open_bench(config)
    folder.mkdir(parents=True)
    settings = settings_of(config.methods, config.gammas, config.deltas, tau=config.tau)
    found: list[dict[str, Any]] = []
    robustness: list[dict[str, Any]] = []
    with (
        _Progress(len(settings)) as progress,
        (folder / "answers.jsonl").open("w", encoding="utf-8") as file,
    ):
        for setting in settings:
            progress.describe(setting.name)
            answers = mark(bench, setting)
            line, rows = judge(bench, setting, answers, progress.programs)
            found.append(line)
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if (setting.gamma, setting.delta) == (
                config.robust_gamma,
                config.robust_delta,
            ):
                robustness += robust(bench, setting, answers)
            progress.advance()
    result = {
        "config": dataclasses.asdict(config)
        | {"secret": bench.key.fingerprint, "stop": bench.stop},
        "settings": found,
        "robustness": robustness,
    }
    _watermark_report.write(folder, result)
    return result


def open_bench(config: WatermarkEvalConfig) -> Bench:
    """Loads the model and the tasks, and reads what people wrote."""
    tasks = read_tasks(config)
    refusal = sandbox.refusal() if any(t.tests for t in tasks) else None
    if refusal and not config.unsafe_sandbox:
        raise ValueError(refusal)
    model = weights.load(config.model, dtype=jnp.dtype(config.dtype))
    words = data.load_tokenizer(
        config.tokenizer or config.model, vocab_limit=model.config.vocab_size
    )
    room = model.config.max_positions - config.max_new_tokens
    ids = [_encode(words, task.prompt) for task in tasks]
    fits = [len(prompt) <= room for prompt in ids]
    if not all(fits) and not (config.skip_long and any(fits)):
        place = fits.index(False)
        raise ValueError(
            f"task {tasks[place].name}: {len(ids[place])} tokens and "
            f"{config.max_new_tokens} new ones are more than the model's "
            f"{model.config.max_positions} positions; lower --max-new-tokens, or leave "
            "such tasks out with --skip-long."
        )
    tasks = list(itertools.compress(tasks, fits))[: config.max_tasks]
    ids = list(itertools.compress(ids, fits))[: config.max_tasks]
    human = [
        (prompt, words.encode(task.solution)[: config.max_new_tokens])
        for task, prompt in zip(tasks, ids, strict=True)
        if task.solution
    ]
    return Bench(
        config=config,
        model=model,
        tokenizer=words,
        tasks=tasks,
        prompts=ids,
        stop=stop_of(config, tasks),
        key=watermark.WatermarkKey(config.secret, words.vocab_size),
        human=read_texts(model, human) if human else None,
    )


def read_tasks(config: WatermarkEvalConfig) -> list[prompts.CodeTask]:
    """The rows as tasks; as many as are wanted, unless some may be left out later.

    Raises:
        ValueError: there are none, or a row is no task.
    """
    rows = itertools.islice(
        data.load_rows(config.tasks, split=config.split),
        None if config.skip_long else config.max_tasks,
    )
    tasks = [
        prompts.code_task(row.columns, name=f"row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    if not tasks:
        raise ValueError(f"{config.tasks} has no tasks.")
    return tasks


def stop_of(
    config: WatermarkEvalConfig, tasks: Sequence[prompts.CodeTask]
) -> tuple[str, ...]:
    """Strings that end an answer: those of `config`, or by the kind of the tasks.

    Raises:
        ValueError: none are given and tasks of both kinds are.
    """
    if config.stop is not None:
        return config.stop
    kinds = {task.alone for task in tasks}
    if len(kinds) > 1:
        raise ValueError(
            f"{config.tasks} has tasks that ask for a program (MBPP's) and tasks that "
            "ask to complete one: give --stop, or a file of each kind."
        )
    return prompts.PROGRAM_ENDS if kinds.pop() else prompts.FUNCTION_ENDS


def mark(bench: Bench, setting: Setting) -> Answers:
    """The model's answers under one setting; all settings draw with the same keys."""
    config = bench.config
    processors = ()
    if setting.method != UNMARKED:
        processors = (
            watermark.processor(
                bench.key, gamma=setting.gamma, delta=setting.delta, tau=setting.tau
            ),
        )
    return answer(
        bench.model,
        bench.tokenizer,
        bench.prompts,
        config=generation.SamplingConfig(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            stop_ids=bench.tokenizer.eos_ids,
            pad_id=bench.tokenizer.pad_id,
        ),
        key=jax.random.key(config.seed),
        processors=processors,
        samples=config.samples,
        stop_strings=bench.stop,
        batch_size=config.batch_size,
    )


def _encode(tokenizer: data.Tokenizer, text: str) -> list[int]:
    """Ids of a prompt, at least one: what `generate` and detection take."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None and tokenizer.adds_bos:
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eos_ids[0]]


class _Progress:
    """A bar of settings done, and of the programs of the one under way."""

    def __init__(self, total: int):
        import rich.console
        import rich.progress

        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._settings = self._bar.add_task("settings", total=total)
        self._programs = self._bar.add_task("programs", total=None, visible=False)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def describe(self, name: str) -> None:
        self._bar.update(self._settings, description=name)

    def programs(self, done: int, total: int) -> None:
        self._bar.update(
            self._programs, completed=done, total=total, visible=done < total
        )

    def advance(self) -> None:
        self._bar.advance(self._settings)
