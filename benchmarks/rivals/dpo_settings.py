"""What every DPO rival shares: sizes and pairs; the rest is as for fine-tuning.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse

import numpy as np
from sft_settings import SIZES as SFT_SIZES
from sft_settings import parse as parse_sizes

END = 0  # of every answer
SIZES = {
    **SFT_SIZES,
    "pairs": 8,
    "length": 256,  # tokens of a prompt and one answer
    "prompt": 128,
    "beta": 0.1,
    "batch": 16,  # sequences, for tokens/s; follows from `pairs`
}


def parse(description: str | None, **extra: dict) -> argparse.Namespace:
    """The command line of a rival; every one has `--reference`."""
    reference = {"choices": ("live", "precomputed"), "default": "live"}
    args = parse_sizes(description, sizes=SIZES, reference=reference, **extra)
    args.sizes["batch"] = 2 * args.sizes["pairs"]
    return args


def pair_tokens(sizes: dict, count: int) -> np.ndarray:
    """Random pairs, int32 `[count, B, 2, T]`: one prompt each, answers that end in
    `END`, full rows, nothing to pad."""
    shape = (count, sizes["pairs"], 2, sizes["length"])
    tokens = np.random.default_rng(0).integers(3, sizes["vocab"], shape, np.int32)
    tokens[:, :, 1, : sizes["prompt"]] = tokens[:, :, 0, : sizes["prompt"]]
    tokens[..., -1] = END
    return tokens
