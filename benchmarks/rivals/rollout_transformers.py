"""transformers on the uneven stream; prints one JSON line.

`--work batches`: `generate` in batches, each until its longest answer ends, sdpa and a
dynamic cache, the fastest on equal lengths. `--work continuous`: its own continuous
batching, `generate_batch`'s manager with a limit per request.
"""

import numpy as np
from generate_settings import Clock
from generate_transformers import build_model
from rollout_settings import parse, report, stream


def main() -> None:
    args = parse(
        __doc__,
        work={"choices": ("batches", "continuous"), "default": "batches"},
    )
    import torch
    import transformers

    sizes = args.sizes
    model = build_model(args, sizes["prompt"] + sizes["most_tokens"])
    settings = transformers.GenerationConfig(
        max_new_tokens=sizes["most_tokens"],
        do_sample=True,
        temperature=sizes["temperature"],
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    prompts, lengths = stream(sizes)

    class Lengths(transformers.StoppingCriteria):
        """Each row ends at its own length."""

        def __init__(self, wanted: np.ndarray):
            self.wanted = torch.from_numpy(wanted)

        def __call__(self, input_ids, scores, **_):
            return input_ids.shape[1] - sizes["prompt"] >= self.wanted

    @torch.inference_mode()
    def in_batches(count: int) -> list:
        found, size = [], sizes["batch"]
        for begin in range(0, count, size):
            part = slice(begin, begin + size)
            tokens = torch.from_numpy(prompts[part]).long()
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                stopping_criteria=[Lengths(lengths[part])],
            )
            new = out[:, sizes["prompt"] :].numpy()
            found += [row[:n] for row, n in zip(new, lengths[part], strict=True)]
        return found

    def continuous(count: int) -> list:
        settings.eos_token_id = -1
        batching = transformers.ContinuousBatchingConfig(
            max_requests_per_batch=sizes["batch"],
            max_batch_tokens=sizes["batch"] * sizes["prompt"],
            num_blocks=64,
            page_size=64,
            allow_block_sharing=False,
        )
        found: dict = {}
        with model.continuous_batching_context_manager(
            generation_config=settings,
            continuous_batching_config=batching,
            block=True,
            timeout=5,
        ) as manager:
            for number in range(count):
                manager.add_request(
                    prompts[number].tolist(),
                    request_id=str(number),
                    max_new_tokens=int(lengths[number]),
                )
            while len(found) < count:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[int(result.request_id)] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise SystemExit("the manager stopped")
        return [found[number] for number in range(count)]

    work = in_batches if args.work == "batches" else continuous
    clock = Clock(args.warmup)
    answers = []
    for number in range(args.warmup + args.calls):
        answers = work(sizes["batch"] if number < args.warmup else len(prompts))
        clock.tick()
    report(
        f"transformers, {args.work}",
        args,
        clock,
        answers,
        settings=f"{args.work}, sdpa",
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


if __name__ == "__main__":
    main()
