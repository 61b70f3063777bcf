"""Filtered distributions in float64 NumPy, one row at a time."""

import numpy as np


def softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def filtered(
    logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None
) -> np.ndarray:
    """Probabilities `[V]` after temperature, top-k, top-p and min-p, in this order."""
    probabilities = softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probabilities, kind="stable")
    if top_k is not None:
        probabilities[order[top_k:]] = 0.0
        probabilities /= probabilities.sum()
    if top_p is not None:
        mass = 0.0
        for token in order:
            if mass >= top_p:
                probabilities[token] = 0.0
            mass += probabilities[token]
        probabilities /= probabilities.sum()
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities.max()] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def entropy(probabilities) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
