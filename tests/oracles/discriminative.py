"""Discriminative fine-tuning from its equations: float64, one example at a time.

The moving average is kept in linear space, as the paper writes it, and the answers of a
small language are listed one by one.
"""

import itertools
import math

import numpy as np


def update(u, scores, log_p0, tau, gamma):
    """`u <- (1 - gamma) u + gamma mean(exp(s / tau) / P0)`."""
    total = 0.0
    for score, reference in zip(scores, log_p0, strict=True):
        total += math.exp(score / tau - reference)
    return (1.0 - gamma) * u + gamma * total / len(scores)


def visit(positive, scores, log_p0, u, tau, gamma):
    """`(value, u, weights)` of one example at one visit."""
    u = update(u, scores, log_p0, tau, gamma)
    pairs = zip(scores, log_p0, strict=True)
    weights = [math.exp(score / tau - reference) / u for score, reference in pairs]
    mean = sum(c * s for c, s in zip(weights, scores, strict=True)) / len(scores)
    return mean - positive, u, weights


class Language:
    """All answers over the words 0 .. V - 2, ended by word V - 1, up to a length.

    A policy is a table `[answer-so-far, V]` of scores of the next word, one row for
    each of `prefixes`; at the greatest length only the end is left.
    """

    def __init__(self, vocabulary: int, longest: int):
        words = range(vocabulary - 1)
        self.end = vocabulary - 1
        self.longest = longest
        self.prefixes = [
            prefix
            for length in range(longest)
            for prefix in itertools.product(words, repeat=length)
        ]
        full = [*itertools.product(words, repeat=longest)]
        self.answers = [(*answer, self.end) for answer in [*self.prefixes, *full]]
        self.lengths = np.array([len(answer) for answer in self.answers], float)

    def steps(self, answer):
        """`(row of the table, word)` of each choice; the forced end is no choice."""
        place = {prefix: row for row, prefix in enumerate(self.prefixes)}
        for at, word in enumerate(answer):
            if at < self.longest:
                yield place[answer[:at]], word

    def logps(self, table):
        """Log-probability of each answer, `[answers]`."""
        sums = []
        for answer in self.answers:
            total = 0.0
            for row, word in self.steps(answer):
                scores = table[row]
                top = scores.max()
                total += scores[word] - top
                total -= math.log(np.sum(np.exp(scores - top)))
            sums.append(total)
        return np.array(sums)


def objective(scores, positive, pool, tau, weight):
    """`-s(y) + tau log(weight * sum over the pool exp(s / tau))`."""
    scaled = scores[pool] / tau
    top = scaled.max()
    total = top + math.log(weight * np.sum(np.exp(scaled - top)))
    return -scores[positive] + tau * total


def finite_differences(function, point, step=1e-6):
    """Central differences of a function of an array."""
    slope = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        ends = []
        for sign in (1.0, -1.0):
            moved = point.copy()
            moved[index] += sign * step
            ends.append(function(moved))
        slope[index] = (ends[0] - ends[1]) / (2.0 * step)
    return slope
