"""How good is it: baselines and scores of finished models."""

from jaxpost.evaluation._exact_match import ExactMatch, Judged, evaluate_exact_match
from jaxpost.evaluation._unigram import unigram_loss

__all__ = ["ExactMatch", "Judged", "evaluate_exact_match", "unigram_loss"]
