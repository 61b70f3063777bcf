"""How well scores agree with preferences: accuracy, calibration, outliers, intervals.

Pure functions of NumPy arrays. A margin is the score of the chosen answer minus that of
the rejected one; what made the scores is not known here.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Statistic = Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number and how far chance could move it.

    Fields:
        value: the statistic of the whole sample.
        low, high: percentiles of the statistic over resampled data.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclasses.dataclass(frozen=True)
class MarginGroup:
    """Pairs whose margins are of similar size.

    Fields:
        low, high: smallest and largest `|margin|` in the group.
        count: how many pairs.
        accuracy: share of them in the right order, ties half.
        confidence: mean of `sigmoid(|margin|)`.
    """

    low: float
    high: float
    count: int
    accuracy: float
    confidence: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Whether `sigmoid(|margin|)` is the share of pairs in the right order.

    Fields:
        error: expected calibration error, in [0, 1].
        edges: borders of the bins of confidence, `[bins + 1]`, from 0.5 to 1.
        counts: pairs per bin, `[bins]`.
        accuracies, confidences: means per bin, `[bins]`; NaN where it is empty.
    """

    error: float
    edges: np.ndarray
    counts: np.ndarray
    accuracies: np.ndarray
    confidences: np.ndarray


def verdicts(margins: ArrayLike) -> np.ndarray:
    """1 where a margin is positive, 0.5 where it is zero, 0 where negative.

    Args:
        margins: float, any shape; infinite ones count.

    Returns:
        float64, the margins' shape.

    Raises:
        ValueError: there are no margins, or one is NaN (the message names the first).
    """
    values = np.asarray(margins, np.float64)
    if not values.size:
        raise ValueError("there are no pairs to judge.")
    if np.isnan(values).any():
        place = int(np.argmax(np.isnan(values).ravel()))
        raise ValueError(
            f"margin {place} is NaN; leave such pairs out, and count them."
        )
    return np.where(values == 0.0, 0.5, (values > 0.0).astype(np.float64))


def pair_accuracy(margins: ArrayLike) -> float:
    """Share of pairs in the right order, ties counted half, in [0, 1].

    Raises:
        ValueError: as `verdicts`.
    """
    return float(np.mean(verdicts(margins)))


def calibration(
    margins: ArrayLike, *, agreement: ArrayLike | None = None, bins: int = 10
) -> Calibration:
    """Expected calibration error of the Bradley-Terry probability of a margin.

    Which answer of a pair comes first is arbitrary, so each pair is read from the side
    of the answer that the model prefers: confidence `sigmoid(|m|)` in [0.5, 1], right
    if that is the chosen one. Bins have equal widths; a confidence on a border belongs
    to the bin below it. The error is the mean over pairs of
    `|accuracy - confidence|` of their bin.

    Args:
        margins: float `[N]`.
        agreement: share of annotators who prefer the chosen answer, in [0, 1], `[N]`;
            None is 1 for every pair.
        bins: how many.

    Raises:
        ValueError: as `verdicts`; agreement outside [0, 1] or of another length; fewer
            bins than one.

    Source: Naeini et al. (2015), "Obtaining Well Calibrated Probabilities Using
    Bayesian Binning", eq. 3, on pairs.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    right = verdicts(margins).ravel()
    if agreement is not None:
        share = np.asarray(agreement, np.float64)
        if share.shape != right.shape or not ((share >= 0) & (share <= 1)).all():
            raise ValueError(
                "agreement must hold one share in [0, 1] per pair, got the shape "
                f"{share.shape} for {right.size} pairs."
            )
        right = right * share + (1.0 - right) * (1.0 - share)
    confidence = _confidence(margins)
    edges = np.linspace(0.5, 1.0, bins + 1)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    filled = np.maximum(counts, 1)
    accuracies = np.bincount(places, weights=right, minlength=bins) / filled
    confidences = np.bincount(places, weights=confidence, minlength=bins) / filled
    error = float(np.sum(counts * np.abs(accuracies - confidences)) / counts.sum())
    accuracies, confidences = (
        np.where(counts > 0, x, np.nan) for x in (accuracies, confidences)
    )
    return Calibration(error, edges, counts, accuracies, confidences)


def accuracy_by_margin(margins: ArrayLike, *, groups: int = 10) -> list[MarginGroup]:
    """Accuracy by the size of the margin: by deciles of `|margin|` for ten groups.

    Borders are quantiles. Margins of one size stay in one group, so a group may be
    larger than its share, and one that would be empty is left out.

    Args:
        margins: float `[N]`.
        groups: how many.

    Returns:
        From the smallest margins to the largest.

    Raises:
        ValueError: as `verdicts`; fewer groups than one.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}.")
    right = verdicts(margins).ravel()
    sizes = np.abs(np.asarray(margins, np.float64)).ravel()
    confidence = _confidence(margins)
    # "lower" takes an element of the sample: no infinity minus infinity, no rounding.
    shares = np.arange(1, groups) / groups
    edges = np.quantile(sizes, shares, method="lower")
    places = np.searchsorted(edges, sizes, side="left")
    found = []
    for group in range(groups):
        members = places == group
        if members.any():
            found.append(
                MarginGroup(
                    low=float(sizes[members].min()),
                    high=float(sizes[members].max()),
                    count=int(members.sum()),
                    accuracy=float(right[members].mean()),
                    confidence=float(confidence[members].mean()),
                )
            )
    return found


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties counted half.

    Args:
        scores: float `[N]`; infinite ones are ordered, NaN is refused.
        labels: bool `[N]`, True for positives (for outliers: the flipped pairs).

    Returns:
        Area under the curve of true against false positives, in [0, 1]; NaN without
        both a positive and a negative.

    Raises:
        ValueError: lengths differ, or a score is NaN.

    Source: the Mann-Whitney statistic over the product of the two counts.
    """
    values, positive = _ranked_input(scores, labels)
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return math.nan
    _, place, size = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    ranks = (last - (size - 1) / 2.0)[place]  # of equal scores, their mean rank
    above = ranks[positive].sum() - count * (count + 1) / 2.0
    return float(above / (count * others))


def precision_recall_at(
    scores: ArrayLike, labels: ArrayLike, k: int
) -> tuple[float, float]:
    """Precision and recall of the `k` highest scores.

    Of scores that tie across the cut, as many as still fit are taken, each with the
    same chance: the result is the mean over all ways to break the tie.

    Args:
        scores: float `[N]`.
        labels: bool `[N]`, True for positives.
        k: how many to take, 1 to N.

    Returns:
        Positives taken over `k`, and over all positives (NaN if there are none).

    Raises:
        ValueError: lengths differ, a score is NaN, or `k` is outside 1 to N.
    """
    values, positive = _ranked_input(scores, labels)
    if not 1 <= k <= values.size:
        raise ValueError(f"k must lie between 1 and {values.size}, got {k}.")
    cut = np.partition(values, values.size - k)[values.size - k]
    above, level = values > cut, values == cut
    room = k - int(above.sum())
    taken = positive[above].sum() + positive[level].sum() * room / level.sum()
    total = int(positive.sum())
    return float(taken / k), float(taken / total) if total else math.nan


def bootstrap_interval(
    values: ArrayLike,
    *,
    statistic: Statistic | None = None,
    level: float = 0.95,
    samples: int = 2000,
    seed: int,
) -> Interval:
    """Percentile interval of a statistic under resampling of rows with replacement.

    For a paired comparison pass the differences, or both columns and a statistic of
    both: rows are drawn whole.

    Args:
        values: `[N]` or `[N, ...]`, one row per independent unit (pair, prompt, seed).
        statistic: from rows to a number; None is the mean of `[N]`.
        level: coverage, in (0, 1).
        samples: how often to resample.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: no rows, a level outside (0, 1), or no samples.

    Source: Efron (1979), "Bootstrap Methods"; percentile form.
    """
    rows = np.asarray(values)
    if not rows.shape or not rows.shape[0]:
        raise ValueError("bootstrap_interval needs at least one row.")
    if not 0.0 < level < 1.0 or samples < 1:
        raise ValueError(
            f"level must lie in (0, 1) and samples be positive, got {level}, {samples}."
        )
    rng = np.random.default_rng(seed)
    take: Statistic = statistic or (lambda rows: float(np.mean(rows)))
    count = rows.shape[0]
    drawn = [take(rows[rng.integers(0, count, count)]) for _ in range(samples)]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Interval(float(take(rows)), float(low), float(high))


def _confidence(margins: ArrayLike) -> np.ndarray:
    """`sigmoid(|m|)`, float64 `[N]`."""
    return 1.0 / (1.0 + np.exp(-np.abs(np.asarray(margins, np.float64)).ravel()))


def _ranked_input(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    values, positive = np.asarray(scores, np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != positive.shape or positive.dtype != bool:
        raise ValueError(
            "scores [N] and bool labels [N] are expected, got "
            f"{values.shape} and {positive.dtype} {positive.shape}."
        )
    if np.isnan(values).any():
        raise ValueError(f"score {int(np.argmax(np.isnan(values)))} is NaN.")
    return values, positive
