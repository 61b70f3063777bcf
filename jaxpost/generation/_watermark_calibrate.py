"""What a watermark would do to a model's text: how visible, at what cost.

Everything follows from a few numbers per token of a corpus: the entropy, the
log-probability of the token that is there, and how much probability its position gives
to green tokens. Those are measured once, a chunk of positions at a time; every setting
of `tau`, `gamma` and `delta` is then arithmetic on them.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import ops
from jaxpost.generation._decode import Functions
from jaxpost.generation._sampling import spread
from jaxpost.generation._watermark_hash import WatermarkKey, green_count, green_rows
from jaxpost.typing import DecodeFns, Head, Params

CHUNK_BYTES = 16 * 2**20
"""Logits built at a time."""


class TokenFacts(NamedTuple):
    """Numbers per token of a corpus, `M` tokens, `K` keys, `N` values of gamma.

    Fields:
        document: which document it is of, int32 `[M]`.
        entropies: of the raw distribution, nats, float32 `[M]`.
        logps: of the token under raw / temperature, nats, float32 `[M]`.
        masses: probability of green tokens under raw / temperature, float32
            `[K, N, M]`.
        green: the token is green, bool `[K, N, M]`.
    """

    document: np.ndarray
    entropies: np.ndarray
    logps: np.ndarray
    masses: np.ndarray
    green: np.ndarray


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a setting would do.

    Fields:
        tau, gamma, delta: the setting.
        scored: expected scored tokens of a text.
        green_fraction: expected fraction of them that are green.
        z: expected z of a marked text.
        z_threshold: the z that unmarked text exceeds with the false-positive rate.
        power: probability that a marked text exceeds it, averaged over the corpus'
            documents.
        kl: divergence of the marked from the unmarked distribution, `KL(marked ||
            unmarked)`, nats per token.
        perplexity: of the corpus under the marked distribution.
        plain_perplexity: of the corpus under the unmarked one.
    """

    tau: float
    gamma: float
    delta: float
    scored: float
    green_fraction: float
    z: float
    z_threshold: float
    power: float
    kl: float
    perplexity: float
    plain_perplexity: float


def measure_tokens(
    fns: DecodeFns,
    params: Params,
    tokens: Any,
    mask: Any,
    *,
    keys: Sequence[WatermarkKey],
    gammas: Sequence[float],
    temperature: float = 1.0,
    documents: Any = None,
) -> TokenFacts:
    """The numbers that `forecast` needs, of the tokens of a batch of texts.

    Args:
        fns, params: the model whose text will be marked.
        tokens: texts without a gap, integer `[B, T]`; any valid id after the end.
        mask: tokens to measure, bool `[B, T]`, False in column 0; a row ends where its
            last measured token does.
        keys: keys to average over, of one vocabulary.
        gammas: fractions of green ids.
        temperature: of the sampler, positive.
        documents: number of each row's document, integer `[B]`; default its place.

    Raises:
        ValueError: shapes differ, the mask has column 0, there is no key, the keys'
            vocabularies differ, or `temperature` or a `gamma` is out of range.
    """
    mask = np.asarray(mask)
    if mask.shape != np.shape(tokens) or mask.dtype != np.bool_ or mask[:, 0].any():
        raise ValueError(
            "mask must be bool [B, T] like tokens and False in column 0, got "
            f"{mask.dtype} {mask.shape} and {np.shape(tokens)}."
        )
    if not keys or len({key.vocab_size for key in keys}) > 1:
        raise ValueError("keys must be at least one, all of one vocabulary.")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    vocab_size = keys[0].vocab_size
    counts = np.array([green_count(g, vocab_size) for g in gammas], np.uint32)
    found = jax.device_get(
        _measure(
            Functions.of(fns),
            params,
            jnp.asarray(tokens, jnp.int32),
            mask,
            np.stack([key.words for key in keys]),
            counts,
            np.float32(temperature),
            vocab_size=vocab_size,
        )
    )
    names = np.arange(len(mask)) if documents is None else np.asarray(documents)
    rows, columns = np.nonzero(mask)
    entropies, logps, masses, green = (array[rows, columns] for array in found)
    return TokenFacts(
        names[rows].astype(np.int32),
        entropies,
        logps,
        np.moveaxis(masses, 0, -1),
        np.moveaxis(green, 0, -1),
    )


def join_facts(parts: Sequence[TokenFacts]) -> TokenFacts:
    """Facts of several batches as one."""
    return TokenFacts(*(np.concatenate(x, axis=-1) for x in zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnames=("functions", "vocab_size"))
def _measure(
    functions: Functions,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    words: jax.Array,
    counts: jax.Array,
    temperature: Any,
    *,
    vocab_size: int,
) -> tuple[jax.Array, ...]:
    fns = functions.restore()
    length = tokens.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    ends = length - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    segments = (columns < ends[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(columns, tokens.shape)
    hidden = fns.apply(params, tokens, positions, segments).hidden
    head = fns.unembed(params)
    targets, _ = ops.shift_targets(tokens, mask)
    chunk = max(1, CHUNK_BYTES // (4 * head.weight.shape[1]))
    size = tokens.size
    padded = -(-size // chunk) * chunk

    def chunked(array: jax.Array) -> jax.Array:
        flat = array.reshape(size, *array.shape[2:])
        flat = jnp.pad(flat, ((0, padded - size), *[(0, 0)] * (flat.ndim - 1)))
        return flat.reshape(-1, chunk, *flat.shape[1:])

    def step(part: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        states, before, own = part
        return _measure_chunk(
            head, states, before, own, words, counts, temperature, vocab_size
        )

    parts = jax.lax.map(step, (chunked(hidden), chunked(tokens), chunked(targets)))

    def back(array: jax.Array) -> jax.Array:
        flat = array.reshape(padded, *array.shape[2:])[:size]
        rows = flat.reshape(*tokens.shape, *flat.shape[1:])
        # What a place predicts belongs to the next token.
        return jnp.roll(rows, 1, axis=1)

    return tuple(back(array) for array in parts)


def _measure_chunk(
    head: Head,
    hidden: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    words: jax.Array,
    counts: jax.Array,
    temperature: Any,
    vocab_size: int,
) -> tuple[jax.Array, ...]:
    """Entropies, log-probabilities `[C]`, masses and greenness `[C, K, N]`."""
    raw = ops.logits(hidden, head).astype(jnp.float32)
    logps = jax.nn.log_softmax(raw / temperature, axis=-1)
    probabilities = jnp.exp(logps[:, :vocab_size])
    own = jnp.minimum(targets, vocab_size - 1)[:, None]

    def of_key(key_words: jax.Array) -> tuple[jax.Array, jax.Array]:
        def of_count(count: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = green_rows(key_words, tokens, count, vocab_size)
            mass = jnp.sum(jnp.where(rows, probabilities, 0.0), axis=-1)
            return mass, jnp.take_along_axis(rows, own, axis=1)[:, 0]

        return jax.lax.map(of_count, counts)

    masses, green = jax.lax.map(of_key, words)
    chosen = jnp.take_along_axis(logps, targets[:, None], axis=1)[:, 0]
    return (
        spread(raw).entropies,
        chosen,
        jnp.moveaxis(masses, -1, 0),
        jnp.moveaxis(green, -1, 0),
    )


def forecast(
    facts: TokenFacts,
    *,
    gammas: Sequence[float],
    taus: Sequence[float],
    deltas: Sequence[float],
    length: int,
    false_positive_rate: float,
    temperature: float = 1.0,
) -> list[Forecast]:
    """What each setting would do to texts like the corpus.

    A marked text is taken to have positions like those of a document of the corpus,
    independent of each other; the power is that of the normal approximation. Filters
    such as top-p are not modelled.

    Args:
        facts: from `measure_tokens` with the same `gammas` and `temperature`.
        gammas, taus, deltas: settings, every combination of which is looked at.
        length: tokens of a text.
        false_positive_rate: of the test, in (0, 1).
        temperature: of the sampler.

    Raises:
        ValueError: `length` or `false_positive_rate` is out of range, or `gammas` are
            not those of `facts`.
    """
    if length < 1 or not 0.0 < false_positive_rate < 1.0:
        raise ValueError(
            "length must be at least 1 and false_positive_rate in (0, 1), got "
            f"{length} and {false_positive_rate}."
        )
    if len(gammas) != facts.masses.shape[1]:
        raise ValueError(
            f"facts are of {facts.masses.shape[1]} values of gamma, got {len(gammas)}."
        )
    threshold = statistics.NormalDist().inv_cdf(1.0 - false_positive_rate)
    return [
        _forecast_one(facts, n, gamma, tau, delta, length, threshold, temperature)
        for n, gamma in enumerate(gammas)
        for tau in taus
        for delta in deltas
    ]


def _forecast_one(
    facts: TokenFacts,
    number: int,
    gamma: float,
    tau: float,
    delta: float,
    length: int,
    threshold: float,
    temperature: float,
) -> Forecast:
    from scipy.special import ndtr

    bonus = delta / temperature
    above = facts.entropies > np.float32(tau)
    mass = facts.masses[:, number].astype(np.float64)
    log_total = np.log1p(np.expm1(bonus) * mass)
    hit = mass * np.exp(bonus - log_total)  # [K, M], probability of a green token
    kl = np.where(above, hit * bonus - log_total, 0.0).mean()
    gain = np.where(above, facts.green[:, number] * bonus - log_total, 0.0).mean()
    plain = -facts.logps.mean(dtype=np.float64)

    # Per document: its share of scored tokens, and how often a marked one is green.
    _, document = np.unique(facts.document, return_inverse=True)
    tokens = np.bincount(document)
    scored = np.bincount(document, above)
    hits = np.bincount(document, np.where(above, hit.mean(axis=0), 0.0))
    share = scored / tokens
    rate = hits / np.maximum(scored, 1.0)
    excess = rate - gamma
    mean = length * share * excess
    spread = np.sqrt(length * share * gamma * (1.0 - gamma))
    variance = length * (
        share * (rate * (1.0 - rate) + excess**2) - (share * excess) ** 2
    )
    margin = (mean - threshold * spread) / np.sqrt(np.maximum(variance, 1e-12))
    power = np.where(share > 0, ndtr(margin), 0.0)
    z = np.where(share > 0, mean / np.maximum(spread, 1e-12), 0.0)
    weights = tokens / tokens.sum()
    return Forecast(
        tau=float(tau),
        gamma=float(gamma),
        delta=float(delta),
        scored=float(length * above.mean()),
        green_fraction=float(hits.sum() / max(scored.sum(), 1.0)),
        z=float(z @ weights),
        z_threshold=threshold,
        power=float(power @ weights),
        kl=float(kl),
        perplexity=float(np.exp(plain - gain)),
        plain_perplexity=float(np.exp(plain)),
    )


def propose(forecasts: Sequence[Forecast], *, power: float) -> Forecast:
    """The setting of least divergence that has the power; else the most powerful.

    Raises:
        ValueError: there is no forecast.
    """
    if not forecasts:
        raise ValueError("there is no forecast to choose from.")
    enough = [found for found in forecasts if found.power >= power]
    if not enough:
        return max(forecasts, key=lambda found: (found.power, -found.kl))
    return min(enough, key=lambda found: (found.kl, -found.power))
