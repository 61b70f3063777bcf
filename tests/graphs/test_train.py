"""The contrastive step: objectives, epochs, seeds, clusters, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles import contrastive as oracle
from small_graphs import random_graph, sparse_of

from jaxpost import graphs, losses, parallel

KINDS = ("clnr", "grace", "nclnr", "gclnr", "dclnr", "zca", "cca_ssg", "bclnr")


def method(kind="clnr", *, widths=(8, 8), encoder=(), views=(), **settings):
    view = graphs.AugmentConfig(
        **{"edge_drop": 0.3, "feature_mask": 0.2, **dict(views)}
    )
    return graphs.ContrastiveConfig(
        graphs.EncoderConfig(**{"widths": widths, **dict(encoder)}),
        graphs.ObjectiveConfig(kind, **settings),
        view,
        view,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def train(config, tx, state, graph, epochs):
    return graphs.train_epochs(config, tx, state, graph, epochs=epochs)


ADAM = optax.adam(1e-2)


def fresh(config, graph, tx=ADAM, seed=0):
    width = graph.nodes.shape[1]
    return graphs.init_state(config, tx, width, key=jax.random.key(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_lowers_its_loss(ring, kind):
    config = method(kind, batch=10 if kind == "clnr" else None)
    after, metrics = train(config, ADAM, fresh(config, ring), ring, 60)
    found = np.asarray(metrics["loss"])
    assert found.shape == (60,)
    assert found[-10:].mean() < found[:10].mean()
    assert graphs.embed(config, after.params, ring).shape == (12, 8)
    assert int(after.step) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_are_their_formulas(ring, kind):
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in "uv")
    config = graphs.ObjectiveConfig(kind, lam=0.01)
    params = graphs.init_objective(config, 4, key=jax.random.key(1))
    found = graphs.objective(config, params, u, v, key=jax.random.key(2)).loss
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def mlp(x):
        x = x @ head["kernel_in"] + head["bias_in"]
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        return x @ head["kernel_out"] + head["bias_out"]

    def white(x):
        x = x - x.mean(0)
        values, vectors = np.linalg.eigh(x.T @ x / (len(x) - 1))
        return x @ (vectors / np.sqrt(values + 1e-5)) @ vectors.T

    transform = {
        "clnr": oracle.standardize,
        "cca_ssg": oracle.standardize,
        "nclnr": lambda x: x,
        "grace": mlp,
        "gclnr": lambda x: oracle.standardize(mlp(x)),
        "dclnr": lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5),
        "bclnr": lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5),
        "zca": white,
    }[kind]
    z1, z2 = (transform(np.asarray(x, np.float64)) for x in (u, v))
    if kind == "cca_ssg":
        expected = oracle.cca(z1, z2, 0.01)
    else:
        expected = oracle.nt_xent(z1, z2, 0.5).mean()
    assert float(found) == pytest.approx(expected, rel=2e-5)


def test_sampled_nodes_are_contrasted_after_statistics_of_all():
    rng = np.random.default_rng(3)
    u, v = (jnp.asarray(rng.normal(size=(9, 4)), jnp.float32) for _ in "uv")
    key = jax.random.key(5)
    config = graphs.ObjectiveConfig(batch=4)
    found = graphs.objective(config, {}, u, v, key=key).loss
    rows = np.asarray(jax.random.choice(key, 9, (4,), replace=False))
    assert len(set(rows.tolist())) == 4
    z1, z2 = (oracle.standardize(x)[rows] for x in (u, v))
    assert float(found) == pytest.approx(oracle.nt_xent(z1, z2, 0.5).mean(), rel=1e-5)


def test_epochs_in_a_scan_are_steps_and_can_be_continued(ring):
    config = method(batch=8)
    step = jax.jit(graphs.make_step(config, ADAM))
    state = fresh(config, ring)
    plan = graphs.plan_for(config, ring)
    for _ in range(4):
        state, last = step(state, ring, plan)
    whole, metrics = train(config, ADAM, fresh(config, ring), ring, 4)
    half, _ = train(config, ADAM, fresh(config, ring), ring, 2)
    half, _ = train(config, ADAM, half, ring, 2)
    for other in (state, half):
        for a, b in zip(
            jax.tree.leaves(other.params), jax.tree.leaves(whole.params), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(metrics["loss"][-1], last["loss"], rtol=1e-5)


@pytest.mark.parametrize("at_once", [None, 2])
def test_seeds_together_are_seeds_alone(ring, at_once):
    config, keys = method(batch=8), jax.random.split(jax.random.key(7), 2)

    @jax.jit
    def together(keys):
        return graphs.train_seeds(
            config, ADAM, ring, epochs=3, at_once=at_once, keys=keys
        )

    states, metrics = together(keys)
    assert metrics["loss"].shape == (2, 3)
    for i in range(2):
        state = graphs.init_state(config, ADAM, 8, key=keys[i])
        alone, _ = train(config, ADAM, state, ring, 3)
        for a, b in zip(
            jax.tree.leaves(states.params), jax.tree.leaves(alone.params), strict=True
        ):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


def test_views_without_changes_are_aligned(ring):
    config = method(views={"edge_drop": 0.0, "feature_mask": 0.0}.items())
    state = fresh(config, ring)
    views = graphs.two_views(config, ring, key=jax.random.key(0))
    u, v = (graphs.embed(config, state.params, view) for view in views)
    np.testing.assert_array_equal(u, v)
    np.testing.assert_allclose(losses.alignment(u, v), 0.0, atol=1e-12)


def test_isolated_nodes_dead_columns_and_few_edges_stay_finite(scattered):
    """Nearly every edge and feature gone, and a feature that nobody has."""
    features = np.asarray(scattered.nodes).copy()
    features[:, 2] = 0.0
    for nodes in (jnp.asarray(features), sparse_of(features)):
        graph = scattered._replace(nodes=nodes)
        config = method(views={"edge_drop": 0.99, "feature_mask": 0.9}.items())
        after, metrics = train(config, ADAM, fresh(config, graph), graph, 20)
        assert np.isfinite(metrics["loss"]).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_sparse_features_train_like_dense_ones(scattered):
    config = method()
    sparse = scattered._replace(nodes=sparse_of(scattered.nodes))
    (a, x), (b, y) = (
        train(config, optax.sgd(0.1), fresh(config, g, optax.sgd(0.1)), g, 5)
        for g in (scattered, sparse)
    )
    np.testing.assert_allclose(x["loss"], y["loss"], rtol=1e-5)
    for p, q in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(p, q, atol=1e-5)


def test_second_call_does_not_trace_again(ring):
    traces = []

    @jax.jit
    def step(state, graph, plan):
        traces.append(None)
        return graphs.make_step(method(), ADAM)(state, graph, plan)

    state, plan = fresh(method(), ring), graphs.plan_for(method(), ring)
    for _ in range(3):
        state, _ = step(state, ring, plan)
    assert len(traces) == 1


def test_one_batch_of_all_clusters_is_the_whole_graph():
    graph = random_graph(12, 20, 5, seed=2)
    rng = np.random.default_rng(0)
    order = graphs.cluster_order(graph, rng=rng)
    assert sorted(order.tolist()) == list(range(12))
    (batch,) = graphs.cluster_batches(
        graph, order, cluster_nodes=4, clusters=3, edges=50, rng=rng
    )
    assert batch.edges.shape == (50,)
    assert float(batch.edges.sum()) == 40
    config = method(encoder={"kind": "gcn"}.items())
    state = fresh(config, graph)
    for a, b in zip(
        *(jax.tree.leaves(_gradient(config, state, g)) for g in (graph, batch)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _gradient(config, state, graph):
    """Of one step without randomness: plain views, all nodes."""

    def loss(params):
        u = graphs.embed(config, params, graph)
        z = losses.column_standardize(u)
        return jnp.mean(losses.nt_xent(z, z[::-1], temperature=0.5))

    return jax.jit(jax.grad(loss))(state.params)


def test_clusters_are_induced_disjoint_and_train():
    graph = random_graph(23, 40, 5, seed=4)
    rng = np.random.default_rng(1)
    order = graphs.cluster_order(graph, rng=rng)
    batches = list(
        graphs.cluster_batches(
            graph, order, cluster_nodes=3, clusters=2, edges=30, rng=rng
        )
    )
    assert len(batches) == 3
    seen = np.concatenate([batch.globals[0] for batch in batches])
    assert len(set(seen.tolist())) == len(seen) == 18
    there = set(zip(*np.asarray([graph.senders, graph.receivers]), strict=True))
    config = method()
    step, state = jax.jit(graphs.make_step(config, ADAM)), fresh(config, graph)
    for batch in batches:
        nodes = np.asarray(batch.globals[0])
        np.testing.assert_array_equal(batch.nodes, np.asarray(graph.nodes)[nodes])
        real = np.asarray(batch.edges) > 0
        found = zip(
            nodes[batch.senders[real]], nodes[batch.receivers[real]], strict=True
        )
        assert set(found) == {(s, r) for s, r in there if s in nodes and r in nodes}
        state, metrics = step(state, batch, graphs.plan_for(config, batch))
        assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    "sparse",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["dense x", "sparse x"],
)
def test_eight_devices_compute_what_one_does(scattered, sparse):
    config = method(
        encoder={"aggregation": "segment"}.items(), implementation="dense", batch=12
    )
    graph = scattered
    if sparse:
        graph = graph._replace(nodes=sparse_of(graph.nodes))
    tx = optax.sgd(0.1)
    step = jax.jit(graphs.make_step(config, tx))
    # Padding edges does not change which edges are drawn: both have the padded list.
    mesh = parallel.make_mesh({"data": 8})
    placed = graphs.place_graph(graph, mesh)
    plan = graphs.plan_for(config, placed)
    alone = jax.device_put(jax.device_get(placed), jax.devices()[0])
    state, metrics = step(fresh(config, graph, tx), alone, jax.device_get(plan))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = parallel.place(fresh(config, graph, tx), everywhere)
    plan = graphs.place_plan(plan, mesh)
    assert not plan.edges.rows.sharding.is_fully_replicated
    split, found = step(split, placed, plan)
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(split.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_refused_settings(ring, scattered):
    with pytest.raises(ValueError, match="batch 1024 exceeds 12 nodes"):
        train(method(batch=1024), ADAM, fresh(method(), ring), ring, 1)
    for settings, message in (
        ({"kind": "simclr"}, "kind must be one of .* got 'simclr'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"lam": -1.0}, "lam must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            graphs.ObjectiveConfig(**settings)
    rng = np.random.default_rng(0)
    order = np.arange(12)
    chosen = {"cluster_nodes": 4, "clusters": 2, "rng": rng}
    with pytest.raises(ValueError, match="more than edges=3: raise edges"):
        next(graphs.cluster_batches(ring, order, **chosen, edges=3))
    chosen |= {"cluster_nodes": 10}
    with pytest.raises(ValueError, match="= 20 must lie between 2 and the graph's 12"):
        next(graphs.cluster_batches(ring, order, **chosen, edges=90))
    sparse = scattered._replace(nodes=sparse_of(scattered.nodes))
    with pytest.raises(ValueError, match="needs dense features"):
        next(graphs.cluster_batches(sparse, order, **chosen, edges=90))
    with pytest.raises(ValueError, match="12 nodes do not divide over 8 devices"):
        graphs.place_graph(ring, parallel.make_mesh({"data": 8}))
