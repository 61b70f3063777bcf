"""What discriminative fine-tuning knows of an answer and sampled ones, in one pass.

And which reference gives P0, the probability that a negative was sampled with.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import data, losses, models, ops
from jaxpost.recipes import _answers, _reference
from jaxpost.recipes._reference import ReferenceName
from jaxpost.recipes._sections import LoraSection
from jaxpost.typing import Batch, Metric, Params

Variant = Literal["dft", "dft2"]


def check_reference(
    variant: str,
    p0: str,
    reference: ReferenceName,
    columns: str | None,
    lora: LoraSection,
) -> None:
    """Refuses settings of P0 that contradict each other.

    Raises:
        ValueError: the message names the key.
    """
    if variant == "dft2":
        if p0 != "train_prompt" or reference not in ("auto", "none"):
            raise ValueError(
                "variant dft2 takes P0 to be the same for all negatives: leave out p0 "
                "and reference, or set variant to dft."
            )
    elif p0 == "sampling_prompt":
        if reference not in ("auto", "none"):
            raise ValueError(
                f"p0 is sampling_prompt, the sampler's own log-probs, so reference "
                f"{reference} would not be used: leave it out, or set p0 to "
                "train_prompt."
            )
    elif reference == "none":
        raise ValueError(
            "variant dft needs the log-probs of the negatives under what sampled them: "
            "set reference to auto, live, precomputed or lora_base; or p0 to "
            "sampling_prompt; or variant to dft2, which does without."
        )
    _reference.check_reference(reference, lora=lora.rank > 0, columns=columns)


def resolve(
    variant: str, p0: str, reference: ReferenceName, lora: LoraSection
) -> ReferenceName:
    """The model that gives P0; `none` where no model does."""
    if variant == "dft2" or p0 == "sampling_prompt":
        return "none"
    return _reference.resolve(reference, lora=lora.rank > 0)


def discriminative_scores(
    model: models.Model,
    *,
    reference: ReferenceName = "live",
    answers: int | None = None,
    foresee: Callable[..., jax.Array] | None = None,
    dtype: jnp.dtype | None = None,
    token_logps: _answers.TokenLogps = ops.linear_token_logps,
) -> _answers.ScoreFn:
    """Log-probabilities of an answer and its `B` negatives, in one forward pass.

    Args:
        model: gives `apply` and `unembed`; its own parameters are not used.
        reference: `live`: the parameters hold the reference's under `reference`;
            `lora_base`: the parameters without adapters; both score the negatives
            alone. `precomputed` and `none`: the batch's
            `ref_logps` `[N, 1 + B]`, the right answer first, if it has them.
        answers: 1 + B; needed for batches of joined answers, `[N, W]`.
        foresee: from `slopes`; a hint that makes gradients cheaper. It is used where
            the batch holds the moving averages before the step, `log_u` `[N]`.
        dtype: compute dtype that the parameters are cast to; None casts nothing.
        token_logps: on a mesh, from `parallel.split_vocabulary`.

    Returns:
        A function `(params, batch) -> {"logps": [N, 1 + B], "lengths": [N, 1 + B]}`,
        the right answer first, and perhaps `"ref_neg_logps"` `[N, B]`.
    """

    def logps_of(model: models.Model, params: Params, batch: Batch, **hint: Any):
        if dtype is not None:
            params = models.cast_params(params, dtype)
        return _answers.answer_logps(
            model, params, batch, answers=answers, token_logps=token_logps, **hint
        ).logps

    def reference_logps(params: Params, batch: Batch) -> jax.Array | None:
        """Of the negatives `[N, B]`."""
        if reference not in ("live", "lora_base"):
            return batch["ref_logps"][:, 1:] if "ref_logps" in batch else None
        joined = batch["tokens"].ndim == 2
        if joined:
            positive = ops.branch_numbers(batch["segment_ids"]) == 1 + data.POSITIVE
            batch = {**batch, "loss_mask": batch["loss_mask"] & ~positive}
        else:
            batch = {name: batch[name][:, 1:] for name in _answers.TOKENS}
        found = _reference.under_reference(
            reference,
            model,
            params,
            lambda model, params: logps_of(model, params, batch),
        )
        return found[:, 1:] if joined else found

    def score(params: Params, batch: Batch) -> Mapping[str, jax.Array]:
        count = answers if batch["tokens"].ndim == 2 else batch["tokens"].shape[1]
        if count is None:
            raise ValueError("batches of joined answers need `answers`, 1 + B.")
        found = {"lengths": _answers.answer_lengths(batch, count)}
        if (p0 := reference_logps(params, batch)) is not None:
            found["ref_neg_logps"] = p0
        hint = {}
        if foresee is not None and "log_u" in batch:
            hint = {"foresee": foresee, "operands": (found, batch["log_u"])}
        policy = _reference.policy_params(params)
        return found | {"logps": logps_of(model, policy, batch, **hint)}

    return score


def slopes(variant: Variant, *, tau: float, gamma: float) -> Callable[..., jax.Array]:
    """What the loss multiplies log-probabilities with, for `discriminative_scores`.

    Returns:
        A pure function `(logps [N, 1 + B], scores, log_u [N]) -> [N, 1 + B]`: slopes of
        the sum of the surrogates; `scores` holds the rest of what `split` reads.
    """

    def total(logps: jax.Array, scores: Mapping[str, jax.Array], log_u: jax.Array):
        found = split({**scores, "logps": logps}, variant)
        out = losses.discriminative(log_u=log_u, tau=tau, gamma=gamma, **found.inputs)
        return jnp.sum(jnp.where(found.real, out.values, 0.0))

    return jax.grad(total)


def every_number(score: _answers.ScoreFn) -> _answers.ScoreFn:
    """All log-probabilities of a row under one name, `logps`: to find what is wrong."""

    def joined(params: Params, batch: Batch) -> Mapping[str, jax.Array]:
        found = score(params, batch)
        parts = [found[name] for name in ("logps", "ref_neg_logps") if name in found]
        return {"logps": jnp.concatenate(parts, axis=1)}

    return joined


class Scored(NamedTuple):
    """A batch as `losses.discriminative` takes it.

    Fields:
        real: False where a row fills up the batch, bool `[N]`.
        inputs: arguments of the loss by name, but for `log_u`, `tau` and `gamma`.
        positive_scores: of the right answers, float `[N]`.
    """

    real: jax.Array
    inputs: dict[str, Any]
    positive_scores: jax.Array

    def mean_negative(self, values: jax.Array) -> Metric:
        """The mean over the negatives that count; values `[N, B]`."""
        return _answers.mean_over(self.inputs["neg_mask"])(values)

    def metrics(self) -> dict[str, Metric]:
        """Mean log-probabilities of whole answers."""
        mean = _answers.mean_over(self.real)
        return {
            "logps/positive": mean(self.inputs["pos_logps"]),
            "logps/negative": self.mean_negative(self.inputs["neg_logps"]),
        }


def split(scores: Mapping[str, jax.Array], variant: Variant) -> Scored:
    """The scores of `discriminative_scores`, for either variant of the loss."""
    answered = scores["lengths"] > 0.0
    real = answered[:, data.POSITIVE]
    logps, lengths = scores["logps"], scores["lengths"]
    positive = logps[:, data.POSITIVE]
    inputs = {
        "pos_logps": positive,
        "neg_logps": logps[:, 1:],
        "neg_mask": answered[:, 1:],
    }
    if variant == "dft2":
        tokens = jnp.where(real, lengths[:, data.POSITIVE], 1.0)
        inputs |= {"pos_lengths": tokens, "neg_lengths": lengths[:, 1:]}
        return Scored(real, inputs, positive / tokens)
    inputs["ref_neg_logps"] = scores["ref_neg_logps"]
    return Scored(real, inputs, positive)
