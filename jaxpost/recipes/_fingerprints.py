"""Digests that tell models and settings from others, wherever they lie."""

import hashlib

from jaxpost import models, training


def digest(*texts: str) -> str:
    """sha256 of texts, hexadecimal; other texts that read the same joined differ."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def of_model(model: models.Model) -> str:
    """Of parameters and config."""
    return digest(training.fingerprint_params(model.params), str(model.config))
