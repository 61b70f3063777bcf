"""Node representations by contrastive learning with column standardisation (CLNR).

`jaxpost graph train configs/clnr/NAME.yaml`, or `run(CLNRConfig(...))`. All seeds are
trained in one compiled program, probed in another; other objectives (GRACE, CCA-SSG,
...) are settings.
"""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import evaluation, graphs, training
from jaxpost.recipes import _clnr_report as _report
from jaxpost.recipes import _clnr_train as _train
from jaxpost.recipes._config import to_mapping


@dataclasses.dataclass(frozen=True)
class GraphDataSection:
    """How the data set is read and split.

    Attributes:
        normalize: Divide a node's features by their sum.
        split: The data set's own, or a random one for each seed.
        validation: Share of labelled nodes in a random split.
        test: Share of labelled nodes in a random split; the rest trains.
        repair: Drop self-loops and repeated edges and add missing directions, instead
            of refusing the first two.
    """

    normalize: bool = True
    split: Literal["standard", "random"] = "standard"
    validation: float = 0.1
    test: float = 0.8
    repair: bool = False


@dataclasses.dataclass(frozen=True)
class GraphTrainSection:
    """How long to train, with Adam, and what to do on the way.

    Attributes:
        epochs: Steps, each on the whole graph.
        learning_rate: Of Adam.
        weight_decay: Times the parameters, added to the gradient (L2).
        schedule: Constant, or down to 0 along a cosine.
        log_every: Epochs in one program; they are logged, and checked, after it.
        save_every: Epochs between checkpoints, a multiple of `log_every`; 0 saves at
            the end only.
        at_once: Seeds side by side; the others follow. None is one on a CPU, whose
            cores one seed keeps busy, and all of them elsewhere.
    """

    epochs: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    log_every: int = 10
    save_every: int = 0
    at_once: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.save_every < 0 or self.save_every % self.log_every:
            raise ValueError(
                f"save_every ({self.save_every}) must be a multiple of log_every "
                f"({self.log_every})."
            )
        if not self.learning_rate > 0.0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}."
            )

    def optimizer(self) -> optax.GradientTransformation:
        """Adam as torch has it: decay is part of the gradient."""
        rate: Any = self.learning_rate
        if self.schedule == "cosine":
            rate = optax.cosine_decay_schedule(self.learning_rate, self.epochs)
        decay = optax.add_decayed_weights(self.weight_decay)
        return optax.chain(decay, optax.adam(rate))


@dataclasses.dataclass(frozen=True)
class EmbedSection:
    """What is read out of a trained encoder.

    Attributes:
        smooth_steps: Steps of personalised PageRank over embeddings; 0 leaves them.
        smooth_restart: Share of a node's own embedding in each step.
        plot: Draw the first seed's embeddings in the plane, by principal components or
            t-SNE (extra `graphs`); needs matplotlib (extra `report`).
    """

    smooth_steps: int = 0
    smooth_restart: float = 0.1
    plot: Literal["none", "pca", "tsne"] = "none"

    def __post_init__(self) -> None:
        if self.smooth_steps < 0 or not 0.0 <= self.smooth_restart <= 1.0:
            raise ValueError(
                "smooth_steps must be at least 0 and smooth_restart in [0, 1], got "
                f"{self.smooth_steps} and {self.smooth_restart}."
            )


@dataclasses.dataclass(frozen=True)
class CLNRConfig:
    """Settings of one run over all seeds.

    Attributes:
        recipe: Which recipe the config is for.
        name: Of the run folder.
        run_root: Folder of the run folders.
        seed: Of everything that is drawn.
        seeds: Independent repetitions, each with parameters and draws of its own.
        encoders: Trained for each seed, independently; their embeddings stand side by
            side.
        dataset: `builtin`, a `.npz` file, or the name of one, such as `cora`.
        data: How it is read and split.
        encoder: From features and edges to embeddings.
        objective: What two views are trained for.
        view1: How one view is drawn.
        view2: How the other is.
        train: How long.
        embed: What is read out.
        probe: How embeddings are judged.
    """

    recipe: Literal["clnr"] = "clnr"
    name: str = "clnr"
    run_root: str = "runs"
    seed: int = 0
    seeds: int = 1
    encoders: int = 1
    dataset: str = "builtin"
    data: GraphDataSection = GraphDataSection()
    encoder: graphs.EncoderConfig = graphs.EncoderConfig()
    objective: graphs.ObjectiveConfig = graphs.ObjectiveConfig()
    view1: graphs.AugmentConfig = graphs.AugmentConfig()
    view2: graphs.AugmentConfig = graphs.AugmentConfig()
    train: GraphTrainSection = GraphTrainSection()
    embed: EmbedSection = EmbedSection()
    probe: evaluation.ProbeConfig = evaluation.ProbeConfig()

    def __post_init__(self) -> None:
        for name in ("seeds", "encoders"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )

    def method(self) -> graphs.ContrastiveConfig:
        return graphs.ContrastiveConfig(
            self.encoder, self.objective, self.view1, self.view2
        )

    def keys(self) -> jax.Array:
        """A key per encoder, `[S * M]`; those of a seed follow each other."""
        key = jax.random.key(self.seed)
        numbers = jnp.arange(self.seeds * self.encoders)
        return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


class Trained(NamedTuple):
    """What `run` returns; the first axis is the seeds.

    Fields:
        data: the data set, features normalised.
        states: after the last epoch, of all encoders, `[S * M]`.
        embeddings: of the first seed, `[N, M * D]`.
        probe: what a linear layer reads from the embeddings; None without labels.
    """

    data: graphs.NodeData
    states: graphs.ContrastiveState
    embeddings: jax.Array
    probe: evaluation.ProbeResult | None


def run(config: CLNRConfig, *, resume: bool = False) -> Trained:
    """Trains all seeds, probes their embeddings, writes the run folder.

    Beside what every run folder has, `results.json` (accuracies by seed, alignment and
    uniformity), `clnr.md` (the same as a table), `embeddings.npz` (of the first seed,
    see `save_embeddings`), and `embeddings.svg` if a plot is asked for.

    Args:
        config: the settings.
        resume: go on from the last complete checkpoint of the run folder.

    Raises:
        FileNotFoundError, graphs.GraphError: the data set cannot be used.
        ValueError: settings do not fit it, such as a batch above the number of nodes.
        FileExistsError: the run folder holds a run already.
        FloatingPointError: the loss was not finite; names step and seed.
        ImportError: a plot is asked for whose library is not installed.
    """
    if config.embed.plot != "none":
        _report.need_plotting(config.embed.plot)
    data = load(config)
    path = pathlib.Path(config.run_root) / config.name
    with training.create_run(
        path,
        to_mapping(config),
        seeds={"all": config.seed},
        data={config.dataset: _report.fingerprint(data)},
        resume=resume,
    ) as folder:
        method, plan = config.method(), graphs.plan_for(config.method(), data.graph)
        states = _train.train(
            method,
            config.train,
            data.graph,
            plan,
            keys=config.keys(),
            encoders=config.encoders,
            folder=folder,
            resume=resume,
        )
        masks = masks_of(config, data)
        found = _train.judge(config, data, plan, states.params, masks)
        _report.write(path, config, data, found)
    return Trained(data, states, found.first, found.probe)


def load(config: CLNRConfig) -> graphs.NodeData:
    """The data set as the encoder sees it.

    Raises:
        FileNotFoundError, graphs.GraphError: it cannot be used.
        ValueError: `objective.batch` exceeds its nodes.
    """
    data = graphs.load_dataset(config.dataset, repair=config.data.repair)
    batch = config.objective.batch
    if batch is not None and batch > data.node_count:
        raise ValueError(
            f"objective.batch {batch} exceeds {data.node_count} nodes: set it to at "
            "most that, or to null for all nodes."
        )
    if config.data.normalize:
        data = data._replace(graph=graphs.row_normalize(data.graph))
    return data


def masks_of(
    config: CLNRConfig, data: graphs.NodeData
) -> tuple[np.ndarray, ...] | None:
    """Train, validation and test nodes: bool `[N]`, or `[S, N]` if drawn by seed.

    Raises:
        ValueError: the standard split is asked for, and there is none.
    """
    if data.labels is None:
        return None
    if config.data.split == "standard":
        if data.masks is None:
            raise ValueError(
                f"{config.dataset} has no split of its own: set data.split to random."
            )
        return tuple(data.masks.values())
    drawn = [
        graphs.random_masks(
            data.labels,
            validation=config.data.validation,
            test=config.data.test,
            seed=config.seed + seed,
        )
        for seed in range(config.seeds)
    ]
    return tuple(
        np.stack([masks[part] for masks in drawn])
        for part in ("train", "validation", "test")
    )
