"""Meshes, logical axis rules, placement of trees; several hosts as one program."""

from jaxpost.parallel._chips import CHIPS, GB, Chip, find_chip
from jaxpost.parallel._hlo import (
    Collective,
    Product,
    list_collectives,
    list_products,
)
from jaxpost.parallel._lookup import Lookup, split_lookup
from jaxpost.parallel._mesh import AXES, give_virtual_devices_threads, make_mesh
from jaxpost.parallel._plan import (
    MARGIN,
    Memory,
    Roofline,
    bytes_per_device,
    estimate_temporaries,
    roofline,
    sum_by_kind,
)
from jaxpost.parallel._processes import MissingProcessError, start_processes
from jaxpost.parallel._shardings import (
    RULES,
    Rules,
    batch_sharding,
    place,
    shardings,
    shardings_like,
)
from jaxpost.parallel._together import (
    FirstProcessError,
    compile_together,
    gather_to_hosts,
    on_first_process,
    wait_for_processes,
)
from jaxpost.parallel._vocabulary import split_heads, split_vocabulary

__all__ = [
    "AXES",
    "CHIPS",
    "GB",
    "MARGIN",
    "RULES",
    "Chip",
    "Collective",
    "FirstProcessError",
    "Lookup",
    "Memory",
    "MissingProcessError",
    "Product",
    "Roofline",
    "Rules",
    "batch_sharding",
    "bytes_per_device",
    "compile_together",
    "estimate_temporaries",
    "find_chip",
    "gather_to_hosts",
    "give_virtual_devices_threads",
    "list_collectives",
    "list_products",
    "make_mesh",
    "on_first_process",
    "place",
    "roofline",
    "shardings",
    "shardings_like",
    "split_heads",
    "split_lookup",
    "split_vocabulary",
    "start_processes",
    "sum_by_kind",
    "wait_for_processes",
]
