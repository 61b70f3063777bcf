"""A plain training loop over transformers' Llama: forward, backward, AdamW.

Prints one JSON line. `--compile`
runs the model through torch.compile; `--optimizer` picks AdamW's implementation.
"""

from sft_settings import Clock, batches, parse, report, transformers_llama


def main() -> None:
    args = parse(
        __doc__,
        compile={"type": int, "default": 0},
        optimizer={"choices": ("fused", "foreach", "loop"), "default": "fused"},
    )
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = args.sizes
    config = transformers.LlamaConfig(
        **transformers_llama(sizes, sizes["length"]),
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    if args.remat:
        model.gradient_checkpointing_enable()
    kinds = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {}}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=sizes["learning_rate"],
        weight_decay=sizes["weight_decay"],
        **kinds[args.optimizer],
    )
    run = torch.compile(model) if args.compile else model
    data = torch.from_numpy(batches(sizes, args.warmup + args.steps)).long()
    clock = Clock(args.warmup)
    for tokens in data:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick()
    report(
        "transformers loop",
        args,
        clock,
        settings=f"AdamW {args.optimizer}, sdpa, torch.compile={bool(args.compile)}",
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
        loss=float(loss.detach()),
    )


if __name__ == "__main__":
    main()
