"""Logits and what is read from them: the plain reference of the chunked versions."""

import chex
import jax
import jax.numpy as jnp

from jaxpost.ops._dtypes import compute_dtype
from jaxpost.typing import Head


def as_head(head: Head | jax.Array) -> Head:
    """A bare `[D, V]` array is a head without bias, cap or scale."""
    return head if isinstance(head, Head) else Head(head)


def shape_logits(raw: jax.Array, head: Head) -> jax.Array:
    """`cap(scale * (raw + bias))` of raw products `[..., V]`, in their dtype."""
    out = raw
    if head.bias is not None:
        bias = head.bias.astype(raw.dtype)
        out = raw + bias.reshape((1,) * (raw.ndim - 1) + bias.shape)
    if head.scale != 1.0:
        out = out * head.scale
    if head.softcap is not None:
        out = head.softcap * jnp.tanh(out / head.softcap)
    return out


def logits(hidden: jax.Array, head: Head | jax.Array) -> jax.Array:
    """Scores of every token of the vocabulary.

    Stores `[..., V]`: for one decoding step, small vocabularies and tests. Training
    uses `linear_token_logps`, which does not.

    Args:
        hidden: states after the last norm, float `[..., D]`.
        head: a `Head`, or its bare weight `[D, V]`.

    Returns:
        `cap(scale * (hidden @ weight + bias))`, `[..., V]`, float32 or wider; products
        of narrower inputs are accumulated in float32.

    Raises:
        ValueError: the widths `D` differ.
    """
    head = as_head(head)
    check_widths(hidden, head)
    dtype = compute_dtype(hidden, head.weight)
    raw = jnp.einsum("...d,dv->...v", hidden, head.weight, preferred_element_type=dtype)
    return shape_logits(raw, head)


def check_widths(hidden: jax.Array, head: Head) -> None:
    """Raise `ValueError` unless `hidden` `[..., D]` fits the head's `[D, V]`."""
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[0]:
        raise ValueError(
            "hidden must be [..., D] and the head's weight [D, V] with one D, got "
            f"{hidden.shape} and {weight.shape}."
        )
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(
            f"the head's bias must be [V] = {weight.shape[1:]}, got {bias.shape}."
        )


def token_logps(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target under `softmax(logits)`.

    The plain reference; it stores `[..., V]` and its gradient.

    Args:
        logits: scores, float `[..., V]`.
        targets: token ids, integer `[...]`.

    Returns:
        Log-probabilities, float32 or wider, `[...]`, nats.

    Raises:
        AssertionError: `targets` lacks exactly the last axis of `logits`, or is not
            integer.
    """
    chex.assert_shape(targets, logits.shape[:-1])
    chex.assert_type(targets, int)
    logits = logits.astype(compute_dtype(logits))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of `softmax(logits)`.

    Args:
        logits: scores, float `[..., V]`; `-inf` removes a token (with zero gradient).

    Returns:
        Entropies, float32 or wider, `[...]`, nats.
    """
    logits = logits.astype(compute_dtype(logits))
    logps = jax.nn.log_softmax(logits, axis=-1)
    possible = logps > -jnp.inf
    # 0 * -inf is NaN forward and backward; the product is selected away on both sides.
    finite = jnp.where(possible, logps, jnp.zeros((), logps.dtype))
    return -jnp.sum(jnp.exp(logps) * finite, axis=-1)
