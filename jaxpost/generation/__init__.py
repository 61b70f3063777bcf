"""Decode loop, sampling, logits processors, stop conditions; functions, not models."""

from jaxpost.generation import watermark
from jaxpost.generation._config import SamplingConfig
from jaxpost.generation._decode import trace_counts
from jaxpost.generation._files import write_completions
from jaxpost.generation._generate import Rollout, bucket_length, generate
from jaxpost.generation._processors import Processor, ProcessorState
from jaxpost.generation._server import Finished, StreamStats
from jaxpost.generation._settings_file import SettingsFile
from jaxpost.generation._stream import Stream, as_rollout, generate_stream
from jaxpost.generation._text import (
    Completion,
    Progress,
    TextResult,
    TextStats,
    generate_text,
)

__all__ = [
    "Completion",
    "Finished",
    "Processor",
    "ProcessorState",
    "Progress",
    "Rollout",
    "SamplingConfig",
    "SettingsFile",
    "Stream",
    "StreamStats",
    "TextResult",
    "TextStats",
    "as_rollout",
    "bucket_length",
    "generate",
    "generate_stream",
    "generate_text",
    "trace_counts",
    "watermark",
    "write_completions",
]
