"""Distributions on a few tokens and the rest, and the chunked forms' plain values, in
float64 loops over tokens."""

import math

import numpy as np


def log_softmax(hidden, weight, bias=None, softcap=None, scale=1.0, temperature=1.0):
    """`[n, V]` of hidden `[n, D]` and weight `[D, V]`."""
    rows = []
    for state in np.asarray(hidden, np.float64):
        raw = state @ np.asarray(weight, np.float64)
        raw = scale * (raw if bias is None else raw + np.asarray(bias, np.float64))
        if softcap is not None:
            raw = softcap * np.tanh(raw / softcap)
        raw = raw / temperature
        top = raw.max()
        rows.append(raw - top - math.log(math.fsum(np.exp(raw - top))))
    return np.stack(rows)


def support(logps, ids):
    """Log-probabilities of `ids` and of all other tokens, of one token's `[V]`."""
    rest = [math.exp(x) for v, x in enumerate(logps) if v not in set(map(int, ids))]
    tail = math.fsum(rest)
    return [logps[v] for v in ids], math.log(tail) if tail else -math.inf


def support_divergence(student, teacher, alpha, rest):
    """Of two `(logps, tail)` of one token; loops over the events."""
    (s, s_tail), (t, t_tail) = student, teacher
    s, t = [math.exp(x) for x in s], [math.exp(x) for x in t]
    if rest == "renormalize":
        s, t = [x / math.fsum(s) for x in s], [x / math.fsum(t) for x in t]
    else:
        if rest == "teacher":
            t, t_tail = [x / math.fsum(t) for x in t], -math.inf
        s, t = [*s, math.exp(s_tail)], [*t, math.exp(t_tail)]
    return divergence(s, t, alpha)


def divergence(s, t, alpha):
    """Generalised Jensen-Shannon of two lists of probabilities, zeros allowed."""

    def kl(p, q):
        return math.fsum(
            a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0
        )

    if alpha == 0.0:
        return kl(t, s)
    if alpha == 1.0:
        return kl(s, t)
    m = [(1.0 - alpha) * a + alpha * b for a, b in zip(s, t, strict=True)]
    return (1.0 - alpha) * kl(s, m) + alpha * kl(t, m)
