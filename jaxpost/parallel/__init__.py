"""Meshes, logical axis rules and the placement of trees; the only room that shards."""

from jaxpost.parallel._mesh import AXES, make_mesh
from jaxpost.parallel._shardings import RULES, Rules, batch_sharding, place, shardings

__all__ = [
    "AXES",
    "RULES",
    "Rules",
    "batch_sharding",
    "make_mesh",
    "place",
    "shardings",
]
