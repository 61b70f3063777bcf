"""Pairwise losses from their papers: float64, one pair at a time.

Inner minimisations are bisections on the papers' own derivatives, not the closed forms
that the library uses.
"""

import math

import numpy as np


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > 0 else math.exp(x) / (1.0 + math.exp(x))


def dpo_margins(policy, reference, beta, lengths=None):
    """`[B]`; `policy`, `reference` and `lengths` are (chosen, rejected) or None."""
    margins = []
    for b in range(len(policy[0])):
        scores = [float(policy[side][b]) for side in (0, 1)]
        for side in (0, 1):
            if reference is not None:
                scores[side] -= float(reference[side][b])
            if lengths is not None:
                scores[side] /= float(lengths[side][b])
        margins.append(beta * (scores[0] - scores[1]))
    return np.array(margins)


def bradley_terry(margin, label_smoothing=0.0):
    kept = -(1.0 - label_smoothing) * log_sigmoid(margin)
    return kept - label_smoothing * log_sigmoid(-margin)


def robust_dpo(margin, flip_rate):
    kept = -(1.0 - flip_rate) * log_sigmoid(margin)
    return (kept + flip_rate * log_sigmoid(-margin)) / (1.0 - 2.0 * flip_rate)


def hinge(margin):
    return 1.0 - margin if margin < 1.0 else 0.0


def ipo(margin, tau=1.0):
    return (margin - 1.0 / (2.0 * tau)) ** 2


def r3m(margin, lam):
    """`(value, delta)`: eq. 3.3, minimised over both signs of delta."""

    def slope(delta, sign):  # of -log sigmoid(margin + delta) + lam * |delta|
        return -sigmoid(-(margin + delta)) + sign * lam

    delta = 0.0
    if slope(0.0, 1.0) < 0.0:  # falls to the right of zero
        delta = root(lambda d: slope(d, 1.0), 0.0, abs(margin) + 100.0)
    elif slope(0.0, -1.0) > 0.0:  # rises from the left of zero
        delta = root(lambda d: slope(d, -1.0), -abs(margin) - 100.0, 0.0)
    return -log_sigmoid(margin + delta) + lam * abs(delta), delta


def adaptive_value(margin, tau, rho0, quadratic=False):
    """The loss at a given scale: eqs. 6 and 12."""
    penalty = rho0 * tau * tau if quadratic else rho0 * tau
    return -tau * log_sigmoid(margin / tau) + penalty - tau * math.log(2.0)


def adaptive(margin, rho0, tau_min, tau_max=None, quadratic=False):
    """`(value, tau)`, the scale from the derivative of eq. 8."""

    def slope(tau):
        x = margin / tau
        penalty = 2.0 * rho0 * tau if quadratic else rho0
        return -math.log(2.0) - log_sigmoid(x) + sigmoid(-x) * x + penalty

    high = tau_max
    if high is None:  # the quadratic variant: double until the derivative is positive
        high = tau_min
        while slope(high) < 0.0:
            high *= 2.0
    if slope(tau_min) >= 0.0:
        tau = tau_min
    elif slope(high) <= 0.0:
        tau = high
    else:
        tau = root(slope, tau_min, high)
    return adaptive_value(margin, tau, rho0, quadratic), tau


def adaptive_newton(margin, rho0, tau_min, tau_max, steps):
    """Scales after each step of Algorithm 1, from 1."""
    taus = [1.0]
    for _ in range(steps):
        tau = taus[-1]
        p = sigmoid(margin / tau)
        gradient = -log_sigmoid(margin / tau) - math.log(2.0)
        gradient += (1.0 - p) * margin / tau + rho0
        curvature = max(margin**2 / tau**3 * p * (1.0 - p), 1e-8)
        taus.append(min(max(tau - gradient / curvature, tau_min), tau_max))
    return taus


def adaptive_primal(margin, rho0, tau_min, points=400_001):
    """The problem that the linear loss is the dual of, without `tau_max` (eq. 3).

    Nature moves probability `q` to "the rejected answer is better", within a KL ball
    around 1/2 and at a price of `tau_min` per nat.
    """
    q = np.linspace(1e-12, 1.0 - 1e-12, points)
    divergence = q * np.log(2.0 * q) + (1.0 - q) * np.log(2.0 * (1.0 - q))
    gain = -q * margin - tau_min * divergence
    return gain[divergence <= rho0].max() + tau_min * rho0


def root(increasing, low, high):
    """Zero of an increasing function, to the last bit."""
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if increasing(middle) < 0.0:
            low = middle
        else:
            high = middle
