"""Tunix's Sampler with its Llama 3 of this size, sampling; prints one JSON line.

Its own compiled loop; no log-probabilities or logits returned, unless `--logprobs`.
`top_p=1` without top-k is its fastest sampling: no sort.
"""

import os

from generate_settings import Clock, parse, prompts, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")


class NoTokenizer:
    """Texts are numbers in words; nothing ends or begins a text."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def main() -> None:
    args = parse(
        __doc__,
        logprobs={"action": "store_true"},
        top_k={"type": int, "default": None},
        top_p={"type": float, "default": 1.0},
    )
    import importlib.metadata

    import jax
    import numpy as np
    from sft_tunix import build_model
    from tunix.generate import sampler

    sizes = args.sizes
    total = sizes["prompt"] + sizes["new_tokens"]
    rival = sampler.Sampler(
        build_model(sizes, remat=False),
        NoTokenizer(),
        sampler.CacheConfig(
            cache_size=total,
            num_layers=sizes["layers"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
        ),
    )
    texts = [" ".join(map(str, row)) for row in prompts(sizes).tolist()]
    clock = Clock(args.warmup)
    for number in range(args.warmup + args.calls):
        out = rival(
            texts,
            max_generation_steps=sizes["new_tokens"],
            max_prompt_length=sizes["prompt"],
            return_logprobs=args.logprobs,
            eos_tokens=[-1],
            temperature=sizes["temperature"],
            top_p=args.top_p,
            top_k=args.top_k,
            seed=number,
        )
        clock.tick()
    report(
        "Tunix Sampler",
        args,
        clock,
        np.stack(out.tokens),
        settings=f"top_k={args.top_k}, top_p={args.top_p}, logprobs={args.logprobs}",
        versions=f"tunix {importlib.metadata.version('google-tunix')}, "
        f"jax {jax.__version__}",
    )


if __name__ == "__main__":
    main()
