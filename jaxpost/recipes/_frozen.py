"""Other models beside the one that is trained: loaded, and held to its vocabulary.

A teacher, or the fine-tuned model and its base that make a reward of their log-ratio.
"""

import jax.numpy as jnp

from jaxpost import data, models, weights
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._run import Run

SHOWN = 3
Roles = tuple[str, str]
"""What the trained model and the other one are called in messages."""

DISTILLATION: Roles = ("student", "teacher")


class VocabularyMismatchError(ConfigError):
    """Two models do not have the same tokens."""


def open_frozen(
    run: Run,
    path: str,
    *,
    key: str,
    tokenizer: str | None = None,
    roles: Roles = DISTILLATION,
) -> models.Model:
    """Loads a model onto the run's devices, in the compute dtype.

    Args:
        run: with the model that is trained.
        path: folder or hub name.
        key: of the config that named it, for messages.
        tokenizer: folder or hub name of its tokenizer; `path` if None.
        roles: for messages.

    Raises:
        VocabularyMismatchError: its tokens are not those of the trained model.
        ConfigError: it is no language model, or knows shorter texts only.
    """
    check_vocabulary(run.tokenizer, data.load_tokenizer(tokenizer or path), roles)
    model = weights.load(
        path,
        dtype=run.compute_dtype or jnp.float32,
        mesh=run.layout.mesh,
        rules=run.layout.rules,
    )
    if model.config.head != "vocabulary":
        raise ConfigError(
            f"{key} holds a reward model, which has no output over the vocabulary; "
            "choose a language model."
        )
    if run.config.data.max_length > model.config.max_positions:
        raise ConfigError(
            f"data.max_length is {run.config.data.max_length}, but the {roles[1]} has "
            f"{model.config.max_positions} positions; lower it."
        )
    common_vocabulary(run, model, roles)
    return model


def check_vocabulary(
    student: data.Tokenizer, teacher: data.Tokenizer, roles: Roles = DISTILLATION
) -> None:
    """Refuses two tokenizers that do not give each id the same token.

    Raises:
        VocabularyMismatchError: names both sizes and the first tokens that differ.
    """
    tables = [
        {id: token for token, id in t.backend.get_vocab(with_added_tokens=True).items()}
        for t in (student, teacher)
    ]
    differing = sorted(
        id
        for id in tables[0].keys() | tables[1].keys()
        if tables[0].get(id) != tables[1].get(id)
    )
    if not differing:
        return
    shown = ", ".join(
        " is ".join((str(id), " and ".join(_spelled(t.get(id)) for t in tables)))
        for id in differing[:SHOWN]
    )
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    raise VocabularyMismatchError(
        f"the {roles[0]}'s tokenizer {student.name or '(unnamed)'} has "
        f"{len(tables[0])} tokens, the {roles[1]}'s {teacher.name or '(unnamed)'} "
        f"{len(tables[1])}, and they differ: id {shown}{more}. Their distributions "
        "cannot be compared token by token; choose models of one vocabulary."
    )


def _spelled(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


def common_vocabulary(
    run: Run, teacher: models.Model, roles: Roles = DISTILLATION
) -> int:
    """How many ids are compared: heads of one tokenizer are filled up to different
    sizes, and what lies beyond the smaller one is no token."""
    sizes = run.model.config.vocab_size, teacher.config.vocab_size
    if min(sizes) < run.tokenizer.vocab_size:
        raise VocabularyMismatchError(
            f"the tokenizer has {run.tokenizer.vocab_size} ids, but the {roles[0]}'s "
            f"head {sizes[0]} and the {roles[1]}'s {sizes[1]}; choose models whose "
            "heads hold the whole vocabulary."
        )
    return min(sizes)
