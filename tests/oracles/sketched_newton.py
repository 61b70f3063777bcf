"""Newton on the exact augmented Lagrangian in float64 NumPy, from arXiv 2305.18379.

A problem is an object with `f(x)`, `c(x)`, `df(x)`, `dc(x)` and `hessian(x, y)` of the
Lagrangian, all derived by hand.
"""

import numpy as np


class HS42:
    def f(self, x):
        return sum((x[i] - (i + 1)) ** 2 for i in range(4))

    def c(self, x):
        return np.array([x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2])

    def df(self, x):
        return np.array([2 * (x[i] - (i + 1)) for i in range(4)])

    def dc(self, x):
        return np.array([[1.0, 0, 0, 0], [0, 0, 2 * x[2], 2 * x[3]]])

    def hessian(self, x, y):
        return 2 * np.eye(4) + y[1] * np.diag([0.0, 0, 2, 2])


class HS7:
    def f(self, x):
        return np.log(1 + x[0] ** 2) - x[1]

    def c(self, x):
        return np.array([(1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4])

    def df(self, x):
        return np.array([2 * x[0] / (1 + x[0] ** 2), -1.0])

    def dc(self, x):
        return np.array([[4 * x[0] * (1 + x[0] ** 2), 2 * x[1]]])

    def hessian(self, x, y):
        a = (2 - 2 * x[0] ** 2) / (1 + x[0] ** 2) ** 2 + y[0] * (4 + 12 * x[0] ** 2)
        return np.diag([a, 2 * y[0]])


def merit(problem, x, y, eta1, eta2):
    gradient = problem.df(x) + problem.dc(x).T @ y
    c = problem.c(x)
    return (
        problem.f(x) + y @ c + eta1 / 2 * np.sum(c**2) + eta2 / 2 * np.sum(gradient**2)
    )


def merit_gradient(problem, x, y, eta1, eta2):
    """In (x, y): the second derivatives are those of the Lagrangian."""
    g, c, jacobian = problem.df(x) + problem.dc(x).T @ y, problem.c(x), problem.dc(x)
    in_x = g + eta2 * problem.hessian(x, y) @ g + eta1 * jacobian.T @ c
    return np.concatenate([in_x, c + eta2 * jacobian @ g])


def null_space(jacobian):
    full = np.linalg.svd(jacobian)[2]
    return full[jacobian.shape[0] :].T


def solve_published(problem, x, steps=50, tolerance=1e-4):
    """Rows `(kkt, alpha, eta1, eta2, delta, shift)` with exact inner solves."""
    beta, nu, xi_b = 0.1, 1.5, 0.1
    eta1, eta2, delta = 1.0, 0.1, 0.1
    x = np.array(x, float)
    y = np.zeros(len(problem.c(x)))
    rows = []
    for _ in range(steps):
        jacobian, hessian = problem.dc(x), problem.hessian(x, y)
        b = -np.concatenate([problem.df(x) + jacobian.T @ y, problem.c(x)])
        if np.linalg.norm(b) <= tolerance:
            rows.append((np.linalg.norm(b), np.nan, eta1, eta2, delta, np.nan))
            break
        z_basis = null_space(jacobian)
        smallest = np.linalg.eigvalsh(z_basis.T @ hessian @ z_basis)[0]
        shift = xi_b + np.linalg.norm(hessian) if smallest < 1e-6 else 0.0
        shifted = hessian + shift * np.eye(len(x))
        xi_g = np.linalg.eigvalsh(jacobian @ jacobian.T)[0]
        psi = 20 * max(np.sum(shifted**2), 1) / (min(xi_g, 1) * min(xi_b, 1))
        upsilon = max(np.linalg.norm(jacobian), np.linalg.norm(hessian), 1)

        def trial(eta1, eta2, upsilon=upsilon, psi=psi):
            return (0.5 - beta) * eta2 / ((1 + eta1 + eta2) * upsilon**2 * psi**2)

        delta = max(min(delta, trial(eta1, eta2)), 1e-6)
        corner = np.zeros((len(y), len(y)))
        z = np.linalg.solve(np.block([[shifted, jacobian.T], [jacobian, corner]]), b)
        while merit_gradient(problem, x, y, eta1, eta2) @ z > -eta2 / 2 * b @ b:
            if eta1 > 1e8 or eta2 < 1e-8:
                break
            eta1, eta2 = eta1 * nu**2, eta2 / nu
            delta = max(min(delta / nu**4, trial(eta1, eta2)), 1e-6)
        slope = merit_gradient(problem, x, y, eta1, eta2) @ z
        here, alpha = merit(problem, x, y, eta1, eta2), 1.0
        dx, dy = z[: len(x)], z[len(x) :]
        while merit(problem, x + alpha * dx, y + alpha * dy, eta1, eta2) > (
            here + alpha * beta * slope
        ):
            alpha /= 2
        rows.append((np.linalg.norm(b), alpha, eta1, eta2, delta, shift))
        x, y = x + alpha * dx, y + alpha * dy
    return x, y, np.array(rows)


def sketch_step(matrix, right, z, sketch):
    """Onto the solutions of `sketch . (A z - b) = 0`."""
    image = matrix.T @ sketch
    return z - (sketch @ (matrix @ z - right)) / (image @ image) * image
