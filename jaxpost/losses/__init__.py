"""Losses: arrays in, unreduced values and their weights out, never a mean."""

from jaxpost.losses._sft import sft

__all__ = ["sft"]
