"""Graphs with labelled nodes: `.npz` files in and out, data sets by name.

The one record that loaders return, checked whenever it is made by `node_data`. Other
formats are read in `_formats` and `_planetoid`.
"""

import dataclasses
import difflib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from jaxpost.graphs import _builtin
from jaxpost.graphs._check import (
    PARTS,
    GraphError,
    check_edges,
    check_features,
    check_masks,
    check_node_labels,
    mask_of,
)
from jaxpost.graphs._container import (
    Features,
    SparseFeatures,
    count_nodes,
    edges_of,
    features_of,
    make_graph,
    sparse_features,
)

DENSE_SHARE = 0.1
"""Features of which a larger share is not zero are held dense."""
FOLDER_VARIABLE = "JAXPOST_GRAPHS"
_INDEX_NAMES = {"train": "train_idx", "validation": "val_idx", "test": "test_idx"}


class NodeData(NamedTuple):
    """One graph whose nodes may have classes and a standard split.

    Fields:
        name: of the data set.
        graph: as `make_graph` builds it; features are float32, `SparseFeatures` where
            at most a tenth of them is not zero.
        labels: int32 `[N]`, -1 where a node has none; None without classes.
        masks: bool `[N]` by part: train, validation, test; None without a split.
        node_names: what the source calls the nodes, `[N]`; None if by number.
    """

    name: str
    graph: jraph.GraphsTuple
    labels: np.ndarray | None = None
    masks: dict[str, np.ndarray] | None = None
    node_names: tuple[str, ...] | None = None

    @property
    def node_count(self) -> int:
        return count_nodes(self.graph)

    @property
    def classes(self) -> int:
        """How many classes the labels have; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


def node_data(
    name: str,
    features: Any,
    edges: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    node_names: tuple[str, ...] | None = None,
    repair: bool = False,
    where: str | None = None,
) -> NodeData:
    """Checks the parts of a graph and puts them together.

    Args:
        name: of the data set.
        features: float `[N, F]`, NumPy or SciPy sparse.
        edges: integer `[2, E]`: senders and receivers.
        labels: integer `[N]`, -1 without one; or None.
        masks: bool `[N]` by part: train, validation, test; or None.
        node_names: what the source calls the nodes, or None.
        repair: drop self-loops and repeated edges, add missing directions.
        where: what to call the source in messages; the name if None.

    Raises:
        GraphError: a part is not as `NodeData` says; the message names the first place.

    Warns:
        GraphWarning: edges that go one way only, and nodes without edges.
    """
    where = name if where is None else where
    features = _checked_features(features, where)
    nodes = features.shape[0]
    edges = check_edges(edges, nodes, where=f"{where}: edge_index", repair=repair)
    if labels is not None:
        labels = check_node_labels(labels, nodes, where=f"{where}: labels")
    if masks is not None:
        if labels is None:
            raise GraphError(f"{where}: has a split but no labels.")
        masks = {part: np.asarray(masks[part]) for part in PARTS}
        check_masks(masks, labels, where=f"{where}: split")
    return NodeData(name, make_graph(features, edges), labels, masks, node_names)


def _checked_features(features: Any, where: str) -> Features | np.ndarray:
    """Float32, sparse where that is a tenth or less of the whole."""
    from scipy import sparse

    if not hasattr(features, "tocsr"):
        features = np.asarray(features)
        check_features(features, where=f"{where}: features")
        if np.count_nonzero(features) > DENSE_SHARE * features.size:
            return features.astype(np.float32, copy=False)
    held: Any = sparse.csr_matrix(features)
    held.sum_duplicates()
    check_features(held.data[:, None], where=f"{where}: feature values")
    if held.nnz > DENSE_SHARE * held.shape[0] * held.shape[1]:
        return held.toarray().astype(np.float32, copy=False)
    values = held.data.astype(np.float32, copy=False)
    return sparse_features(values, held.indices, held.indptr, held.shape)


def load_npz(path: str | os.PathLike, *, repair: bool = False) -> NodeData:
    """Reads a graph from one `.npz` file, as `save_npz` writes it. No pickles.

    The file holds `feat_data`, `feat_indices`, `feat_indptr`, `feat_shape` (CSR
    features), `edge_index` `[2, E]`, and as far as there are any `labels` `[N]`,
    `has_label` bool `[N]`, `train_idx`, `val_idx`, `test_idx`.

    Args:
        path: the file.
        repair: see `node_data`.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: the file is no `.npz`, lacks an array, or an array is not as it
            should be.

    Warns:
        GraphWarning: see `node_data`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.{_nearest(path)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise GraphError(f"{path}: cannot be read as .npz ({error}).") from error
    lacking = [
        name
        for name in (*(f"feat_{x}" for x in _CSR), "edge_index")
        if name not in held
    ]
    if lacking:
        raise GraphError(
            f"{path}: lacks {', '.join(lacking)}; it has {', '.join(sorted(held))}. "
            "`jaxpost graph convert` and graphs.save_npz write the layout."
        )
    features = _read_csr(held, path)
    nodes = features.shape[0]
    labels = held.get("labels")
    if labels is not None and "has_label" in held:
        labels = check_node_labels(labels, nodes, where=f"{path}: labels")
        has_label = held["has_label"]
        if has_label.dtype != bool or has_label.shape != (nodes,):
            raise GraphError(
                f"{path}: has_label must be bool [{nodes}], got {has_label.dtype} "
                f"{list(has_label.shape)}."
            )
        labels = np.where(has_label, labels, -1)
    present = [part for part, name in _INDEX_NAMES.items() if name in held]
    if present and len(present) < len(PARTS):
        raise GraphError(f"{path}: has a split of {', '.join(present)} only.")
    masks = {
        part: mask_of(held[name], nodes, where=f"{path}: {name}")
        for part, name in _INDEX_NAMES.items()
        if present
    }
    names = held.get("node_names")
    return node_data(
        path.stem,
        features,
        held["edge_index"],
        labels=labels,
        masks=masks or None,
        node_names=None if names is None else tuple(map(str, names)),
        repair=repair,
        where=str(path),
    )


_CSR = ("data", "indices", "indptr", "shape")


def _read_csr(held: Mapping[str, np.ndarray], path: pathlib.Path) -> Any:
    from scipy import sparse

    data, indices, indptr, shape = (held[f"feat_{name}"] for name in _CSR)
    if shape.shape != (2,) or not np.issubdtype(shape.dtype, np.integer):
        raise GraphError(f"{path}: feat_shape must be two integers, got {shape}.")
    if not np.issubdtype(data.dtype, np.floating):
        raise GraphError(f"{path}: feat_data must be floats, got {data.dtype}.")
    try:
        found = sparse.csr_matrix((data, indices, indptr), shape=tuple(shape))
        found.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise GraphError(f"{path}: features are no valid CSR: {error}") from error
    return found


def save_npz(path: str | os.PathLike, data: NodeData) -> pathlib.Path:
    """Writes a graph as `load_npz` reads it; whole or not at all.

    Raises:
        ValueError: the name does not end in `.npz`.
        OSError: the file cannot be written.
    """
    from scipy import sparse

    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the name must end in .npz.")
    features = features_of(data.graph)
    if isinstance(features, SparseFeatures):
        places = (np.asarray(features.rows), np.asarray(features.columns))
        held = sparse.coo_matrix(
            (np.asarray(features.values), places), shape=features.shape
        )
    else:
        held = np.asarray(features, np.float32)
    features = sparse.csr_matrix(held)
    arrays = {
        "edge_index": np.stack([np.asarray(end) for end in edges_of(data.graph)]),
        "feat_data": features.data,
        "feat_indices": features.indices.astype(np.int32),
        "feat_indptr": features.indptr.astype(np.int32),
        "feat_shape": np.array(features.shape, np.int64),
    }
    if data.labels is not None:
        arrays["labels"] = data.labels
        arrays["has_label"] = data.labels >= 0
    for part, mask in (data.masks or {}).items():
        arrays[_INDEX_NAMES[part]] = np.nonzero(mask)[0].astype(np.int32)
    if data.node_names is not None:
        arrays["node_names"] = np.array(data.node_names, np.str_)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    part.replace(path)
    return path


def load_dataset(name: str, *, repair: bool = False) -> NodeData:
    """A data set: `builtin`, a `.npz` file, or the name of one such as `cora`.

    A name is looked for as NAME.npz in the folder that the environment variable
    JAXPOST_GRAPHS names, in `data/graphs`, and in `../shared/data/graphs`. Nothing is
    downloaded.

    Raises:
        FileNotFoundError: there is no such file; the message says where it was looked
            for, and how to make one.
        GraphError: see `load_npz`.
    """
    if name == "builtin":
        return builtin()
    if name.endswith(".npz") or os.sep in name:
        return load_npz(name, repair=repair)
    folders = [pathlib.Path("data/graphs"), pathlib.Path("../shared/data/graphs")]
    if os.environ.get(FOLDER_VARIABLE):
        folders.insert(0, pathlib.Path(os.environ[FOLDER_VARIABLE]))
    tried = [folder / f"{name}.npz" for folder in folders]
    for path in tried:
        if path.is_file():
            return load_npz(path, repair=repair)
    raise FileNotFoundError(
        f"no data set {name!r}: expected the file {name}.npz in one of "
        f"{', '.join(str(path.parent) for path in tried)} (set {FOLDER_VARIABLE} to "
        "look elsewhere). Nothing is downloaded: `jaxpost graph convert FOLDER "
        f"{name}.npz` makes it from planetoid's files, and `builtin` needs none."
    )


def builtin() -> NodeData:
    """Three hundred nodes in four communities, drawn the same each time."""
    parts = _builtin.communities()
    return node_data("builtin", **parts)


def row_normalize(graph: jraph.GraphsTuple) -> jraph.GraphsTuple:
    """Features divided by their row's sum; rows that sum to 0 stay as they are."""
    features = features_of(graph)
    if isinstance(features, SparseFeatures):
        sums = jax.ops.segment_sum(
            features.values, features.rows, features.shape[0], indices_are_sorted=True
        )
        sums = jnp.where(sums == 0.0, 1.0, sums)
        values = features.values / sums[features.rows]
        return graph._replace(nodes=dataclasses.replace(features, values=values))
    sums = jnp.sum(features, axis=1, keepdims=True)
    return graph._replace(nodes=features / jnp.where(sums == 0.0, 1.0, sums))


def random_masks(
    labels: np.ndarray, *, validation: float = 0.1, test: float = 0.8, seed: int
) -> dict[str, np.ndarray]:
    """A random split of the labelled nodes: the rest after validation and test trains.

    Raises:
        ValueError: the fractions leave no node to train on, or are not positive.
        GraphError: a class has no training node; try another seed or fractions.
    """
    if validation <= 0.0 or test <= 0.0 or validation + test >= 1.0:
        raise ValueError(
            "validation and test must be positive and leave some nodes to train on, "
            f"got {validation} and {test}."
        )
    known = np.random.default_rng(seed).permutation(np.nonzero(labels >= 0)[0])
    counts = round(validation * known.size), round(test * known.size)
    rows = {
        "validation": known[: counts[0]],
        "test": known[counts[0] : sum(counts)],
        "train": known[sum(counts) :],
    }
    masks = {part: np.zeros(labels.shape, bool) for part in PARTS}
    for part, chosen in rows.items():
        masks[part][chosen] = True
    check_masks(masks, labels, where=f"random split of seed {seed}")
    return masks


def _nearest(path: pathlib.Path) -> str:
    parent = path.parent
    siblings = [p.name for p in parent.glob("*.npz")] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    return f" Did you mean {parent / near[0]}?" if near else ""
