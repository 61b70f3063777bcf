"""Decode loop, sampling, logits processors, stop conditions; functions, not models."""

from jaxpost.generation._config import SamplingConfig
from jaxpost.generation._decode import trace_counts
from jaxpost.generation._generate import Rollout, bucket_length, generate
from jaxpost.generation._processors import Processor, ProcessorState

__all__ = [
    "Processor",
    "ProcessorState",
    "Rollout",
    "SamplingConfig",
    "bucket_length",
    "generate",
    "trace_counts",
]
