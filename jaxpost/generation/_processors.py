"""Functions that change the logits before a token is drawn.

A processor is pure and sees raw logits, before temperature and filters. What it changes
moves `sampling_logps` only: `logps` and `entropies` stay those of the model.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax


class ProcessorState(NamedTuple):
    """What a processor knows besides the logits, for one step.

    Built anew at each step and handed from one processor to the next within it, so that
    one which uses the keys can pass on fresh ones.

    Fields:
        tokens: prompt and answer so far, int32 `[B, S]`, without a gap from column 0;
            columns from `position` on have no meaning.
        position: column of the token to be drawn, int32 `[B]`; `tokens[b, position[b] -
            1]` is the latest token.
        key: one PRNG key per sequence, `[B]`, different at each step and independent of
            the one that draws the token.
    """

    tokens: jax.Array
    position: jax.Array
    key: jax.Array


class Processor(Protocol):
    """`(logits [B, V] float32, state) -> (logits [B, V], state)`.

    Minus infinity forbids a token. Processors are compiled into the decode program and
    compared by identity: make them once, not once per call.
    """

    def __call__(
        self, logits: jax.Array, state: ProcessorState, /
    ) -> tuple[jax.Array, ProcessorState]: ...


def run_processors(
    processors: Sequence[Processor], logits: jax.Array, state: ProcessorState
) -> jax.Array:
    """Logits after all processors, in order."""
    for processor in processors:
        shape = logits.shape
        logits, state = processor(logits, state)
        if logits.shape != shape:
            raise ValueError(
                f"processor {processor!r} returned logits of shape {logits.shape}, "
                f"expected {shape}."
            )
    return logits
