"""Small graphs that the tests of this folder share."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_graphs import random_graph, undirected

from jaxpost import graphs


@pytest.fixture(scope="session")
def ring():
    """Twelve nodes in a ring, with eight random features each."""
    nodes = np.arange(12)
    edges = np.stack([nodes, (nodes + 1) % 12])
    features = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    return graphs.make_graph(features, undirected(edges))


@pytest.fixture(scope="session")
def scattered():
    """Sixteen nodes, one of them isolated, features with many zeros."""
    graph = random_graph(15, 30, 6, seed=1)
    features = np.asarray(graph.nodes)
    features = np.concatenate([features, np.ones((1, 6), np.float32)])
    features[features < 0.3] = 0.0
    edges = jnp.stack([graph.senders, graph.receivers])
    return graphs.make_graph(features, edges)
