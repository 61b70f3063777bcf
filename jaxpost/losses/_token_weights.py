"""How much each token of several answers counts, named by what is divided by."""

import chex
import jax
import jax.numpy as jnp

from jaxpost import ops

DIVISIONS = ("token", "sequence", "group", "constant")


def token_weights(
    ids: jax.Array,
    answers: int,
    *,
    divide_by: str,
    max_tokens: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Weights with which tokens' losses become one number.

    The loss is `sum(values * weights) / count`, both sums over the whole batch,
    microbatches and devices included, before the one division:

    - `token`: the mean over all tokens; every token counts the same (DAPO).
    - `sequence`: each answer has the mean of its own tokens, and every answer counts
      the same: tokens of long answers count less (GRPO as published).
    - `group`: each row, a prompt with its answers, has the mean of its own tokens, and
      every prompt counts the same.
    - `constant`: each answer's sum is divided by `max_tokens`, and every answer counts
      the same: a token weighs the same however long its answer is or the others of its
      batch are (Dr. GRPO).

    With answers of one length they differ by a constant factor at most (`constant`),
    with as many answers in every row.

    Args:
        ids: which answer of its row a token belongs to, int `[B, W]`, -1 for none (see
            `ops.answer_sums`).
        answers: how many answers A a row may have.
        divide_by: `"token"`, `"sequence"`, `"group"` or `"constant"`.
        max_tokens: most tokens that an answer may have, for `"constant"` only.
        dtype: of what is returned.

    Returns:
        Weights `[B, W]`, zero where `ids` is -1; and the count, a scalar: tokens,
        answers with tokens, rows with tokens, and answers with tokens, respectively.

    Raises:
        ValueError: `divide_by` is unknown; `max_tokens` is missing, is not positive, or
            is given where nothing is divided by it.
        AssertionError: `ids` is not `[B, W]` or no integers.

    Source: `sequence`: Shao et al. (2024), DeepSeekMath, arXiv 2402.03300, eq. 3;
    `token`: Yu et al. (2025), DAPO, arXiv 2503.14476, section 3.3; `constant`: Liu et
    al. (2025), "Understanding R1-Zero-Like Training", arXiv 2503.20783, section 3.
    """
    _check(divide_by, max_tokens)
    chex.assert_rank(ids, 2)
    chex.assert_type(ids, int)
    trained = ((ids >= 0) & (ids < answers)).astype(dtype)
    if divide_by == "token":
        return trained, jnp.sum(trained)
    if divide_by == "group":
        lengths = jnp.sum(trained, axis=1, keepdims=True)
        some = jnp.sum((lengths > 0.0).astype(dtype))
        return ops.ratio(trained, jnp.broadcast_to(lengths, ids.shape)), some
    lengths = ops.answer_sums(trained, ids, answers).astype(dtype)
    some = jnp.sum((lengths > 0.0).astype(dtype))
    if divide_by == "sequence":
        lengths = ops.per_answer(lengths, ids).astype(dtype)
        return ops.ratio(trained, lengths).astype(dtype), some
    assert max_tokens is not None
    return trained / max_tokens, some


def _check(divide_by: str, max_tokens: int | None) -> None:
    if divide_by not in DIVISIONS:
        raise ValueError(
            f"divide_by must be one of {', '.join(DIVISIONS)}, got {divide_by!r}."
        )
    if divide_by != "constant":
        if max_tokens is not None:
            raise ValueError(
                f"max_tokens is {max_tokens}, but nothing is divided by it: set "
                f"divide_by to 'constant' instead of {divide_by!r}, or leave it out."
            )
    elif max_tokens is None or max_tokens < 1:
        raise ValueError(
            "divide_by='constant' needs max_tokens, the most tokens that an answer may "
            f"have, at least 1; got {max_tokens}."
        )
