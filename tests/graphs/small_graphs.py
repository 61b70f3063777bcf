"""Makes small graphs for the tests of this folder."""

import numpy as np

from jaxpost import graphs


def undirected(edges: np.ndarray) -> np.ndarray:
    return np.concatenate([edges, edges[::-1]], axis=1)


def random_graph(nodes: int, edges: int, width: int, *, seed: int = 0):
    """Distinct undirected edges, no loops; normal features."""
    rng = np.random.default_rng(seed)
    low, high = np.triu_indices(nodes, 1)
    chosen = rng.choice(len(low), edges, replace=False)
    features = rng.normal(size=(nodes, width)).astype(np.float32)
    return graphs.make_graph(features, undirected(np.stack([low, high])[:, chosen]))


def sparse_of(features) -> graphs.SparseFeatures:
    """The same matrix without its zeros."""
    dense = np.asarray(features)
    rows, columns = np.nonzero(dense)
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(dense, axis=1))])
    return graphs.sparse_features(dense[rows, columns], columns, indptr, dense.shape)
