"""Encoders against loops over nodes, in every way of summing neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import contrastive as oracle
from small_graphs import sparse_of

from jaxpost import graphs

WAYS = ("csr", "segment", "dense")


def make(graph, *, seed=0, **settings):
    config = graphs.EncoderConfig(**{"widths": (8, 4)} | settings)
    encoder = graphs.build_encoder(
        config, graph.nodes.shape[1], key=jax.random.key(seed)
    )
    # Biases start at zero: give every parameter a value that can go wrong.
    leaves, tree = jax.tree.flatten(encoder.params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(encoder, params=jax.tree.unflatten(tree, leaves))


def run(encoder, graph):
    return np.asarray(jax.jit(encoder.apply)(encoder.params, graph))


def edges_of(graph, weights=None):
    weights = np.ones(len(graph.senders)) if weights is None else weights
    return np.asarray(graph.senders), np.asarray(graph.receivers), np.asarray(weights)


def layers_of(params):
    layers = params["layers"]
    return [
        tuple(
            np.asarray(x, np.float64)
            for x in (layers[i]["linear"]["kernel"], layers[i]["bias"])
        )
        for i in sorted(layers)
    ]


def drawn_weights(graph, seed=5):
    rng = np.random.default_rng(seed)
    return (rng.uniform(size=len(graph.senders)) > 0.4).astype(np.float32)


def test_propagation_of_the_worked_example():
    """Path 0-1-2, whole, and with the edge from 2 to 1 dropped."""
    path = graphs.make_graph(np.eye(3, dtype=np.float32), [[0, 1, 1, 2], [1, 0, 2, 1]])
    config = graphs.EncoderConfig(widths=(3,))
    params = {"layers": {0: {"linear": {"kernel": jnp.eye(3)}, "bias": jnp.zeros(3)}}}
    encoder = graphs.Encoder(params, config, 3)
    half, far, third = 0.5, 6**-0.5, 1 / 3
    whole = [[half, far, 0], [far, third, far], [0, far, half]]
    np.testing.assert_allclose(run(encoder, path), whole, atol=1e-6)
    dropped = (path.senders == 2) & (path.receivers == 1)
    view = path._replace(edges=jnp.where(dropped, 0.0, 1.0))
    np.testing.assert_allclose(
        run(encoder, view),
        [[half, half, 0], [half, half, 0], [0, half, half]],
        atol=1e-6,
    )


@pytest.mark.parametrize("aggregation", WAYS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense x", "sparse x"])
def test_gcn_equals_loops(scattered, aggregation, sparse):
    weights = drawn_weights(scattered)
    graph = scattered._replace(edges=jnp.asarray(weights))
    encoder = make(graph, aggregation=aggregation, edge_chunk=16)
    if sparse:
        graph = graph._replace(nodes=sparse_of(graph.nodes))
    matrix = oracle.propagation(*edges_of(graph, weights), 16)
    expected = oracle.gcn(
        matrix, np.asarray(scattered.nodes, np.float64), layers_of(encoder.params)
    )
    np.testing.assert_allclose(run(encoder, graph), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregation", WAYS)
def test_product_and_its_gradient(scattered, aggregation):
    weights = jnp.asarray(drawn_weights(scattered))
    plan = graphs.plan_graph(scattered)
    matrix = np.zeros((16, 16), np.float32)
    matrix[scattered.receivers, scattered.senders] = weights
    x = jax.random.normal(jax.random.key(0), (16, 3))
    slope = jax.random.normal(jax.random.key(1), (16, 3))
    found, back = jax.vjp(
        lambda x: graphs.sparse_matmul(
            plan.edges, weights, x, implementation=aggregation, edge_chunk=16
        ),
        x,
    )
    np.testing.assert_allclose(found, matrix @ x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back(slope)[0], matrix.T @ slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", WAYS)
def test_second_derivative_of_one_way_edges(aggregation):
    rng = np.random.default_rng(3)
    rows, columns = np.nonzero(rng.uniform(size=(7, 5)) < 0.4)
    mixed = rng.permutation(len(rows))
    pattern = graphs.make_pattern(rows[mixed], columns[mixed], (7, 5))
    values = rng.normal(size=len(rows)).astype(np.float32)
    matrix = np.zeros((7, 5), np.float32)
    matrix[rows[mixed], columns[mixed]] = values

    def product(x):
        return graphs.sparse_matmul(
            pattern, pattern.sort(values), x, implementation=aggregation, edge_chunk=4
        )

    def second(product, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(product(x))))
        return jax.grad(lambda x: jnp.sum(slope(x) ** 2))(x)

    x = jax.random.normal(jax.random.key(0), (5, 3))
    expected = second(lambda x: jnp.dot(matrix, x), x)
    np.testing.assert_allclose(second(product, x), expected, rtol=1e-5, atol=1e-5)


def test_a_pattern_transposed_twice_is_itself(scattered):
    edges = graphs.plan_graph(scattered).edges
    values = jnp.arange(len(edges.rows), dtype=jnp.float32)
    once, flipped = edges.transpose(values)
    twice, again = once.transpose(flipped)
    np.testing.assert_array_equal(again, values)
    jax.tree.map(np.testing.assert_array_equal, twice, edges._replace(order=None))


def test_only_second_derivatives_invert_the_order(scattered):
    """A scatter inverts it; products by csr have none themselves."""
    pattern = graphs.plan_graph(scattered).edges
    values, x = jnp.ones(len(pattern.rows)), jnp.ones((16, 3))

    def slope(pattern, x):
        def total(x):
            y = graphs.sparse_matmul(pattern, values, x, implementation="csr")
            return jnp.sum(y**2)

        return jax.grad(total)(x)

    def curvature(pattern, x):
        return jax.grad(lambda x: jnp.sum(slope(pattern, x) ** 2))(x)

    first, second = (
        jax.jit(f).lower(pattern, x).compile().as_text() for f in (slope, curvature)
    )
    assert "scatter" not in first
    assert "scatter" in second


@pytest.mark.parametrize("aggregation", ["csr", "segment"])
def test_product_under_vmap_and_grad_of_it(scattered, aggregation):
    plan = graphs.plan_graph(scattered)
    weights = jnp.stack([jnp.asarray(drawn_weights(scattered, s)) for s in (1, 2, 3)])
    x = jax.random.normal(jax.random.key(0), (3, 16, 3))

    def total(weights, x):
        y = graphs.sparse_matmul(plan.edges, weights, x, implementation=aggregation)
        return jnp.sum(y**2)

    grads = jax.vmap(jax.grad(total, 1))(weights, x)
    for i in range(3):
        np.testing.assert_allclose(
            grads[i], jax.grad(total, 1)(weights[i], x[i]), rtol=1e-5, atol=1e-5
        )


def test_unsorted_edges_and_traced_plans_change_nothing(scattered):
    encoder = make(scattered)
    expected = run(encoder, scattered)  # the plan is made in the program
    plan = graphs.plan_graph(scattered)
    found = encoder.apply(encoder.params, scattered, plan)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    order = np.random.default_rng(0).permutation(len(scattered.senders))
    weights = jnp.asarray(drawn_weights(scattered))
    weighted = run(encoder, scattered._replace(edges=weights))
    shuffled = scattered._replace(
        senders=scattered.senders[order],
        receivers=scattered.receivers[order],
        edges=weights[order],
    )
    np.testing.assert_allclose(run(encoder, shuffled), weighted, atol=1e-6)
    plan = graphs.plan_graph(shuffled)
    found = encoder.apply(encoder.params, shuffled, plan)
    np.testing.assert_allclose(found, weighted, atol=1e-6)


def test_gat_equals_loops(scattered):
    weights = drawn_weights(scattered)
    graph = scattered._replace(edges=jnp.asarray(weights))
    encoder = make(graph, kind="gat", widths=(6,), heads=2)
    layer = jax.tree.map(
        lambda x: np.asarray(x, np.float64), encoder.params["layers"][0]
    )
    expected = oracle.gat(
        *edges_of(graph, weights),
        np.asarray(graph.nodes, np.float64),
        layer["linear"]["kernel"],
        layer["send"],
        layer["receive"],
        layer["bias"],
    )
    np.testing.assert_allclose(run(encoder, graph), expected, rtol=1e-5, atol=1e-5)


def test_sage_equals_loops(scattered):
    weights = drawn_weights(scattered)
    graph = scattered._replace(edges=jnp.asarray(weights))
    encoder = make(graph, kind="sage", widths=(5,))
    layer = encoder.params["layers"][0]
    expected = oracle.sage(
        *edges_of(graph, weights),
        np.asarray(graph.nodes, np.float64),
        np.asarray(layer["own"]["kernel"]),
        np.asarray(layer["own"]["bias"]),
        np.asarray(layer["neighbour"]["kernel"]),
    )
    np.testing.assert_allclose(run(encoder, graph), expected, rtol=1e-5, atol=1e-5)


def test_mlp_ignores_edges_and_normalises_by_the_nodes_at_hand(scattered):
    encoder = make(scattered, kind="mlp")
    alone = scattered._replace(edges=jnp.zeros(len(scattered.senders)))
    np.testing.assert_array_equal(run(encoder, scattered), run(encoder, alone))
    params = jax.tree.map(np.asarray, encoder.params)
    first, second = (params["layers"][i] for i in (0, 1))
    norm = params["norms"][0]
    h = np.asarray(scattered.nodes) @ first["kernel"] + first["bias"]
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * norm["scale"] + norm["bias"]
    expected = np.maximum(h, 0) @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(run(encoder, scattered), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage", "mlp"])
def test_nodes_in_another_order_have_the_same_embeddings(scattered, kind):
    encoder = make(scattered, kind=kind)
    order = np.random.default_rng(1).permutation(16)
    number = np.argsort(order)
    edges = number[np.stack([scattered.senders, scattered.receivers])]
    moved = graphs.make_graph(np.asarray(scattered.nodes)[order], edges)
    np.testing.assert_allclose(
        run(encoder, moved), run(encoder, scattered)[order], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage"])
def test_all_edges_dropped_is_finite_and_local(scattered, kind):
    encoder = make(scattered, kind=kind)
    alone = scattered._replace(edges=jnp.zeros(len(scattered.senders)))

    def total(params):
        return jnp.sum(encoder.apply(params, alone) ** 2)

    value, grads = jax.jit(jax.value_and_grad(total))(encoder.params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    changed = alone._replace(nodes=alone.nodes.at[3].add(1.0))
    moved = np.abs(run(encoder, changed) - run(encoder, alone)).max(axis=1) > 0
    assert moved.tolist() == [i == 3 for i in range(16)]


def test_bfloat16_is_near_float32_and_returns_it(scattered):
    wide = make(scattered)
    config = dataclasses.replace(wide.config, dtype="bfloat16")
    low = run(dataclasses.replace(wide, config=config), scattered)
    assert low.dtype == np.float32
    expected = run(wide, scattered)
    # Two layers of products with 8 bits of mantissa.
    np.testing.assert_allclose(low, expected, atol=0.03 * np.abs(expected).max())


def test_activations(ring):
    for activation in ("relu", "elu", "prelu"):
        encoder = make(ring, activation=activation, activate_last=True, widths=(6,))
        plain = make(ring, activation=activation, widths=(6,))
        x = run(plain, ring)
        y = run(dataclasses.replace(encoder, params=_with(encoder, plain)), ring)
        slope = {"relu": 0.0, "prelu": 0.3}.get(activation)
        below = np.expm1(np.minimum(x, 0)) if slope is None else slope * x
        np.testing.assert_allclose(y, np.where(x >= 0, x, below), atol=1e-6)


def _with(encoder, plain):
    """The layers of one encoder, and 0.3 as the slope of a PReLU."""
    slopes = jax.tree.map(lambda x: jnp.full_like(x, 0.3), encoder.params)
    return {**slopes, "layers": plain.params["layers"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cnn"}, "kind must be one of .* got 'cnn'"),
        ({"widths": ()}, "widths must be positive"),
        ({"widths": (4, 0)}, "widths must be positive"),
        ({"activation": "gelu"}, "activation must be one of .* got 'gelu'"),
        ({"dtype": "float16"}, "dtype must be one of .* got 'float16'"),
        ({"aggregation": "csc"}, "aggregation must be one of .* got 'csc'"),
        ({"edge_chunk": 0}, "edge_chunk must be at least 1"),
        ({"kind": "gat", "widths": (6,), "heads": 4}, "heads=4 must divide"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        graphs.EncoderConfig(**settings)


def test_features_of_another_width_are_refused(ring):
    encoder = graphs.build_encoder(
        graphs.EncoderConfig(widths=(4,)), 5, key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match="built for 5 features, but the graph has 8"):
        encoder.apply(encoder.params, ring)
