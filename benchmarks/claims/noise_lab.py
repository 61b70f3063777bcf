"""Preference losses under noisy labels: R³M and adaptive scaling against plain ones.

    .venv/bin/python benchmarks/claims/noise_lab.py           # 3 to 8 minutes, 2 cores
    .venv/bin/python benchmarks/claims/noise_lab.py --quick   # a check of the program
    .venv/bin/python benchmarks/claims/noise_lab.py --penalties   # see `penalty_lab`

Labels are flipped, biased towards long answers, or drawn with unequal strength; DPO,
robust DPO, R³M and adaptive scaling, and the same losses on a reward model, learn from
them. Settings of each loss are chosen by accuracy on noisy validation labels of worlds
of their own (`tuning_seeds`); the tables are of other worlds (`seeds`), judged on clean
held-out pairs. Everything that was decided before looking at those is `LAB`. Writes
`results/noise_lab.json` and `.svg`, and ends with a verdict on each claim.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from _noise_lab_report import draw, penalty_lines, print_tables, verdict_lines
from _noisy_pairs import Scenario, Truth, labels, make_truth, true_signs
from _small_preference_models import (
    Setting,
    Sizes,
    grid_margins,
    grid_scores,
    train,
)

from jaxpost import evaluation, losses

HERE = pathlib.Path(__file__).parent
PLAIN = "bradley_terry"
TRAIN, VALIDATION, TEST = range(3)


@dataclasses.dataclass(frozen=True)
class Lab:
    """Everything that is decided in advance.

    Fields:
        policy, reward: the models; `policy` rows are DPO, `reward` rows a reward model.
        scenarios: how labels are made, and how many.
        methods: settings to choose from, by loss. `bradley_terry` on the policy is DPO.
        l2: weight penalties to choose from, for every loss alike.
        seeds: worlds of the tables.
        tuning_seeds: worlds in which settings are chosen.
        validation_pairs, test_pairs: per world.
    """

    policy: Sizes
    reward: Sizes
    scenarios: tuple[Scenario, ...]
    methods: dict[str, tuple[losses.PairwiseConfig, ...]]
    l2: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    validation_pairs: int
    test_pairs: int


LAB = Lab(
    policy=Sizes("policy", 20, 0, 4, 1.0, steps=200, learning_rate=0.1),
    reward=Sizes("reward", 10, 5, 2, 1.0, steps=200, learning_rate=0.05),
    scenarios=(
        *(
            Scenario(f"flip {rate:.0%}", "flips", rate)
            for rate in (0.0, 0.1, 0.2, 0.3, 0.4)
        ),
        Scenario("clearest 10%", "clearest", 0.1),
        Scenario("strength", "strength"),
        Scenario("length 30%", "length", 0.3),
        *(Scenario(f"flip 30%, x{n}", "flips", 0.3, n) for n in (2, 5, 10, 20)),
    ),
    methods={
        PLAIN: (losses.PairwiseConfig(PLAIN),),
        "robust_dpo": tuple(
            losses.PairwiseConfig("robust_dpo", flip_rate=rate)
            for rate in (0.1, 0.2, 0.3, 0.4)
        ),
        "r3m": tuple(  # the paper's grid for robotics, Appendix B
            losses.PairwiseConfig("r3m", lam=step / 10) for step in range(1, 10)
        ),
        "adaptive_scaling": tuple(  # the paper's tau_min and rho0; its tau_max and 4
            losses.PairwiseConfig(
                "adaptive_scaling", rho0=rho0, tau_min=0.1, tau_max=tau_max
            )
            for rho0, tau_max in itertools.product((0.1, 0.3, 0.5), (1.0, 4.0))
        ),
    },
    l2=(1e-3, 3e-2),
    seeds=tuple(range(10)),
    tuning_seeds=(100, 101, 102),
    validation_pairs=2000,
    test_pairs=4000,
)


def quick_lab() -> Lab:
    """A few settings, small and in other worlds: checks the program, not the claims."""
    methods = {name: grid[:: len(grid) // 2 or 1] for name, grid in LAB.methods.items()}
    names = ("flip 0%", "flip 30%", "strength", "length 30%", "flip 30%, x2")
    return dataclasses.replace(
        LAB,
        policy=dataclasses.replace(LAB.policy, width=8, steps=120),
        reward=dataclasses.replace(LAB.reward, width=6, hidden=3, steps=120),
        scenarios=tuple(s for s in LAB.scenarios if s.name in names),
        methods=methods,
        l2=LAB.l2[:1],
        seeds=(1000, 1001, 1002),
        tuning_seeds=(1100,),
        test_pairs=1000,
        validation_pairs=500,
    )


def penalty_lab() -> Lab:
    """R³M against the plain loss with penalties up to 1: a check made afterwards.

    In the tables of `LAB` the plain loss took the largest penalty on offer wherever
    labels were noisy, so it might have gained from a larger one. This lab was added
    after seeing that, in the same worlds; it decides nothing but asks whether R³M's
    gain is one of a stronger penalty.
    """
    return dataclasses.replace(
        LAB,
        scenarios=tuple(
            s for s in LAB.scenarios if "30%" in s.name or s.kind == "clearest"
        ),
        methods={
            PLAIN: LAB.methods[PLAIN],
            "r3m": tuple(
                losses.PairwiseConfig("r3m", lam=lam) for lam in (0.1, 0.3, 0.4, 0.5)
            ),
        },
        l2=(1e-3, 3e-2, 0.1, 0.3, 1.0),
    )


@dataclasses.dataclass(frozen=True)
class World:
    """Arrays of several seeds, stacked: `truths[part]` and the labels of each scenario.

    Fields:
        phi: features by part, `[R, N, K, D]`.
        truths: by seed and part.
        signs: labels by part, `[F, R, N]`.
        right: true labels by part, `[R, N]`.
    """

    phi: list[np.ndarray]
    truths: list[list[Truth]]
    signs: list[np.ndarray]
    right: list[np.ndarray]


def make_world(lab: Lab, sizes: Sizes, seeds: Sequence[int]) -> World:
    most = max(s.pairs_per_parameter for s in lab.scenarios) * sizes.parameters
    counts = (most, lab.validation_pairs, lab.test_pairs)
    truths = [
        [
            make_truth(seed, part, n, answers=sizes.answers, width=sizes.width)
            for part, n in enumerate(counts)
        ]
        for seed in seeds
    ]
    parts = range(len(counts))
    return World(
        phi=[np.stack([t[part].phi for t in truths]) for part in parts],
        truths=truths,
        signs=[
            np.stack([[labels(t[part], s) for t in truths] for s in lab.scenarios])
            for part in parts
        ],
        right=[np.stack([true_signs(t[part]) for t in truths]) for part in parts],
    )


def pair_counts(lab: Lab, sizes: Sizes) -> list[int]:
    """Training pairs of each scenario."""
    return [s.pairs_per_parameter * sizes.parameters for s in lab.scenarios]


def choose(lab: Lab, sizes: Sizes) -> tuple[dict[str, list[Setting]], dict[str, Any]]:
    """The setting of each loss and scenario with the best noisy validation accuracy.

    Returns:
        By method, the chosen setting of each scenario; and the accuracies `[S, F]` that
        they were chosen by, for the record.
    """
    world = make_world(lab, sizes, lab.tuning_seeds)
    options = [
        (name, Setting(loss, l2))
        for name, grid in lab.methods.items()
        for loss, l2 in itertools.product(grid, lab.l2)
    ]
    grid = [[setting] * len(lab.scenarios) for _, setting in options]
    params = train(
        sizes,
        grid,
        world.phi[TRAIN],
        world.signs[TRAIN],
        pair_counts(lab, sizes),
        seed=lab.tuning_seeds[0],
    )
    margins = np.asarray(grid_margins(sizes, params, world.phi[VALIDATION]))
    right = evaluation.verdicts(margins * world.signs[VALIDATION][None])
    found = right.mean(axis=(2, 3))  # [S, F]
    chosen = {}
    for name in lab.methods:
        rows = [s for s, (method, _) in enumerate(options) if method == name]
        best = found[rows].argmax(axis=0)
        chosen[name] = [options[rows[b]][1] for b in best]
    record = {
        describe(setting): found[s].round(5).tolist()
        for s, (_, setting) in enumerate(options)
    }
    return chosen, record


def describe(setting: Setting) -> str:
    words = [f"{name}={value}" for name, value in setting.loss.settings().items()]
    return " ".join([setting.loss.name, *words, f"l2={setting.l2}"])


def judge(
    lab: Lab, sizes: Sizes, chosen: dict[str, list[Setting]]
) -> dict[str, list[dict[str, Any]]]:
    """Trains the chosen settings in the worlds of the tables, and judges them.

    Returns:
        By method, one dictionary per scenario; lists hold one number per seed.
    """
    world = make_world(lab, sizes, lab.seeds)
    counts = pair_counts(lab, sizes)
    params = train(
        sizes,
        list(chosen.values()),
        world.phi[TRAIN],
        world.signs[TRAIN],
        counts,
        seed=lab.seeds[0],
    )
    by_part = [np.asarray(grid_margins(sizes, params, phi)) for phi in world.phi]
    rewards = np.asarray(grid_scores(sizes, params, world.phi[TEST]))
    truth = np.stack([parts[TEST].rewards for parts in world.truths])
    lengths = world.phi[TEST][:, :, :2, -1]
    shorter = (lengths[..., 0] - lengths[..., 1]) * world.right[TEST] < 0
    results: dict[str, list[dict[str, Any]]] = {}
    for m, (name, settings) in enumerate(chosen.items()):
        results[name] = []
        for f, (setting, count) in enumerate(zip(settings, counts, strict=True)):
            clean = evaluation.verdicts(by_part[TEST][m, f] * world.right[TEST])
            found = {
                "setting": describe(setting),
                "accuracy": clean.mean(axis=1).tolist(),
                "accuracy, better is shorter": [
                    float(c[s].mean()) for c, s in zip(clean, shorter, strict=True)
                ],
                "reward correlation": [
                    correlation(sizes, a, b)
                    for a, b in zip(rewards[m, f], truth, strict=True)
                ],
            }
            fitted = slice(0, count)
            for part, where, take in (
                (TRAIN, "fitted", fitted),
                (VALIDATION, "held out", slice(None)),
            ):
                signs = world.signs[part][f, :, take]
                wrong = signs != world.right[part][:, take]
                label_margins = by_part[part][m, f, :, take] * signs
                found |= outliers(setting, label_margins, wrong, where)
            results[name].append(found)
    return results


def correlation(sizes: Sizes, learned: np.ndarray, true: np.ndarray) -> float:
    """Pearson's, over answers; of a policy within prompts, where its reward is defined
    (its normaliser differs from prompt to prompt)."""
    if sizes.kind == "policy":
        learned, true = (x - x.mean(axis=1, keepdims=True) for x in (learned, true))
    return float(np.corrcoef(learned.ravel(), true.ravel())[0, 1])


def outliers(
    setting: Setting, margins: np.ndarray, wrong: np.ndarray, where: str
) -> dict[str, list[float]]:
    """How well wrong labels are found, per seed: by low margins, and by R³M's delta.

    Args:
        setting: of the loss.
        margins: of the labelled answers, `[R, N]`.
        wrong: whether the label disagrees with the truth, `[R, N]`.
        where: a word for the names.
    """
    found = {
        f"auroc of -margin, {where}": [
            evaluation.auroc(-m, w) for m, w in zip(margins, wrong, strict=True)
        ]
    }
    if setting.loss.name != "r3m":
        return found
    assert setting.loss.lam is not None  # required by its config
    delta = np.asarray(losses.r3m(margins, lam=setting.loss.lam).delta)
    flagged = delta > 0.0
    pairs = list(zip(delta, flagged, wrong, strict=True))
    ks = [max(int(w.sum()), 1) for w in wrong]
    found[f"auroc, {where}"] = [evaluation.auroc(d, w) for d, _, w in pairs]
    found[f"flagged, {where}"] = flagged.mean(axis=1).tolist()
    found[f"precision, {where}"] = [
        float(w[g].mean()) if g.any() else math.nan for _, g, w in pairs
    ]
    found[f"recall, {where}"] = [
        float(g[w].mean()) if w.any() else math.nan for _, g, w in pairs
    ]
    found[f"precision at the number of wrong labels, {where}"] = [
        evaluation.precision_recall_at(d, w, k)[0] if w.any() else math.nan
        for (d, _, w), k in zip(pairs, ks, strict=True)
    ]
    return found


def run(lab: Lab) -> dict[str, Any]:
    """Both models through all scenarios."""
    started = time.perf_counter()
    report: dict[str, Any] = {"lab": dataclasses.asdict(lab), "models": {}}
    for sizes in (lab.policy, lab.reward):
        chosen, validation = choose(lab, sizes)
        print(
            f"{sizes.kind}: settings chosen ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        report["models"][sizes.kind] = {
            "parameters": sizes.parameters,
            "validation accuracy by scenario": validation,
            "methods": judge(lab, sizes, chosen),
        }
    report["environment"] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return report


def rounded(value: Any) -> Any:
    """JSON-like values with five decimals: smaller files, the same verdicts."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="checks the program")
    which.add_argument("--penalties", action="store_true", help="larger penalties")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    lab, name = LAB, "noise_lab"
    if args.quick:
        lab, name = quick_lab(), "noise_lab_quick"
    elif args.penalties:
        lab, name = penalty_lab(), "noise_lab_penalties"
    report = run(lab)
    report["models"] = rounded(report["models"])
    lines = penalty_lines(report) if args.penalties else verdict_lines(report)
    report["verdicts"] = lines
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report) + "\n", "utf-8")
    if not args.penalties:
        draw(report, args.out / f"{name}.svg")
        print_tables(report)
    print("\n".join(lines))
    return report


if __name__ == "__main__":
    main()
