"""TRL's SFTTrainer at its best on this size: no logging, evaluation, saving, padding.

Its loss is TRL's default, which never builds the whole logits. Prints one JSON line.
"""

import os
import sys
import tempfile

from sft_settings import Clock, batches, parse, report, transformers_llama

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parse_trl(parse, description: str | None):
    """`parse` with the flags that TRL's trainers share."""
    return parse(
        description,
        optim={"default": "adamw_torch_fused"},
        compile={"type": int, "default": 0},
    )


def ticking_callback(clock: Clock):
    """A callback of the trainer that ticks `clock` at each step's end."""
    import transformers

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.tick()

    return Ticks()


def quiet_settings(args) -> dict:
    """The trainer's arguments at their best: nothing but training."""
    sizes = args.sizes
    return {
        "learning_rate": sizes["learning_rate"],
        "weight_decay": sizes["weight_decay"],
        "lr_scheduler_type": "constant",
        "optim": args.optim,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": args.remat,
        "torch_compile": bool(args.compile),
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def main() -> None:
    args = parse_trl(parse, __doc__)
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = args.sizes
    clock = Clock(args.warmup)

    config = transformers.LlamaConfig(
        **transformers_llama(sizes, sizes["length"]),
        use_cache=False,
    )
    steps = args.warmup + args.steps
    rows = batches(sizes, steps).reshape(-1, sizes["length"])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}, "<eos>"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model=transformers.LlamaForCausalLM(config),
            args=trl.SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=sizes["batch"],
                max_length=sizes["length"],
                dataset_kwargs={"skip_prepare_dataset": True},
                **quiet_settings(args),
                average_tokens_across_devices=False,
            ),
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
            ),
            callbacks=[ticking_callback(clock)],
        )
        stdout, sys.stdout = sys.stdout, sys.stderr  # the trainer prints its summary
        result = trainer.train()
        sys.stdout = stdout
    report(
        "TRL SFTTrainer",
        args,
        clock,
        settings=f"{args.optim}, chunked loss, torch_compile={bool(args.compile)}",
        versions=f"trl {trl.__version__}, torch {torch.__version__}",
        loss=result.training_loss,
    )


if __name__ == "__main__":
    main()
