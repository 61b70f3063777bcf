"""Columns of embeddings: standardised, whitened, decorrelated, and what is measured."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpost import ops
from jaxpost.losses._contrastive_blocks import normalize_rows


def _centred(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    (u,) = ops.at_least_float32(u)
    mean = jnp.mean(u, axis=0, keepdims=True)
    return u - mean, mean


def constant_columns(u: jax.Array) -> jax.Array:
    """True for columns whose entries differ by rounding at most, `[N, D]` to `[D]`."""
    centred, mean = _centred(u)
    resolution = 8.0 * float(jnp.finfo(centred.dtype).eps)
    return jnp.max(jnp.abs(centred), axis=0) <= resolution * jnp.abs(mean[0])


def column_standardize(u: jax.Array, *, ddof: int = 1, eps: float = 0.0) -> jax.Array:
    """Each column minus its mean, over its standard deviation (plus `eps`).

    A constant column, which has no deviation to divide by, becomes zeros, and its
    gradient is zero; the published code has NaN there.

    Args:
        u: embeddings, float `[N, D]`.
        ddof: the variance divides by `N - ddof`; 1 as published.
        eps: added to the standard deviation; 0 as published.

    Returns:
        float32 or wider `[N, D]`.

    Raises:
        ValueError: `ddof` is negative or leaves nothing of N, or `eps` is negative.

    Source: CLNR, arXiv 2305.00623 (column-wise post-processing of node embeddings).
    """
    if not 0 <= ddof < u.shape[0]:
        raise ValueError(f"ddof must lie in [0, {u.shape[0]}), got {ddof}.")
    if eps < 0.0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    flat = constant_columns(jax.lax.stop_gradient(u))[None, :]
    centred, _ = _centred(u)
    centred = jnp.where(flat, 0.0, centred)
    variance = jnp.sum(centred * centred, axis=0, keepdims=True) / (u.shape[0] - ddof)
    deviation = jnp.sqrt(jnp.where(flat, 1.0, variance))
    return centred / (deviation + eps)


def scalar_whiten(u: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    """All entries minus their mean, over the square root of their variance plus `eps`.

    What the published code of dCLNR computes under the name of decorrelation: one mean
    and one (population) variance for the whole matrix. `zca_whiten` decorrelates.

    Args:
        u: float `[N, D]`.
        eps: added to the variance.

    Returns:
        float32 or wider `[N, D]`.
    """
    (u,) = ops.at_least_float32(u)
    centred = u - jnp.mean(u)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred) + eps)


def zca_whiten(u: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    """Columns rotated and scaled so that their covariance is the identity, nearly.

    `(u - mean) (C + eps I)^(-1/2)` with the symmetric root, so columns keep their
    meaning, and `C` the covariance over `N - 1`.

    Args:
        u: float `[N, D]`.
        eps: added to each eigenvalue; also what bounds the gradient where they meet.

    Returns:
        float32 or wider `[N, D]`.

    Source: Bell & Sejnowski (1997); Huang et al. (2018), arXiv 1804.08450.
    """
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}.")
    centred, _ = _centred(u)
    covariance = _gram(centred, centred) / (u.shape[0] - 1)
    return jnp.dot(
        centred, _inverse_root(covariance, eps), precision=jax.lax.Precision.HIGHEST
    )


@jax.custom_vjp
def _root_of(covariance: jax.Array, eps: jax.Array) -> jax.Array:
    return _root_forward(covariance, eps)[0]


def _root_forward(covariance, eps):
    values, vectors = jnp.linalg.eigh(covariance)
    scales = jnp.maximum(values, 0.0) + eps
    root = (vectors * jax.lax.rsqrt(scales)[None, :]) @ vectors.T
    return root, (scales, vectors)


def _root_backward(residuals, cotangent):
    """Divided differences of `x^(-1/2)`: finite where eigenvalues meet."""
    scales, vectors = residuals
    roots = jnp.sqrt(scales)
    # (a^-1/2 - b^-1/2) / (a - b) = -1 / (sqrt(a) sqrt(b) (sqrt(a) + sqrt(b)))
    product = roots[:, None] * roots[None, :]
    slopes = -1.0 / (product * (roots[:, None] + roots[None, :]))
    inner = vectors.T @ ((cotangent + cotangent.T) / 2.0) @ vectors
    return vectors @ (slopes * inner) @ vectors.T, None


_root_of.defvjp(_root_forward, _root_backward)


def _inverse_root(covariance: jax.Array, eps: float) -> jax.Array:
    return _root_of(covariance, jnp.asarray(eps, covariance.dtype))


def _gram(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.T, b, precision=jax.lax.Precision.HIGHEST)


class CCAOutput(NamedTuple):
    """What `cca_ssg` returns.

    Fields:
        values: minus the inner product of a node's two rows, `[N]`; their mean is the
            first term.
        decorrelation: squared distance of both correlation matrices from the identity,
            a scalar; `lam` times it is the second term.
    """

    values: jax.Array
    decorrelation: jax.Array


def cca_ssg(z1: jax.Array, z2: jax.Array) -> CCAOutput:
    """Canonical correlation between two standardised views, kept from collapse.

    The loss is `mean(values) + lam * decorrelation`, that is
    `-tr(z1' z2) / N + lam (|I - z1' z1 / N|² + |I - z2' z2 / N|²)`.

    Args:
        z1: one view, columns standardised, float `[N, D]`.
        z2: the other.

    Returns:
        `CCAOutput(values, decorrelation)`, float32 or wider.

    Raises:
        ValueError: shapes differ.

    Source: Zhang et al. (2021), "From Canonical Correlation Analysis to Self-supervised
    Graph Neural Networks", arXiv 2106.12484, equation 6.
    """
    if jnp.ndim(z1) != 2 or jnp.shape(z1) != jnp.shape(z2):
        raise ValueError(
            f"z1 and z2 must both be [N, D], got {jnp.shape(z1)} and {jnp.shape(z2)}."
        )
    z1, z2 = ops.at_least_float32(z1, z2)
    identity = jnp.eye(z1.shape[1], dtype=z1.dtype)
    distances = [jnp.sum((identity - _gram(z, z) / len(z)) ** 2) for z in (z1, z2)]
    return CCAOutput(-jnp.sum(z1 * z2, axis=1), distances[0] + distances[1])


def alignment(z1: jax.Array, z2: jax.Array) -> jax.Array:
    """Squared distance between a node's two rows of length one, `[N]`.

    Source: Wang & Isola (2020), arXiv 2005.10242, with exponent 2.
    """
    z1, z2 = ops.at_least_float32(z1, z2)
    return jnp.sum((normalize_rows(z1) - normalize_rows(z2)) ** 2, axis=1)


def uniformity(z: jax.Array, *, t: float = 2.0, chunk_size: int = 1024) -> jax.Array:
    """`log mean_{i<j} exp(-t |z_i - z_j|²)` over rows of length one, a scalar.

    Args:
        z: one view, float `[N, D]`, N at least 2.
        t: positive.
        chunk_size: rows whose distances are held at once.

    Source: Wang & Isola (2020), arXiv 2005.10242. CLNR reports its mean over two views.
    """
    (z,) = ops.at_least_float32(z)
    return _uniformity(float(t), chunk_size, z)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _uniformity(t: float, chunk_size: int, z: jax.Array) -> jax.Array:
    z, count = normalize_rows(z), z.shape[0]
    squares = jnp.sum(z * z, axis=1)  # 1, but for rows without direction
    size = min(chunk_size, count)
    chunks = -(-count // size)

    def add(total, start):
        rows = start + jnp.arange(size, dtype=jnp.int32)
        inside = jnp.minimum(rows, count - 1)
        inner = jnp.dot(z[inside], z.T, precision=jax.lax.Precision.HIGHEST)
        distances = squares[inside][:, None] + squares[None, :] - 2.0 * inner
        later = rows[:, None] < jnp.arange(count, dtype=jnp.int32)[None, :]
        return total + jnp.sum(jnp.where(later, jnp.exp(-t * distances), 0.0)), None

    starts = jnp.arange(chunks, dtype=jnp.int32) * size
    total, _ = jax.lax.scan(add, jnp.zeros((), z.dtype), starts)
    return jnp.log(total) - jnp.log(jnp.asarray(count * (count - 1) / 2, z.dtype))
