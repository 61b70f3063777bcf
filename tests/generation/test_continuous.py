"""Continuous batching: against `generate` and the trainer, whatever slot and order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder, tiny_llama

from jaxpost import generation, models, ops, parallel
from jaxpost.generation import SamplingConfig, _server

KEY = jax.random.key(11)
CONFIG = SamplingConfig(max_new_tokens=24, stop_ids=(3, 7))
RNG = np.random.default_rng(4)
# Every length from 1 to 17, twice, in no order: two buckets of columns.
LENGTHS = RNG.permutation(np.repeat(np.arange(1, 18), 2))
PROMPTS = [RNG.integers(0, VOCAB, length).tolist() for length in LENGTHS]
ENDLESS = SamplingConfig(max_new_tokens=24)
SAME = {"max_prompt_length": 17}  # no other shapes for a part of the prompts
LIMITS = RNG.integers(1, 25, len(PROMPTS))


@pytest.fixture(scope="module")
def fake():
    fns = FakeDecoder()
    return fns, fns.init(jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def padded(prompts):
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return tokens, mask


def stream(decoder, prompts=PROMPTS, **kwargs):
    kwargs = {"config": CONFIG, "key": KEY, "slots": 4, **kwargs}
    return generation.generate_stream(*decoder, prompts, **kwargs)


def by_sequence(answers):
    return {(answer.prompt, answer.sample): answer for answer in answers}


def static(decoder, prompts=PROMPTS, **kwargs):
    """`generate` on all of them at once."""
    kwargs = {"config": CONFIG, "key": KEY, **kwargs}
    rollout = generation.generate(*decoder, *padded(prompts), **kwargs)
    return jax.tree.map(np.asarray, rollout)


def assert_same(answer, tokens, logps):
    """The same tokens, unless a draw was near a border and rounding tipped it."""
    if answer.near == 0 or np.array_equal(answer.tokens, tokens):
        np.testing.assert_array_equal(answer.tokens, tokens)
        np.testing.assert_allclose(answer.logps, logps, atol=1e-5)


def assert_equals_static(answers, rollout):
    answers = by_sequence(answers)
    assert len(answers) == len(rollout.lengths)
    for row, name in enumerate(sorted(answers)):
        length = rollout.lengths[row]
        assert_same(
            answers[name], rollout.tokens[row, :length], rollout.logps[row, :length]
        )
    # Borders are rare: 31 of them, 2e-5 wide, for some 10 draws of a sequence.
    assert sum(answer.near > 0 for answer in answers.values()) <= len(answers) // 10


@pytest.fixture(scope="module")
def served(fake):
    """All prompts through four slots, the sums, and how often what was traced."""
    _server.collect.clear_cache()  # knows no model: other tests may have traced it
    before = generation.trace_counts()
    answers = stream(fake)
    found = list(answers), answers.stats
    after = generation.trace_counts()
    return *found, {name: after[name] - before[name] for name in after}


def test_answers_are_those_of_generate(fake, served):
    answers, stats, _ = served
    rollout = static(fake)
    assert_equals_static(answers, rollout)
    ours = generation.as_rollout(answers, max_new_tokens=24)
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(rollout, name))
    for name in ("logps", "sampling_logps", "entropies"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(rollout, name), atol=1e-5
        )
    assert (stats.sequences, stats.new_tokens) == (34, rollout.lengths.sum())
    assert stats.near == sum(answer.near for answer in answers)
    assert stats.busy == stats.new_tokens
    assert stats.utilisation == stats.busy / (4 * stats.steps)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 7, 40])
def test_slots_change_nothing(fake, served, slots):
    answers = by_sequence(stream(fake, slots=slots))
    for answer in served[0]:
        other = answers[answer.prompt, 0]
        assert_same(answer, other.tokens, other.logps)
        assert answer.finish_reason == other.finish_reason


def test_order_changes_nothing(fake, served):
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = stream(fake, [PROMPTS[i] for i in order], sequence_ids=order)
    answers = by_sequence(shuffled)
    there = {number: place for place, number in enumerate(order)}
    for answer in served[0]:
        other = answers[there[answer.prompt], 0]
        assert_same(answer, other.tokens, other.logps)


def test_trainers_log_probabilities_for_every_prompt_length_and_slot(model):
    config = dataclasses.replace(CONFIG, temperature=0.7, stop_ids=(3,))
    prompts = [prompt for prompt in PROMPTS if len(prompt) <= 16]  # of one bucket
    limits = LIMITS[: len(prompts)]
    answers = list(stream((model, model.params), prompts, config=config, limits=limits))
    whole = [[*prompts[a.prompt], *a.tokens.tolist()] for a in answers]
    tokens, mask = padded(whole)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), mask.shape)
    hidden = model.apply(model.params, tokens, positions, mask.astype(np.int32)).hidden
    targets, _ = ops.shift_targets(tokens, mask)
    stats = ops.linear_token_logps(
        hidden,
        model.unembed(model.params),
        targets,
        temperature=0.7,
        with_entropy=True,
    )
    for row, answer in enumerate(answers):
        begin = len(prompts[answer.prompt]) - 1
        new = slice(begin, begin + len(answer.tokens))
        np.testing.assert_allclose(answer.logps, stats.logps[row, new], atol=1e-5)
        np.testing.assert_allclose(answer.entropies, stats.entropy[row, new], atol=1e-5)
        np.testing.assert_array_equal(answer.logps, answer.sampling_logps)
        assert answer.logps.dtype == answer.entropies.dtype == np.float32
        assert len(answer.tokens) <= limits[answer.prompt]
    assert {answer.prompt for answer in answers} == set(range(32))


def test_a_prompt_is_read_once_for_all_its_samples(fake):
    read = []

    class Counting(FakeDecoder):
        def apply(self, params, tokens, positions, segment_ids=None, cache=None):
            if tokens.shape[1] > 1:
                jax.debug.callback(lambda n: read.append(int(n)), segment_ids.sum())
            return super().apply(params, tokens, positions, segment_ids, cache)

    counting = Counting()
    answers = list(stream((counting, fake[1]), slots=5, samples_per_prompt=3))
    jax.effects_barrier()
    assert sum(read) == LENGTHS.sum()
    assert len(answers) == 3 * len(PROMPTS)
    # Beside each prompt given three times.
    thrice = by_sequence(stream(fake, [prompt for prompt in PROMPTS for _ in range(3)]))
    for answer in answers:
        other = thrice[3 * answer.prompt + answer.sample, 0]
        assert_same(answer, other.tokens, other.logps)


def test_refills_trace_nothing(fake, served):
    # Prompts of up to 16 and of up to 24 tokens; all else once, for 34 sequences.
    expected = {"prefill": 0, "decode": 0, "admit": 2, "serve": 1, "collect": 1}
    assert served[2] == expected
    before = generation.trace_counts()
    other = jax.tree.map(lambda leaf: leaf + 0.01, fake[1])
    list(
        stream(
            (fake[0], other),
            [PROMPTS[0][:2], PROMPTS[1], *PROMPTS[20:30]],
            config=SamplingConfig(max_new_tokens=20, temperature=0.5, stop_ids=(1,)),
            key=jax.random.key(1),
            limits=[3] * 12,
            max_prompt_length=20,
            refill_every=32,
        )
    )
    assert generation.trace_counts() == before


@pytest.mark.parametrize("name", ["admit", "serve"])
def test_state_and_cache_are_donated(fake, monkeypatch, name):
    run, given = getattr(_server, name), []

    def spy(functions, params, state, *args, **kwargs):
        given.append(state)
        return run(functions, params, state, *args, **kwargs)

    monkeypatch.setattr(_server, name, spy)
    list(stream(fake, PROMPTS[:5], **SAME))
    assert given
    for state in given:
        big = (state.slots.cache, state.waiting.cache, state.records.uniforms)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(big))


def test_a_free_slot_is_filled_at_once(fake):
    answers = stream(fake, PROMPTS[:25], config=ENDLESS, limits=[24] + [3] * 24, **SAME)
    lengths = {answer.prompt: len(answer.tokens) for answer in answers}
    assert lengths == {0: 24, **dict.fromkeys(range(1, 25), 3)}
    # 24 steps for the long one, and the 72 of the others beside it; in batches of four
    # it were 24 + 6 * 3.
    assert answers.stats.steps <= 28


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}, {"top_p": 0.7, "min_p": 0.1}],
    ids=str,
)
def test_filters_are_those_of_generate(fake, settings):
    config = dataclasses.replace(CONFIG, **settings)
    answers = list(stream(fake, PROMPTS[:9], config=config))
    rollout = static(fake, PROMPTS[:9], config=config)
    assert_equals_static(answers, rollout)
    for row, answer in enumerate(sorted(answers)):
        expected = rollout.sampling_logps[row, : rollout.lengths[row]]
        np.testing.assert_allclose(answer.sampling_logps, expected, atol=1e-5)


@pytest.mark.slow
def test_processors_see_the_sequence_and_their_keys(fake):
    def no_repeat(logits, state):
        rows = jnp.arange(logits.shape[0])
        latest = state.tokens[rows, state.position - 1]
        first = state.tokens[:, 0]
        noise = jax.vmap(lambda key: jax.random.normal(key, (VOCAB,)))(state.key)
        logits = logits.at[rows, latest].set(-jnp.inf)
        return logits.at[rows, first].set(-jnp.inf) + noise, state

    answers = list(stream(fake, PROMPTS[:9], processors=(no_repeat,)))
    rollout = static(fake, PROMPTS[:9], processors=(no_repeat,))
    assert_equals_static(answers, rollout)
    for answer in answers:
        prompt = PROMPTS[answer.prompt]
        assert prompt[0] not in answer.tokens
        assert (answer.tokens[1:] != answer.tokens[:-1]).all()


def test_no_stop_id_runs_to_the_limit(fake):
    config = SamplingConfig(max_new_tokens=19)
    answers = list(stream(fake, PROMPTS[:3], config=config, **SAME))
    assert [len(answer.tokens) for answer in answers] == [19, 19, 19]
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_an_answer_ends_where_the_positions_do(fake):
    answers = by_sequence(
        stream(
            fake,
            [[1] * 20, [2] * 10, [5]],
            config=ENDLESS,
            context_length=22,
        )
    )
    assert [len(answers[n, 0].tokens) for n in range(3)] == [2, 12, 21]
    free = by_sequence(stream(fake, [[1] * 20, [2] * 10, [5]], config=ENDLESS))
    for name, answer in answers.items():
        length = len(answer.tokens)
        np.testing.assert_array_equal(answer.tokens, free[name].tokens[:length])


def test_no_prompts_is_no_work(fake):
    before = generation.trace_counts()
    answers = stream(fake, [])
    assert list(answers) == []
    assert answers.stats.steps == 0
    assert generation.trace_counts() == before


def test_cut_answers_are_decoded_no_further(fake):
    def five(tokens):
        return 5 if len(tokens) >= 5 else None

    few = {"prompts": PROMPTS[:4], "config": ENDLESS, **SAME}
    answers = stream(fake, stop=five, refill_every=8, **few)
    free = by_sequence(stream(fake, **few))
    for answer in answers:
        assert answer.finish_reason == "cut"
        np.testing.assert_array_equal(answer.tokens, free[answer.prompt, 0].tokens[:5])
        assert len(answer.logps) == 5
    assert answers.stats.steps == 8


def test_slots_of_cut_answers_are_given_away(fake, served):
    def odd(tokens):
        return 1 if tokens[0] % 2 else None

    answers = by_sequence(stream(fake, stop=odd, refill_every=4))
    for answer in served[0]:
        other = answers[answer.prompt, 0]
        if answer.tokens[0] % 2:
            assert other.tokens.tolist() == answer.tokens[:1].tolist()
        else:
            assert_same(answer, other.tokens, other.logps)


@pytest.mark.slow
def test_parameters_on_a_mesh(model):
    mesh = parallel.make_mesh({"tensor": 2, "fsdp": 4})
    axes = models.param_axes(model.config)
    where = parallel.shardings(axes, mesh, shapes=model.params)
    params = jax.device_put(model.params, where)
    few = PROMPTS[:8]
    alone = by_sequence(stream((model, model.params), few))
    for answer in stream((model, params), few):
        other = alone[answer.prompt, 0]
        assert_same(answer, other.tokens, other.logps)
    before = generation.trace_counts()
    assert len(list(stream((model, params), few, key=jax.random.key(2)))) == 8
    assert generation.trace_counts() == before
