"""Verdicts, tables and the figure of `sweet.py`."""

import pathlib
from typing import Any

import numpy as np
import rich.console
import rich.table

from jaxpost.recipes._watermark_report import frontier


def verdicts(result: dict[str, Any]) -> list[str]:
    """One sentence per claim, as the numbers have it."""
    lines = []
    for texts in ("human", "unmarked"):
        found = [n for n in result["null"] if n["texts"] == texts]
        once = [n for n in found if n["unique"]]
        far = [abs(n["mean_z"]) / n["standard_error"] for n in once]
        stds, all_stds = (
            [n["std_z"] for n in found if n["unique"] == unique]
            for unique in (True, False)
        )
        holds = max(far) <= 3.0 and min(stds) >= 0.8 and max(stds) <= 1.2
        lines.append(
            f"z of {texts} text has mean 0 and standard deviation 1, each pair of "
            f"tokens scored once: {_said(holds)} (means at most {max(far):.1f} "
            f"standard errors from 0, deviations {min(stds):.2f} to {max(stds):.2f}; "
            f"{once[0]['documents']} texts, {once[0]['keys']} keys). With repeats "
            f"{min(all_stds):.2f} to {max(all_stds):.2f}."
        )
    for name in ("auroc", "tpr@0.05"):
        one = result["comparison"][name]
        low, high = min(one["low"]), max(one["high"])
        if low >= 0.0:
            what = "reproduced at every cost"
        elif high <= 0.0:
            what = "the opposite at every cost"
        elif one["mean_low"] > 0.0:
            what = "reproduced on average over costs, not at every one"
        elif one["mean_high"] < 0.0:
            what = "not reproduced, the opposite on average over costs"
        else:
            what = "not reproduced, no difference that these texts can tell"
        lines.append(
            f"SWEET is found better than WLLM at the same rise of perplexity, by "
            f"{name}: {what} (mean {one['mean']:+.4f} [{one['mean_low']:+.4f}, "
            f"{one['mean_high']:+.4f}]; by cost {min(one['difference']):+.4f} to "
            f"{max(one['difference']):+.4f})."
        )
    return lines


def _said(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def print_tables(result: dict[str, Any]) -> None:
    console = rich.console.Console(width=140)
    names = ["method", "gamma", "delta", "perplexity", "perplexity_rise"]
    names += ["kl_per_token", "parse_rate", "auroc", "tpr@0", "tpr@0.01", "tpr@0.05"]
    _print(console, result["settings"], [*names, "mean_z", "tokens"])
    names = ["texts", "method", "gamma", "unique", "documents", "left_out", "mean_z"]
    _print(
        console,
        result["null"],
        [*names, "standard_error", "std_z", "above_4", "scored"],
    )
    for line in result["verdicts"]:
        console.print(f"- {line}", highlight=False)
    spent = result["environment"]
    took = spent["training"]
    console.print(
        f"{spent['seconds']:.0f} s in all; training took {took['seconds']:.0f} s, "
        f"{took['cpu_seconds']:.0f} s of CPU time"
    )


def _print(console: Any, lines: list[dict[str, Any]], names: list[str]) -> None:
    table = rich.table.Table(*names)
    for line in lines:
        values = [line.get(name, "") for name in names]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    console.print(table)


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    marked = [line for line in result["settings"] if line["method"] != "unmarked"]
    gammas = sorted({line["gamma"] for line in marked})
    for method, colour in (("sweet", "tab:green"), ("wllm", "tab:orange")):
        lines = [line for line in marked if line["method"] == method]
        for gamma, shape in zip(gammas, "os^", strict=False):
            some = [line for line in lines if line["gamma"] == gamma]
            label = f"{method.upper()}, γ = {gamma:g}"
            rise = [100 * line["perplexity_rise"] for line in some]
            parse = [100 * line["parse_rate"] for line in some]
            auroc = [line["auroc"] for line in some]
            left.scatter(rise, auroc, color=colour, marker=shape, s=22, label=label)
            right.scatter(parse, auroc, color=colour, marker=shape, s=22)
        best = frontier([(-100 * x["perplexity_rise"], x["auroc"]) for x in lines])
        cost, auroc = np.array(best).T
        left.plot(-cost, auroc, color=colour, alpha=0.5)
    plain = result["settings"][0]["parse_rate"]
    right.axvline(100 * plain, color="grey", linestyle=":", label="unmarked")
    left.set_xscale("log")
    left.set_xlabel("rise of held-out perplexity, %")
    right.set_xlabel("answers that parse, %")
    for axes in (left, right):
        axes.set_ylabel("AUROC against what people wrote")
        axes.legend(fontsize=7)
    figure.savefig(path)
