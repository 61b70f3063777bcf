"""Discriminative fine-tuning: worked values, the exact gradient, the moving average."""

import math
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import discriminative as oracle

from jaxpost import losses

pytestmark = pytest.mark.usefixtures("strict_dtypes")

REF = (-11.0, -11.0)
# Far quicker than one operation after the other; the others are run eagerly.
compiled = jax.jit(losses.discriminative, static_argnames=("tau", "gamma"))
DOCS = pathlib.Path(__file__).parents[2] / "docs"


def visit(positive, negatives, log_u, *, reference=None, **options):
    """One example; arrays of float64 without their axis of examples."""
    if reference is not None:
        options["ref_neg_logps"] = jnp.asarray([reference])
    out = compiled(
        jnp.asarray([positive]),
        jnp.asarray([negatives]),
        jnp.asarray([log_u]),
        **options,
    )
    return float(out.values[0]), float(out.log_u[0]), np.asarray(out.weights[0])


@pytest.mark.parametrize(
    ("positive", "negatives", "before", "gamma", "log_u", "weights", "value"),
    [
        (-8.0, (-10.0, -12.0), 0.0, 1.0, 0.4337808, (1.761594, 0.238406), -2.2384058),
        (-8.0, (-10.0, -12.0), 0.0, 0.85, 0.3795444, (1.859775, 0.251693), -2.8090349),
        (-8.0, (-10.0, -12.0), 0.0, 0.5, 0.2402290, (2.137787, 0.289318), -4.4248406),
        (
            *(-7.5, (-10.5, -13.0), 0.37954441, 0.85),
            *(-0.0227909, (1.686729, 0.138455), -2.2552836),
        ),
    ],
)
def test_worked_values_of_dft(
    positive, negatives, before, gamma, log_u, weights, value
):
    with jax.enable_x64(True):
        found = visit(positive, negatives, before, reference=REF, tau=1.0, gamma=gamma)
    assert found[0] == pytest.approx(value, abs=0.51e-7)
    assert found[1] == pytest.approx(log_u, abs=0.51e-7)
    np.testing.assert_allclose(found[2], weights, rtol=0, atol=0.51e-6)
    if gamma == 1.0:
        assert np.mean(found[2]) == pytest.approx(1.0, abs=1e-12)
    if gamma == 0.85 and before == 0.0:
        assert math.exp(found[1]) == pytest.approx(1.4616185, abs=0.51e-7)
        assert math.exp(found[1]) == pytest.approx(0.15 + 0.85 * math.cosh(1.0))


def test_worked_values_of_dft2():
    """Mean scores -0.8 and -1, -1.5, of answers of unlike length."""
    with jax.enable_x64(True):
        value, log_u, weights = visit(
            -0.8 * 5,
            (-1.0 * 3, -1.5 * 8),
            0.0,
            tau=0.3,
            gamma=0.9,
            pos_lengths=jnp.asarray([5]),
            neg_lengths=jnp.asarray([[3, 8]]),
        )
    assert value == pytest.approx(0.6077811, abs=0.51e-7)
    assert log_u == pytest.approx(-2.1279146, abs=0.51e-7)
    np.testing.assert_allclose(weights, (0.299567, 0.056581), rtol=0, atol=0.51e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_numbers_stay_finite(dtype):
    """`u` is exp(600) here."""
    with jax.enable_x64(dtype == "float64"):
        out = compiled(
            jnp.asarray([-8.0], dtype),
            jnp.asarray([[-300.0, -310.0]], dtype),
            losses.init_log_u(1).astype(dtype),
            tau=1.0,
            gamma=0.85,
            ref_neg_logps=jnp.asarray([[-900.0, -910.0]], dtype),
        )
        assert out.log_u.dtype == out.weights.dtype == out.values.dtype == dtype
    exact = dtype == "float64"
    np.testing.assert_allclose(out.log_u, 599.8374811, atol=0.51e-7 if exact else 1e-3)
    np.testing.assert_allclose(out.weights, 1.1764706, atol=0.51e-7 if exact else 1e-3)
    assert np.isfinite(out.values).all()


def test_slopes_are_those_of_the_scaled_log_mean():
    scores, tau = np.array([-10.0, -12.0]), 0.7

    def value(negatives, tau):
        out = compiled(
            jnp.asarray([-8.0]),
            negatives[None],
            jnp.asarray([0.0]),
            tau=tau,
            gamma=1.0,
            ref_neg_logps=jnp.asarray([REF]),
        )
        return out.values[0]

    def exact(scores):
        return tau * math.log(np.mean(np.exp(scores / tau - np.array(REF))))

    with jax.enable_x64(True):
        found = jax.grad(value)(jnp.asarray(scores), tau)
        at_one = jax.grad(value)(jnp.asarray(scores), 1.0)
    np.testing.assert_allclose(found, (0.945687, 0.054313), rtol=0, atol=0.51e-6)
    wanted = oracle.finite_differences(exact, scores)
    np.testing.assert_allclose(found, wanted, atol=1e-8)
    # A softmax over d, here of s / tau as the reference is constant.
    for slopes, tau_ in ((np.asarray(found), tau), (np.asarray(at_one), 1.0)):
        assert slopes.sum() == pytest.approx(1.0, abs=1e-12)
        softmax = np.exp(scores / tau_) / np.sum(np.exp(scores / tau_))
        np.testing.assert_allclose(slopes, softmax, rtol=1e-10)


def test_dividing_by_p0_makes_the_sum_exact():
    policy, p0 = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    one_each = np.log(policy)[:, None]  # four examples of one negative
    estimates = {}
    with jax.enable_x64(True):
        for name, reference in (("with", np.log(p0)), ("without", np.zeros(4))):
            out = compiled(
                jnp.zeros(4),
                jnp.asarray(one_each),
                jnp.zeros(4),
                tau=1.0,
                gamma=1.0,
                ref_neg_logps=jnp.asarray(reference[:, None]),
            )
            estimates[name] = float(np.sum(p0 * np.exp(out.log_u)))
    assert estimates["with"] == pytest.approx(1.0, abs=1e-12)
    assert estimates["without"] == pytest.approx(0.2, abs=1e-12)


LANGUAGE = oracle.Language(vocabulary=3, longest=2)


def jax_logps(table):
    steps = [list(LANGUAGE.steps(answer)) for answer in LANGUAGE.answers]
    logps = jax.nn.log_softmax(table, axis=1)
    return jnp.stack([sum(logps[row, word] for row, word in s) for s in steps])


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_the_gradient_is_that_of_the_exact_objective(variant, tau):
    """Every answer once, as if drawn evenly from all of them (DFT), or as a pool."""
    table = np.random.default_rng(3).normal(size=(len(LANGUAGE.prefixes), 3))
    count, positive = len(LANGUAGE.answers), 4
    assert count == 7
    assert sum(np.exp(LANGUAGE.logps(table))) == pytest.approx(1.0)
    pool = np.arange(count) if variant == "dft" else np.array([0, 1, 3, 5, 6])

    def exact(table):
        scores = LANGUAGE.logps(table)
        if variant == "dft2":
            scores = scores / LANGUAGE.lengths
        weight = 1.0 if variant == "dft" else 1.0 / len(pool)
        return oracle.objective(scores, positive, pool, tau, weight)

    def surrogate(table):
        logps = jax_logps(table)
        options = {"ref_neg_logps": jnp.full((1, count), -math.log(count))}
        if variant == "dft2":
            options = {
                "pos_lengths": jnp.asarray(LANGUAGE.lengths[positive])[None],
                "neg_lengths": jnp.asarray(LANGUAGE.lengths[pool])[None],
            }
        out = losses.discriminative(
            logps[positive][None],
            logps[pool][None],
            jnp.asarray([5.0]),
            tau=tau,
            gamma=1.0,
            **options,
        )
        return out.values[0], out.log_u[0]

    with jax.enable_x64(True):
        found, log_u = jax.jit(jax.grad(surrogate, has_aux=True))(table)
        score = jax_logps(jnp.asarray(table))[positive]
        if variant == "dft2":
            score = score / LANGUAGE.lengths[positive]
        # With it, the objective's value is known too.
        assert float(tau * log_u - score) == pytest.approx(exact(table), abs=1e-10)
    np.testing.assert_allclose(
        found, oracle.finite_differences(exact, table), atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize("variant", ["dft", "dft2"])
def test_the_average_converges_as_one_over_root_visits(variant):
    """gamma_t = 1 / t, a fixed policy, negatives from P0: |u - its limit| against t."""
    rng, tau, examples, visits = np.random.default_rng(0), 0.7, 1000, 128
    logps = LANGUAGE.logps(rng.normal(size=(len(LANGUAGE.prefixes), 3)))
    log_p0 = LANGUAGE.logps(rng.normal(size=(len(LANGUAGE.prefixes), 3)))
    p0 = np.exp(log_p0)
    if variant == "dft":
        limit = np.sum(np.exp(logps / tau))  # the partition sum itself
    else:
        limit = np.sum(p0 * np.exp(logps / LANGUAGE.lengths / tau))
    drawn = rng.choice(len(p0), size=(visits, examples, 2), p=p0 / p0.sum())

    def one(log_u, negatives, gamma):
        options = {"ref_neg_logps": jnp.asarray(log_p0)[negatives]}
        if variant == "dft2":
            lengths = jnp.asarray(LANGUAGE.lengths)[negatives]
            options = {"pos_lengths": jnp.ones(examples), "neg_lengths": lengths}
        return losses.discriminative(
            jnp.zeros(examples),
            jnp.asarray(logps)[negatives],
            log_u,
            tau=tau,
            gamma=gamma,
            **options,
        ).log_u

    errors = {}
    with jax.enable_x64(True):
        log_u = jnp.zeros(examples)
        for t in range(1, visits + 1):
            log_u = one(log_u, drawn[t - 1], 1.0 / t)
            if t.bit_count() == 1:
                errors[t] = np.mean(np.abs(np.exp(log_u) - limit))
    slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


numbers = st.floats(-30.0, 5.0)
rows = st.lists(numbers, min_size=3, max_size=3)
squares = st.lists(rows, min_size=3, max_size=3)
batches = st.tuples(rows, squares, squares, rows)


def call(
    positive, negatives, reference, log_u, *, function=losses.discriminative, **options
):
    return function(
        jnp.asarray(positive),
        jnp.asarray(negatives),
        jnp.asarray(log_u),
        ref_neg_logps=jnp.asarray(reference),
        **options,
    )


@settings(max_examples=25, deadline=None)
@given(batch=batches, tau=st.floats(0.2, 3.0), gamma=st.floats(0.01, 1.0))
def test_equals_the_average_in_linear_space(batch, tau, gamma):
    positive, negatives, reference, log_u = batch
    with jax.enable_x64(True):
        found = call(*batch, tau=tau, gamma=gamma)
    for i in range(3):
        value, u, weights = oracle.visit(
            positive[i], negatives[i], reference[i], math.exp(log_u[i]), tau, gamma
        )
        np.testing.assert_allclose(found.log_u[i], math.log(u), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.weights[i], weights, rtol=1e-8)
        np.testing.assert_allclose(found.values[i], value, rtol=1e-7, atol=1e-7)
    # No weight is clipped, and yet none can run away: u holds gamma of its own term.
    weights = np.asarray(found.weights)
    assert (weights >= 0.0).all()
    assert (weights.mean(axis=1) <= (1.0 + 1e-9) / gamma).all()
    if gamma == 1.0:
        np.testing.assert_allclose(weights.mean(axis=1), 1.0, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(batch=batches, shift=st.floats(-50.0, 50.0), order=st.permutations(range(3)))
def test_shifts_and_orders_change_nothing(batch, shift, order):
    positive, negatives, reference, log_u = (np.array(part) for part in batch)
    order = np.array(order)
    options = {"tau": 1.0, "gamma": 0.85}
    with jax.enable_x64(True):
        found = call(positive, negatives, reference, log_u, **options)
        shifted = call(positive, negatives + shift, reference + shift, log_u, **options)
        parts = (part[order] for part in (positive, negatives, reference, log_u))
        permuted = call(*parts, **options)
    np.testing.assert_allclose(shifted.log_u, found.log_u, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(shifted.weights, found.weights, rtol=1e-9, atol=1e-300)
    for old, new in zip(found, permuted, strict=True):
        np.testing.assert_array_equal(new, old[order])


def test_equals_the_oracle_in_float32_under_jit():
    rng = np.random.default_rng(5)
    parts = [rng.uniform(-40, -5, shape) for shape in ((6,), (6, 3), (6, 3))]
    log_u = rng.uniform(-3, 3, 6)
    arrays = [np.float32(part) for part in (*parts, log_u)]
    found = jax.jit(lambda *a: call(*a, tau=0.8, gamma=0.9))(*arrays)
    eager = call(*arrays, tau=0.8, gamma=0.9)
    for i in range(6):
        value, u, weights = oracle.visit(
            *(part[i] for part in arrays[:3]), math.exp(arrays[3][i]), 0.8, 0.9
        )
        np.testing.assert_allclose(found.log_u[i], math.log(u), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.weights[i], weights, rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(found.values[i], value, rtol=1e-4)
    for one, two in zip(found, eager, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    halves = [jnp.asarray(part, jnp.bfloat16) for part in arrays[:3]]
    assert call(*halves, arrays[3], tau=0.8, gamma=0.9).log_u.dtype == "float32"


def test_a_new_value_weighs_gamma_and_the_first_one_fades():
    """After k visits the share of u_0 is (1 - gamma)^k."""
    with jax.enable_x64(True):
        log_u = jnp.asarray([math.log(7.0)])
        for _ in range(3):
            log_u = call(
                [0.0], [[0.0]], [[0.0]], log_u, tau=1.0, gamma=0.9, function=compiled
            ).log_u
    share = 0.1**3
    np.testing.assert_allclose(np.exp(log_u), share * 7.0 + (1.0 - share), rtol=1e-12)


@pytest.mark.parametrize("junk", [55.0, np.nan])
def test_masked_negatives_change_nothing(junk):
    """The middle negative, and all of the second example, do not count."""
    mask = jnp.array([[True, False, True], [False, False, False]])
    negatives = jnp.array([[-10.0, junk, -12.0], [junk, junk, junk]], jnp.float32)
    reference = jnp.array([[-11.0, junk, -11.0], [junk, junk, junk]], jnp.float32)
    positive, log_u = jnp.float32([-8.0, -3.0]), jnp.float32([0.2, 0.7])
    lengths = {
        "pos_lengths": jnp.int32([4, 2]),
        "neg_lengths": jnp.int32([[5, 0, 6], [0, 0, 0]]),
    }

    def value(positive, negatives, reference, **options):
        out = compiled(
            positive, negatives, log_u, tau=1.0, gamma=0.85, neg_mask=mask, **options
        )
        return jnp.sum(out.values), out

    for options, lengths_of in (
        ({"ref_neg_logps": reference}, np.ones(3)),
        (lengths, np.array([4, 5, 6])),
    ):
        (slope, slopes), out = jax.grad(value, argnums=(0, 1), has_aux=True)(
            positive, negatives, reference, **options
        )
        kept = np.array([-8.0, -10.0, -12.0]) / lengths_of
        log_p0 = [-11.0, -11.0] if "ref_neg_logps" in options else [0.0, 0.0]
        wanted, u, weights = oracle.visit(
            kept[0], kept[1:], log_p0, math.exp(0.2), 1.0, 0.85
        )
        np.testing.assert_allclose(out.values[0], wanted, rtol=1e-5)
        np.testing.assert_allclose(out.log_u, [math.log(u), 0.7], rtol=1e-5)
        np.testing.assert_allclose(out.weights[0, ::2], weights, rtol=1e-5)
        assert not np.any(out.weights[1])
        assert out.weights[0, 1] == 0.0
        second = 3.0 if "ref_neg_logps" in options else 1.5
        np.testing.assert_allclose(out.values[1], second, rtol=1e-6)
        np.testing.assert_array_equal(slopes[~np.asarray(mask)], 0.0)
        assert np.isfinite(slope).all()
        assert np.isfinite(slopes).all()


def test_only_scores_have_a_gradient():
    def total(reference, log_u):
        out = call(
            [-8.0],
            [[-10.0, -12.0]],
            reference,
            log_u,
            tau=1.0,
            gamma=0.85,
            function=compiled,
        )
        return jnp.sum(out.values) + jnp.sum(out.log_u) + jnp.sum(out.weights)

    slopes = jax.grad(total, argnums=(0, 1))(jnp.float32([REF]), jnp.float32([0.3]))
    assert not any(np.any(slope) for slope in slopes)

    def log_u(negatives):
        out = call(
            [-8.0], negatives, [REF], [0.0], tau=1.0, gamma=0.85, function=compiled
        )
        return jnp.sum(out.log_u) + jnp.sum(out.weights)

    assert not np.any(jax.grad(log_u)(jnp.float32([[-10.0, -12.0]])))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["positive", "negatives", "reference", "log_u"])
def test_a_number_that_is_not_finite_is_not_hidden(where, bad):
    parts = {
        "positive": np.float32([-8.0, -8.0]),
        "negatives": np.float32([[-10.0, -12.0]] * 2),
        "reference": np.float32([REF] * 2),
        "log_u": np.float32([0.0, 0.0]),
    }
    parts[where][(0, 0)[: parts[where].ndim]] = bad
    found = call(**parts, tau=1.0, gamma=0.85, function=compiled)
    assert np.isnan(found.values[0])
    assert np.isfinite(found.values[1])


@pytest.mark.parametrize("name", ["pos_lengths", "neg_lengths"])
def test_an_answer_without_tokens_is_not_hidden(name):
    lengths = {"pos_lengths": np.int32([3, 3]), "neg_lengths": np.int32([[4, 4]] * 2)}
    lengths[name][(0, 0)[: lengths[name].ndim]] = 0
    out = compiled(
        jnp.zeros(2), jnp.zeros((2, 2)), jnp.zeros(2), tau=0.3, gamma=0.9, **lengths
    )
    assert np.isnan(out.values[0])
    assert np.isfinite(out.values[1])


def test_init():
    found = losses.init_log_u(3)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(losses.init_log_u(2, initial=-2.0), [-2.0, -2.0])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        losses.init_log_u(0)
    with pytest.raises(ValueError, match="initial must be finite, got inf"):
        losses.init_log_u(1, initial=math.inf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": 0.0}, "tau must be positive and finite, got 0"),
        ({"tau": -1.0}, "tau must be positive"),
        ({"tau": math.nan}, "tau must be positive"),
        ({"gamma": 0.0}, r"gamma must lie in \(0, 1\], got 0"),
        ({"gamma": 1.1}, r"gamma must lie in \(0, 1\]"),
        ({"ref_neg_logps": None}, "DFT needs ref_neg_logps"),
        (
            {"ref_neg_logps": np.zeros((2, 2))},
            r"ref_neg_logps must have shape \(2, 3\)",
        ),
        ({"neg_logps": np.zeros(2)}, r"neg_logps must be \[N, B\]"),
        ({"neg_logps": np.zeros((2, 0))}, "B at least 1"),
        ({"pos_logps": np.zeros(3)}, r"pos_logps must have shape \(2,\)"),
        ({"log_u": np.zeros(1)}, r"log_u must have shape \(2,\)"),
        ({"neg_mask": np.ones((2, 2), bool)}, r"neg_mask must have shape \(2, 3\)"),
        ({"neg_mask": np.ones((2, 3))}, "neg_mask must be boolean"),
        ({"pos_lengths": np.ones(2)}, "pos_lengths was given without neg_lengths"),
        ({"neg_lengths": np.ones((2, 3))}, "neg_lengths was given without pos_lengths"),
        (
            {"pos_lengths": np.ones(2), "neg_lengths": np.ones(2)},
            r"neg_lengths must have shape \(2, 3\)",
        ),
    ],
)
def test_errors(changes, words):
    arguments = {
        "pos_logps": np.zeros(2),
        "neg_logps": np.zeros((2, 3)),
        "log_u": np.zeros(2),
        "tau": 1.0,
        "gamma": 0.5,
        "ref_neg_logps": np.zeros((2, 3)),
    }
    with pytest.raises(ValueError, match=words):
        losses.discriminative(**(arguments | changes))


def test_the_guides_example_runs():
    text = (DOCS / "discriminative.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(block, "discriminative.md", "exec"), names)
    table = np.asarray(names["table"])
    assert np.flatnonzero(table).tolist() == [7, 123]
    # The guide's first example is the second worked value.
    np.testing.assert_allclose(table[7], 0.3795444, rtol=1e-5)
    np.testing.assert_allclose(names["out"].values[0], -2.8090349, rtol=1e-5)


@pytest.mark.slow
def test_the_spread_is_stationary_as_the_figure_says():
    script = runpy.run_path(str(DOCS / "figures" / "discriminative_log_u.py"))
    with jax.enable_x64(True):
        found = script["curves"](examples=4000)
    single = found["γ = 1 / visits"][0]
    for name, gamma in script["CURVES"].items():
        if gamma is None:
            slope = np.polyfit(np.log(np.arange(1, 257)), np.log(found[name]), 1)[0]
            assert slope == pytest.approx(-0.5, abs=0.1)
        else:
            spread = found[name][128:].mean()
            assert spread == pytest.approx(
                single * script["stationary"](gamma), rel=0.1
            )
