"""Branches of a segment: several continuations of one prefix in one row.

Two answers to a prompt, or the prompt's G samples, need its tokens only once: the row
holds the prompt (the trunk) and then the answers (the branches), each with positions
that go on from the prompt's last. Which keys a token sees is written in its segment id:
branch `b >= 1` of segment `s` has the id `s + b * BRANCH` and sees segment `s` and
itself, not the other branches. Ids below `BRANCH` are whole segments, as ever.
"""

import jax
import jax.numpy as jnp

from jaxpost.typing import BRANCH


def branch_numbers(segment_ids: jax.Array) -> jax.Array:
    """0 in trunks and padding, 1, 2, ... in branches; same shape and dtype."""
    return segment_ids // BRANCH


def same_branch(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """True where a key's segment is that of the query, or the trunk of its branch.

    Args:
        query_segments, key_segments: integers that broadcast against each other.
    """
    trunk = query_segments % BRANCH
    return (query_segments == key_segments) | (trunk == key_segments)


def predictors(segment_ids: jax.Array) -> jax.Array:
    """The place in its row whose hidden state predicts each token.

    That is the place before, and the trunk's last for the first token of a branch.
    Without branches `hidden[:, predictors]` and the tokens themselves are aligned as
    `hidden` and `shift_targets(tokens)` are.

    Args:
        segment_ids: int `[B, T]`; branches follow their trunk before another trunk
            begins, perhaps with padding in between.

    Returns:
        int32 `[B, T]`, -1 for the first token of a segment, of a branch without trunk,
        and in padding.
    """
    here = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    trunk = (segment_ids != 0) & (segment_ids < BRANCH)
    last_trunk = jax.lax.cummax(jnp.where(trunk, here, -1), axis=1)

    def before(x, fill):
        return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=fill)

    goes_on = before(segment_ids, 0) == segment_ids
    place = jnp.where(goes_on, here - 1, before(last_trunk, -1))
    seen = jnp.take_along_axis(segment_ids, jnp.maximum(place, 0), axis=1)
    known = (segment_ids != 0) & (place >= 0) & same_branch(segment_ids, seen)
    return jnp.where(known, place, -1).astype(jnp.int32)
