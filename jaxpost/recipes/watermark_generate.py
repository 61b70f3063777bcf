"""Marked completions of prompts: `jaxpost watermark generate`."""

import dataclasses
import pathlib
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from jaxpost import data, generation
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_key import (
    KeyFile,
    check_vocabulary,
    read_key_file,
    write_key_file,
)
from jaxpost.recipes.generate import run_generate


@dataclasses.dataclass(frozen=True)
class WatermarkGenerateConfig:
    """Complete prompts with a watermark in what the model adds.

    Attributes:
        model: Folder or hub name of the model.
        key: Key file; made with a fresh secret, readable by its owner only, if it does
            not exist.
        prompt: A prompt; may be given several times.
        prompts: File of prompts (JSONL with a `prompt` or `messages` column).
        output: JSONL file for the completions, with their ids; an existing one of the
            same model, prompts, settings and key is continued.
        gamma: Fraction of green ids of a new key file (0.25).
        delta: Added to green logits, of a new key file (3).
        tau: Entropy above which they are raised, nats, of a new key file (0.9); -1
            marks everywhere.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        chat: Render each prompt as a user turn through the chat template.
        max_new_tokens: Longest completion, tokens.
        temperature: 0 takes the most likely token each time.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens with this probability.
        stop: String that ends a completion; may be given several times.
        batch_size: Answers decoded at a time.
        seed: Of the sampler.
        dtype: Data type of the weights and the cache.
    """

    model: Positional[str]
    key: str
    prompt: UseAppendAction[tuple[str, ...]] = ()
    prompts: str | None = None
    output: str | None = None
    gamma: float | None = None
    delta: float | None = None
    tau: float | None = None
    tokenizer: str | None = None
    chat: bool = False
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: UseAppendAction[tuple[str, ...]] = ()
    batch_size: int = 16
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


def run_watermark_generate(config: WatermarkGenerateConfig) -> generation.TextStats:
    """Completes prompts as `run_generate` does, marked with the key file's settings.

    Each line of `output` also has `prompt_ids`, `completion_ids` and `watermark`: the
    scheme, the key's fingerprint, gamma, delta and tau, but not the secret.

    Args:
        config: the settings.

    Returns:
        Counts and time.

    Raises:
        ValueError: the key file exists and has other settings than asked for, or is of
            another tokenizer; and as `run_generate`.
    """
    words = data.load_tokenizer(config.tokenizer or config.model)
    keys = open_key_file(
        config.key,
        words.vocab_size,
        gamma=config.gamma,
        delta=config.delta,
        tau=config.tau,
    )
    processor = watermark.processor(
        keys.key, gamma=keys.gamma, delta=keys.delta, tau=keys.tau
    )
    return run_generate(
        config.model,
        prompt=config.prompt,
        prompts=config.prompts,
        output=config.output,
        tokenizer=config.tokenizer,
        chat=config.chat,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop=config.stop,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=config.dtype,
        processors=(processor,),
        columns={"watermark": keys.record},
        with_ids=True,
    )


def open_key_file(
    path: str,
    vocab_size: int,
    *,
    gamma: float | None,
    delta: float | None,
    tau: float | None,
) -> KeyFile:
    """The key file at `path`, made if there is none; None leaves a setting to it.

    Raises:
        ValueError: a setting is given and the file has another, or is of another
            vocabulary; a setting is out of range.
    """
    asked = {"gamma": gamma, "delta": delta, "tau": tau}
    given = {name: value for name, value in asked.items() if value is not None}
    if not pathlib.Path(path).exists():
        settings = {"gamma": 0.25, "delta": 3.0, "tau": 0.9} | given
        keys = KeyFile(watermark.WatermarkKey.new(vocab_size), **settings)
        watermark.processor(keys.key, **settings)  # refuses what is out of range
        write_key_file(path, keys)
        return keys
    keys = read_key_file(path)
    check_vocabulary(keys, vocab_size, "the tokenizer")
    for name, value in given.items():
        if getattr(keys, name) != value:
            raise ValueError(
                f"{path} has {name} {getattr(keys, name)}, not {value}: leave --{name} "
                "out, or name a new key file."
            )
    return keys
