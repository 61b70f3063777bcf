"""jaxpost's GRPO, timed as its rivals are: the recipe itself, from a config to the end.

A step runs from the beginning of one rollout to that of the next. Its end token has to
be in the vocabulary, where about one token in as many as there are is drawn; the few
answers that end there are not made longer, and only the tokens made are counted. Runs
in the project's own environment; prints one JSON line.
"""

import contextlib
import io
import json
import os
import pathlib
import tempfile

from grpo_settings import Stopwatch, parse, prompt_tokens, report, rewards_of
from sft_settings import Clock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import tokenizers

from jaxpost import data, generation, training
from jaxpost.recipes import grpo
from jaxpost.recipes._policy import PolicySection
from jaxpost.recipes._rounds import RolloutSection
from jaxpost.recipes._sections import (
    DataSection,
    ExportSection,
    ModelSection,
    TrainSection,
)


def write_data(folder: pathlib.Path, sizes: dict, count: int) -> None:
    """A tokenizer whose words are numbers, and prompts that are 64 of them."""
    vocab = {f"w{i}": i for i in range(sizes["vocab"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "w0"))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    data.make_tokenizer(backend, {"eos_token_id": 0, "pad_token_id": 0}).save(folder)
    with open(folder / "prompts.jsonl", "w") as file:
        for row in prompt_tokens(sizes, count).reshape(-1, sizes["prompt"]).tolist():
            text = " ".join(f"w{i}" for i in row)
            file.write(json.dumps({"prompt": text, "answer": "w1"}) + "\n")


def config_of(args, folder: pathlib.Path, rounds: int) -> grpo.GRPOConfig:
    """The rivals' sizes and settings; nothing logged, saved or shown on the way."""
    sizes = args.sizes
    return grpo.GRPOConfig(
        name="run",
        run_root=str(folder),
        rollout=RolloutSection(
            samples=sizes["samples"],
            max_new_tokens=sizes["new_tokens"],
            temperature=sizes["temperature"],
            slots=args.slots,
            answers_per_row=args.answers_per_row,
            show_every=0,
        ),
        policy=PolicySection(clip_low=sizes["clip"], clip_high=sizes["clip"]),
        model=ModelSection(
            tokenizer=str(folder),
            remat="full" if args.remat else "none",
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["ffn"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
            max_positions=sizes["prompt"] + sizes["new_tokens"],
            tie_embeddings=sizes["tied"],
        ),
        data=DataSection(
            train=str(folder / "prompts.jsonl"), max_length=sizes["prompt"]
        ),
        optimizer=training.OptimizerConfig(
            learning_rate=sizes["learning_rate"],
            weight_decay=sizes["weight_decay"],
            schedule="constant",
        ),
        train=TrainSection(
            steps=rounds,
            batch_size=sizes["prompts"],
            accumulate=args.accumulate,
            log_every=rounds,
        ),
        export=ExportSection(enabled=False),
    )


class Drawn(list):
    """Answers, and the sums over them."""

    stats: generation.StreamStats


class Compiled:
    """Counts the programs that XLA compiles from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def main() -> None:
    args = parse(
        __doc__,
        slots={"type": int, "default": None},
        answers_per_row={"type": int, "default": None},
        accumulate={"type": int, "default": 1},
    )
    sizes = args.sizes
    clock, rollout, compiled = Clock(args.warmup), Stopwatch(), Compiled()
    generate_stream = generation.generate_stream
    counts, made = [], []

    def stream(fns, params, *more, **options) -> Drawn:
        # Which every rollout waits for: what came before was the step.
        jax.block_until_ready(params)
        if not counts:
            clock.start()
        else:
            clock.tick()
            rollout.mark()
        counts.append(compiled.count)
        return draw(fns, params, *more, **options)

    @rollout.around
    def draw(*given, **options) -> Drawn:
        answers = generate_stream(*given, **options)
        drawn = Drawn(answers)
        drawn.stats = answers.stats
        made.append(sum(len(answer.tokens) for answer in drawn))
        return drawn

    def reward(prompts, completions, completion_ids, **_):
        return rewards_of(completion_ids, sizes, all_full=False)

    generation.generate_stream = stream  # the recipe calls it by this name
    # One more than is timed: a step ends where the next rollout begins.
    rounds = args.warmup + args.steps + 1
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        folder = pathlib.Path(name)
        write_data(folder, sizes, rounds)
        state = grpo.run(config_of(args, folder, rounds), rewards={"sum": reward})
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        logged = json.loads(lines[-1])
    if int(state.step) != rounds:
        raise SystemExit(f"{int(state.step)} steps, not {rounds}")
    report(
        "jaxpost",
        args,
        clock,
        rollout,
        made=made[args.warmup : args.warmup + args.steps],
        settings="with log-probabilities and entropies of the sampler, "
        f"accumulate={args.accumulate}",
        versions=f"jax {jax.__version__}",
        loss=logged["loss"],
        traces=logged["compile/traces"],
        programs=generation.trace_counts(),
        compiled_later=counts[args.warmup + args.steps] - counts[max(args.warmup, 1)],
        difference=logged.get("sampling/sampling_logp_difference/max"),
    )


if __name__ == "__main__":
    main()
