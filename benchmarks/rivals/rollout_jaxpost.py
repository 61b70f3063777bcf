"""jaxpost's continuous batching, and its static batches, on the uneven stream or on
equal lengths; prints one JSON line.

Unlike the rivals it also returns log-probabilities and entropies of every token.
"""

import os

import generate_settings
import rollout_settings
from generate_settings import Clock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from sft_jaxpost import build_model

from jaxpost import generation


def main() -> None:
    args = rollout_settings.parse(
        __doc__,
        work={"choices": ("stream", "batches", "equal"), "default": "stream"},
        refill_every={"type": int, "default": 16},
    )
    sizes = args.sizes
    model = build_model(sizes, sizes["prompt"] + sizes["most_tokens"])
    prompts, lengths = rollout_settings.stream(sizes)
    if args.work == "equal":
        prompts = generate_settings.prompts(sizes)
        lengths = np.full((sizes["batch"],), sizes["new_tokens"])
    more = {}

    def serve(prompts: np.ndarray, lengths: np.ndarray, number: int) -> list:
        most = sizes["new_tokens" if args.work == "equal" else "most_tokens"]
        answers = generation.generate_stream(
            model,
            model.params,
            prompts,
            config=generation.SamplingConfig(
                max_new_tokens=most, temperature=sizes["temperature"]
            ),
            slots=sizes["batch"],
            limits=lengths,
            key=jax.random.key(number),
            refill_every=args.refill_every,
        )
        finished = sorted(answers, key=lambda answer: answer.prompt)
        more.update(
            utilisation=answers.stats.utilisation,
            steps=answers.stats.steps,
            near=answers.stats.near,
        )
        return [answer.tokens for answer in finished]

    def in_batches(prompts: np.ndarray, lengths: np.ndarray, number: int) -> list:
        """Each until its longest answer ends; the cache has no room for more."""
        found, size = [], sizes["batch"]
        for begin in range(0, len(prompts), size):
            part = slice(begin, begin + size)
            rollout = generation.generate(
                model,
                model.params,
                prompts[part],
                np.ones(prompts[part].shape, bool),
                config=generation.SamplingConfig(
                    max_new_tokens=int(lengths[part].max()),
                    temperature=sizes["temperature"],
                ),
                key=jax.random.key(number),
                sequence_ids=np.arange(begin, begin + len(prompts[part])),
            )
            tokens = jax.device_get(rollout).tokens
            found += [
                row[:length] for row, length in zip(tokens, lengths[part], strict=True)
            ]
        return found

    work = in_batches if args.work == "batches" else serve
    if args.work == "batches":  # one batch of each bucket, to compile it
        buckets = {generation.bucket_length(int(n)): int(n) for n in lengths}
        for longest in buckets.values():
            in_batches(
                prompts[: sizes["batch"]], np.full((sizes["batch"],), longest), 0
            )
    clock = Clock(args.warmup)
    answers = []
    for number in range(args.warmup + args.calls):
        # A short stream compiles as much as a long one.
        count = 2 * sizes["batch"] if number < args.warmup else len(prompts)
        answers = work(prompts[:count], lengths[:count], number)
        clock.tick()
    name = f"jaxpost, {args.work}"
    more |= {
        "settings": f"{sizes['batch']} slots, with log-probabilities"
        if work is serve
        else f"batches of {sizes['batch']}, with log-probabilities",
        "versions": f"jax {jax.__version__}",
        "traces": generation.trace_counts(),
    }
    if args.work == "equal":
        generate_settings.report(name, args, clock, answers, **more)
    else:
        rollout_settings.report(name, args, clock, answers, **more)


if __name__ == "__main__":
    main()
