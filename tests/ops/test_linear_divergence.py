"""Divergences straight from hidden states: over the whole vocabulary, and on a support.

The plain forms hold the logits; the chunked ones never do.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracles import support as oracle

from jaxpost import losses, ops
from jaxpost.typing import Head

B, T, D, E, V, K = 3, 5, 4, 3, 16, 4
RNG = np.random.default_rng(0)
HIDDEN, OTHER = RNG.normal(size=(B, T, D)), 2.0 * RNG.normal(size=(B, T, E))
WEIGHT, OTHER_WEIGHT = RNG.normal(size=(D, V)), RNG.normal(size=(E, V))
BIAS = RNG.normal(size=V)
IDS = np.stack([RNG.permutation(V)[:K] for _ in range(B * T)]).reshape(B, T, K)
MASK = np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
COTANGENT = RNG.normal(size=(B, T))
SHAPED = {"softcap": 2.0, "scale": 1.5}
TEMPERATURE = 0.7
ALPHAS = (0.0, 0.4, 1.0)


def heads(dtype):
    """The student's, with everything a head may have, and the teacher's."""
    student = Head(jnp.asarray(WEIGHT, dtype), jnp.asarray(BIAS, dtype), **SHAPED)
    return student, Head(jnp.asarray(OTHER_WEIGHT, dtype), softcap=3.0)


def plain(hidden, head, other, other_head, alpha):
    """With both `[B, T, V]` in memory."""
    return losses.divergence(
        ops.logits(hidden, head),
        ops.logits(other, other_head),
        alpha=alpha,
        temperature=TEMPERATURE,
    )


def assert_equal(found, wanted, tolerance=1e-10):
    chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize(
    ("alpha", "hint"),
    [
        (0.0, "mask"),
        (0.4, "wrong"),
        (1.0, "grad_weights"),
        pytest.param(0.0, "grad_weights", marks=pytest.mark.slow),
        pytest.param(0.4, "grad_weights", marks=pytest.mark.slow),
        pytest.param(1.0, "wrong", marks=pytest.mark.slow),
    ],
)
def test_the_chunked_divergence_equals_the_plain_one(alpha, hint):
    """Values and gradients in float64, also where the hint is no help."""
    name = "mask" if hint == "mask" else "grad_weights"
    factors = MASK * (COTANGENT if hint == "wrong" else 1.7)

    with jax.enable_x64(True):
        student, teacher = heads(jnp.float64)
        other = jnp.asarray(OTHER)

        def total(values):
            return jnp.sum(values * jnp.asarray(factors)), values

        def chunked(hidden, head):
            return total(
                ops.linear_divergence(
                    hidden,
                    head,
                    other,
                    teacher,
                    alpha=alpha,
                    temperature=TEMPERATURE,
                    chunk_size=4,
                    **{name: jnp.asarray(MASK)},
                )
            )

        def dense(hidden, head):
            values = plain(hidden, head, other, teacher, alpha)
            return total(jnp.where(jnp.asarray(MASK), values, jnp.zeros(())))

        arguments = jnp.asarray(HIDDEN), student
        (_, values), grads = both = jax.jit(
            jax.value_and_grad(chunked, (0, 1), has_aux=True)
        )(*arguments)
        assert_equal(both, jax.value_and_grad(dense, (0, 1), has_aux=True)(*arguments))
        assert values.dtype == jnp.float64
        assert float(jnp.max(jnp.abs(grads[1].weight))) > 1e-3


@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_equal_the_oracle(alpha):
    student, teacher = heads(jnp.float32)
    found = ops.linear_divergence(
        jnp.float32(HIDDEN),
        student,
        jnp.float32(OTHER),
        teacher,
        alpha=alpha,
        temperature=TEMPERATURE,
    )
    s, t = distributions()
    wanted = [
        oracle.divergence(np.exp(a), np.exp(b), alpha)
        for a, b in zip(s, t, strict=True)
    ]
    np.testing.assert_allclose(found.reshape(-1), wanted, rtol=1e-5, atol=1e-6)


def distributions():
    """Log-probabilities of student and teacher, `[B * T, V]`, by the oracle."""
    student = oracle.log_softmax(
        HIDDEN.reshape(-1, D), WEIGHT, BIAS, temperature=TEMPERATURE, **SHAPED
    )
    teacher = oracle.log_softmax(
        OTHER.reshape(-1, E), OTHER_WEIGHT, softcap=3.0, temperature=TEMPERATURE
    )
    return student, teacher


@pytest.mark.parametrize("k", [1, K, V])
def test_supports_equal_the_oracle(k):
    """The most likely tokens and the exact mass of the others; none if k is V."""
    options = {"temperature": TEMPERATURE, "chunk_size": 4}
    with jax.enable_x64(True):
        student, teacher = heads(jnp.float64)
        top = ops.linear_top_logps(jnp.asarray(OTHER), teacher, k, **options)
        same = ops.linear_support_logps(
            jnp.asarray(HIDDEN), student, top.ids, **options
        )
    np.testing.assert_array_equal(same.ids, top.ids)
    for place, (s, t) in enumerate(zip(*distributions(), strict=True)):
        at = np.unravel_index(place, (B, T))
        best = np.argsort(-t, kind="stable")[:k]
        np.testing.assert_array_equal(top.ids[at], best)
        for found, logps in ((top, t), (same, s)):
            wanted, tail = oracle.support(logps, best)
            np.testing.assert_allclose(found.logps[at], wanted, rtol=1e-12)
            np.testing.assert_allclose(found.tail[at], tail, rtol=1e-12)
    assert np.isneginf(top.tail).all() == (k == V)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("k", [K, pytest.param(V, marks=pytest.mark.slow)])
def test_gradients_of_a_support_equal_autodiff(k):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        head, ids = heads(jnp.float64)[0], jnp.asarray(IDS)
        if k == V:
            ids = jnp.broadcast_to(jnp.arange(V), (B, T, V))
        bars = jnp.asarray(rng.normal(size=(B, T, k))), jnp.asarray(COTANGENT)

        def total(logps, tail):
            # Of an empty tail nothing is asked: its log-probability is -inf.
            tail = jnp.where(jnp.isneginf(tail), jnp.zeros(()), tail)
            mask = jnp.asarray(MASK)
            return jnp.sum(jnp.where(mask[..., None], bars[0] * logps, 0.0)) + jnp.sum(
                jnp.where(mask, bars[1] * tail, 0.0)
            )

        def chunked(hidden, head):
            found = ops.linear_support_logps(
                hidden,
                head,
                ids,
                mask=jnp.asarray(MASK),
                temperature=TEMPERATURE,
                chunk_size=4,
            )
            return total(found.logps, found.tail)

        def dense(hidden, head):
            logps = jax.nn.log_softmax(ops.logits(hidden, head) / TEMPERATURE)
            inside = jnp.any(ids[..., None] == jnp.arange(V)[None, None, None], axis=2)
            finite = jnp.zeros(logps.shape) if k == V else logps
            tail = jax.nn.logsumexp(jnp.where(inside, -jnp.inf, finite), axis=-1)
            tail = jnp.zeros(tail.shape) if k == V else tail
            return total(jnp.take_along_axis(logps, ids, axis=-1), tail)

        arguments = jnp.asarray(HIDDEN), head
        found = jax.jit(jax.value_and_grad(chunked, (0, 1)))(*arguments)
        assert_equal(found, jax.value_and_grad(dense, (0, 1))(*arguments))


def test_a_tiny_tail_is_exact():
    """Where `1 - sum p` would round to nothing: forward, and its slope."""
    scores = np.array([40.0, 39.0, -70.0, -71.0])

    def tail(z):
        ids = jnp.arange(2)[None, None]
        return ops.linear_support_logps(z[None, None, :], jnp.eye(4), ids).tail[0, 0]

    value, slope = jax.value_and_grad(tail)(jnp.float32(scores))
    norm = 40.0 + np.log1p(np.exp(-1.0))
    assert float(value) == pytest.approx(-70.0 + np.log1p(np.exp(-1.0)) - norm)
    share = 1.0 / (1.0 + np.exp(-1.0))
    np.testing.assert_allclose(
        slope, [-share, share - 1.0, share, 1.0 - share], rtol=1e-5
    )


def support_values(hidden, head, other, other_head, mask=None, **options):
    """Through the teacher's support of K tokens and the rest."""
    top = ops.linear_top_logps(other, other_head, K, mask=mask, **options)
    mine = ops.linear_support_logps(hidden, head, top.ids, mask=mask, **options)
    return losses.support_divergence(mine, top, alpha=0.4)


def full_values(hidden, head, other, other_head, mask=None, **options):
    return ops.linear_divergence(
        hidden, head, other, other_head, alpha=0.4, mask=mask, **options
    )


FORMS = {"support": support_values, "full": full_values}


@pytest.mark.parametrize(
    "form", ["support", pytest.param("full", marks=pytest.mark.slow)]
)
def test_masked_tokens_change_nothing_even_if_nan(form):
    def run(hidden, head, other, teacher):
        values = FORMS[form](
            hidden, head, other, teacher, jnp.asarray(MASK), chunk_size=4
        )
        # Also a cotangent that is not zero where nothing was scored.
        return jnp.sum(values) + jnp.sum(jnp.square(values - 1.0)), values

    step = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    student, teacher = heads(jnp.float32)
    wanted = step(jnp.float32(HIDDEN), student, jnp.float32(OTHER), teacher)
    holes = np.where(MASK[..., None], 0.0, np.nan)
    found = step(
        jnp.float32(HIDDEN + holes), student, jnp.float32(OTHER + holes), teacher
    )
    chex.assert_trees_all_equal(found, wanted)
    (_, values), (hidden_bar, _) = found
    np.testing.assert_array_equal(np.asarray(values)[~MASK], 0.0)
    np.testing.assert_array_equal(np.asarray(hidden_bar)[~MASK], 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_computed_in_float32(form):
    low = [jnp.bfloat16(x) for x in (HIDDEN, OTHER)]
    student, teacher = heads(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in low]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (student, teacher))

    def grads(hidden, head, other, teacher):
        def total(hidden):
            return jnp.sum(values(hidden, head, other, teacher))

        values = FORMS[form]
        return values(hidden, head, other, teacher), jax.grad(total)(hidden)

    values, bar = jax.jit(grads)(low[0], student, low[1], teacher)
    wanted, wide_bar = jax.jit(grads)(wide[0], exact[0], wide[1], exact[1])
    assert values.dtype == jnp.float32
    assert bar.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    # Slopes are rounded to bfloat16 on their way into the products.
    gap = np.abs(np.float32(bar) - wide_bar).max()
    assert gap < 2.0**-6 * np.abs(wide_bar).max()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_vocabulary_split_over_devices(form):
    """By `shard_map`: the same values and gradients."""
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)

    def local(hidden, weight, bias, other, other_weight, mask):
        return FORMS[form](
            hidden,
            Head(weight, bias, **SHAPED),
            other,
            Head(other_weight, softcap=3.0),
            mask,
            vocab_axis="vocab",
            chunk_size=4,
        )

    rows, columns = P("data"), P(None, "vocab")
    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, columns, P("vocab"), rows, columns, rows),
        out_specs=rows,
    )

    def whole(hidden, weight, bias, other, other_weight, mask):
        head, teacher = Head(weight, bias, **SHAPED), Head(other_weight, softcap=3.0)
        return FORMS[form](hidden, head, other, teacher, mask)

    def step(values):
        def total(*arguments):
            found = values(*arguments)
            return jnp.sum(found * jnp.float32(COTANGENT[[0, 1, 2, 0]])), found

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    def four(x):
        return jnp.float32(x[[0, 1, 2, 0]])

    arguments = (
        four(HIDDEN),
        jnp.float32(WEIGHT),
        jnp.float32(BIAS),
        four(OTHER),
        jnp.float32(OTHER_WEIGHT),
        jnp.asarray(MASK[[0, 1, 2, 0]]),
    )
    assert_equal(step(split)(*arguments), step(whole)(*arguments), 1e-5)


SLOW_FULL = pytest.param("full", marks=pytest.mark.slow)


@pytest.mark.parametrize("form", ["support", SLOW_FULL, "foreseen"])
def test_nothing_of_the_size_of_the_logits_exists(form):
    """From the compiled program, forward and backward."""
    batch, length, depth, vocab, chunk = 4, 256, 32, 4096, 32
    hidden = jax.ShapeDtypeStruct((batch, length, depth), jnp.float32)
    weight = jax.ShapeDtypeStruct((depth, vocab), jnp.float32)
    mask = jnp.ones((batch, length), bool)

    def loss(hidden, weight, other, other_weight):
        if form == "support":
            values = support_values(
                hidden, weight, other, other_weight, mask, chunk_size=chunk
            )
        else:
            name = "mask" if form == "full" else "grad_weights"
            values = ops.linear_divergence(
                hidden,
                weight,
                other,
                other_weight,
                alpha=0.5,
                chunk_size=chunk,
                **{name: mask},
            )
        return jnp.mean(values)

    step = jax.jit(jax.grad(loss, (0, 1)))
    compiled = step.lower(hidden, weight, hidden, weight).compile()
    allowed = 4 * (6 * chunk * vocab + 2 * depth * vocab + 6 * batch * length * depth)
    assert allowed < 0.3 * batch * length * vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < allowed


def test_errors_name_the_argument():
    hidden, weight = jnp.float32(HIDDEN), jnp.float32(WEIGHT)
    ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)

    def divergence(other=hidden, other_weight=weight, alpha=0.5, **options):
        ops.linear_divergence(
            hidden, weight, other, other_weight, alpha=alpha, **options
        )

    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        divergence(alpha=1.5)
    with pytest.raises(ValueError, match="vocabulary of 16, the teacher's of 15"):
        divergence(other_weight=weight[:, :-1])
    with pytest.raises(ValueError, match="hidden and teacher_hidden must be"):
        divergence(other=hidden[:2])
    with pytest.raises(ValueError, match="mask or grad_weights, not both"):
        divergence(mask=mask, grad_weights=mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        divergence(mask=mask[:, :-1])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        divergence(temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        divergence(chunk_size=0)
    for k in (0, V + 1):
        with pytest.raises(ValueError, match=rf"k must lie in \[1, V = 16\], got {k}"):
            ops.linear_top_logps(hidden, weight, k)
    with pytest.raises(ValueError, match=r"ids must be \[B, T, K\]"):
        ops.linear_support_logps(hidden, weight, ids[0])
    with pytest.raises(ValueError, match="ids must be integers"):
        ops.linear_support_logps(hidden, weight, ids.astype(jnp.float32))
    outside = ops.linear_support_logps(hidden, weight, ids.at[0, 0, 0].set(V))
    np.testing.assert_array_equal(np.isnan(outside.logps[0, 0]).any(), True)
