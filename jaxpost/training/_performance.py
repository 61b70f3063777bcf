"""How much of the hardware a run uses, and MaxText's line about it."""

import dataclasses
from collections.abc import Mapping

import jax

# Dense bfloat16 peaks from the makers' data sheets, FLOP/s per device.
_PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
    """What one token costs, to turn tokens/s into FLOP/s.

    Fields:
        flops_per_token: model FLOPs of forward and backward per token (about six times
            the parameters, plus attention; nothing recomputed counted), or None.
        peak_flops: of one device, FLOP/s; None looks the device up, and leaves
            utilisation out if it is not known (as on CPU).
        print_line: print MaxText's performance line at each log.
        devices: how many devices compute; None is all of them.
    """

    flops_per_token: float | None = None
    peak_flops: float | None = None
    print_line: bool = False
    devices: int | None = None

    def metrics(self, tokens_per_s: float) -> dict[str, float]:
        """`tflops/device` and, where the peak is known, `mfu` (a fraction)."""
        if self.flops_per_token is None:
            return {}
        flops = tokens_per_s * self.flops_per_token / self._count()
        values = {"tflops/device": flops / 1e12}
        peak = self.peak_flops or device_peak_flops()
        if peak is not None:
            values["mfu"] = flops / peak
        return values

    def _count(self) -> int:
        return jax.device_count() if self.devices is None else self.devices

    def line(self, metrics: Mapping[str, float], tokens_per_step: float) -> str:
        """`completed step: ...` with the fields and units of MaxText's line."""
        per_device = metrics["tokens/s"] / self._count()
        return (
            f"completed step: {metrics['step']}, "
            f"seconds: {metrics['step_time']:.3f}, "
            f"TFLOP/s/device: {metrics.get('tflops/device', 0.0):.3f}, "
            f"Tokens/s/device: {per_device:.3f}, "
            f"total_weights: {tokens_per_step:.0f}, "
            f"loss: {metrics['loss']:.3f}"
        )


def device_peak_flops() -> float | None:
    """Dense bfloat16 peak of the first device, FLOP/s; None if not known."""
    kind = jax.devices()[0].device_kind
    matches = [name for name in _PEAK_FLOPS if kind.startswith(name)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None
