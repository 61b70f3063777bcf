"""How good is it: baselines and scores of finished models."""

from jaxpost.evaluation._clusters import (
    KMeans,
    adjusted_rand_index,
    kmeans,
    normalized_mutual_information,
)
from jaxpost.evaluation._exact_match import ExactMatch, Judged, evaluate_exact_match
from jaxpost.evaluation._linear_probe import ProbeConfig, ProbeResult, linear_probe
from jaxpost.evaluation._logistic import LogisticProbe, logistic_probe
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
    "KMeans",
    "LogisticProbe",
    "MarginGroup",
    "ProbeConfig",
    "ProbeResult",
    "RMBench",
    "RewardBench",
    "accuracy_by_margin",
    "adjusted_rand_index",
    "auroc",
    "bootstrap_interval",
    "calibration",
    "evaluate_exact_match",
    "kmeans",
    "linear_probe",
    "logistic_probe",
    "normalized_mutual_information",
    "pair_accuracy",
    "precision_recall_at",
    "reward_bench",
    "rm_bench",
    "rm_bench_by_domain",
    "unigram_loss",
    "verdicts",
]
