"""What every GRPO rival shares: sizes, prompts, the reward, the two parts of a step.

A step draws `prompts` x `samples` answers of `new_tokens` tokens, rewards them, and
updates once; no reference model, nothing stops early. Runs in the rivals' environments
too: standard library and NumPy only.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sft_settings
from sft_settings import Clock
from sft_settings import parse as parse_sizes

SIZES = {
    **sft_settings.SIZES,
    "prompts": 8,
    "samples": 8,
    "prompt": 64,
    "new_tokens": 128,
    "temperature": 1.0,
    "clip": 0.2,
    # Answers and their tokens, for tokens/s; follow from the others.
    "batch": 64,
    "length": 128,
}


def parse(description: str | None, **extra: dict) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, the rest as named."""
    args = parse_sizes(description, count=3, sizes=SIZES, **extra)
    args.sizes["batch"] = args.sizes["prompts"] * args.sizes["samples"]
    args.sizes["length"] = args.sizes["new_tokens"]
    return args


def prompt_tokens(sizes: dict, count: int) -> np.ndarray:
    """Random prompts, int32 `[count, prompts, P]`: full rows, nothing to pad."""
    shape = (count, sizes["prompts"], sizes["prompt"])
    return np.random.default_rng(0).integers(3, sizes["vocab"], shape, np.int32)


def rewards_of(
    completion_ids: Sequence[Sequence[int]], sizes: dict, *, all_full: bool = True
) -> list[float]:
    """A reward that costs nothing and differs between answers.

    Args:
        completion_ids: tokens of each answer.
        sizes: see `SIZES`.
        all_full: whether all are as long as they can be, or but for a twentieth.

    Raises:
        SystemExit: they are shorter than that.
    """
    full = sum(len(ids) == sizes["new_tokens"] for ids in completion_ids)
    if full < (1.0 if all_full else 0.95) * len(completion_ids):
        raise SystemExit(
            f"{full} of {len(completion_ids)} answers have {sizes['new_tokens']} tokens"
        )
    return [float(np.sum(ids) % 97) / 96 for ids in completion_ids]


class Stopwatch:
    """Seconds spent in some calls of a step; `mark` ends the step."""

    def __init__(self) -> None:
        self.current_s = 0.0
        self.steps_s: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.current_s += time.perf_counter() - begin
            return result

        return timed

    def mark(self) -> None:
        self.steps_s.append(self.current_s)
        self.current_s = 0.0

    def start(self) -> None:
        self.current_s, self.steps_s = 0.0, []


def report(
    name: str,
    args: argparse.Namespace,
    clock: Clock,
    rollout: Stopwatch,
    *,
    made: Sequence[int] | None = None,
    **more: Any,
) -> None:
    """Print the result as one JSON line on standard output.

    `tokens_per_s` counts new tokens over whole steps, `made` of each if they are not
    all; `rollout_s` is what `rollout` saw of a step, `update_s` the rest.
    """
    kept = rollout.steps_s[args.warmup :]
    updates = [step - part for step, part in zip(clock.steps_s, kept, strict=True)]
    if made is not None:
        speeds = zip(made, clock.steps_s, strict=True)
        more["tokens_per_s"] = statistics.median(n / step for n, step in speeds)
    sft_settings.report(
        name,
        args,
        clock,
        rollout_s=statistics.median(kept),
        update_s=statistics.median(updates),
        rollouts_s=kept,
        **more,
    )
