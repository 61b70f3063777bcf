"""Optimizers and learning-rate schedules by name, all from Optax."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxpost.typing import Params

Schedule = Callable[[Any], Any]

_NAMES = ("adamw", "adam", "sgd", "adafactor", "lion", "muon")
_SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer, with which schedule.

    Attributes:
        name: `adamw`, `adam`, `sgd`, `adafactor`, `lion` or `muon` (matrices of the
            layers by Muon; embeddings, head, norms and biases by AdamW).
        learning_rate: peak learning rate.
        schedule: after warm-up: `constant`; `linear` or `cosine` down to
            `final_fraction * learning_rate` at the last step; `wsd`: constant, then
            linear over the last `decay_fraction` of all steps.
        warmup_steps: steps of linear warm-up; step `s` of them (from 1) runs at
            `learning_rate * s / warmup_steps`, so that none is wasted on a rate of 0.
        warmup_fraction: the same as a share of all steps; give one of the two.
        decay_fraction: share of all steps that `wsd` decays over.
        final_fraction: rate at the end over the peak rate.
        weight_decay: decoupled, times the learning rate (for `sgd`: added to the
            gradient, as in torch).
        decay_norms_and_biases: decay norm scales, biases and all vectors too.
        decay_embeddings: decay leaves under a name with `embed` too.
        b1, b2, eps: moments' decays and the denominator's floor; `b1` is `sgd`'s
            momentum and Muon's beta.
        clip_norm: largest global gradient norm, or None.
        mu_dtype: dtype of the first moment (`"bfloat16"` halves it), or None for the
            parameters'.
    """

    name: Literal["adamw", "adam", "sgd", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    decay_norms_and_biases: bool = False
    decay_embeddings: bool = True
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    mu_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_choice("name", self.name, _NAMES)
        _check_choice("schedule", self.schedule, _SCHEDULES)
        if not self.learning_rate > 0.0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}."
            )
        if self.warmup_steps < 0:
            raise ValueError(
                f"warmup_steps must be at least 0, got {self.warmup_steps}."
            )
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError(
                "Give warmup_steps or warmup_fraction, not both: got "
                f"{self.warmup_steps} and {self.warmup_fraction}."
            )
        for field in ("warmup_fraction", "b1", "b2"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(
                    f"{field} must lie in [0, 1), got {getattr(self, field)}."
                )
        for field in ("decay_fraction", "final_fraction"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(
                    f"{field} must lie in [0, 1], got {getattr(self, field)}."
                )
        if self.weight_decay < 0.0:
            raise ValueError(
                f"weight_decay must be at least 0, got {self.weight_decay}."
            )
        if self.weight_decay and self.name == "adam":
            raise ValueError("adam has no weight decay: name adamw, or set it to 0.")
        if not self.eps > 0.0:
            raise ValueError(f"eps must be positive, got {self.eps}.")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(
                "clip_norm must be positive, or None for no clipping; "
                f"got {self.clip_norm}."
            )
        if self.mu_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                "mu_dtype must be float32, bfloat16, float16 or None, "
                f"got {self.mu_dtype!r}."
            )


def build_optimizer(
    config: OptimizerConfig, total_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer and its schedule.

    Args:
        config: what to build.
        total_steps: optimizer steps of the whole run; the schedule's horizon.

    Returns:
        The Optax transformation; and the schedule, from steps already taken (0 before
        the first) to the learning rate.

    Raises:
        ValueError: `total_steps` is below 1, or the warm-up and decay do not fit in it.
    """
    schedule = build_schedule(config, total_steps)
    mask = decay_mask(
        norms_and_biases=config.decay_norms_and_biases,
        embeddings=config.decay_embeddings,
    )
    tx = _OPTIMIZERS[config.name](config, schedule, mask)
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx, schedule


def build_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Warm-up, then the chosen shape; see `OptimizerConfig`."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
    warmup = config.warmup_steps or round(config.warmup_fraction * total_steps)
    if warmup >= total_steps and warmup:
        raise ValueError(
            f"warm-up of {warmup} steps leaves nothing of {total_steps} total steps."
        )
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    rest = total_steps - warmup
    decay = round(config.decay_fraction * total_steps)
    if config.schedule == "wsd" and decay > rest:
        raise ValueError(
            f"warm-up of {warmup} and decay of {decay} steps do not fit in "
            f"{total_steps}: lower decay_fraction or the warm-up."
        )
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    else:
        after = optax.linear_schedule(peak, final, max(decay, 1), rest - decay)
    if not warmup:
        return after
    # Optax starts ramps at their first value: begin at one part, not at zero.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def decay_mask(
    *, norms_and_biases: bool = False, embeddings: bool = True
) -> Callable[[Params], Any]:
    """A function from params to a tree of booleans: True where weights decay.

    Norms and biases are leaves named `scale` or `bias`, anything under a name with
    `norm`, and all leaves of rank below 2; embeddings are leaves under a name with
    `embed`.
    """

    def decays(path, leaf):
        names = [_key_name(key).lower() for key in path]
        small = (
            jnp.ndim(leaf) < 2
            or (bool(names) and names[-1] in ("scale", "bias"))
            or any("norm" in name for name in names)
        )
        embedding = any("embed" in name for name in names)
        return (norms_and_biases or not small) and (embeddings or not embedding)

    return lambda params: jax.tree_util.tree_map_with_path(decays, params)


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}; got {value!r}.")


def _adamw(config, schedule, mask):
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=config.mu_dtype,
        weight_decay=config.weight_decay,
        mask=mask,
    )


def _adam(config, schedule, mask):
    del mask
    return optax.adam(
        schedule, b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype
    )


def _sgd(config, schedule, mask):
    tx = optax.sgd(
        schedule, momentum=config.b1 or None, accumulator_dtype=config.mu_dtype
    )
    if not config.weight_decay:
        return tx
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask), tx)


def _adafactor(config, schedule, mask):
    # Optax's own decay here is not scaled by the learning rate.
    return _with_decay(optax.adafactor(schedule), config, schedule, mask)


def _with_decay(tx, config, schedule, mask):
    """Adds decoupled decay to a transformation that has none like the others'."""
    if not config.weight_decay:
        return tx

    def decay(count):
        return -config.weight_decay * schedule(count)

    return optax.chain(tx, optax.add_decayed_weights(decay, mask))


def _lion(config, schedule, mask):
    return optax.lion(
        schedule,
        b1=config.b1,
        b2=config.b2,
        mu_dtype=config.mu_dtype,
        weight_decay=config.weight_decay,
        mask=mask,
    )


def _muon(config, schedule, mask):
    tx = optax.contrib.muon(
        schedule,
        beta=config.b1,
        mu_dtype=config.mu_dtype,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_muon_dimensions,
        consistent_rms=0.2,
    )
    # Optax's own decay would pass the mask to the matrices only.
    return _with_decay(tx, config, schedule, mask)


def _muon_dimensions(params: Params) -> Any:
    """Which axes of a leaf are a matrix's rows and columns; None: not Muon's."""

    def dimensions(path, leaf):
        names = [_key_name(key) for key in path]
        outer = any("embed" in name or "norm" in name for name in names)
        axes = tuple(range("layers" in names, jnp.ndim(leaf)))
        if outer or "head" in names or names[-1:] == ["bias"] or len(axes) < 2:
            return None
        # Output projections of attention are [N, H, D]: heads are reduced together.
        cut = len(axes) - 1 if names[-2:-1] == ["o"] else 1
        return optax.contrib.MuonDimensionNumbers(axes[:cut], axes[cut:])

    return jax.tree_util.tree_map_with_path(dimensions, params)


_OPTIMIZERS = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}
