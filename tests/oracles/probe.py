"""Float64 NumPy, in loops: the linear probe, penalised logistic regression, k-means'
indices, personalised PageRank."""

import itertools
import math

import numpy as np


def linear_probe(x, labels, split, weight, *, learning_rate, weight_decay, epochs):
    """Accuracies after each epoch, `[epochs]` for validation and test.

    Adam as Kingma & Ba (2015), algorithm 1, decay added to the gradient.
    """
    train, *others = split
    classes = weight.shape[1]
    params = [weight.astype(np.float64), np.zeros(classes)]
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    history = [[], []]
    for step in range(1, epochs + 1):
        logits = x[train] @ params[0] + params[1]
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        chances[np.arange(len(train)), labels[train]] -= 1.0
        chances /= len(train)
        grads = [x[train].T @ chances, chances.sum(axis=0)]
        for i, grad in enumerate(grads):
            grad = grad + weight_decay * params[i]
            first[i] = 0.9 * first[i] + 0.1 * grad
            second[i] = 0.999 * second[i] + 0.001 * grad**2
            mean = first[i] / (1.0 - 0.9**step)
            spread = second[i] / (1.0 - 0.999**step)
            params[i] = params[i] - learning_rate * mean / (np.sqrt(spread) + 1e-8)
        for part, rows in zip(history, others, strict=True):
            guess = (x[rows] @ params[0] + params[1]).argmax(axis=1)
            part.append(float((guess == labels[rows]).mean()))
    return np.array(history[0]), np.array(history[1])


def choose(validation, test):
    """Clean: test at the first best validation. Published: the largest test accuracy
    among epochs whose validation equals or beats all before."""
    best, published, clean, epoch = -1.0, -1.0, -1.0, 0
    for number, (v, t) in enumerate(zip(validation, test, strict=True), 1):
        if v > best:
            clean, epoch = t, number
        if v >= best:
            best, published = v, max(published, t)
    return clean, published, epoch


def logistic_gradient(weights, x, sign, strength):
    """Of `|w|^2 / 2 + C sum log(1 + exp(-y w x))`, row by row."""
    grad = np.array(weights, np.float64)
    for row, y in zip(x.astype(np.float64), sign, strict=True):
        grad -= strength * y * row / (1.0 + math.exp(y * float(row @ weights)))
    return grad


def pair_counts(first, second):
    """How many pairs are together in both, in each alone, and how many there are."""
    both = one = two = total = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        same_first, same_second = first[i] == first[j], second[i] == second[j]
        both += same_first and same_second
        one += same_first
        two += same_second
        total += 1
    return both, one, two, total


def adjusted_rand(first, second):
    both, one, two, total = pair_counts(first, second)
    expected = one * two / total
    return (both - expected) / ((one + two) / 2.0 - expected)


def mutual_information(first, second):
    """Normalised by the mean of the entropies, nats."""
    n = len(first)

    def entropy(names):
        shares = [names.count(name) / n for name in set(names)]
        return -sum(p * math.log(p) for p in shares)

    first, second = list(first), list(second)
    joint = entropy(list(zip(first, second, strict=True)))
    one, two = entropy(first), entropy(second)
    return 2.0 * (one + two - joint) / (one + two)


def smooth(adjacency, embeddings, *, steps, restart):
    """Personalised PageRank with a dense, symmetrically normalised matrix."""
    matrix = adjacency + np.eye(len(adjacency))
    degrees = matrix.sum(axis=1)
    matrix = matrix / np.sqrt(degrees[:, None] * degrees[None, :])
    h = embeddings
    for _ in range(steps):
        h = (1.0 - restart) * matrix @ h + restart * embeddings
    return h
