"""How much a linear layer reads from frozen embeddings.

Arrays only: what made the embeddings is not known here. All seeds run in one compiled
program.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

Select = Literal["validation", "repo", "last"]


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How the linear layer is trained, and which epoch counts.

    Attributes:
        learning_rate: Of Adam.
        weight_decay: Times the weights and biases, added to the gradient (L2).
        epochs: Full-batch steps.
        select: Which epoch's test accuracy is reported: the first with the best
            validation accuracy; `repo`, the largest among epochs whose validation
            accuracy equals or beats all before (the published rule, which looks at the
            test split and so is optimistic); or the last.
    """

    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    epochs: int = 2000
    select: Select = "validation"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0.0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}."
            )
        if self.weight_decay < 0.0:
            raise ValueError(
                f"weight_decay must not be negative, got {self.weight_decay}."
            )
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}.")
        if self.select not in ("validation", "repo", "last"):
            raise ValueError(
                f"select must be validation, repo or last, got {self.select!r}."
            )


class ProbeResult(NamedTuple):
    """Accuracies in [0, 1], float32, with the leading axes of the embeddings.

    Fields:
        accuracy: of the test nodes, at the epoch that `select` names.
        clean, optimistic, last: the same under each of the three rules.
        validation: best accuracy of the validation nodes.
        epoch: int32, the first with that accuracy, from 1.
        train_loss: of the last epoch, mean cross-entropy in nats.
    """

    accuracy: jax.Array
    clean: jax.Array
    optimistic: jax.Array
    last: jax.Array
    validation: jax.Array
    epoch: jax.Array
    train_loss: jax.Array


class Split(NamedTuple):
    """Rows by part, int32 `[n]` each, or `[S, n]` where seeds have their own."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def linear_probe(
    embeddings: jax.Array,
    labels: ArrayLike,
    masks: tuple[ArrayLike, ArrayLike, ArrayLike],
    *,
    config: ProbeConfig | None = None,
    at_once: int | None = None,
    key: jax.Array,
) -> ProbeResult:
    """Test accuracy of a linear layer trained on frozen embeddings.

    `[D, C]` weights (Glorot uniform) and biases (zero), full-batch Adam on the mean
    cross-entropy of the training nodes plus L2 decay of both, validation and test
    nodes looked at after every step.

    Args:
        embeddings: float `[N, D]`, or `[S, N, D]` for S seeds.
        labels: integer `[N]`, classes from 0; any value outside the three masks.
        masks: train, validation and test nodes, bool `[N]`, or `[S, N]` with as many
            of each for every seed.
        config: settings; None takes the defaults.
        at_once: seeds side by side, the others follow in the same program; None is one
            on a CPU, where each seed's rows then stay in the cache, and all elsewhere.
        key: of the first weights; seed `s` takes `fold_in(key, s)`.

    Returns:
        Scalars, or `[S]`.

    Raises:
        ValueError: labels are one-hot or negative; masks are empty or overlap, or seeds
            differ in how many nodes they have; a class is missing from training nodes;
            an embedding is not finite (the message names the first place).
        AssertionError: other shapes do not fit.

    Source: Velickovic et al. (2019), "Deep Graph Infomax", section 4.2, with the
        settings of arXiv 2305.00623.
    """
    config = config or ProbeConfig()
    embeddings = jnp.asarray(embeddings)
    single = embeddings.ndim == 2
    stacked = embeddings[None] if single else embeddings
    chex.assert_rank(stacked, 3)
    labels = check_labels(labels, stacked.shape[1])
    split = split_of(masks, labels)
    _check_finite(stacked)
    seeds = stacked.shape[0]
    if split.train.ndim == 2:
        chex.assert_axis_dimension(split.train, 0, seeds)
    keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(seeds))
    classes = int(labels[np.concatenate([np.ravel(part) for part in split])].max()) + 1
    numbers = (config.learning_rate, config.weight_decay)
    found = _probe_seeds(
        stacked,
        jnp.asarray(labels),
        split,
        tuple(jnp.float32(number) for number in numbers),
        keys,
        epochs=config.epochs,
        classes=classes,
        own_split=split.train.ndim == 2,
        at_once=at_once or (1 if jax.default_backend() == "cpu" else seeds),
    )
    chosen = {"validation": "clean", "repo": "optimistic", "last": "last"}
    result = ProbeResult(accuracy=found[chosen[config.select]], **found)
    return jax.tree.map(lambda x: x[0], result) if single else result


def check_labels(labels: ArrayLike, nodes: int) -> np.ndarray:
    """The labels as int32 `[N]`.

    Raises:
        ValueError: they are one-hot, not integers, or not one per node.
    """
    found = np.asarray(labels)
    if found.ndim == 2:
        raise ValueError(
            f"labels must be one class per node, [{nodes}], got {list(found.shape)}: "
            "of one-hot rows, give labels.argmax(axis=1)."
        )
    if found.shape != (nodes,):
        raise ValueError(
            f"labels must have one class for each of {nodes} nodes, got shape "
            f"{list(found.shape)}."
        )
    if not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {found.dtype}.")
    return found.astype(np.int32)


def split_of(masks: tuple[ArrayLike, ...], labels: np.ndarray) -> Split:
    """Masks as row numbers, checked against the labels.

    Raises:
        ValueError: see `linear_probe`.
    """
    if len(masks) != 3:
        raise ValueError(f"masks must be train, validation, test; got {len(masks)}.")
    names = ("train", "validation", "test")
    stacked = []
    for name, mask in zip(names, masks, strict=True):
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape[-1:] != labels.shape or mask.ndim > 2:
            raise ValueError(
                f"the {name} mask must be bool [{labels.size}] or [S, {labels.size}], "
                f"got {mask.dtype} {list(mask.shape)}."
            )
        stacked.append(np.atleast_2d(mask))
    seeds = max(mask.shape[0] for mask in stacked)
    own = any(np.ndim(mask) == 2 for mask in masks)
    wide = [np.broadcast_to(mask, (seeds, labels.size)) for mask in stacked]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        both = wide[first] & wide[second]
        if both.any():
            raise ValueError(
                f"{names[first]} and {names[second]} share {both.any(0).sum()} nodes, "
                f"the first of them node {int(np.argmax(both.any(0)))}: a node may be "
                "in one part only."
            )
    rows = []
    for name, mask in zip(names, wide, strict=True):
        counts = mask.sum(axis=1)
        if counts.min() == 0:
            raise ValueError(f"the {name} mask is empty: it has no node.")
        if counts.min() != counts.max():
            raise ValueError(
                f"seeds must have equally many {name} nodes to run side by side, got "
                f"{counts.min()} to {counts.max()}."
            )
        rows.append(np.nonzero(mask)[1].reshape(seeds, -1).astype(np.int32))
        bad = mask & (labels < 0)
        if bad.any():
            raise ValueError(
                f"{name} node {int(np.argmax(bad.any(0)))} has no label: labels must "
                "be at least 0 in all three masks."
            )
    _check_classes(rows, labels)
    return Split(*(part if own else part[0] for part in rows))


def _check_classes(rows: list[np.ndarray], labels: np.ndarray) -> None:
    """Every class that is asked for must have been taught."""
    for seed, (train, *others) in enumerate(zip(*rows, strict=True)):
        asked = np.unique(labels[np.concatenate([train, *others])])
        missing = np.setdiff1d(asked, labels[train])
        if missing.size:
            where = f" of seed {seed}" if len(rows[0]) > 1 else ""
            raise ValueError(
                f"class {', '.join(map(str, missing[:8]))} is missing from the "
                f"training nodes{where}: the probe cannot learn it. Draw the split "
                "within classes, or with more training nodes."
            )


def _check_finite(embeddings: jax.Array) -> None:
    bad = ~jnp.isfinite(embeddings)
    if bool(bad.any()):
        seed, node, column = np.argwhere(np.asarray(bad))[0]
        raise ValueError(
            f"embedding [{node}, {column}] of seed {seed} is not finite: training "
            "diverged, or the input was not."
        )


@functools.partial(
    jax.jit, static_argnames=("epochs", "classes", "own_split", "at_once")
)
def _probe_seeds(
    embeddings: jax.Array,
    labels: jax.Array,
    split: Split,
    numbers: tuple[jax.Array, ...],
    keys: jax.Array,
    *,
    epochs: int,
    classes: int,
    own_split: bool,
    at_once: int,
) -> dict[str, jax.Array]:
    """Compiled once for any learning rate and decay."""

    def one(varied):
        rows, own, key = varied
        return _probe_one(
            rows,
            labels,
            own if own_split else split,
            numbers,
            key,
            epochs=epochs,
            classes=classes,
        )

    varied = (embeddings, split if own_split else None, keys)
    if at_once == 1:
        return jax.lax.map(one, varied)
    return jax.lax.map(one, varied, batch_size=at_once)


class _Best(NamedTuple):
    validation: jax.Array
    epoch: jax.Array
    clean: jax.Array
    optimistic: jax.Array


def _probe_one(embeddings, labels, split, numbers, key, *, epochs, classes):
    learning_rate, weight_decay = numbers
    # Only these rows are ever read: a small part of a graph with a standard split.
    parts = jax.tree.map(lambda rows: (embeddings[rows], labels[rows]), split)
    width = embeddings.shape[-1]
    dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
    glorot = jax.nn.initializers.glorot_uniform()
    params = {
        "weight": glorot(key, (width, classes), dtype),
        "bias": jnp.zeros((classes,), dtype),
    }
    tx = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def loss_fn(params):
        rows, wanted = parts.train
        logits = _logits(params, rows.astype(dtype))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return jnp.mean(losses)

    def accuracy(params, part):
        rows, wanted = part
        hit = jnp.argmax(_logits(params, rows.astype(dtype)), axis=-1) == wanted
        return jnp.mean(hit, dtype=jnp.float32)

    def epoch(carry, number):
        params, opt_state, best = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params: Any = optax.apply_updates(params, updates)
        valid = accuracy(params, parts.validation)
        test = accuracy(params, parts.test)
        first = valid > best.validation
        best = _Best(
            validation=jnp.maximum(valid, best.validation),
            epoch=jnp.where(first, number, best.epoch),
            clean=jnp.where(first, test, best.clean),
            optimistic=jnp.where(
                valid >= best.validation,
                jnp.maximum(test, best.optimistic),
                best.optimistic,
            ),
        )
        return (params, opt_state, best), (loss, test)

    none = jnp.float32(-1.0)
    best = _Best(none, jnp.int32(0), none, none)
    numbers = jnp.arange(1, epochs + 1, dtype=jnp.int32)
    carry, (losses, tests) = jax.lax.scan(
        epoch, (params, tx.init(params), best), numbers
    )
    return {
        **carry[2]._asdict(),
        "last": tests[-1],
        "train_loss": losses[-1],
    }


def _logits(params: Any, rows: jax.Array) -> jax.Array:
    return rows @ params["weight"] + params["bias"][None, :]
