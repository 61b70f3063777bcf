"""TRL's GRPOTrainer with transformers generation, at its best on this size.

No logging, evaluation, saving or padding, no reference model (`beta=0`, its default).
Its data are texts of words that its tokenizer turns back into the shared tokens. Its
end token lies outside the model's vocabulary, so that every answer is as long as the
others without a processor that forbids it. Prints one JSON line.
"""

import os
import sys
import tempfile

from grpo_settings import Stopwatch, parse, prompt_tokens, report, rewards_of
from sft_settings import Clock, transformers_llama
from sft_trl import parse_trl, quiet_settings, ticking_callback

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def build_tokenizer(vocab_size: int):
    """Words `w3` are the token 3; the end token is one more than the model knows."""
    import tokenizers
    import transformers

    eos = "<eos>"
    vocab = {f"w{i}": i for i in range(vocab_size)} | {eos: vocab_size}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, eos))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=eos
    )


def main() -> None:
    args = parse_trl(
        lambda description, **extra: parse(
            description,
            microbatch={"type": int, "default": 0, "help": "answers; 0 takes all"},
            cache={"default": None, "help": "transformers' cache_implementation"},
            **extra,
        ),
        __doc__,
    )
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    sizes = args.sizes
    clock, rollout = Clock(args.warmup), Stopwatch()
    steps = args.warmup + args.steps
    prompts = prompt_tokens(sizes, steps).reshape(-1, sizes["prompt"])
    config = transformers.LlamaConfig(
        **transformers_llama(sizes, sizes["prompt"] + sizes["new_tokens"]),
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    microbatch = args.microbatch or sizes["batch"]

    def reward(prompts, completions, completion_ids, **_):
        return rewards_of(completion_ids, sizes)

    class Timed(trl.GRPOTrainer):
        """Knows how long the answers took: drawn, rewarded, advantages computed."""

        def _generate_and_score_completions(self, inputs):
            return rollout.around(super()._generate_and_score_completions)(inputs)

    class Marks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            rollout.start()

        def on_step_end(self, *_, **__):
            rollout.mark()

    stdout, sys.stdout = sys.stdout, sys.stderr  # the trainer prints its summary
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=transformers.LlamaForCausalLM(config),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=microbatch,
                gradient_accumulation_steps=sizes["batch"] // microbatch,
                num_generations=sizes["samples"],
                max_completion_length=sizes["new_tokens"],
                temperature=sizes["temperature"],
                epsilon=sizes["clip"],
                beta=0.0,
                shuffle_dataset=False,
                cache_implementation=args.cache,
                generation_kwargs={"eos_token_id": None},
                **quiet_settings(args),
            ),
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": [" ".join(f"w{i}" for i in row) for row in prompts]}
            ),
            processing_class=build_tokenizer(sizes["vocab"]),
            callbacks=[ticking_callback(clock), Marks()],
        )
        result = trainer.train()
    sys.stdout = stdout
    report(
        "TRL GRPOTrainer",
        args,
        clock,
        rollout,
        settings=f"{args.optim}, {microbatch} answers at a time, cache="
        f"{args.cache or 'dynamic'}, torch_compile={bool(args.compile)}, sdpa",
        versions=f"trl {trl.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        loss=result.training_loss,
    )


if __name__ == "__main__":
    main()
