"""`jaxpost graph embed`, `probe` and `convert`: what follows and precedes training."""

import dataclasses
import pathlib
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from jaxpost import evaluation, graphs, training
from jaxpost.recipes import _clnr_report as _report
from jaxpost.recipes import _clnr_train as _train
from jaxpost.recipes import clnr
from jaxpost.recipes._config import ConfigError, from_mapping, read_yaml


@dataclasses.dataclass(frozen=True)
class EmbedArgs:
    """Embed a graph's nodes with a trained encoder; rows keep the order of the nodes.

    Attributes:
        run: Run folder of `jaxpost graph train`.
        out: `.npz` file to write: embeddings, nodes in the same order, dataset.
        dataset: Another graph with the same features; the run's own if not given.
        index: Which of the run's seeds, from 0.
        plot: `.svg` file to draw the embeddings in.
        projection: How they come into the plane; t-SNE needs the extra `graphs`.
    """

    run: Positional[str]
    out: str = "embeddings.npz"
    dataset: str | None = None
    index: int = 0
    plot: str | None = None
    projection: Literal["pca", "tsne"] = "tsne"


@dataclasses.dataclass(frozen=True)
class ProbeArgs:
    """Judge embeddings by the classes of their nodes.

    Attributes:
        embeddings: File of `jaxpost graph embed`.
        dataset: Where labels and split are; what was embedded if not given.
        protocol: A linear layer on the standard split; GRACE's one-vs-rest logistic
            regression on random tenths; or k-means against the classes.
        select: Which epoch of the linear layer counts: first with the best validation
            accuracy; the published, optimistic rule; or the last.
        learning_rate: Of the linear layer.
        weight_decay: Of the linear layer.
        epochs: Of the linear layer.
        repeats: First weights (linear), splits (grace) or clusterings (clusters).
        seed: Of what is drawn.
    """

    embeddings: Positional[str]
    dataset: str | None = None
    protocol: Literal["linear", "grace", "clusters"] = "linear"
    select: Literal["validation", "repo", "last"] = "validation"
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    epochs: int = 2000
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}.")


@dataclasses.dataclass(frozen=True)
class ConvertGraphArgs:
    """Convert planetoid's pickles, or an edge list with CSV features, to one `.npz`.

    Attributes:
        source: Folder with `ind.NAME.x` and so on, or a file of edges.
        destination: `.npz` file to write.
        name: NAME, if the folder has several data sets.
        nodes: CSV file of nodes, if the source is a file of edges.
        repair: Drop self-loops and repeated edges of an edge list and add missing
            directions (planetoid's are always repaired).
    """

    source: Positional[str]
    destination: Positional[str]
    name: str | None = None
    nodes: str | None = None
    repair: bool = False


def embed(args: EmbedArgs) -> pathlib.Path:
    """Writes the embeddings of one seed of a finished run.

    Raises:
        ConfigError: the folder holds no run of the clnr recipe.
        ValueError: there is no such seed, or the graph has other features.
        training.CheckpointError: the run saved nothing, or something else.
    """
    folder = pathlib.Path(args.run)
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder}: holds no run (no config.yaml).")
    config = from_mapping(clnr.CLNRConfig, read_yaml(file), where=str(file))
    if not 0 <= args.index < config.seeds:
        raise ValueError(
            f"index must lie in 0..{config.seeds - 1}, the run's seeds, got "
            f"{args.index}."
        )
    if args.plot is not None:
        _report.need_plotting(args.projection)
    states = _restore(folder, config)
    if args.dataset is not None:
        config = dataclasses.replace(config, dataset=args.dataset)
    data = clnr.load(config)
    own = slice(args.index * config.encoders, (args.index + 1) * config.encoders)
    one = jax.tree.map(lambda leaf: leaf[own], states.params)
    plan = graphs.plan_for(config.method(), data.graph)
    rows = _train.embed_seeds(config, one, data.graph, plan)[0]
    path = _report.save_embeddings(args.out, rows, data, dataset=config.dataset)
    _say(f"wrote {path}: {rows.shape[0]} nodes, {rows.shape[1]} columns")
    if args.plot is not None:
        picture = _report.plot(rows, data.labels, kind=args.projection)
        pathlib.Path(args.plot).write_bytes(picture)
        _say(f"wrote {args.plot}")
    return path


def _restore(folder: pathlib.Path, config: clnr.CLNRConfig) -> graphs.ContrastiveState:
    own = graphs.load_dataset(config.dataset, repair=config.data.repair)
    tx, width = config.train.optimizer(), graphs.features_of(own.graph).shape[1]
    like = jax.eval_shape(
        jax.vmap(lambda key: graphs.init_state(config.method(), tx, width, key=key)),
        config.keys(),
    )
    if not (folder / "checkpoints").is_dir():
        raise ConfigError(f"{folder}: holds no checkpoints.")
    with training.Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(like).state


def probe(args: ProbeArgs) -> dict[str, Any]:
    """Prints and returns what embeddings tell of the classes.

    Raises:
        ValueError: the file holds no embeddings, they are not of the data set's nodes,
            or it has no labels or split.
    """
    file = _report.load_embeddings(args.embeddings)
    # No protocol reads edges: repaired, so that any data set that trains is accepted.
    data = graphs.load_dataset(args.dataset or file.dataset, repair=True)
    if data.labels is None:
        raise ValueError(f"{data.name} has no labels to judge by.")
    rows = jnp.asarray(_report.in_order_of(file, data))
    found = _PROTOCOLS[args.protocol](args, rows, data)
    _say(f"{args.protocol} of {args.embeddings}, {args.repeats} repeats:")
    for name, values in found.items():
        mean, std, _ = _report.spread(values)
        _say(f"  {name} {mean:.4f} ± {std:.4f}")
    return found


def _linear(args: ProbeArgs, rows: jax.Array, data: graphs.NodeData) -> dict:
    if data.masks is None:
        raise ValueError(f"{data.name} has no split; use --protocol grace.")
    config = evaluation.ProbeConfig(
        args.learning_rate, args.weight_decay, args.epochs, args.select
    )
    assert data.labels is not None
    result = evaluation.linear_probe(
        jnp.broadcast_to(rows[None], (args.repeats, *rows.shape)),
        data.labels,
        (data.masks["train"], data.masks["validation"], data.masks["test"]),
        config=config,
        key=jax.random.key(args.seed),
    )
    names = ("accuracy", "clean", "optimistic", "last", "validation")
    return {name: np.asarray(getattr(result, name)).tolist() for name in names}


def _grace(args: ProbeArgs, rows: jax.Array, data: graphs.NodeData) -> dict:
    assert data.labels is not None
    result = evaluation.logistic_probe(
        rows, data.labels, repeats=args.repeats, seed=args.seed
    )
    return {name: value.tolist() for name, value in result._asdict().items()}


def _clusters(args: ProbeArgs, rows: jax.Array, data: graphs.NodeData) -> dict:
    assert data.labels is not None
    known = data.labels >= 0
    found = {"nmi": [], "ari": []}
    for repeat in range(args.repeats):
        key = jax.random.fold_in(jax.random.key(args.seed), repeat)
        clusters = np.asarray(
            evaluation.kmeans(rows, count=data.classes, key=key).clusters
        )
        pair = (data.labels[known], clusters[known])
        found["nmi"].append(evaluation.normalized_mutual_information(*pair))
        found["ari"].append(evaluation.adjusted_rand_index(*pair))
    return found


_PROTOCOLS = {"linear": _linear, "grace": _grace, "clusters": _clusters}


def convert(args: ConvertGraphArgs) -> pathlib.Path:
    """Writes one `.npz` and says what is in it.

    Raises:
        FileNotFoundError, graphs.GraphError: see `graphs.load_planetoid` and
            `graphs.load_edge_list`.
        ConfigError: a file of edges without `--nodes`.
    """
    if pathlib.Path(args.destination).suffix != ".npz":
        raise ValueError(f"{args.destination}: the name must end in .npz.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", graphs.GraphWarning)
        if pathlib.Path(args.source).is_dir():
            data = graphs.load_planetoid(args.source, args.name)
        elif args.nodes is None:
            raise ConfigError(
                f"{args.source}: a file of edges needs a file of nodes, --nodes CSV."
            )
        else:
            data = graphs.load_edge_list(args.source, args.nodes, repair=args.repair)
    for warning in caught:
        _say(f"warning: {warning.message}")
    path = graphs.save_npz(args.destination, data)
    parts = {part: int(mask.sum()) for part, mask in (data.masks or {}).items()}
    split = ", ".join(f"{n} {part}" for part, n in parts.items()) or "no split"
    edges = graphs.edges_of(data.graph)[0].size
    width = graphs.features_of(data.graph).shape[1]
    _say(
        f"wrote {path}: {data.node_count} nodes, {edges} edges (both directions), "
        f"{width} features, {data.classes} classes; {split}"
    )
    return path


def _say(text: str) -> None:
    import rich.console

    rich.console.Console(highlight=False, soft_wrap=True, markup=False).print(text)
