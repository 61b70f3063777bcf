"""Planetoid's files (`ind.NAME.x` and so on) into our record.

They are pickles of Python 2, and a pickle can call anything. Only the few names below
are resolved, to stand-ins of ours where the real class could do more than hold arrays;
any other name is refused. Nothing else in the library reads pickles.
"""

import collections
import os
import pathlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpost.graphs._check import GraphError
from jaxpost.graphs._io import NodeData, node_data

_PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")
_VALIDATION = 500


class _Rows:
    """What a pickled `csr_matrix` holds; behaves as nothing else."""

    def __init__(self, *arguments: Any) -> None:
        if arguments:
            raise GraphError("a sparse matrix with constructor arguments is refused.")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise GraphError("a sparse matrix without its fields is refused.")
        self.state = state


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    """As `copy_reg._reconstructor`, for sparse matrices only."""
    if kind is not _Rows or base is not object or state is not None:
        raise GraphError("copy_reg._reconstructor may build sparse matrices only.")
    return _Rows()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes the bytes of an array in protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise GraphError(f"_codecs.encode to {encoding!r} is refused.")
    return text.encode("latin1")


def _array(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    """As numpy's `_reconstruct`, for plain arrays only."""
    if kind is not np.ndarray:
        raise GraphError("numpy._reconstruct may build plain arrays only.")
    return np.ndarray.__new__(np.ndarray, shape, typecode)


def _allowed() -> dict[tuple[str, str], Any]:
    """Global names, with the module names of Python 2 and 3, NumPy 1 and 2."""
    found: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "defaultdict"): collections.defaultdict,
        ("_codecs", "encode"): _encode,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found[module, "_reconstruct"] = _array
    for module in ("scipy.sparse.csr", "scipy.sparse._csr"):
        found[module, "csr_matrix"] = _Rows
    for module in ("__builtin__", "builtins"):
        found |= {(module, "list"): list, (module, "int"): int}
        found[module, "object"] = object  # the base that _reconstructor names
    for module in ("copy_reg", "copyreg"):
        found[module, "_reconstructor"] = _reconstructor
    return found


class _Unpickler(pickle.Unpickler):
    """Resolves the allowed names and no other."""

    allowed = _allowed()

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = self.allowed.get((module_name, global_name))
        if found is None:
            raise GraphError(
                f"the pickle asks for {module_name}.{global_name}, which is refused: "
                "planetoid's files need arrays, sparse matrices, defaultdict, list and "
                "int only. Do not trust this file."
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise GraphError("the pickle has persistent ids, which are refused.")


def load_pickle(path: str | os.PathLike) -> Any:
    """The object in one of planetoid's pickles; sparse matrices as SciPy CSR.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: it is no pickle, is damaged, or asks for a name that is not allowed
            (the message says which).
    """
    from scipy import sparse

    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            found = _Unpickler(file, encoding="latin1").load()
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise GraphError(f"{path}: is no pickle of planetoid's ({error!r}).") from error
    if not isinstance(found, _Rows):
        return found
    state = getattr(found, "state", {})
    shape = state.get("_shape", state.get("shape"))
    try:
        parts = tuple(np.asarray(state[name]) for name in ("data", "indices", "indptr"))
        matrix = sparse.csr_matrix(parts, shape=shape)
        matrix.check_format(full_check=True)
    except (KeyError, TypeError, ValueError) as error:
        raise GraphError(f"{path}: holds no valid CSR matrix ({error!r}).") from error
    return matrix


def load_planetoid(folder: str | os.PathLike, name: str | None = None) -> NodeData:
    """Reads a data set of planetoid's: `ind.NAME.x` and the seven files beside it.

    Labelled training nodes come first, the 500 after them validate, those of
    `test.index` test. Test nodes that `test.index` leaves out (CiteSeer has some) get
    no features and no label. Edges are made to go both ways; self-loops and repeated
    edges are dropped.

    Args:
        folder: where the files are.
        name: NAME; may be left out if the folder has one data set.

    Raises:
        FileNotFoundError: a file is missing; the message lists what is expected.
        GraphError: see `load_pickle` and `node_data`; or the files do not fit together.
    """
    from scipy import sparse

    folder = pathlib.Path(folder)
    name = _data_set(folder, name)
    read = _read_parts(folder, name)
    test = np.loadtxt(folder / f"ind.{name}.test.index", np.int64, ndmin=1)
    first, last = int(test.min()), int(test.max())
    known = read["allx"].shape[0]
    if first != known or test.size != read["tx"].shape[0]:
        raise GraphError(
            f"{folder}: test.index names {test.size} nodes from {first}, but tx has "
            f"{read['tx'].shape[0]} rows after {known} of allx."
        )
    nodes = last + 1
    features = sparse.lil_matrix((nodes, read["allx"].shape[1]), dtype=np.float32)
    features[:known] = read["allx"]
    features[test] = read["tx"]
    labels = np.full(nodes, -1, np.int64)
    for rows, one_hot in ((slice(0, known), read["ally"]), (test, read["ty"])):
        # A row of zeros is a node without a class.
        labels[rows] = np.where(one_hot.any(axis=1), one_hot.argmax(axis=1), -1)
    train = read["y"].shape[0]
    rows = {
        "train": np.arange(train),
        "validation": np.arange(train, min(train + _VALIDATION, known)),
        "test": np.sort(test),
    }
    masks = {part: np.zeros(nodes, bool) for part in rows}
    for part, chosen in rows.items():
        masks[part][chosen] = labels[chosen] >= 0
    return node_data(
        name,
        features.tocsr(),
        _edges_of(read["graph"], folder, name),
        labels=labels,
        masks=masks,
        repair=True,
        where=f"{folder}/ind.{name}",
    )


def _data_set(folder: pathlib.Path, name: str | None) -> str:
    found = sorted(p.name[4:-6] for p in folder.glob("ind.*.graph"))
    if name is None:
        if len(found) != 1:
            raise FileNotFoundError(
                f"{folder}: expected the files ind.NAME.x, .y, .tx, .ty, .allx, .ally, "
                f".graph and .test.index of one data set, found "
                f"{', '.join(found) or 'none'}; name one of several."
            )
        name = found[0]
    for part in _PARTS:
        if not (folder / f"ind.{name}.{part}").is_file():
            raise FileNotFoundError(
                f"{folder}: lacks ind.{name}.{part}; all of "
                f"{', '.join(f'.{p}' for p in _PARTS)} are needed."
            )
    return name


def _read_parts(folder: pathlib.Path, name: str) -> dict[str, Any]:
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "allx": (lambda v: hasattr(v, "toarray"), "a sparse matrix"),
        "tx": (lambda v: hasattr(v, "toarray"), "a sparse matrix"),
        "y": (lambda v: isinstance(v, np.ndarray) and v.ndim == 2, "one-hot rows"),
        "ally": (lambda v: isinstance(v, np.ndarray) and v.ndim == 2, "one-hot rows"),
        "ty": (lambda v: isinstance(v, np.ndarray) and v.ndim == 2, "one-hot rows"),
        "graph": (lambda v: isinstance(v, Mapping), "lists of neighbours"),
    }
    read = {}
    for part, (fits, what) in kinds.items():
        path = folder / f"ind.{name}.{part}"
        read[part] = load_pickle(path)
        if not fits(read[part]):
            raise GraphError(f"{path}: expected {what}, got {type(read[part])}.")
    for rows, one_hot in (("allx", "ally"), ("tx", "ty")):
        if read[rows].shape[0] != read[one_hot].shape[0]:
            raise GraphError(
                f"{folder}: {rows} has {read[rows].shape[0]} rows, {one_hot} "
                f"{read[one_hot].shape[0]}."
            )
    return read


def _edges_of(graph: Mapping[Any, Any], folder: pathlib.Path, name: str) -> np.ndarray:
    try:
        pairs = [(int(a), int(b)) for a, ends in graph.items() for b in ends]
    except (TypeError, ValueError) as error:
        raise GraphError(
            f"{folder}/ind.{name}.graph: no node number ({error})."
        ) from error
    return np.array(pairs, np.int64).reshape(-1, 2).T
