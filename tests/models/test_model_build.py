"""Configurations, initialisation, abstract and sharded models."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops, parallel

LLAMA_8B = models.DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_positions=8192,
    rope_theta=500000.0,
)


def test_eight_billion_parameters_cost_no_memory():
    model = models.build(LLAMA_8B, abstract=True, dtype=jnp.bfloat16)
    assert model.param_count() == 8_030_261_248  # Meta's published count
    leaves = jax.tree.leaves(model.params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    output = jax.eval_shape(model.apply, model.params, tokens, tokens, tokens)
    assert output.hidden.shape == (1, 8192, 4096)
    assert output.hidden.dtype == jnp.bfloat16
    assert dict(output.aux) == {}


@pytest.mark.parametrize("name", families.CONFIGS)
def test_param_axes_match_the_parameters(name):
    config = families.CONFIGS[name]
    model = models.build(config, abstract=True)
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }
    shapes = jax.tree.map(
        lambda axes: tuple(sizes[axis] for axis in axes),
        models.param_axes(config),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert shapes == jax.tree.map(lambda x: x.shape, model.params)


def test_initial_values():
    model = models.build(families.config(), jax.random.key(0))
    params = model.params
    assert np.all(params["final_norm"]["scale"] == 1.0)
    kernel = np.asarray(params["layers"]["mlp"]["gate"]["kernel"])
    assert kernel.std() == pytest.approx(20**-0.5, rel=0.1)
    assert not np.allclose(kernel[0], kernel[1]), "layers must differ"
    key, value = (params["layers"]["attention"][name]["kernel"] for name in "kv")
    assert not np.allclose(key, value)
    other = models.build(model.config, jax.random.key(1)).params
    assert not np.allclose(params["head"]["kernel"], other["head"]["kernel"])


def test_model_is_a_pytree_of_its_parameters():
    model = families.build(families.CONFIGS["llama"])
    doubled = jax.tree.map(lambda x: 2 * x, model)
    assert doubled.config is model.config
    np.testing.assert_array_equal(
        doubled.params["final_norm"]["scale"], 2 * model.params["final_norm"]["scale"]
    )
    assert model.replace(params=doubled.params).params is doubled.params
    assert model.apply is doubled.apply


def test_head_carries_bias_and_cap():
    phi = families.build(families.CONFIGS["phi4"])
    head = phi.unembed(phi.params)
    assert head.weight.shape == (20, 37)
    assert head.bias is not None
    assert head.bias.shape == (37,)
    gemma = families.build(families.CONFIGS["gemma2"])
    head = gemma.unembed(gemma.params)
    assert head.softcap == 3.0
    assert head.bias is None
    np.testing.assert_array_equal(head.weight, gemma.params["embed"]["embedding"].T)
    # Gradients of both uses of a tied embedding add up.
    hidden = jnp.ones((1, 2, 20))

    def total(params):
        return jnp.sum(ops.logits(hidden, gemma.unembed(params)))

    assert np.any(jax.grad(total)(gemma.params)["embed"]["embedding"] != 0)


MESHES = [
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.slow
def test_sharded_equals_unsharded(shape):
    config = families.CONFIGS["llama"]
    mesh = parallel.make_mesh(shape)
    plain = models.build(config, jax.random.key(0))
    sharded = models.build(config, jax.random.key(0), mesh=mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        plain.params,
        sharded.params,
    )
    gate = sharded.params["layers"]["mlp"]["gate"]["kernel"]
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert gate.addressable_shards[0].data.size * parts == gate.size

    tokens = np.arange(72, dtype=np.int32).reshape(8, 9) % config.vocab_size
    positions = np.tile(np.arange(9, dtype=np.int32), (8, 1))
    rows = parallel.batch_sharding(mesh)
    batch = parallel.place((tokens, positions, np.ones_like(positions)), rows)

    def loss(params, batch):
        hidden = plain.apply(params, *batch).hidden
        return jnp.mean(jnp.square(hidden)), hidden

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    expected, hidden = gradient(plain.params, (tokens, positions, np.ones_like(tokens)))
    found, sharded_hidden = gradient(sharded.params, batch)
    np.testing.assert_allclose(sharded_hidden, hidden, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found
    )


def test_abstract_parameters_carry_shardings():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    model = models.build(LLAMA_8B, abstract=True, mesh=mesh)
    query = model.params["layers"]["attention"]["q"]["kernel"]
    assert query.sharding.shard_shape(query.shape) == (32, 1024, 16, 128)
    embedding = model.params["embed"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape) == (64128, 1024)


def test_initialisation_never_holds_a_whole_matrix():
    """Compiled for eight devices, one needs less than the largest whole matrix."""
    config = families.config(vocab_size=8192, hidden_size=256, tie_embeddings=True)
    mesh = parallel.make_mesh({"fsdp": 8})
    abstract = models.build(config, abstract=True, mesh=mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)

    def init(key):
        return models.build(config, key).params

    lowered = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0))
    memory = lowered.compile().memory_analysis()
    whole = 4 * 8192 * 256
    assert memory.output_size_in_bytes < whole / 4
    assert memory.temp_size_in_bytes < whole / 2


def test_experts_are_admitted_but_not_built():
    experts = models.MoEConfig(num_experts=8, experts_per_token=2)
    config = families.config("mixtral", experts=experts)
    with pytest.raises(NotImplementedError, match=r"DecoderConfig\.experts"):
        models.build(config, jax.random.key(0))
    with pytest.raises(ValueError, match="experts_per_token=9"):
        models.MoEConfig(num_experts=8, experts_per_token=9)


def test_build_needs_a_key():
    with pytest.raises(ValueError, match="key unless abstract"):
        models.build(families.config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, r"num_heads \(6\) must be a multiple"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"hidden_size": 20.0}, "hidden_size must be a positive integer"),
        ({"head_dim": 5}, "positive even number"),
        ({"rotary_fraction": 0.5}, "positive even number"),
        ({"family": "gpt2"}, "family must be one of llama"),
        ({"remat": "some"}, "remat must be one of none"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"sliding_window": 0}, "at least 1 token"),
        ({"layer_windows": (True,)}, "1 entries for num_layers=3"),
        ({"layer_windows": (True,) * 3}, "sliding_window is None"),
        ({"attention_softcap": -1.0}, "attention_softcap must be positive"),
        ({"head_bias": True, "tie_embeddings": True}, "untied head"),
        ({"rope_scaling": families.LONGROPE, "head_dim": 8}, "3 entries, expected 4"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        families.config(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ntk"}, "kind must be one of linear"),
        ({"kind": "linear"}, "needs factor"),
        ({"kind": "llama3", "factor": 8.0}, "needs original_max_positions, low_freq"),
        ({"kind": "linear", "factor": 0.5}, "at least 1"),
    ],
)
def test_rope_scaling_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        models.RopeScaling(**fields)


def test_config_is_static():
    config = families.CONFIGS["gemma2"]
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.window_of(0) == 3
    assert config.window_of(1) is None
