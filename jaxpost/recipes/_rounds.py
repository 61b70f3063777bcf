"""Rounds of policy optimisation: prompts answered, judged, then trained on for a while.

A round is `train.batch_size` prompts with `rollout.samples` answers each, drawn by the
policy as it is; the optimizer takes `rollout.epochs * rollout.minibatches` steps on it.
What is drawn depends on the seed, the number of the round, the prompts and the weights.
A checkpoint within a round holds it whole, so a resumed run goes on bit for bit.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpost import data, generation, models, parallel, training
from jaxpost.recipes import _round_rows, _row_plan
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._round_rows import Judge, Played
from jaxpost.recipes._run import Run
from jaxpost.typing import Batch, Params

# Beside the keys of the steps, which are folded with their numbers.
STREAM, ORDER = 2**31 + 1, 2**31 + 2


@dataclasses.dataclass(frozen=True)
class RolloutSection:
    """How answers are drawn, and how often they are trained on.

    Attributes:
        samples: Answers to each prompt, a group.
        max_new_tokens: Longest answer, tokens.
        temperature: Of the sampler and of the log-probs that are trained.
        top_k: Keep the k most likely tokens.
        top_p: Keep the smallest set of tokens with this probability.
        slots: Answers decoded at a time; all of a round, up to 128, if not given.
        answers_per_row: Answers of a group that share a row, and their prompt, in
            training; the cheapest divisor of `samples` if not given.
        epochs: Passes over a round.
        minibatches: Optimizer steps in a pass; must divide `train.batch_size`.
        mask_truncated: Leave answers cut off at `max_new_tokens` out of the loss.
        show_every: Rounds between tables of samples; 0 shows none.
        show_prompts: Prompts in such a table.
    """

    samples: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    slots: int | None = None
    answers_per_row: int | None = None
    epochs: int = 1
    minibatches: int = 1
    mask_truncated: bool = False
    show_every: int = 10
    show_prompts: int = 2

    def __post_init__(self) -> None:
        for name in ("samples", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.answers_per_row is not None and (
            self.answers_per_row < 1 or self.samples % self.answers_per_row
        ):
            raise ValueError(
                f"answers_per_row must divide samples ({self.samples}), got "
                f"{self.answers_per_row}."
            )
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: answers that "
                "are always the same teach nothing."
            )
        self.sampling((0,), 0)

    @property
    def updates(self) -> int:
        """Optimizer steps of a round."""
        return self.epochs * self.minibatches

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


class Finished(NamedTuple):
    """A round ready to be trained on.

    Fields:
        batch: arrays `[R, ...]`, the rows of a prompt side by side.
        numbers: to log with each of its steps.
        rewards: to log and to show instead of the judge's, `[B, G]`.
    """

    batch: dict[str, np.ndarray]
    numbers: dict[str, float]
    rewards: np.ndarray | None = None


Finish = Callable[[Played, dict[str, np.ndarray]], Finished]
ScoreFn = Callable[[Params, Batch], Mapping[str, jax.Array]]


class Rounds(Iterator[Batch]):
    """The batches of a run, with `prepare` for `Run.train`.

    Args:
        run: of `PROMPTS`; its prompts are answered by its model.
        section: how many answers, and how.
        judge: gives each answer's rewards; None leaves them to `finish`.
        score: what else is computed for a round before its first step, compiled: from
            all parameters and a batch to arrays `[R, W]`; such as log-probs of frozen
            models.
        finish: from the round and its arrays, scores among them, to the arrays that the
            loss reads.

    Raises:
        ConfigError: settings that contradict each other or the model; the message names
            the keys.
    """

    def __init__(
        self,
        run: Run,
        section: RolloutSection,
        *,
        finish: Finish,
        judge: Judge | None = None,
        score: ScoreFn | None = None,
    ) -> None:
        self._run, self._section = run, section
        self._judge, self._finish = judge, finish
        size = run.config.train.batch_size
        prompts = run.examples.train
        longest = max(len(prompt.tokens) for prompt in prompts + run.examples.eval)
        _check(run, section, longest)
        # Every process answers all prompts: it needs them all.
        self._prompts = data.Batches(run.rows, size, seed=run.config.seed)
        self._answerer = Answerer(run, section, longest)
        self._plan = _row_plan.plan_rows(
            samples=section.samples,
            answers_per_row=section.answers_per_row,
            prompt=longest,
            answer=section.max_new_tokens,
            hidden=run.model.config.hidden_size,
        )
        self._score = None
        if score is not None:
            self._score = parallel.compile_together(jax.jit(score))
        self._used = section.updates  # of the present round; none is begun
        self._batch: dict[str, np.ndarray] = {}
        self.numbers: dict[str, float] = {}

    @property
    def lengths(self) -> int:
        """How many shapes of batches there are, each a compiled program."""
        return len(self._plan.widths)

    @property
    def epoch(self) -> float:
        """Passes over the prompts so far."""
        return self._prompts.epoch

    def __next__(self) -> Batch:
        """Nothing yet: `prepare` makes the batches, as it is given the policy."""
        return {}

    def prepare(self, number: int, state: training.TrainState, batch: Batch) -> Batch:
        """The batch of step `number`, counted from 1, given the state before it."""
        del batch
        section, run = self._section, self._run
        if self._used >= section.updates:
            self._play((number - 1) // section.updates, state)
            self._used = 0
        rows = self._order(number - 1 - self._used)[self._used]
        self._used += 1
        index, count = run.layout.batch_share
        share = len(rows) // count
        rows = rows[index * share : (index + 1) * share]
        return {name: array[rows] for name, array in self._batch.items()}

    def state(self) -> dict[str, Any]:
        """The cursor: JSON values."""
        return {
            "prompts": self._prompts.state(),
            "used": self._used,
            "numbers": self.numbers,
            "rollout": self._identity(),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The round under way; nothing once it is used up."""
        return self._batch if self._used < self._section.updates else {}

    def restore(
        self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Goes on where `state` and `arrays` were taken.

        Raises:
            ValueError: it was taken with other prompts or settings; names them.
        """
        for name, value in self._identity().items():
            if (found := state["rollout"].get(name)) != value:
                raise ValueError(
                    f"cannot resume within a round: rollout.{name} was {found} and is "
                    f"{value}; use the settings of the first run."
                )
        self._prompts.restore(state["prompts"])
        self._used, self.numbers = int(state["used"]), dict(state["numbers"])
        self._batch = dict(arrays)

    def _identity(self) -> dict[str, int]:
        section = self._section
        return {
            "samples": section.samples,
            "epochs": section.epochs,
            "minibatches": section.minibatches,
        }

    def _play(self, number: int, state: training.TrainState) -> None:
        """Draws and judges round `number`, from 0."""
        jax.block_until_ready(state.params)  # the step before is not this round's time
        start = time.perf_counter()
        run, section = self._run, self._section
        chosen = next(self._prompts)["number"]
        prompts = [run.examples.train[place] for place in chosen.tolist()]
        params = state.joined()
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(run.config.seed), STREAM), number
        )
        played = self._answerer(self._own(params), prompts, key, self._judge)
        drawn = time.perf_counter()
        batch = _round_rows.rows_of(
            played, self._plan, run.tokenizer.pad_id, section.mask_truncated
        )
        if self._score is not None:
            batch |= self._scored(params, batch)
        done = self._finish(played, batch)
        self._batch = done.batch
        if done.rewards is not None:
            played = played._replace(rewards=done.rewards)
        self.numbers = {
            **_round_rows.describe(played, groups=section.samples > 1),
            **done.numbers,
            "rollout/seconds": drawn - start,
            "rollout/tokens_per_s": float(played.lengths.sum()) / (drawn - start),
            "rollout/prepare_seconds": time.perf_counter() - drawn,
        }
        if section.show_every and number % section.show_every == 0:
            self._show(int(state.step), played)

    def _own(self, params: Params) -> Params:
        return {name: params[name] for name in self._run.model.params}

    def _scored(self, params: Params, batch: Batch) -> dict[str, np.ndarray]:
        """`score` of all rows, as many at a time as in a microbatch."""
        assert self._score is not None
        run, rows = self._run, len(batch["tokens"])
        size = rows // (self._section.minibatches * run.config.train.accumulate)
        index, count = run.layout.batch_share
        found = []
        for start in range(0, rows, size):
            share = size // count
            first = start + index * share
            part = {name: a[first : first + share] for name, a in batch.items()}
            scores = self._score(params, run.layout.place_batch(part))
            found.append(jax.device_get(parallel.gather_to_hosts(dict(scores))))
        return {name: np.concatenate([f[name] for f in found]) for name in found[0]}

    def _order(self, first: int) -> list[np.ndarray]:
        """Rows of each step of the round that begins after `first` steps."""
        section, size = self._section, self._run.config.train.batch_size
        rows = len(self._batch["tokens"]) // size  # of a prompt
        rng = np.random.default_rng([self._run.config.seed, ORDER, first])
        steps = []
        for _ in range(section.epochs):
            order = rng.permutation(size) if section.updates > 1 else np.arange(size)
            for prompts in np.split(order, section.minibatches):
                steps.append((prompts[:, None] * rows + np.arange(rows)).reshape(-1))
        return steps

    def _show(self, step: int, played: Played) -> None:
        _round_rows.show_samples(
            played,
            self._run.tokenizer,
            step=step,
            prompts=self._section.show_prompts,
            write=self._run.folder.log_sample,
        )


class Answerer:
    """Answers prompts with given parameters, and has the answers judged.

    Args:
        run: gives the model's functions, its tokenizer and the dtype to compute in.
        section: how.
        longest: tokens of the longest prompt.
    """

    def __init__(self, run: Run, section: RolloutSection, longest: int) -> None:
        self._run, self._section, self._longest = run, section, longest
        self._cast = jax.jit(models.cast_params, static_argnums=1)

    def __call__(
        self,
        params: Params,
        prompts: list[data.Prompt],
        key: jax.Array,
        judge: Judge | None,
        *,
        greedy: bool = False,
    ) -> Played:
        """Answers; `greedy` takes one answer, the most likely token each time."""
        run, section = self._run, self._section
        if run.compute_dtype is not None:
            params = self._cast(params, run.compute_dtype)
        tokenizer = run.tokenizer
        config = section.sampling(tokenizer.eos_ids, tokenizer.pad_id)
        if greedy:
            config = dataclasses.replace(
                config, temperature=0.0, top_k=None, top_p=None
            )
        samples = 1 if greedy else section.samples
        slots = section.slots or min(len(prompts) * samples, 128)
        stream = generation.generate_stream(
            run.model,
            params,
            [prompt.tokens for prompt in prompts],
            config=config,
            slots=slots,
            samples_per_prompt=samples,
            key=key,
            max_prompt_length=self._longest,
            context_length=run.model.config.max_positions,
        )
        answers = sorted(stream, key=lambda a: (a.prompt, a.sample))
        return _round_rows.judged(
            prompts, answers, samples, tokenizer, judge, near=stream.stats.near
        )


def held_out_rewards(
    run: Run, section: RolloutSection, judge: Judge
) -> Callable[[training.TrainState], dict[str, float]] | None:
    """An evaluation for `Run.train`: rewards of greedy answers to held-out prompts.

    Returns:
        A function of a state to `eval_reward`, `eval_rewards/NAME/mean`,
        `eval_completions/mean_length`, ...; None without held-out prompts.
    """
    prompts = run.examples.eval
    if not prompts:
        return None
    longest = max(len(prompt.tokens) for prompt in prompts + run.examples.train)
    answerer = Answerer(run, section, longest)

    def evaluate(state: training.TrainState) -> dict[str, float]:
        played = answerer(
            run.model_params(state), prompts, jax.random.key(0), judge, greedy=True
        )
        numbers = _round_rows.describe(played, groups=False)
        return {f"eval_{name}": value for name, value in numbers.items()}

    return evaluate


def _check(run: Run, section: RolloutSection, longest: int) -> None:
    """Refuses settings that do not fit together or the model."""
    model, train = run.model.config, run.config.train
    if not run.tokenizer.eos_ids:
        raise ConfigError(
            "the tokenizer has no token that ends a text, so no answer would ever "
            "finish: name one with data.eos_tokens."
        )
    if longest + section.max_new_tokens > model.max_positions:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, and with rollout.max_new_tokens "
            f"{section.max_new_tokens} more is over the model's {model.max_positions} "
            "positions; lower data.max_length (and set data.on_bad_row to skip) or "
            "rollout.max_new_tokens."
        )
    steps = section.minibatches * train.accumulate
    if train.batch_size % steps:
        below = max(train.batch_size // steps, 1) * steps
        raise ConfigError(
            f"train.batch_size is {train.batch_size} prompts, which "
            f"rollout.minibatches {section.minibatches} times train.accumulate "
            f"{train.accumulate} does not divide; the nearest that works is {below}."
        )
    parts = run.layout.batch_parts
    if (train.batch_size // steps) % parts:
        below = max(train.batch_size // (steps * parts), 1) * steps * parts
        raise ConfigError(
            f"a microbatch has {train.batch_size // steps} prompts, which do not "
            f"divide over the {parts} devices of the batch; the nearest "
            f"train.batch_size that works is {below}."
        )
