"""Token-level generation: against full forwards, across padding, order and buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder, tiny_llama

from jaxpost import generation, models, ops
from jaxpost.generation import SamplingConfig

KEY = jax.random.key(7)
PROMPTS = [[5, 9, 2], [1], [4, 4, 8, 30, 12], [7, 3, 3, 3]]


def padded(prompts, side="right", width=None):
    """Prompts as arrays with garbage under the mask."""
    width = width or max(map(len, prompts))
    tokens = np.full((len(prompts), width), VOCAB - 1, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), None)
        tokens[row, where] = ids
        mask[row, where] = True
    return tokens, mask


def run(fns, params, prompts=PROMPTS, *, side="right", width=None, **kwargs):
    kwargs = {"max_new_tokens": 12, **kwargs}
    settings = {name: kwargs.pop(name) for name in list(kwargs) if name in SETTINGS}
    rollout = generation.generate(
        fns,
        params,
        *padded(prompts, side, width),
        config=SamplingConfig(**settings),
        key=kwargs.pop("key", KEY),
        **kwargs,
    )
    return jax.tree.map(np.asarray, rollout)


SETTINGS = SamplingConfig.__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def fake():
    fns = FakeDecoder()
    return fns, fns.init(jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(params=["fake", "model"])
def decoder(request):
    """The same promises for a plain-JAX decoder and for the library's own."""
    if request.param == "fake":
        return request.getfixturevalue("fake")
    model = request.getfixturevalue("model")
    return model, model.params


def full_forward(fns, params, prompts, rollout):
    """Trainer's view: logits that predict each new token, from one uncached pass."""
    whole = [
        [*ids, *rollout.tokens[row, : rollout.lengths[row]].tolist()]
        for row, ids in enumerate(prompts)
    ]
    tokens, mask = padded(whole)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), mask.shape)
    out = fns.apply(params, tokens, positions, mask.astype(np.int32))
    logits = np.asarray(ops.logits(out.hidden, fns.unembed(params)))
    return [
        logits[row, len(ids) - 1 : len(whole[row]) - 1]
        for row, ids in enumerate(prompts)
    ]


def test_greedy_is_the_argmax_of_the_full_forward(decoder):
    rollout = run(*decoder, temperature=0.0)
    assert (rollout.lengths == 12).all()
    assert not rollout.finished.any()
    for row, logits in enumerate(full_forward(*decoder, PROMPTS, rollout)):
        np.testing.assert_array_equal(rollout.tokens[row], logits.argmax(-1))
    np.testing.assert_array_equal(rollout.sampling_logps, 0.0)


def test_greedy_equals_top_1(fake):
    greedy = run(*fake, temperature=0.0)
    top_1 = run(*fake, top_k=1)
    np.testing.assert_array_equal(greedy.tokens, top_1.tokens)
    np.testing.assert_allclose(greedy.logps, top_1.logps, atol=1e-6)
    np.testing.assert_array_equal(top_1.sampling_logps, 0.0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logps_equal_the_trainers(decoder, temperature):
    fns, params = decoder
    rollout = run(fns, params, temperature=temperature)
    whole = [[*ids, *rollout.tokens[row]] for row, ids in enumerate(PROMPTS)]
    tokens, mask = padded(whole)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), mask.shape)
    hidden = fns.apply(params, tokens, positions, mask.astype(np.int32)).hidden
    targets, _ = ops.shift_targets(tokens, mask)
    stats = ops.linear_token_logps(
        hidden,
        fns.unembed(params),
        targets,
        temperature=temperature,
        with_entropy=True,
    )
    for row, ids in enumerate(PROMPTS):
        new = slice(len(ids) - 1, len(ids) + 11)
        np.testing.assert_allclose(rollout.logps[row], stats.logps[row, new], atol=1e-5)
        np.testing.assert_allclose(
            rollout.entropies[row], stats.entropy[row, new], atol=1e-5
        )
    np.testing.assert_array_equal(rollout.logps, rollout.sampling_logps)


def test_temperature_0_reports_logps_at_temperature_1(fake):
    rollout = run(*fake, temperature=0.0)
    for row, logits in enumerate(full_forward(*fake, PROMPTS, rollout)):
        expected = jax.nn.log_softmax(logits).max(-1)
        np.testing.assert_allclose(rollout.logps[row], expected, atol=1e-5)


@pytest.mark.parametrize("other", [("left", None), ("left", 9), ("right", 14)], ids=str)
def test_padding_changes_nothing(fake, other):
    """Not even the last bit, as prompts are moved to column 0 first."""
    here = run(*fake)
    there = run(*fake, side=other[0], width=other[1])
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_a_sequence_does_not_depend_on_its_batch(decoder):
    ids = np.array([3, 11, 2**31 + 5, 0])
    together = run(*decoder, sequence_ids=ids)
    order = [2, 0, 3, 1]
    shuffled = run(*decoder, [PROMPTS[i] for i in order], sequence_ids=ids[order])
    for place, row in enumerate(order):
        np.testing.assert_array_equal(shuffled.tokens[place], together.tokens[row])
        alone = run(*decoder, [PROMPTS[row]], sequence_ids=ids[row : row + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.logps[0], together.logps[row], atol=1e-5)


def test_longer_bucket_gives_the_same_beginning(fake):
    short, long = run(*fake), run(*fake, max_new_tokens=40)
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :12])


def test_keys_and_ids_matter(fake):
    same = run(*fake, [PROMPTS[0]] * 3, sequence_ids=[4, 4, 5])
    np.testing.assert_array_equal(same.tokens[0], same.tokens[1])
    assert (same.tokens[0] != same.tokens[2]).any()
    other = run(*fake, key=jax.random.key(8))
    assert (other.tokens != run(*fake).tokens).any()


def test_raw_uint32_keys_work(fake):
    rollout = run(*fake, key=jax.random.PRNGKey(7))
    np.testing.assert_array_equal(rollout.tokens, run(*fake).tokens)


def test_stop_ids_end_a_sequence_and_are_included(fake):
    free = run(*fake, max_new_tokens=24)
    stops = (int(free.tokens[0, 3]), int(free.tokens[2, 5]))
    stopped = run(*fake, max_new_tokens=24, stop_ids=stops, pad_id=17)
    for row in range(len(PROMPTS)):
        hits = np.flatnonzero(np.isin(free.tokens[row], stops))
        length = hits[0] + 1 if len(hits) else 24
        assert stopped.finished[row] == (len(hits) > 0)
        assert stopped.lengths[row] == length
        np.testing.assert_array_equal(
            stopped.tokens[row, :length], free.tokens[row, :length]
        )
        np.testing.assert_allclose(
            stopped.logps[row, :length], free.logps[row, :length], atol=1e-5
        )
        assert (stopped.tokens[row, length:] == 17).all()
        for values in (stopped.logps, stopped.sampling_logps, stopped.entropies):
            assert (values[row, length:] == 0.0).all()
    assert stopped.finished[0]
    assert stopped.lengths[0] <= 4


def test_decoding_ends_when_all_have(fake):
    """Early exit: the step counter stops at the last finished row."""
    fns, params = fake
    config = SamplingConfig(max_new_tokens=40, stop_ids=tuple(range(VOCAB)))
    from jaxpost.generation._generate import start

    session = start(
        fns,
        params,
        *padded(PROMPTS[:3]),  # a bucket of exactly 3 and of 4 with one idle row
        config=config,
        processors=(),
        key=KEY,
        sequence_ids=None,
    ).advance(40)
    assert int(session.state.step) == 1
    rollout = session.rollout(3, 40)
    assert np.asarray(rollout.finished).all()
    np.testing.assert_array_equal(rollout.lengths, 1)


def test_batch_that_fills_no_bucket(fake):
    rollout = run(*fake, [*PROMPTS, PROMPTS[0]], stop_ids=(VOCAB - 1,))
    assert rollout.tokens.shape == (5, 12)
    np.testing.assert_array_equal(
        rollout.tokens[:4], run(*fake, stop_ids=(VOCAB - 1,)).tokens
    )


def test_processors_see_raw_logits_and_the_sequence(fake):
    seen = []

    def spy(logits, state):
        jax.debug.callback(
            lambda *arrays: seen.append([np.array(x) for x in arrays]),
            logits,
            state.tokens,
            state.position,
            jax.random.key_data(state.key),
            ordered=True,
        )
        return logits, state

    rollout = run(*fake, temperature=0.5, max_new_tokens=4, processors=(spy,))
    jax.effects_barrier()
    assert len(seen) == 4
    expected = full_forward(*fake, PROMPTS, rollout)
    for step, (logits, tokens, position, _) in enumerate(seen):
        for row, ids in enumerate(PROMPTS):
            so_far = [*ids, *rollout.tokens[row, :step]]
            assert position[row] == len(so_far)
            np.testing.assert_array_equal(tokens[row, : len(so_far)], so_far)
            np.testing.assert_allclose(logits[row], expected[row][step], atol=1e-5)
    keys = np.concatenate([step[3] for step in seen])
    assert len(np.unique(keys, axis=0)) == 16


def test_processors_run_in_order_and_move_sampling_logps_only(fake):
    def only_even(logits, state):
        allowed = jnp.arange(VOCAB)[None] % 2 == 0
        return jnp.where(allowed, logits, -jnp.inf), state

    def no_repeat(logits, state):
        rows = jnp.arange(logits.shape[0])
        latest = state.tokens[rows, state.position - 1]
        return logits.at[rows, latest].set(-jnp.inf), state

    rollout = run(*fake, processors=(only_even, no_repeat))
    assert (rollout.tokens % 2 == 0).all()
    assert (rollout.tokens[:, 1:] != rollout.tokens[:, :-1]).all()
    assert (rollout.sampling_logps > rollout.logps).all()
    for row, logits in enumerate(full_forward(*fake, PROMPTS, rollout)):
        logps = np.asarray(jax.nn.log_softmax(logits))
        expected = logps[np.arange(12), rollout.tokens[row]]
        np.testing.assert_allclose(rollout.logps[row], expected, atol=1e-5)


def test_processor_of_wrong_shape_is_named(fake):
    def half(logits, state):
        return logits[:, ::2], state

    with pytest.raises(ValueError, match="half"):
        run(*fake, processors=(half,))


def test_filters_are_consistent_with_logps(fake):
    """Filtered, a token's sampling log-probability can only rise."""
    rollout = run(*fake, top_k=5, top_p=0.8)
    assert (rollout.sampling_logps >= rollout.logps - 1e-6).all()
    assert (rollout.sampling_logps > rollout.logps + 1e-3).any()


def test_bfloat16_cache_stays_close(fake):
    fns, params = fake
    rollout = run(fns, params, cache_dtype=jnp.bfloat16)
    for row, logits in enumerate(full_forward(fns, params, PROMPTS, rollout)):
        logps = np.asarray(jax.nn.log_softmax(logits))
        expected = logps[np.arange(12), rollout.tokens[row]]
        # 8 bits of mantissa in keys and values.
        np.testing.assert_allclose(rollout.logps[row], expected, atol=0.1)
        assert np.abs(rollout.logps[row] - expected).max() > 1e-5


def test_final_softcap_reaches_the_sampler():
    fns = FakeDecoder(softcap=2.0)
    params = fns.init(jax.random.key(0))
    rollout = run(fns, params)
    for row, logits in enumerate(full_forward(fns, params, PROMPTS, rollout)):
        assert np.abs(logits).max() <= 2.0
        logps = np.asarray(jax.nn.log_softmax(logits))
        expected = logps[np.arange(12), rollout.tokens[row]]
        np.testing.assert_allclose(rollout.logps[row], expected, atol=1e-5)


def test_no_retrace_in_the_same_bucket(decoder):
    fns, params = decoder
    run(fns, params)
    before = generation.trace_counts()
    other = jax.tree.map(lambda leaf: leaf + 0.01, params)
    if isinstance(fns, models.Model):
        fns = fns.replace(params=other)  # as after a training step
    run(
        fns,
        other,
        [[1, 2], [3, 4, 5, 6, 7, 8, 9], [2], [9, 9]],
        side="left",
        max_new_tokens=15,
        temperature=0.3,
        stop_ids=(1, 2),
        key=jax.random.key(1),
    )
    assert generation.trace_counts() == before
    run(fns, other, max_new_tokens=25)
    assert generation.trace_counts() != before


def test_trained_parameters_are_not_kept_alive(model):
    import gc
    import weakref

    params = jax.tree.map(lambda leaf: leaf + 0.0, model.params)
    fns = model.replace(params=params)
    ghost = weakref.ref(params["embed"]["embedding"])
    run(fns, params)
    del fns, params
    gc.collect()
    assert ghost() is None


@pytest.mark.parametrize(
    ("length", "minimum", "bucket"),
    [(1, 16, 16), (17, 16, 24), (64, 16, 64), (65, 16, 96), (97, 16, 128), (3, 1, 3)],
)
def test_buckets(length, minimum, bucket):
    assert generation.bucket_length(length, minimum=minimum) == bucket


@pytest.mark.parametrize(
    ("prompts", "mask", "match"),
    [
        ([[1, 2], [3, 4]], [[True, True], [False, False]], r"rows \[1\] are empty"),
        ([[1, 2, 3]], [[True, False, True]], "hole in row 0"),
        ([[1, VOCAB]], [[True, True]], rf"prompts\[0, 1\] is {VOCAB}"),
        ([[1, -1]], [[True, True]], "vocabulary"),
        ([[1, 2]], [[1, 1]], "prompt_mask must be bool"),
        ([[1.0, 2.0]], [[True, True]], "token ids"),
        ([[1, 2]], [[True]], "prompt_mask"),
        (np.zeros((0, 3), np.int32), np.zeros((0, 3), bool), "at least one row"),
    ],
    ids=str,
)
def test_bad_prompts_are_named(fake, prompts, mask, match):
    with pytest.raises(ValueError, match=match):
        generation.generate(
            *fake, prompts, mask, config=SamplingConfig(max_new_tokens=2), key=KEY
        )


def test_masked_ids_may_be_anything(fake):
    tokens, mask = padded(PROMPTS)
    config = SamplingConfig(max_new_tokens=12)
    tokens[~mask] = -100
    rollout = generation.generate(*fake, tokens, mask, config=config, key=KEY)
    np.testing.assert_array_equal(rollout.tokens, run(*fake).tokens)


def test_bad_sequence_ids_are_named(fake):
    with pytest.raises(ValueError, match="sequence_ids"):
        run(*fake, sequence_ids=[1, 2])
