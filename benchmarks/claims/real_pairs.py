"""Preference losses on files of real pairs: every method, end to end, resumed once.

    .venv/bin/python benchmarks/claims/real_pairs.py --model MODEL --data FILE...

For each file: DPO with Bradley-Terry, robust DPO, R³M and adaptive scaling, and a
reward model. Each run is stopped (SIGTERM) after its first checkpoint, resumed, and its
export loaded again. The table has held-out accuracy and margin before and after
training, with bootstrap intervals over pairs. Before DPO every pair is a tie, as policy
and reference are the same. Small models learn little of such files: the table says what
was measured, not which loss is best. Writes `results/real_pairs.json`; called again,
takes what it has done from `--out`.
"""

import argparse
import csv
import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import yaml

from jaxpost import evaluation

HERE = pathlib.Path(__file__).parent
LOSSES = {
    "DPO": {"name": "bradley_terry"},
    "robust DPO": {"name": "robust_dpo", "flip_rate": 0.1},
    "R³M-DPO": {"name": "r3m", "lam": 0.6},
    "adaptive DPO": {
        "name": "adaptive_scaling",
        "rho0": 0.1,
        "tau_min": 0.1,
        "tau_max": 4.0,
    },
    "reward model": {"name": "bradley_terry"},
}
FORMATS = {"conversations": "sharegpt"}  # by a column that the first row has
HEADINGS = (
    "file",
    "method",
    "held-out accuracy before, %",
    "after, %",
    "margin before",
    "after",
    "accuracy on training pairs, %",
)


def main() -> None:
    args = _arguments()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = []
    for file in args.data:
        for method in LOSSES:
            config = _config(args, file, method)
            done = out / f"{config['name']}.json"
            if not done.exists():
                found = _run(config, out, method, file)
                done.write_text(json.dumps(found) + "\n")
            runs.append(json.loads(done.read_text()))
            print(json.dumps(runs[-1]), flush=True)
    names = ("steps", "batch_size", "max_length", "eval_rows")
    settings = {name: getattr(args, name) for name in names}
    report = {**settings, "model": pathlib.Path(args.model).name, "runs": runs}
    results = pathlib.Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "real_pairs.json").write_text(json.dumps(report, indent=1) + "\n")
    print(markdown_table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", help="files of pairs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--out", default="runs/real_pairs", help="for the run folders")
    parser.add_argument("--results", default=HERE / "results")
    return parser.parse_args()


def _config(args: argparse.Namespace, file: str, method: str) -> dict[str, Any]:
    """The run's config; a checkpoint half-way."""
    reward = method == "reward model"
    recipe = "reward" if reward else "dpo"
    config = {
        "recipe": recipe,
        "name": f"{_stem(file)}-{recipe}-{LOSSES[method]['name']}",
        "run_root": args.out,
        "loss": LOSSES[method],
        "model": {"path": args.model},
        "data": {
            "train": file,
            "format": _format(file),
            "chat_template": "plain",
            "eval_rows": args.eval_rows,
            "max_length": args.max_length,
            "on_too_long": "truncate",
            "on_bad_row": "skip",
        },
        "optimizer": {"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 10},
        "train": {
            "steps": args.steps,
            "batch_size": args.batch_size,
            "save_every": args.steps // 2,
            "eval_every": args.steps,
            "sample_prompts": 0,
        },
        "report": {"pairs": args.eval_rows},
    }
    return config if reward else {**config, "beta": 0.1}


def _stem(file: str) -> str:
    return pathlib.Path(file).name.split(".")[0]


def _format(file: str) -> str:
    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        columns = json.loads(next(iter(lines)))
    return next((FORMATS[name] for name in columns if name in FORMATS), "trl")


def _run(
    config: dict[str, Any], out: pathlib.Path, method: str, file: str
) -> dict[str, Any]:
    """Trains in a process of its own, stops it once, resumes it; reads its report."""
    folder, path = out / config["name"], out / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    shutil.rmtree(folder, ignore_errors=True)  # of a call that did not end
    command = [sys.executable, "-m", "jaxpost.cli", "train", str(path)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(out / "compiled")}
    start = time.time()
    stopped_at = _stopped(command, environment, folder / "checkpoints")
    if not 0 < stopped_at < config["train"]["steps"]:
        raise SystemExit(f"{path}: was not stopped on its way, but at {stopped_at}.")
    subprocess.run(
        [*command, "--resume"], check=True, stdout=subprocess.PIPE, env=environment
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    before = next(line for line in lines if "eval_rewards/margins" in line)
    margins = _margins(folder / "pairs" / "pairs.csv")
    export = json.loads((folder / "export" / "export_report.json").read_text())
    return {
        "file": _stem(file),
        "method": method,
        "loss": config["loss"],
        "pairs": {part: len(found) for part, found in margins.items()},
        "skipped": {
            name.split("/")[-1]: int(number)
            for name, number in before.items()
            if name.startswith("data/bad_rows/")
        },
        "stopped_at": stopped_at,
        **_before(before, len(margins["held out"])),
        "accuracy": _interval(evaluation.verdicts(margins["held out"])),
        "margin": _interval(margins["held out"]),
        "train_accuracy": float(evaluation.verdicts(margins["train"]).mean()),
        "reloaded_export_difference": export["max_logit_difference"],
        "seconds": round(time.time() - start, 1),
    }


def _stopped(
    command: list[str], environment: dict[str, str], checkpoints: pathlib.Path
) -> int:
    """Asks the run to stop once it has a checkpoint; the step at which it did."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    while process.poll() is None:
        if _steps(checkpoints):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    words = process.communicate()[0]
    steps = _steps(checkpoints)
    if not steps:
        raise SystemExit(f"{' '.join(command)}:\n{words}")
    return max(steps)


def _steps(checkpoints: pathlib.Path) -> list[int]:
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in checkpoints.glob("*"))
    return [int(name[1]) for name in names if name]


def _margins(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Margins of the trained model, `[n]`, by part of the data."""
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    return {
        part: np.array([float(row["margin"]) for row in rows if row["part"] == part])
        for part in ("train", "held out")
    }


def _before(metrics: dict[str, float], count: int) -> dict[str, Any]:
    """Of `count` held-out pairs before training; all are ties if none has a margin."""
    verdicts = np.full(count, 0.5)
    if metrics["eval_rewards/margins"]:
        right = round(count * metrics["eval_rewards/accuracies"])
        verdicts = np.arange(count) < right
    return {
        "accuracy_before": _interval(verdicts),
        "margin_before": metrics["eval_rewards/margins"],
    }


def _interval(values: np.ndarray) -> list[float]:
    """Mean and its 95% interval under resampling of pairs."""
    found = evaluation.bootstrap_interval(values, seed=0)
    return [found.value, found.low, found.high]


def markdown_table(report: dict[str, Any]) -> str:
    """The table of the guide."""
    lines = [list(HEADINGS), ["---"] * len(HEADINGS)]
    for run in report["runs"]:
        before, after = (
            "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * value for value in run[name]))
            for name in ("accuracy_before", "accuracy")
        )
        lines.append(
            [
                run["file"],
                run["method"],
                before,
                after,
                f"{run['margin_before']:.3f}",
                "{:+.2f} [{:+.2f}, {:+.2f}]".format(*run["margin"]),
                f"{100 * run['train_accuracy']:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
