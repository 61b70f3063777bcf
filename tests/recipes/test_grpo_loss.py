"""GRPO's loss on joined rows: an independent value, layouts, weights, meshes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import decoder as decoder_oracle
from oracles import policy as oracle

from jaxpost import data, generation, models, testing, training
from jaxpost.recipes import _policy, _round_rows, _row_plan, grpo
from jaxpost.recipes._policy import KLSection, PolicySection
from jaxpost.typing import BRANCH

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=32,
    tie_embeddings=False,
)
PROMPTS, SAMPLES, LONGEST = 4, 4, 6
TEMPERATURE = 0.8
NO_KL = KLSection()


@functools.cache
def model(seed=0):
    built = models.build(CONFIG, jax.random.key(seed))
    head = {"kernel": 6.0 * built.params["head"]["kernel"]}
    return built.replace(params=built.params | {"head": head})


def round_of(seed=0):
    """Random answers with rewards, one of them cut off and one without verdict."""
    rng = np.random.default_rng(seed)
    prompts, answers = [], []
    for number in range(PROMPTS):
        tokens = rng.integers(3, 48, rng.integers(2, 6)).astype(np.int32)
        prompts.append(data.Prompt(number, tokens, {}))
        for sample in range(SAMPLES):
            length = rng.integers(1, LONGEST + 1)
            logps = rng.uniform(-4, -1, length).astype(np.float32)
            answers.append(
                generation.Finished(
                    prompt=number,
                    sample=sample,
                    tokens=rng.integers(3, 48, length).astype(np.int32),
                    logps=logps,
                    sampling_logps=logps,
                    entropies=np.ones(length, np.float32),
                    finish_reason="length" if len(answers) == 2 else "stop",
                    near=0,
                )
            )
    shape = (PROMPTS, SAMPLES)
    given = np.ones(shape, bool)
    given[1, 2] = False
    return _round_rows.Played(
        prompts=prompts,
        answers=answers,
        texts=[""] * len(answers),
        lengths=np.array([len(a.tokens) for a in answers]).reshape(shape),
        truncated=np.array([a.finish_reason == "length" for a in answers]).reshape(
            shape
        ),
        rewards=np.where(given, rng.uniform(0, 1, shape).round(1), 0.0),
        given=given,
        numbers={},
        parts={},
    )


def batch_of(played, *, per_row=2, align=1, mask_truncated=False, **policy):
    """What the loss reads; the policy at the time was another model."""
    section = PolicySection(**policy)
    plan = _row_plan.Plan(per_row, (32,), align)
    batch = _round_rows.rows_of(played, plan, 0, mask_truncated)
    stats = _stats(1, batch)
    batch["old_logps"] = np.where(batch["loss_mask"], stats, 0.0).astype(np.float32)
    config = grpo.GRPOConfig(policy=section)
    return grpo.group_advantages(config)(played, batch).batch


@functools.cache
def _scoring():
    decoder = model()  # not made while tracing
    return jax.jit(
        lambda params, batch: _policy.token_stats(
            decoder, params, batch, temperature=TEMPERATURE, with_entropy=True
        )
    )


def _stats(seed, batch, name="logps"):
    return np.asarray(getattr(_scoring()(model(seed).params, batch), name))


@functools.cache
def oracle_logps(seed):
    """Each answer alone, unpadded, in float64: one list of log-probs per answer."""
    played, found = round_of(), []
    for place, answer in enumerate(played.answers):
        prompt = played.prompts[place // SAMPLES].tokens
        tokens = np.concatenate([prompt, answer.tokens])[None]
        hidden = decoder_oracle.hidden_states(
            model(seed).params, CONFIG, tokens, np.arange(tokens.shape[1])[None]
        )
        rows = decoder_oracle.logits(model(seed).params, CONFIG, hidden)[0]
        rows = rows / TEMPERATURE
        rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        places = range(len(prompt), tokens.shape[1])
        found.append([rows[t - 1, tokens[0, t]] for t in places])
    return found


def loss_of(batch, *, kl=NO_KL, **policy):
    """`((loss, output), gradients)`; what divides is in the batch already."""
    policy["divide_by"] = "sequence"
    return compiled(PolicySection(**policy), kl)(model().params, batch)


@functools.cache
def compiled(policy, kl):
    loss_fn = grpo.grpo_loss(model(), policy, kl, temperature=TEMPERATURE)

    def total(params, batch):
        output = loss_fn(params, None, batch, jax.random.key(0))
        parts = [t.coefficient * t.total / t.weight for t in output.terms.values()]
        return sum(parts), output

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize(("per_row", "align"), [(1, 1), (2, 1), (4, 1), (2, 8)])
def test_each_answer_is_read_as_if_alone(per_row, align):
    played = round_of()._replace(given=np.ones((PROMPTS, SAMPLES), bool))
    batch = _round_rows.rows_of(played, _row_plan.Plan(per_row, (32,), align), 0, False)
    starts = np.flatnonzero(np.diff(batch["segment_ids"] // BRANCH, prepend=0) > 0)
    assert align == 1 or np.all(starts % 32 % align == 0)
    found = _stats(0, batch)
    ids = _round_rows.answer_ids(batch)
    for place, wanted in enumerate(oracle_logps(0)):
        row, answer = divmod(place, per_row)
        here = found[row][ids[row] == answer]
        np.testing.assert_allclose(here, wanted, atol=2e-5)


@pytest.mark.parametrize("per_row", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("divide_by", ["token", "sequence", "group", "constant"])
def test_the_value_is_that_of_float64(divide_by, per_row):
    """Token by token, one answer without verdict, a round that lies in many rows."""
    played = round_of()
    policy = {"divide_by": divide_by, "clip_low": 0.1, "clip_high": 0.3}
    batch = batch_of(played, per_row=per_row, **policy)
    if divide_by == "constant":
        per = {"max_tokens": grpo.GRPOConfig().rollout.max_new_tokens}
    else:
        per = {"max_tokens": None}
    gains = oracle.group_relative(played.rewards, played.given, 1e-6, 1)
    new, old = oracle_logps(0), oracle_logps(1)
    width = SAMPLES * LONGEST
    values, ids = np.zeros((PROMPTS, width)), np.full((PROMPTS, width), -1)
    for prompt in range(PROMPTS):
        column = 0
        for sample in range(SAMPLES):
            place = prompt * SAMPLES + sample
            correction = [
                oracle.importance_weight(o, s, 2.0)
                for o, s in zip(
                    old[place], played.answers[place].sampling_logps, strict=True
                )
            ]
            for n, o, c in zip(new[place], old[place], correction, strict=True):
                if played.given[prompt, sample]:
                    values[prompt, column] = c * oracle.clipped_policy(
                        n, o, gains[prompt, sample], 0.1, 0.3
                    )
                    ids[prompt, column] = sample
                column += 1
    wanted = oracle.divided_loss(values, ids, SAMPLES, divide_by, **per)
    (found, _), _ = loss_of(batch, **policy)
    assert float(found) == pytest.approx(wanted, rel=2e-4, abs=1e-6)


def test_a_sequence_ratio_is_that_of_the_mean():
    """GSPO in float64: the geometric mean of an answer's ratios is clipped."""
    played = round_of()
    clips = {"clip_low": 0.1, "clip_high": 0.3}
    policy = {"ratio": "sequence", "importance_cap": None, **clips}
    batch = batch_of(played, divide_by="sequence", **policy)
    gains = oracle.group_relative(played.rewards, played.given, 1e-6, 1).reshape(-1)
    kept = played.given.reshape(-1)
    values = [
        oracle.clipped_policy(np.mean(n), np.mean(o), gain, **clips)
        for n, o, gain, k in zip(
            oracle_logps(0), oracle_logps(1), gains, kept, strict=True
        )
        if k
    ]
    (found, _), _ = loss_of(batch, **policy)
    assert float(found) == pytest.approx(np.mean(values), rel=2e-4)


def test_equal_rewards_give_exactly_nothing():
    played = round_of()._replace(rewards=np.full((PROMPTS, SAMPLES), 0.7))
    batch = batch_of(played)
    assert not batch["advantages"].any()
    (loss, _), grads = loss_of(batch)
    assert float(loss) == 0.0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_what_is_masked_changes_nothing():
    batch = batch_of(round_of())
    outside = ~batch["loss_mask"]
    spoiled = dict(batch)
    for name in ("advantages", "old_logps", "sampling_logps"):
        spoiled[name] = np.where(outside, np.nan, batch[name]).astype(np.float32)
    for wanted, found in zip(
        jax.tree.leaves(loss_of(batch)), jax.tree.leaves(loss_of(spoiled)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_an_answer_cut_off_can_be_left_out():
    played = round_of()
    kept, left = batch_of(played), batch_of(played, mask_truncated=True)
    cut = int(played.lengths[played.truncated].sum())
    assert cut > 0
    assert kept["loss_mask"].sum() - left["loss_mask"].sum() == cut


def test_the_kl_is_a_term_with_its_gradient():
    """k3 in the loss: the value by hand, and no pull where the policy is the
    reference."""
    batch = batch_of(round_of())
    kl = KLSection(in_loss=0.5)
    same = dict(batch, ref_logps=np.where(batch["loss_mask"], _stats(0, batch), 0.0))
    (plain, _), grads = loss_of(batch)
    (held, output), held_grads = loss_of(same, kl=kl)
    assert float(held) == pytest.approx(float(plain), abs=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(held_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    other = dict(batch, ref_logps=batch["old_logps"])
    (_, output), _ = loss_of(other, kl=kl)
    ratios = other["ref_logps"] - np.where(batch["loss_mask"], _stats(0, batch), 0.0)
    wanted = np.sum(np.expm1(ratios) - ratios) / batch["loss_mask"].sum()
    term = output.terms["kl"]
    assert float(term.total / term.weight) == pytest.approx(wanted, rel=1e-4)
    assert term.coefficient == 0.5


@pytest.mark.slow
def test_an_entropy_bonus_is_the_mean_entropy():
    batch = batch_of(round_of())
    (_, output), _ = loss_of(batch, entropy_coefficient=0.1)
    wanted = _stats(0, batch, "entropy")[batch["loss_mask"]].mean()
    term = output.terms["entropy"]
    assert float(term.total / term.weight) == pytest.approx(wanted, rel=1e-5)
    assert term.coefficient == -0.1


def step_and_state(accumulate=1):
    tx = optax.chain(testing.record_gradients(), optax.sgd(0.1))
    loss_fn = grpo.grpo_loss(
        model(),
        PolicySection(),
        NO_KL,
        temperature=TEMPERATURE,
    )
    step = training.make_train_step(loss_fn, tx, accumulate=accumulate)
    return step, training.init_state(model().params, tx, jax.random.key(1))


def test_microbatches_are_the_whole_batch():
    batch = batch_of(round_of(), divide_by="group")
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    found = []
    for accumulate in (1, 4):
        step, state = step_and_state(accumulate)
        state, metrics = jax.jit(step)(state, batch)
        found.append((state.params, metrics["loss"]))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


MESHES = [{"data": 1}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize(
    "meshes", [MESHES, pytest.param(testing.MESHES, marks=pytest.mark.slow)], ids=len
)
def test_mesh_kit(meshes):
    step, state = step_and_state()
    batch = batch_of(round_of(), divide_by="sequence")
    axes = models.param_axes(CONFIG)
    testing.assert_mesh_invariant(step, state, batch, meshes, axes=axes)


def test_answers_that_begin_where_blocks_do_give_the_same_gradient():
    dense, aligned = (batch_of(round_of(), align=align) for align in (1, 8))
    assert not np.array_equal(dense["segment_ids"], aligned["segment_ids"])
    (first, _), first_slopes = loss_of(dense)
    (second, _), second_slopes = loss_of(aligned)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    chex.assert_trees_all_close(first_slopes, second_slopes, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (lambda: KLSection(in_loss=0.1, in_reward=0.1), "count the KL twice"),
        (lambda: KLSection(in_loss=0.1, estimator="k1"), "expected gradient is zero"),
        (lambda: KLSection(in_loss=-1.0), "in_loss must be at least 0"),
        (lambda: PolicySection(ratio="sequence"), "set divide_by to sequence"),
        (lambda: PolicySection(clip_low=0.0), "clip_low"),
        (lambda: PolicySection(importance_cap=0.5), "importance_cap"),
        (lambda: PolicySection(entropy_coefficient=-0.1), "entropy_coefficient"),
        (
            lambda: grpo.GRPOConfig(rollout=grpo.RolloutSection(samples=1)),
            "at least 2",
        ),
        (lambda: grpo.RolloutSection(samples=8, answers_per_row=3), "must divide"),
        (lambda: grpo.RolloutSection(temperature=0.0), "temperature must be"),
        (lambda: grpo.GRPOConfig(reference="precomputed"), "drawn anew"),
    ],
)
def test_settings_that_contradict_each_other(section, match):
    with pytest.raises(ValueError, match=match):
        section()
