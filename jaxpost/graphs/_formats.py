"""Graphs from edge lists with CSV features, and from and to networkx."""

import csv
import os
import pathlib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpost.graphs._check import PARTS, GraphError
from jaxpost.graphs._container import SparseFeatures, edges_of, features_of
from jaxpost.graphs._io import NodeData, node_data

_SPLIT_NAMES = {"train": "train", "val": "validation", "validation": "validation"} | {
    "valid": "validation",
    "test": "test",
    "": "",
}


def load_edge_list(
    edges: str | os.PathLike,
    nodes: str | os.PathLike,
    *,
    name: str | None = None,
    repair: bool = False,
) -> NodeData:
    """Reads a graph from a list of edges and a CSV file of nodes.

    Args:
        edges: text file, two node names per line, separated by white space, a comma or
            a tab; more columns are refused; lines that start with `#` and empty ones
            are skipped.
        nodes: CSV file with a header. Column `node` (or `id`) names the node; `label`,
            if there, is its class, empty or -1 if it has none: integers are taken as
            they are; if there is any other word, classes are numbered in alphabetical
            order. `split`, if there, is train, validation, test or empty. Every other
            column is a feature. The nodes keep the file's order.
        name: of the data set; the edge file's if None.
        repair: drop self-loops and repeated edges, add missing directions; most edge
            lists name an edge once, and need it.

    Raises:
        FileNotFoundError: a file is missing.
        GraphError: a line cannot be read, names an unknown node, or is a duplicate; the
            message gives file and line. Or the graph is not as `node_data` wants it.

    Warns:
        GraphWarning: see `node_data`.
    """
    edges, nodes = pathlib.Path(edges), pathlib.Path(nodes)
    for path in (edges, nodes):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
    names, features, labels, masks = _read_nodes(nodes)
    index = {node: row for row, node in enumerate(names)}
    return node_data(
        name or edges.stem,
        features,
        _read_edges(edges, index, nodes),
        labels=labels,
        masks=masks,
        node_names=names,
        repair=repair,
        where=str(edges),
    )


def _read_edges(
    path: pathlib.Path, index: Mapping[str, int], nodes: pathlib.Path
) -> np.ndarray:
    found: list[tuple[int, int]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            words = (
                [w.strip() for w in line.split(",")] if "," in line else line.split()
            )
            if len(words) != 2:
                raise GraphError(
                    f"{path}:{number}: expected two node names, got {len(words)} "
                    f"words: {line[:60]!r}."
                )
            for word in words:
                if word not in index:
                    raise GraphError(
                        f"{path}:{number}: node {word!r} is not in {nodes}."
                    )
            found.append((index[words[0]], index[words[1]]))
    return np.array(found, np.int64).reshape(-1, 2).T


def _read_nodes(path: pathlib.Path) -> tuple[Any, ...]:
    """Names, features `[N, F]`, labels or None, masks or None."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = [column.strip() for column in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    named = [column for column in ("node", "id") if column in header]
    if not named:
        raise GraphError(
            f"{path}:1: the header needs a column `node` (or `id`), got "
            f"{', '.join(header[:8]) or 'nothing'}."
        )
    special = {named[0], "label", "split"}
    columns = [place for place, name in enumerate(header) if name not in special]
    if not columns:
        raise GraphError(f"{path}:1: no feature column besides {', '.join(header)}.")
    names: dict[str, int] = {}
    features = np.empty((len(rows), len(columns)), np.float32)
    for at, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise GraphError(
                f"{path}:{line}: {len(row)} values for {len(header)} columns."
            )
        node = row[header.index(named[0])].strip()
        if node in names:
            raise GraphError(
                f"{path}:{line}: node {node!r} was on line {names[node]} already."
            )
        names[node] = line
        for column, place in enumerate(columns):
            features[at, column] = _number(row[place], path, line, header[place])
    labels = masks = None
    if "label" in header:
        words = [row[header.index("label")].strip() for _, row in rows]
        labels = _labels_of(words)
    if "split" in header:
        masks = _masks_of(path, [(n, r[header.index("split")]) for n, r in rows])
    return tuple(names), features, labels, masks


def _number(word: str, path: pathlib.Path, line: int, column: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise GraphError(
            f"{path}:{line}: column {column!r} must be a number, got {word!r}."
        ) from None


def _labels_of(words: Sequence[str]) -> np.ndarray:
    """Classes of words: integers as they are, else numbered alphabetically.

    Empty and -1 are no label either way.
    """
    given = sorted(set(words) - {"", "-1"})
    if all(re.fullmatch(r"[+-]?[0-9]+", word) for word in given):
        classes = {word: int(word) for word in given}
    else:
        classes = {word: number for number, word in enumerate(given)}
    return np.array([classes.get(word, -1) for word in words], np.int64)


def _masks_of(
    path: pathlib.Path, column: Sequence[tuple[int, str]]
) -> dict[str, np.ndarray]:
    parts = []
    for line, word in column:
        word = word.strip().lower()
        if word not in _SPLIT_NAMES:
            raise GraphError(
                f"{path}:{line}: split must be train, validation, test or empty, got "
                f"{word!r}."
            )
        parts.append(_SPLIT_NAMES[word])
    return {part: np.array([p == part for p in parts], bool) for part in PARTS}


def from_networkx(
    graph: Any,
    *,
    features: str = "x",
    label: str = "y",
    split: str = "split",
    name: str = "networkx",
) -> NodeData:
    """A graph of networkx, its attributes taken from the nodes.

    Args:
        graph: `networkx.Graph` or `DiGraph`; an undirected edge becomes two.
        features: node attribute with a list of floats, the same length everywhere.
        label: node attribute with an integer class; nodes may lack it.
        split: node attribute with train, validation or test; nodes may lack it.
        name: of the data set.

    Raises:
        GraphError: a node has no features, or others than its fellows; a multigraph; or
            see `node_data`.

    Warns:
        GraphWarning: see `node_data`.
    """
    if graph.is_multigraph():
        raise GraphError(f"{name}: is a multigraph; make it a networkx.Graph first.")
    index: dict[Hashable, int] = {node: row for row, node in enumerate(graph.nodes)}
    lists = []
    for node, held in graph.nodes(data=True):
        if features not in held:
            raise GraphError(f"{name}: node {node!r} has no attribute {features!r}.")
        lists.append(np.asarray(held[features], np.float32).ravel())
        if lists[-1].size != lists[0].size:
            raise GraphError(
                f"{name}: node {node!r} has {lists[-1].size} features, the first node "
                f"{lists[0].size}."
            )
    pairs = [(index[a], index[b]) for a, b in graph.edges]
    if not graph.is_directed():
        pairs += [(b, a) for a, b in pairs if a != b]
    labels = [held.get(label, -1) for _, held in graph.nodes(data=True)]
    parts = [held.get(split, "") for _, held in graph.nodes(data=True)]
    masks = (
        _masks_of(pathlib.Path(name), list(enumerate(parts))) if any(parts) else None
    )
    return node_data(
        name,
        np.stack(lists) if lists else np.zeros((0, 1), np.float32),
        np.array(pairs, np.int64).reshape(-1, 2).T,
        labels=np.array(labels) if any(y != -1 for y in labels) else None,
        masks=masks,
        node_names=tuple(map(str, index)),
    )


def to_networkx(data: NodeData) -> Any:
    """A `networkx.DiGraph` with node attributes `x`, `y`, `split` as there are any."""
    import networkx

    graph = networkx.DiGraph()
    features = features_of(data.graph)
    if isinstance(features, SparseFeatures):
        features = features.todense()
    rows = np.asarray(features)
    for node in range(data.node_count):
        held: dict[str, Any] = {"x": rows[node]}
        if data.labels is not None and data.labels[node] >= 0:
            held["y"] = int(data.labels[node])
        for part, mask in (data.masks or {}).items():
            if mask[node]:
                held["split"] = part
        graph.add_node(node, **held)
    ends = [np.asarray(x).tolist() for x in edges_of(data.graph)]
    graph.add_edges_from(zip(*ends, strict=True))
    return graph
