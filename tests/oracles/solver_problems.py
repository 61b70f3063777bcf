"""Float64 NumPy versions of the solver's problem families, in loops from the paper."""

import math

import numpy as np


def logistic(w, features, labels, matrix, offsets):
    """Objective and constraint of the constrained logistic regression."""
    total = 0.0
    for row, label in zip(features, labels, strict=True):
        margin = label * sum(float(a) * float(b) for a, b in zip(row, w, strict=True))
        total += max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    constraint = [float(r @ w) - float(b) for r, b in zip(matrix, offsets, strict=True)]
    constraint.append(sum(float(v) ** 2 for v in w) - 1.0)
    return total / len(labels), np.asarray(constraint)


def pde(x, grid, penalty):
    """Objective and constraint of the control problem; `x` is `W`, `Z`, by columns."""
    n, h = grid, 2.0 / (grid + 1)
    state = np.asarray(x[: n * n]).reshape(n, n, order="F")
    control = np.asarray(x[n * n :]).reshape(n, n, order="F")

    def at(i, j):
        return state[i, j] if 0 <= i < n and 0 <= j < n else 0.0

    value, constraint = 0.0, np.empty((n, n))
    step = 0.1 / math.sqrt(15.0)
    for i in range(n):
        for j in range(n):
            target = math.sin(4 + step * (i + 1 - (n + 1) / 2))
            target += math.cos(3 + step * (j + 1 - (n + 1) / 2))
            value += 0.5 * (state[i, j] - target) ** 2
            value += 0.5 * penalty * control[i, j] ** 2
            around = at(i - 1, j) + at(i + 1, j) + at(i, j - 1) + at(i, j + 1)
            constraint[i, j] = (around - 4 * state[i, j]) / h**2 + control[i, j]
    return value, constraint.ravel(order="F")


def kkt_matrix(objective_hessian, jacobian):
    """The matrix of Newton's system."""
    m = jacobian.shape[0]
    return np.block([[objective_hessian, jacobian.T], [jacobian, np.zeros((m, m))]])
