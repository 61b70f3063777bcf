"""What every generation rival shares: sizes, prompts, the one JSON line at the end.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse
import json
import os
import statistics

import numpy as np
from sft_settings import Clock, peak_bytes

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


def parse(description: str, **extra: dict) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, the rest as named."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--calls", type=int, default=5, help="timed calls")
    parser.add_argument("--warmup", type=int, default=2, help="calls before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON, see SIZES")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    unknown = sorted(set(args.sizes) - set(SIZES))
    if unknown:
        parser.error(f"unknown sizes {unknown}; known: {sorted(SIZES)}")
    args.sizes = {**SIZES, **args.sizes}
    return args


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
    median_s = statistics.median(clock.steps_s)
    line = {
        "name": name,
        "tokens_per_s": tokens.size / median_s,
        "call_s": median_s,
        "calls_s": clock.steps_s,
        "cpu_call_s": statistics.median(clock.cpu_steps_s),
        "first_call_s": clock.first_s,
        "peak_bytes": peak_bytes(),
        # Random weights sample nearly uniformly: few tokens come twice.
        "distinct": len(np.unique(tokens)) / tokens.size,
        "threads": args.threads,
        "sizes": sizes,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        **more,
    }
    print(json.dumps(line), flush=True)
