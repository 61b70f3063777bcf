"""Which watermark suits a model and its texts? `jaxpost watermark calibrate`."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from jaxpost import data, generation, models, training, weights
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_key import KeyFile, write_key_file
from jaxpost.recipes._watermark_texts import (
    SMALLEST_BUCKET,
    Document,
    folder_of,
    read_documents,
)

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BINS = 30


@dataclasses.dataclass(frozen=True)
class WatermarkCalibrateConfig:
    """Propose tau, gamma and delta for a model and texts like those it will write.

    Attributes:
        model: Folder or hub name of the model whose text will be marked.
        data: File or name of the corpus: rows with `completion` or `text`, and perhaps
            `prompt`; a file that is no JSONL is one text.
        length: Tokens of the texts that are to be detected.
        false_positive_rate: Share of unmarked texts that may be called marked.
        power: Share of marked texts that should be found.
        gammas: Fractions of green ids to look at.
        deltas: Strengths to look at.
        taus: Thresholds to look at, nats; none takes -1 (no threshold) and the deciles
            of the corpus' entropies.
        temperature: Of the sampler that will write the texts, above 0.
        keys: Secrets to average over.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        limit: Texts to read at most.
        max_tokens: Tokens to read of each text at most, prompt included.
        out: Run folder for `calibration.json` and the histogram.
        key: Key file to write with the proposal and a fresh secret.
        batch_tokens: Tokens read together, padding included.
        dtype: Data type of the weights.
        seed: Of the secrets.
        progress: A bar, plain lines, or nothing.

    Raises:
        ValueError: a setting is out of range.
    """

    model: Positional[str]
    data: str
    length: int = 200
    false_positive_rate: float = 0.01
    power: float = 0.95
    gammas: tuple[float, ...] = (0.1, 0.25, 0.5)
    deltas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0)
    taus: tuple[float, ...] = ()
    temperature: float = 1.0
    keys: int = 4
    tokenizer: str | None = None
    limit: int | None = 200
    max_tokens: int = 512
    out: str | None = None
    key: str | None = None
    batch_tokens: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    progress: Literal["auto", "rich", "plain", "none"] = "auto"

    def __post_init__(self) -> None:
        if not self.gammas or not self.deltas or self.keys < 1:
            raise ValueError("give at least one gamma, one delta and one key.")
        if not 0.0 < self.power < 1.0:
            raise ValueError(f"power must lie in (0, 1), got {self.power}.")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")


def run_watermark_calibrate(config: WatermarkCalibrateConfig) -> dict[str, Any]:
    """Measures a corpus, forecasts every setting, prints them and proposes one.

    Args:
        config: the settings.

    Returns:
        What `calibration.json` holds: `entropies` (quantiles and a histogram),
        `forecasts` and `proposal`.

    Raises:
        ValueError: the corpus has no text, a setting is out of range.
        FileExistsError: the key file exists.
    """
    if config.key is not None and pathlib.Path(config.key).exists():
        raise FileExistsError(f"{config.key} exists: name a new key file.")
    model = weights.load(config.model, dtype=jnp.dtype(config.dtype))
    words = data.load_tokenizer(
        config.tokenizer or config.model, vocab_limit=model.config.vocab_size
    )
    documents = read_documents(config.data, words, limit=config.limit)
    rng = np.random.default_rng(config.seed)
    keys = [
        watermark.WatermarkKey(int(rng.integers(2**63)), words.vocab_size)
        for _ in range(config.keys)
    ]
    facts = measure_corpus(documents, model, keys, config)
    heights = np.asarray(facts.entropies, np.float64)
    deciles = np.quantile(heights, QUANTILES)
    taus = config.taus or (
        watermark.NO_THRESHOLD,
        *sorted({round(float(value), 3) for value in deciles}),
    )
    forecasts = watermark.forecast(
        facts,
        gammas=config.gammas,
        taus=taus,
        deltas=config.deltas,
        length=config.length,
        false_positive_rate=config.false_positive_rate,
        temperature=config.temperature,
    )
    proposal = watermark.propose(forecasts, power=config.power)
    counts, edges = np.histogram(heights, BINS)
    found = {
        "model": config.model,
        "data": config.data,
        "texts": len(documents),
        "tokens": len(heights),
        "length": config.length,
        "false_positive_rate": config.false_positive_rate,
        "temperature": config.temperature,
        "entropies": {
            "mean": float(heights.mean()),
            "quantiles": dict(zip(map(str, QUANTILES), deciles.tolist(), strict=True)),
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        },
        "forecasts": [dataclasses.asdict(one) for one in forecasts],
        "proposal": dataclasses.asdict(proposal),
        "reaches_power": proposal.power >= config.power,
    }
    _print(found, forecasts, config)
    if config.out is not None:
        _write(folder_of(config.out), found)
    if config.key is not None:
        key = watermark.WatermarkKey.new(words.vocab_size)
        chosen = {n: getattr(proposal, n) for n in ("gamma", "delta", "tau")}
        write_key_file(config.key, KeyFile(key, **chosen))
    return found


def measure_corpus(
    documents: Sequence[Document],
    model: models.Model,
    keys: Sequence[watermark.WatermarkKey],
    config: WatermarkCalibrateConfig,
) -> watermark.TokenFacts:
    """`watermark.measure_tokens` over a corpus, in batches of like length."""
    most = min(config.max_tokens, model.config.max_positions)
    by_bucket: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        length = min(len(document.ids), most)
        if document.prompt_length < length:
            bucket = min(
                generation.bucket_length(length, minimum=SMALLEST_BUCKET), most
            )
            by_bucket.setdefault(bucket, []).append(number)
    total = sum(map(len, by_bucket.values()))
    if not total:
        raise ValueError(
            f"{config.data}: no text has a token within the first {most} tokens; raise "
            "--max-tokens."
        )
    shown = training.make_progress(
        config.progress, title="calibrate", start=0, total=total, plain_interval_s=10.0
    )
    parts, done = [], 0
    try:
        for bucket, members in sorted(by_bucket.items()):
            rows = max(config.batch_tokens // bucket, 1)
            for first in range(0, len(members), rows):
                part = members[first : first + rows]
                parts.append(
                    _measure_rows(part, bucket, rows, documents, model, keys, config)
                )
                done += len(part)
                shown.update(done, {})
    finally:
        shown.close()
    return watermark.join_facts(parts)


def _measure_rows(
    numbers: Sequence[int],
    bucket: int,
    rows: int,
    documents: Sequence[Document],
    model: models.Model,
    keys: Sequence[watermark.WatermarkKey],
    config: WatermarkCalibrateConfig,
) -> watermark.TokenFacts:
    tokens = np.zeros((rows, bucket), np.int32)
    mask = np.zeros((rows, bucket), np.bool_)
    for row, number in enumerate(numbers):
        ids = documents[number].ids[:bucket]
        tokens[row, : len(ids)] = ids
        mask[row, documents[number].prompt_length : len(ids)] = True
    names = np.zeros((rows,), np.int32)
    names[: len(numbers)] = numbers
    return watermark.measure_tokens(
        model,
        model.params,
        tokens,
        mask,
        keys=keys,
        gammas=config.gammas,
        temperature=config.temperature,
        documents=names,
    )


def _print(
    found: dict[str, Any],
    forecasts: Sequence[watermark.Forecast],
    config: WatermarkCalibrateConfig,
) -> None:
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False)
    histogram = found["entropies"]["histogram"]
    console.print(
        f"{found['tokens']} tokens of {found['texts']} texts; mean entropy "
        f"{found['entropies']['mean']:.3f} nats"
    )
    most = max(max(histogram["counts"]), 1)
    for count, left in zip(histogram["counts"], histogram["edges"], strict=False):
        console.print(f"{left:7.2f} {'█' * round(40 * count / most)} {count}")
    table = rich.table.Table(
        title=f"Texts of {config.length} tokens, false-positive rate "
        f"{config.false_positive_rate:g}, temperature {config.temperature:g}",
        caption="best of each tau and gamma; all are in calibration.json (--out)",
    )
    for name in ("tau", "gamma", "delta", "scored", "z", "power", "KL", "perplexity"):
        table.add_column(name, justify="right")
    best: dict[tuple[float, float], list[watermark.Forecast]] = {}
    for one in forecasts:
        best.setdefault((one.tau, one.gamma), []).append(one)
    for group in best.values():
        one = watermark.propose(group, power=config.power)
        table.add_row(*_cells(one))
    console.print(table)
    chosen = found["proposal"]
    console.print(
        f"proposal: tau {chosen['tau']:g}, gamma {chosen['gamma']:g}, delta "
        f"{chosen['delta']:g}: power {chosen['power']:.3f}, expected z "
        f"{chosen['z']:.2f}, KL {chosen['kl']:.4f} nats per token, perplexity "
        f"{chosen['plain_perplexity']:.3f} to {chosen['perplexity']:.3f}",
        style="bold",
    )
    if not found["reaches_power"]:
        console.print(
            f"no setting reaches a power of {config.power}: test longer texts, allow a "
            "higher --false-positive-rate, or add larger --deltas",
            style="yellow",
        )


def _cells(one: watermark.Forecast) -> list[str]:
    return [
        f"{one.tau:g}",
        f"{one.gamma:g}",
        f"{one.delta:g}",
        f"{one.scored:.0f}",
        f"{one.z:.2f}",
        f"{one.power:.3f}",
        f"{one.kl:.4f}",
        f"{one.perplexity:.3f}",
    ]


def _write(folder: pathlib.Path, found: dict[str, Any]) -> None:
    """`calibration.json` and, where matplotlib is installed, `entropies.svg`."""
    path = folder / "calibration.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    histogram, chosen = found["entropies"]["histogram"], found["proposal"]
    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color="#7aa6c2")
    if chosen["tau"] >= 0:
        axes.axvline(chosen["tau"], color="#b33", label=f"tau = {chosen['tau']:g}")
        axes.legend(frameon=False)
    axes.set_xlabel("entropy of the next token, nats")
    axes.set_ylabel("tokens")
    figure.savefig(folder / "entropies.svg")
