"""Losses: arrays in, unreduced values and their weights out, never a mean."""

from jaxpost.losses._adaptive import AdaptiveOutput, adaptive_scaling
from jaxpost.losses._discriminative import (
    DiscriminativeOutput,
    check_discriminative,
    discriminative,
    init_log_u,
)
from jaxpost.losses._divergence import Rest, divergence, support_divergence
from jaxpost.losses._importance import importance_weights
from jaxpost.losses._pairwise import (
    bradley_terry,
    dpo_margins,
    hinge,
    ipo,
    reward_centering,
    robust_dpo,
)
from jaxpost.losses._pairwise_config import (
    PairwiseConfig,
    PairwiseOutput,
    pairwise_loss,
)
from jaxpost.losses._policy import ClippedPolicyOutput, check_clips, clipped_policy
from jaxpost.losses._r3m import R3MOutput, r3m
from jaxpost.losses._sft import sft
from jaxpost.losses._token_weights import token_weights
from jaxpost.losses._value import clipped_value

__all__ = [
    "AdaptiveOutput",
    "ClippedPolicyOutput",
    "DiscriminativeOutput",
    "PairwiseConfig",
    "PairwiseOutput",
    "R3MOutput",
    "Rest",
    "adaptive_scaling",
    "bradley_terry",
    "check_clips",
    "check_discriminative",
    "clipped_policy",
    "clipped_value",
    "discriminative",
    "divergence",
    "dpo_margins",
    "hinge",
    "importance_weights",
    "init_log_u",
    "ipo",
    "pairwise_loss",
    "r3m",
    "reward_centering",
    "robust_dpo",
    "sft",
    "support_divergence",
    "token_weights",
]
