"""How good is it: baselines and scores of finished models."""

from jaxpost.evaluation._exact_match import ExactMatch, Judged, evaluate_exact_match
from jaxpost.evaluation._preference import (
    Calibration,
    Interval,
    MarginGroup,
    accuracy_by_margin,
    auroc,
    bootstrap_interval,
    calibration,
    pair_accuracy,
    precision_recall_at,
    verdicts,
)
from jaxpost.evaluation._preference_benches import (
    REWARD_BENCH_SECTIONS,
    RewardBench,
    RMBench,
    reward_bench,
    rm_bench,
    rm_bench_by_domain,
)
from jaxpost.evaluation._unigram import unigram_loss

__all__ = [
    "REWARD_BENCH_SECTIONS",
    "Calibration",
    "ExactMatch",
    "Interval",
    "Judged",
    "MarginGroup",
    "RMBench",
    "RewardBench",
    "accuracy_by_margin",
    "auroc",
    "bootstrap_interval",
    "calibration",
    "evaluate_exact_match",
    "pair_accuracy",
    "precision_recall_at",
    "reward_bench",
    "rm_bench",
    "rm_bench_by_domain",
    "unigram_loss",
    "verdicts",
]
