"""A scalar at every token: reward models read the last one, value models all.

The head is one kernel without a bias, `params["score"]["kernel"]` `[D, 1]`, where a
decoder has its output over the vocabulary; the layout of transformers' sequence
classification.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxpost import ops, parallel
from jaxpost.typing import Params

from ._config import DecoderConfig
from ._lora import split_lora
from ._model import Model, init_params, param_axes


def add_score_head(
    model: Model,
    key: jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: parallel.Rules | None = None,
) -> Model:
    """The model with a fresh score head in place of its output over the vocabulary.

    Args:
        model: with or without adapters; its other arrays are shared, not copied.
        key: PRNG key of the kernel, normal with deviation 0.02 as in transformers.
        mesh: where the model lies, if on several devices.
        rules: changes to `parallel.RULES`.

    Returns:
        A model of `head="score"`, the kernel in float32.

    Raises:
        ValueError: the model has a score head already.
    """
    if model.config.head == "score":
        raise ValueError("add_score_head: the model has a score head already.")
    config = model.config.replace(head="score", head_bias=False)
    init = functools.partial(_init_score, config)
    placement = None
    if mesh is not None:
        axes, shapes = param_axes(config)["score"], jax.eval_shape(init, key)
        placement = parallel.shardings(axes, mesh, rules, shapes=shapes)
    # Compiled, so that nothing else of the drawn model is ever made.
    score = jax.jit(init, out_shardings=placement)(key)
    params = {name: part for name, part in model.params.items() if name != "head"}
    return dataclasses.replace(model, params=params | {"score": score}, config=config)


def scores(params: Params, hidden: jax.Array) -> jax.Array:
    """The score at each place: rewards of last tokens, or values of all tokens.

    Args:
        params: holds `score`; the rest is not read.
        hidden: a decoder's states, float `[..., D]`: all of them, `[B, T, D]`, or those
            of the last tokens alone, `ops.last_token(hidden, mask)` `[B, D]`.

    Returns:
        Scores, float32 or wider, `[...]`.

    Raises:
        ValueError: there is no score head in `params`.
    """
    if "score" not in params:
        raise ValueError(
            "scores: the parameters have no score head; add one "
            "(models.add_score_head), or load a reward model."
        )
    hidden, kernel = ops.at_least_float32(hidden, params["score"]["kernel"])
    return jnp.matmul(hidden, kernel, precision="highest")[..., 0]


def split_trained(params: Params) -> tuple[Params, Params]:
    """What a run with adapters trains, and what it leaves alone.

    Args:
        params: nested dict of anything (arrays, shapes, logical axes).

    Returns:
        Adapters and score head; the rest. `ops.join_trees` puts them back.
    """
    trained, frozen = split_lora(params)
    if isinstance(params.get("score"), Mapping):
        trained = trained | {"score": params["score"]}
        frozen = {name: part for name, part in frozen.items() if name != "score"}
    return trained, frozen


def _init_score(config: DecoderConfig, key: jax.Array) -> Params:
    return init_params(config, jnp.dtype(jnp.float32), key)["score"]
