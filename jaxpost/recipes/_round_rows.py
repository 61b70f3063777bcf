"""What a round of rollouts is made of: answers with rewards, as numbers and as rows.

Arrays of the host; knows no optimizer, and of the loss only what it divides by.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpost import data, generation, losses, parallel, rewards
from jaxpost.recipes._row_plan import Plan
from jaxpost.typing import BRANCH

Judge = Callable[..., rewards.Scores]
"""(prompts, completions, completion_ids, **columns) -> Scores; see `rewards.Scorer`."""


class Played(NamedTuple):
    """A round: B prompts with G answers each.

    Fields:
        prompts: B.
        answers: B G, those of a prompt side by side.
        texts: of the answers.
        lengths: of the answers, tokens, int64 `[B, G]`.
        truncated: True where an answer was cut off, bool `[B, G]`.
        rewards: float64 `[B, G]`, 0 where there is no verdict.
        given: True where there is one, bool `[B, G]`.
        numbers: of the judge and the sampler, to log.
        parts: each reward by name, float64 `[B, G]`.
    """

    prompts: list[data.Prompt]
    answers: list[generation.Finished]
    texts: list[str]
    lengths: np.ndarray
    truncated: np.ndarray
    rewards: np.ndarray
    given: np.ndarray
    numbers: dict[str, float]
    parts: dict[str, np.ndarray]


def judged(
    prompts: Sequence[data.Prompt],
    answers: Sequence[generation.Finished],
    samples: int,
    tokenizer: data.Tokenizer,
    judge: Judge | None,
    *,
    near: int,
) -> Played:
    """Answers, `samples` to each prompt in order, with the judge's rewards.

    The judge is given TRL's arguments: prompts as in the data (text or messages),
    completions of the same kind, and every column of the rows by name.
    """
    shape = (len(prompts), samples)
    texts = [
        tokenizer.decode(answer.tokens.tolist(), skip_special=True)
        for answer in answers
    ]
    count = len(texts)
    verdicts = rewards.Scores(np.zeros(count), np.ones(count, bool), {}, {})
    if judge is not None:
        asked = [prompt for prompt in prompts for _ in range(samples)]
        verdicts = _ask_once(
            judge,
            [prompt.columns.get("prompt", prompt.columns) for prompt in asked],
            [
                _as_asked(prompt, text)
                for prompt, text in zip(asked, texts, strict=True)
            ],
            [answer.tokens.tolist() for answer in answers],
            **_columns(asked),
        )
    return Played(
        prompts=list(prompts),
        answers=list(answers),
        texts=texts,
        lengths=np.array([len(a.tokens) for a in answers]).reshape(shape),
        truncated=np.array([a.finish_reason == "length" for a in answers]).reshape(
            shape
        ),
        rewards=np.where(verdicts.given, verdicts.rewards, 0.0).reshape(shape),
        given=verdicts.given.reshape(shape),
        numbers={**verdicts.numbers, "rollout/near_draws": float(near)},
        parts={name: part.reshape(shape) for name, part in verdicts.parts.items()},
    )


def _ask_once(judge: Judge, *arguments: Any, **columns: Any) -> rewards.Scores:
    """The judge's word, on process 0 alone: one that is late or draws at random must
    not tell each process something else."""

    def plain() -> list[Any]:
        found = judge(*arguments, **columns)
        parts = {name: part.tolist() for name, part in found.parts.items()}
        return [found.rewards.tolist(), found.given.tolist(), found.numbers, parts]

    total, given, numbers, parts = parallel.on_first_process("rewards", plain)
    return rewards.Scores(
        np.array(total, np.float64),
        np.array(given, bool),
        numbers,
        {name: np.array(part, np.float64) for name, part in parts.items()},
    )


def _as_asked(prompt: data.Prompt, text: str) -> Any:
    """A completion in the form of its prompt: text, or one message."""
    if isinstance(prompt.columns.get("prompt"), list) or "messages" in prompt.columns:
        return [{"role": "assistant", "content": text}]
    return text


def _columns(prompts: Sequence[data.Prompt]) -> dict[str, list[Any]]:
    """Every column but the prompt, None where a row lacks it."""
    names = {name for prompt in prompts for name in prompt.columns} - {"prompt"}
    return {name: [p.columns.get(name) for p in prompts] for name in sorted(names)}


def rows_of(
    played: Played, plan: Plan, pad_id: int, mask_truncated: bool
) -> dict[str, np.ndarray]:
    """The round as arrays of rows, those of a prompt side by side.

    Returns:
        `tokens`, `positions`, `segment_ids`, `loss_mask` `[R, W]` as
        `data.join_samples` gives them, but nothing of an answer without verdict is
        trained on, nor of a truncated one if `mask_truncated`; `sampling_logps`, of the
        distribution drawn from, float32 `[R, W]`; and `answer_lengths`, trained tokens,
        float32 `[R, A]`.
    """
    groups = np.arange(len(played.answers)).reshape(-1, plan.answers)
    rows = [[played.answers[i] for i in group] for group in groups]
    per_prompt = played.lengths.shape[1] // plan.answers
    prompts = [p.tokens for p in played.prompts for _ in range(per_prompt)]
    tokens = [[answer.tokens for answer in row] for row in rows]
    width, align = plan.choose(prompts, tokens)
    batch = data.join_samples(
        prompts,
        tokens,
        width,
        {"sampling_logps": [[answer.sampling_logps for answer in row] for row in rows]},
        pad_id=pad_id,
        align=align,
    )
    kept = played.given & ~(played.truncated & mask_truncated)
    answer = answer_ids(batch)
    taken = np.take_along_axis(
        kept.reshape(len(groups), -1), np.maximum(answer, 0), axis=1
    )
    batch["loss_mask"] &= taken & (answer >= 0)
    lengths = played.lengths * kept
    batch["answer_lengths"] = lengths.reshape(len(groups), -1).astype(np.float32)
    return batch


def answer_ids(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which answer of its row each token belongs to, -1 for none; int32 `[R, W]`."""
    return batch["segment_ids"] // BRANCH - 1


def per_token(values: np.ndarray, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """A number of each answer, `[B, G]`, at its trained tokens, float32 `[R, W]`."""
    ids = answer_ids(batch)
    found = np.take_along_axis(
        np.asarray(values).reshape(len(ids), -1), np.maximum(ids, 0), axis=1
    )
    return np.where(batch["loss_mask"], found, 0.0).astype(np.float32)


def per_sequence(values: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sums over each answer's trained tokens of numbers `[R, W]`, float64 `[R, A]`."""
    ids, mask = answer_ids(batch), batch["loss_mask"]
    sums = np.zeros(batch["answer_lengths"].shape)
    rows = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
    np.add.at(sums, (rows[mask], ids[mask]), np.asarray(values, np.float64)[mask])
    return sums


def loss_weights(
    batch: Mapping[str, np.ndarray],
    prompts: int,
    *,
    divide_by: str,
    max_tokens: int,
) -> dict[str, np.ndarray]:
    """How much each token counts; see `losses.token_weights`.

    Args:
        batch: rows, those of each of the prompts side by side.
        prompts: how many there are.
        divide_by: what the sum of the losses is divided by.
        max_tokens: most tokens of an answer.

    Returns:
        `loss_weights` float32 `[R, W]`, and `loss_counts` `[R]`, the rows' shares of
        what is divided by.
    """
    trained = np.where(batch["loss_mask"], answer_ids(batch), -1)
    rows = len(trained) // prompts
    answers = batch["answer_lengths"].shape[1]
    # All rows of a prompt as one, its answers numbered through.
    numbers = np.arange(len(trained))[:, None] % rows * answers
    ids = np.where(trained >= 0, trained + numbers, -1).reshape(prompts, -1)
    weights, _ = losses.token_weights(
        jnp.asarray(ids),
        answers * rows,
        divide_by=divide_by,
        max_tokens=max_tokens if divide_by == "constant" else None,
    )
    weights = np.asarray(weights).reshape(trained.shape)
    if divide_by == "constant":
        counts = np.count_nonzero(batch["answer_lengths"], axis=1)
    else:
        counts = weights.sum(axis=1, dtype=np.float64)
    return {"loss_weights": weights, "loss_counts": counts.astype(np.float32)}


def describe(played: Played, *, groups: bool = True) -> dict[str, float]:
    """Rewards and lengths under TRL's names; `groups` False leaves those out that
    compare the answers of a group."""
    given, lengths = played.given, played.lengths
    numbers = dict(played.numbers)
    numbers["reward"] = _mean(played.rewards[given])
    if groups:
        spreads = [
            r[g].std(ddof=1) if g.sum() > 1 else 0.0
            for r, g in zip(played.rewards, given, strict=True)
        ]
        numbers["reward_std"] = float(np.mean(spreads))
        numbers["frac_reward_zero_std"] = float(np.mean(np.array(spreads) == 0.0))
    ended = lengths[~played.truncated]
    for name, values in (("length", lengths), ("terminated_length", ended)):
        for kind, of in (("mean", np.mean), ("min", np.min), ("max", np.max)):
            found = float(of(values)) if values.size else 0.0
            numbers[f"completions/{kind}_{name}"] = found
    numbers["completions/clipped_ratio"] = float(played.truncated.mean())
    entropies = np.concatenate([answer.entropies for answer in played.answers])
    numbers["entropy"] = _mean(entropies)
    return numbers


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else 0.0


def show_samples(
    played: Played,
    tokenizer: data.Tokenizer,
    *,
    step: int,
    prompts: int,
    write: Callable[[Mapping[str, Any]], None],
) -> None:
    """Answers to the first prompts as a table in the terminal and lines in a file.

    Args:
        played: the round.
        tokenizer: for the prompts' texts.
        step: optimizer steps taken before it.
        prompts: how many.
        write: gets one line per answer, on the first process.
    """
    import jax
    import rich.console
    import rich.markup
    import rich.table

    if jax.process_index() != 0:
        return
    table = rich.table.Table(title=f"step {step}: answers", title_justify="left")
    for name in ("prompt", "answer", "tokens", "reward"):
        table.add_column(
            name, justify="right" if name in ("tokens", "reward") else "left"
        )
    samples = played.lengths.shape[1]
    for row, prompt in enumerate(played.prompts[:prompts]):
        text = tokenizer.decode(prompt.tokens.tolist())
        for sample in range(samples):
            place = row * samples + sample
            given = bool(played.given[row, sample])
            reward = float(played.rewards[row, sample]) if given else None
            parts = {n: float(p[row, sample]) for n, p in played.parts.items()}
            write(
                {
                    "step": step,
                    "prompt": text,
                    "completion": played.texts[place],
                    "reward": reward,
                    "rewards": {
                        n: v if math.isfinite(v) else None for n, v in parts.items()
                    },
                    "tokens": int(played.lengths[row, sample]),
                    "truncated": bool(played.truncated[row, sample]),
                }
            )
            if sample < 4:
                table.add_row(
                    rich.markup.escape(text) if sample == 0 else "",
                    rich.markup.escape(played.texts[place].strip()),
                    str(played.lengths[row, sample]),
                    "none" if reward is None else f"{reward:.3g}",
                )
        table.add_section()
    rich.console.Console().print(table)
