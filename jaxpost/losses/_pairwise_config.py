"""Any pairwise loss by name: settings in, a function of margins out."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jaxpost.losses._adaptive import adaptive_scaling, check_adaptive_scaling
from jaxpost.losses._pairwise import (
    bradley_terry,
    check_bradley_terry,
    check_hinge,
    check_ipo,
    check_robust_dpo,
    hinge,
    ipo,
    robust_dpo,
)
from jaxpost.losses._r3m import check_r3m, r3m

PairwiseName = Literal[
    "bradley_terry", "robust_dpo", "hinge", "ipo", "r3m", "adaptive_scaling"
]

# Each loss beside the check of its settings, which touches no device: configs are read
# before several processes are joined.
_LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "bradley_terry": (bradley_terry, check_bradley_terry),
    "robust_dpo": (robust_dpo, check_robust_dpo),
    "hinge": (hinge, check_hinge),
    "ipo": (ipo, check_ipo),
    "r3m": (r3m, check_r3m),
    "adaptive_scaling": (adaptive_scaling, check_adaptive_scaling),
}


class PairwiseOutput(NamedTuple):
    """What a function made by `pairwise_loss` returns.

    Fields:
        values: loss per pair, float32 or wider, the margins' shape.
        extras: what else the loss knows of each pair, by name, same dtype and shape:
            `delta` of `r3m`, `tau` of `adaptive_scaling`, else nothing.
    """

    values: jax.Array
    extras: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PairwiseConfig:
    """A pairwise loss and its settings; None stands for the loss's own default.

    Fields:
        name: function of this package.
        label_smoothing: of `bradley_terry`.
        flip_rate: of `robust_dpo`, required.
        tau: of `ipo`.
        lam: of `r3m`, required.
        rho0, tau_min: of `adaptive_scaling`, required.
        tau_max: of `adaptive_scaling`, required unless quadratic.
        quadratic, solver, newton_steps: of `adaptive_scaling`.

    Raises:
        ValueError: the name is unknown; a setting is given that the loss does not read
            (label smoothing with R³M is undefined), a required one is missing, or a
            value is outside its range.
    """

    name: PairwiseName = "bradley_terry"
    label_smoothing: float | None = None
    flip_rate: float | None = None
    tau: float | None = None
    lam: float | None = None
    rho0: float | None = None
    tau_min: float | None = None
    tau_max: float | None = None
    quadratic: bool | None = None
    solver: Literal["closed_form", "newton"] | None = None
    newton_steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _LOSSES:
            known = ", ".join(_LOSSES)
            raise ValueError(f"name must be one of {known}, got {self.name!r}.")
        check = _LOSSES[self.name][1]
        settings, parameters = self.settings(), inspect.signature(check).parameters
        foreign = [name for name in settings if name not in parameters]
        if foreign:
            raise ValueError(
                f"{self.name} does not read {', '.join(foreign)}; it reads "
                f"{', '.join(parameters) or 'no settings'}."
            )
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is inspect.Parameter.empty and name not in settings
        ]
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}.")
        check(**settings)

    def settings(self) -> dict[str, Any]:
        """The settings that were given, as keyword arguments of the loss."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        return {name: value for name, value in values.items() if value is not None}


def pairwise_loss(config: PairwiseConfig) -> Callable[[jax.Array], PairwiseOutput]:
    """The loss that `config` names, as a pure function of margins `[B]`."""
    function, settings = _LOSSES[config.name][0], config.settings()

    def loss(margins: jax.Array) -> PairwiseOutput:
        output = function(margins, **settings)
        if isinstance(output, jax.Array):
            return PairwiseOutput(output, {})
        values, *_ = output
        extras = {name: getattr(output, name) for name in output._fields[1:]}
        return PairwiseOutput(values, extras)

    return loss
