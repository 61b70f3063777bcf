"""NT-Xent between two views of the same N things, without holding `[N, N]`."""

import math

import jax
import jax.numpy as jnp

from jaxpost import ops
from jaxpost.losses._contrastive_blocks import blockwise_nt_xent, normalize_rows


def nt_xent(
    z1: jax.Array,
    z2: jax.Array,
    *,
    temperature: float,
    intra: bool = True,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Normalised temperature-scaled cross-entropy, one value per node.

    With rows scaled to length one, `s[i, j] = exp(cos(i, j) / temperature)` and

        l(z1, z2)[i] = -log(s12[i, i] / (sum_j s12[i, j] + sum_{j != i} s11[i, j])),

    the value is `(l(z1, z2) + l(z2, z1)) / 2`. A row shorter than 1e-12 has no
    direction: it is divided by 1e-12, and its gradient is zero.

    Args:
        z1: one view, float `[N, D]`.
        z2: the other, float `[N, D]`; row `i` of both shows the same node.
        temperature: positive; `tau` of the papers.
        intra: whether the other nodes of the same view are negatives too (GRACE's
            loss, `2N - 2` negatives); False leaves those of the other view (`N - 1`).
        chunk_size: rows of one block of similarities; None chooses.
        implementation: "blocks" forms the similarities block by block, each pair of
            rows once, with its own backward pass; beyond 256 MiB of blocks they are
            formed again there, so memory grows with N, not N². "dense" is the plain
            formula on `[N, N]`, differentiated by JAX, which a compiler can split over
            devices. None is "blocks".

    Returns:
        Values, float32 or wider `[N]`, nats. Their mean is the loss.

    Raises:
        ValueError: `temperature` is not positive, shapes differ, N is below 2,
            `chunk_size` is below 1, or the implementation is unknown.

    Source: Zhu et al. (2020), "Deep Graph Contrastive Representation Learning", arXiv
    2006.04131, equations 1 and 2.
    """
    _check(z1, z2, temperature, chunk_size)
    z1, z2 = ops.at_least_float32(z1, z2)
    if implementation == "dense":
        return _dense(z1, z2, temperature, intra)
    if implementation in (None, "blocks"):
        return blockwise_nt_xent(z1, z2, temperature, intra, chunk_size)
    raise ValueError(
        f'implementation must be "blocks", "dense" or None, got {implementation!r}.'
    )


def _dense(z1: jax.Array, z2: jax.Array, temperature: float, intra: bool) -> jax.Array:
    n1, n2 = normalize_rows(z1), normalize_rows(z2)
    s12 = _similarity(n1, n2) / temperature
    rows, columns = s12, s12.T
    if intra:
        self_pair = jnp.eye(len(z1), dtype=bool)
        rows, columns = (
            jnp.concatenate(
                [
                    inter,
                    jnp.where(self_pair, -jnp.inf, _similarity(n, n) / temperature),
                ],
                axis=1,
            )
            for inter, n in ((rows, n1), (columns, n2))
        )
    total = jax.nn.logsumexp(rows, axis=1) + jax.nn.logsumexp(columns, axis=1)
    return total / 2.0 - jnp.diagonal(s12)


def _similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _check(
    z1: jax.Array, z2: jax.Array, temperature: float, chunk_size: int | None
) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if jnp.ndim(z1) != 2 or jnp.shape(z1) != jnp.shape(z2):
        raise ValueError(
            "z1 and z2 must both be [N, D]: two views of the same nodes; got "
            f"{jnp.shape(z1)} and {jnp.shape(z2)}."
        )
    if jnp.shape(z1)[0] < 2:
        raise ValueError(
            f"contrast needs at least 2 nodes, got {jnp.shape(z1)[0]}: one node has no "
            "negatives."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
