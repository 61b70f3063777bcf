"""TRL's DPOTrainer at its best on this size: no logging, evaluation, saving, padding.

Its data are texts of words that its tokenizer turns back into the shared tokens. Prints
one JSON line.
"""

import copy
import os
import sys
import tempfile

from dpo_settings import END, pair_tokens, parse
from sft_settings import Clock, report, transformers_llama
from sft_trl import parse_trl, quiet_settings, ticking_callback

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def words_of(ids, eos):
    return " ".join(eos if i == END else f"w{i}" for i in ids)


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
    eos = "<eos>"
    vocab = {eos: END} | {f"w{i}": i for i in range(1, sizes["vocab"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, eos))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=eos
    )
    steps = args.warmup + args.steps
    tokens = pair_tokens(sizes, steps).reshape(-1, 2, sizes["length"])
    split = sizes["prompt"]
    data = datasets.Dataset.from_dict(
        {
            "prompt": [words_of(pair[0, :split], eos) + " " for pair in tokens],
            "chosen": [words_of(pair[0, split:], eos) for pair in tokens],
            "rejected": [words_of(pair[1, split:], eos) for pair in tokens],
        }
    )
    config = transformers.LlamaConfig(
        **transformers_llama(sizes, sizes["length"]), use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    stdout, sys.stdout = sys.stdout, sys.stderr  # the trainer prints its summary
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=model,
            # Without one, it would look the model up by a name.
            ref_model=copy.deepcopy(model) if args.reference == "live" else None,
            args=trl.DPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=sizes["pairs"],
                precompute_ref_log_probs=args.reference == "precomputed",
                precompute_ref_batch_size=sizes["pairs"],
                beta=sizes["beta"],
                max_length=None,
                **quiet_settings(args),
            ),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[ticking_callback(clock)],
        )
        first = trainer.train_dataset[0]
        lengths = [len(first[n]) for n in ("prompt_ids", "chosen_ids", "rejected_ids")]
        expected = [split, *[sizes["length"] - split] * 2]
        if lengths != expected:
            raise SystemExit(f"TRL made lengths {lengths} of the pairs, not {expected}")
        result = trainer.train()
    sys.stdout = stdout
    report(
        "TRL DPOTrainer",
        args,
        clock,
        settings=f"{args.optim}, reference {args.reference}, "
        f"torch_compile={bool(args.compile)}",
        versions=f"trl {trl.__version__}, torch {torch.__version__}",
        reference=args.reference,
        loss=result.training_loss,
    )


if __name__ == "__main__":
    main()
