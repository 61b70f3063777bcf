"""The score head: one number per token, with and without adapters and a mesh."""

import chex
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops, parallel

PAD = 4
LENGTH = 9


def scored(name="llama", dtype=jnp.float32):
    base = families.build(families.CONFIGS[name], dtype)
    return models.add_score_head(base, jax.random.key(1))


def tokens_of(config):
    draw = np.random.default_rng(2).integers(0, config.vocab_size, (2, LENGTH))
    return draw.astype(np.int32)


def last_scores(model, tokens, side, params=None):
    """Scores of texts of LENGTH and LENGTH - PAD tokens in rows of LENGTH + 3."""
    width = LENGTH + 3
    rows = {
        name: np.zeros((2, width), np.int32) for name in ("ids", "positions", "mask")
    }
    for row, length in enumerate((LENGTH, LENGTH - PAD)):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        rows["ids"][row, at] = tokens[row, :length]
        rows["positions"][row, at] = np.arange(length)
        rows["mask"][row, at] = 1
    params = model.params if params is None else params
    hidden = model.apply(
        params, *(jnp.asarray(rows[name]) for name in ("ids", "positions", "mask"))
    ).hidden
    return models.scores(params, ops.last_token(hidden, jnp.asarray(rows["mask"] == 1)))


@pytest.mark.parametrize("name", ["llama", "llama3", "phi4", "gemma2"])
def test_the_head_takes_the_place_of_the_output(name):
    base = families.build(families.CONFIGS[name])
    model = models.add_score_head(base, jax.random.key(1))
    width = base.config.hidden_size
    assert set(model.params) == set(base.params) - {"head"} | {"score"}
    assert model.params["score"]["kernel"].shape == (width, 1)
    assert model.config.head == "score"
    assert not model.config.head_bias
    for part in ("embed", "layers", "final_norm"):
        assert model.params[part] is base.params[part]
    abstract = models.build(model.config, abstract=True)
    chex.assert_trees_all_equal_shapes(abstract.params, model.params)
    axes = models.param_axes(model.config)
    assert axes["score"]["kernel"] == ("embed", None)
    tree = jax.tree.structure(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert tree == jax.tree.structure(model.params)
    spread = np.std(model.params["score"]["kernel"])
    assert 0.01 < spread < 0.03


def test_scores_equal_numpy():
    model = scored()
    tokens = jnp.asarray(tokens_of(model.config))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    hidden = model.apply(model.params, tokens, positions).hidden
    kernel = np.asarray(model.params["score"]["kernel"], np.float64)
    expected = np.zeros(tokens.shape)
    for row in range(2):
        for t in range(LENGTH):
            expected[row, t] = sum(
                float(hidden[row, t, d]) * kernel[d, 0] for d in range(len(kernel))
            )
    found = models.scores(model.params, hidden)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Rewards are the values of the last tokens.
    right = last_scores(model, tokens, "right")
    np.testing.assert_allclose(
        right, [found[0, -1], found[1, LENGTH - PAD - 1]], atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_padding_side_does_not_matter(name):
    model = scored(name)
    tokens = tokens_of(model.config)
    np.testing.assert_allclose(
        last_scores(model, tokens, "left"),
        last_scores(model, tokens, "right"),
        atol=1e-5,
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.slow
def test_a_bad_row_of_the_embedding_under_the_mask_changes_nothing(side):
    model = scored()
    tokens = np.maximum(tokens_of(model.config), 1)  # id 0 is padding alone
    table = model.params["embed"]["embedding"].at[0].set(jnp.nan)
    bad = model.params | {"embed": {"embedding": table}}

    def loss(params):
        found = last_scores(model, tokens, side, params)
        return jnp.sum(jnp.square(found))

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(loss)(bad)),
        jax.tree.leaves(jax.value_and_grad(loss)(model.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def test_gradients():
    model = scored()
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 20))
    chex.assert_numerical_grads(
        lambda kernel, hidden: jnp.sum(
            jnp.sin(models.scores({"score": {"kernel": kernel}}, hidden))
        ),
        (model.params["score"]["kernel"], hidden),
        1,
        atol=1e-2,
    )


def test_narrow_states_are_scored_in_float32():
    model = scored(dtype=jnp.bfloat16)
    assert model.params["score"]["kernel"].dtype == jnp.float32
    hidden = jax.random.normal(jax.random.key(0), (2, 20), jnp.bfloat16)
    found = models.scores(model.params, hidden)
    assert found.dtype == jnp.float32
    expected = (
        np.float64(hidden)
        @ np.asarray(model.params["score"]["kernel"], np.float64)[:, 0]
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("adapters_first", [True, False])
def test_adapters_are_trained_beside_the_whole_head(adapters_first):
    base = families.build(families.CONFIGS["llama"])
    lora = models.LoraConfig(rank=2)
    if adapters_first:
        model = models.add_lora(base, lora, jax.random.key(2))
        model = models.add_score_head(model, jax.random.key(1))
    else:
        model = models.add_score_head(base, jax.random.key(1))
        model = models.add_lora(model, lora, jax.random.key(2))
    trained, frozen = models.split_trained(model.params)
    adapters, _ = models.split_lora(model.params)
    assert trained == adapters | {"score": model.params["score"]}
    assert set(frozen) == {"embed", "layers", "final_norm"}
    joined = ops.join_trees(frozen, trained)
    assert jax.tree.structure(joined) == jax.tree.structure(model.params)
    axes, _ = models.split_trained(models.param_axes(model.config))
    assert axes["score"] == {"kernel": ("embed", None)}
    merged = models.merge_lora(model)
    assert merged.config == scored().config
    tokens = tokens_of(model.config)
    np.testing.assert_allclose(
        last_scores(model, tokens, "right"),
        last_scores(merged, tokens, "right"),
        atol=1e-5,
    )
    plain = models.without_lora(model)
    kernel = model.params["score"]["kernel"]
    assert plain.params["score"]["kernel"] is kernel
    # Of a decoder over its vocabulary the adapters alone are trained.
    language = models.add_lora(base, lora, jax.random.key(2))
    assert models.split_trained(language.params) == models.split_lora(language.params)


@pytest.mark.slow
def test_the_head_is_made_on_the_mesh_with_the_same_values():
    config = families.config(hidden_size=32, intermediate_size=64, num_heads=8)
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    alone = models.add_score_head(
        models.build(config, jax.random.key(0)), jax.random.key(1)
    )
    spread = models.add_score_head(
        models.build(config, jax.random.key(0), mesh=mesh), jax.random.key(1), mesh=mesh
    )
    whole = models.build(config.replace(head="score"), jax.random.key(0), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    for model in (spread, whole):
        kernel = model.params["score"]["kernel"]
        assert kernel.sharding.shard_shape((32, 1)) == (8, 1)


def test_misuse_is_refused():
    model = scored()
    with pytest.raises(ValueError, match="has a score head already"):
        models.add_score_head(model, jax.random.key(0))
    with pytest.raises(ValueError, match="no output over the vocabulary"):
        model.unembed(model.params)
    base = families.build(families.CONFIGS["llama"])
    with pytest.raises(ValueError, match="no score head"):
        models.scores(base.params, jnp.zeros((2, 20)))
    with pytest.raises(ValueError, match=r"head must be one of vocabulary, score"):
        families.config(head="value")
    with pytest.raises(ValueError, match="head_bias needs an untied head"):
        families.config(head="score", head_bias=True)
