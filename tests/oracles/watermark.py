"""SWEET and WLLM in loops and float64, and the green list in Python's integers."""

import hashlib
import math

import numpy as np

MASK = 2**32 - 1
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


def entropy(probabilities) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def softmax(logits) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def z_and_p(green: int, scored: int, gamma: float) -> tuple[float, float]:
    z = (green - gamma * scored) / math.sqrt(scored * gamma * (1 - gamma))
    return z, 0.5 * math.erfc(z / math.sqrt(2))


def tail(green: int, scored: int, gamma: float) -> float:
    return sum(
        math.comb(scored, k) * gamma**k * (1 - gamma) ** (scored - k)
        for k in range(green, scored + 1)
    )


def words(secret: int, vocab_size: int, scheme: str) -> list[tuple[int, int]]:
    """Two 32-bit words for each round."""
    parts = ("jaxpost watermark", secret, vocab_size, scheme, "rounds")
    text = "\0".join(str(part) for part in parts).encode()
    digest = hashlib.blake2b(text, digest_size=32).digest()
    numbers = [int.from_bytes(digest[4 * n : 4 * n + 4], "little") for n in range(8)]
    return [(numbers[2 * n], numbers[2 * n + 1]) for n in range(4)]


def _mix(x: int) -> int:
    x = (x ^ (x >> 16)) * FIRST & MASK
    x = (x ^ (x >> 15)) * SECOND & MASK
    return x ^ (x >> 16)


def _round(value: int, salt: int, size: int) -> int:
    bits = ((value ^ salt) * FIRST) & MASK
    bits = ((bits ^ (bits >> 15)) * SECOND) & MASK
    kept = 32 - size.bit_length()
    return (bits >> (32 - kept)) * size >> kept


def green_ids(
    secret: int, scheme: str, prev: int, count: int, vocab: int, grid: tuple[int, int]
) -> set[int]:
    """The `count` ids of least rank, found by sorting: no threshold is needed."""
    rows, columns = grid
    keys = words(secret, vocab, scheme)
    salts = [_mix((_mix(prev ^ first) + second) & MASK) for first, second in keys]

    def rank(token: int) -> int:
        left, right = divmod(token, columns)
        left = (left + _round(right, salts[0], rows)) % rows
        right = (right + _round(left, salts[1], columns)) % columns
        left = (left + _round(right, salts[2], rows)) % rows
        return left * columns + right

    return set(sorted(range(vocab), key=rank)[:count])


def marked_logits(logits, prev: int, green: set[int], delta: float, tau: float):
    """One step of SWEET on one row, float64."""
    row = np.asarray(logits, np.float64).copy()
    if entropy(softmax(row.tolist())) > tau:
        for token in green:
            row[token] += delta
    return row


def detect(tokens, entropies, prompt_length, green_of, gamma, tau, unique=False):
    """`(z, scored, green)` of one text in a loop."""
    seen: set[tuple[int, int]] = set()
    scored = green = 0
    for place in range(prompt_length, len(tokens)):
        pair = (tokens[place - 1], tokens[place])
        if entropies[place] <= tau or (unique and pair in seen):
            continue
        seen.add(pair)
        scored += 1
        green += tokens[place] in green_of(tokens[place - 1])
    if not scored:
        return -100.0, 0, 0
    return z_and_p(green, scored, gamma)[0], scored, green
