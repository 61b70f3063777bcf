"""The shapes of what crosses between rooms: batches, model outputs, loss terms.

Knows JAX and NumPy arrays only; no model, tokenizer or optimizer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of parameter arrays, layers stacked on a leading axis."""

Cache = Any
"""A key/value cache, opaque outside the model that made it."""

BRANCH = 2**20
"""Distance of the segment ids of the branches of one segment; see `ops.predictors`."""

Batch = Mapping[str, Any]
"""Arrays by name, each `[B, ...]`. Language-model batches hold

- `tokens` int32 `[B, T]`: token ids, any valid id where padded;
- `positions` int32 `[B, T]`: 0, 1, ... within each segment;
- `segment_ids` int32 `[B, T]`: 0 where padded, 1, 2, ... by packed example; `s + b *
  BRANCH` in branch b >= 1 of segment s, which sees that segment before it and itself;
- `loss_mask` bool `[B, T]`: True on tokens that are trained on (as inputs: before the
  shift of `ops.shift_targets`), never on the first token of a segment.
"""


class ModelOutput(NamedTuple):
    """What a decoder returns.

    Fields:
        hidden: states after the last norm, `[B, T, D]`, in the compute dtype.
        cache: the updated cache, or None.
        aux: router losses and statistics of mixture-of-experts layers; `{}` if dense.
    """

    hidden: jax.Array
    cache: Cache | None = None
    aux: Mapping[str, Any] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """The output projection: `logits = cap(scale * (hidden @ weight + bias))`.

    `cap(x) = softcap * tanh(x / softcap)`, the identity if `softcap` is None.

    Fields:
        weight: `[D, V]`.
        bias: `[V]` or None.
        softcap: Gemma 2's soft cap on final logits, or None.
        scale: factor on the logits before the cap.
    """

    weight: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})


class TokenStats(NamedTuple):
    """Statistics of each realised token, float32 or wider, `[B, T]`.

    Fields:
        logps: log-probability, nats.
        entropy: of the whole distribution, nats, or None if not asked for.
        top1: 1.0 where the target is the most likely token, or None; no gradient.
    """

    logps: jax.Array
    entropy: jax.Array | None = None
    top1: jax.Array | None = None


class Term(NamedTuple):
    """One summand of a loss: `coefficient * total / weight`.

    Totals and weights are summed over microbatches and devices before the division.

    Fields:
        total: sum of values, scalar.
        weight: what to divide by, scalar (a token or sequence count); no gradient.
        coefficient: factor of the mean in the loss.
    """

    total: jax.Array
    weight: jax.Array
    coefficient: jax.Array | float = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metric:
    """A number to log, reducible over microbatches.

    Fields:
        value: a sum (for `mean` and `sum`), or the extreme (for `max` and `min`).
        weight: what the sum is divided by for `mean`; ignored otherwise.
        kind: how to combine and finish.
    """

    value: jax.Array
    weight: jax.Array | float = 1.0
    kind: Literal["mean", "sum", "max", "min"] = dataclasses.field(
        default="mean", metadata={"static": True}
    )


class LossOutput(NamedTuple):
    """What a loss function returns to `training.make_train_step`.

    Fields:
        terms: summands of the loss by name.
        metrics: numbers to log by name.
        method_state: the method's memory after this batch (`None` if it has none).
    """

    terms: Mapping[str, Term]
    metrics: Mapping[str, Metric] = {}
    method_state: Any = None


class ApplyFn(Protocol):
    """A decoder as a pure function; see `models.Model.apply`.

    Tokens `[B, T]` at explicit `positions` `[B, T]` attend to earlier or equal ones
    of the same segment; segment 0 is padding. With a cache, the tokens are written at
    slots equal to their positions and attend to slots up to their own position;
    segment-0 tokens are not written.
    """

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> ModelOutput: ...


class DecodeFns(Protocol):
    """What the sampler needs of a model; a `models.Model` has it.

    It may also have `for_decoding(params)`, called once before a decoding loop: the
    parameters in the form in which `apply` takes single tokens fastest.
    """

    @property
    def apply(self) -> ApplyFn: ...

    def unembed(self, params: Params) -> Head: ...

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache: ...


class LossFn(Protocol):
    """The function a train step differentiates."""

    def __call__(
        self, params: Params, method_state: Any, batch: Batch, key: jax.Array
    ) -> LossOutput: ...


class RewardFn(Protocol):
    """Scores finished answers, as in TRL; None means no verdict."""

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        **columns: list[Any],
    ) -> list[float | None]: ...
