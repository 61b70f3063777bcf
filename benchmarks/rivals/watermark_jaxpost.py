"""jaxpost's watermark: processing, detecting, decoding; prints one JSON line.

SWEET, entropies and threshold included, but for processing with `--tau -1`: WLLM.
"""

import os

from generate_settings import Clock, print_line, prompts
from watermark_settings import KEY, logits, parse, texts

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from sft_jaxpost import build_model

from jaxpost import generation
from jaxpost.generation import watermark


def main() -> None:
    works = {"process": process, "detect": detect, "decode": decode}
    args = parse(
        __doc__,
        work={"choices": tuple(works), "default": "process"},
        tau={"type": float, "default": 0.9},
    )
    works[args.work](args)


def process(args) -> None:
    """One step's logits, one call per step, as a caller outside of our loop has it."""
    sizes = args.sizes
    key = watermark.WatermarkKey(KEY, sizes["vocab"])
    settings = {"gamma": sizes["gamma"], "delta": sizes["delta"], "tau": args.tau}
    processor = watermark.processor(key, **settings)

    @jax.jit
    def step(raw, prev_ids):
        batch = prev_ids.shape[0]
        state = generation.ProcessorState(
            prev_ids[:, None], jnp.ones((batch,), jnp.int32), jnp.zeros((batch,))
        )
        return processor(raw, state)[0]

    raw = jnp.asarray(logits(sizes))
    before = jnp.asarray(texts(sizes)[: sizes["batch"]])
    columns = [before[:, n] for n in range(64)]
    clock = Clock(args.warmup)
    for _ in range(args.warmup + args.calls):
        for column in columns:
            out = step(raw, column)
            out.block_until_ready()
        clock.tick()
    changed = float(np.mean(np.asarray(out != raw)))
    made = np.zeros((sizes["batch"], len(columns)), np.int32).ravel()
    method = "SWEET" if args.tau >= 0 else "WLLM"
    report(args, clock, made, f"{method}, one jitted call per step", changed=changed)


def detect(args) -> None:
    """All texts at once, from tokens and entropies to verdicts."""
    sizes = args.sizes
    key = watermark.WatermarkKey(KEY, sizes["vocab"])
    tokens = texts(sizes)
    heights = np.full(tokens.shape, 2.0, np.float32)
    mask = np.broadcast_to(np.arange(tokens.shape[1])[None] > 0, tokens.shape).copy()
    clock = Clock(args.warmup)
    for _ in range(args.warmup + args.calls):
        found = watermark.detect_batch(
            tokens, heights, mask, key, gamma=sizes["gamma"], tau=0.9
        )
        clock.tick()
    counts = [one.green_fraction for one in found]
    report(
        args,
        clock,
        tokens[:, 1:].ravel(),
        "SWEET, tokens and entropies to verdicts",
        green_fraction=float(np.mean(counts)),
    )


def decode(args) -> None:
    """Whole decoding steps with and without the watermark, interleaved."""
    sizes = args.sizes
    model = build_model(sizes, sizes["prompt"] + sizes["new_tokens"])
    tokens = prompts(sizes)
    key = watermark.WatermarkKey(KEY, sizes["vocab"])
    settings = {"gamma": sizes["gamma"], "delta": sizes["delta"], "tau": args.tau}
    rows = {"plain": (), "marked": (watermark.processor(key, **settings),)}
    sampling = generation.SamplingConfig(
        max_new_tokens=sizes["new_tokens"], temperature=sizes["temperature"]
    )
    times: dict[str, list[float]] = {name: [] for name in rows}
    clock = Clock(args.warmup)
    for number in range(args.warmup + args.calls):
        for name, processors in rows.items():
            start = time.perf_counter()
            rollout = generation.generate(
                model,
                model.params,
                tokens,
                np.ones(tokens.shape, bool),
                config=sampling,
                processors=processors,
                key=jax.random.key(number),
            )
            made = np.asarray(rollout.tokens)
            if number >= args.warmup:
                times[name].append(time.perf_counter() - start)
            if name == "marked":
                clock.tick()
    medians = {name: statistics.median(times[name]) for name in rows}
    # Neighbours in time are compared, since the machine's speed drifts.
    ratios = [m / p for p, m in zip(times["plain"], times["marked"], strict=True)]
    report(
        args,
        clock,
        np.tile(made.ravel(), 2),
        "plain and marked calls in turn",
        step_ms={n: s / sizes["new_tokens"] * 1e3 for n, s in medians.items()},
        embedding_share=statistics.median(ratios) - 1.0,
    )


def report(args, clock: Clock, tokens, settings: str, **more) -> None:
    print_line(
        "jaxpost",
        args,
        clock,
        tokens,
        settings=settings,
        versions=f"jax {jax.__version__}",
        **more,
    )


if __name__ == "__main__":
    main()
