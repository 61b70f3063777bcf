"""Advantages: how much better than expected; arrays in, arrays out, no gradients."""

from jaxpost.advantages._gae import gae
from jaxpost.advantages._group import group_relative, leave_one_out
from jaxpost.advantages._normalize import whiten

__all__ = ["gae", "group_relative", "leave_one_out", "whiten"]
