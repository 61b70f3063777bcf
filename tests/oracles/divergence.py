"""Divergences as expectations over the student: `sum S f(T / S)`, in float64 loops."""

import math


def divergence(student, teacher, alpha):
    """Of two lists of probabilities, all positive."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        ratio = t / s
        mixture = 1.0 - alpha + alpha * ratio
        if alpha == 0.0:
            f = ratio * math.log(ratio)
        elif alpha == 1.0:
            f = -math.log(ratio)
        else:
            f = alpha * ratio * math.log(ratio)
            f -= mixture * math.log(mixture)
        total += s * f
    return total
