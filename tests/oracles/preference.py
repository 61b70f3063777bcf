"""Definitions of the preference scores in loops, float64."""

import itertools
import math

import numpy as np


def pair_accuracy(margins):
    return sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins)


def auroc(scores, labels):
    """Every positive against every negative."""
    wins = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for s, positive in zip(scores, labels, strict=True)
        for t, other in zip(scores, labels, strict=True)
        if positive and not other
    ]
    return sum(wins) / len(wins) if wins else math.nan


def precision_recall_at(scores, labels, k):
    """Mean over every choice of `k` that no better choice beats."""
    scores, labels = list(scores), list(labels)
    best = sorted(scores, reverse=True)[:k]
    hits = [
        sum(labels[i] for i in chosen)
        for chosen in itertools.combinations(range(len(scores)), k)
        if sorted((scores[i] for i in chosen), reverse=True) == best
    ]
    taken = sum(hits) / len(hits)
    return taken / k, taken / sum(labels) if sum(labels) else math.nan


def calibration_error(margins, agreement, bins):
    """Pair by pair into bins `(edge, next edge]`, the first with its lower edge."""
    content = [[] for _ in range(bins)]
    for margin, share in zip(margins, agreement, strict=True):
        confidence = 1.0 / (1.0 + math.exp(-abs(margin)))
        right = share if margin > 0 else 1.0 - share if margin < 0 else 0.5
        edges = np.linspace(0.5, 1.0, bins + 1)
        place = next(b for b in range(bins) if confidence <= edges[b + 1])
        content[place].append((right, confidence))
    error = 0.0
    for members in content:
        if members:
            rights, confidences = zip(*members, strict=True)
            gap = sum(rights) / len(rights) - sum(confidences) / len(confidences)
            error += len(members) / len(margins) * abs(gap)
    return error


def rm_bench(chosen, rejected):
    """Hard, normal and easy accuracy, comparison by comparison."""
    groups = {"hard": [], "normal": [], "easy": []}
    for left, right in zip(chosen, rejected, strict=True):
        for i, j in itertools.product(range(3), range(3)):
            name = "hard" if j > i else "easy" if j < i else "normal"
            groups[name].append(left[i] - right[j])
    return {name: pair_accuracy(margins) for name, margins in groups.items()}
