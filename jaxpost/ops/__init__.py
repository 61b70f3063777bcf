"""Arithmetic that every room shares; arrays in, arrays out."""

from jaxpost.ops._attention import attention
from jaxpost.ops._kl import kl_estimate
from jaxpost.ops._logits import entropy, logits, token_logps
from jaxpost.ops._masked import masked_mean, masked_sum, masked_variance, ratio
from jaxpost.ops._shift import shift_targets

__all__ = [
    "attention",
    "entropy",
    "kl_estimate",
    "logits",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "ratio",
    "shift_targets",
    "token_logps",
]
