"""Meshes, logical axis rules, placement of trees; several hosts as one program."""

from jaxpost.parallel._mesh import AXES, give_virtual_devices_threads, make_mesh
from jaxpost.parallel._processes import (
    MissingProcessError,
    gather_to_hosts,
    start_processes,
    wait_for_processes,
)
from jaxpost.parallel._shardings import (
    RULES,
    Rules,
    batch_sharding,
    place,
    shardings,
    shardings_like,
)
from jaxpost.parallel._vocabulary import split_vocabulary

__all__ = [
    "AXES",
    "RULES",
    "MissingProcessError",
    "Rules",
    "batch_sharding",
    "gather_to_hosts",
    "give_virtual_devices_threads",
    "make_mesh",
    "place",
    "shardings",
    "shardings_like",
    "split_vocabulary",
    "start_processes",
    "wait_for_processes",
]
