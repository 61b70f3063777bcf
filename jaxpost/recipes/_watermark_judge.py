"""What is measured of one way to mark: quality, and detection, also after edits."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpost import data, evaluation, prompts, sandbox
from jaxpost.generation import watermark
from jaxpost.models import Model
from jaxpost.recipes._watermark_answers import (
    Answers,
    Texts,
    parses,
    read_texts,
    z_scores,
)
from jaxpost.recipes._watermark_edits import edits

if TYPE_CHECKING:
    from jaxpost.recipes.watermark_eval import WatermarkEvalConfig

UNMARKED = "unmarked"
Progress = Callable[[int, int], None]


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
        stop: strings that end an answer.
        key: the watermark's.
        human: answers that people wrote; None without any.
        unmarked: the model's own, set by the first setting.
    """

    config: "WatermarkEvalConfig"
    model: Model
    tokenizer: data.Tokenizer
    tasks: list[prompts.CodeTask]
    prompts: list[list[int]]
    stop: tuple[str, ...]
    key: watermark.WatermarkKey
    human: Texts | None
    unmarked: Texts | None = None


def judge(
    bench: Bench, setting: Setting, answers: Answers, progress: Progress
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
    progress: Progress,
) -> dict[str, Any]:
    """pass@k of the answers whose tasks have tests, and how many programs ended in
    which way; marks their rows."""
    config, samples = bench.config, bench.config.samples
    tested = [place for place, task in enumerate(tasks) if task.tests is not None]
    if not tested:
        return {}
    results = _run_programs(
        config,
        [tasks[place].program(answers.texts[place]) for place in tested],
        [f"task {rows[p]['task']}, sample {rows[p]['sample']}" for p in tested],
        progress,
    )
    for place, result in zip(tested, results, strict=True):
        rows[place] |= {"status": result.status, "detail": result.detail}
    right = np.array([result.passed for result in results]).reshape(-1, samples)
    drawn = np.full(len(right), samples)
    return {
        f"pass@{k}": float(evaluation.pass_at_k(drawn, right.sum(axis=1), k).mean())
        for k in config.k
    } | {
        "tested_tasks": len(right),
        "statuses": dict(collections.Counter(r.status for r in results).most_common()),
    }


def _run_programs(
    config: "WatermarkEvalConfig",
    programs: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> list[sandbox.SandboxResult]:
    """Results of programs; those that the sandbox did not run are tried once more, one
    at a time.

    Raises:
        OSError: one was not run then either: it must not count as a wrong answer.
    """
    run = functools.partial(
        sandbox.run_many,
        limits=sandbox.Limits(wall_s=config.wall_s, memory_mb=config.memory_mb),
        unsafe=config.unsafe_sandbox,
    )
    results = run(programs, workers=config.workers, progress=progress)
    missing = [place for place, result in enumerate(results) if not result.ran]
    again = run([programs[place] for place in missing], workers=1)
    for place, result in zip(missing, again, strict=True):
        if not result.ran:
            raise OSError(
                f"{names[place]}: the sandbox failed twice to run its program "
                f"({result.status}: {result.detail}), which is no wrong answer; free "
                "memory and processes of this machine, or lower --workers, and start "
                "again under another --name."
            )
        results[place] = result
    return results


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


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
