"""Small decoders fine-tuned side by side: several seeds of a method in one program.

Every run has parameters, problems and moving averages of its own; all take the same
number of sequences per step, whatever the method makes of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost import data, generation, losses, models, ops

Method = Literal["sft", "dft", "dft2", "dpo"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model, and what a step takes.

    Fields:
        width, layers: of the decoder.
        length: tokens of a text.
        answer: most tokens of an answer.
        sequences: texts per step, of every method: a multiple of 6.
        negatives: of which belong to one right answer, `B`; the paper takes 2.
    """

    width: int
    layers: int
    length: int = 56
    answer: int = 20
    sequences: int = 24
    negatives: int = 2


class Texts(NamedTuple):
    """Prompts with answers, padded on the right.

    Fields:
        tokens: int32 `[..., T]`.
        mask: True on the answer's tokens and its end token, bool `[..., T]`.
    """

    tokens: np.ndarray
    mask: np.ndarray


class World(NamedTuple):
    """What one seed trains on.

    Fields:
        prompts: token ids of each problem.
        right: texts with right answers, `[n, T]`.
        wrong: texts with answers sampled from a model, `[n, columns, T]`.
        ref_logps: log-probability of each `wrong` under that model, float32
            `[n, columns]`.
        same: whether a sampled answer is the right one, bool `[n, columns]`.
    """

    prompts: list[list[int]]
    right: Texts
    wrong: Texts
    ref_logps: np.ndarray
    same: np.ndarray


def make_model(sizes: Sizes, tokenizer: data.Tokenizer, seed: int) -> models.Model:
    config = models.DecoderConfig(
        family="qwen3",  # normalised queries and keys bear high learning rates
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=5 * sizes.width // 2,
        num_layers=sizes.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=sizes.width // 4,
        max_positions=2 * sizes.length,
        tie_embeddings=False,
        qk_norm=True,
    )
    return models.build(config, jax.random.key(seed))


def make_texts(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], length: int
) -> Texts:
    """Texts `[n, T]` of token ids; an answer ends in its end token, if it has one."""
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = [*prompt, *answer]
        if len(whole) > length:
            raise ValueError(f"a text has {len(whole)} tokens, more than {length}.")
        tokens[row, : len(whole)] = whole
        mask[row, len(prompt) : len(whole)] = True
    return Texts(tokens, mask)


def answer_logps(
    model: models.Model, params: Any, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Log-probability of each answer, `[S, T] -> [S]`, nats."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden = model.apply(params, tokens, positions, jnp.ones_like(tokens)).hidden
    targets, scored = ops.shift_targets(tokens, mask)
    logps = ops.token_logps(ops.logits(hidden, model.unembed(params)), targets)
    return jnp.sum(jnp.where(scored, logps, 0.0), axis=1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one method: what is not the learning rate.

    Fields:
        method: which loss.
        tau, gamma: of `dft` and `dft2`.
        beta: of `dpo`.
    """

    method: Method
    tau: float = 1.0
    gamma: float = 1.0
    beta: float = 0.1


class Batch(NamedTuple):
    """Texts of one step `[N, 1 + B, T]`, right answers first, and their places."""

    tokens: jax.Array
    mask: jax.Array
    ref_logps: jax.Array
    place: jax.Array


def loss_of(
    model: models.Model, settings: Settings
) -> Callable[[Any, jax.Array, Batch], tuple[jax.Array, jax.Array]]:
    """`(params, log_u, batch) -> (loss, log_u)` of a method."""

    def loss(params: Any, log_u: jax.Array, batch: Batch):
        count, texts, length = batch.tokens.shape
        flat = (count * texts, length)
        logps = answer_logps(
            model, params, batch.tokens.reshape(flat), batch.mask.reshape(flat)
        ).reshape(count, texts)
        tokens = jnp.sum(batch.mask, axis=2, dtype=jnp.float32)
        if settings.method == "sft":
            return -jnp.sum(logps) / jnp.sum(tokens), log_u
        if settings.method == "dpo":
            margins = losses.dpo_margins(
                logps[:, 0],
                logps[:, 1],
                batch.ref_logps[:, 0],
                batch.ref_logps[:, 1],
                beta=settings.beta,
            )
            return jnp.mean(losses.bradley_terry(margins)), log_u
        more: dict[str, Any] = {"ref_neg_logps": batch.ref_logps[:, 1:]}
        if settings.method == "dft2":
            more = {"pos_lengths": tokens[:, 0], "neg_lengths": tokens[:, 1:]}
        out = losses.discriminative(
            logps[:, 0],
            logps[:, 1:],
            log_u[batch.place],
            tau=settings.tau,
            gamma=settings.gamma,
            **more,
        )
        return jnp.mean(out.values), log_u.at[batch.place].set(out.log_u)

    return loss


class Plan(NamedTuple):
    """Which texts each step takes: of what, and where.

    Fields:
        tokens, mask: all texts, `[n, columns, T]`, the right answer first.
        ref_logps: `[n, columns]`.
        place: problems of each step, int32 `[K, N]`.
        columns: of each step, int32 `[K, 1 + B]`.
    """

    tokens: np.ndarray
    mask: np.ndarray
    ref_logps: np.ndarray
    place: np.ndarray
    columns: np.ndarray


def make_plan(
    world: World,
    method: Method,
    sizes: Sizes,
    steps: int,
    seed: int,
    *,
    right_logps: np.ndarray | None = None,
) -> Plan:
    """The order of one run: problems are shuffled anew in each epoch.

    Of `dft` and `dft2`, epoch `e` takes columns `e B` to `(e + 1) B - 1`, as the
    published code does, beginning again after the last.

    Args:
        world: of the seed.
        method, sizes, steps: what to plan.
        seed: of the order.
        right_logps: of right answers under the reference of `dpo`, `[n]`.
    """
    right, wrong = world.right, world.wrong
    per_step = {"sft": 1, "dpo": 2}.get(method, 1 + sizes.negatives)
    count, rows = sizes.sequences // per_step, len(right.tokens)
    first = np.zeros(rows, np.float32) if right_logps is None else right_logps
    rng = np.random.default_rng([seed, per_step])
    epochs = -(-steps * count // rows)
    order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
    place = order[: steps * count].reshape(steps, count).astype(np.int32)
    epoch = np.arange(steps) * count // rows
    pools = max(wrong.tokens.shape[1] // max(per_step - 1, 1), 1)
    begin = 1 + (epoch % pools) * (per_step - 1)
    columns = np.concatenate(
        [np.zeros((steps, 1), int), begin[:, None] + np.arange(per_step - 1)[None]],
        axis=1,
    )
    return Plan(
        np.concatenate([right.tokens[:, None], wrong.tokens], axis=1),
        np.concatenate([right.mask[:, None], wrong.mask], axis=1),
        np.concatenate([first[:, None], world.ref_logps], axis=1).astype(np.float32),
        place,
        columns.astype(np.int32),
    )


def train(
    model: models.Model,
    params: Any,
    settings: Settings,
    plans: Sequence[Plan],
    learning_rates: Sequence[float],
    *,
    looks: int,
    look: Callable[[Any], Any] | None = None,
) -> tuple[Any, list[Any]]:
    """Trains one run per plan, all together.

    Args:
        model: gives the functions.
        params: where runs start; leaves with an axis of runs in front.
        settings: of the method.
        plans: of the runs, of the same sizes.
        learning_rates: peak of each run; linear warm-up over a tenth, then cosine.
        looks: how often to look; divides the steps.
        look: called with the parameters of all runs before, and `looks` times during
            training.

    Returns:
        Parameters of all runs, and what `look` returned.
    """
    steps = len(plans[0].place)
    stacked = Plan(*(np.stack(part) for part in zip(*plans, strict=True)))
    functions = model.replace(params=None)
    chunk = functools.partial(_chunk, functions, settings, steps, steps // looks)
    tx = _optimizer(steps)
    log_u = jnp.zeros(stacked.tokens.shape[:2], jnp.float32)
    carry = (params, jax.vmap(tx.init)(params), log_u)
    seen = [look(params)] if look else []
    for number in range(looks):
        at = jnp.asarray(number * (steps // looks), jnp.int32)
        carry = chunk(carry, stacked, jnp.asarray(learning_rates, jnp.float32), at)
        if look:
            seen.append(look(carry[0]))
    return carry[0], seen


def _optimizer(steps: int) -> optax.GradientTransformation:
    """For a peak rate of one: each run scales the updates by its own."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 1.0, max(steps // 10, 1), steps, 0.0
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(4,))
def _chunk(functions, settings, steps, length, carry, plans, rates, at):
    tx, loss = _optimizer(steps), loss_of(functions, settings)

    def one(carry, plan, rate, step):
        params, state, log_u = carry
        place, columns = plan.place[step], plan.columns[step]
        batch = Batch(
            plan.tokens[place[:, None], columns[None]],
            plan.mask[place[:, None], columns[None]],
            plan.ref_logps[place[:, None], columns[None]],
            place,
        )
        grads, log_u = jax.grad(loss, has_aux=True)(params, log_u, batch)
        updates, state = tx.update(grads, state)
        updates = jax.tree.map(lambda leaf: rate * leaf, updates)
        return optax.apply_updates(params, updates), state, log_u

    runs = jax.vmap(one, in_axes=(0, 0, 0, None))

    def step(number, carry):
        return runs(carry, plans, rates, at + number)

    return jax.lax.fori_loop(0, length, step, carry)


@functools.partial(jax.jit, static_argnums=0)
def _logps(functions, params, tokens, mask):
    return answer_logps(functions, params, tokens, mask)


def score(model: models.Model, params: Any, texts: Texts, *, batch: int = 256):
    """Log-probability of each answer under one model, `[..., T] -> [...]`, nats."""
    functions, shape = model.replace(params=None), texts.tokens.shape
    tokens = texts.tokens.reshape(-1, shape[-1])
    mask = texts.mask.reshape(-1, shape[-1])
    extra = -len(tokens) % batch
    tokens, mask = (np.pad(a, ((0, extra), (0, 0))) for a in (tokens, mask))
    found = [
        np.asarray(
            _logps(functions, params, tokens[i : i + batch], mask[i : i + batch])
        )
        for i in range(0, len(tokens), batch)
    ]
    return np.concatenate(found)[: len(tokens) - extra].reshape(shape[:-1])


def sample(
    model: models.Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: data.Tokenizer,
    *,
    seed: int,
    most: int,
    temperature: float = 0.7,
    batch: int = 256,
) -> list[list[int]]:
    """One answer to each prompt, end token included; top-k 50, greedy at 0.

    Every batch is full, so that one program serves all.
    """
    config = generation.SamplingConfig(
        max_new_tokens=most,
        temperature=temperature,
        top_k=50 if temperature else None,
        stop_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    answers: list[list[int]] = []
    width = max(map(len, prompts))
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        tokens = np.zeros((batch, width), np.int32)
        lengths = np.ones(batch, int)  # of rows that fill up
        for row, ids in enumerate(part):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        rollout = generation.generate(
            model,
            params,
            tokens,
            np.arange(width)[None] < lengths[:, None],
            config=config,
            key=jax.random.key(seed),
            sequence_ids=np.arange(first, first + batch),
        )
        drawn, ends = np.asarray(rollout.tokens), np.asarray(rollout.lengths)
        answers += [
            row[:n].tolist() for row, n in zip(drawn[: len(part)], ends, strict=False)
        ]
    return answers
