"""Detecting a watermark: are more tokens green than chance makes them?

Only tokens whose position has an entropy above the threshold count, the same that the
embedding could have raised. Knows tokens and entropies; where they come from, the
generating model or a surrogate, with or without the prompt, is the caller's choice.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.generation._watermark import check_tau
from jaxpost.generation._watermark_hash import WatermarkKey, are_green, green_count

NEAR_TAU = 1e-4
"""Nats: decoding with a cache may decide entropies closer to `tau` than this otherwise
than one pass over the text does."""

NOTHING_SCORED = -100.0
"""The z of a text without a scored token, as in SWEET's own program."""

Verdict = Literal["watermarked", "not detected", "insufficient tokens"]


class TokenMarks(NamedTuple):
    """What detection sees in each token, bool `[B, T]` each.

    Fields:
        scored: it counts: it is of the text, its entropy is above `tau` and, without
            repeats, it is the first such with this predecessor in its row.
        green: it is of the text and on the green list of its predecessor.
        near: it is of the text and its entropy is within `NEAR_TAU` of `tau`.
    """

    scored: jax.Array
    green: jax.Array
    near: jax.Array


@dataclasses.dataclass(frozen=True)
class Detection:
    """What the watermark's test says of one text.

    Fields:
        z: standard deviations by which green tokens exceed chance; -100 if no token is
            scored.
        p: probability of so large a z by chance, by the normal approximation.
        p_exact: probability of so many green tokens by chance, by the binomial
            distribution; what to read for short texts.
        scored: tokens that count, `T`.
        green: green ones among them, `G`.
        near: tokens whose entropy is within 1e-4 nats of `tau`.
        green_fraction: `G / T`, 0 if none is scored.
        watermarked_fraction: `T` over the text's tokens.
        verdict: "watermarked" if z exceeds the threshold; "insufficient tokens" if it
            could not have, with every scored token green; else "not detected".
        reason: the verdict in words.
        marks: of each token, bool `[T]` arrays; all False before the text.
    """

    z: float
    p: float
    p_exact: float
    scored: int
    green: int
    near: int
    green_fraction: float
    watermarked_fraction: float
    verdict: Verdict
    reason: str
    marks: TokenMarks = dataclasses.field(repr=False)

    @property
    def prediction(self) -> bool | None:
        """True, False, or None where there are too few tokens to tell."""
        verdicts = {"watermarked": True, "not detected": False}
        return verdicts.get(self.verdict)

    @property
    def confidence(self) -> float:
        """`1 - p`."""
        return 1.0 - self.p


def detect(
    tokens: Any,
    entropies: Any,
    prompt_length: int,
    key: WatermarkKey,
    *,
    gamma: float,
    tau: float,
    z_threshold: float = 4.0,
    unique: bool = False,
) -> Detection:
    """Test one text for a watermark.

    Args:
        tokens: ids of the prompt and the text, integer `[T]`.
        entropies: of the raw distribution that each token was drawn from, nats, float
            `[T]`: `entropies[t]` belongs to `tokens[t]`, and was computed from the
            tokens before it. What stands for prompt tokens is not read.
        prompt_length: tokens that are not tested, at least 1: the first token of a text
            has no predecessor that could make it green. For a text without its prompt,
            1.
        key: the watermark's.
        gamma: fraction of ids that are green; that of the embedding.
        tau: entropy that must be exceeded, nats; that of the embedding. -1 scores every
            token (WLLM), and `entropies` are not read then and may be None.
        z_threshold: the z that a watermark must exceed.
        unique: score only the first of tokens that are equal and have equal
            predecessors. They are green together, so counting each makes z vary more
            than the test assumes.

    Raises:
        ValueError: lengths differ; nothing is left to score; an entropy of the text is
            not finite, or missing; `gamma` or `tau` is out of range.

    Warns:
        UserWarning: `tau` is at least `log V`: nothing is ever scored.

    Source: Lee et al. (2024), "Who Wrote this Code? Watermarking for Code Generation",
    section 3.3, equation 3.
    """
    tokens = _checked_tokens(tokens)
    length = len(tokens)
    if prompt_length < 1:
        raise ValueError(
            f"prompt_length must be at least 1, got {prompt_length}: a text's first "
            "token has no predecessor, so it cannot be scored."
        )
    if prompt_length >= length:
        raise ValueError(
            f"nothing to score: prompt_length is {prompt_length}, and there are only "
            f"{length} tokens in all."
        )
    values = _checked_entropies(entropies, length, prompt_length, tau)
    check_tau(tau, key.vocab_size)
    # Padded to a bucket, so that texts of many lengths need few programs.
    padded = max(64, 1 << (length - 1).bit_length())
    columns = np.arange(padded)
    (found,) = detect_batch(
        np.pad(tokens, (0, padded - length))[None],
        np.pad(values, (0, padded - length))[None],
        ((columns >= prompt_length) & (columns < length))[None],
        key,
        gamma=gamma,
        tau=tau,
        z_threshold=z_threshold,
        unique=unique,
    )
    marks = TokenMarks(*(array[:length] for array in found.marks))
    return dataclasses.replace(found, marks=marks)


def detect_batch(
    tokens: Any,
    entropies: Any,
    mask: Any,
    key: WatermarkKey,
    *,
    gamma: float,
    tau: float,
    z_threshold: float = 4.0,
    unique: bool = False,
) -> list[Detection]:
    """Test many texts at once; as `detect`, but for `mask`.

    Args:
        tokens: prompts and texts, integer `[B, T]`; anything where masked, but the
            predecessor of each token of the text must be in front of it.
        entropies: float `[B, T]`; anything where masked.
        mask: tokens of the texts, bool `[B, T]`, False in column 0.
        key, gamma, tau, z_threshold, unique: as in `detect`.

    Raises:
        ValueError: shapes differ; a row has nothing to score, or its mask has column 0;
            an entropy of a text is not finite; `gamma` or `tau` is out of range.
    """
    tokens, entropies = np.asarray(tokens), np.asarray(entropies)
    mask = np.asarray(mask)
    check_tau(tau, key.vocab_size)
    marks = mark_tokens(
        tokens, entropies, mask, key, gamma=gamma, tau=tau, unique=unique
    )
    lengths = mask.sum(axis=1)
    if not lengths.all():
        rows = np.flatnonzero(lengths == 0).tolist()
        raise ValueError(f"nothing to score in rows {rows[:8]}: mask is False there.")
    bad = mask & ~np.isfinite(entropies)
    if bad.any():
        row, column = (int(index[0]) for index in np.nonzero(bad))
        raise ValueError(
            f"entropies[{row}, {column}] is {entropies[row, column]}: the model's "
            "logits there were not finite."
        )
    return _judge(
        TokenMarks(*jax.device_get(marks)),
        lengths,
        gamma=gamma,
        tau=tau,
        z_threshold=z_threshold,
    )


def mark_tokens(
    tokens: Any,
    entropies: Any,
    mask: Any,
    key: WatermarkKey,
    *,
    gamma: float,
    tau: float,
    unique: bool = False,
) -> TokenMarks:
    """Which tokens of many texts count, and which are green, in one compiled pass.

    Another key, `gamma` or `tau` compiles nothing anew.

    Args:
        tokens: prompts and texts, integer `[B, T]`; anything where masked, but the
            predecessors of tokens of the text must be there.
        entropies: as in `detect`, float `[B, T]`.
        mask: tokens of the texts, bool `[B, T]`, False in column 0.
        key, gamma, tau, unique: as in `detect`.

    Raises:
        ValueError: shapes or dtypes differ, the mask has column 0, or `gamma` is out of
            range.
    """
    count = green_count(gamma, key.vocab_size)
    shapes = {np.shape(tokens), np.shape(entropies), np.shape(mask)}
    if len(shapes) > 1 or np.ndim(tokens) != 2:
        raise ValueError(
            "tokens, entropies and mask must be [B, T], got "
            f"{np.shape(tokens)}, {np.shape(entropies)} and {np.shape(mask)}."
        )
    if isinstance(mask, np.ndarray) and mask[:, 0].any():
        raise ValueError(
            "mask is True in column 0, whose tokens have no predecessor to be green "
            "after: put the prompt, or a first token, before the text."
        )
    return _mark(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(entropies, jnp.float32),
        jnp.asarray(mask),
        key.words,
        np.uint32(count),
        np.float32(tau),
        vocab_size=key.vocab_size,
        unique=unique,
    )


@functools.partial(jax.jit, static_argnames=("vocab_size", "unique"))
def _mark(
    tokens: jax.Array,
    entropies: jax.Array,
    mask: jax.Array,
    words: Any,
    count: Any,
    tau: Any,
    *,
    vocab_size: int,
    unique: bool,
) -> TokenMarks:
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    green = mask & are_green(words, before, tokens, count, vocab_size)
    scored = mask & (entropies > tau)
    if unique:
        scored = _first_of_each(before, tokens, scored)
    return TokenMarks(scored, green, mask & (jnp.abs(entropies - tau) < NEAR_TAU))


def _first_of_each(
    before: jax.Array, tokens: jax.Array, scored: jax.Array
) -> jax.Array:
    """`scored` where no earlier scored place of the row has the same pair."""
    places = jnp.broadcast_to(
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
    )
    left_out = ~scored
    out, first, second, where = jax.lax.sort(
        (left_out.astype(jnp.int32), before, tokens, places), num_keys=4
    )
    same = (first[:, 1:] == first[:, :-1]) & (second[:, 1:] == second[:, :-1])
    new = (out == 0) & jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros_like(scored).at[rows, where].set(new)


def z_scores(green: Any, scored: Any, *, gamma: float) -> np.ndarray:
    """`(G - gamma T) / sqrt(T gamma (1 - gamma))`, float64; -100 where `T` is 0.

    Args:
        green: green tokens among the scored ones, `G`, integer of any shape.
        scored: scored tokens, `T`, likewise.
        gamma: fraction of ids that are green.
    """
    green, scored = np.asarray(green, np.float64), np.asarray(scored, np.float64)
    spread = np.sqrt(np.maximum(scored, 1.0) * gamma * (1.0 - gamma))
    return np.where(scored > 0, (green - gamma * scored) / spread, NOTHING_SCORED)


def p_values(z: Any) -> np.ndarray:
    """`1 - Phi(z)`, float64, exact in the tail."""
    from scipy.special import ndtr

    return ndtr(-np.asarray(z, np.float64))


def binomial_tails(green: Any, scored: Any, *, gamma: float) -> np.ndarray:
    """Probability of at least `green` of `scored` by chance, float64."""
    from scipy.special import betainc

    green, scored = np.asarray(green, np.float64), np.asarray(scored, np.float64)
    tail = betainc(np.maximum(green, 1.0), scored - np.maximum(green, 1.0) + 1.0, gamma)
    return np.where(green > 0, tail, 1.0)


def fewest_green(scored: int, *, gamma: float, z_threshold: float = 4.0) -> int | None:
    """The least `G` whose z exceeds the threshold, or None if not even `T` does."""
    green = _fewest(np.asarray([scored]), gamma, z_threshold)[0]
    return int(green) if green <= scored else None


def _fewest(scored: np.ndarray, gamma: float, z_threshold: float) -> np.ndarray:
    """`fewest_green` of each, int64; more than `scored` where not even that does."""
    spread = np.sqrt(scored * gamma * (1.0 - gamma))
    guess = np.floor(gamma * scored + z_threshold * spread).astype(np.int64)
    # The formula's rounding may be off by one from that of the z that is compared.
    near = guess[:, None] + np.arange(-1, 3)[None]
    enough = z_scores(near, scored[:, None], gamma=gamma) > z_threshold
    found = np.where(enough.any(axis=1), near[:, 0] + enough.argmax(axis=1), guess + 3)
    return np.maximum(found, 0)


def _judge(
    marks: TokenMarks,
    lengths: np.ndarray,
    *,
    gamma: float,
    tau: float,
    z_threshold: float,
) -> list[Detection]:
    """The verdicts on texts of `lengths` tokens, from their marks `[B, T]`."""
    scored = np.sum(marks.scored, axis=1)
    green = np.sum(marks.scored & marks.green, axis=1)
    near = np.sum(marks.near, axis=1)
    z = z_scores(green, scored, gamma=gamma)
    p = np.where(scored > 0, p_values(z), 1.0)
    exact = binomial_tails(green, scored, gamma=gamma)
    fewest = _fewest(scored, gamma, z_threshold)
    out = []
    for row in range(len(lengths)):
        total, hits = int(scored[row]), int(green[row])
        verdict: Verdict = "not detected"
        reason = (
            f"{hits} of {total} scored tokens are green; {fewest[row]} would exceed "
            f"z = {z_threshold}"
        )
        if fewest[row] > total:
            verdict = "insufficient tokens"
            reason = (
                f"{total} of {lengths[row]} tokens have an entropy above {tau} nats; "
                f"even if all were green, z could not exceed {z_threshold}"
            )
        elif z[row] > z_threshold:
            verdict = "watermarked"
            reason = f"z = {z[row]:.2f} exceeds {z_threshold}"
        out.append(
            Detection(
                z=float(z[row]),
                p=float(p[row]),
                p_exact=float(exact[row]),
                scored=total,
                green=hits,
                near=int(near[row]),
                green_fraction=hits / total if total else 0.0,
                watermarked_fraction=total / int(lengths[row]),
                verdict=verdict,
                reason=reason,
                marks=TokenMarks(*(array[row] for array in marks)),
            )
        )
    return out


def _checked_tokens(tokens: Any) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integer ids [T], got {tokens.dtype} {tokens.shape}."
        )
    return tokens.astype(np.int32)


def _checked_entropies(
    entropies: Any, length: int, prompt_length: int, tau: float
) -> np.ndarray:
    """float32 `[T]`; zeros if there are none and none are needed."""
    if entropies is None:
        if tau >= 0.0:
            raise ValueError(
                "SWEET detection needs the generating model's entropies: pass "
                "entropies (or --model on the command line), or tau=-1 for a text "
                "marked without a threshold."
            )
        return np.zeros((length,), np.float32)
    entropies = np.asarray(entropies, np.float32)
    if entropies.shape != (length,):
        raise ValueError(
            f"entropies must be [T] = ({length},) like tokens, got {entropies.shape}."
        )
    bad = ~np.isfinite(entropies[prompt_length:])
    if bad.any():
        place = prompt_length + int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"entropies[{place}] is {entropies[place]}: the model's logits there were "
            "not finite."
        )
    return entropies
