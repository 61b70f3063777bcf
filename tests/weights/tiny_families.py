"""One tiny decoder per family, sizes chosen to divide each other badly."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import models

_BASE = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_positions": 64,
}
_LLAMA3 = models.RopeScaling(
    kind="llama3",
    factor=8.0,
    original_max_positions=16,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)
_LONG = models.RopeScaling(
    kind="longrope",
    original_max_positions=16,
    short_factor=(1.0, 1.1),
    long_factor=(1.5, 3.0),
)
_GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": 1.0,
    "post_norms": True,
    "embed_scale": 20**0.5,
    "query_scale": 7**-0.5,
    "attention_softcap": 50.0,
    "final_softcap": 30.0,
    "tie_embeddings": True,
    "sliding_window": 5,
    "layer_windows": (True, False, True),
}


def _config(family: str, **changes) -> models.DecoderConfig:
    return models.DecoderConfig(**{**_BASE, "family": family, **changes})


CONFIGS = {
    "llama": _config("llama"),
    "llama_tied_biased": _config(
        "llama", tie_embeddings=True, attention_bias=True, attention_out_bias=True
    ),
    "llama_llama3_rope": _config("llama", rope_theta=5e5, rope_scaling=_LLAMA3),
    "llama_linear_rope": _config(
        "llama", rope_scaling=models.RopeScaling(kind="linear", factor=4.0)
    ),
    "mistral": _config("mistral", sliding_window=5),
    "qwen2": _config("qwen2", attention_bias=True, tie_embeddings=True),
    "qwen2_yarn": _config(
        "qwen2",
        attention_bias=True,
        rope_scaling=models.RopeScaling(
            kind="yarn", factor=4.0, original_max_positions=16
        ),
    ),
    "qwen3": _config("qwen3", qk_norm=True, head_dim=10),
    "qwen3_windows": _config(
        "qwen3", qk_norm=True, sliding_window=5, layer_windows=(False, True, True)
    ),
    "phi3": _config("phi3", head_dim=4, hidden_size=16, sliding_window=5),
    "phi3_longrope": _config("phi3", head_dim=4, hidden_size=16, rope_scaling=_LONG),
    "gemma2": _config("gemma2", **_GEMMA),
}


def build(config: models.DecoderConfig, dtype=jnp.float32) -> models.Model:
    """A model whose every parameter is random, norms and biases too."""
    model = models.build(config, abstract=True)
    leaves, tree = jax.tree.flatten(model.params)
    rng = np.random.default_rng(0)
    values = [jnp.asarray(0.3 * rng.standard_normal(x.shape), dtype) for x in leaves]
    return model.replace(params=jax.tree.unflatten(tree, values))


def assert_same_params(first, second) -> None:
    """Bit for bit, dtypes too."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True
    ):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
