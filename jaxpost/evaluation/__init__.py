"""How good is it: baselines and scores of finished models."""

from jaxpost.evaluation._clusters import (
    KMeans,
    adjusted_rand_index,
    kmeans,
    normalized_mutual_information,
)
from jaxpost.evaluation._detection import (
    FALSE_POSITIVE_RATES,
    Detection,
    detection,
    pass_at_k,
    tpr_at_fpr,
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
    "FALSE_POSITIVE_RATES",
    "REWARD_BENCH_SECTIONS",
    "Calibration",
    "Detection",
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
    "detection",
    "evaluate_exact_match",
    "kmeans",
    "linear_probe",
    "logistic_probe",
    "normalized_mutual_information",
    "pair_accuracy",
    "pass_at_k",
    "precision_recall_at",
    "reward_bench",
    "rm_bench",
    "rm_bench_by_domain",
    "tpr_at_fpr",
    "unigram_loss",
    "verdicts",
]
