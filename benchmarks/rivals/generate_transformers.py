"""transformers' `generate` with its Llama, sampling, at its best; one JSON line.

Inference mode, sdpa, all threads, no scores returned, no end token. `--cache static`
uses the fixed-size cache; `--compile` also lets generate compile the model for it.
"""

from generate_settings import Clock, parse, prompts, report
from sft_settings import transformers_llama


def build_model(args, positions: int):
    """The Llama of these sizes, random, ready to generate on all threads."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        **transformers_llama(args.sizes, positions), attn_implementation="sdpa"
    )
    return transformers.LlamaForCausalLM(config).eval()


def main() -> None:
    args = parse(
        __doc__,
        cache={"choices": ("dynamic", "static"), "default": "dynamic"},
        compile={"action": "store_true"},
        top_k={"type": int, "default": 0},
        top_p={"type": float, "default": 1.0},
    )
    import torch
    import transformers

    sizes = args.sizes
    model = build_model(args, sizes["prompt"] + sizes["new_tokens"])
    settings = {
        "max_new_tokens": sizes["new_tokens"],
        "do_sample": True,
        "temperature": sizes["temperature"],
        "top_k": args.top_k,
        "top_p": args.top_p,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if args.cache == "static":
        settings["cache_implementation"] = "static"
        settings["disable_compile"] = not args.compile
    if args.compile:
        compiling = transformers.generation.CompileConfig(mode="default")
        compiling._compile_all_devices = True  # by default not on CPU
        settings["compile_config"] = compiling
    generation_config = transformers.GenerationConfig(**settings)
    tokens = torch.from_numpy(prompts(sizes)).long()
    mask = torch.ones_like(tokens)
    clock = Clock(args.warmup)
    for _ in range(args.warmup + args.calls):
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=mask, generation_config=generation_config
            )
        clock.tick()
    report(
        "transformers generate",
        args,
        clock,
        out[:, sizes["prompt"] :].numpy(),
        settings=f"{args.cache} cache, compiled={args.compile}, sdpa, "
        f"top_k={args.top_k}, top_p={args.top_p}",
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )


if __name__ == "__main__":
    main()
