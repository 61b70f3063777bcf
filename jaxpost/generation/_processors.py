"""Functions that change the logits before a token is drawn.

A processor is pure and sees raw logits, before temperature and filters. What it changes
moves `sampling_logps` only: `logps` and `entropies` stay those of the model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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
    compared by identity: make them once, not once per call. One that is a registered
    pytree is told apart by its structure and static fields instead, and its arrays are
    handed to the program: others of their shapes compile nothing anew.
    """

    def __call__(
        self, logits: jax.Array, state: ProcessorState, /
    ) -> tuple[jax.Array, ProcessorState]: ...


class ProcessorPlan(NamedTuple):
    """Processors without their arrays: hashable, equal for equal programs.

    Fields:
        structure: tree structure of the tuple of processors.
        leaves: what is left of its leaves, None where there was an array.
    """

    structure: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(
        cls, processors: Sequence[Processor]
    ) -> tuple["ProcessorPlan", tuple[Any, ...]]:
        """The plan, and the arrays to `restore` the processors with."""
        leaves, structure = jax.tree.flatten(tuple(processors))
        arrays = tuple(leaf for leaf in leaves if is_array(leaf))
        rest = tuple(None if is_array(leaf) else leaf for leaf in leaves)
        return cls(structure, rest), arrays

    def restore(self, arrays: Sequence[Any]) -> tuple[Processor, ...]:
        remaining = iter(arrays)
        leaves = [next(remaining) if leaf is None else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a pytree is traced rather than static."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


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
