"""What a step costs on every device, before there is a device: bytes and seconds.

Arithmetic over shapes, shardings, a compiled program and a chip's data sheet; knows no
model and no config. Nothing here allocates an array.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxpost.parallel._chips import Chip
from jaxpost.parallel._hlo import Collective

MARGIN = 0.15
"""What must stay free: fragmentation, the runtime's own, and an estimate's error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by cause.

    Fields:
        parameters, gradients, moments: exact, from shapes, dtypes and shardings;
            gradients are counted in the dtype of what they are added to.
        frozen: parameters that are not trained; exact.
        other: the rest of the training state (moving average, keys, counters); exact.
        batch: one step's batch; exact.
        temporaries: activations, recomputed layers, gathered weights, chunks of logits;
            an estimate.
    """

    parameters: int
    gradients: int
    moments: int
    frozen: int
    other: int
    batch: int
    temporaries: int

    @property
    def exact(self) -> int:
        """All but the estimate."""
        return self.total - self.temporaries

    @property
    def total(self) -> int:
        """The device's peak."""
        return sum(dataclasses.asdict(self).values())

    @property
    def needed(self) -> int:
        """The peak with the margin: what a device must have."""
        return math.ceil(self.total * (1 + MARGIN))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time that one step can take, and what limits it.

    Fields:
        compute_s: executed operations at the chip's peak.
        memory_s: bytes from and to the chip's memory at its bandwidth.
        link_s: bytes that a device sends at the bandwidth of its links.
        step_s: the largest of the three, as if they overlapped perfectly.
        limit: which one that is.
        utilisation: model FLOPs of that step over what the peak would allow.
    """

    compute_s: float
    memory_s: float
    link_s: float
    step_s: float
    limit: str
    utilisation: float


def bytes_per_device(tree: Any) -> int:
    """Bytes that the fullest device holds of a tree.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`; leaves without a sharding are whole.
    """
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def estimate_temporaries(
    measured: int, *, gradients: int, width: float, wide: int = 0, added: int = 0
) -> int:
    """Temporaries of a step in a narrower dtype from a compile in float32.

    (XLA's CPU backend widens bfloat16, so that its own figure for it is too large.)

    Args:
        measured: temporary bytes of the float32 compile, gradients among them.
        gradients: their bytes, counted elsewhere.
        width: bytes of the compute dtype over those of float32.
        wide: bytes among them that stay float32 in any case.
        added: bytes that only the narrow step needs, such as narrow parameters.
    """
    rest = max(measured - gradients, 0)
    wide = min(wide, rest)
    return round(wide + (rest - wide) * width) + added


def sum_by_kind(collectives: Iterable[Collective], width: float = 1.0) -> dict:
    """Bytes that one device sends per run, by kind of collective, largest first.

    Args:
        collectives: from `list_collectives`.
        width: bytes of the compute dtype over those of the program's.
    """
    totals: dict[str, float] = {}
    for one in collectives:
        totals[one.kind] = totals.get(one.kind, 0.0) + one.sent_bytes * width
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return {kind: round(sent) for kind, sent in ordered}


def roofline(
    chip: Chip,
    *,
    model_flops: float,
    executed_flops: float,
    memory_bytes: float,
    sent_bytes: float,
) -> Roofline:
    """The least time of one step; all figures of one device."""
    times = {
        "compute": executed_flops / chip.peak_flops,
        "memory": memory_bytes / chip.hbm_bytes_per_s,
        "links": sent_bytes / chip.link_bytes_per_s,
    }
    limit = max(times, key=lambda name: times[name])
    step = times[limit]
    return Roofline(
        compute_s=times["compute"],
        memory_s=times["memory"],
        link_s=times["links"],
        step_s=step,
        limit=limit,
        utilisation=model_flops / (chip.peak_flops * step) if step else 0.0,
    )


def _shard_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = tuple(np.shape(leaf))
    if sharding is not None:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize
