"""The decoder against its oracle, and the invariances that users rely on."""

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from oracles import decoder as oracle

from jaxpost import ops

LENGTH = 11


def tokens_of(config, length=LENGTH, batch=2):
    key = jax.random.key(5)
    return jax.random.randint(key, (batch, length), 0, config.vocab_size, jnp.int32)


def arange(batch, length):
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def logits_of(model, params, output):
    return ops.logits(output.hidden, model.unembed(params))


@pytest.mark.parametrize("name", families.CONFIGS)
def test_equals_the_oracle(name):
    config = families.CONFIGS[name]
    model = families.build(config)
    tokens, positions = tokens_of(config), arange(2, LENGTH)
    output = model.apply(model.params, tokens, positions)
    arrays = (np.asarray(tokens), np.asarray(positions))
    hidden = oracle.hidden_states(model.params, config, *arrays)
    assert output.hidden.dtype == jnp.float32
    np.testing.assert_allclose(output.hidden, hidden, atol=1e-4, rtol=1e-4)
    found = logits_of(model, model.params, output)
    expected = oracle.logits(model.params, config, hidden)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_float64_equals_the_oracle(name):
    config = families.CONFIGS[name]
    with jax.enable_x64(True):
        model = families.build(config, jnp.float64)
        tokens, positions = tokens_of(config), arange(2, LENGTH)
        output = model.apply(model.params, tokens, positions)
        assert output.hidden.dtype == jnp.float64
    arrays = (np.asarray(tokens), np.asarray(positions))
    hidden = oracle.hidden_states(model.params, config, *arrays)
    np.testing.assert_allclose(output.hidden, hidden, atol=1e-11)


def test_longrope_stretches_rows_that_are_long():
    config = families.CONFIGS["phi3"]
    model = families.build(config)
    tokens = tokens_of(config, 6)
    positions = arange(2, 6) + jnp.asarray([[0], [12]], jnp.int32)
    found = model.apply(model.params, tokens, positions).hidden
    expected = oracle.hidden_states(
        model.params, config, np.asarray(tokens), np.asarray(positions)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_equals_separate(name):
    config = families.CONFIGS[name]
    model = families.build(config)
    tokens = tokens_of(config, batch=1)
    lengths = (4, 6)
    segments = jnp.asarray([[1] * 4 + [2] * 6 + [0]], jnp.int32)
    positions = jnp.asarray([[*range(4), *range(6), 0]], jnp.int32)
    packed = model.apply(model.params, tokens, positions, segments).hidden
    start = 0
    for length in lengths:
        stop = start + length
        alone = model.apply(model.params, tokens[:, start:stop], arange(1, length))
        np.testing.assert_allclose(packed[:, start:stop], alone.hidden, atol=1e-5)
        start = stop


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_left_padding_equals_right_padding_equals_none(name):
    config = families.CONFIGS[name]
    model = families.build(config)
    tokens = tokens_of(config, 7, batch=1)
    plain = model.apply(model.params, tokens, arange(1, 7)).hidden
    for left, right in ((3, 0), (0, 3), (2, 1)):
        widths = ((0, 0), (left, right))
        hidden = model.apply(
            model.params,
            jnp.pad(tokens, widths, constant_values=9),
            jnp.pad(arange(1, 7), widths),
            jnp.pad(jnp.ones((1, 7), jnp.int32), widths),
        ).hidden
        np.testing.assert_allclose(hidden[:, left : left + 7], plain, atol=1e-5)


def test_masked_tokens_change_nothing():
    """Not even through a NaN embedding, forward or backward."""
    config = families.CONFIGS["llama"]
    model = families.build(config)
    tokens = jnp.asarray([[3, 4, 5, 1, 1]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 0, 0]], jnp.int32)
    table = model.params["embed"]["embedding"]

    @jax.jit
    def gradient(row):
        def loss(params):
            hidden = model.apply(params, tokens, arange(1, 5), segments).hidden
            return jnp.sum(jnp.where(segments[..., None] != 0, hidden, 0.0) ** 2)

        embed = {"embedding": table.at[1].set(row)}
        return jax.value_and_grad(loss)(model.params | {"embed": embed})

    loss, gradients = gradient(table[1])
    for row in (table[2], jnp.full_like(table[1], jnp.nan)):
        other_loss, other = gradient(row)
        assert loss == other_loss
        jax.tree.map(np.testing.assert_array_equal, gradients, other)


@pytest.mark.parametrize(
    "name", [pytest.param("qwen3", marks=pytest.mark.slow), "gemma2"]
)
@pytest.mark.slow
def test_gradient_equals_a_directional_difference(name):
    config = families.CONFIGS[name]
    with jax.enable_x64(True):
        model = families.build(config, jnp.float64)
        tokens, positions = tokens_of(config, 6), arange(2, 6)

        @jax.jit
        def loss(params):
            output = model.apply(params, tokens, positions)
            return jnp.sum(jnp.sin(logits_of(model, params, output)))

        keys = iter(jax.random.split(jax.random.key(6), 99))
        step = jax.tree.map(
            lambda x: jax.random.normal(next(keys), x.shape, x.dtype), model.params
        )
        gradient = jax.jit(jax.grad(loss))(model.params)
        slope = sum(
            float(jnp.sum(a * b))
            for a, b in zip(
                jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True
            )
        )
        size = 1e-6
        ends = [
            loss(jax.tree.map(lambda x, d, s=s: x + s * size * d, model.params, step))
            for s in (1, -1)
        ]
        difference = float(ends[0] - ends[1]) / (2 * size)
    assert slope == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(
    "remat", [pytest.param("full", marks=pytest.mark.slow), "dots"]
)
def test_rematerialisation_changes_nothing(remat):
    config = families.CONFIGS["llama"]
    model = families.build(config)
    tokens, positions = tokens_of(config), arange(2, LENGTH)

    def gradient(config):
        apply = model.apply if config is None else families.build(config).apply

        def loss(params):
            return jnp.sum(jnp.square(apply(params, tokens, positions).hidden))

        return jax.jit(jax.grad(loss))(model.params)

    plain, again = gradient(None), gradient(config.replace(remat=remat))
    # The same operations in another order of fusion.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5),
        plain,
        again,
    )


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_attention_implementation_is_a_setting(implementation):
    config = families.CONFIGS["gemma2"]
    model = families.build(config)
    other = families.build(config.replace(attention_implementation=implementation))
    arguments = (tokens_of(config), arange(2, LENGTH))
    np.testing.assert_allclose(
        model.apply(model.params, *arguments).hidden,
        other.apply(model.params, *arguments).hidden,
        atol=1e-5,
    )


def test_bfloat16_computes_norms_and_softmax_in_float32():
    config = families.CONFIGS["llama"]
    model = families.build(config, jnp.bfloat16)
    tokens, positions = tokens_of(config), arange(2, LENGTH)
    jaxpr = jax.make_jaxpr(model.apply)(model.params, tokens, positions)
    hidden = model.apply(model.params, tokens, positions).hidden
    assert hidden.dtype == jnp.bfloat16
    seen = {str(dtype) for dtype in _dtypes_of(jaxpr.jaxpr, {"rsqrt", "exp", "cos"})}
    assert "bfloat16" not in seen
    assert "float32" in seen
    expected = oracle.hidden_states(
        model.params, config, np.asarray(tokens), np.asarray(positions)
    )
    error = np.abs(np.asarray(hidden, np.float64) - expected)
    # bfloat16 has 8 significant bits, and errors add up over three layers.
    assert error.mean() < 0.03 * np.abs(expected).mean()


def _dtypes_of(jaxpr, names):
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            yield equation.outvars[0].aval.dtype
        for inner in jaxprs_in_params(equation.params):
            yield from _dtypes_of(inner, names)


def test_jit_equals_eager_and_nothing_retraces():
    config = families.CONFIGS["llama"]
    model = families.build(config)
    traces = []

    @jax.jit
    def f(model, tokens, positions):
        traces.append(tokens.shape)
        return model.apply(model.params, tokens, positions).hidden

    tokens, positions = tokens_of(config), arange(2, LENGTH)
    eager = model.apply(model.params, tokens, positions).hidden
    np.testing.assert_allclose(f(model, tokens, positions), eager, atol=1e-6)
    again = families.build(families.config())  # an equal configuration, made anew
    f(again, tokens + 0, positions)
    assert traces == [(2, LENGTH)]


def test_real_stories_weights(shared_data):
    """Per-token losses of a published checkpoint, computed by its authors' code."""
    import json

    folder = shared_data / "weights" / "stories260K"
    weights = pytest.importorskip("jaxpost.weights")
    model = weights.load(str(folder))
    reference = json.loads((folder / "reference.json").read_text())
    tokens = jnp.asarray([reference["probe_ids"]], jnp.int32)
    output = model.apply(model.params, tokens, arange(*tokens.shape))
    logps = jax.nn.log_softmax(logits_of(model, model.params, output))
    losses = -jnp.take_along_axis(logps[0, :-1], tokens[0, 1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(losses, reference["probe_nll"], atol=1e-4)
