"""What can be wrong with a graph, its labels and its split, each said in one line.

NumPy on the host; knows no file format. `where` in a message is the file or argument
that the caller names.
"""

import warnings
from collections.abc import Iterator, Mapping

import numpy as np

SHOWN = 5
PARTS = ("train", "validation", "test")


class GraphError(ValueError):
    """A graph, its labels or its split cannot be used; says what, where, what to do."""


class GraphWarning(UserWarning):
    """A graph is legal but unusual; the message says how and where."""


def check_edges(
    edges: np.ndarray, nodes: int, *, where: str, repair: bool = False
) -> np.ndarray:
    """The edges, int32 `[2, E]`, senders in the first row.

    Args:
        edges: integer `[2, E]`.
        nodes: how many there are.
        where: names the edges in messages.
        repair: drop self-loops and repeated edges and add missing directions, instead
            of refusing the first two and warning of the last.

    Raises:
        GraphError: not integers or not `[2, E]`; an index outside `0..nodes - 1`; a
            self-loop or repeated edge without `repair`; fewer than two nodes.

    Warns:
        GraphWarning: an edge is listed in one direction only; nodes have no edge.
    """
    edges = np.asarray(edges)
    if nodes < 2:
        raise GraphError(f"{where}: a graph needs at least 2 nodes, this has {nodes}.")
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise GraphError(
            f"{where}: must have shape [2, E], senders and receivers, got "
            f"{list(edges.shape)}."
        )
    if not np.issubdtype(edges.dtype, np.integer):
        raise GraphError(
            f"{where}: must be integers, got {edges.dtype}; cast it if the values are "
            "whole numbers."
        )
    outside = (edges < 0) | (edges >= nodes)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise GraphError(
            f"{where}[{row}, {column}] = {edges[row, column]} is out of range: there "
            f"are {nodes} nodes, numbered from 0 ({outside.sum()} such entries)."
        )
    edges = edges.astype(np.int64)
    if repair:
        edges = _repaired(edges, nodes)
    else:
        _refuse_loops_and_repeats(edges, nodes, where)
        _warn_one_way(edges, nodes, where)
    _warn_isolated(edges, nodes, where)
    return edges.astype(np.int32)


def _repaired(edges: np.ndarray, nodes: int) -> np.ndarray:
    senders, receivers = edges[:, edges[0] != edges[1]]
    numbers = np.concatenate([senders * nodes + receivers, receivers * nodes + senders])
    return np.stack(np.divmod(np.unique(numbers), nodes))


def _refuse_loops_and_repeats(edges: np.ndarray, nodes: int, where: str) -> None:
    advice = "ask for repair (--repair) to drop such edges."
    loops = np.nonzero(edges[0] == edges[1])[0]
    if loops.size:
        raise GraphError(
            f"{where}: edge {loops[0]} is a self-loop of node {edges[0, loops[0]]} "
            f"({loops.size} self-loops): encoders add one per node by themselves; "
            f"{advice}"
        )
    numbers = edges[0] * nodes + edges[1]
    order = np.argsort(numbers, kind="stable")
    repeats = np.nonzero(np.diff(numbers[order]) == 0)[0]
    if repeats.size:
        first, second = order[repeats[0]], order[repeats[0] + 1]
        raise GraphError(
            f"{where}: edges {first} and {second} are both {edges[0, first]} -> "
            f"{edges[1, first]} ({repeats.size} repeated edges): each would count "
            f"twice; {advice}"
        )


def _warn_one_way(edges: np.ndarray, nodes: int, where: str) -> None:
    there, back = edges[0] * nodes + edges[1], edges[1] * nodes + edges[0]
    lonely = np.nonzero(~np.isin(there, back))[0]
    if lonely.size:
        first = lonely[0]
        warnings.warn(
            f"{where}: {lonely.size} of {edges.shape[1]} edges have no edge back, the "
            f"first {edges[0, first]} -> {edges[1, first]}: encoders take the list as "
            "it is, so messages go one way there; ask for repair (--repair) to add "
            "the missing directions.",
            GraphWarning,
            stacklevel=4,
        )


def _warn_isolated(edges: np.ndarray, nodes: int, where: str) -> None:
    degrees = np.bincount(edges.ravel(), minlength=nodes)
    isolated = np.nonzero(degrees == 0)[0]
    if isolated.size:
        warnings.warn(
            f"{where}: {isolated.size} of {nodes} nodes have no edge "
            f"({_some(isolated)}): their embeddings depend on their own features only.",
            GraphWarning,
            stacklevel=4,
        )


def check_features(features: np.ndarray, *, where: str) -> None:
    """Features are finite floats, a row per node.

    Args:
        features: `[N, F]`.
        where: names them in messages.

    Raises:
        GraphError: they are not.
    """
    if features.ndim != 2:
        raise GraphError(
            f"{where}: must be [N, F], a row per node, got {list(features.shape)}."
        )
    if not np.issubdtype(features.dtype, np.floating):
        raise GraphError(f"{where}: must be floats, got {features.dtype}.")
    finite = np.isfinite(features)
    if not finite.all():
        node, column = np.argwhere(~finite)[0]
        raise GraphError(
            f"{where}[{node}, {column}] = {features[node, column]} is not finite "
            f"({(~finite).sum()} such entries)."
        )


def check_node_labels(labels: np.ndarray, nodes: int, *, where: str) -> np.ndarray:
    """Labels, int32 `[N]`, -1 where a node has none.

    Raises:
        GraphError: one-hot or otherwise of a wrong shape, not integers, below -1, or
            nobody has one.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        raise GraphError(
            f"{where}: must be one class per node, [{nodes}], got "
            f"{list(labels.shape)}: of one-hot rows, give argmax(axis=1)."
        )
    if labels.shape != (nodes,):
        raise GraphError(
            f"{where}: must have shape [{nodes}], got {list(labels.shape)}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise GraphError(f"{where}: must be integers, got {labels.dtype}.")
    below = np.nonzero(labels < -1)[0]
    if below.size:
        raise GraphError(
            f"{where}[{below[0]}] = {labels[below[0]]} is no class: classes count from "
            "0, and -1 says that a node has no label."
        )
    if labels.max() < 0:
        raise GraphError(f"{where}: no node has a label; leave them out altogether.")
    return labels.astype(np.int32)


def check_masks(
    masks: Mapping[str, np.ndarray], labels: np.ndarray, *, where: str
) -> None:
    """A split has nodes in every part, each in one part only, all with labels.

    Args:
        masks: bool `[N]` by part: train, validation, test.
        labels: int32 `[N]`, -1 without a label.
        where: names the split in messages.

    Raises:
        GraphError: a part is empty; two overlap; a node in one has no label; a class is
            missing from train.
    """
    for name in PARTS:
        mask = masks[name]
        if mask.dtype != bool or mask.shape != labels.shape:
            raise GraphError(
                f"{where}: the {name} mask must be bool [{labels.size}], got "
                f"{mask.dtype} {list(mask.shape)}."
            )
        if not mask.any():
            raise GraphError(f"{where}: the {name} part is empty.")
        bare = np.nonzero(mask & (labels < 0))[0]
        if bare.size:
            raise GraphError(
                f"{where}: {bare.size} nodes of the {name} part have no label "
                f"({_some(bare)})."
            )
    for first, second in _pairs():
        both = np.nonzero(masks[first] & masks[second])[0]
        if both.size:
            raise GraphError(
                f"{where}: {first} and {second} overlap in {both.size} nodes "
                f"({_some(both)}): results on {second} would be too good."
            )
    used = masks["train"] | masks["validation"] | masks["test"]
    missing = np.setdiff1d(labels[used], labels[masks["train"]])
    if missing.size:
        raise GraphError(
            f"{where}: class {', '.join(map(str, missing[:SHOWN]))} is missing from "
            "the train part, so no classifier can learn it."
        )


def mask_of(rows: np.ndarray, nodes: int, *, where: str) -> np.ndarray:
    """A mask, bool `[N]`, from row numbers.

    Raises:
        GraphError: not integers, out of range, or one is listed twice.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise GraphError(
            f"{where}: must be a list of node numbers, got {rows.dtype} "
            f"{list(rows.shape)}."
        )
    outside = np.nonzero((rows < 0) | (rows >= nodes))[0]
    if outside.size:
        raise GraphError(
            f"{where}[{outside[0]}] = {rows[outside[0]]} is out of range: there are "
            f"{nodes} nodes, numbered from 0."
        )
    counts = np.bincount(rows, minlength=nodes)
    if counts.max(initial=0) > 1:
        raise GraphError(f"{where}: node {int(np.argmax(counts > 1))} is listed twice.")
    return counts > 0


def _pairs() -> Iterator[tuple[str, str]]:
    yield from (
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
    )


def _some(nodes: np.ndarray) -> str:
    shown = ", ".join(map(str, nodes[:SHOWN]))
    more = ", ..." if nodes.size > SHOWN else ""
    return f"node{'s' if nodes.size > 1 else ''} {shown}{more}"
