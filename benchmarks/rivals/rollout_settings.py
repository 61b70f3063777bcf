"""What the rollout contestants share beside `generate_settings`: the uneven stream.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse

import numpy as np
from generate_settings import SIZES as EVEN
from generate_settings import Clock, print_line
from sft_settings import parse as parse_sizes

SIZES = {**EVEN, "stream": 512, "mean_tokens": 64, "most_tokens": 512}


def parse(description: str | None, **extra: dict) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, the rest as named."""
    return parse_sizes(description, unit="calls", count=1, sizes=SIZES, **extra)


def stream(sizes: dict) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, int32 `[stream, P]`, and the lengths of their answers, `[stream]`.

    Lengths are those of an end token that comes with the same chance at each step,
    cut at `most_tokens`. Everyone gets the same, and uses them only to stop there.
    """
    rng = np.random.default_rng(0)
    shape = (sizes["stream"], sizes["prompt"])
    prompts = rng.integers(3, sizes["vocab"], shape, dtype=np.int32)
    lengths = rng.geometric(1 / sizes["mean_tokens"], sizes["stream"])
    return prompts, np.minimum(lengths, sizes["most_tokens"]).astype(np.int32)


def report(
    name: str, args: argparse.Namespace, clock: Clock, answers: list, **more
) -> None:
    """Print the result as one JSON line on standard output.

    `answers`: token ids of the last call's, in the order of the prompts; counted, and
    checked against the lengths of the stream.
    """
    made = np.array([len(answer) for answer in answers])
    if not np.array_equal(made, stream(args.sizes)[1]):
        raise SystemExit(f"{name} made {made.sum()} tokens, not those of the stream")
    tokens = np.concatenate([np.asarray(answer) for answer in answers])
    print_line(name, args, clock, tokens, **more)
