"""The demo's figure: exact match by grade and model, and the two courses after SFT."""

import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxpost import evaluation
from jaxpost.recipes._demo_show import TITLES

# Okabe and Ito's colours, told apart by most readers.
COLOURS = {
    "base": "#999999",
    "sft": "#0072B2",
    "self_rewarding_ppo": "#CC79A7",
    "grpo": "#D55E00",
}


def draw(
    found: Mapping[str, evaluation.ExactMatch], folder: pathlib.Path, grade: int
) -> pathlib.Path | None:
    """Draws `folder/demo.svg`.

    Args:
        found: verdicts by model.
        folder: with the run folders of `self_rewarding_ppo` and `grpo`.
        grade: of the problems that these two were given.

    Returns:
        Its path; None without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings: Any = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
        _draw_bars(axes[0], found, grade)
        for name in ("grpo", "self_rewarding_ppo"):
            _draw_course(axes[1], folder, name, "eval_reward", 100.0)
        axes[1].set_ylabel(f"grade {grade}: exact match, greedy, %")
        _draw_course(axes[2], folder, "self_rewarding_ppo", "self_reward/mean", 1.0)
        axes[2].set_ylabel("self-reward, nats per answer")
        for ax in axes[1:]:
            ax.set_xlabel("optimizer steps")
            ax.grid(color="#dddddd", linewidth=0.6)
        axes[0].legend(frameon=False, fontsize=8)
        path = folder / "demo.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def _draw_bars(ax, found: Mapping[str, evaluation.ExactMatch], grade: int) -> None:
    grades = sorted(next(iter(found.values())).groups(), key=str)
    width = 0.8 / len(found)
    for place, (name, match) in enumerate(found.items()):
        at = [number + place * width for number in range(len(grades))]
        ax.bar(
            at,
            [100 * match.accuracy(g) for g in grades],
            width,
            yerr=[100 * match.standard_error(g) for g in grades],
            error_kw={"elinewidth": 0.8},
            color=COLOURS[name],
            label=TITLES[name],
        )
    ax.set_xticks(
        [number + 1.5 * width for number in range(len(grades))],
        [f"{g}*" if g == grade else str(g) for g in grades],
    )
    ax.set_xlabel("grade; *: optimised without answers")
    ax.set_ylabel("exact match, drawn, %")


def _draw_course(
    ax, folder: pathlib.Path, name: str, metric: str, scale: float
) -> None:
    text = (folder / name / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    points = [(x["step"], scale * x[metric]) for x in lines if metric in x]
    steps, values = zip(*points, strict=True)
    ax.plot(steps, values, "o-", color=COLOURS[name], markersize=3, linewidth=1.2)
