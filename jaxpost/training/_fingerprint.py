"""Which frozen parameters a run was trained beside: a digest of each array.

Computed where the arrays lie, in integers: the same on any number of devices.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.training._step import leaf_name

Fingerprint = dict[str, list[Any]]
"""`[shape, dtype, digest]` of each array by its path."""


class FrozenFingerprint:
    """Fingerprints of frozen parameters; those seen last are not read again."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._found: Fingerprint = {}

    def __call__(self, frozen: Any) -> Fingerprint:
        """The fingerprint of a tree of arrays, or of `jax.ShapeDtypeStruct`, whose
        digest is None. With several processes, each must call this."""
        leaves = jax.tree.leaves(frozen)
        same = len(leaves) == len(self._leaves) and all(
            new is old for new, old in zip(leaves, self._leaves, strict=True)
        )
        if not same:
            self._leaves, self._found = leaves, _fingerprint(frozen)
        return self._found


def fingerprint_params(params: Any) -> str:
    """A digest of a tree's names, shapes, dtypes and values, hexadecimal.

    The same on any number of devices. With several processes, each must call this.
    """
    found = json.dumps(_fingerprint(params), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line for each array; none if equal."""
    lines = [f"  {name}: not given" for name in sorted(stored.keys() - given.keys())]
    for name, (shape, dtype, digest) in sorted(given.items()):
        if name not in stored:
            lines.append(f"  {name}: not there when the checkpoint was saved")
            continue
        old_shape, old_dtype, old_digest = stored[name]
        if [old_shape, old_dtype] != [shape, dtype]:
            was, now = f"{old_dtype}{old_shape}", f"{dtype}{shape}"
            lines.append(f"  {name}: was {was}, given {now}")
        elif digest is not None and digest != old_digest:
            lines.append(f"  {name}: other values")
    return lines


def _fingerprint(frozen: Any) -> Fingerprint:
    pairs = jax.tree_util.tree_leaves_with_path(frozen)
    digests = [
        None if isinstance(leaf, jax.ShapeDtypeStruct) else _digest(leaf)
        for _, leaf in pairs
    ]
    return {
        leaf_name(path): [
            list(np.shape(leaf)),
            str(leaf.dtype),
            None if digest is None else np.asarray(digest).tobytes().hex(),
        ]
        for (path, leaf), digest in zip(pairs, digests, strict=True)
    }


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    """uint32 `[2]`: sums, modulo `2 ** 32`, of each value's bits mixed with its place.

    Integer sums have no order, so any split over devices gives the same.
    """
    bits = _bits(leaf)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    sums = []
    for salt in (0x9E3779B9, 0x85EBCA6B):
        # The finaliser of MurmurHash3, so that neither small nor swapped values cancel.
        mixed = (bits ^ (place * np.uint32(salt))) + np.uint32(salt)
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        sums.append(jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32))
    return jnp.stack(sums)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of the values as uint32."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    whole = jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == jnp.bool_
    if whole and leaf.dtype.itemsize <= 4:  # four-bit ones have no bytes of their own
        return leaf.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
