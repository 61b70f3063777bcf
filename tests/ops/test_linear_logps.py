import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import logps as oracle

from jaxpost import ops
from jaxpost.ops import _linear_chunk, _linear_logps
from jaxpost.ops._chunks import plan_layout
from jaxpost.typing import Head

B, T, D, V = 3, 5, 4, 11
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D))
WEIGHT = RNG.normal(size=(D, V))
BIAS = RNG.normal(size=V)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
COTANGENT = RNG.normal(size=(B, T))
HEADS = {
    "plain": {},
    "full": {"bias": BIAS, "softcap": 2.0, "scale": 1.5},
}


def make_head(kind, weight=WEIGHT, dtype=jnp.float32):
    options = dict(HEADS[kind])
    bias = options.pop("bias", None)
    bias = None if bias is None else jnp.asarray(bias, dtype)
    return Head(jnp.asarray(weight, dtype), bias, **options)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("implementation", ["chunked", "dense"])
def test_equals_oracle(kind, chunk_size, implementation):
    wanted = oracle.token_stats(HIDDEN, WEIGHT, TARGETS, temperature=0.7, **HEADS[kind])
    found = ops.linear_token_logps(
        jnp.float32(HIDDEN),
        make_head(kind),
        jnp.asarray(TARGETS),
        chunk_size=chunk_size,
        temperature=0.7,
        with_entropy=True,
        with_top1=True,
        implementation=implementation,
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert set(np.unique(found.top1)) == {0.0, 1.0}


def gradients(kind, loss, **options):
    """Value and gradients in float64 of `loss(stats)`, chunked and dense."""
    head = make_head(kind, dtype=jnp.float64)

    def run(implementation):
        def f(hidden, head):
            stats = ops.linear_token_logps(
                hidden,
                head,
                jnp.asarray(TARGETS),
                chunk_size=4,
                temperature=0.7,
                with_entropy=True,
                with_top1=True,
                implementation=implementation,
                **options,
            )
            return loss(stats)

        return jax.jit(jax.value_and_grad(f, (0, 1)))(jnp.asarray(HIDDEN), head)

    return run("chunked"), run("dense")


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"mask": MASK}, {"grad_weights": MASK}], ids=["all", "mask", "hint"]
)
@pytest.mark.parametrize("asked", ["foreseen", "other", "entropy", "bonus"])
def test_gradients_equal_autodiff(kind, options, asked):
    """Also where the hint of `grad_weights` turns out wrong."""

    def loss(stats):
        if asked == "foreseen":
            return 2.5 * jnp.sum(stats.logps * MASK.astype(float)) / 3.0
        if asked == "other":
            return jnp.sum(stats.logps * COTANGENT)
        if asked == "bonus":  # the hint is right about logps, but entropy counts too
            return jnp.sum(stats.logps * MASK.astype(float) + stats.entropy)
        return jnp.sum(stats.logps * COTANGENT + stats.entropy * COTANGENT[::-1])

    with jax.enable_x64(True):
        options = {name: jnp.asarray(x) for name, x in options.items()}
        found, wanted = gradients(kind, loss, **options)
        chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert float(jnp.max(jnp.abs(found[1][1].weight))) > 1e-3


@pytest.mark.parametrize("name", ["mask", "grad_weights"])
def test_one_device_and_tiled_sums_change_nothing(name, monkeypatch):
    """One device walks all tokens as one row; large gradients are summed in tiles."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(_linear_chunk, "TILE_BYTES", 2 * V * 8)

    def loss(stats):
        return jnp.sum(stats.logps)

    with jax.enable_x64(True):
        found, wanted = gradients("full", loss, **{name: jnp.asarray(MASK)})
        chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("shape", [(3, 5), (8, 16), (7, 1), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_arranged_tokens_come_back(shape, chunk_size, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    layout = plan_layout(shape, chunk_size)
    assert layout.rows * layout.columns <= max(chunk_size, layout.rows)
    assert shape[0] % layout.rows == 0
    tokens = jnp.arange(2 * np.prod(shape)).reshape(*shape, 2)
    arranged = layout.arrange(tokens)
    assert arranged.shape == (layout.rows, layout.chunks * layout.columns, 2)
    np.testing.assert_array_equal(layout.restore(arranged), tokens)


@pytest.mark.usefixtures("strict_dtypes")
def test_gradients_are_right_numerically():
    def logps_and_entropy(hidden, weight, bias):
        stats = ops.linear_token_logps(
            hidden,
            Head(weight, bias, softcap=3.0),
            jnp.asarray(TARGETS[:1, :2]),
            chunk_size=1,
            with_entropy=True,
        )
        return stats.logps, stats.entropy

    with jax.enable_x64(True):
        arguments = (
            jnp.asarray(HIDDEN[:1, :2]),
            jnp.asarray(WEIGHT),
            jnp.asarray(BIAS),
        )
        chex.assert_numerical_grads(
            lambda *a: jax.tree.map(jnp.sum, logps_and_entropy(*a)),
            arguments,
            order=1,
            modes=("rev",),
            atol=1e-6,
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", ["mask", "grad_weights"])
def test_nan_under_the_mask_reaches_nothing(name):
    dirty = np.where(MASK[..., None], HIDDEN, np.nan)
    targets = jnp.asarray(np.where(MASK, TARGETS, -100))

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden,
            weight,
            targets,
            chunk_size=4,
            with_entropy=True,
            with_top1=True,
            **{name: jnp.asarray(MASK)},
        )
        return jnp.sum(stats.logps), stats

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    clean = run(jnp.float32(HIDDEN), jnp.float32(WEIGHT))
    found = run(jnp.float32(dirty), jnp.float32(WEIGHT))
    chex.assert_trees_all_equal(found, clean)
    (_, stats), (hidden_bar, _) = found
    for x in (*stats, jnp.sum(jnp.abs(hidden_bar), -1)):
        np.testing.assert_array_equal(np.asarray(x)[~MASK], 0.0)


def test_nan_that_the_caller_selects_away_reaches_no_gradient():
    dirty = jnp.float32(np.where(MASK[..., None], HIDDEN, np.nan))

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden, weight, jnp.asarray(TARGETS), chunk_size=4, with_entropy=True
        )
        return select(stats.logps) + select(stats.entropy)

    def select(x):
        return ops.masked_sum(x, jnp.asarray(MASK))

    run = jax.jit(jax.grad(loss, (0, 1)))
    found = run(dirty, jnp.float32(WEIGHT))
    clean = run(jnp.float32(HIDDEN), jnp.float32(WEIGHT))
    chex.assert_trees_all_equal(found, clean)


def test_an_empty_mask_gives_zeros():
    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden, weight, jnp.asarray(TARGETS), grad_weights=jnp.zeros((B, T), bool)
        )
        return jnp.sum(stats.logps)

    value, bars = jax.jit(jax.value_and_grad(loss, (0, 1)))(
        jnp.float32(HIDDEN), jnp.float32(WEIGHT)
    )
    assert value == 0.0
    for bar in bars:
        np.testing.assert_array_equal(bar, 0.0)


def test_masked_chunks_cost_no_product(monkeypatch):
    """Only one of eight tokens is scored: the loop's trip count shrinks with them."""
    seen = []

    def spy(settings, inputs):
        seen.append((int(inputs.trips), inputs.hidden.shape[1] // settings.columns))
        return original(settings, inputs)

    original = _linear_logps._sweep
    monkeypatch.setattr(_linear_logps, "_sweep", spy)
    mask = jnp.zeros((4, 8), bool).at[:, 7].set(True)
    ops.linear_token_logps(
        jnp.ones((4, 8, D)),
        jnp.float32(WEIGHT),
        jnp.zeros((4, 8), int),
        mask=mask,
        chunk_size=4,
    )
    assert seen == [(1, 8)]


def test_transformations_agree():
    weight, targets = jnp.float32(WEIGHT), jnp.asarray(TARGETS)

    def rows(hidden, targets, mask):
        return ops.linear_token_logps(
            hidden, weight, targets, grad_weights=mask, chunk_size=2
        ).logps

    def value_and_grad(hidden, targets, mask):
        return jax.value_and_grad(lambda h: jnp.sum(rows(h, targets, mask)))(hidden)

    arguments = jnp.float32(HIDDEN), targets, jnp.asarray(MASK)
    arguments = jax.tree.map(lambda x: x[:, None], arguments)  # [B, 1, T, ...]
    run = jax.jit(value_and_grad)
    looped = [run(*(x[b] for x in arguments)) for b in range(B)]
    wanted = jax.tree.map(lambda *xs: jnp.stack(xs), *looped)
    _, scanned = jax.lax.scan(
        lambda carry, xs: (carry, value_and_grad(*xs)), None, arguments
    )
    for found in (jax.jit(jax.vmap(value_and_grad))(*arguments), scanned):
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_second_call_does_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(hidden, weight, mask):
        return ops.linear_token_logps(hidden, weight, jnp.asarray(TARGETS), mask=mask)

    for mask in (MASK, ~MASK):  # more tokens to score is no other program
        run(jnp.float32(HIDDEN), jnp.float32(WEIGHT), jnp.asarray(mask))


def test_bfloat16_hidden_states_are_summed_in_float32():
    hidden = jnp.asarray(RNG.normal(size=(2, 8, 256)), jnp.bfloat16)
    weight = jnp.asarray(RNG.normal(size=(256, 64)) / 16.0, jnp.bfloat16)
    targets = jnp.asarray(RNG.integers(0, 64, (2, 8)))
    weights = jnp.ones((2, 8), bool)

    def loss(hidden, weight, **options):
        stats = ops.linear_token_logps(hidden, weight, targets, **options)
        return jnp.sum(stats.logps), stats.logps

    def run(*inputs, **options):
        f = functools.partial(loss, **options)
        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*inputs)

    wide = run(hidden.astype(jnp.float32), weight.astype(jnp.float32))
    for options in ({}, {"grad_weights": weights}):
        (_, logps), bars = run(hidden, weight, chunk_size=4, **options)
        assert logps.dtype == jnp.float32
        assert [bar.dtype for bar in bars] == [jnp.bfloat16] * 2
        # Products of bfloat16 numbers are exact in float32: only the order differs.
        np.testing.assert_allclose(logps, wide[0][1], rtol=1e-5, atol=1e-5)
        # Gradients pass through bfloat16 factors of relative precision 2**-8.
        for bar, wanted in zip(bars, wide[1], strict=True):
            error = jnp.linalg.norm(bar.astype(jnp.float32) - wanted)
            assert float(error / jnp.linalg.norm(wanted)) < 2.0**-7


def test_extreme_scores_stay_finite():
    hidden = jnp.array([[[1e4], [-1e4]]], jnp.float32)
    weight = jnp.array([[1.0, -1.0, 0.0]], jnp.float32)
    bias = jnp.array([0.0, 0.0, -jnp.inf])

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden, Head(weight, bias), jnp.array([[0, 0]]), with_entropy=True
        )
        return jnp.sum(stats.logps) + jnp.sum(stats.entropy), stats

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, stats), bars = run(hidden, weight)
    np.testing.assert_array_equal(stats.logps, [[0.0, -2e4]])
    np.testing.assert_array_equal(stats.entropy, 0.0)
    assert all(bool(jnp.all(jnp.isfinite(bar))) for bar in bars)


def test_top1_equals_greedy_with_ties():
    """A fresh head of zeros ties everywhere: only id 0 is the greedy choice."""
    targets = jnp.array([[0, 1, 2]])
    for implementation in ("chunked", "dense"):
        stats = ops.linear_token_logps(
            jnp.ones((1, 3, D)),
            jnp.zeros((D, V)),
            targets,
            with_top1=True,
            implementation=implementation,
        )
        np.testing.assert_array_equal(stats.top1, [[1.0, 0.0, 0.0]])


def test_targets_outside_the_vocabulary_are_nan():
    for implementation in ("chunked", "dense"):
        logps = ops.linear_token_logps(
            jnp.ones((1, 3, D)),
            jnp.float32(WEIGHT),
            jnp.array([[-100, V, 0]]),
            implementation=implementation,
        ).logps
        np.testing.assert_array_equal(jnp.isnan(logps), [[True, True, False]])


@pytest.mark.parametrize("options", ["forward", "lazy", "hint"])
def test_memory_is_a_few_chunks(options):
    """From the compiled program: far below `B * T * V` floats, forward and backward."""
    batch, length, depth, vocab, chunk = 4, 256, 32, 4096, 32
    hidden = jax.ShapeDtypeStruct((batch, length, depth), jnp.float32)
    weight = jax.ShapeDtypeStruct((depth, vocab), jnp.float32)
    targets = jnp.zeros((batch, length), int)
    mask = jnp.ones((batch, length), bool)
    hint = {"grad_weights": mask} if options == "hint" else {}

    def loss(hidden, weight):
        stats = ops.linear_token_logps(
            hidden, weight, targets, chunk_size=chunk, with_entropy=True, **hint
        )
        return jnp.mean(stats.logps)

    f = loss if options == "forward" else jax.grad(loss, (0, 1))
    analysis = jax.jit(f).lower(hidden, weight).compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend reports no memory analysis")
    # Chunks, and the sums of the gradients before they are returned.
    allowed = 4 * (4 * chunk * vocab + 2 * depth * vocab + 4 * batch * length * depth)
    assert analysis.temp_size_in_bytes < allowed
    assert allowed < 0.25 * batch * length * vocab * 4


def test_errors_name_the_argument():
    hidden, weight = jnp.float32(HIDDEN), jnp.float32(WEIGHT)
    targets, mask = jnp.asarray(TARGETS), jnp.asarray(MASK)

    def call(hidden=hidden, weight=weight, targets=targets, **options):
        return ops.linear_token_logps(hidden, weight, targets, **options)

    with pytest.raises(ValueError, match=r"hidden must be \[..., D\]"):
        call(weight=weight[:-1])
    with pytest.raises(ValueError, match=r"targets must be \[B, T\]"):
        call(targets=targets[:, :-1])
    with pytest.raises(ValueError, match="targets must be integers"):
        call(targets=targets.astype(jnp.float32))
    with pytest.raises(ValueError, match="not both"):
        call(mask=mask, grad_weights=mask)
    with pytest.raises(ValueError, match="mask must be boolean"):
        call(mask=mask.astype(jnp.float32))
    with pytest.raises(ValueError, match="grad_weights must have the shape"):
        call(grad_weights=mask[:, :-1])
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        call(chunk_size=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        call(temperature=0.0)
    with pytest.raises(ValueError, match="implementation must be one of"):
        call(implementation="fused")
    with pytest.raises(NotImplementedError, match="vocab_axis"):
        call(implementation="dense", vocab_axis="model")
