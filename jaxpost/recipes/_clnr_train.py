"""The clnr recipe's work: seeds in one program, then embeddings and their probe."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from jaxpost import evaluation, graphs, losses, training

PROBED_BYTES = 2**31
"""Embeddings of as many seeds as fit in this are probed side by side."""


def train(
    method: graphs.ContrastiveConfig,
    section: Any,
    graph: jraph.GraphsTuple,
    plan: graphs.GraphPlan,
    *,
    keys: jax.Array,
    encoders: int = 1,
    folder: training.RunFolder,
    resume: bool = False,
) -> graphs.ContrastiveState:
    """States of all encoders of all seeds after the last epoch, `[S * M]`.

    Epochs run in blocks of `section.log_every`, each one program over all seeds;
    after each the losses are checked and logged, and a checkpoint saved if it is due.

    Args:
        method: encoder, objective, views.
        section: a `GraphTrainSection`.
        graph: the whole graph.
        plan: `graphs.plan_for(method, graph)`.
        keys: of the encoders, `[S * M]`.
        encoders: M, of a seed.
        folder: where metrics and checkpoints go.
        resume: go on from its newest checkpoint.

    Raises:
        FloatingPointError: a loss was not finite; names step and seed.
    """
    tx = section.optimizer()
    width = graphs.features_of(graph).shape[1]
    init = functools.partial(graphs.init_state, method, tx, width)
    make = jax.jit(lambda keys: jax.lax.map(lambda key: init(key=key), keys))
    checkpoints = training.Checkpoints(folder.checkpoints, keep_last=1, keep_best=0)
    with checkpoints:
        if resume and checkpoints.latest() is not None:
            states = checkpoints.restore(jax.eval_shape(make, keys)).state
        else:
            states = make(keys)
        start = int(np.ravel(states.step)[0])
        folder.truncate(start or -1)
        shown = training.make_progress(
            "auto", title="epochs", start=start, total=section.epochs
        )
        block = _block_of_epochs(method, tx, section.at_once, len(keys))
        try:
            while start < section.epochs:
                count = min(section.log_every, section.epochs - start)
                states, metrics = block(states, graph, plan, epochs=count)
                values = jax.tree.map(np.asarray, metrics)
                line = _log(folder, start, values, encoders)
                start += count
                shown.update(start, line)
                last = start == section.epochs
                if last or (section.save_every and start % section.save_every == 0):
                    checkpoints.save(start, states)
        finally:
            shown.close()
    return states


def _block_of_epochs(method, tx, at_once, seeds) -> Callable[..., Any]:
    if at_once is None:
        at_once = 1 if jax.default_backend() == "cpu" else seeds

    @functools.partial(jax.jit, static_argnames=("epochs",), donate_argnums=(0,))
    def block(states, graph, plan, *, epochs):
        def run(state):
            return graphs.train_epochs(method, tx, state, graph, plan, epochs=epochs)

        if at_once == 1:
            return jax.lax.map(run, states)
        return jax.lax.map(run, states, batch_size=at_once)

    return block


def _log(
    folder: training.RunFolder, start: int, metrics: dict[str, Any], encoders: int
) -> dict:
    """A line per epoch: means over the seeds; returns the last one."""
    values = metrics["loss"]  # [S * M, epochs]
    if not np.isfinite(values).all():
        at = int(np.argmax(~np.isfinite(values).all(axis=0)))
        which = int(np.argmax(~np.isfinite(values[:, at])))
        seed = which // encoders
        raise FloatingPointError(
            f"loss is {values[which, at]} at step {start + at + 1} of seed {seed}: "
            "lower train.learning_rate, or raise objective.temperature."
        )
    line: dict[str, Any] = {}
    for at in range(values.shape[1]):
        line = {"step": start + at + 1}
        line |= {name: float(value[:, at].mean()) for name, value in metrics.items()}
        if values.shape[0] > 1:
            line["loss/std_of_seeds"] = float(values[:, at].std(ddof=1))
        folder.log_metrics(line)
    return line


class Judged(NamedTuple):
    """What is known of the trained encoders; the first axis is the seeds.

    Fields:
        probe: of the linear probe, or None without labels.
        alignment, uniformity: of two fresh views' projections, on validation nodes
            (all nodes without a split), mean over a seed's encoders, `[S]`.
        constant: names of embedding columns that are the same for all nodes, by seed.
        first: embeddings of the first seed, `[N, M * D]`.
    """

    probe: evaluation.ProbeResult | None
    alignment: np.ndarray
    uniformity: np.ndarray
    constant: list[list[int]]
    first: jax.Array


def judge(config, data, plan, params, masks) -> Judged:
    """Embeds, probes and diagnoses all seeds, as many at once as memory allows."""
    embed = jax.jit(functools.partial(embed_seeds, config))
    diagnose = jax.jit(functools.partial(_diagnose, config.method()))
    many = config.encoders
    width = config.encoder.widths[-1] * many
    group = max(1, PROBED_BYTES // (data.node_count * width * 4))
    keys = config.keys()
    probes, first, constant = [], None, []
    alignments, uniformities = [], []
    rows = np.arange(data.node_count)
    if masks is not None:
        rows = np.nonzero(np.atleast_2d(masks[1])[0])[0]
    for start in range(0, config.seeds, group):
        part = slice(start, start + group)
        own = slice(start * many, (start + group) * many)
        some = jax.tree.map(lambda leaf, own=own: leaf[own], params)
        embeddings = embed(some, data.graph, plan)
        flat = np.asarray(jax.vmap(losses.constant_columns)(embeddings))
        constant += [np.nonzero(columns)[0].tolist() for columns in flat]
        first = embeddings[0] if first is None else first
        aligned, uniform = diagnose(some, data.graph, plan, rows, keys[own])
        alignments.append(np.asarray(aligned).reshape(-1, many).mean(axis=1))
        uniformities.append(np.asarray(uniform).reshape(-1, many).mean(axis=1))
        if masks is not None:
            split = [mask if mask.ndim == 1 else mask[part] for mask in masks]
            key = jax.random.fold_in(jax.random.key(config.seed), start)
            probes.append(
                evaluation.linear_probe(
                    embeddings, data.labels, tuple(split), config=config.probe, key=key
                )
            )
    probe = jax.tree.map(lambda *x: np.concatenate(x), *probes) if probes else None
    assert first is not None
    return Judged(
        probe,
        np.concatenate(alignments),
        np.concatenate(uniformities),
        constant,
        first,
    )


def embed_seeds(config, params, graph, plan) -> jax.Array:
    """Embeddings `[S, N, M * D]` of the graph as it is, smoothed if asked for."""

    def one(own):
        u = graphs.embed(config.method(), own, graph, plan)
        if not config.embed.smooth_steps:
            return u
        return graphs.smooth(
            graph,
            u,
            steps=config.embed.smooth_steps,
            restart=config.embed.smooth_restart,
            plan=plan,
        )

    found = jax.lax.map(one, params)  # [S * M, N, D]
    nodes = found.shape[1]
    by_seed = found.reshape(-1, config.encoders, *found.shape[1:])
    return by_seed.swapaxes(1, 2).reshape(by_seed.shape[0], nodes, -1)


def _diagnose(method, params, graph, plan, rows, keys):
    """Alignment and uniformity `[S * M]` on fresh views, as the paper measures them."""
    width = graphs.features_of(graph).shape[1]

    def one(own_and_key):
        own, key = own_and_key
        views = graphs.two_views(method, graph, plan, key=jax.random.fold_in(key, 1))
        encoder = graphs.Encoder(own["encoder"], method.encoder, width)
        z1, z2 = (
            graphs.project(
                method.objective,
                own["objective"],
                encoder.apply(own["encoder"], view, plan),
            )[rows]
            for view in views
        )
        uniform = (losses.uniformity(z1) + losses.uniformity(z2)) / 2.0
        return jnp.mean(losses.alignment(z1, z2)), uniform

    return jax.lax.map(one, (params, keys))
