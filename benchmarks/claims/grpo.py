"""GRPO over its SFT start, and Self-Rewarding PPO against more SFT, on arithmetic.

    .venv/bin/python benchmarks/claims/grpo.py                   # both parts
    .venv/bin/python benchmarks/claims/grpo.py --part grpo
    .venv/bin/python benchmarks/claims/grpo.py --quick           # checks the program

Runs the configs of `configs/grpo` and `configs/self_rewarding_ppo` as `jaxpost train`
does, with other seeds.

*GRPO*: per seed, a fresh model is fine-tuned on worked answers of which half leave out
the last calculation; of its answers to held-out problems, drawn at temperature 1, some
40% are right. Then GRPO on problems without answers, rewarded for the right final
number.

*Self-Rewarding PPO*: the first of those models is the base. Per seed, it is fine-tuned
on a few answers, all of them right; then either more of that, on the same few, or
Self-Rewarding PPO on problems without answers, for as many steps. Learning rates of
both are chosen on a seed of their own.

Held-out problems are answered by every model, greedily and drawn at temperature 1.
Writes `results/grpo.json`; called again, goes on from what is done in `--out`.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from _noise_lab_report import paired

from jaxpost import data, generation, recipes, weights
from jaxpost.prompts import exact_match

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
FEW = "self_rewarding_ppo"
MORE, OURS = "more SFT", "Self-Rewarding PPO"


@dataclasses.dataclass(frozen=True)
class Lab:
    """Everything that is decided in advance.

    Fields:
        policy_seeds: of fine-tuning and GRPO.
        few_seeds: of fine-tuning on few demonstrations and what follows it.
        tuning_seed: in which learning rates of what follows are chosen.
        more_rates, reward_rates: to choose from: of more fine-tuning, and of
            Self-Rewarding PPO.
        problems: held out, of each grade asked for.
        tuning_problems: others of the same split, for choosing.
        flags: overrides of every config.
        rows: of a data set, instead of what the config says.
    """

    policy_seeds: tuple[int, ...] = (0, 1, 2)
    few_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    more_rates: tuple[float, ...] = (1e-4, 5e-4)
    reward_rates: tuple[float, ...] = (1e-4, 3e-4)
    problems: int = 1000
    tuning_problems: int = 400
    flags: tuple[str, ...] = ("--mesh.devices", "1")
    rows: int | None = None


QUICK = Lab(
    policy_seeds=(0, 1),
    few_seeds=(0, 1),
    more_rates=(1e-4, 5e-4),
    reward_rates=(1e-4, 3e-4),
    problems=16,
    tuning_problems=16,
    # More steps than any of the configs warms up for.
    flags=("--mesh.devices", "1", "--train.steps", "6", "--train.batch-size", "4"),
    rows=64,
)


def train(lab: Lab, config: str, out: pathlib.Path, name: str, **flags: Any) -> Any:
    """Runs `configs/CONFIG` as `out/NAME`, unless it has been.

    Returns:
        Where its export is, and its elapsed and processor seconds, compiling included.
    """
    folder = out / name
    record = folder / "seconds.json"
    if not record.exists():
        words = [*lab.flags, "--run-root", str(out), "--name", name]
        for key, value in flags.items():
            words += [f"--{key.replace('__', '.').replace('_', '-')}", str(value)]
        loaded = recipes.load_config(str(CONFIGS / config), words, prog="grpo.py")
        start, spent = time.perf_counter(), time.process_time()
        recipes.run(loaded, resume=folder.exists())
        seconds = [time.perf_counter() - start, time.process_time() - spent]
        record.write_text(json.dumps(seconds), encoding="utf-8")
    return folder / "export", json.loads(record.read_text(encoding="utf-8"))


def answer(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    temperature: float,
    samples: int = 1,
    most: int = 40,
) -> np.ndarray:
    """Whether answers are right, bool `[rows, samples]`."""
    model = weights.load(path)
    tokenizer = data.load_tokenizer(path, vocab_limit=model.config.vocab_size)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [start + tokenizer.encode(row["prompt"]) for row in rows]
    found = np.zeros((len(rows), samples), bool)
    for item in generation.generate_stream(
        model,
        model.params,
        prompts,
        config=generation.SamplingConfig(
            max_new_tokens=most,
            temperature=temperature,
            stop_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        ),
        slots=128,
        samples_per_prompt=samples,
        key=jax.random.key(0),
        max_prompt_length=max(map(len, prompts)),
        context_length=model.config.max_positions,
    ):
        text = tokenizer.decode(item.tokens.tolist(), skip_special=True)
        found[item.prompt, item.sample] = exact_match(text, rows[item.prompt]["answer"])
    return found


def measure(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right answers, the most likely ones and those drawn."""
    return {
        "greedy": float(answer(path, rows, temperature=0.0).mean()),
        "drawn": float(answer(path, rows, temperature=1.0).mean()),
    }


def held_out(config: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Problems of the test split, of the grade that a config's prompts have."""
    text = recipes.load_config(str(CONFIGS / config), prog="grpo.py").data.train
    found = re.search(r"grades=([\d,]+)", text)
    assert found is not None
    grades = [int(grade) for grade in found[1].split(",")]
    return list(data.arithmetic_rows("test", count=count, seed=seed, grades=grades))


def start_of(lab: Lab, out: pathlib.Path, seed: int) -> Any:
    """The model fine-tuned on answers of mixed quality, as `train` returns it."""
    config = "grpo/grpo-sft.yaml"
    rows = of_seed(lab, config, 1000 + seed)
    return train(lab, config, out, f"grpo-sft-{seed}", seed=seed, data__train=rows)


def policy_part(lab: Lab, out: pathlib.Path) -> dict[str, Any]:
    """GRPO over its start, per seed."""
    rows = held_out("grpo/grpo.yaml", lab.problems, seed=50)
    runs = []
    for seed in lab.policy_seeds:
        start, before = start_of(lab, out, seed)
        end, seconds = train(
            lab,
            "grpo/grpo.yaml",
            out,
            f"grpo-{seed}",
            seed=seed,
            model__path=start,
        )
        several = answer(start, rows[:200], temperature=1.0, samples=8)
        runs.append(
            {
                "seed": seed,
                "sft": measure(start, rows),
                "sft, right in 8": float(several.any(axis=1).mean()),
                "grpo": measure(end, rows),
                "sft seconds": before,
                "grpo seconds": seconds,
            }
        )
        print(json.dumps(runs[-1]), flush=True)
    return {"runs": runs, "problems": len(rows)}


def few_part(lab: Lab, out: pathlib.Path) -> dict[str, Any]:
    """Self-Rewarding PPO and more SFT from the same few demonstrations, per seed."""
    prompts = f"{FEW}/self_rewarding_ppo.yaml"
    rows = held_out(prompts, lab.problems, seed=50)
    others = held_out(prompts, lab.tuning_problems, seed=51)
    offered = {MORE: lab.more_rates, OURS: lab.reward_rates}
    chosen, tuning = {}, {}
    for method, rates in offered.items():
        tuning[method] = {
            rate: measure(follow(lab, out, method, lab.tuning_seed, rate)[0], others)
            for rate in rates
        }
        print(method, json.dumps(tuning[method]), flush=True)
        chosen[method] = max(rates, key=lambda r: sum(tuning[method][r].values()))
    runs = []
    for seed in lab.few_seeds:
        found: dict[str, Any] = {
            "seed": seed,
            "SFT": measure(few_start(lab, out, seed), rows),
        }
        for method, rate in chosen.items():
            path, seconds = follow(lab, out, method, seed, rate)
            found[method] = measure(path, rows)
            found[f"{method} seconds"] = seconds
        runs.append(found)
        print(json.dumps(found), flush=True)
    base, _ = start_of(lab, out, lab.policy_seeds[0])
    return {
        "base": measure(base, rows),
        "runs": runs,
        "rates": chosen,
        "tuning": tuning,
        "problems": len(rows),
    }


def few_start(lab: Lab, out: pathlib.Path, seed: int) -> pathlib.Path:
    """The base fine-tuned on the few demonstrations of a seed."""
    base, _ = start_of(lab, out, lab.policy_seeds[0])
    path, _ = train(
        lab,
        f"{FEW}/selfreward-sft.yaml",
        out,
        f"few-sft-{seed}",
        seed=seed,
        model__path=base,
        data__train=of_seed(lab, f"{FEW}/selfreward-sft.yaml", 2000 + seed),
    )
    return path


def follow(
    lab: Lab, out: pathlib.Path, method: str, seed: int, rate: float
) -> tuple[pathlib.Path, list[float]]:
    """What goes on from there, as `train` returns it."""
    flags: dict[str, Any] = {
        "seed": seed,
        "model__path": few_start(lab, out, seed),
        "optimizer__learning_rate": rate,
    }
    if method == MORE:
        config = f"{FEW}/selfreward-more-sft.yaml"
        same = of_seed(lab, f"{FEW}/selfreward-sft.yaml", 2000 + seed)
        flags["data__train"] = same
    else:
        config = f"{FEW}/self_rewarding_ppo.yaml"
        flags["self_reward__base"] = start_of(lab, out, lab.policy_seeds[0])[0]
    name = f"few-{method.replace(' ', '-')}-{seed}-{rate:g}"
    return train(lab, config, out, name, **flags)


def of_seed(lab: Lab, config: str, seed: int) -> str:
    """Rows of a config's kind, of another seed."""
    text = recipes.load_config(str(CONFIGS / config), prog="grpo.py").data.train
    if lab.rows is not None:
        text = re.sub(r"count=\d+", f"count={lab.rows}", text)
    return re.sub(r"seed=\d+", f"seed={seed}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("grpo", "few", "all"), default="all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    parser.add_argument("--results", type=pathlib.Path)
    arguments = parser.parse_args()
    lab = QUICK if arguments.quick else Lab()
    path = arguments.results or HERE / "results" / "grpo.json"
    report: dict[str, Any] = {}
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    report |= {
        "lab": dataclasses.asdict(lab),
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    parts = {"grpo": policy_part, "few": few_part}
    for name, part in parts.items():
        if arguments.part in (name, "all"):
            report[name] = part(lab, arguments.out)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in lines(report):
        print(line)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The tables as Markdown, and one sentence for each."""
    found: list[str] = []
    if "grpo" in report:
        found += policy_lines(report["grpo"])
    if "few" in report:
        found += few_lines(report["few"])
    return found


def policy_lines(part: Mapping[str, Any]) -> list[str]:
    """GRPO against its start."""
    runs = part["runs"]
    found = [
        "| seed | SFT, greedy | right in 8 | GRPO, greedy | gain | SFT, drawn | GRPO, "
        "drawn | s | processor s |",
        "|" + "---|" * 9,
    ]
    for run in runs:
        before, after = run["sft"], run["grpo"]
        cells = [
            *(before["greedy"], run["sft, right in 8"], after["greedy"]),
            after["greedy"] - before["greedy"],
            *(before["drawn"], after["drawn"]),
        ]
        shares = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        spent = " | ".join(f"{second:.0f}" for second in run["grpo seconds"])
        found.append(f"| {run['seed']} | {shares} | {spent} |")
    for how in ("greedy", "drawn"):
        starts, ends = (
            np.array([run[name][how] for run in runs]) for name in ("sft", "grpo")
        )
        mean, low, high = (100 * x for x in paired(ends, starts))
        found.append(
            f"GRPO moves exact match of {how} answers to {part['problems']} held-out "
            f"problems from {100 * starts.mean():.1f} to {100 * ends.mean():.1f}%: "
            f"{mean:+.1f} points (95% over seeds {low:+.1f} to {high:+.1f})."
        )
    return found


def few_lines(part: Mapping[str, Any]) -> list[str]:
    """Self-Rewarding PPO against more SFT."""
    runs, methods = part["runs"], ("SFT", MORE, OURS)
    found = ["| | greedy | drawn |", "|---|---|---|"]
    base = " | ".join(f"{100 * part['base'][how]:.1f}" for how in ("greedy", "drawn"))
    found.append(f"| base | {base} |")
    for method in methods:
        cells = []
        for how in ("greedy", "drawn"):
            shares = 100 * np.array([run[method][how] for run in runs])
            cells.append(f"{shares.mean():.1f} ± {shares.std(ddof=1):.1f}")
        found.append(f"| {method} | {' | '.join(cells)} |")
    for how in ("greedy", "drawn"):
        ours, more = (
            np.array([run[method][how] for run in runs]) for method in (OURS, MORE)
        )
        mean, low, high = (100 * x for x in paired(ours, more))
        found.append(
            f"Self-Rewarding PPO minus more SFT, {how} answers to {part['problems']} "
            f"held-out problems: {mean:+.1f} points (95% over seeds {low:+.1f} to "
            f"{high:+.1f})."
        )
    return found


if __name__ == "__main__":
    main()
