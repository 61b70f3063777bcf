"""transformers' own watermark processor and detector; prints one JSON line.

Its processor takes the permutation that its green list is cut from anew for each row;
its detector keeps the 128 latest in a cache, which texts of random tokens do not hit.
Both at their own defaults, on all threads.
"""

from generate_settings import Clock, print_line
from watermark_settings import KEY, logits, parse, texts


def main() -> None:
    args = parse(__doc__, work={"choices": ("process", "detect"), "default": "process"})
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    sizes = args.sizes
    settings = transformers.WatermarkingConfig(
        greenlist_ratio=sizes["gamma"], bias=sizes["delta"], hashing_key=KEY
    )
    tokens = torch.from_numpy(texts(sizes)).long()
    clock = Clock(args.warmup)
    more = {}
    if args.work == "process":
        processor = settings.construct_processor(sizes["vocab"], "cpu")
        raw = torch.from_numpy(logits(sizes))
        rows = tokens[: sizes["batch"]]
        steps = 64
        with torch.inference_mode():
            for _ in range(args.warmup + args.calls):
                for step in range(1, steps + 1):
                    out = processor(rows[:, :step], raw)
                clock.tick()
        more["changed"] = float((out != raw).float().mean())
        made = np.zeros((sizes["batch"] * steps,), np.int32)
    else:
        config = transformers.LlamaConfig(
            vocab_size=sizes["vocab"], bos_token_id=1, eos_token_id=2
        )
        with torch.inference_mode():
            for _ in range(args.warmup + args.calls):
                # A new one each time, so that no call finds the last one's lists.
                detector = transformers.WatermarkDetector(
                    model_config=config, device="cpu", watermarking_config=settings
                )
                found = detector(tokens, return_dict=True)
                clock.tick()
        more["green_fraction"] = float(np.mean(found.green_fraction))
        made = tokens[:, 1:].numpy().ravel()
    print_line(
        "transformers",
        args,
        clock,
        made,
        settings=f"WLLM, {args.work}, lefthash",
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        **more,
    )


if __name__ == "__main__":
    main()
