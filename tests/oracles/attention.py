"""Attention from its definition: one query at a time, float64."""

import numpy as np


def attention(
    query,
    key,
    value,
    *,
    query_positions,
    key_positions,
    query_segments=None,
    key_segments=None,
    window=None,
    softcap=None,
    scale=None,
):
    """`[B, T, N, H]`, zeros for a query that sees nothing; arguments as in `ops`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    scale = width**-0.5 if scale is None else scale
    out = np.zeros_like(query)
    for b in range(batch):
        for t in range(length):
            seen = [
                s
                for s in range(key.shape[1])
                if _sees(
                    query_positions[b, t] - key_positions[b, s],
                    None if query_segments is None else query_segments[b, t],
                    None if key_segments is None else key_segments[b, s],
                    window,
                )
            ]
            for n in range(heads) if seen else ():
                scores = np.array(
                    [query[b, t, n] @ key[b, s, n // group] for s in seen]
                )
                scores = scores * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights = weights / weights.sum()
                for weight, s in zip(weights, seen, strict=True):
                    out[b, t, n] += weight * value[b, s, n // group]
    return out


def _sees(distance, query_segment, key_segment, window):
    if distance < 0 or (window is not None and distance >= window):
        return False
    if query_segment == 0 or key_segment == 0:
        return False
    if query_segment is None or key_segment is None:
        return True
    return query_segment == key_segment
