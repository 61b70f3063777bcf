"""Views: shapes kept, rates met, directions alone or together, keys obeyed."""

import jax
import numpy as np
import pytest
from small_graphs import random_graph, sparse_of

from jaxpost import graphs


@pytest.fixture(scope="module")
def large():
    return random_graph(60, 800, 400, seed=3)


def view(graph, seed=0, **settings):
    settings = {"edge_drop": 0.4, "feature_mask": 0.3} | settings
    return graphs.augment(graph, **settings, key=jax.random.key(seed))


def test_nothing_dropped_is_the_graph(ring):
    same = view(ring, edge_drop=0.0, feature_mask=0.0)
    assert (same.nodes == ring.nodes).all()
    assert (same.edges == 1.0).all()


def test_shapes_stay_and_rates_are_met(large):
    found = jax.jit(view)(large)
    assert found.edges.shape == large.senders.shape
    assert found.nodes.shape == large.nodes.shape
    # 1600 edges, 400 columns: five standard deviations.
    assert abs(np.mean(found.edges) - 0.6) < 5 * (0.24 / 1600) ** 0.5
    masked = np.all(np.asarray(found.nodes) == 0.0, axis=0)
    assert abs(np.mean(masked) - 0.3) < 5 * (0.21 / 400) ** 0.5
    # Column by column: what is not masked is untouched, and not rescaled.
    kept = np.asarray(found.nodes)[:, ~masked]
    np.testing.assert_array_equal(kept, np.asarray(large.nodes)[:, ~masked])


def test_directed_drop_takes_directions_alone_and_symmetric_together(large):
    def both_kept(drop):
        weights = np.asarray(view(large, drop=drop).edges)
        senders, receivers = np.asarray(large.senders), np.asarray(large.receivers)
        there = dict(zip(zip(senders, receivers, strict=True), weights, strict=True))
        return [(w, there[r, s]) for (s, r), w in there.items()]

    assert any(a != b for a, b in both_kept("directed"))
    together = both_kept("symmetric")
    assert all(a == b for a, b in together)
    assert 0 < sum(a for a, _ in together) < len(together)


def test_pairs_number_edges_with_their_reverse(scattered):
    pairs = np.asarray(graphs.edge_pairs(scattered))
    ends = np.sort([scattered.senders, scattered.receivers], axis=0)
    same = (ends[:, :, None] == ends[:, None, :]).all(axis=0)
    np.testing.assert_array_equal(pairs[:, None] == pairs[None, :], same)


def test_keys_decide(large):
    first, again, other = view(large, 1), view(large, 1), view(large, 2)
    assert (first.edges == again.edges).all()
    assert (first.edges != other.edges).any()
    assert (first.nodes != other.nodes).any()


def test_sparse_features_are_masked_like_dense_ones(scattered):
    sparse = scattered._replace(nodes=sparse_of(scattered.nodes))
    np.testing.assert_array_equal(
        view(sparse, 4).nodes.todense(), view(scattered, 4).nodes
    )


def test_weights_of_the_graph_survive(ring):
    weights = np.linspace(0.5, 1.5, len(ring.senders)).astype(np.float32)
    found = np.asarray(view(ring._replace(edges=weights)).edges)
    assert set(np.unique(found == 0.0)) == {True, False}
    np.testing.assert_array_equal(found[found != 0.0], weights[found != 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edge_drop": 1.0}, r"edge_drop must lie in \[0, 1\), got 1.0"),
        ({"feature_mask": -0.1}, r"feature_mask must lie in \[0, 1\), got -0.1"),
        ({"drop": "both"}, "drop must be one of directed, symmetric, got 'both'"),
    ],
)
def test_refused_settings(ring, settings, message):
    with pytest.raises(ValueError, match=message):
        view(ring, **settings)


def test_weights_of_a_wrong_shape_are_refused(ring):
    with pytest.raises(ValueError, match=r"graph.edges must be None or weights"):
        view(ring._replace(edges=np.ones((3, 2), np.float32)))
