"""A tiny configuration of each family, with sizes that are no powers of two."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_positions": 64,
}


def config(family: str = "llama", **changes) -> models.DecoderConfig:
    return models.DecoderConfig(**(SIZES | {"family": family} | changes))


LLAMA3 = models.RopeScaling(
    kind="llama3",
    factor=4.0,
    original_max_positions=16,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
LONGROPE = models.RopeScaling(
    kind="longrope",
    original_max_positions=16,
    short_factor=(1.0, 1.1, 1.3),
    long_factor=(1.2, 2.5, 4.0),
)
YARN = models.RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)

CONFIGS = {
    "llama": config(),
    "llama3": config(
        rope_theta=500.0,
        rope_scaling=LLAMA3,
        tie_embeddings=True,
        attention_bias=True,
        attention_out_bias=True,
    ),
    "llama-linear": config(rope_scaling=models.RopeScaling(kind="linear", factor=2.0)),
    "mistral": config("mistral", sliding_window=4),
    "qwen2": config(
        "qwen2",
        attention_bias=True,
        tie_embeddings=True,
        sliding_window=5,
        layer_windows=(False, True, True),
    ),
    "qwen3": config("qwen3", qk_norm=True, norm_eps=1e-6, rope_scaling=YARN),
    "phi3": config("phi3", rope_scaling=LONGROPE, num_kv_heads=6),
    "phi4": config("phi3", head_dim=8, rotary_fraction=0.75, head_bias=True),
    "gemma2": config(
        "gemma2",
        norm_offset=1.0,
        activation="gelu_tanh",
        sliding_window=3,
        layer_windows=(True, False, True),
        attention_softcap=5.0,
        final_softcap=3.0,
        query_scale=9**-0.5,
        embed_scale=20**0.5,
        post_norms=True,
        tie_embeddings=True,
    ),
    "layer-norm": config(norm_kind="layer"),
}


def build(config: models.DecoderConfig, dtype=jnp.float32) -> models.Model:
    """Parameters far from their initial values, so that none can be forgotten.

    Drawn by NumPy, which compiles nothing.
    """
    model = models.build(config, abstract=True)
    draw = np.random.default_rng(3)

    def values(path, leaf):
        spread, centre = leaf.shape[-1] ** -0.5, 0.0
        if path[-1].key == "scale":
            centre = 1.0 - config.norm_offset
        value = centre + spread * draw.standard_normal(leaf.shape)
        return jnp.asarray(value.astype(np.float32), dtype)

    return model.replace(params=jax.tree_util.tree_map_with_path(values, model.params))
