"""Answers that the student gives itself, between steps: the rows of on-policy steps.

What is drawn depends on the seed, the number of the step, the prompts and the weights:
a resumed run draws the same.
"""

import dataclasses

import jax
import numpy as np

from jaxpost import data, generation, models, training
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch

# Beside the keys of the steps, which are folded with their numbers.
STREAM = 2**31


@dataclasses.dataclass(frozen=True)
class OnPolicySection:
    """Steps on answers of the student itself, instead of the data's.

    Attributes:
        every: Of so many steps one is on-policy; 1 makes all of them, 0 none.
        max_new_tokens: Longest answer, tokens.
        temperature: Of the sampler; 0 takes the most likely token each time.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens with this probability.
    """

    every: int = 0
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every must be at least 0, got {self.every}.")
        self.sampling((0,), 0)

    def sampling(
        self, stop_ids: tuple[int, ...], pad_id: int
    ) -> generation.SamplingConfig:
        """The sampler's settings."""
        return generation.SamplingConfig(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            stop_ids=stop_ids,
            pad_id=pad_id,
        )


class OnPolicy:
    """Replaces the answers of every `n`-th batch; for `Run.train(prepare=...)`.

    Args:
        run: its model is sampled from; its rows hold one example each.
        section: how often and how.

    Raises:
        ConfigError: rows are packed, several processes share the run, or an answer to
            the longest prompt would not fit into a row.
    """

    def __init__(self, run: Run, section: OnPolicySection) -> None:
        config = run.config.data
        if config.packing:
            raise ConfigError(
                "on_policy.every is set, which answers one prompt per row: set "
                "data.packing to false."
            )
        if jax.process_count() > 1:
            raise ConfigError(
                "on_policy.every is set, but there are several processes; sampling "
                "works in one process so far."
            )
        longest = max(len(prompt_of(row)) for row in run.rows)
        if longest + section.max_new_tokens > config.max_length:
            raise ConfigError(
                f"the longest prompt has {longest} tokens, and with "
                f"on_policy.max_new_tokens {section.max_new_tokens} more is over "
                f"data.max_length {config.max_length}; raise that or shorten answers."
            )
        self._run, self._every = run, section.every
        tokenizer = run.tokenizer
        self._config = section.sampling(tokenizer.eos_ids, tokenizer.pad_id)
        self._key = jax.random.fold_in(jax.random.key(run.config.seed), STREAM)
        self._cast = jax.jit(models.cast_params, static_argnums=1)

    def __call__(self, number: int, state: training.TrainState, batch: Batch) -> Batch:
        """The batch of step `number`, counted from 1, given the state before it."""
        if number % self._every:
            return batch
        run = self._run
        prompts = [
            prompt_of({name: array[row] for name, array in batch.items()})
            for row in range(len(batch["tokens"]))
        ]
        params = state.joined()
        params = {name: params[name] for name in run.model.params}
        if run.compute_dtype is not None:
            params = self._cast(params, run.compute_dtype)
        width = max(map(len, prompts))
        tokens = np.zeros((len(prompts), width), np.int32)
        mask = np.arange(width)[None] < np.array([[len(p)] for p in prompts])
        tokens[mask] = np.concatenate(prompts)
        rollout = generation.generate(
            run.model,
            params,
            tokens,
            mask,
            config=self._config,
            key=jax.random.fold_in(self._key, number),
        )
        answers, lengths = jax.device_get((rollout.tokens, rollout.lengths))
        examples = [
            data.Example(
                np.concatenate([prompt, answer[:length]]).astype(np.int32),
                np.arange(len(prompt) + length) >= len(prompt),
            )
            for prompt, answer, length in zip(prompts, answers, lengths, strict=True)
        ]
        return data.pad_batch(
            examples, run.config.data.max_length, pad_id=run.tokenizer.pad_id
        )


def prompt_of(row: data.TokenRow) -> np.ndarray:
    """The tokens before the first that is trained on."""
    return row["tokens"][: int(np.argmax(row["loss_mask"]))]
