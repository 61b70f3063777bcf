"""Losses: arrays in, unreduced values and their weights out, never a mean."""

from jaxpost.losses._adaptive import AdaptiveOutput, adaptive_scaling
from jaxpost.losses._columns import (
    CCAOutput,
    alignment,
    cca_ssg,
    column_standardize,
    constant_columns,
    scalar_whiten,
    uniformity,
    zca_whiten,
)
from jaxpost.losses._contrastive import nt_xent
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
    "CCAOutput",
    "ClippedPolicyOutput",
    "DiscriminativeOutput",
    "PairwiseConfig",
    "PairwiseOutput",
    "R3MOutput",
    "Rest",
    "adaptive_scaling",
    "alignment",
    "bradley_terry",
    "cca_ssg",
    "check_clips",
    "check_discriminative",
    "clipped_policy",
    "clipped_value",
    "column_standardize",
    "constant_columns",
    "discriminative",
    "divergence",
    "dpo_margins",
    "hinge",
    "importance_weights",
    "init_log_u",
    "ipo",
    "nt_xent",
    "pairwise_loss",
    "r3m",
    "reward_centering",
    "robust_dpo",
    "scalar_whiten",
    "sft",
    "support_divergence",
    "token_weights",
    "uniformity",
    "zca_whiten",
]
