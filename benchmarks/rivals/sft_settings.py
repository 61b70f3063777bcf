"""What every SFT rival shares: sizes, data, timing, the one JSON line at the end.

Runs in the rivals' environments too: standard library and NumPy only.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import time

import numpy as np

SIZES = {
    "hidden": 256,
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 32,
    "ffn": 688,
    "vocab": 32000,
    "batch": 8,
    "length": 512,
    "tied": False,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
}


def parse(
    description: str | None,
    *,
    unit: str = "steps",
    count: int = 10,
    sizes: dict | None = None,
    **extra: dict,
) -> argparse.Namespace:
    """The command line of a rival: `sizes` is a dict, `extra` flags as named."""
    known = SIZES if sizes is None else sizes
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{unit}", type=int, default=count, help=f"timed {unit}")
    parser.add_argument("--warmup", type=int, default=2, help=f"{unit} before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--remat", action="store_true", help="recompute activations")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON, see SIZES")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    unknown = sorted(set(args.sizes) - set(known))
    if unknown:
        parser.error(f"unknown sizes {unknown}; known: {sorted(known)}")
    args.sizes = {**known, **args.sizes}
    return args


def transformers_llama(sizes: dict, positions: int) -> dict:
    """Arguments of `transformers.LlamaConfig` for these sizes."""
    return {
        "vocab_size": sizes["vocab"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "max_position_embeddings": positions,
        "tie_word_embeddings": sizes["tied"],
    }


def batches(sizes: dict, count: int) -> np.ndarray:
    """Random token ids, int32 `[count, B, T]`: full rows, nothing to pad or pack."""
    shape = (count, sizes["batch"], sizes["length"])
    return np.random.default_rng(0).integers(3, sizes["vocab"], shape, dtype=np.int32)


def peak_bytes() -> int:
    """Largest resident set of this process so far.

    `ru_maxrss` counts the parent's pages that a fork shared before `exec`; Linux's
    `VmHWM` starts anew with the program.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Clock:
    """Seconds between successive calls of `tick`, after a warm-up.

    Also the processor time of all threads, which a busy machine disturbs less.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.start()

    def start(self) -> None:
        self.ticks: list[float] = [time.perf_counter()]
        self.cpu_ticks: list[float] = [time.process_time()]

    def tick(self) -> None:
        self.ticks.append(time.perf_counter())
        self.cpu_ticks.append(time.process_time())

    @property
    def first_s(self) -> float:
        return self.ticks[1] - self.ticks[0]

    @property
    def steps_s(self) -> list[float]:
        return self._differences(self.ticks)

    @property
    def cpu_steps_s(self) -> list[float]:
        return self._differences(self.cpu_ticks)

    def _differences(self, ticks: list[float]) -> list[float]:
        pairs = itertools.pairwise(ticks)
        return [after - before for before, after in pairs][self.warmup :]


def report(name: str, args: argparse.Namespace, clock: Clock, **more) -> None:
    """Print the result as one JSON line on standard output."""
    median_s = statistics.median(clock.steps_s)
    tokens = args.sizes["batch"] * args.sizes["length"]
    line = {
        "name": name,
        "tokens_per_s": tokens / median_s,
        "step_s": median_s,
        "steps_s": clock.steps_s,
        "cpu_step_s": statistics.median(clock.cpu_steps_s),
        "first_step_s": clock.first_s,
        "peak_bytes": peak_bytes(),
        "remat": args.remat,
        "threads": args.threads,
        "sizes": args.sizes,
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        **more,
    }
    print(json.dumps(line), flush=True)
