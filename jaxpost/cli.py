"""The `jaxpost` command: one verb per job, each with its own `--help`.

Only reads arguments, calls one function of a lower room and prints. Errors that a user
can mend end with one line on standard error and status 2.
"""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

HUGE_PAGES = "glibc.malloc.hugetlb=1"


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Complete prompts with a model in Hugging Face layout.

    Attributes:
        model: Folder or hub name of the model.
        prompt: A prompt; may be given several times.
        prompts: File of prompts (JSONL with a `prompt` or `messages` column).
        output: JSONL file for the completions; an existing one of the same model,
            prompts and settings is continued.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        chat: Render each prompt as a user turn through the chat template.
        max_new_tokens: Longest completion, tokens.
        temperature: 0 takes the most likely token each time.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens with this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        stop: String that ends a completion; may be given several times.
        batch_size: Answers decoded at a time; a free slot takes the next prompt.
        seed: Of the sampler.
        dtype: Data type of the weights and the cache.
    """

    model: Positional[str]
    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts: str | None = None
    output: str | None = None
    tokenizer: str | None = None
    chat: bool = False
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: UseAppendAction[tuple[str, ...]] = ()
    batch_size: int = 16
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Convert weights to sharded safetensors in Hugging Face layout, and verify them.

    Attributes:
        source: Folder, hub name, or llama2.c `.bin` file.
        destination: Folder to write; replaced whole only once everything is written.
        dtype: Data type to store; the source's if not given.
        max_shard_bytes: Largest size of one safetensors file, bytes.
        tokenizer: Folder of the tokenizer, if not with the source.
    """

    source: Positional[str]
    destination: Positional[str]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_bytes: int = 5_000_000_000
    tokenizer: str | None = None


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write `report.html` from one or more run folders: curves, samples, settings.

    Attributes:
        runs: Run folders to show on the same axes.
        out: File to write; `report.html` in the last run folder if not given.
    """

    runs: Positional[tuple[str, ...]]
    out: str | None = None


def train(arguments: Sequence[str]) -> int:
    """Run a recipe from a YAML config, with `--section.key value` overrides."""
    from jaxpost import recipes

    resume, flags = _take_switch("--resume", arguments)
    path, flags = _take_config("train", flags)
    config = recipes.load_config(path, flags, prog="jaxpost train CONFIG [--resume]")
    recipes.run(config, resume=resume)
    return 0


def verify_resume(arguments: Sequence[str]) -> int:
    """Kill a run at random moments, resume it, and compare it bit for bit."""
    from jaxpost.recipes.verify_resume import verify_resume

    kills, flags = _take_number("--kills", arguments, 1)
    seed, flags = _take_number("--kill-seed", flags, 0)
    path, flags = _take_config("verify-resume", flags)
    if path is None:
        from jaxpost import recipes

        prog = "jaxpost verify-resume CONFIG [--kills N] [--kill-seed N]"
        recipes.load_config(None, flags, prog=prog)  # shows the flags and exits
        return 0
    verdicts = verify_resume(path, flags, kills=kills, seed=seed)
    return 1 if any(verdict.problems for verdict in verdicts) else 0


def plan(arguments: Sequence[str]) -> int:
    """Forecast memory, traffic and time of a run on devices you do not have."""
    from jaxpost.recipes.plan import run_plan

    path, flags = _take_config("plan", arguments)
    run_plan(path, flags)
    return 0


def data_check(arguments: Sequence[str]) -> int:
    """Show how a config's rows are tokenised and masked, and list their problems."""
    from jaxpost import recipes

    path, flags = _take_config("data check", arguments)
    config = recipes.load_config(path, flags, prog="jaxpost data check CONFIG")
    return 1 if recipes.check_data(config) else 0


def generate(arguments: Sequence[str]) -> int:
    """Complete prompts with a model in Hugging Face layout."""
    from jaxpost.recipes.generate import run_generate

    args = _parse(GenerateArgs, arguments, "jaxpost generate")
    run_generate(**dataclasses.asdict(args))
    return 0


def negatives(arguments: Sequence[str]) -> int:
    """Sample negatives of a base model, for discriminative fine-tuning."""
    from jaxpost.recipes.negatives import NegativesConfig, run_negatives

    run_negatives(_parse(NegativesConfig, arguments, "jaxpost negatives"))
    return 0


def score(arguments: Sequence[str]) -> int:
    """Score pairs, RewardBench or RM-Bench rows by log-ratios or a reward model."""
    from jaxpost.recipes.score import ScoreConfig, run_score

    run_score(_parse(ScoreConfig, arguments, "jaxpost score"))
    return 0


def opt(arguments: Sequence[str]) -> int:
    """Solve equality-constrained problems, and compare methods on suites of them."""
    from jaxpost.recipes.opt import OptConfig, run_opt

    run_opt(_parse(OptConfig, arguments, "jaxpost opt"))
    return 0


def convert(arguments: Sequence[str]) -> int:
    """Convert weights to Hugging Face layout and verify the result."""
    from jaxpost import weights

    args = _parse(ConvertArgs, arguments, "jaxpost convert")
    report = weights.convert(**dataclasses.asdict(args))
    sys.stdout.write(f"{report}\n")
    return 0


def graph_train(arguments: Sequence[str]) -> int:
    """Learn node embeddings of a graph, and probe them (recipe clnr)."""
    from jaxpost import recipes
    from jaxpost.recipes.clnr import CLNRConfig

    prog = "jaxpost graph train [CONFIG] [--dataset NAME] [--resume]"
    resume, flags = _take_switch("--resume", arguments)
    if flags and not flags[0].startswith("-"):
        config = recipes.load_config(flags[0], flags[1:], prog=prog)
    else:
        config = recipes.with_flags(CLNRConfig(), flags, prog=prog)
    if not isinstance(config, CLNRConfig):
        raise ValueError(f"{flags[0]}: is for recipe {config.recipe}, not clnr.")
    recipes.run(config, resume=resume)
    return 0


def graph_embed(arguments: Sequence[str]) -> int:
    """Embed the nodes of a graph with a trained encoder."""
    from jaxpost.recipes import graph as tools

    tools.embed(_parse(tools.EmbedArgs, arguments, "jaxpost graph embed"))
    return 0


def graph_probe(arguments: Sequence[str]) -> int:
    """Judge embeddings of nodes by their classes."""
    from jaxpost.recipes import graph as tools

    tools.probe(_parse(tools.ProbeArgs, arguments, "jaxpost graph probe"))
    return 0


def graph_convert(arguments: Sequence[str]) -> int:
    """Convert planetoid's files or an edge list to one .npz."""
    from jaxpost.recipes import graph as tools

    tools.convert(_parse(tools.ConvertGraphArgs, arguments, "jaxpost graph convert"))
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write an HTML report of one or more run folders."""
    from jaxpost import reports

    args = _parse(ReportArgs, arguments, "jaxpost report")
    sys.stdout.write(f"{reports.write_report(args.runs, args.out)}\n")
    return 0


def demo(arguments: Sequence[str]) -> int:
    """Train, fine-tune, evaluate and export a small model; needs no download."""
    from jaxpost.recipes.demo import DemoConfig, run_demo

    run_demo(_parse(DemoConfig, arguments, "jaxpost demo"))
    return 0


def watermark_generate(arguments: Sequence[str]) -> int:
    """Complete prompts with a watermark in what the model adds."""
    from jaxpost.recipes.watermark_generate import (
        WatermarkGenerateConfig,
        run_watermark_generate,
    )

    prog = "jaxpost watermark generate"
    run_watermark_generate(_parse(WatermarkGenerateConfig, arguments, prog))
    return 0


def watermark_detect(arguments: Sequence[str]) -> int:
    """Test texts for a watermark; green, red and unscored tokens are coloured."""
    from jaxpost.recipes.watermark_detect import (
        WatermarkDetectConfig,
        run_watermark_detect,
    )

    prog = "jaxpost watermark detect"
    run_watermark_detect(_parse(WatermarkDetectConfig, arguments, prog))
    return 0


def watermark_calibrate(arguments: Sequence[str]) -> int:
    """Propose a watermark's settings for a model and texts like its own."""
    from jaxpost.recipes.watermark_calibrate import (
        WatermarkCalibrateConfig,
        run_watermark_calibrate,
    )

    prog = "jaxpost watermark calibrate"
    run_watermark_calibrate(_parse(WatermarkCalibrateConfig, arguments, prog))
    return 0


def watermark_eval(arguments: Sequence[str]) -> int:
    """Measure what a watermark costs and how well it is found, on programming tasks."""
    from jaxpost.recipes.watermark_eval import WatermarkEvalConfig, run_watermark_eval

    run_watermark_eval(_parse(WatermarkEvalConfig, arguments, "jaxpost watermark eval"))
    return 0


@dataclasses.dataclass(frozen=True)
class Verb:
    """A word of the command line, and whether it works long enough to tune malloc."""

    run: Callable[[Sequence[str]], int]
    computes: bool = False


VERBS = {
    "train": Verb(train, computes=True),
    "plan": Verb(plan),
    "verify-resume": Verb(verify_resume),
    "generate": Verb(generate, computes=True),
    "negatives": Verb(negatives, computes=True),
    "score": Verb(score, computes=True),
    "opt": Verb(opt, computes=True),
    "watermark generate": Verb(watermark_generate, computes=True),
    "watermark detect": Verb(watermark_detect, computes=True),
    "watermark calibrate": Verb(watermark_calibrate, computes=True),
    "watermark eval": Verb(watermark_eval, computes=True),
    "convert": Verb(convert),
    "data check": Verb(data_check),
    "graph train": Verb(graph_train, computes=True),
    "graph embed": Verb(graph_embed, computes=True),
    "graph probe": Verb(graph_probe, computes=True),
    "graph convert": Verb(graph_convert),
    "report": Verb(report),
    "demo": Verb(demo, computes=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from_shell = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if arguments[0] == "--version":
        from jaxpost import __version__

        sys.stdout.write(f"jaxpost {__version__}\n")
        return 0
    name, rest = _split_verb(arguments)
    if name not in VERBS:
        return _fail(_unknown_verb(name))
    verb = VERBS[name]
    if verb.computes:
        _keep_compiled_programs()
        if from_shell:  # a program that calls this must not start anew
            _use_huge_pages()
    try:
        return verb.run(rest)
    except KeyboardInterrupt:
        return _fail("stopped by the keyboard.", status=130)
    except _user_errors() as error:
        if os.environ.get("JAXPOST_TRACEBACK"):
            raise
        return _fail(str(error), status=getattr(error, "status", 2))


def _user_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message alone tells a user what to mend."""
    errors = (ValueError, OSError, NotImplementedError, FloatingPointError, ImportError)
    if "jaxpost.training" not in sys.modules:
        return errors
    from jaxpost import training

    return (*errors, training.CheckpointError, training.PreemptedError)


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    words = [word for word in arguments[:2] if not word.startswith("-")]
    grouped = arguments[0] in ("data", "graph", "watermark")
    return " ".join(words if grouped else words[:1]), []


def _unknown_verb(name: str) -> str:
    near = difflib.get_close_matches(name, VERBS, 1, 0.4)
    hint = f"Did you mean 'jaxpost {near[0]}'?" if near else "See 'jaxpost --help'."
    return f"no verb {name!r}. {hint}"


def _overview() -> str:
    lines = ["usage: jaxpost VERB ...", ""]
    for name, verb in VERBS.items():
        lines.append(f"  {name:<13} {(verb.run.__doc__ or '').splitlines()[0]}")
    lines += ["", "'jaxpost VERB --help' shows the flags of a verb.", ""]
    return "\n".join(lines)


def _fail(message: str, *, status: int = 2) -> int:
    sys.stderr.write(f"jaxpost: {message}\n")
    return status


def _parse(schema: type[Any], arguments: Sequence[str], prog: str) -> Any:
    return tyro.cli(
        schema,
        args=list(arguments),
        prog=prog,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _take_switch(name: str, arguments: Sequence[str]) -> tuple[bool, list[str]]:
    return name in arguments, [word for word in arguments if word != name]


def _take_number(
    name: str, arguments: Sequence[str], default: int
) -> tuple[int, list[str]]:
    """The value of one flag, and the other words."""
    words = list(arguments)
    if name not in words:
        return default, words
    at = words.index(name)
    if not words[at + 1 : at + 2] or not words[at + 1].isdigit():
        raise ValueError(f"{name} needs a whole number.")
    return int(words[at + 1]), words[:at] + words[at + 2 :]


def _take_config(verb: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The config path in front of the flags; None only if help is asked for."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if any(word in ("-h", "--help") for word in words):
        return None, words
    raise ValueError(
        f"'jaxpost {verb}' needs a config file first: "
        f"jaxpost {verb} configs/sft/arithmetic.yaml [--section.key value ...]"
    )


def _keep_compiled_programs() -> None:
    """Lets JAX find programs that an earlier run compiled, unless told otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "jaxpost", "xla")
    )


def _use_huge_pages() -> None:
    """Restart once with huge pages for malloc: 9-28% faster XLA programs on CPU.

    glibc reads the setting when a process starts, so it cannot be changed later.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    joined = f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        {**os.environ, "GLIBC_TUNABLES": joined},
    )


if __name__ == "__main__":
    sys.exit(main())
