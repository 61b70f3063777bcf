"""Settings of the sampler, checked once when they are made."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose the next token, and when to stop.

    Filters apply in the order temperature, top-k, top-p, min-p, each to what the one
    before left over. A change of `temperature` (but to or from 0, and with processors
    1), `top_p`, `min_p` or the ids recompiles nothing; one of `top_k`, or a filter
    switched on or off, does.

    Fields:
        max_new_tokens: most tokens to add to each prompt, at least 1.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep this many most likely tokens, or None. Of equal logits at the border
            the lower ids stay.
        top_p: keep the fewest most likely tokens that together have at least this
            probability, in (0, 1], or None. Tokens exactly as likely as the last one
            kept stay too where `top_k` is None.
        min_p: keep tokens at least this fraction as likely as the likeliest, in [0, 1],
            or None.
        stop_ids: token ids that end a sequence; they are part of its tokens.
        pad_id: fills `Rollout.tokens` after the end.
        cache_dtype: dtype of the key/value cache; None takes that of the head's weight.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0
    cache_dtype: Any = None

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        # Below this, float32 logits divided by it overflow.
        usable = self.temperature == 0.0 or self.temperature >= 1e-6
        if not (math.isfinite(self.temperature) and usable):
            raise ValueError(
                "temperature must be 0 (greedy) or finite and at least 1e-6, got "
                f"{self.temperature}."
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}.")
        for token in self.stop_ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise ValueError(f"stop_ids must be integers, got {token!r}.")
            if token < 0:
                raise ValueError(f"stop_ids must not be negative, got {token}.")
        if self.cache_dtype is not None:
            dtype = jnp.dtype(self.cache_dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"cache_dtype must be floating, got {dtype}.")


def check_count(name: str, value: Any) -> None:
    """Raises a ValueError unless the value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


class SamplerPlan(NamedTuple):
    """The part of the settings that decides which program is compiled."""

    greedy: bool
    top_k: int | None
    use_top_p: bool
    use_min_p: bool
    unit_temperature: bool = False


class SamplerValues(NamedTuple):
    """The part of the settings that enters the program as numbers.

    Fields:
        temperature, top_p, min_p: float32 scalars; unused ones hold 1.
        stop_ids: int32 `[n]`, filled up with -1, which no token equals.
        pad_id: int32 scalar.
    """

    temperature: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray
    pad_id: jax.Array | np.ndarray


def split_config(
    config: SamplingConfig, vocab_size: int, *, processed: bool = False
) -> tuple[SamplerPlan, SamplerValues]:
    """Static and traced halves of the settings, checked against the vocabulary.

    With processors (`processed`) a temperature of 1 is static, so that what they and
    the sampler compute of the raw logits may be computed once.
    """
    for token in config.stop_ids:
        if token >= vocab_size:
            raise ValueError(
                f"stop_ids has {token}, but the model knows only ids below "
                f"{vocab_size}: it would never stop there."
            )
    greedy = config.temperature == 0.0
    top_k = config.top_k
    if top_k is not None and top_k >= vocab_size:
        top_k = None  # keeps everything
    plan = SamplerPlan(
        greedy=greedy,
        top_k=None if greedy else top_k,
        use_top_p=not greedy and config.top_p is not None and config.top_p < 1.0,
        use_min_p=not greedy and config.min_p is not None and config.min_p > 0.0,
        unit_temperature=processed and config.temperature in (0.0, 1.0),
    )
    width = max(4, 1 << (len(config.stop_ids) - 1).bit_length())
    stop_ids = np.full((width,), -1, np.int32)
    stop_ids[: len(config.stop_ids)] = config.stop_ids
    values = SamplerValues(
        temperature=_scalar(1.0 if greedy else config.temperature),
        top_p=_scalar(1.0 if config.top_p is None else config.top_p),
        min_p=_scalar(1.0 if config.min_p is None else config.min_p),
        stop_ids=stop_ids,
        pad_id=np.asarray(config.pad_id, np.int32),
    )
    return plan, values


def _scalar(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)
