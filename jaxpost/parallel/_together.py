"""What several processes do together: meet, do one thing once, compile, gather.

Meetings go through JAX's coordination service, which waits as long as it is told;
collectives between CPU processes give up after half a minute.
"""

import ctypes
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

_WAIT_S = 3600.0
_meetings = itertools.count()


class FirstProcessError(OSError):
    """What process 0 did for all of them failed."""


def wait_for_processes(name: str, *, deadline_s: float = _WAIT_S) -> None:
    """Returns once every process has come here; `name` tells errors apart.

    Raises:
        RuntimeError: another process ended, or did not come in time.
    """
    if jax.process_count() > 1:
        # The same number on every process: all meet in the same order.
        meeting = f"jaxpost/{next(_meetings)}/{name}"
        _client().wait_at_barrier(meeting, int(deadline_s * 1000))


def on_first_process(name: str, job: Callable[[], Any]) -> Any:
    """Runs `job` on process 0 alone, and returns, or fails, on all of them.

    Args:
        name: of what is done, for the error on the other processes.
        job: must need no other process.

    Returns:
        What `job` returned; with several processes it must be a JSON value.

    Raises:
        Exception: on process 0, what `job` raised.
        FirstProcessError: on the others, with the words of that error.
    """
    if jax.process_count() == 1:
        return job()
    key = f"jaxpost/{next(_meetings)}/{name}"
    if jax.process_index() == 0:
        try:
            value = job()
            word = json.dumps({"done": value})
        except BaseException as error:
            _client().key_value_set(key, json.dumps({"failed": str(error)}))
            raise
        _client().key_value_set(key, word)
        return value
    word = json.loads(_client().blocking_key_value_get(key, int(_WAIT_S * 1000)))
    if "failed" in word:
        raise FirstProcessError(f"{name} on process 0 failed: {word['failed']}")
    return word["done"]


def compile_together(jitted: Any) -> Callable[..., Any]:
    """`jitted`, but a program is compiled by all processes before any of them runs it.

    One that compiles longer than the others would keep them waiting in the program's
    first collective. What the compiler needed is given back to the system before the
    program asks for its own memory: on CPU it would come on top (a quarter of the peak
    of a small model's step).

    Args:
        jitted: from `jax.jit`, for positional arguments.

    Returns:
        A function to call instead.
    """
    compiled: set[Any] = set()

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        shapes = (structure, *map(_shape_of, leaves))
        if shapes not in compiled:
            compiled.add(shapes)
            jitted.lower(*arguments).compile()  # the call below finds it
            _return_free_memory()
            if jax.process_count() > 1:
                wait_for_processes("compiled")
        return jitted(*arguments)

    return call


def _shape_of(x: Any) -> tuple:
    return getattr(x, "shape", ()), getattr(x, "dtype", type(x))


def _return_free_memory() -> None:
    """Give pages that are free inside this process back, where the C library can."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # not the GNU C library
        return
    trim(0)


def gather_to_hosts(tree: Any) -> Any:
    """The whole tree on every process, one array at a time.

    Args:
        tree: arrays, each the same global array on all processes; every process must
            call this.

    Returns:
        The tree of NumPy arrays; the tree itself if there is one process.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree
    )


def _client() -> Any:
    """The client of the coordination service; JAX has no public name for it."""
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("the processes were not started by jax.distributed.")
    return client
