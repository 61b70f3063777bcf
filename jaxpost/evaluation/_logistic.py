"""GRACE's protocol: one-vs-rest logistic regression on unit-length embeddings.

A tenth of the nodes trains, the strength of the penalty is chosen by five-fold cross
validation among them, the rest tests. Not comparable with `linear_probe`: another
split, another classifier, other embeddings.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxpost.evaluation._linear_probe import check_labels

STRENGTHS = tuple(2.0**power for power in range(-10, 10))
FOLDS = 5
_NEWTON_STEPS = 60
_HALVINGS = 12


class LogisticProbe(NamedTuple):
    """What `logistic_probe` found, NumPy, one value per repeat.

    Fields:
        micro_f1: of the test nodes (for one class per node: their accuracy), `[R]`.
        macro_f1: mean of the classes' F1, `[R]`.
        strength: the `C` that was chosen, `[R]`.
    """

    micro_f1: np.ndarray
    macro_f1: np.ndarray
    strength: np.ndarray


def logistic_probe(
    embeddings: jax.Array,
    labels: ArrayLike,
    *,
    train_fraction: float = 0.1,
    repeats: int = 3,
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> LogisticProbe:
    """Micro-F1 of one-vs-rest logistic regression, by GRACE's protocol.

    For each class, `|w|^2 / 2 + b^2 / 2 + C sum_i log(1 + exp(-y_i (w x_i + b)))` is
    minimised by damped Newton steps over unit-length rows `x_i`, the intercept
    penalised as in LIBLINEAR. `C` is the first of those with the best mean accuracy
    over five stratified folds.

    Args:
        embeddings: float `[N, D]`.
        labels: integer `[N]`, classes from 0; nodes with a negative label are left out.
        train_fraction: share of nodes to train on, drawn anew in each repeat.
        repeats: how many.
        strengths: `C` to choose from.
        seed: of the splits and folds.

    Raises:
        ValueError: labels are one-hot; the fraction is outside (0, 1), or leaves fewer
            than five training nodes or no test node; fewer than one repeat.
        AssertionError: embeddings are not a matrix.

    Source: Zhu et al. (2020), "Deep Graph Contrastive Representation Learning",
        section 4.2; splits are drawn here, so its numbers are met up to chance.
    """
    embeddings = jnp.asarray(embeddings)
    chex.assert_rank(embeddings, 2)
    wanted = check_labels(labels, embeddings.shape[0])
    known = np.nonzero(wanted >= 0)[0]
    count = round(train_fraction * known.size)
    if not 0.0 < train_fraction < 1.0 or count < FOLDS or count == known.size:
        raise ValueError(
            f"train_fraction {train_fraction} of {known.size} labelled nodes gives "
            f"{count} to train on: at least {FOLDS} must train, and one be left."
        )
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    rng = np.random.default_rng(seed)
    norms = jnp.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / jnp.maximum(norms, 1e-12)
    # The intercept as a column of ones: penalised like the weights.
    rows = jnp.concatenate([unit, jnp.ones_like(unit[:, :1])], axis=1)
    found = []
    for _ in range(repeats):
        order = rng.permutation(known)
        train, test = order[:count], order[count:]
        folds = _stratified_folds(wanted[train], rng)
        found.append(_one_repeat(rows, wanted, train, test, folds, strengths))
    return LogisticProbe(*(np.array(column) for column in zip(*found, strict=True)))


def _stratified_folds(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fold of each row, int `[n]`: each class is dealt out as evenly as it can be."""
    folds = np.empty(labels.size, np.int32)
    start = 0
    for name in np.unique(labels):
        rows = rng.permutation(np.nonzero(labels == name)[0])
        folds[rows] = (start + np.arange(rows.size)) % FOLDS
        start += rows.size
    return folds


def _one_repeat(rows, labels, train, test, folds, strengths):
    classes = int(labels.max()) + 1
    x, y = rows[train], labels[train]
    signs = jnp.asarray(np.where(y[:, None] == np.arange(classes), 1.0, -1.0), x.dtype)
    # Fewer rows than columns: every minimum lies in the span of the rows.
    basis = jnp.linalg.qr(x.T)[0] if x.shape[0] < x.shape[1] else None
    inner = x if basis is None else x @ basis
    kept = jnp.asarray(folds[None, :] != np.arange(FOLDS)[:, None], x.dtype)
    grid = jnp.asarray(strengths, x.dtype)
    scores = _cross_validate(inner, signs, jnp.asarray(y), kept, grid)
    best = int(np.argmax(np.asarray(scores)))
    weights = _fit(inner, signs, jnp.ones_like(x[:, 0]), grid[best])
    if basis is not None:
        weights = basis @ weights
    guess = np.asarray(jnp.argmax(rows[test] @ weights, axis=1))
    return (*f1_scores(labels[test], guess, classes), strengths[best])


@jax.jit
def _cross_validate(x, signs, labels, kept, grid):
    """Mean accuracy on left-out rows for every strength, `[G]`."""

    def one(strength, mask):
        weights = _fit(x, signs, mask, strength)
        hit = (jnp.argmax(x @ weights, axis=1) == labels).astype(x.dtype)
        return jnp.sum(hit * (1.0 - mask)) / jnp.maximum(jnp.sum(1.0 - mask), 1.0)

    # Folds side by side, strengths one after the other: memory stays small.
    return jax.lax.map(
        lambda c: jnp.mean(jax.vmap(functools.partial(one, c))(kept)), grid
    )


@jax.jit
def _fit(x, signs, mask, strength):
    """Weights `[D, C]` that minimise the penalised loss of each class."""
    fit = functools.partial(_fit_binary, x, mask, strength)
    return jax.vmap(fit, in_axes=1, out_axes=1)(signs)


def _fit_binary(x, mask, strength, sign):
    """Newton with halved steps; stops once the gradient is small."""
    eye = jnp.eye(x.shape[1], dtype=x.dtype)
    halves = 0.5 ** jnp.arange(_HALVINGS, dtype=x.dtype)

    def objective(weights):
        losses = jax.nn.softplus(-sign * (x @ weights))
        return 0.5 * jnp.sum(weights**2) + strength * jnp.sum(mask * losses)

    def gradient(weights):
        chance = jax.nn.sigmoid(-sign * (x @ weights))
        return weights - strength * (x.T @ (mask * sign * chance)), chance

    def step(carry):
        weights, count, _ = carry
        slope, chance = gradient(weights)
        curve = strength * mask * chance * (1.0 - chance)
        hessian = eye + x.T @ (curve[:, None] * x)
        move = jax.scipy.linalg.solve(hessian, slope, assume_a="pos")
        tried = weights[None, :] - halves[:, None] * move[None, :]
        best = tried[jnp.argmin(jax.vmap(objective)(tried))]
        worse = objective(best) >= objective(weights)  # as good as its digits allow
        return jnp.where(worse, weights, best), count + 1, worse

    def unfinished(carry):
        _, count, worse = carry
        return ~worse & (count < _NEWTON_STEPS)

    start = (jnp.zeros((x.shape[1],), x.dtype), jnp.int32(0), jnp.bool_(False))
    return jax.lax.while_loop(unfinished, step, start)[0]


def f1_scores(
    labels: np.ndarray, guesses: np.ndarray, classes: int
) -> tuple[float, float]:
    """Micro-F1 and macro-F1 of one class per node; a class nobody has counts 0."""
    hits = np.bincount(labels[labels == guesses], minlength=classes)
    asked = np.bincount(labels, minlength=classes)
    given = np.bincount(guesses, minlength=classes)
    present = (asked + given) > 0
    f1 = 2.0 * hits[present] / (asked + given)[present]
    return float(hits.sum() / labels.size), float(f1.mean())
