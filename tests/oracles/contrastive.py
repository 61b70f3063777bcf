"""Contrastive losses, propagation and whitening in float64 loops, from the papers."""

import numpy as np


def nt_xent(z1, z2, temperature: float, intra: bool = True) -> np.ndarray:
    """Values `[N]`, one similarity at a time (GRACE, equations 1 and 2)."""

    def score(a, b) -> float:
        lengths = max(np.sqrt(a @ a), 1e-12) * max(np.sqrt(b @ b), 1e-12)
        return np.exp(float(a @ b) / lengths / temperature)

    def one_way(a, b, i: int) -> float:
        total = sum(score(a[i], b[j]) for j in range(len(b)))
        if intra:
            total += sum(score(a[i], a[j]) for j in range(len(a)) if j != i)
        return -np.log(score(a[i], b[i]) / total)

    z1, z2 = np.asarray(z1, np.float64), np.asarray(z2, np.float64)
    pairs = [(one_way(z1, z2, i), one_way(z2, z1, i)) for i in range(len(z1))]
    return np.asarray([(a + b) / 2 for a, b in pairs])


def standardize(u, ddof: int = 1) -> np.ndarray:
    u = np.asarray(u, np.float64)
    return (u - u.mean(axis=0)) / u.std(axis=0, ddof=ddof)


def cca(z1, z2, lam: float) -> float:
    n, width = z1.shape
    cross, eye = z1.T @ z2 / n, np.eye(width)
    far = sum(np.sum((eye - z.T @ z / n) ** 2) for z in (z1, z2))
    return float(-np.trace(cross) + lam * far)


def alignment(z1, z2) -> float:
    rows = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2)]
    return float(np.mean(np.sum((rows[0] - rows[1]) ** 2, axis=1)))


def uniformity(z, t: float = 2.0) -> float:
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    terms = [
        np.exp(-t * np.sum((z[i] - z[j]) ** 2))
        for i in range(len(z))
        for j in range(i + 1, len(z))
    ]
    return float(np.log(np.mean(terms)))


def propagation(senders, receivers, weights, nodes: int) -> np.ndarray:
    """`D^-1/2 (A + I) D^-1/2`, rows receivers, degrees those of the receivers."""
    matrix = np.eye(nodes)
    for sender, receiver, weight in zip(senders, receivers, weights, strict=True):
        matrix[receiver, sender] += weight
    degrees = matrix.sum(axis=1)
    return matrix / np.sqrt(degrees[:, None] * degrees[None, :])


def gcn(matrix, x, layers, activate_last: bool = False) -> np.ndarray:
    """Layers of `(kernel, bias)` with ReLU between them."""
    for i, (kernel, bias) in enumerate(layers):
        x = matrix @ (x @ kernel) + bias
        if i < len(layers) - 1 or activate_last:
            x = np.maximum(x, 0.0)
    return x


def gat(senders, receivers, weights, x, kernel, send, receive, bias) -> np.ndarray:
    """One attention layer, receiver by receiver and head by head."""
    nodes, (heads, width) = len(x), send.shape
    h = (x @ kernel).reshape(nodes, heads, width)
    out = np.zeros((nodes, heads, width))
    for node in range(nodes):
        sources = [node] + [
            s
            for s, r, w in zip(senders, receivers, weights, strict=True)
            if r == node and w > 0
        ]
        for head in range(heads):
            scores = np.asarray(
                [
                    h[s, head] @ send[head] + h[node, head] @ receive[head]
                    for s in sources
                ]
            )
            scores = np.exp(np.where(scores > 0, scores, 0.2 * scores))
            shares = scores / scores.sum()
            out[node, head] = sum(
                share * h[s, head] for share, s in zip(shares, sources, strict=True)
            )
    return out.reshape(nodes, -1) + bias


def sage(senders, receivers, weights, x, own, bias, neighbour) -> np.ndarray:
    """One layer with the weighted mean over neighbours; none for an isolated node."""
    out = x @ own + bias
    for node in range(len(x)):
        total, mass = np.zeros(x.shape[1]), 0.0
        for s, r, w in zip(senders, receivers, weights, strict=True):
            if r == node:
                total, mass = total + w * x[s], mass + w
        if mass > 0:
            out[node] += (total / mass) @ neighbour
    return out
