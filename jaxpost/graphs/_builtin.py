"""A small graph that needs no file: communities with weakly informative features."""

from typing import Any

import numpy as np

NODES, CLASSES, WORDS = 300, 4, 64
_TRAIN_PER_CLASS, _VALIDATION = 5, 80


def communities() -> dict[str, Any]:
    """Arguments of `node_data` for a planted-partition graph.

    Four classes of 75 nodes; a pair of one class is joined with probability 0.06, of
    two classes with 0.006. Each node has about 6 of 64 words; those of its class's 16
    are 2.5 times as likely. Neither features nor edges alone tell the classes well.
    The split is 5 nodes per class, 80, and the rest.
    """
    rng = np.random.default_rng(20230500623)
    labels = np.repeat(np.arange(CLASSES), NODES // CLASSES)
    same = labels[:, None] == labels[None, :]
    drawn = rng.random((NODES, NODES)) < np.where(same, 0.06, 0.006)
    upper = np.triu(drawn, k=1)
    edges = np.stack(np.nonzero(upper | upper.T))
    own = np.arange(WORDS)[None, :] // (WORDS // CLASSES) == labels[:, None]
    features = rng.random((NODES, WORDS)) < np.where(own, 0.17, 0.068)
    masks = {part: np.zeros(NODES, bool) for part in ("train", "validation", "test")}
    for name in range(CLASSES):
        rows = rng.permutation(np.nonzero(labels == name)[0])
        masks["train"][rows[:_TRAIN_PER_CLASS]] = True
    rest = rng.permutation(np.nonzero(~masks["train"])[0])
    masks["validation"][rest[:_VALIDATION]] = True
    masks["test"][rest[_VALIDATION:]] = True
    return {
        "features": features.astype(np.float32),
        "edges": edges,
        "labels": labels,
        "masks": masks,
    }
