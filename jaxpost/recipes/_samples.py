"""Answers to a few held-out prompts at each evaluation, for `samples.jsonl`."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import data, generation, models, training
from jaxpost.typing import Params

EvalFn = Callable[[training.TrainState], dict[str, float]]


def with_samples(
    eval_fn: EvalFn,
    model: models.Model,
    tokenizer: data.Tokenizer,
    examples: Sequence[data.Example],
    *,
    params_of: Callable[[training.TrainState], Params],
    write: Callable[[Mapping[str, object]], None],
    count: int,
    max_new_tokens: int,
) -> EvalFn:
    """`eval_fn` that also answers the first `count` prompts, greedily.

    Args:
        eval_fn: returns the numbers of an evaluation.
        model: gives the functions.
        tokenizer: for the texts.
        examples: held-out examples; the prompt is what stands before the first token
            that is trained on.
        params_of: the model's parameters in a state.
        write: gets `step`, `prompt`, `completion` and `target` of each answer.
        count: how many prompts; 0 returns `eval_fn` itself.
        max_new_tokens: longest answer, tokens.

    Returns:
        A function as `eval_fn`, with the same numbers.
    """
    chosen = [example for example in examples if example.loss_mask.any()][:count]
    prompts = [e.tokens[: int(np.argmax(e.loss_mask))] for e in chosen]
    if not prompts:
        return eval_fn
    width = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    config = generation.SamplingConfig(
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )

    def evaluate(state: training.TrainState) -> dict[str, float]:
        values = eval_fn(state)
        rollout = generation.generate(
            model,
            params_of(state),
            jnp.asarray(tokens),
            jnp.asarray(mask),
            config=config,
            key=jax.random.key(0),
        )
        answers, lengths = jax.device_get((rollout.tokens, rollout.lengths))
        for example, prompt, answer, length in zip(
            chosen, prompts, answers, lengths, strict=True
        ):
            write(
                {
                    "step": int(state.step),
                    "prompt": tokenizer.decode(prompt.tolist()),
                    "completion": tokenizer.decode(answer[:length].tolist()),
                    "target": tokenizer.decode(example.tokens[len(prompt) :].tolist()),
                }
            )
        return values

    return evaluate
