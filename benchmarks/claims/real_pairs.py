"""Preference losses on files of real pairs: every method, end to end, resumed once.

    .venv/bin/python benchmarks/claims/real_pairs.py --model MODEL --data FILE...

For each file: DPO with Bradley-Terry, robust DPO, R³M and adaptive scaling, and a
reward model. Each run is stopped (SIGTERM) after its first checkpoint, resumed,
exported and reloaded. Prints one table: held-out accuracy and margin after training,
with bootstrap intervals over pairs. Before it every margin is 0 (policy and reference
are the same, the score head is zero). Small models learn little of such files: the
table says what was measured, not which loss is best.
"""

import argparse
import csv
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import rich.console
import rich.table
import yaml

from jaxpost import evaluation

LOSSES = {
    "DPO": {"name": "bradley_terry"},
    "robust DPO": {"name": "robust_dpo", "flip_rate": 0.1},
    "R³M": {"name": "r3m", "lam": 0.6},
    "adaptive": {
        "name": "adaptive_scaling",
        "rho0": 0.1,
        "tau_min": 0.1,
        "tau_max": 4.0,
    },
    "reward model": {"name": "bradley_terry"},
}
FORMATS = {"conversations": "sharegpt"}  # by a column that the first row has


def main() -> None:
    args = _arguments()
    results, out = [], pathlib.Path(args.out)
    for file in args.data:
        for method in LOSSES:
            config = _config(args, file, method)
            results.append(_run(config, out / config["name"], method, file))
            print(json.dumps(results[-1]), flush=True)
    rich.console.Console(width=120).print(_table(results, args))
    (out / "real_pairs.json").write_text(json.dumps(results, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, nargs="+", help="files of pairs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--out", default="runs/real_pairs")
    return parser.parse_args()


def _config(args: argparse.Namespace, file: str, method: str) -> dict:
    """The run's config; a checkpoint half-way."""
    reward = method == "reward model"
    name = pathlib.Path(file).name.split(".")[0] + "-" + method.replace(" ", "-")
    config = {
        "recipe": "reward" if reward else "dpo",
        "name": name,
        "run_root": args.out,
        "loss": LOSSES[method],
        "model": {"path": args.model},
        "data": {
            "train": file,
            "format": _format(file),
            "chat_template": "chatml",
            "eval_rows": args.eval_rows,
            "max_length": args.max_length,
            "on_too_long": "truncate",
            "on_bad_row": "skip",
        },
        "optimizer": {"learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 10},
        "train": {
            "steps": args.steps,
            "batch_size": 8,
            "save_every": args.steps // 2,
            "eval_every": args.steps,
            "sample_prompts": 0,
        },
        "report": {"pairs": args.eval_rows},
    }
    return config if reward else {**config, "beta": 0.1}


def _format(file: str) -> str:
    import gzip

    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8") as lines:
        columns = json.loads(next(iter(lines)))
    return next((FORMATS[name] for name in columns if name in FORMATS), "trl")


def _run(config: dict, folder: pathlib.Path, method: str, file: str) -> dict:
    """Trains in a process of its own, stops it once, resumes it; reads its report."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    command = [sys.executable, "-m", "jaxpost.cli", "train", str(path)]
    start = time.time()
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    checkpoints = folder / "checkpoints"
    while first.poll() is None:
        if any(re.fullmatch(r"step_\d+", p.name) for p in checkpoints.glob("*")):
            first.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    words = first.communicate()[0].decode()
    if not (folder / "metrics.jsonl").is_file():
        raise SystemExit(f"{path}:\n{words}")
    stopped_at = len((folder / "metrics.jsonl").read_text().splitlines())
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.PIPE)
    rows = list(csv.DictReader((folder / "pairs" / "pairs.csv").open(encoding="utf-8")))
    margins = np.array([float(r["margin"]) for r in rows if r["part"] == "held out"])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    before = next(json.loads(x) for x in lines if "eval_rewards/margins" in x)
    return {
        "file": pathlib.Path(file).name,
        "method": method,
        "read": next((x for x in words.splitlines() if "rows read" in x), ""),
        "held_out": len(margins),
        "stopped_and_resumed": 0 < stopped_at < len(lines),
        "margin_before": before["eval_rewards/margins"],
        "accuracy": _interval(evaluation.verdicts(margins)),
        "margin": _interval(margins),
        "seconds": round(time.time() - start, 1),
    }


def _table(results: list[dict], args: argparse.Namespace) -> rich.table.Table:
    table = rich.table.Table(title=f"{args.steps} steps of 8 pairs, {args.model}")
    for name in (
        "file",
        "method",
        "accuracy",
        "margin",
        "margin before",
        "resumed",
        "s",
    ):
        table.add_column(name)
    for found in results:
        table.add_row(
            found["file"],
            found["method"],
            "{:.3f} [{:.3f}, {:.3f}]".format(*found["accuracy"]),
            "{:.3f} [{:.3f}, {:.3f}]".format(*found["margin"]),
            f"{found['margin_before']:.3g}",
            "yes" if found["stopped_and_resumed"] else "NO",
            f"{found['seconds']:.0f}",
        )
    return table


def _interval(values: np.ndarray) -> list[float]:
    """Mean and its 95% interval under resampling of pairs."""
    found = evaluation.bootstrap_interval(values, seed=0)
    return [found.value, found.low, found.high]


if __name__ == "__main__":
    main()
