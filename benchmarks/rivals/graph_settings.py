"""What every contestant of bench_graph.py shares: sizes, the graph, the two methods.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import os
import pathlib

import numpy as np

# CLNR as published for Cora (arXiv 2305.00623) and GRACE as its repository configures
# it for Cora (arXiv 2006.04131). `nodes` below 2708 takes Cora's first nodes.
METHODS = {
    "clnr": {
        "widths": (512, 512),
        "activate_last": False,
        "edge_drop": (0.5, 0.5),
        "feature_mask": (0.2, 0.2),
        "temperature": 0.5,
        "batch": 1024,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    },
    "grace": {
        "widths": (256, 128),
        "activate_last": True,
        "head": 128,
        "edge_drop": (0.2, 0.4),
        "feature_mask": (0.3, 0.4),
        "temperature": 0.4,
        "batch": None,
        "learning_rate": 5e-4,
        "weight_decay": 1e-5,
    },
}
SIZES = {"nodes": 2708, "epochs_in_scan": 10, "seeds": 20}


def cora(nodes: int) -> dict:
    """Row-normalised features in CSR parts, and edges `[2, E]` in both directions.

    Raises:
        SystemExit: the file is not there.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    folder = pathlib.Path(
        os.environ.get("JAXPOST_GRAPHS", root.parent / "shared" / "data" / "graphs")
    )
    path = folder / "cora.npz"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; set JAXPOST_GRAPHS to its folder")
    with np.load(path) as held:
        values, columns, indptr = (
            held[f"feat_{name}"] for name in ("data", "indices", "indptr")
        )
        width = int(held["feat_shape"][1])
        edges = held["edge_index"].astype(np.int64)
    edges = edges[:, (edges < nodes).all(axis=0)]
    indptr = indptr[: nodes + 1]
    values, columns = values[: indptr[-1]], columns[: indptr[-1]]
    counts = np.diff(indptr)
    sums = np.add.reduceat(values, indptr[:-1])
    values = values / np.repeat(np.where(counts > 0, sums, 1.0), counts)
    return {
        "values": values.astype(np.float32),
        "columns": columns,
        "indptr": indptr,
        "shape": (nodes, width),
        "edges": edges,
    }
