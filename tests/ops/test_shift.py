import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import ops

# <s> What is it ? | It is seven </s>: six tokens, the answer being the last three.
TOKENS = np.array([[1, 10, 11, 20, 21, 2]], np.int32)
ANSWER = np.array([[False, False, False, True, True, True]])


@pytest.mark.parametrize("xp", [np, jnp])
def test_every_answer_token_is_predicted_by_the_token_before_it(xp):
    targets, mask = ops.shift_targets(xp.asarray(TOKENS), xp.asarray(ANSWER))
    assert isinstance(targets, np.ndarray) == (xp is np)
    assert isinstance(mask, np.ndarray) == (xp is np)
    np.testing.assert_array_equal(targets, [[10, 11, 20, 21, 2, 0]])
    # Hidden state 2 (the last of the question) is trained to say 20; the stop token 2
    # is trained on; nothing is asked of the last state.
    np.testing.assert_array_equal(mask, [[False, False, True, True, True, False]])
    assert targets.dtype == np.int32
    assert mask.dtype == np.bool_


def test_equals_loop_under_jit_and_vmap(strict_dtypes):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (3, 7)).astype(np.int32)
    mask = rng.random((3, 7)) < 0.5
    wanted = np.zeros_like(tokens), np.zeros_like(mask)
    for b in range(3):
        for t in range(6):
            wanted[0][b, t], wanted[1][b, t] = tokens[b, t + 1], mask[b, t + 1]
    for found in (
        ops.shift_targets(tokens, mask),
        jax.jit(ops.shift_targets)(tokens, mask),
        jax.vmap(ops.shift_targets)(tokens, mask),
    ):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_packed_segments_never_predict_across_the_boundary():
    # The first token of a segment is never in the mask, so its predictor is not either.
    tokens = np.array([[1, 5, 6, 1, 7, 8]], np.int32)
    mask = np.array([[False, True, True, False, True, True]])
    targets, target_mask = ops.shift_targets(tokens, mask)
    assert targets[0, 2] == 1
    assert not target_mask[0, 2]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="tokens and mask must both be"):
        ops.shift_targets(TOKENS, ANSWER[:, :-1])
    with pytest.raises(ValueError, match="tokens must be integers"):
        ops.shift_targets(TOKENS.astype(np.float32), ANSWER)
    with pytest.raises(ValueError, match="mask must be boolean"):
        ops.shift_targets(TOKENS, ANSWER.astype(np.int32))
