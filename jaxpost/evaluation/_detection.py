"""How well a detector tells two kinds of text apart, and pass@k of generated code.

Pure functions of NumPy arrays; what made the scores or ran the code is not known here.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from jaxpost.evaluation._preference import auroc

FALSE_POSITIVE_RATES = (0.0, 0.01, 0.05)


@dataclasses.dataclass(frozen=True)
class Detection:
    """Of scores of positives and negatives.

    Fields:
        auroc: chance that a positive scores above a negative, ties half.
        tpr: share of positives found, by the largest share of negatives that may be
            taken for positives.
        positives, negatives: how many there were.
    """

    auroc: float
    tpr: dict[float, float]
    positives: int
    negatives: int


def detection(
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
) -> Detection:
    """AUROC, and the true-positive rate at each false-positive rate.

    Args:
        positives, negatives: scores, float `[P]` and `[N]`, of any two lengths;
            infinite ones are ordered.
        rates: each in [0, 1].

    Raises:
        ValueError: there are no positives or no negatives, a score is NaN, or a rate is
            outside [0, 1].
    """
    above, below = _scores(positives, "positives"), _scores(negatives, "negatives")
    labels = np.repeat([True, False], [above.size, below.size])
    return Detection(
        auroc=auroc(np.concatenate([above, below]), labels),
        tpr={rate: tpr_at_fpr(above, below, fpr=rate) for rate in rates},
        positives=above.size,
        negatives=below.size,
    )


def tpr_at_fpr(positives: ArrayLike, negatives: ArrayLike, *, fpr: float) -> float:
    """Share of positives found when at most a share `fpr` of negatives is.

    That is the last point of the ROC curve whose false-positive rate is at most `fpr`.
    A threshold takes or leaves equal scores together.

    Args:
        positives, negatives: scores, float `[P]` and `[N]`.
        fpr: in [0, 1].

    Raises:
        ValueError: as `detection`.
    """
    above, below = _scores(positives, "positives"), _scores(negatives, "negatives")
    if not 0.0 <= fpr <= 1.0:
        raise ValueError(f"fpr must lie in [0, 1], got {fpr}.")
    # Shares are of whole negatives: 0.29 * 100 must allow 29 of them.
    allowed = int(np.floor(fpr * below.size * (1.0 + 1e-12)))
    if allowed >= below.size:
        return 1.0
    last_refused = np.sort(below)[::-1][allowed]
    return float(np.mean(above > last_refused))


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> np.ndarray:
    """Chance that one of `k` samples is right, estimated without bias from more.

    Computes `1 - C(n - c, k) / C(n, k)`, as a product.

    Args:
        samples: `n`, how many were drawn of each task, integer, any shape.
        correct: `c`, how many of them were right, likewise.
        k: how many may be tried, at least 1.

    Returns:
        Per task, float64, the shape of `samples`; its mean is pass@k.

    Raises:
        ValueError: counts are not integers of one shape with `0 <= c <= n`, or a task
            has fewer than `k` samples.

    Source: Chen et al. (2021), "Evaluating Large Language Models Trained on Code",
    eq. 1.
    """
    drawn, right = np.asarray(samples), np.asarray(correct)
    whole = drawn.dtype.kind in "iu" and right.dtype.kind in "iu"
    if not whole or drawn.shape != right.shape:
        raise ValueError(
            "samples and correct must be integers of one shape, got "
            f"{drawn.dtype} {drawn.shape} and {right.dtype} {right.shape}."
        )
    if (right < 0).any() or (right > drawn).any():
        raise ValueError("correct must lie between 0 and samples.")
    if k < 1 or (drawn < k).any():
        raise ValueError(
            f"k must lie between 1 and the samples of every task, got k={k} with "
            f"{drawn.min() if drawn.size else 0} samples of some task."
        )
    # All k wrong: the i-th is, given that those before were, in n - c - i of n - i.
    wrong = np.ones(drawn.shape, np.float64)
    for i in range(k):
        wrong *= np.maximum(drawn - right - i, 0) / (drawn - i)
    return 1.0 - wrong


def _scores(values: ArrayLike, name: str) -> np.ndarray:
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(
            f"{name} must be a list of at least one score, got the shape "
            f"{scores.shape}."
        )
    if np.isnan(scores).any():
        raise ValueError(f"score {int(np.argmax(np.isnan(scores)))} of {name} is NaN.")
    return scores
