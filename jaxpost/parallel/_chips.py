"""What the makers publish about the chips that a run may be planned for."""

import dataclasses
import difflib

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip, by its maker's data sheet.

    Fields:
        name: as `--chip` takes it.
        peak_flops: dense bfloat16, FLOP/s.
        hbm_bytes: memory of one device; decimal, so a little less than there is.
        hbm_bytes_per_s: from and to that memory.
        link_bytes_per_s: what one chip can send to its neighbours over all its links,
            one direction.
        linked: how many chips these links join; beyond them a slower network does.
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    linked: int


# NVIDIA's data sheets of the SXM modules: bfloat16 without sparsity; NVLink's number
# there counts both directions, half of it is here; 8 chips share the switch of an HGX
# board. TPUs: the system architecture pages v4, v5e, v5p, v6e of docs.cloud.google.com;
# their interconnect numbers count both directions too. One chip of a v4 or v5p is one
# device (both of its cores).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100-40", 312e12, 40 * GB, 1.555e12, 300e9, 8),
        Chip("a100", 312e12, 80 * GB, 2.039e12, 300e9, 8),
        Chip("h100", 989e12, 80 * GB, 3.35e12, 450e9, 8),
        Chip("h200", 989e12, 141 * GB, 4.8e12, 450e9, 8),
        Chip("b200", 2250e12, 180 * GB, 8e12, 900e9, 8),
        Chip("v4", 275e12, 32 * GB, 1.2e12, 150e9, 4096),
        Chip("v5e", 197e12, 16 * GB, 0.8e12, 200e9, 256),
        Chip("v5p", 459e12, 95 * GB, 2.765e12, 600e9, 8960),
        Chip("v6e", 918e12, 32 * GB, 1.638e12, 400e9, 256),
    )
}


def find_chip(name: str) -> Chip:
    """The chip of that name, in any case and with or without its maker's name.

    Raises:
        ValueError: it is not in the table; the message names the nearest.
    """
    key = name.lower().removeprefix("nvidia").removeprefix("tpu").strip(" -_")
    key = {"a100-80": "a100", "v5litepod": "v5e", "v5-lite": "v5e"}.get(key, key)
    if key in CHIPS:
        return CHIPS[key]
    near = difflib.get_close_matches(key, CHIPS, 2, 0.4)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"--chip: no chip {name!r}. {hint}Known are {', '.join(sorted(CHIPS))}."
    )
