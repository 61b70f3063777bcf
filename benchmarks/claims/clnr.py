"""Does column standardisation help, and how well does the method do on Cora?

python benchmarks/claims/clnr.py [--seeds N] [--folder DIR] [--only NAME]

Runs the recipe of configs/clnr/cora.yaml (CLNR as published), six such encoders side by
side, and one without standardisation (nCLNR) and GRACE from the same seeds, which are
compared with it seed by seed.
Keeps benchmarks/claims/results/clnr.json, with every seed's accuracies, and clnr.md. A
method whose run folder is complete is read instead of run again, one that was stopped
goes on. With --only, the others are read from their run folders as far as these are
complete, or from clnr.json as it was.
"""

import argparse
import json
import pathlib
import re
import sys
from typing import Any

import numpy as np

from jaxpost import evaluation, recipes

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "clnr"
RESULTS = ROOT / "benchmarks" / "claims" / "results"

METHODS = {
    "CLNR, published": ("cora.yaml", ()),
    "CLNR, six encoders": ("cora-six.yaml", ()),  # by claims/clnr_choice.py
    "nCLNR": ("cora.yaml", ("--objective.kind", "nclnr")),
    "GRACE, as CLNR's authors run it": ("cora-grace-512.yaml", ()),
    "GRACE, its own settings": ("cora-grace.yaml", ()),
}
REPOSITORY = {
    "CLNR, published": "0.8402 to 0.8431",
    "nCLNR": "0.8313",
    "GRACE, as CLNR's authors run it": "0.8325 to 0.8362",
}
BASE = "CLNR, published"
FEWER_SEEDS = {
    "CLNR, six encoders": 5,
    "nCLNR": 10,
    "GRACE, as CLNR's authors run it": 5,
    "GRACE, its own settings": 10,
}
"""Compared with the same seeds of CLNR; GRACE takes four to eight times as long."""
OTHER_ENCODERS = ("CLNR, six encoders",)
"""Seed `s` has not the initial values and draws of CLNR's seed `s`: no pairs."""
RULES = ("clean", "optimistic", "validation")


def folder_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    return folder / re.sub(r"[^a-z0-9]+", "-", name.lower())


def run_method(name: str, folder: pathlib.Path, seeds: int) -> dict[str, Any]:
    """Accuracies by seed under each rule; from the run folder if it is complete."""
    file, flags = METHODS[name]
    place = folder_of(name, folder)
    found = place / "results.json"
    if not found.is_file():
        words = [*flags, "--run-root", str(folder), "--name", place.name]
        config = recipes.load_config(
            str(CONFIGS / file), [*words, "--seeds", str(seeds)], prog=__file__
        )
        recipes.run(config, resume=(place / "config.yaml").is_file())
    results = json.loads(found.read_text("utf-8"))
    if len(results["clean"]) != seeds:
        raise ValueError(f"{found}: has {len(results['clean'])} seeds, not {seeds}.")
    return results


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means, errors, and differences to CLNR seed by seed with 95% intervals."""
    rows = {}
    for name, held in results.items():
        row: dict[str, Any] = {"seeds": len(held["clean"])}
        for rule in RULES:
            values = np.asarray(held[rule])
            row[rule] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)),
                "standard_error": float(values.std(ddof=1) / np.sqrt(values.size)),
            }
            if name not in (BASE, *OTHER_ENCODERS) and BASE in results:
                shared = np.asarray(results[BASE][rule])[: values.size]
                gaps = shared - values[: shared.size]  # the same seeds
                interval = evaluation.bootstrap_interval(gaps, seed=0)
                row[rule]["clnr_minus_this"] = {
                    "mean": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                }
        rows[name] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "Cora, standard split: test accuracy ± standard error of the mean.",
        "",
        "| method | seeds | clean selection | published rule | the authors' files "
        "(published rule) | best validation | published CLNR minus this, clean, "
        "95% interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        shown = [
            f"{row[rule]['mean']:.4f} ± {row[rule]['standard_error']:.4f}"
            for rule in RULES
        ]
        gap = row["clean"].get("clnr_minus_this")
        paired = (
            ""
            if gap is None
            else f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
        )
        lines.append(
            f"| {name} | {row['seeds']} | {shown[0]} | {shown[1]} | "
            f"{REPOSITORY.get(name, '')} | {shown[2]} | {paired} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/claim-clnr")
    parser.add_argument("--only", action="append", choices=tuple(METHODS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(arguments)
    results = {}
    before = earlier(args.out / "clnr.json")
    for name in METHODS:
        asked = not args.only or name in args.only
        if asked or (folder_of(name, args.folder) / "results.json").is_file():
            seeds = min(args.seeds, FEWER_SEEDS.get(name, args.seeds))
            results[name] = run_method(name, args.folder, seeds)
        elif name in before:
            results[name] = before[name]
    rows = compare(results)
    text = table(rows)
    sys.stdout.write(text)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"rows": rows, "by_seed": results}
    (args.out / "clnr.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "clnr.md").write_text(text)
    return 0


def earlier(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Accuracies by seed of methods run before, by name."""
    if not file.is_file():
        return {}
    return json.loads(file.read_text("utf-8"))["by_seed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
