"""How good a watermark is, and what it costs: `jaxpost watermark eval`.

Answers programming tasks without and with the mark, by SWEET and by WLLM over a grid
of strengths; runs them in the sandbox where the tasks have tests; detects the mark,
also after edits; and draws quality against detection.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from jaxpost import data, evaluation, generation, prompts, sandbox, weights
from jaxpost.generation import watermark
from jaxpost.models import Model
from jaxpost.recipes import _watermark_report
from jaxpost.recipes._watermark_answers import (
    Answers,
    Texts,
    answer,
    parses,
    read_texts,
    z_scores,
)
from jaxpost.recipes._watermark_edits import edits

Method = Literal["sweet", "wllm"]
UNMARKED = "unmarked"


@dataclasses.dataclass(frozen=True)
class WatermarkEvalConfig:
    """Measure what a watermark costs and how well it is found, on programming tasks.

    Attributes:
        model: Folder or hub name of the model.
        tasks: File, hub name or built-in of rows: HumanEval's, MBPP's, or `prompt` with
            `completion` (what a person wrote) and `tests`, both optional.
        split: Split of a hub or built-in data set.
        max_tasks: Answer at most so many.
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
        stop: Strings that end an answer; with tasks of one function, what begins
            something else.
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
    stop: tuple[str, ...] = prompts.FUNCTION_ENDS
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to mark.

    Fields:
        method: `unmarked`, `sweet` or `wllm`.
        gamma, delta, tau: its strength; NaN if unmarked.
    """

    method: str
    gamma: float = math.nan
    delta: float = math.nan
    tau: float = math.nan

    @property
    def name(self) -> str:
        """For tables and files."""
        if self.method == UNMARKED:
            return UNMARKED
        return f"{self.method} gamma={self.gamma:g} delta={self.delta:g}"


def settings_of(
    methods: Sequence[str],
    gammas: Sequence[float],
    deltas: Sequence[float],
    *,
    tau: float,
) -> list[Setting]:
    """The unmarked setting and the grid."""
    taus = {"sweet": tau, "wllm": watermark.NO_THRESHOLD}
    grid = itertools.product(methods, gammas, deltas)
    return [Setting(UNMARKED), *(Setting(m, g, d, taus[m]) for m, g, d in grid)]


@dataclasses.dataclass
class Bench:
    """What all settings share.

    Fields:
        config: the settings of the run.
        model, tokenizer: that answer and detect.
        tasks: what is asked.
        prompts: their token ids.
        key: the watermark's.
        human: answers that people wrote; None without any.
        unmarked: the model's own, set by the first setting.
    """

    config: WatermarkEvalConfig
    model: Model
    tokenizer: data.Tokenizer
    tasks: list[prompts.CodeTask]
    prompts: list[list[int]]
    key: watermark.WatermarkKey
    human: Texts | None
    unmarked: Texts | None = None


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
            line, rows = judge(bench, setting, answers, progress)
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
        "config": dataclasses.asdict(config) | {"secret": bench.key.fingerprint},
        "settings": found,
        "robustness": robustness,
    }
    _watermark_report.write(folder, result)
    return result


def open_bench(config: WatermarkEvalConfig) -> Bench:
    """Loads the model and the tasks, and reads what people wrote."""
    rows = itertools.islice(
        data.load_rows(config.tasks, split=config.split), config.max_tasks
    )
    tasks = [
        prompts.code_task(row.columns, name=f"row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    if not tasks:
        raise ValueError(f"{config.tasks} has no tasks.")
    refusal = sandbox.refusal()
    if any(t.tests for t in tasks) and refusal and not config.unsafe_sandbox:
        raise ValueError(refusal)
    model = weights.load(config.model, dtype=jnp.dtype(config.dtype))
    words = data.load_tokenizer(
        config.tokenizer or config.model, vocab_limit=model.config.vocab_size
    )
    ids = [_encode(words, task.prompt) for task in tasks]
    for task, prompt in zip(tasks, ids, strict=True):
        if len(prompt) + config.max_new_tokens > model.config.max_positions:
            raise ValueError(
                f"task {task.name}: {len(prompt)} tokens and {config.max_new_tokens} "
                f"new ones are more than the model's {model.config.max_positions} "
                "positions; lower --max-new-tokens or leave the task out."
            )
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
        key=watermark.WatermarkKey(config.secret, words.vocab_size),
        human=read_texts(model, human) if human else None,
    )


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
        stop_strings=config.stop,
        batch_size=config.batch_size,
    )


def judge(
    bench: Bench, setting: Setting, answers: Answers, progress: "_Progress"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Quality and detection of one setting, and a row for each answer."""
    samples = bench.config.samples
    tasks = [task for task in bench.tasks for _ in range(samples)]
    rows: list[dict[str, Any]] = [
        {
            "setting": setting.name,
            "task": task.name,
            "sample": place % samples,
            "answer": text,
            "tokens": len(ids),
            "parses": parses(task.source(text), complete=complete),
        }
        for place, (task, ids, text, complete) in enumerate(
            zip(tasks, *answers, strict=True)
        )
    ]
    line: dict[str, Any] = {
        **{k: _number(v) for k, v in dataclasses.asdict(setting).items()},
        "answers": len(rows),
        "empty": sum(not row["tokens"] for row in rows),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "parse_rate": float(np.mean([row["parses"] for row in rows])),
    }
    line |= _run_tests(bench, tasks, answers, rows, progress)
    line |= _detect(bench, setting, answers, rows)
    return line, rows


def _run_tests(
    bench: Bench,
    tasks: Sequence[prompts.CodeTask],
    answers: Answers,
    rows: list[dict[str, Any]],
    progress: "_Progress",
) -> dict[str, Any]:
    """pass@k of the answers whose tasks have tests; marks their rows."""
    config, samples = bench.config, bench.config.samples
    tested = [place for place, task in enumerate(tasks) if task.tests is not None]
    if not tested:
        return {}
    results = sandbox.run_many(
        [tasks[place].program(answers.texts[place]) for place in tested],
        limits=sandbox.Limits(wall_s=config.wall_s, memory_mb=config.memory_mb),
        workers=config.workers,
        unsafe=config.unsafe_sandbox,
        progress=progress.programs,
    )
    for place, result in zip(tested, results, strict=True):
        rows[place] |= {"status": result.status, "detail": result.detail}
    right = np.array([result.passed for result in results]).reshape(-1, samples)
    drawn = np.full(len(right), samples)
    return {
        f"pass@{k}": float(evaluation.pass_at_k(drawn, right.sum(axis=1), k).mean())
        for k in config.k
    } | {"tested_tasks": len(right)}


def _detect(
    bench: Bench, setting: Setting, answers: Answers, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """AUROC and TPR of each task's first answer that is not empty; z of all of them."""
    samples = bench.config.samples
    written = [place for place, ids in enumerate(answers.tokens) if ids]
    pairs = [(bench.prompts[p // samples], answers.tokens[p]) for p in written]
    if not pairs:
        return {}
    texts = read_texts(bench.model, pairs)
    places: dict[int, int] = {}
    for at, place in enumerate(written):
        places.setdefault(place // samples, at)
    firsts = list(places.values())
    if setting.method == UNMARKED:
        bench.unmarked = Texts(*(array[firsts] for array in texts))
        return {}
    how = {"gamma": setting.gamma, "tau": setting.tau, "unique": bench.config.unique}
    z, scored = z_scores(texts, bench.key, **how)
    for at, place in enumerate(written):
        rows[place] |= {"z": float(z[at]), "scored": int(scored[at])}
    line = {"mean_z": float(z[firsts].mean()), "scored": float(scored[firsts].mean())}
    line |= detect_against(z[firsts], bench.human, bench.key, how)
    more = detect_against(z[firsts], bench.unmarked, bench.key, how)
    return line | {f"{name}_unmarked": value for name, value in more.items()}


def detect_against(
    z: np.ndarray,
    negatives: Texts | None,
    key: watermark.WatermarkKey,
    how: dict[str, Any],
) -> dict[str, float]:
    """AUROC and TPR of marked texts' z against other texts; nothing without any."""
    if negatives is None:
        return {}
    found = evaluation.detection(z, z_scores(negatives, key, **how)[0])
    return {"auroc": found.auroc} | {
        f"tpr@{rate:g}": share for rate, share in found.tpr.items()
    }


def robust(bench: Bench, setting: Setting, answers: Answers) -> list[dict[str, Any]]:
    """Detection of one setting's first answers after each edit, read as text."""
    config, samples = bench.config, bench.config.samples
    firsts = [answers.texts[place] for place in range(0, len(answers.texts), samples)]
    how = {"gamma": setting.gamma, "tau": setting.tau, "unique": config.unique}
    negatives = bench.human if bench.human is not None else bench.unmarked
    lines = []
    for edited in edits(bench.tokenizer, bench.tasks, firsts, seed=config.seed):
        pairs = [
            (prompt, ids)
            for prompt, text in zip(bench.prompts, edited.texts, strict=True)
            if text and (ids := bench.tokenizer.encode(text)[: config.max_new_tokens])
        ]
        line: dict[str, Any] = {
            "method": setting.method,
            "edit": edited.name,
            "answers": len(pairs),
        }
        if pairs:
            z, _ = z_scores(read_texts(bench.model, pairs), bench.key, **how)
            line |= {"mean_z": float(z.mean())}
            line |= detect_against(z, negatives, bench.key, how)
        lines.append(line)
    return lines


def _encode(tokenizer: data.Tokenizer, text: str) -> list[int]:
    """Ids of a prompt, at least one: what `generate` and detection take."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None and tokenizer.adds_bos:
        return [tokenizer.bos_id, *ids]
    return ids or [tokenizer.eos_ids[0]]


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


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
