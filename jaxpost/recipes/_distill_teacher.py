"""The teacher of a distillation: where it comes from, and what it is compared on.

A live teacher lies beside the student and reads every batch; a cached one was read once
(`_distill_cache`). Both give one function of the student's hidden states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import losses, models, ops, parallel
from jaxpost.recipes import _setup
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._frozen import (
    VocabularyMismatchError as VocabularyMismatchError,
)
from jaxpost.recipes._frozen import check_vocabulary as check_vocabulary
from jaxpost.recipes._frozen import common_vocabulary as common_vocabulary
from jaxpost.recipes._frozen import open_frozen
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch, Head, Params

COLUMNS = ("teacher_ids", "teacher_logps", "teacher_tail")


@dataclasses.dataclass(frozen=True)
class TeacherSection:
    """Which model to learn from, and what of its distributions.

    Attributes:
        path: Folder or hub name of the teacher; may be left out if a cache is there.
        tokenizer: Folder or hub name of its tokenizer; `path` if not given.
        mode: Beside the student, or read once into a file of its most likely tokens.
        cache: That file, made if it is not there; `teacher.npz` in the run folder if
            not given.
        top_k: Compare on so many tokens and the rest; the whole vocabulary if not
            given.
        support: Whose most likely tokens these are.
        rest: What becomes of the other tokens: one bucket of their whole mass, left out
            with both sides normalised, or left out with the teacher alone normalised.
    """

    path: str | None = None
    tokenizer: str | None = None
    mode: Literal["live", "cached"] = "live"
    cache: str | None = None
    top_k: int | None = None
    support: Literal["teacher", "student"] = "teacher"
    rest: Literal["bucket", "renormalize", "teacher"] = "bucket"

    def __post_init__(self) -> None:
        if self.mode == "live" and self.cache is not None:
            raise ValueError("cache is given, but mode is live: set mode to cached.")
        if self.mode == "cached" and self.top_k is None:
            raise ValueError("top_k must be given: a cache holds a few tokens only.")
        if self.mode == "cached" and self.support == "student":
            raise ValueError(
                "support is student, whose most likely tokens change as it learns; a "
                "cache holds the teacher's: set support to teacher, or mode to live."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_k is None and (self.support, self.rest) != ("teacher", "bucket"):
            raise ValueError("support and rest are read only with top_k: set it.")


class Comparison(NamedTuple):
    """The teacher against the student at each token.

    Fields:
        values: the divergence, `[B, T]`, nats; any value where masked.
        tail: the teacher's probability outside the support, `[B, T]`, or None.
    """

    values: jax.Array
    tail: jax.Array | None = None


CompareFn = Callable[[Params, Batch, jax.Array, Head, jax.Array], Comparison]
"""Of parameters, a batch, the student's hidden states and head, and the mask `[B, T]`
of the tokens that count (aligned with targets)."""


def open_teacher(run: Run, section: TeacherSection) -> models.Model:
    """Loads the teacher onto the run's devices, in the compute dtype.

    Raises:
        VocabularyMismatchError: its tokens are not those of the student.
        ConfigError: none is named, it is no language model, or knows shorter texts
            only.
    """
    if section.path is None:
        raise ConfigError("teacher.path must be given: the folder or hub name of one.")
    return open_frozen(
        run, section.path, key="teacher.path", tokenizer=section.tokenizer
    )


def split_over(layout: _setup.Layout) -> Callable[[Callable], Callable]:
    """For functions of heads and rows, such as `whole_vocabulary`."""
    return lambda function: parallel.split_heads(function, layout.mesh, layout.rules)


def live_teacher(
    teacher: models.Model,
    *,
    alpha: float,
    temperature: float = 1.0,
    top_k: int | None = None,
    support: Literal["teacher", "student"] = "teacher",
    rest: losses.Rest = "bucket",
    vocab_size: int | None = None,
    split: Callable[[Callable], Callable] | None = None,
) -> CompareFn:
    """Compares with a teacher whose parameters are `params["teacher"]`.

    Args:
        teacher: gives `apply` and `unembed`; its own parameters are not used.
        alpha, temperature: see `DistillConfig`.
        top_k, support, rest: see `TeacherSection`.
        vocab_size: ids that are compared; None for all of both heads.
        split: on a mesh, from `split_over`.
    """

    def whole(heads, rows, *, vocab_axis) -> Comparison:
        hidden, teacher_hidden, mask = rows
        values = ops.linear_divergence(
            hidden,
            heads[0],
            teacher_hidden,
            heads[1],
            alpha=alpha,
            temperature=temperature,
            grad_weights=mask,
            vocab_axis=vocab_axis,
        )
        return Comparison(values)

    def on_support(heads, rows, *, vocab_axis) -> Comparison:
        assert top_k is not None
        options: dict[str, Any] = {
            "mask": rows[2],
            "temperature": temperature,
            "vocab_axis": vocab_axis,
        }
        hidden, teacher_hidden = rows[0], jax.lax.stop_gradient(rows[1])
        if support == "teacher":
            said = ops.linear_top_logps(teacher_hidden, heads[1], top_k, **options)
        else:
            ids = ops.linear_top_logps(hidden, heads[0], top_k, **options).ids
            said = ops.linear_support_logps(teacher_hidden, heads[1], ids, **options)
        student = ops.linear_support_logps(hidden, heads[0], said.ids, **options)
        values = losses.support_divergence(student, said, alpha=alpha, rest=rest)
        return Comparison(values, jnp.exp(said.tail))

    split = split or split_over(_setup.Layout())
    compare_heads = split(whole if top_k is None else on_support)

    def compare(params, batch, hidden, head, mask) -> Comparison:
        frozen = jax.lax.stop_gradient(params["teacher"])
        read = teacher.apply(
            frozen, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        heads = tuple(cut_head(h, vocab_size) for h in (head, teacher.unembed(frozen)))
        return compare_heads(heads, (hidden, read.hidden, mask))

    return compare


def cached_teacher(
    *,
    alpha: float,
    temperature: float = 1.0,
    rest: losses.Rest = "bucket",
    vocab_size: int | None = None,
    split: Callable[[Callable], Callable] | None = None,
) -> CompareFn:
    """Compares with what the batch holds: `teacher_ids` int32 and `teacher_logps`
    `[B, T, K]`, `teacher_tail` `[B, T]`, all at this temperature."""

    def on_support(heads, rows, *, vocab_axis) -> Comparison:
        hidden, mask, said = rows
        student = ops.linear_support_logps(
            hidden,
            heads[0],
            said.ids,
            mask=mask,
            temperature=temperature,
            vocab_axis=vocab_axis,
        )
        values = losses.support_divergence(student, said, alpha=alpha, rest=rest)
        return Comparison(values, jnp.exp(said.tail))

    compare_heads = (split or split_over(_setup.Layout()))(on_support)

    def compare(params, batch, hidden, head, mask) -> Comparison:
        del params
        said = ops.Support(*(batch[name] for name in COLUMNS))
        return compare_heads((cut_head(head, vocab_size),), (hidden, mask, said))

    return compare


def cut_head(head: Head, vocab_size: int | None) -> Head:
    """The first `vocab_size` columns; the head itself if that is all."""
    if vocab_size is None or vocab_size == head.weight.shape[1]:
        return head
    bias = None if head.bias is None else head.bias[:vocab_size]
    return dataclasses.replace(head, weight=head.weight[:, :vocab_size], bias=bias)
