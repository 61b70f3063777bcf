"""SWEET against WLLM on code: what the mark costs, and how well it is found.

    .venv/bin/python benchmarks/claims/sweet.py            # training, then 3 minutes
    .venv/bin/python benchmarks/claims/sweet.py --quick    # checks the program

A small decoder is trained on `builtin:python-stdlib` (kept in `--folder`), and answers
the heads of held-out functions under both watermarks over the published grid. Detection
compares them with what people wrote there. Quality cost is the rise of perplexity of
those people's bodies when the model's distribution is marked, and the share of answers
that still parse. Before that, texts without a mark are tested with many keys: is z what
the test takes it for? Everything that was decided before looking is `LAB`. Writes
`results/sweet.json` and `.svg`, and ends with a verdict on each claim.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _code_model import CodeModel, load_code_model
from _sweet_report import draw, print_tables, verdicts

from jaxpost import data, evaluation, generation, models, ops
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_answers import Texts, answer, parses, read_texts
from jaxpost.recipes._watermark_answers import z_scores as texts_z
from jaxpost.recipes._watermark_judge import Setting, settings_of

HERE = pathlib.Path(__file__).parent
WLLM = watermark.NO_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Lab:
    """Everything that is decided in advance.

    Fields:
        code: the model.
        gammas, deltas: the published grid.
        tau_quantile: SWEET's threshold is this quantile of the model's entropies on
            functions that it was trained on.
        prompts: held-out functions that are answered.
        new_tokens: of an answer, at most; of what people wrote, as many are read.
        shortest: tokens of a person's body, for it to be read.
        longest_prompt: tokens of a head.
        null_texts: texts without a mark, of people and of the model each.
        keys: with which they are tested.
        cost_keys: with which the perplexity of marked distributions is averaged.
        secret: of the key that marks.
        bootstrap: resamplings of the functions.
    """

    code: CodeModel = CodeModel()
    gammas: tuple[float, ...] = (0.1, 0.25, 0.5)
    deltas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0)
    tau_quantile: float = 0.5
    prompts: int = 128
    new_tokens: int = 96
    shortest: int = 24
    longest_prompt: int = 96
    null_texts: int = 640
    keys: int = 20
    cost_keys: int = 4
    secret: int = 15485863
    bootstrap: int = 1000


LAB = Lab()
QUICK = Lab(
    code=CodeModel(vocab_size=512, width=32, layers=1, length=128, steps=20),
    gammas=(0.25, 0.5),
    deltas=(1.0, 4.0),
    prompts=12,
    new_tokens=32,
    shortest=8,
    longest_prompt=64,
    null_texts=24,
    keys=3,
    cost_keys=1,
    bootstrap=20,
)


class Functions(NamedTuple):
    """Documented functions.

    Fields:
        heads: their texts.
        prompts: token ids of the heads.
        bodies: token ids of what people wrote, cut to the longest answer.
    """

    heads: list[str]
    prompts: list[list[int]]
    bodies: list[list[int]]


def read_functions(lab: Lab, tokenizer: data.Tokenizer, split: Any) -> Functions:
    """Those of one split that are neither too long nor too short, in its order."""
    found = Functions([], [], [])
    for row in data.stdlib_rows(split):
        prompt = [tokenizer.bos_id, *tokenizer.encode(row["prompt"])]
        body = tokenizer.encode(row["completion"])[: lab.new_tokens]
        if len(prompt) <= lab.longest_prompt and len(body) >= lab.shortest:
            found.heads.append(row["prompt"])
            found.prompts.append(prompt)
            found.bodies.append(body)
    return found


def pairs_of(functions: Functions) -> list[tuple[list[int], list[int]]]:
    """Prompts and bodies side by side."""
    return list(zip(functions.prompts, functions.bodies, strict=True))


def null_table(
    name: str, texts: Texts, lab: Lab, vocab_size: int, tau: float
) -> list[dict[str, Any]]:
    """z of texts without a mark under many keys, which are what chance is about."""
    keys = [watermark.WatermarkKey(1000 + n, vocab_size) for n in range(lab.keys)]
    lines = []
    for method, threshold in (("sweet", tau), ("wllm", WLLM)):
        for gamma in lab.gammas:
            for unique in (True, False):
                how = {"gamma": gamma, "tau": threshold, "unique": unique}
                z, scored = (
                    np.array(part)
                    for part in zip(
                        *(texts_z(texts, k, **how) for k in keys), strict=True
                    )
                )
                kept = (scored > 0).all(axis=0)
                z = z[:, kept]
                means = z.mean(axis=1)  # one per key; texts share a key's lists
                lines.append(
                    {
                        "texts": name,
                        "method": method,
                        "gamma": gamma,
                        "unique": unique,
                        "documents": int(kept.sum()),
                        "left_out": int((~kept).sum()),
                        "keys": lab.keys,
                        "mean_z": float(z.mean()),
                        "standard_error": float(
                            means.std(ddof=1) / math.sqrt(len(means))
                        ),
                        "std_z": float(z.std()),
                        "above_4": float((z > 4.0).mean()),
                        "scored": float(scored[:, kept].mean()),
                    }
                )
    return lines


class Costs(NamedTuple):
    """What people's bodies are worth under the model, `[N]` or `[settings, N]`.

    Fields:
        tokens: of each body.
        plain: log-probability of each, nats.
        marked: the same under each setting's distribution, mean over keys.
        kl: of each setting's distribution from the model's, summed over the body.
    """

    tokens: np.ndarray
    plain: np.ndarray
    marked: np.ndarray
    kl: np.ndarray


def costs_of(
    model: models.Model, texts: Texts, settings: list[Setting], lab: Lab, vocab: int
) -> Costs:
    """Exact, from each position's probability of green: `q` is `p e^(delta green) / Z`
    with `Z = 1 + (e^delta - 1) mass`, and all of a setting follows from the mass."""
    keys = [watermark.WatermarkKey(lab.secret + n, vocab) for n in range(lab.cost_keys)]

    @jax.jit
    def read(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = model.apply(model.params, tokens, positions).hidden[:, :-1]
        logits = ops.logits(hidden, model.unembed(model.params))
        logps = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.exp(logps), chosen, ops.entropy(logits)

    @jax.jit
    def masses(probs: jax.Array, green: jax.Array, tokens: jax.Array) -> Any:
        mass = jnp.sum(jnp.where(green, probs[..., :vocab], 0.0), axis=-1)
        return mass, jnp.take_along_axis(green, tokens[:, 1:, None], axis=-1)[..., 0]

    rows, parts = 8, []
    for at in range(0, len(texts.tokens), rows):
        tokens, mask = texts.tokens[at : at + rows], texts.mask[at : at + rows, 1:]
        probs, chosen, entropies = read(tokens)
        marked = np.zeros((len(settings), len(tokens)))
        kl = np.zeros_like(marked)
        for key in keys:
            for gamma in lab.gammas:
                green = watermark.green_list(tokens[:, :-1], key, gamma=gamma)
                mass, hit = (np.asarray(a) for a in masses(probs, green, tokens))
                for place, setting in enumerate(settings):
                    if setting.gamma != gamma:
                        continue
                    on = mask & (np.asarray(entropies) > setting.tau)
                    grown = np.log1p(np.expm1(setting.delta) * mass)
                    change = np.where(on, setting.delta * hit - grown, 0.0)
                    shifted = np.exp(setting.delta - grown) * mass
                    far = np.where(on, setting.delta * shifted - grown, 0.0)
                    marked[place] += change.sum(axis=1) / len(keys)
                    kl[place] += far.sum(axis=1) / len(keys)
        plain = np.where(mask, chosen, 0.0).sum(axis=1)
        parts.append(Costs(mask.sum(axis=1), plain, marked + plain, kl))
    return Costs(
        *(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    )


class Marks(NamedTuple):
    """Of each function under each setting, `[settings, N]`.

    Fields:
        z: of the marked answer; NaN where it is empty.
        human: of what a person wrote there.
        parses: whether the answer does.
        tokens: of the answer.
    """

    z: np.ndarray
    human: np.ndarray
    parses: np.ndarray
    tokens: np.ndarray


def answer_functions(
    model: models.Model,
    tokenizer: data.Tokenizer,
    functions: Functions,
    lab: Lab,
    setting: Setting,
    key: watermark.WatermarkKey,
) -> tuple[list[list[int]], np.ndarray]:
    """Answers at temperature 1 from the whole distribution, and whether they parse."""
    processors = ()
    if not math.isnan(setting.gamma):
        processors = (
            watermark.processor(
                key, gamma=setting.gamma, delta=setting.delta, tau=setting.tau
            ),
        )
    answers = answer(
        model,
        tokenizer,
        functions.prompts,
        config=generation.SamplingConfig(
            max_new_tokens=lab.new_tokens,
            temperature=1.0,
            stop_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        ),
        key=jax.random.key(1),
        processors=processors,
    )
    whole = zip(functions.heads, answers.texts, answers.complete, strict=True)
    right = [parses(head + text, complete=complete) for head, text, complete in whole]
    return answers.tokens, np.array(right)


def mark_all(
    model: models.Model,
    tokenizer: data.Tokenizer,
    functions: Functions,
    human: Texts,
    settings: list[Setting],
    lab: Lab,
) -> Marks:
    key = watermark.WatermarkKey(lab.secret, tokenizer.vocab_size)
    columns = []
    for number, setting in enumerate(settings, start=1):
        tokens, right = answer_functions(model, tokenizer, functions, lab, setting, key)
        lengths = np.array([len(ids) for ids in tokens])
        z = np.full(len(tokens), np.nan)
        own = z
        if not math.isnan(setting.gamma):
            how = {"gamma": setting.gamma, "tau": setting.tau, "unique": False}
            pairs = [
                (p, ids)
                for p, ids in zip(functions.prompts, tokens, strict=True)
                if len(ids)
            ]
            z[lengths > 0] = texts_z(read_texts(model, pairs), key, **how)[0]
            own = texts_z(human, key, **how)[0]
        columns.append(Marks(z, own, right, lengths))
        print(f"{number}/{len(settings)} {setting.name}", flush=True)
    return Marks(*(np.stack(column) for column in zip(*columns, strict=True)))


def detection_of(marks: Marks, place: int, rows: np.ndarray) -> evaluation.Detection:
    z = marks.z[place, rows]
    return evaluation.detection(z[~np.isnan(z)], marks.human[place, rows])


def cost_of(costs: Costs, place: int, rows: np.ndarray) -> float:
    """Relative rise of the perplexity of people's bodies."""
    change = costs.plain[rows].sum() - costs.marked[place, rows].sum()
    return float(np.expm1(change / costs.tokens[rows].sum()))


def compare(
    settings: list[Setting], marks: Marks, costs: Costs, lab: Lab
) -> dict[str, Any]:
    """SWEET's best detection minus WLLM's at the same cost, with intervals.

    Costs are those that both methods can have; between settings the best detection is
    interpolated. Functions are resampled whole, with all that belongs to them.
    """
    places = {
        method: [n for n, s in enumerate(settings) if s.method == method]
        for method in ("sweet", "wllm")
    }
    count = costs.tokens.size
    everything = np.arange(count)
    ranges = [
        [cost_of(costs, place, everything) for place in members]
        for members in places.values()
    ]
    low = max(min(values) for values in ranges)
    high = min(max(values) for values in ranges)
    at = np.geomspace(low, high, 9)

    def difference(rows: np.ndarray) -> np.ndarray:
        best = []
        for members in places.values():
            points = sorted(
                (
                    cost_of(costs, place, rows),
                    (found := detection_of(marks, place, rows)).auroc,
                    found.tpr[0.05],
                )
                for place in members
            )
            cost, *scores = np.array(points).T
            tops = [np.maximum.accumulate(score) for score in scores]
            best.append([np.interp(at, cost, top) for top in tops])
        return np.array(best[0]) - np.array(best[1])  # [2, costs]

    rng = np.random.default_rng(0)
    value = difference(everything)
    drawn = np.array(
        [difference(rng.integers(0, count, count)) for _ in range(lab.bootstrap)]
    )
    out: dict[str, Any] = {"costs": at.tolist()}
    for number, name in enumerate(("auroc", "tpr@0.05")):
        ends = np.quantile(drawn[:, number], [0.025, 0.975], axis=0)
        mean = drawn[:, number].mean(axis=1)
        out[name] = {
            "difference": value[number].tolist(),
            "low": ends[0].tolist(),
            "high": ends[1].tolist(),
            "mean": float(value[number].mean()),
            "mean_low": float(np.quantile(mean, 0.025)),
            "mean_high": float(np.quantile(mean, 0.975)),
        }
    return out


def table(settings: list[Setting], marks: Marks, costs: Costs) -> list[dict[str, Any]]:
    everything = np.arange(costs.tokens.size)
    lines = []
    for place, setting in enumerate(settings):
        line: dict[str, Any] = {
            "method": setting.method,
            "parse_rate": float(marks.parses[place].mean()),
            "tokens": float(marks.tokens[place].mean()),
            "perplexity": float(np.exp(-costs.plain.sum() / costs.tokens.sum())),
        }
        if not math.isnan(setting.gamma):
            found = detection_of(marks, place, everything)
            cost = cost_of(costs, place, everything)
            line |= {
                "gamma": setting.gamma,
                "delta": setting.delta,
                "tau": setting.tau,
                "perplexity": line["perplexity"] * (1.0 + cost),
                "perplexity_rise": cost,
                "kl_per_token": float(costs.kl[place].sum() / costs.tokens.sum()),
                "auroc": found.auroc,
                **{f"tpr@{rate:g}": share for rate, share in found.tpr.items()},
                "mean_z": float(np.nanmean(marks.z[place])),
                "empty": int(np.isnan(marks.z[place]).sum()),
            }
        lines.append(line)
    return lines


def run(lab: Lab, folder: pathlib.Path) -> dict[str, Any]:
    """Everything that is measured."""
    began = time.perf_counter()
    model, tokenizer, training = load_code_model(lab.code, folder)
    vocab = tokenizer.vocab_size
    held_out = read_functions(lab, tokenizer, "test")
    seen = read_functions(lab, tokenizer, "train")
    people = [
        *zip(held_out.prompts, held_out.bodies, strict=True),
        *zip(seen.prompts, seen.bodies, strict=False),
    ]
    human = read_texts(model, people[: lab.null_texts])
    learned = read_texts(
        model, list(zip(seen.prompts, seen.bodies, strict=True))[: lab.null_texts]
    )
    tau = float(np.quantile(learned.entropies[learned.mask], lab.tau_quantile))
    print(f"model ready; tau = {tau:.3f} nats", flush=True)
    asked = Functions(*(part[: lab.null_texts] for part in seen))
    key = watermark.WatermarkKey(lab.secret, vocab)
    free, _ = answer_functions(model, tokenizer, asked, lab, Setting("unmarked"), key)
    pairs = [
        (p, ids) for p, ids in zip(asked.prompts, free, strict=True) if len(ids) >= 8
    ]
    own = read_texts(model, pairs)
    null = null_table("human", human, lab, vocab, tau)
    null += null_table("unmarked", own, lab, vocab, tau)
    print("unmarked texts done", flush=True)
    functions = Functions(*(part[: lab.prompts] for part in held_out))
    texts = Texts(*(part[: len(functions.heads)] for part in human))
    settings = settings_of(("sweet", "wllm"), lab.gammas, lab.deltas, tau=tau)
    costs = costs_of(model, texts, settings, lab, vocab)
    marks = mark_all(model, tokenizer, functions, texts, settings, lab)
    return {
        "lab": dataclasses.asdict(lab),
        "tau": tau,
        "functions": len(functions.heads),
        "settings": table(settings, marks, costs),
        "comparison": compare(settings, marks, costs, lab),
        "null": null,
        "environment": {
            "device": jax.devices()[0].platform,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "corpus": data.stdlib_fingerprint()[:16],
            "training": training,
            "seconds": time.perf_counter() - began,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small; writes nothing")
    parser.add_argument(
        "--folder", default="runs/claims_sweet", help="where the model is kept"
    )
    arguments = parser.parse_args()
    lab = QUICK if arguments.quick else LAB
    result = run(lab, pathlib.Path(arguments.folder))
    result["verdicts"] = verdicts(result)
    print_tables(result)
    if not arguments.quick:
        results = HERE / "results"
        text = json.dumps(result) + "\n"
        (results / "sweet.json").write_text(text, encoding="utf-8")
        draw(result, results / "sweet.svg")


if __name__ == "__main__":
    main()
