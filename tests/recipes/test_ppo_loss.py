"""PPO on joined rows: an independent value, targets by loops, the critic, meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import policy as oracle

from jaxpost import data, models, ops, parallel, recipes, testing, training
from jaxpost.recipes import _ppo_round, _ppo_run, _ppo_terms, _round_rows
from jaxpost.recipes._config import from_mapping
from jaxpost.recipes._policy import KLSection, PolicySection
from jaxpost.recipes._ppo_round import AdvantageSection
from jaxpost.recipes._ppo_terms import CriticSection

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=64,
    tie_embeddings=False,
)
TEMPERATURE, ANSWERS, ROWS, WIDTH = 0.8, 3, 4, 64
POLICY = PolicySection(clip_low=0.2, clip_high=0.3, entropy_coefficient=0.02)
VALUE = CriticSection(clip=0.2, coefficient=0.5)
NO_KL = KLSection()
BOOTSTRAP = AdvantageSection(whiten=False, bootstrap_truncated=True, gamma=0.9)


@functools.cache
def policy(seed=0):
    built = models.build(CONFIG, jax.random.key(seed))
    head = {"kernel": 6.0 * built.params["head"]["kernel"]}
    return built.replace(params=built.params | {"head": head})


@functools.cache
def critic():
    """With a head that is not zero, so that values differ."""
    scored = models.add_score_head(policy(2), jax.random.key(3))
    head = {"kernel": 10.0 * scored.params["score"]["kernel"]}
    return scored.replace(params=scored.params | {"score": head})


def params():
    return policy().params | {"critic": critic().params}


@functools.cache
def texts(rows=ROWS):
    """Prompts, and of each its answers' tokens."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 64, draw.integers(2, 6)) for _ in range(rows)]
    answers = [
        [draw.integers(3, 64, draw.integers(1, 9)) for _ in range(ANSWERS)]
        for _ in prompts
    ]
    return prompts, answers


def rows_of(rows=ROWS):
    """A round's rows before anything is scored; the last answer is not trained on."""
    prompts, answers = texts(rows)
    batch = data.join_samples(prompts, answers, WIDTH)
    ids = _round_rows.answer_ids(batch)
    lengths = np.array([[len(a) for a in row] for row in answers], np.float32)
    batch["loss_mask"][-1] &= ids[-1] != ANSWERS - 1
    lengths[-1, -1] = 0.0
    return batch | {"answer_lengths": lengths}


@functools.cache
def scores(rows=ROWS):
    """What the models say of the rows."""
    held = params() | {"reference": policy(1).params}
    return jax.device_get(score_of()(held, rows_of(rows)))


def batch_of(rows=ROWS, seed=1):
    """A minibatch as the rounds hand it over, after the policy has moved."""
    batch, draw = rows_of(rows), np.random.default_rng(seed)
    scored = scores(rows)
    mask = batch["loss_mask"]

    def noise(scale):
        return np.where(mask, draw.normal(0.0, scale, mask.shape), 0.0)

    old = scored["old_logps"] + noise(0.3)
    found = {
        "old_logps": old,
        "sampling_logps": old + noise(0.01),
        "advantages": noise(1.0),
        "old_values": scored["old_values"] + noise(0.3),
        "returns": noise(1.0),
    }
    batch |= {name: x.astype(np.float32) for name, x in found.items()}
    return batch | _round_rows.loss_weights(
        batch, rows, divide_by="token", max_tokens=16
    )


def score_of(token_logps=ops.linear_token_logps, lookup=None):
    return jax.jit(
        _ppo_round.score_round(
            policy().with_lookup(lookup),
            critic().with_lookup(lookup),
            {"reference": policy(1)},
            temperature=TEMPERATURE,
            token_logps=token_logps,
        )
    )


def loss_of(token_logps=ops.linear_token_logps, lookup=None, policy_=POLICY):
    return _ppo_terms.ppo_loss(
        policy().with_lookup(lookup),
        critic().with_lookup(lookup),
        policy=policy_,
        kl=NO_KL,
        value=VALUE,
        temperature=TEMPERATURE,
        token_logps=token_logps,
    )


@functools.cache
def alone():
    """Of each answer read alone, unpadded, in float64: log-probs at the temperature,
    entropies, values before and after each token; and the reference's log-probs."""
    found = {}
    for row, (prompt, answers) in enumerate(zip(*texts(), strict=True)):
        for number, answer in enumerate(answers):
            tokens = np.concatenate([prompt, answer])[None]
            positions = np.arange(tokens.shape[1])[None]
            of = {}
            for name, model in (("old", policy()), ("reference", policy(1))):
                hidden = decoder_oracle.hidden_states(
                    model.params, CONFIG, tokens, positions
                )
                scores = decoder_oracle.logits(model.params, CONFIG, hidden)[0]
                for kind, temperature in (("", TEMPERATURE), ("_raw", 1.0)):
                    z = scores / temperature
                    top = z.max(axis=-1, keepdims=True)
                    logps = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
                    before = slice(len(prompt) - 1, -1)
                    of[name + kind] = np.array(
                        [x[t] for x, t in zip(logps[before], answer, strict=True)]
                    )
                    if name + kind == "old":
                        of["entropy"] = -(np.exp(logps) * logps).sum(-1)[before]
            hidden = decoder_oracle.hidden_states(
                critic().params, CONFIG, tokens, positions
            )
            values = hidden[0] @ np.asarray(critic().params["score"]["kernel"])[:, 0]
            of["values"] = values[len(prompt) - 1 : -1]
            of["next"] = values[len(prompt) :]
            found[row, number] = of
    return found


def places(batch, row, number):
    ids = np.where(batch["loss_mask"], _round_rows.answer_ids(batch), -1)
    return np.flatnonzero(ids[row] == number)


def kept_answers():
    return [key for key in alone() if key != (ROWS - 1, ANSWERS - 1)]


def test_a_round_is_read_as_each_answer_alone():
    batch = rows_of()
    found = scores()
    names = {
        "old_logps": "old",
        "old_values": "values",
        "next_values": "next",
        "reference_logps": "reference",
        "reference_raw_logps": "reference_raw",
    }
    assert set(found) == set(names)
    for array, name in names.items():
        seen = np.zeros(batch["loss_mask"].shape, bool)
        for key in kept_answers():
            here = places(batch, *key)
            seen[key[0], here] = True
            np.testing.assert_allclose(
                found[array][key[0], here], alone()[key][name], rtol=1e-4, atol=2e-5
            )
        np.testing.assert_array_equal(seen, batch["loss_mask"])
        np.testing.assert_array_equal(found[array][~seen], 0.0)
    assert "reference_logps" in found
    raw = _ppo_round.raw_logps(found, "reference")
    np.testing.assert_array_equal(raw, found["reference_raw_logps"])
    same = {"reference_logps": raw}
    np.testing.assert_array_equal(_ppo_round.raw_logps(same, "reference"), raw)


def test_the_value_is_that_of_float64():
    batch = batch_of()
    output = jax.jit(loss_of())(params(), None, batch, jax.random.key(0))
    wanted = {"policy": 0.0, "value": 0.0, "entropy": 0.0}
    count, moved = 0, 0
    for key in kept_answers():
        of = alone()[key]
        for t, w in enumerate(places(batch, *key)):
            old, gain, old_value, aim = (
                float(batch[n][key[0], w])
                for n in ("old_logps", "advantages", "old_values", "returns")
            )
            sampled = float(batch["sampling_logps"][key[0], w])
            wanted["policy"] += oracle.clipped_policy(
                of["old"][t], old, gain, 0.2, 0.3
            ) * oracle.importance_weight(old, sampled, 2.0)
            wanted["value"] += oracle.clipped_value(
                of["values"][t], old_value, aim, 0.2
            )
            wanted["entropy"] += of["entropy"][t]
            moved += abs(of["values"][t] - old_value) > 0.2
            count += 1
    assert 0 < moved < count
    for name, total in wanted.items():
        term = output.terms[name]
        assert float(term.weight) == count, name
        assert float(term.total) == pytest.approx(total, rel=5e-5, abs=1e-4), name
    assert output.terms["value"].coefficient == 0.5
    assert output.terms["entropy"].coefficient == -0.02

    def mean(name):
        metric = output.metrics[name]
        return float(metric.value / metric.weight)

    assert mean("val/clipfrac_avg") == pytest.approx(moved / count)
    assert mean("policy/clipfrac_avg") == mean("clip_ratio/region_mean")
    assert 0.0 < mean("policy/clipfrac_avg") < 1.0


def total_of(loss_fn, batch, params):
    output = loss_fn(params, None, batch, jax.random.key(0))
    parts = [t.coefficient * t.total / t.weight for t in output.terms.values()]
    return functools.reduce(jnp.add, parts)


@pytest.mark.slow
def test_masked_values_change_nothing_and_each_model_has_its_own_gradient():
    batch = batch_of()
    dirty = dict(batch)
    for name in ("old_logps", "sampling_logps", "advantages", "old_values", "returns"):
        dirty[name] = np.where(batch["loss_mask"], batch[name], np.nan)
    gradient = jax.jit(jax.grad(functools.partial(total_of, loss_of()), argnums=1))
    one, other = gradient(batch, params()), gradient(dirty, params())
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one))
    # Without the value's term the critic has none, and the policy the same.
    silent = batch | {"returns": batch["old_values"]}
    values, _ = _ppo_terms.token_values(critic(), critic().params, batch)
    silent |= {"returns": np.asarray(values), "old_values": np.asarray(values)}
    alone_ = gradient(silent, params())
    for leaf in jax.tree.leaves(alone_["critic"]):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-6)
    for name in policy().params:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
            alone_[name],
            one[name],
        )


def test_no_entropy_is_computed_without_its_coefficient():
    found = []

    def watched(*arguments, **options):
        found.append(options["with_entropy"])
        return ops.linear_token_logps(*arguments, **options)

    for coefficient in (0.0, 0.1):
        section = PolicySection(entropy_coefficient=coefficient)
        loss = functools.partial(loss_of(watched, policy_=section), method_state=None)
        batch = batch_of()
        output = jax.eval_shape(
            lambda p, loss=loss, b=batch: loss(p, batch=b, key=jax.random.key(0)),
            params(),
        )
        assert ("entropy" in output.terms) == (coefficient > 0.0)
    assert found == [False, True]


def loop_targets(batch, rewards, truncated, section, kl, at_end):
    """Answer by answer, in float64."""
    shape = batch["loss_mask"].shape
    found = np.zeros((2, *shape))
    for row in range(len(batch["tokens"])):
        for number in range(ANSWERS):
            here = places(batch, row, number)
            if not len(here):
                continue
            cut = truncated[row, number]
            earned = np.zeros(len(here)) if at_end else rewards[row, here].copy()
            if at_end and not (cut and section.bootstrap_truncated):
                earned[-1] += rewards[row, number]
            if cut:
                earned[-1] -= section.missing_eos_penalty
            ratio = batch["old_logps"][row, here] - batch["ref_logps"][row, here]
            if kl.in_reward:
                earned -= kl.in_reward * (
                    ratio if kl.kind == "k1" else np.exp(-ratio) - 1.0 + ratio
                )
            after = batch["next_values"][row, here[-1]]
            bootstrap = after if cut and section.bootstrap_truncated else 0.0
            one = np.ones((1, len(here)), bool)
            found[:, row, here] = np.concatenate(
                oracle.gae(
                    earned[None],
                    batch["old_values"][row, here][None],
                    one,
                    ~one,
                    [bootstrap],
                    section.gamma,
                    section.gae_lambda,
                )
            )
    return found


@pytest.mark.parametrize(
    ("section", "kl", "at_end"),
    [
        (AdvantageSection(whiten=False, gamma=0.9), KLSection(in_reward=0.3), True),
        (AdvantageSection(missing_eos_penalty=2.0, gae_lambda=0.7), NO_KL, False),
        (BOOTSTRAP, KLSection(in_reward=0.1, estimator="k3"), True),
        pytest.param(BOOTSTRAP, NO_KL, False, marks=pytest.mark.slow),
    ],
    ids=["kl", "whitened-token", "bootstrap", "bootstrap-token"],
)
def test_targets_are_those_of_a_loop_over_answers(section, kl, at_end):
    batch, draw = rows_of(), np.random.default_rng(5)
    shape = batch["loss_mask"].shape
    for name in ("old_logps", "ref_logps", "old_values", "next_values"):
        batch[name] = draw.normal(size=shape).astype(np.float32)
    truncated = draw.random((ROWS, ANSWERS)) < 0.5
    assert truncated.any()
    assert not truncated.all()
    rewards = draw.normal(size=(ROWS, ANSWERS) if at_end else shape)
    read = {n: x for n, x in batch.items() if n not in ("tokens", "positions")}
    found = _ppo_round.targets_of(
        read,
        rewards.astype(np.float32),
        truncated,
        section=section,
        kl=kl,
        at_end=at_end,
    )
    gains, returns = loop_targets(batch, rewards, truncated, section, kl, at_end)
    if section.whiten:
        gains = oracle.whiten(gains, batch["loss_mask"], 1, 1e-8)
    np.testing.assert_allclose(found.advantages, gains, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-4, atol=1e-5)
    # What masked places hold, even NaN, changes nothing.
    dirty = dict(read)
    for name in ("old_logps", "ref_logps", "old_values", "next_values"):
        dirty[name] = np.where(batch["loss_mask"], batch[name], np.nan)
    again = _ppo_round.targets_of(
        dirty,
        rewards.astype(np.float32),
        truncated,
        section=section,
        kl=kl,
        at_end=at_end,
    )
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_a_round_is_finished_with_the_numbers_of_trl_by_hand():
    """Two answers of a row, one token and two, and nothing else."""
    batch = data.join_samples([[5, 6]], [[[7], [8, 9]]], WIDTH)
    mask = batch["loss_mask"]
    logps, ref = np.zeros(mask.shape), np.zeros(mask.shape)
    logps[mask], ref[mask] = [-1.0, -2.0, -3.0], [-1.5, -2.5, -2.0]
    zeros = np.zeros(mask.shape, np.float32)
    batch |= {
        "old_logps": logps.astype(np.float32),
        "reference_logps": ref.astype(np.float32),
        "old_values": zeros,
        "next_values": zeros,
        "sampling_logps": zeros,
        "answer_lengths": np.array([[1.0, 2.0]], np.float32),
    }
    played = _round_rows.Played(
        prompts=[None],  # pyright: ignore[reportArgumentType]
        answers=[],
        texts=[],
        lengths=np.array([[1, 2]]),
        truncated=np.array([[False, True]]),
        rewards=np.array([[1.0, 3.0]]),
        given=np.ones((1, 2), bool),
        numbers={},
        parts={},
    )
    finish = _ppo_round.finish_round(
        _ppo_round.judged,
        reference="reference",
        advantage=AdvantageSection(
            whiten=False, gae_lambda=1.0, missing_eos_penalty=0.5
        ),
        kl=KLSection(in_reward=0.2),
        divide_by="sequence",
        max_tokens=4,
    )
    done = finish(played, dict(batch))
    # Log-ratios .5 and (.5, -1): sums .5 and -.5, times .2 off the rewards 1 and 2.5.
    np.testing.assert_allclose(done.batch["returns"][mask], [0.9, 2.6, 2.7], rtol=1e-6)
    np.testing.assert_allclose(done.batch["loss_weights"][mask], [1.0, 0.5, 0.5])
    assert done.batch["loss_counts"].tolist() == [2.0]
    assert "reference_logps" not in done.batch
    assert "next_values" not in done.batch
    numbers = done.numbers
    assert numbers["objective/kl"] == pytest.approx(0.0, abs=1e-7)
    assert numbers["objective/entropy"] == pytest.approx((1.0 + 5.0) / 2)
    assert numbers["objective/scores"] == pytest.approx((1.0 + 2.5) / 2)
    assert numbers["objective/rlhf_reward"] == pytest.approx(1.75)
    assert numbers["reward_std"] == pytest.approx(0.75)
    assert numbers["val/num_eos_tokens"] == 1.0
    spread = np.var([0.9, 2.6, 2.7])
    unseen = np.var(np.array([0.9, 2.6, 2.7]) - 0.0)
    assert numbers["val/explained_variance"] == pytest.approx(1.0 - unseen / spread)
    np.testing.assert_array_equal(done.rewards, [[1.0, 3.0]])


def test_two_learning_rates():
    config = training.OptimizerConfig(
        name="sgd", b1=0.0, learning_rate=0.1, schedule="constant", clip_norm=1.0
    )
    start = {"layers": jnp.ones(4), "critic": {"layers": jnp.ones(4)}}
    grads = {"layers": jnp.full(4, 0.1), "critic": {"layers": jnp.full(4, 5.0)}}
    for rate, moved in ((0.5, 0.5), (None, 0.1)):
        tx = _ppo_run.two_rates(config, 10, critic_rate=rate)
        updates, _ = tx.update(grads, tx.init(start), start)
        # The critic's gradient, of norm 10, is clipped alone.
        np.testing.assert_allclose(updates["layers"], -0.1 * 0.1, rtol=1e-6)
        np.testing.assert_allclose(updates["critic"]["layers"], -moved * 0.5, rtol=1e-6)


MESHES = (testing.MESHES[0], testing.MESHES[2])


def step_and_state(token_logps=ops.linear_token_logps, lookup=None):
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    step = training.make_train_step(loss_of(token_logps, lookup), tx, accumulate=2)
    return step, training.init_state(params(), tx, jax.random.key(1))


@pytest.mark.slow  # as the other tests of whole models on eight devices
def test_the_step_and_the_scores_are_the_same_on_four_by_two_devices():
    batch = batch_of(8)
    step, state = step_and_state()
    mesh = parallel.make_mesh(MESHES[1])
    split = parallel.split_vocabulary(ops.linear_token_logps, mesh)
    lookup = parallel.split_lookup(mesh)
    split_step, _ = step_and_state(split, lookup)
    axes = models.param_axes(CONFIG)
    placement = parallel.shardings(axes, mesh)
    held = parallel.shardings_like(state, policy().params, placement)
    placed = parallel.place(state, held)
    rows = parallel.place(batch, parallel.batch_sharding(mesh))
    wanted, metrics = jax.jit(step)(state, batch)
    found, split_metrics = jax.jit(split_step)(placed, rows)
    for name, value in metrics.items():
        assert float(split_metrics[name]) == pytest.approx(
            float(value), rel=1e-4, abs=1e-6
        ), name
    for old, new in zip(
        jax.tree.leaves(wanted.params), jax.tree.leaves(found.params), strict=True
    ):
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())
    reference = {"reference": policy(1).params}
    held = parallel.shardings_like(params() | reference, policy().params, placement)
    placed = parallel.place(params() | reference, held)
    again = score_of(split, lookup)(
        placed, parallel.place(rows_of(8), parallel.batch_sharding(mesh))
    )
    for name, value in scores(8).items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_mesh_kit_of_ppo():
    step, state = step_and_state()
    axes = models.param_axes(CONFIG)
    testing.assert_mesh_invariant(
        step,
        state,
        batch_of(16),
        MESHES,
        axes=axes | {"critic": models.param_axes(critic().config)},
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdvantageSection(gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (
            lambda: AdvantageSection(missing_eos_penalty=-1.0),
            "missing_eos_penalty must",
        ),
        (
            lambda: AdvantageSection(bootstrap_truncated=True, missing_eos_penalty=1.0),
            "choose one",
        ),
        (lambda: CriticSection(clip=0.0), "clip must be positive and finite"),
        (
            lambda: CriticSection(learning_rate=math.inf),
            "learning_rate must be positive",
        ),
        (lambda: CriticSection(coefficient=0.0), "the critic learns nothing"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("recipe", ["ppo", "self_rewarding_ppo"])
def test_a_section_given_in_part_keeps_the_defaults_of_ppo(recipe):
    values = {
        "recipe": recipe,
        "rollout": {"max_new_tokens": 9},
        "kl": {"estimator": "k3"},
        "optimizer": {"schedule": "constant"},
    }
    config = from_mapping(recipes.config_type(values, None), values)
    assert (config.rollout.samples, config.rollout.epochs) == (1, 4)
    assert config.kl.in_reward == 0.05
    assert config.optimizer.learning_rate == 5e-7
    assert config.critic.learning_rate == 9e-6
