"""The linear probe against a NumPy loop, its three selection rules, and its errors."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import probe as oracle

from jaxpost import evaluation
from jaxpost.evaluation import ProbeConfig, linear_probe

N, D, CLASSES, EPOCHS = 60, 5, 3, 60


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    centres = rng.normal(size=(CLASSES, D))
    x = (centres[labels] + 1.2 * rng.normal(size=(N, D))).astype(np.float32)
    masks = [np.arange(N) // 20 == part for part in range(3)]
    return types.SimpleNamespace(x=x, labels=labels, masks=tuple(masks))


CONFIG = ProbeConfig(learning_rate=0.05, weight_decay=1e-2, epochs=EPOCHS)


@pytest.fixture(scope="module")
def result(task):
    key = jax.random.key(3)
    return linear_probe(task.x, task.labels, task.masks, config=CONFIG, key=key)


@pytest.fixture(scope="module")
def history(task):
    """Validation and test accuracies of the NumPy loop from the same first weights."""
    key = jax.random.fold_in(jax.random.key(3), 0)
    weight = np.asarray(jax.nn.initializers.glorot_uniform()(key, (D, CLASSES)))
    split = [np.nonzero(mask)[0] for mask in task.masks]
    return oracle.linear_probe(
        task.x.astype(np.float64),
        task.labels,
        split,
        weight,
        learning_rate=CONFIG.learning_rate,
        weight_decay=CONFIG.weight_decay,
        epochs=EPOCHS,
    )


def test_equals_the_numpy_loop(result, history):
    validation, test = history
    clean, published, epoch = oracle.choose(validation, test)
    assert len(set(test)) > 3  # the epochs differ, so choosing matters
    np.testing.assert_allclose(result.validation, validation.max(), rtol=1e-6)
    assert int(result.epoch) == epoch
    np.testing.assert_allclose(result.clean, clean, rtol=1e-6)
    np.testing.assert_allclose(result.optimistic, published, rtol=1e-6)
    np.testing.assert_allclose(result.last, test[-1], rtol=1e-6)
    assert float(result.accuracy) == float(result.clean)


def test_published_rule_is_never_below_the_clean_one(result):
    assert float(result.optimistic) >= float(result.clean)
    rng = np.random.default_rng(1)
    gaps = []
    for _ in range(50):
        validation, test = rng.integers(0, 4, (2, 20)) / 4.0
        clean, published, _ = oracle.choose(validation, test)
        gaps.append(published - clean)
    assert min(gaps) >= 0.0
    assert max(gaps) > 0.0


@pytest.mark.parametrize(
    ("select", "field"), [("repo", "optimistic"), ("last", "last")]
)
def test_select_names_what_is_reported(task, result, select, field):
    config = ProbeConfig(0.05, 1e-2, EPOCHS, select)
    found = linear_probe(
        task.x, task.labels, task.masks, config=config, key=jax.random.key(3)
    )
    assert float(found.accuracy) == float(getattr(result, field))


def test_test_labels_change_nothing_but_test_accuracy(task, result):
    """What is chosen is chosen without the test nodes."""
    labels = np.where(task.masks[2], 0, task.labels)
    found = linear_probe(
        task.x, labels, task.masks, config=CONFIG, key=jax.random.key(3)
    )
    assert int(found.epoch) == int(result.epoch)
    assert float(found.validation) == float(result.validation)
    assert float(found.train_loss) == float(result.train_loss)
    assert float(found.clean) != float(result.clean)


def test_seeds_side_by_side_equal_one_by_one(task, result):
    rng = np.random.default_rng(5)
    stacked = jnp.stack([task.x, task.x + rng.normal(size=(N, D)).astype(np.float32)])
    both = linear_probe(
        stacked, task.labels, task.masks, config=CONFIG, key=jax.random.key(3)
    )
    assert both.accuracy.shape == (2,)
    beside = linear_probe(
        stacked,
        task.labels,
        task.masks,
        config=CONFIG,
        at_once=2,
        key=jax.random.key(3),
    )
    np.testing.assert_array_equal(beside.clean, both.clean)
    np.testing.assert_allclose(beside.train_loss, both.train_loss, rtol=1e-5)
    assert float(both.clean[0]) == float(result.clean)
    np.testing.assert_allclose(both.train_loss[0], result.train_loss, rtol=1e-5)
    # Splits of their own, the first seed's as before.
    order = rng.permutation(N)
    own = [np.stack([mask, mask[order]]) for mask in task.masks]
    found = linear_probe(
        stacked, task.labels, tuple(own), config=CONFIG, key=jax.random.key(3)
    )
    assert float(found.clean[0]) == float(result.clean)
    np.testing.assert_allclose(found.train_loss[0], result.train_loss, rtol=1e-5)
    assert float(found.train_loss[1]) != pytest.approx(float(both.train_loss[1]))


def spoiled(task, **changes):
    """The arguments of `linear_probe` with some of them wrong."""
    held = {"x": task.x, "labels": task.labels, "masks": task.masks} | changes
    return held["x"], held["labels"], held["masks"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"labels": np.eye(CLASSES)[t.labels]}, r"one-hot.*argmax"),
        (lambda t: {"labels": t.labels.astype(float)}, r"integers, got float64"),
        (lambda t: {"labels": t.labels[:-1]}, r"each of 60 nodes, got shape \[59\]"),
        (
            lambda t: {"labels": np.where(np.arange(N) == 7, -1, t.labels)},
            r"train node 7 has no label",
        ),
        (
            lambda t: {"masks": (t.masks[0] | (np.arange(N) == 45), *t.masks[1:])},
            r"train and test share 1 nodes.*node 45",
        ),
        (
            lambda t: {"masks": (*t.masks[:2], np.zeros(N, bool))},
            r"test mask is empty",
        ),
        (
            lambda t: {"masks": (np.arange(N), *t.masks[1:])},
            r"train mask must be bool \[60\]",
        ),
        (lambda t: {"masks": t.masks[:2]}, r"got 2"),
        (
            lambda t: {"masks": (t.masks[0] & (t.labels != 1), *t.masks[1:])},
            r"class 1 is missing from the training nodes",
        ),
        (
            lambda t: {
                "x": np.where(np.arange(N * D).reshape(N, D) == 12, np.nan, t.x)
            },
            r"embedding \[2, 2\] of seed 0 is not finite",
        ),
    ],
)
def test_errors_name_what_is_wrong(task, change, words):
    with pytest.raises(ValueError, match=words):
        linear_probe(*spoiled(task, **change(task)), key=jax.random.key(0))


def test_seeds_need_equally_many_nodes(task):
    masks = [np.stack([mask, mask]) for mask in task.masks]
    masks[1][1, 25] = False
    with pytest.raises(ValueError, match=r"equally many validation nodes.*19 to 20"):
        linear_probe(
            np.stack([task.x] * 2), task.labels, tuple(masks), key=jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"epochs": 0}, "epochs"),
        ({"select": "best"}, "validation, repo or last"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        ProbeConfig(**settings)


def test_logistic_fit_is_a_stationary_point():
    """The gradient of a NumPy loop vanishes at the weights, for weak and strong C."""
    from jaxpost.evaluation import _logistic

    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 4)).astype(np.float32)
    sign = np.where(x[:, 0] + 0.5 * rng.normal(size=30) > 0, 1.0, -1.0)
    for strength in (2.0**-10, 1.0, 2.0**9):
        weights = np.asarray(
            _logistic._fit(
                x, sign[:, None].astype(np.float32), np.ones(30, np.float32), strength
            )
        )[:, 0]
        grad = oracle.logistic_gradient(weights, x, sign, strength)
        assert np.abs(grad).max() < 2e-5 * max(1.0, strength * 30)
        assert np.abs(weights).max() > 0


def test_grace_protocol_learns_and_is_repeatable():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 150)
    easy = np.eye(3, 8)[labels] + 0.1 * rng.normal(size=(150, 8))
    found = evaluation.logistic_probe(easy.astype(np.float32), labels, repeats=2)
    assert (found.micro_f1 > 0.98).all()
    assert (found.macro_f1 > 0.98).all()
    assert found.strength.shape == (2,)
    noise = rng.normal(size=(150, 8)).astype(np.float32)
    chance = evaluation.logistic_probe(noise, labels, repeats=2)
    assert (chance.micro_f1 < 0.55).all()
    again = evaluation.logistic_probe(noise, labels, repeats=2)
    np.testing.assert_array_equal(chance.micro_f1, again.micro_f1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 0.05}, "gives 3 to train on"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_grace_protocol_checks_settings(settings, words):
    labels = np.arange(60) % 2
    with pytest.raises(ValueError, match=words):
        evaluation.logistic_probe(np.ones((60, 2), np.float32), labels, **settings)


def test_f1_of_a_hand_made_case():
    from jaxpost.evaluation._logistic import f1_scores

    micro, macro = f1_scores(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3)
    assert micro == pytest.approx(3 / 4)
    # Class 0: precision 1, recall 1/2; class 1: 2/3 and 1; class 2 is not there.
    assert macro == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_indices_equal_counting_pairs():
    rng = np.random.default_rng(6)
    for _ in range(20):
        first, second = rng.integers(0, 4, (2, 15)).tolist()
        ari = evaluation.adjusted_rand_index(first, second)
        assert ari == pytest.approx(oracle.adjusted_rand(first, second), abs=1e-12)
        nmi = evaluation.normalized_mutual_information(first, second)
        assert nmi == pytest.approx(oracle.mutual_information(first, second), abs=1e-9)


def test_indices_do_not_depend_on_names():
    first = [0, 0, 1, 1, 2, 2, 2]
    for names in itertools.permutations(range(3)):
        second = [names[x] for x in first]
        assert evaluation.adjusted_rand_index(first, second) == pytest.approx(1.0)
        nmi = evaluation.normalized_mutual_information(first, second)
        assert nmi == pytest.approx(1.0)
    assert evaluation.normalized_mutual_information([0, 0], [1, 1]) == 1.0
    assert evaluation.adjusted_rand_index([0, 1], [0, 1]) == 1.0
    with pytest.raises(ValueError, match="equal length"):
        evaluation.adjusted_rand_index([0, 1], [0])
    with pytest.raises(ValueError, match="equal length"):
        evaluation.normalized_mutual_information([], [])


def test_kmeans_finds_separate_clouds():
    rng = np.random.default_rng(7)
    labels = np.arange(60) % 3
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    points = centres[labels] + rng.normal(size=(60, 2))
    points = jnp.asarray(points, jnp.float32)
    found = evaluation.kmeans(points, count=3, restarts=4, key=jax.random.key(0))
    assert evaluation.adjusted_rand_index(labels, np.asarray(found.clusters)) == 1.0
    means = [np.asarray(points)[labels == k].mean(axis=0) for k in range(3)]
    inertia = sum(
        ((np.asarray(points)[labels == k] - means[k]) ** 2).sum() for k in range(3)
    )
    np.testing.assert_allclose(found.inertia, inertia, rtol=1e-4)
    with pytest.raises(ValueError, match=r"1\.\.60"):
        evaluation.kmeans(points, count=61, key=jax.random.key(0))


def test_kmeans_with_repeated_points():
    """As many clusters as points, most of them the same: nothing is NaN."""
    points = jnp.zeros((4, 2))
    found = evaluation.kmeans(points, count=4, restarts=2, key=jax.random.key(0))
    assert np.isfinite(np.asarray(found.centres)).all()
    assert float(found.inertia) == 0.0
