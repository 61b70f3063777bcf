"""jaxpost's generation on the shared sizes; prints one JSON line.

Unlike the rivals it also returns log-probabilities and entropies of every token.
"""

import os

from generate_settings import Clock, parse, prompts, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from sft_jaxpost import build_model

from jaxpost import generation


def main() -> None:
    args = parse(
        __doc__,
        top_k={"type": int, "default": None},
        top_p={"type": float, "default": None},
    )
    sizes = args.sizes
    model = build_model(sizes, sizes["prompt"] + sizes["new_tokens"])
    tokens = prompts(sizes)
    mask = np.ones(tokens.shape, bool)
    sampling = generation.SamplingConfig(
        max_new_tokens=sizes["new_tokens"],
        temperature=sizes["temperature"],
        top_k=args.top_k,
        top_p=args.top_p,
    )
    clock = Clock(args.warmup)
    for number in range(args.warmup + args.calls):
        rollout = generation.generate(
            model,
            model.params,
            tokens,
            mask,
            config=sampling,
            key=jax.random.key(number),
        )
        rollout = jax.device_get(rollout)
        clock.tick()
    report(
        "jaxpost",
        args,
        clock,
        rollout.tokens,
        settings=f"top_k={args.top_k}, top_p={args.top_p}, with log-probabilities",
        versions=f"jax {jax.__version__}",
        traces=generation.trace_counts(),
    )


if __name__ == "__main__":
    main()
