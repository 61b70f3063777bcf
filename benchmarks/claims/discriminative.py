"""Discriminative fine-tuning (DFT, DFT2) against SFT and DPO, from one base model.

    .venv/bin/python benchmarks/claims/discriminative.py         # 8 minutes, 2 cores
    .venv/bin/python benchmarks/claims/discriminative.py --quick # checks the program

A small decoder learns some `builtin:arithmetic`, then is fine-tuned on more problems,
with negatives that it samples itself, on the same number of tokens by every method.
What the base model learns, what it is fine-tuned on, what learning rates are chosen on
and what the table is of share no calculation (`PARTS`; the last is the data's own test
split). Rates are chosen in a world of their own (`tuning_seed`), the table is of others
(`seeds`). Everything that was decided
before looking at those is `LAB`. Writes `results/discriminative.json` and `.svg`, and
ends with a verdict on each claim.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import pathlib
import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _discriminative_report import draw, print_table, verdict_lines
from _discriminative_runs import (
    Method,
    Settings,
    Sizes,
    Texts,
    World,
    answer_logps,
    make_model,
    make_plan,
    make_texts,
    sample,
    score,
    train,
)

from jaxpost import data, models
from jaxpost.prompts import exact_match

HERE = pathlib.Path(__file__).parent
GRADE = 1
PARTS = {"base": 0.5, "fine-tuning": 0.9, "validation": 1.0}
"""Shares of the training split's calculations, added up."""


@dataclasses.dataclass(frozen=True)
class Lab:
    """Everything that is decided in advance.

    Fields:
        sizes: the model, and what a step takes.
        base_problems, base_steps, base_rate: what the base model learns before, by SFT.
        problems: to fine-tune on, per seed.
        steps: of fine-tuning, of every method.
        columns: negatives sampled per problem.
        settings: of each method, the paper's.
        rates: learning rates to choose from, as many as seeds.
        seeds: worlds of the table.
        tuning_seed: world in which rates are chosen.
        test_problems, validation_problems: held out, the same for all seeds.
        looks: how often likelihoods are taken down; divides the steps.
    """

    sizes: Sizes
    base_problems: int
    base_steps: int
    base_rate: float
    problems: int
    steps: int
    columns: int
    settings: dict[str, Settings]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    test_problems: int
    validation_problems: int
    looks: int


LAB = Lab(
    sizes=Sizes(width=64, layers=2),
    base_problems=8_000,
    base_steps=800,
    base_rate=6e-3,
    problems=768,
    steps=192,
    columns=4,
    settings={
        "sft": Settings("sft"),
        "dft": Settings("dft", tau=1.0, gamma=0.85),
        "dft2": Settings("dft2", tau=0.3, gamma=0.9),
        "dpo": Settings("dpo", beta=0.1),
    },
    rates=(1e-4, 3e-4, 1e-3, 2e-3, 4e-3),
    seeds=(0, 1, 2, 3, 4),
    tuning_seed=100,
    test_problems=512,
    validation_problems=256,
    looks=8,
)


def quick_lab() -> Lab:
    """Small and in other worlds: checks the program, not the claims."""
    return dataclasses.replace(
        LAB,
        sizes=Sizes(width=32, layers=1),
        base_problems=600,
        base_steps=60,
        problems=64,
        steps=30,
        rates=(1e-3, 4e-3),
        seeds=(1000, 1001),
        tuning_seed=1100,
        test_problems=64,
        validation_problems=64,
        looks=5,
    )


class Problems(NamedTuple):
    """Problems in tokens."""

    prompts: list[list[int]]
    answers: list[list[int]]
    results: list[str]


class Base(NamedTuple):
    """The model that all start from, `model.params`, and its words."""

    model: models.Model
    tokenizer: data.Tokenizer


def calculation(completion: str) -> str:
    """The one calculation of a worked answer, terms of sums and products in order."""
    found = re.search(r"(\d+) ([-+*/]) (\d+) =", completion)
    assert found is not None  # grade 1 has one
    left, sign, right = found.groups()
    ordered = sorted((left, right), key=int) if sign in "+*" else (left, right)
    return sign.join(ordered)


def part_of(completion: str) -> str:
    """Which part of the training split an answer's calculation belongs to."""
    digest = hashlib.sha256(calculation(completion).encode()).digest()
    share = digest[1] / 256  # the split itself hangs on the first byte
    return next(name for name, limit in PARTS.items() if share < limit)


def problems(tokenizer: data.Tokenizer, part: str, count: int, seed: int) -> Problems:
    """Problems of a part of the training split, or of `test`.

    Raises:
        ValueError: too few of the problems drawn belong to the part.
    """
    split = "test" if part == "test" else "train"
    drawn = data.arithmetic_rows(split, count=20 * count, seed=seed, grades=GRADE)
    fitting = (r for r in drawn if part == "test" or part_of(r["completion"]) == part)
    rows = list(itertools.islice(fitting, count))
    if len(rows) < count:
        raise ValueError(f"only {len(rows)} problems of the part {part}, not {count}.")
    end = tokenizer.eos_ids[0]
    return Problems(
        [[tokenizer.bos_id or 0, *tokenizer.encode(row["prompt"])] for row in rows],
        [[*tokenizer.encode(row["completion"]), end] for row in rows],
        [row["answer"] for row in rows],
    )


def one_of(params: Any, run: int) -> Any:
    """Parameters of one run."""
    return jax.tree.map(lambda leaf: leaf[run], params)


def copies(params: Any, count: int) -> Any:
    """The same parameters for `count` runs."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape)), params
    )


def make_base(lab: Lab) -> Base:
    """A decoder that has seen other problems of the same kind, from nothing."""
    rows = data.arithmetic_rows("train", count=4000, seed=lab.tuning_seed, grades=GRADE)
    tokenizer = data.train_word_tokenizer(
        (row["prompt"] + row["completion"] for row in rows), vocab_size=512
    )
    model = make_model(lab.sizes, tokenizer, seed=0)
    known = problems(tokenizer, "base", lab.base_problems, 10_000 + lab.tuning_seed)
    right = make_texts(known.prompts, known.answers, lab.sizes.length)
    world = World(known.prompts, right, *no_negatives(right))
    plan = make_plan(world, "sft", lab.sizes, lab.base_steps, seed=0)
    params, _ = train(
        model,
        copies(model.params, 1),
        lab.settings["sft"],
        [plan],
        [lab.base_rate],
        looks=1,
    )
    return Base(model.replace(params=one_of(params, 0)), tokenizer)


def no_negatives(right: Texts) -> tuple[Texts, np.ndarray, np.ndarray]:
    count, length = right.tokens.shape
    empty = np.zeros((count, 0, length), np.int32)
    return Texts(empty, empty > 0), np.zeros((count, 0)), np.zeros((count, 0), bool)


def make_world(lab: Lab, base: Base, seed: int) -> World:
    """Problems of one seed with the base model's own answers."""
    own = problems(base.tokenizer, "fine-tuning", lab.problems, seed)
    drawn = [
        sample(
            base.model,
            base.model.params,
            own.prompts,
            base.tokenizer,
            seed=seed * lab.columns + column,
            most=lab.sizes.answer,
        )
        for column in range(lab.columns)
    ]
    return with_wrong(lab, base, own, drawn, base.model.params)


def with_wrong(
    lab: Lab,
    base: Base,
    own: Problems,
    drawn: Sequence[Sequence[Sequence[int]]],
    params: Any,
) -> World:
    """A world of answers drawn by a model; `drawn` is by column, then problem."""
    length = lab.sizes.length
    end = base.tokenizer.eos_ids[0]
    # As in training from files: one that was cut gets an end token all the same.
    ended = [[[*a[:-1], end] if a[-1] != end else a for a in part] for part in drawn]
    texts = [make_texts(own.prompts, part, length) for part in ended]
    wrong = Texts(*(np.stack(part, axis=1) for part in zip(*texts, strict=True)))
    same = [
        [list(a) == b for a, b in zip(part, own.answers, strict=True)] for part in ended
    ]
    return World(
        own.prompts,
        make_texts(own.prompts, own.answers, length),
        wrong,
        score(base.model, params, wrong),
        np.array(same).T,
    )


def exact_matches(
    lab: Lab, base: Base, params: Any, held_out: Problems, runs: int
) -> list[float]:
    """Share of right results of greedy answers, for each run."""
    found = []
    for run in range(runs):
        answers = sample(
            base.model,
            one_of(params, run),
            held_out.prompts,
            base.tokenizer,
            seed=0,
            most=lab.sizes.answer,
            temperature=0.0,
        )
        texts = [base.tokenizer.decode(a, skip_special=True) for a in answers]
        right = map(exact_match, texts, held_out.results)
        found.append(float(np.mean(list(right))))
    return found


def probe(lab: Lab, base: Base, worlds: Sequence[World]) -> Callable[[Any], Any]:
    """Takes down mean log-probs `[runs]` of some right answers and of wrong ones, sum
    over an answer's tokens: of training problems, wrong ones that are really wrong."""
    count = min(128, lab.problems)
    parts = [
        (
            np.concatenate([w.right.tokens[:count, None], w.wrong.tokens[:count]], 1),
            np.concatenate([w.right.mask[:count, None], w.wrong.mask[:count]], 1),
            ~w.same[:count],
        )
        for w in worlds
    ]
    tokens, mask, counted = (np.stack(part) for part in zip(*parts, strict=True))
    functions = base.model.replace(params=None)

    @jax.jit
    @jax.vmap
    def both(params, tokens, mask, counted):
        flat = (-1, tokens.shape[-1])
        logps = answer_logps(
            functions, params, tokens.reshape(flat), mask.reshape(flat)
        ).reshape(tokens.shape[:2])
        total = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
        return jnp.mean(logps[:, 0]), jnp.sum(logps[:, 1:] * counted) / total

    return lambda params: jax.device_get(both(params, tokens, mask, counted))


class Runs(NamedTuple):
    """Runs of one method on some worlds, after training.

    Fields:
        params: of all runs.
        right, negatives: mean log-probs by look and run.
    """

    params: Any
    right: list[list[float]]
    negatives: list[list[float]]


def fine_tune(
    lab: Lab,
    base: Base,
    method: Method,
    worlds: Sequence[World],
    rates: Sequence[float],
    *,
    steps: int,
    params: Any = None,
    right_logps: Sequence[np.ndarray] | None = None,
    probe_worlds: Sequence[World] | None = None,
) -> Runs:
    """Trains a method on each world, from the base model or `params`."""
    plans = [
        make_plan(
            world,
            method,
            lab.sizes,
            steps,
            seed=number,
            right_logps=None if right_logps is None else right_logps[number],
        )
        for number, world in enumerate(worlds)
    ]
    start = copies(base.model.params, len(worlds)) if params is None else params
    found, seen = train(
        base.model,
        start,
        lab.settings[method],
        plans,
        rates,
        looks=lab.looks if steps % lab.looks == 0 else 1,
        look=probe(lab, base, probe_worlds or worlds),
    )
    right, negatives = zip(*seen, strict=True)
    return Runs(
        found,
        [r.tolist() for r in np.asarray(right)],
        [n.tolist() for n in np.asarray(negatives)],
    )


def dpo_worlds(
    lab: Lab, base: Base, worlds: Sequence[World], params: Any, seed: int
) -> tuple[list[World], list[np.ndarray]]:
    """The same problems with answers of the models that DPO starts from; one per
    problem, drawn again up to four times where it is the right answer."""
    found, right_logps = [], []
    for run, world in enumerate(worlds):
        own, mine = problems_of(world), one_of(params, run)
        answers: list[list[int]] = [[] for _ in own.prompts]
        todo = list(range(len(own.prompts)))
        for attempt in range(5):
            drawn = sample(
                base.model,
                mine,
                [own.prompts[row] for row in todo],
                base.tokenizer,
                seed=1000 * (1 + attempt) + seed + run,
                most=lab.sizes.answer,
            )
            for row, answer in zip(todo, drawn, strict=True):
                answers[row] = answer
            todo = [row for row in todo if answers[row] == own.answers[row]]
            if not todo:
                break
        found.append(with_wrong(lab, base, own, [answers], mine))
        right_logps.append(score(base.model, mine, world.right))
    return found, right_logps


def problems_of(world: World) -> Problems:
    answers = [
        tokens[mask].tolist()
        for tokens, mask in zip(world.right.tokens, world.right.mask, strict=True)
    ]
    return Problems(world.prompts, answers, [])


def sft_then_dpo(
    lab: Lab,
    base: Base,
    worlds: Sequence[World],
    rates: tuple[Sequence[float], Sequence[float]],
    *,
    seed: int,
    chosen: Callable[[Any], int] | None = None,
) -> tuple[Runs, int | None]:
    """Half the steps of SFT, then half of DPO against answers of the model so far.

    Args:
        rates: of both halves.
        seed: of the answers.
        chosen: picks the one run of the first half that all of the second begin from;
            None lets each go on by itself.
    """
    half = lab.steps // 2
    first = fine_tune(lab, base, "sft", worlds, rates[0], steps=half)
    params, pick = first.params, None
    if chosen is not None:
        pick = chosen(params)
        params = copies(one_of(params, pick), len(worlds))
        pools, right = dpo_worlds(lab, base, worlds[:1], params, seed)
        pools, right = pools * len(worlds), right * len(worlds)
    else:
        pools, right = dpo_worlds(lab, base, worlds, params, seed)
    second = fine_tune(
        lab,
        base,
        "dpo",
        pools,
        rates[1],
        steps=half,
        params=params,
        right_logps=right,
        probe_worlds=worlds,
    )
    return Runs(
        second.params,
        first.right + second.right[1:],
        first.negatives + second.negatives[1:],
    ), pick


def choose(lab: Lab, base: Base) -> tuple[dict[str, Any], dict[str, Any]]:
    """The learning rate of each row with the best exact match on validation problems.

    Returns:
        Rates by row (of SFT→DPO one for each half); and what they were chosen by.
    """
    world = make_world(lab, base, lab.tuning_seed)
    worlds, count = [world] * len(lab.rates), len(lab.rates)
    held_out = problems(
        base.tokenizer, "validation", lab.validation_problems, lab.tuning_seed
    )
    record: dict[str, Any] = {}

    def best(name: str, params: Any) -> int:
        record[name] = exact_matches(lab, base, params, held_out, count)
        return int(np.argmax(record[name]))

    rates: dict[str, Any] = {}
    for row, method, steps in rows_of(lab):
        runs = fine_tune(lab, base, method, worlds, lab.rates, steps=steps)
        rates[row] = lab.rates[best(row, runs.params)]
    runs, pick = sft_then_dpo(
        lab,
        base,
        worlds,
        (lab.rates, lab.rates),
        seed=lab.tuning_seed,
        chosen=lambda params: best("SFT→DPO, first half", params),
    )
    assert pick is not None  # `chosen` was given
    second = best("SFT→DPO", runs.params)
    rates["SFT→DPO"] = (lab.rates[pick], lab.rates[second])
    return rates, record


def rows_of(lab: Lab) -> list[tuple[str, Method, int]]:
    """Rows of the table but the last: a name, a method, its steps.

    A step of SFT sees `1 + negatives` times as many problems as one of DFT; the second
    row stops where it has seen as many.
    """
    per_problem = 1 + lab.sizes.negatives
    return [
        ("SFT", "sft", lab.steps),
        ("SFT, same epochs", "sft", lab.steps // per_problem),
        ("DFT", "dft", lab.steps),
        ("DFT2", "dft2", lab.steps),
    ]


def run(lab: Lab) -> dict[str, Any]:
    """The base model, its worlds, and every row."""
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"{what} ({time.perf_counter() - started:.0f} s)", flush=True)

    base = make_base(lab)
    held_out = problems(base.tokenizer, "test", lab.test_problems, lab.tuning_seed)
    before = exact_matches(lab, base, copies(base.model.params, 1), held_out, 1)[0]
    say(f"base model: {before:.1%} exact match")
    rates, validation = choose(lab, base)
    say(f"learning rates: {rates}")
    worlds = [make_world(lab, base, seed) for seed in lab.seeds]
    count = len(worlds)
    results: dict[str, Any] = {}

    def note(row: str, runs: Runs) -> None:
        results[row] = {
            "exact match": exact_matches(lab, base, runs.params, held_out, count),
            "right": runs.right,
            "negatives": runs.negatives,
        }
        say(row)

    for row, method, steps in rows_of(lab):
        rate = [rates[row]] * count
        note(row, fine_tune(lab, base, method, worlds, rate, steps=steps))
    first, second = ([rate] * count for rate in rates["SFT→DPO"])
    runs, _ = sft_then_dpo(lab, base, worlds, (first, second), seed=lab.seeds[0])
    note("SFT→DPO", runs)
    return {
        "lab": dataclasses.asdict(lab),
        "base": before,
        "negatives that are right": [float(w.same.mean()) for w in worlds],
        "rates": rates,
        "validation": validation,
        "rows": results,
        "environment": {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "seconds": round(time.perf_counter() - started, 1),
        },
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="checks the program")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    args = parser.parse_args(arguments)
    lab, name = LAB, "discriminative"
    if args.quick:
        lab, name = quick_lab(), "discriminative_quick"
    report = json.loads(json.dumps(run(lab)))
    report["verdicts"] = verdict_lines(report)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report) + "\n", "utf-8")
    draw(report, args.out / f"{name}.svg")
    print_table(report)
    print("\n".join(report["verdicts"]))
    return report


if __name__ == "__main__":
    main()
