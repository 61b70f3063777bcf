"""Adapters: nothing at first, the right gradients, merged, decoded, described."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops, parallel

LORA = models.LoraConfig(rank=3, alpha=7.0)


def tokens_of(config, batch=2, length=9):
    tokens = jax.random.randint(
        jax.random.key(8), (batch, length), 0, config.vocab_size, jnp.int32
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return tokens, positions


def hidden(model, params=None):
    tokens, positions = tokens_of(model.config)
    return model.apply(model.params if params is None else params, tokens, positions)


def adapted(name="llama", lora=LORA, dtype=jnp.float32):
    """A model with adapters far from zero, and its base."""
    base = families.build(families.CONFIGS[name], dtype)
    model = models.add_lora(base, lora, jax.random.key(1))
    adapters, frozen = models.split_lora(model.params)
    draw = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * draw.standard_normal(x.shape), x.dtype), adapters
    )
    return model.replace(params=ops.join_trees(frozen, adapters)), base


@pytest.mark.parametrize("targets", [("all-linear",), ("q", "v"), ("down",)], ids=str)
def test_fresh_adapters_change_nothing(targets):
    base = families.build(families.CONFIGS["llama"])
    lora = models.LoraConfig(rank=3, targets=targets)
    model = models.add_lora(base, lora, jax.random.key(1))
    np.testing.assert_array_equal(hidden(model).hidden, hidden(base).hidden)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_fresh_adapters_change_nothing_but_rounding(name):
    """XLA rounds the norm of one product and of a sum of two differently."""
    base = families.build(families.CONFIGS[name])
    model = models.add_lora(base, LORA, jax.random.key(1))
    expected = np.asarray(hidden(base).hidden)
    difference = np.abs(hidden(model).hidden - expected).max()
    assert difference <= 2e-6 * np.abs(expected).max()


@pytest.mark.slow
def test_fresh_values_and_base_do_not_depend_on_each_other():
    config = families.CONFIGS["llama"]
    base = models.build(config, jax.random.key(0))
    whole = models.build(config.replace(lora=LORA), jax.random.key(0))
    adapters, same = models.split_lora(whole.params)
    jax.tree.map(np.testing.assert_array_equal, same, base.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        if path[-1].key == "lora_b":
            assert not np.any(leaf)
            continue
        inputs = np.prod(leaf.shape[1:-1])
        assert 0.8 * inputs**-0.5 < np.abs(leaf).max() <= inputs**-0.5
        assert abs(leaf.mean()) < 0.3 * inputs**-0.5


def test_shapes_axes_and_sharing():
    model, base = adapted("llama", models.LoraConfig(rank=2, targets=("o", "gate")))
    axes, base_axes = models.split_lora(models.param_axes(model.config))
    adapters, frozen = models.split_lora(model.params)
    assert axes == {
        "layers": {
            "attention": {
                "o": {
                    "lora_a": ("layers", "heads", "head_dim", "rank"),
                    "lora_b": ("layers", "rank", "embed"),
                }
            },
            "mlp": {
                "gate": {
                    "lora_a": ("layers", "embed", "rank"),
                    "lora_b": ("layers", "rank", "mlp"),
                }
            },
        }
    }
    shapes = jax.tree.map(jnp.shape, adapters, is_leaf=lambda x: hasattr(x, "shape"))
    assert shapes["layers"]["attention"]["o"] == {
        "lora_a": (3, 6, 6, 2),
        "lora_b": (3, 2, 20),
    }
    assert base_axes == models.param_axes(base.config)
    plain = models.without_lora(model)
    assert plain.config == base.config
    for tree in (frozen, plain.params):
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(base.params), strict=True)
        assert all(one is other for one, other in leaves)
    rejoined = ops.join_trees(frozen, adapters)
    assert jax.tree.structure(rejoined) == jax.tree.structure(model.params)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "phi4", "gemma2"])
def test_merged_equals_adapted(name):
    model, base = adapted(name)
    merged = models.merge_lora(model)
    assert merged.config == base.config
    expected = np.asarray(hidden(model).hidden)
    difference = np.abs(hidden(merged).hidden - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()
    assert np.abs(hidden(base).hidden - expected).max() > 0.1  # they do something


def test_merging_a_narrow_base_keeps_what_was_added():
    model, _ = adapted("llama", dtype=jnp.bfloat16)
    merged = models.merge_lora(model)
    mlp, plain = model.params["layers"]["mlp"]["up"], merged.params["layers"]["mlp"]
    a, b = np.float64(mlp["lora_a"]), np.float64(mlp["lora_b"])
    expected = np.float64(mlp["kernel"]) + LORA.scale * np.einsum("lir,lro->lio", a, b)
    assert plain["up"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(plain["up"]["kernel"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"]
)
@pytest.mark.slow
def test_gradients_are_those_of_the_merged_kernels_by_the_chain_rule(name):
    """`dA = s dW B'` and `dB = s A' dW`, with `dW` from a model without adapters."""
    model, _ = adapted(name)
    merged = models.merge_lora(model)
    weights = jax.random.normal(jax.random.key(3), hidden(merged).hidden.shape)
    adapters, frozen = models.split_lora(model.params)

    def loss(adapters):
        found = hidden(model, ops.join_trees(frozen, adapters)).hidden
        return jnp.sum(found * weights)

    found = jax.grad(loss)(adapters)
    kernels = jax.grad(lambda p: jnp.sum(hidden(merged, p).hidden * weights))(
        merged.params
    )
    for block, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for target in names:
            pair = adapters["layers"][block][target]
            a, b = np.float64(pair["lora_a"]), np.float64(pair["lora_b"])
            layers, rank = a.shape[0], a.shape[-1]
            a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
            kernel = np.float64(kernels["layers"][block][target]["kernel"])
            kernel = kernel.reshape(layers, a.shape[1], b.shape[2])
            wanted = {
                "lora_a": LORA.scale * np.einsum("lio,lro->lir", kernel, b),
                "lora_b": LORA.scale * np.einsum("lir,lio->lro", a, kernel),
            }
            for key, value in wanted.items():
                grad = np.asarray(found["layers"][block][target][key])
                np.testing.assert_allclose(
                    grad.reshape(value.shape),
                    value,
                    rtol=0,
                    atol=1e-4 * np.abs(value).max(),
                    err_msg=f"{target} {key}",
                )


def test_decoding_with_a_cache_equals_the_full_pass():
    model, _ = adapted("qwen3")
    tokens, positions = tokens_of(model.config)
    full = model.apply(model.params, tokens, positions).hidden
    cache = model.init_cache(2, 12, jnp.float32)
    output = model.apply(model.params, tokens[:, :4], positions[:, :4], None, cache)
    found = [output.hidden]
    for t in range(4, 9):
        at = slice(t, t + 1)
        output = model.apply(
            model.params, tokens[:, at], positions[:, at], None, output.cache
        )
        found.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(found, 1), full, atol=1e-5, rtol=1e-5)


def test_adapters_compute_in_the_dtype_of_the_activations():
    model, _ = adapted("llama", dtype=jnp.bfloat16)
    assert hidden(model).hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("dots", marks=pytest.mark.slow),
        "full",
    ],
)
@pytest.mark.slow
def test_remat_changes_no_gradient(remat):
    model, _ = adapted("llama")
    other = models.Model(model.params, model.config.replace(remat=remat))

    def grads(model):
        return jax.grad(lambda p: jnp.sum(jnp.square(hidden(model, p).hidden)))(
            model.params
        )

    for one, two in zip(
        jax.tree.leaves(grads(model)), jax.tree.leaves(grads(other)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * np.abs(two).max())


@pytest.mark.slow
def test_the_wide_outputs_of_adapters_are_not_stored():
    """The backward pass holds the narrow `x A` of each adapter, not `x A B` too."""
    config = families.config(
        hidden_size=128, intermediate_size=512, num_layers=6, attention_bias=False
    )
    lora = models.LoraConfig(rank=2, targets=("gate", "up"))
    shape = (4, 128)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

    def temporary(config):
        model = models.build(config, abstract=True)
        adapters, frozen = models.split_lora(model.params)

        def loss(adapters, frozen, tokens, positions):
            params = ops.join_trees(frozen, adapters)
            return jnp.sum(model.apply(params, tokens, positions).hidden)

        grad = jax.jit(jax.grad(loss, argnums=0 if adapters else 1))
        compiled = grad.lower(adapters, frozen, tokens, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    wide = 4 * 128 * 512 * 4 * 6  # one product of every layer, float32
    assert temporary(config.replace(lora=lora)) < temporary(config) + wide / 2


def test_targets_are_spelled_either_way():
    def targets(*names):
        return models.LoraConfig(rank=1, targets=names).targets

    assert targets("all-linear") == models.LORA_TARGETS
    assert targets("v_proj", "q") == targets("q_proj", "v") == ("q", "v")
    assert targets("qkv_proj", "gate_up_proj") == ("q", "k", "v", "gate", "up")
    assert models.LoraConfig(rank=1, targets="down_proj").targets == ("down",)
    assert models.LoraConfig(rank=4, alpha=8).scale == 2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, "rank must be a positive integer, got 2.0"),
        ({"rank": 2, "alpha": 0}, "alpha must be positive"),
        ({"rank": 2, "targets": ("gat",)}, "Did you mean 'gate'"),
        ({"rank": 2, "targets": ("lm_head",)}, "names 'lm_head'.*Known are q, k, v"),
        ({"rank": 2, "targets": ()}, "targets is empty"),
    ],
)
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.LoraConfig(**arguments)


def test_misuse_is_refused():
    model, base = adapted()
    with pytest.raises(ValueError, match="has adapters already"):
        models.add_lora(model, LORA, jax.random.key(0))
    with pytest.raises(ValueError, match="has no adapters"):
        models.merge_lora(base)
    with pytest.raises(ValueError, match="'embed/embedding' is in both"):
        ops.join_trees(base.params, base.params)
    with pytest.raises(TypeError, match="nested dictionaries"):
        ops.join_trees(base.params, [1])
    assert ops.join_trees(base.params, None) is base.params


@pytest.mark.slow
def test_adapters_are_made_on_the_mesh_with_the_same_values():
    config = families.config(hidden_size=32, intermediate_size=64, num_heads=8)
    lora = models.LoraConfig(rank=2)
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    alone = models.add_lora(
        models.build(config, jax.random.key(0)), lora, jax.random.key(1)
    )
    spread = models.add_lora(
        models.build(config, jax.random.key(0), mesh=mesh),
        lora,
        jax.random.key(1),
        mesh=mesh,
    )
    jax.tree.map(np.testing.assert_array_equal, alone.params, spread.params)
    pair = spread.params["layers"]["mlp"]["gate"]
    assert pair["lora_a"].sharding.shard_shape((3, 32, 2)) == (3, 8, 2)
    assert pair["lora_b"].sharding.shard_shape((3, 2, 64)) == (3, 2, 32)
