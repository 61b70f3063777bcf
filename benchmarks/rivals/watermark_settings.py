"""What the watermark contestants share: logits, previous tokens, texts.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse

import numpy as np
from generate_settings import SIZES as MODEL
from sft_settings import parse as parse_sizes

SIZES = {**MODEL, "gamma": 0.25, "delta": 2.0, "texts": 64, "text_tokens": 256}
KEY = 15485863


def parse(description: str | None, **extra: dict) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, the rest as named."""
    return parse_sizes(description, unit="calls", count=20, sizes=SIZES, **extra)


def logits(sizes: dict) -> np.ndarray:
    """float32 `[B, V]`, of entropies from nearly none to nearly all."""
    rng = np.random.default_rng(0)
    out = rng.standard_normal((sizes["batch"], sizes["vocab"]), dtype=np.float32)
    return out * np.linspace(0.5, 12.0, sizes["batch"], dtype=np.float32)[:, None]


def texts(sizes: dict) -> np.ndarray:
    """Token ids, int32 `[texts, text_tokens]`, no two texts alike."""
    shape = (sizes["texts"], sizes["text_tokens"])
    return np.random.default_rng(1).integers(3, sizes["vocab"], shape, dtype=np.int32)
