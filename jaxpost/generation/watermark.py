"""Watermarks in generated text: embed (SWEET, WLLM), detect, and choose settings.

`processor` goes into `generation.generate`; `detect` reads tokens and entropies. The
method, its settings and its limits are in `docs/watermark.md`.
"""

from jaxpost.generation._watermark import (
    NO_THRESHOLD,
    WatermarkProcessor,
    watermark_logits,
)
from jaxpost.generation._watermark import watermark_processor as processor
from jaxpost.generation._watermark_calibrate import (
    Forecast,
    TokenFacts,
    forecast,
    join_facts,
    measure_tokens,
    propose,
)
from jaxpost.generation._watermark_detect import (
    NEAR_TAU,
    NOTHING_SCORED,
    Detection,
    TokenMarks,
    Verdict,
    binomial_tails,
    detect,
    detect_batch,
    fewest_green,
    mark_tokens,
    p_values,
    z_scores,
)
from jaxpost.generation._watermark_entropy import token_entropies
from jaxpost.generation._watermark_hash import (
    SCHEME,
    WatermarkKey,
    green_count,
    green_list,
)
from jaxpost.generation._watermark_windows import (
    Window,
    best_windows,
    sliding_z,
    window_sizes,
)
from jaxpost.ops import entropy

__all__ = [
    "NEAR_TAU",
    "NOTHING_SCORED",
    "NO_THRESHOLD",
    "SCHEME",
    "Detection",
    "Forecast",
    "TokenFacts",
    "TokenMarks",
    "Verdict",
    "WatermarkKey",
    "WatermarkProcessor",
    "Window",
    "best_windows",
    "binomial_tails",
    "detect",
    "detect_batch",
    "entropy",
    "fewest_green",
    "forecast",
    "green_count",
    "green_list",
    "join_facts",
    "mark_tokens",
    "measure_tokens",
    "p_values",
    "processor",
    "propose",
    "sliding_z",
    "token_entropies",
    "watermark_logits",
    "window_sizes",
    "z_scores",
]
