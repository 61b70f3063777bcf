"""The loss of the best model that ignores context: a floor any training must beat."""

from collections.abc import Sequence

import numpy as np


def unigram_loss(
    train: Sequence[tuple[np.ndarray, np.ndarray]],
    held_out: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    vocab_size: int,
) -> float:
    """Mean negative log-likelihood of held-out tokens under training frequencies.

    One is added to every count, so that a token not seen in training is not infinite.

    Args:
        train: tokens, integer `[n]`, and loss mask, bool `[n]`, of each example.
        held_out: likewise.
        vocab_size: number of ids.

    Returns:
        Nats per trained-on token.

    Raises:
        ValueError: no held-out token is trained on.
    """
    counts = np.ones(vocab_size, np.float64)
    for tokens, mask in train:
        counts += np.bincount(tokens[mask], minlength=vocab_size)
    logps = np.log(counts) - np.log(counts.sum())
    scored = np.concatenate([tokens[mask] for tokens, mask in held_out] or [[]])
    if not scored.size:
        raise ValueError("unigram_loss needs at least one trained-on held-out token.")
    return float(-logps[scored].mean())
