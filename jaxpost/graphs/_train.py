"""The contrastive step, epochs inside one program, and several seeds side by side."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import optax

from jaxpost.graphs._augment import AugmentConfig, augment
from jaxpost.graphs._container import features_of
from jaxpost.graphs._encoders import Encoder, EncoderConfig, build_encoder
from jaxpost.graphs._objectives import ObjectiveConfig, init_objective, objective
from jaxpost.graphs._patterns import GraphPlan, plan_graph

Params = Any


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """A method: an encoder, two views, an objective.

    Fields:
        encoder, objective: see their configs.
        view1, view2: how the two views are drawn; CLNR's are alike, GRACE's differ.
    """

    encoder: EncoderConfig = EncoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    view1: AugmentConfig = AugmentConfig()
    view2: AugmentConfig = AugmentConfig()


class ContrastiveState(NamedTuple):
    """What training carries.

    Fields:
        step: steps taken, int32 scalar.
        params: `{"encoder": ..., "objective": ...}`.
        opt_state: of the Optax transformation.
        key: PRNG key; step `i` draws with `fold_in(key, i)`.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


Step = Callable[
    [ContrastiveState, jraph.GraphsTuple, GraphPlan | None],
    tuple[ContrastiveState, dict[str, jax.Array]],
]


def init_state(
    config: ContrastiveConfig,
    tx: optax.GradientTransformation,
    in_features: int,
    *,
    key: jax.Array,
) -> ContrastiveState:
    """Fresh parameters and optimizer state.

    Args:
        config: the method.
        tx: Optax transformation.
        in_features: columns of the node features.
        key: PRNG key; initial values and all later draws come from it.
    """
    key_encoder, key_objective, key_steps = jax.random.split(key, 3)
    encoder = build_encoder(config.encoder, in_features, key=key_encoder)
    width = config.encoder.widths[-1]
    own = init_objective(config.objective, width, key=key_objective)
    params = {"encoder": encoder.params, "objective": own}
    return ContrastiveState(
        jnp.zeros((), jnp.int32), params, tx.init(params), key_steps
    )


def two_views(
    config: ContrastiveConfig,
    graph: jraph.GraphsTuple,
    plan: GraphPlan | None = None,
    *,
    key: jax.Array,
) -> tuple[jraph.GraphsTuple, jraph.GraphsTuple]:
    """Two independent views of a graph, by `config.view1` and `config.view2`."""
    pairs = None if plan is None else plan.pairs
    keys = jax.random.split(key)
    first, second = (
        augment(
            graph,
            edge_drop=view.edge_drop,
            feature_mask=view.feature_mask,
            drop=view.drop,
            pairs=pairs,
            key=view_key,
        )
        for view, view_key in zip((config.view1, config.view2), keys, strict=True)
    )
    return first, second


def make_step(config: ContrastiveConfig, tx: optax.GradientTransformation) -> Step:
    """One update on the whole graph: two views, one encoder, the objective, `tx`.

    Returns:
        `step(state, graph, plan=None) -> (state, metrics)`, pure, to be compiled by the
        caller; `metrics` has "loss" and the objective's terms, scalars. `plan` is
        `plan_graph(graph)`: without it, every step sorts the edges again.
    """

    def loss_fn(params, graph, plan, key):
        key_views, key_nodes = jax.random.split(key)
        plan = plan_for(config, graph) if plan is None else plan
        views = two_views(config, graph, plan, key=key_views)
        encoder = Encoder(
            params["encoder"], config.encoder, features_of(graph).shape[1]
        )
        u, v = (encoder.apply(params["encoder"], view, plan) for view in views)
        found = objective(config.objective, params["objective"], u, v, key=key_nodes)
        return found.loss, found.metrics

    def step(state, graph, plan=None):
        key = jax.random.fold_in(state.key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, graph, plan, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = ContrastiveState(state.step + 1, params, opt_state, state.key)
        return state, {"loss": loss, **metrics}

    return step


def plan_for(config: ContrastiveConfig, graph: jraph.GraphsTuple) -> GraphPlan:
    """`plan_graph`, with what the config's views need."""
    symmetric = "symmetric" in (config.view1.drop, config.view2.drop)
    return plan_graph(graph, pairs=symmetric)


def train_epochs(
    config: ContrastiveConfig,
    tx: optax.GradientTransformation,
    state: ContrastiveState,
    graph: jraph.GraphsTuple,
    plan: GraphPlan | None = None,
    *,
    epochs: int,
) -> tuple[ContrastiveState, dict[str, jax.Array]]:
    """Epochs (one step on the whole graph each) inside one scan; compile the call.

    Args:
        config: the method.
        tx: Optax transformation, that of `init_state`.
        state: where to begin; `state.step` goes on counting.
        graph: the whole graph.
        plan: `plan_for(config, graph)`; None makes it here, once for all epochs.
        epochs: how many; static.

    Returns:
        The state after them, and each epoch's metrics, `[epochs]` by name.
    """
    plan = plan_for(config, graph) if plan is None else plan
    step = make_step(config, tx)

    def epoch(state, _):
        return step(state, graph, plan)

    return jax.lax.scan(epoch, state, length=epochs)


def train_seeds(
    config: ContrastiveConfig,
    tx: optax.GradientTransformation,
    graph: jraph.GraphsTuple,
    plan: GraphPlan | None = None,
    *,
    epochs: int,
    at_once: int | None = None,
    keys: jax.Array,
) -> tuple[ContrastiveState, dict[str, jax.Array]]:
    """Whole runs from several keys in one program; compile the call.

    Args:
        config, tx, graph, plan, epochs: as for `train_epochs`.
        at_once: seeds computed side by side (`vmap`), each taking its own memory; the
            rest follow. None is one on a CPU, whose cores one seed keeps busy, and all
            of them elsewhere.
        keys: PRNG keys `[S]`.

    Returns:
        States and metrics of `train_epochs` with a leading axis `[S]`; seed `i` is what
        `init_state(key=keys[i])` and `train_epochs` give alone.
    """
    plan = plan_for(config, graph) if plan is None else plan

    def run(key):
        state = init_state(config, tx, features_of(graph).shape[1], key=key)
        return train_epochs(config, tx, state, graph, plan, epochs=epochs)

    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else len(keys)
    if at_once == 1:
        return jax.lax.map(run, keys)
    return jax.lax.map(run, keys, batch_size=at_once)


def embed(
    config: ContrastiveConfig,
    params: Params,
    graph: jraph.GraphsTuple,
    plan: GraphPlan | None = None,
) -> jax.Array:
    """Embeddings for evaluation: the encoder's output on the whole graph, as it is.

    Args:
        config: the method.
        params: `state.params`.
        graph: not augmented.
        plan: `plan_graph(graph)`, if at hand.

    Returns:
        float32 or wider `[N, D]`, without the objective's transform.
    """
    encoder = Encoder(params["encoder"], config.encoder, features_of(graph).shape[1])
    return encoder.apply(params["encoder"], graph, plan)
