"""Objectives over two views: what is contrasted, and after which transform."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpost import losses
from jaxpost.graphs._layers import BatchNorm

KINDS = ("clnr", "grace", "nclnr", "gclnr", "dclnr", "zca", "cca_ssg", "bclnr")
HEADS = ("grace", "gclnr")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a pair of views is trained for.

    Fields:
        kind: what happens to embeddings before NT-Xent:
            "clnr": columns standardised; "nclnr": nothing; "grace": an MLP head;
            "gclnr": an MLP head, then columns standardised; "bclnr": BatchNorm;
            "dclnr": one mean and variance for all, as the published code has it;
            "zca": columns decorrelated (what dCLNR is named after).
            "cca_ssg": columns standardised, then CCA-SSG's loss instead of NT-Xent.
        temperature: of NT-Xent.
        batch: nodes drawn each step without replacement, rows and columns of the loss;
            None takes all. Statistics of columns are always those of all nodes.
        intra: whether the same view's nodes are negatives too.
        head_width: hidden width of the head; None is twice the embedding's.
        lam: weight of CCA-SSG's decorrelation.
        eps: added to the standard deviations of columns; 0 as published.
        implementation, chunk_size: see `losses.nt_xent`.
    """

    kind: str = "clnr"
    temperature: float = 0.5
    batch: int | None = None
    intra: bool = True
    head_width: int | None = None
    lam: float = 1e-3
    eps: float = 0.0
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}."
            )
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.batch is not None and self.batch < 2:
            raise ValueError(f"batch must be at least 2, got {self.batch}.")
        if self.lam < 0.0:
            raise ValueError(f"lam must not be negative, got {self.lam}.")


class Head(nnx.Module):
    """GRACE's projection: linear, ELU, linear; uniform in `1 / sqrt(inputs)`."""

    def __init__(self, width: int, hidden: int, key: jax.Array):
        keys = jax.random.split(key, 4)

        def draw(key, shape, inputs):
            bound = inputs**-0.5
            return nnx.Param(
                jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            )

        self.kernel_in = draw(keys[0], (width, hidden), width)
        self.bias_in = draw(keys[1], (hidden,), width)
        self.kernel_out = draw(keys[2], (hidden, width), hidden)
        self.bias_out = draw(keys[3], (width,), hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.dot(x, self.kernel_in[...]) + self.bias_in[...][None, :]
        return (
            jnp.dot(jax.nn.elu(x), self.kernel_out[...]) + self.bias_out[...][None, :]
        )


def init_objective(config: ObjectiveConfig, width: int, *, key: jax.Array) -> Any:
    """The objective's own parameters, an empty dict where it has none.

    Args:
        config: which objective.
        width: of the embeddings.
        key: PRNG key.
    """
    module = _module(config, width, key)
    return {} if module is None else nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _module(config: ObjectiveConfig, width: int, key: jax.Array):
    if config.kind in HEADS:
        return Head(width, config.head_width or 2 * width, key)
    return BatchNorm(width) if config.kind == "bclnr" else None


def project(config: ObjectiveConfig, params: Any, u: jax.Array) -> jax.Array:
    """What the loss compares: embeddings `[N, D]` after the objective's transform."""
    module = None
    if params:
        abstract = nnx.eval_shape(
            lambda: _module(config, u.shape[1], jax.random.key(0))
        )
        module = nnx.merge(nnx.split(abstract)[0], params)

    def standardize(u: jax.Array) -> jax.Array:
        return losses.column_standardize(u, eps=config.eps)

    transforms: dict[str, Callable[[jax.Array], jax.Array]] = {
        "clnr": standardize,
        "cca_ssg": standardize,
        "nclnr": lambda u: u,
        "dclnr": losses.scalar_whiten,
        "zca": losses.zca_whiten,
    }
    if module is not None:
        u = module(u)
        return standardize(u) if config.kind == "gclnr" else u
    return transforms[config.kind](u)


class Objective(NamedTuple):
    """What `objective` returns: the loss, and its terms by name, all scalars."""

    loss: jax.Array
    metrics: dict[str, jax.Array]


def objective(
    config: ObjectiveConfig,
    params: Any,
    u: jax.Array,
    v: jax.Array,
    *,
    key: jax.Array,
) -> Objective:
    """The loss of two views' embeddings.

    Args:
        config: which objective.
        params: from `init_objective`.
        u, v: embeddings of the same nodes in either view, `[N, D]`.
        key: draws the nodes, if `config.batch` is set.

    Raises:
        ValueError: `config.batch` exceeds N.
    """
    nodes = u.shape[0]
    if config.batch is not None and config.batch > nodes:
        raise ValueError(
            f"batch {config.batch} exceeds {nodes} nodes: set batch to at most "
            f"{nodes}, or to None for all."
        )
    z1, z2 = project(config, params, u), project(config, params, v)
    if config.batch is not None:
        rows = jax.random.choice(key, nodes, (config.batch,), replace=False)
        z1, z2 = z1[rows], z2[rows]
    if config.kind == "cca_ssg":
        terms = losses.cca_ssg(z1, z2)
        invariance = jnp.mean(terms.values)
        metrics = {"invariance": invariance, "decorrelation": terms.decorrelation}
        return Objective(invariance + config.lam * terms.decorrelation, metrics)
    values = losses.nt_xent(
        z1,
        z2,
        temperature=config.temperature,
        intra=config.intra,
        implementation=config.implementation,
        chunk_size=config.chunk_size,
    )
    return Objective(jnp.mean(values), {})
