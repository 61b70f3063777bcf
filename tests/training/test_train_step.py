"""One optimizer step: exact accumulation, metrics, state, failure, shardings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regression

from jaxpost import training
from jaxpost.typing import LossOutput, Metric, Term

KEY = jax.random.key(0)


def run_step(accumulate, batch, params, *, loss=regression.loss_fn, **options):
    tx = optax.sgd(1.0)
    state = training.init_state(
        params, tx, KEY, method_state=options.pop("method_state", None)
    )
    step = training.make_train_step(loss, tx, accumulate=accumulate, **options)
    return state, *jax.jit(step)(state, batch)


def gradient(before, after):
    """What plain SGD with rate 1 subtracted."""
    return jax.tree.map(lambda a, b: np.asarray(a - b), before.params, after.params)


@pytest.mark.parametrize("accumulate", [1, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-12)]
)
def test_gradient_is_that_of_the_whole_batch(accumulate, dtype, tolerance):
    with jax.enable_x64(dtype is np.float64):
        batch = regression.make_batch(dtype=dtype)
        params = regression.make_params(dtype=dtype)
        loss, terms, grads = regression.oracle(params, batch)
        before, after, metrics = run_step(accumulate, batch, params)
        chex.assert_trees_all_close(
            gradient(before, after), grads, rtol=tolerance, atol=tolerance
        )
        norm = np.sqrt(np.sum(grads["kernel"] ** 2) + grads["bias"] ** 2)
        expected = {
            "loss": loss,
            "loss/square": terms["square"],
            "loss/size": terms["size"],
            "grad_norm": norm,
        }
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5), name
        chex.assert_type(list(metrics.values()), jnp.float32)
        chex.assert_shape(list(metrics.values()), ())
        assert int(after.step) == 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_metrics_are_reduced_by_kind(accumulate):
    batch, params = regression.make_batch(), regression.make_params()
    _, _, metrics = run_step(accumulate, batch, params)
    predicted = batch["x"] @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    error = np.abs(predicted - batch["y"])
    squares = error[batch["mask"]] ** 2
    assert metrics["error_mean"] == pytest.approx(squares.mean(), rel=1e-5)
    assert metrics["error_sum"] == pytest.approx(squares.sum(), rel=1e-5)
    assert metrics["error_max"] == pytest.approx(error.max(), rel=1e-5)
    assert metrics["error_min"] == pytest.approx(error.min(), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_masked_rows_change_nothing_even_if_nan(accumulate):
    batch, params = regression.make_batch(), regression.make_params()
    batch["mask"] &= np.arange(16) > 5
    batch["mask"][9] = False
    spoilt = {**batch, "y": np.where(batch["mask"], batch["y"], np.nan)}

    def loss(params, method_state, batch, key):
        clean = {**batch, "y": jnp.where(batch["mask"], batch["y"], 0.0)}
        output = regression.loss_fn(params, method_state, clean, key)
        return output._replace(metrics={})

    chex.assert_trees_all_equal(
        run_step(accumulate, batch, params, loss=loss)[1:],
        run_step(accumulate, spoilt, params, loss=loss)[1:],
    )


def test_a_term_without_weight_counts_as_zero():
    batch, params = regression.make_batch(), regression.make_params()
    batch["rare"] = np.zeros(16, bool)
    before, after, metrics = run_step(4, batch, params)
    assert metrics["loss/size"] == 0.0
    assert metrics["nonfinite"] == 0.0
    assert np.isfinite(gradient(before, after)["kernel"]).all()


def test_method_state_passes_through_microbatches_in_order():
    def loss(params, method_state, batch, key):
        del key
        total = jnp.sum(params["kernel"]) * jnp.sum(batch["x"])
        seen = 10.0 * method_state + batch["x"][0, 0]
        return LossOutput({"a": Term(total, jnp.float32(1))}, {}, seen)

    batch = {"x": np.asarray([[1.0], [2.0], [3.0]], np.float32)}
    params = {"kernel": jnp.ones(1)}
    start = jnp.float32(0)
    _, after, _ = run_step(3, batch, params, loss=loss, method_state=start)
    assert float(after.method_state) == 123.0


def test_each_microbatch_has_its_own_key_and_each_step_too():
    def loss(params, method_state, batch, key):
        noise = jax.random.uniform(key)
        total = params["kernel"].sum() * batch["x"].sum()
        metrics = {
            "low": Metric(noise, kind="min"),
            "high": Metric(noise, kind="max"),
        }
        return LossOutput({"a": Term(total, jnp.float32(1))}, metrics, method_state)

    batch = {"x": np.ones((2, 1), np.float32)}
    before, after, first = run_step(2, batch, {"kernel": jnp.ones(1)}, loss=loss)
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), index) for index in (0, 1)]
    draws = [float(jax.random.uniform(key)) for key in keys]
    assert float(first["low"]) == min(draws)
    assert float(first["high"]) == max(draws)
    step = training.make_train_step(loss, optax.sgd(1.0), accumulate=2)
    _, second = jax.jit(step)(after, batch)
    assert float(second["low"]) != float(first["low"])
    assert jnp.array_equal(
        jax.random.key_data(before.key), jax.random.key_data(after.key)
    )


def test_microbatches_interleave_rows():
    def loss(params, method_state, batch, key):
        del key
        first = batch["x"][0]
        return LossOutput(
            {"a": Term(params["kernel"] * 0.0, jnp.float32(1))},
            {"first": Metric(first, kind="max")},
            method_state,
        )

    batch = {"x": np.arange(6, dtype=np.float32)}
    _, _, metrics = run_step(3, batch, {"kernel": jnp.float32(1)}, loss=loss)
    assert metrics["first"] == 2.0  # rows 0::3, 1::3, 2::3


def test_moving_average_follows_the_weights():
    tx = optax.sgd(1.0)
    params = regression.make_params()
    state = training.init_state(params, tx, KEY, ema=True)
    step = training.make_train_step(regression.loss_fn, tx, ema_decay=0.75)
    after, _ = jax.jit(step)(state, regression.make_batch())
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params, after.params)
    chex.assert_trees_all_close(after.ema, expected, rtol=1e-6)


def test_master_weights_are_float32_and_the_callers_survive_donation():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3), "n": jnp.arange(3)}
    tx = optax.identity()
    state = training.init_state(params, tx, KEY, ema=True)
    chex.assert_type([state.params["a"], state.ema["a"]], jnp.float32)
    assert state.params["n"].dtype == jnp.int32
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(
        state._replace(key=None)
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_bad_step_changes_nothing_and_names_the_tensor(accumulate):
    batch, params = regression.make_batch(), regression.make_params()
    batch["y"][np.argmax(batch["mask"])] = np.inf
    before, after, metrics = run_step(accumulate, batch, params)
    chex.assert_trees_all_equal(before._replace(key=0), after._replace(key=0))
    code = float(metrics["nonfinite"])
    named = training.describe_nonfinite(code, params, ["square", "size"])
    assert named == "loss term 'square'"


def test_a_bad_gradient_is_named_where_the_loss_is_finite():
    def loss(params, method_state, batch, key):
        del key
        # The square root has an infinite slope at 0, times 0 from the inner function.
        total = params["fine"] + jnp.sqrt(params["kernel"] ** 2) * batch["x"][0]
        return LossOutput({"a": Term(total, jnp.float32(1))}, {}, method_state)

    params = {"fine": jnp.float32(1), "kernel": jnp.float32(0)}
    _, _, metrics = run_step(1, {"x": np.ones(1, np.float32)}, params, loss=loss)
    assert np.isfinite(metrics["loss"])
    named = training.describe_nonfinite(float(metrics["nonfinite"]), params, ["a"])
    assert named == "gradient of 'kernel'"
    assert training.describe_nonfinite(0.0, params, ["a"]) is None


def test_weights_pass_costs_no_second_forward():
    def loss(params, method_state, batch, key):
        del key
        hidden, _ = jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), batch["x"], params["layers"]
        )
        mask = batch["mask"][:, None]
        total = jnp.sum(jnp.where(mask, hidden**2, 0.0))
        return LossOutput({"a": Term(total, jnp.sum(mask, dtype=jnp.float32))})

    params = {"layers": jnp.ones((3, 8, 8))}
    batch = {"x": np.ones((8, 8), np.float32), "mask": np.ones(8, bool)}

    def dots(accumulate):
        tx = optax.sgd(1.0)
        state = training.init_state(params, tx, KEY)
        step = training.make_train_step(loss, tx, accumulate=accumulate)
        return jax.jit(step).lower(state, batch).compile().as_text().count(" dot(")

    plain = jax.jit(
        jax.grad(lambda p: loss(p, None, batch, KEY).terms["a"].total)
    ).lower(params)
    assert dots(1) == dots(4) == plain.compile().as_text().count(" dot(")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch, params = regression.make_batch(rows=32), regression.make_params()
    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    _, one, metrics = run_step(accumulate, batch, params)
    _, many, sharded_metrics = run_step(accumulate, sharded, params)
    chex.assert_trees_all_close(one.params, many.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, sharded_metrics, rtol=1e-5, atol=1e-6)


def test_microbatches_of_a_sharded_batch_move_no_rows():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.device_put(regression.make_batch(rows=32), sharding)
    tx = optax.sgd(1.0)
    state = training.init_state(regression.make_params(), tx, KEY)
    step = training.make_train_step(regression.loss_fn, tx, accumulate=4)
    text = jax.jit(step).lower(state, batch).compile().as_text()
    assert "all-reduce" in text
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {operation}(" not in text, operation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        training.make_train_step(regression.loss_fn, optax.sgd(1.0), **options)


def test_errors_while_tracing():
    batch, params = regression.make_batch(), regression.make_params()

    def change(**fields):
        def loss(*arguments):
            return regression.loss_fn(*arguments)._replace(**fields)

        return loss

    one = jnp.float32(1)
    with pytest.raises(ValueError, match=r"'mask'.*accumulate=3"):
        run_step(3, {"mask": batch["mask"]}, params)
    with pytest.raises(ValueError, match="no terms"):
        run_step(1, batch, params, loss=change(terms={}))
    with pytest.raises(ValueError, match="method_state with the structure"):
        run_step(1, batch, params, loss=change(method_state=None), method_state=one)
    with pytest.raises(ValueError, match=r"\['loss/mine'\]"):
        run_step(1, batch, params, loss=change(metrics={"loss/mine": Metric(one)}))
    with pytest.raises(ValueError, match=r"init_state\(ema=True\)"):
        run_step(1, batch, params, ema_decay=0.9)
