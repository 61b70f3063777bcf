"""Smoothing of embeddings against a dense NumPy loop."""

import jax
import numpy as np
import pytest
from oracles import probe as oracle

from jaxpost import graphs


@pytest.fixture(scope="module")
def graph():
    """Five nodes, one of them alone."""
    edges = np.array([[0, 1, 1, 2, 2, 3, 0, 3], [1, 0, 2, 1, 3, 2, 3, 0]])
    return graphs.make_graph(np.eye(5, dtype=np.float32), edges)


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def adjacency(graph):
    matrix = np.zeros((5, 5))
    matrix[np.asarray(graph.receivers), np.asarray(graph.senders)] = 1.0
    return matrix


@pytest.mark.parametrize(("steps", "restart"), [(1, 0.0), (3, 0.2), (4, 1.0)])
def test_equals_dense_pagerank(graph, embeddings, steps, restart):
    expected = oracle.smooth(
        adjacency(graph), embeddings.astype(np.float64), steps=steps, restart=restart
    )
    found = graphs.smooth(graph, embeddings, steps=steps, restart=restart)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_no_step_changes_nothing(graph, embeddings):
    found = graphs.smooth(graph, embeddings, steps=0, restart=0.1)
    np.testing.assert_array_equal(found, embeddings)


def test_plan_and_jit_change_nothing(graph, embeddings):
    plain = graphs.smooth(graph, embeddings, steps=2, restart=0.1)
    plan = graphs.plan_graph(graph)
    compiled = jax.jit(
        lambda graph, x, plan: graphs.smooth(graph, x, steps=2, restart=0.1, plan=plan)
    )
    np.testing.assert_allclose(compiled(graph, embeddings, plan), plain, rtol=1e-6)


def test_settings_are_checked(graph, embeddings):
    for settings in ({"steps": -1, "restart": 0.1}, {"steps": 1, "restart": 1.5}):
        with pytest.raises(ValueError, match=r"steps must be at least 0 and restart"):
            graphs.smooth(graph, embeddings, **settings)
