"""Arithmetic that every room shares; arrays in, arrays out."""

from jaxpost.ops._answers import answer_sums, per_answer
from jaxpost.ops._attention import attention
from jaxpost.ops._attention_cached import cached_attention
from jaxpost.ops._attention_chunked import attention_block
from jaxpost.ops._branches import branch_numbers, predictors
from jaxpost.ops._chunks import default_chunk_size
from jaxpost.ops._dtypes import at_least_float32, compute_dtype
from jaxpost.ops._kl import kl_estimate
from jaxpost.ops._linear_divergence import linear_divergence
from jaxpost.ops._linear_logps import TokenSlopes, linear_token_logps
from jaxpost.ops._linear_sequences import linear_sequence_logps
from jaxpost.ops._linear_support import (
    Support,
    linear_support_logps,
    linear_top_logps,
)
from jaxpost.ops._logits import entropy, logits, token_logps
from jaxpost.ops._masked import (
    last_token,
    masked_mean,
    masked_sum,
    masked_variance,
    ratio,
)
from jaxpost.ops._shift import shift_targets
from jaxpost.ops._trees import join_trees

__all__ = [
    "Support",
    "TokenSlopes",
    "answer_sums",
    "at_least_float32",
    "attention",
    "attention_block",
    "branch_numbers",
    "cached_attention",
    "compute_dtype",
    "default_chunk_size",
    "entropy",
    "join_trees",
    "kl_estimate",
    "last_token",
    "linear_divergence",
    "linear_sequence_logps",
    "linear_support_logps",
    "linear_token_logps",
    "linear_top_logps",
    "logits",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "per_answer",
    "predictors",
    "ratio",
    "shift_targets",
    "token_logps",
]
