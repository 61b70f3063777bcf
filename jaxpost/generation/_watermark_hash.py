"""Green lists: which token ids a key prefers after which token.

A list is never stored and never permuted. A small Feistel network, keyed by the secret
and the previous token, is a bijection of the vocabulary; the ids that it sends below a
threshold are green. So a list has exactly as many ids as asked for, a whole list costs
a few integer operations per id, and one id is looked up without the others.

Knows no logits and no model.
"""

import dataclasses
import functools
import hashlib
import math
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCHEME = "feistel3-v1"
"""Name of the function below; one that gives other lists needs another name."""

ROUNDS = 3
# Multipliers of a 32-bit mixer with little bias: Wellons (2018), "Prospecting for Hash
# Functions", `lowbias32`.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B

LONGEST_GRID = 4
"""Most columns per row of the grid that the vocabulary is laid out on."""


@dataclasses.dataclass(frozen=True)
class WatermarkKey:
    """The secret of a watermark, and what it means.

    Fields:
        secret: at least 0, below 2^128; whoever knows it can find and remove the mark.
        vocab_size: ids of the tokenizer, `V`; logits may be wider, and ids from `V` on
            are never green.
        scheme: which function makes green lists of it.

    Raises:
        ValueError: the secret is out of range, the vocabulary has less than two ids, or
            this version does not know the scheme.
    """

    secret: int = dataclasses.field(repr=False)
    vocab_size: int
    scheme: str = SCHEME

    def __post_init__(self) -> None:
        if isinstance(self.secret, bool) or not isinstance(self.secret, int):
            raise ValueError(
                f"secret must be an integer, got {type(self.secret).__name__}."
            )
        if not 0 <= self.secret < 2**128:
            raise ValueError("secret must be at least 0 and below 2**128.")
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int):
            raise ValueError(f"vocab_size must be an integer, got {self.vocab_size!r}.")
        if not 2 <= self.vocab_size < 2**24:
            raise ValueError(
                f"vocab_size must be at least 2 and below 2**24, got {self.vocab_size}."
            )
        if self.scheme != SCHEME:
            raise ValueError(
                f"the key's scheme is {self.scheme!r}, but this version knows only "
                f"{SCHEME!r}: green lists of one scheme say nothing about another's. "
                "Detect with the program that marked the text."
            )

    @classmethod
    def new(cls, vocab_size: int) -> "WatermarkKey":
        """A key with a fresh secret from the operating system."""
        return cls(secrets.randbits(128), vocab_size)

    @property
    def fingerprint(self) -> str:
        """Tells keys apart without giving the secret away, 16 hexadecimal digits."""
        return _digest(self.secret, self.vocab_size, self.scheme, "name")[:8].hex()

    @property
    def words(self) -> np.ndarray:
        """What the compiled functions take, uint32 `[ROUNDS, 2]`."""
        digest = _digest(self.secret, self.vocab_size, self.scheme, "rounds")
        words = np.frombuffer(digest, "<u4", count=2 * ROUNDS).astype(np.uint32)
        return words.reshape(ROUNDS, 2)


def green_count(gamma: float, vocab_size: int) -> int:
    """Ids on a green list, `floor(gamma V)`.

    Raises:
        ValueError: `gamma` is outside (0, 1), or none or all of the ids would be green.
    """
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must lie in (0, 1), got {gamma}.")
    count = math.floor(gamma * vocab_size)
    if not 0 < count < vocab_size:
        raise ValueError(
            f"gamma={gamma} makes {count} of {vocab_size} ids green: there must be at "
            "least one, and one that is not."
        )
    return count


def green_list(prev_ids: jax.Array, key: WatermarkKey, *, gamma: float) -> jax.Array:
    """Which ids are green after each token.

    Args:
        prev_ids: the tokens before, integer `[...]`.
        key: the watermark's.
        gamma: fraction of ids that are green, in (0, 1).

    Returns:
        bool `[..., V]`, exactly `floor(gamma V)` of each row True.

    Raises:
        ValueError: see `green_count`.
    """
    count = np.uint32(green_count(gamma, key.vocab_size))
    prev_ids = jnp.asarray(prev_ids)
    rows = _green_rows(key.words, prev_ids.reshape(-1), count, key.vocab_size)
    return rows.reshape(*prev_ids.shape, key.vocab_size)


def green_rows(
    words: Any, prev_ids: jax.Array, count: Any, vocab_size: int
) -> jax.Array:
    """Whole lists, `[B] -> bool [B, V]`; `count` and `words` are traced."""
    rows, columns = grid(vocab_size)
    salts = _salts(words, prev_ids)
    left = jnp.arange(rows, dtype=jnp.uint32)[None, :, None]
    right = jnp.arange(columns, dtype=jnp.uint32)[None, None, :]
    salts = [salt[:, None, None] for salt in salts]
    ranks = _permute(left, right, salts, rows, columns)
    limit = _limit(words, prev_ids, count, vocab_size)[:, None, None]
    green = (ranks < limit).reshape(prev_ids.shape[0], rows * columns)
    return green[:, :vocab_size]


_green_rows = jax.jit(green_rows, static_argnums=3)


def are_green(
    words: Any, prev_ids: jax.Array, ids: jax.Array, count: Any, vocab_size: int
) -> jax.Array:
    """Whether each id is green after its predecessor, bool of the shape of both.

    Ids outside the vocabulary are not green.
    """
    inside = (ids >= 0) & (ids < vocab_size)
    ranks = _ranks(words, prev_ids, jnp.where(inside, ids, 0), vocab_size)
    return inside & (ranks < _limit(words, prev_ids, count, vocab_size))


@functools.lru_cache(maxsize=64)
def grid(vocab_size: int) -> tuple[int, int]:
    """Rows and columns whose product is `V` or a little more, neither too long.

    The ids over, from `V` to the product, are few (none for most vocabularies in use);
    `_limit` makes up for them.
    """
    size = vocab_size
    while True:
        for rows in range(math.isqrt(size), 0, -1):
            if size // rows > LONGEST_GRID * rows:
                break
            if size % rows == 0:
                return rows, size // rows
        size += 1


def _digest(*parts: Any) -> bytes:
    text = "\0".join(str(part) for part in ("jaxpost watermark", *parts))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _salts(words: Any, prev_ids: jax.Array) -> list[jax.Array]:
    """What keys each round after each token, uint32 of the shape of `prev_ids`."""
    previous, words = prev_ids.astype(jnp.uint32), jnp.asarray(words)
    return [
        _mix(_mix(previous ^ words[number, 0]) + words[number, 1])
        for number in range(ROUNDS)
    ]


def _permute(
    left: jax.Array, right: jax.Array, salts: list[jax.Array], rows: int, columns: int
) -> jax.Array:
    """Ranks of grid places: a Feistel network on `Z_rows x Z_columns`, uint32.

    Source: Black & Rogaway (2002), "Ciphers with Arbitrary Finite Domains", section 5.
    """
    left = _wrap(left + _below(_hash(right, salts[0]), rows), rows)
    right = _wrap(right + _below(_hash(left, salts[1]), columns), columns)
    left = _wrap(left + _below(_hash(right, salts[2]), rows), rows)
    return left * np.uint32(columns) + right


def _ranks(
    words: Any, prev_ids: jax.Array, ids: jax.Array, vocab_size: int
) -> jax.Array:
    """Ranks of single ids after single tokens, uint32."""
    rows, columns = grid(vocab_size)
    ids = ids.astype(jnp.uint32)
    left = ids // np.uint32(columns)
    right = ids - left * np.uint32(columns)
    return _permute(left, right, _salts(words, prev_ids), rows, columns)


def _limit(words: Any, prev_ids: jax.Array, count: Any, vocab_size: int) -> jax.Array:
    """The rank below which `count` ids of the vocabulary lie, uint32 like `prev_ids`.

    It is `count` and the number of ids over that lie below it, which is found by
    counting until that number grows no more.
    """
    rows, columns = grid(vocab_size)
    count = jnp.asarray(count, jnp.uint32)
    limit = jnp.broadcast_to(count, prev_ids.shape)
    over = [
        _ranks(words, prev_ids, jnp.full_like(prev_ids, number), vocab_size)
        for number in range(vocab_size, rows * columns)
    ]
    for _ in over:
        below = [(rank < limit).astype(jnp.uint32) for rank in over]
        limit = count + functools.reduce(jnp.add, below)
    return limit


def _hash(value: jax.Array, salt: jax.Array) -> jax.Array:
    """32 bits of which the high ones are good."""
    value = (value ^ salt) * np.uint32(FIRST)
    return (value ^ (value >> np.uint32(15))) * np.uint32(SECOND)


def _mix(value: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers without visible structure."""
    value = (value ^ (value >> np.uint32(16))) * np.uint32(FIRST)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(SECOND)
    return value ^ (value >> np.uint32(16))


def _below(bits: jax.Array, size: int) -> jax.Array:
    """High bits as a number below `size`; no product exceeds 32 bits."""
    kept = 32 - size.bit_length()
    return ((bits >> np.uint32(32 - kept)) * np.uint32(size)) >> np.uint32(kept)


def _wrap(value: jax.Array, size: int) -> jax.Array:
    """`value` modulo `size`, for values below `2 size`."""
    return jnp.minimum(value, value - np.uint32(size))
