"""What every generation rival shares: sizes, prompts, the one JSON line at the end.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse
import json
import os
import statistics

import numpy as np
from sft_settings import Clock, peak_bytes
from sft_settings import parse as parse_sizes

SIZES = {
    "hidden": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 32,
    "ffn": 688,
    "vocab": 32000,
    "batch": 16,
    "prompt": 64,
    "new_tokens": 128,
    "tied": False,
    "temperature": 1.0,
}


def parse(description: str | None, **extra: dict) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, the rest as named."""
    return parse_sizes(description, unit="calls", count=5, sizes=SIZES, **extra)


def prompts(sizes: dict) -> np.ndarray:
    """Random token ids, int32 `[B, P]`: full rows, nothing to pad."""
    shape = (sizes["batch"], sizes["prompt"])
    return np.random.default_rng(0).integers(3, sizes["vocab"], shape, dtype=np.int32)


def report(name: str, args: argparse.Namespace, clock: Clock, tokens, **more) -> None:
    """Print the result as one JSON line on standard output.

    `tokens`: the last call's answers, integer `[B, N]`; what is counted.
    """
    tokens = np.asarray(tokens)
    sizes = args.sizes
    expected = (sizes["batch"], sizes["new_tokens"])
    if tokens.shape != expected:
        raise SystemExit(f"{name} made {tokens.shape} tokens, expected {expected}")
    print_line(name, args, clock, tokens.ravel(), **more)


def print_line(
    name: str, args: argparse.Namespace, clock: Clock, tokens: np.ndarray, **more
) -> None:
    """One JSON line; `tokens`: those of the last call, integer `[n]`."""
    sizes, median_s = args.sizes, statistics.median(clock.steps_s)
    line = {
        "name": name,
        "tokens_per_s": tokens.size / median_s,
        "call_s": median_s,
        "calls_s": clock.steps_s,
        "cpu_call_s": statistics.median(clock.cpu_steps_s),
        "first_call_s": clock.first_s,
        "peak_bytes": peak_bytes(),
        # Random weights sample nearly uniformly: few tokens come twice.
        "distinct": len(np.unique(tokens)) / min(tokens.size, sizes["vocab"]),
        "threads": args.threads,
        "sizes": sizes,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        **more,
    }
    print(json.dumps(line), flush=True)
