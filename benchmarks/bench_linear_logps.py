"""Log-probabilities from hidden states, forward and backward, against the naive way.

    .venv/bin/python benchmarks/bench_linear_logps.py
    .venv/bin/python benchmarks/bench_linear_logps.py --shape tiny     # a quick look

The limit is the three matrix products that any method needs (logits, gradient of the
hidden states, gradient of the head), with nothing between them. Rivals: the naive way,
which keeps the logits, and the usual remedy, chunks under `jax.checkpoint`, which pays
a fourth product. Ours twice: with `grad_weights`, as `recipes/sft.py` calls it, and
without. Correctness is checked before timing. Writes
`benchmarks/results/linear_logps_<shape>.json`.
"""

import argparse
import functools

import _measure
from _shapes import SHAPES, Shape

LIMIT, NAIVE, REMAT = "three products", "naive", "checkpointed chunks"
OURS, OURS_LAZY = "jaxpost", "jaxpost, no hint"


def make_arguments(shape: Shape):
    """Hidden states, head, targets and mask; all tokens are trained on."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 3)
    tokens = (shape.batch, shape.length)
    hidden = jax.random.normal(keys[0], (*tokens, shape.width))
    weight = jax.random.normal(keys[1], (shape.width, shape.vocab)) * 0.05
    targets = jax.random.randint(keys[2], tokens, 0, shape.vocab)
    return jax.block_until_ready((hidden, weight, targets, jnp.ones(tokens, bool)))


def three_products(hidden, weight, targets, mask):
    """The work that no method avoids."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = flat @ weight
    return scores @ weight.T, flat.T @ scores


def loss_and_gradients(token_logps):
    """Mean negative log-likelihood and its gradients, as a training step takes them."""
    import jax
    import jax.numpy as jnp

    def loss(hidden, weight, targets, mask):
        logps = token_logps(hidden, weight, targets, mask)
        return -jnp.sum(jnp.where(mask, logps, 0.0)) / jnp.sum(mask, dtype=jnp.float32)

    return jax.value_and_grad(loss, (0, 1))


def naive(hidden, weight, targets, mask):
    import jax
    import jax.numpy as jnp

    logps = jax.nn.log_softmax(hidden @ weight)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def checkpointed(hidden, weight, targets, mask, *, chunk):
    """Scan over chunks of tokens, each rebuilt in the backward pass."""
    import jax

    @jax.checkpoint
    def one(part):
        return naive(part[0], weight, part[1], None)

    flat = hidden.reshape(-1, chunk, hidden.shape[-1])
    logps = jax.lax.map(one, (flat, targets.reshape(-1, chunk)))
    return logps.reshape(targets.shape)


def ours(hidden, weight, targets, mask, *, hint, chunk_size):
    from jaxpost import ops

    options = {"grad_weights": mask} if hint else {}
    stats = ops.linear_token_logps(
        hidden, weight, targets, chunk_size=chunk_size, **options
    )
    return stats.logps


def contestants(shape: Shape, chunk_size: int | None):
    """All rows, by name."""
    chunk = next(c for c in (256, 128, 64, 32, 1) if shape.tokens % c == 0)
    rows = {
        NAIVE: naive,
        REMAT: functools.partial(checkpointed, chunk=chunk),
        OURS: functools.partial(ours, hint=True, chunk_size=chunk_size),
        OURS_LAZY: functools.partial(ours, hint=False, chunk_size=chunk_size),
    }
    found = [_measure.Contestant(LIMIT, three_products)]
    found += [_measure.Contestant(n, loss_and_gradients(f)) for n, f in rows.items()]
    return {c.name: c for c in found}


def check(contestants, arguments) -> None:
    """Compile everything; losses and gradients must agree with the naive way."""
    import numpy as np

    wanted = None
    for name, contestant in contestants.items():
        result = contestant.compile(arguments)
        if name == LIMIT:
            continue
        loss, gradients = result
        if wanted is None:
            wanted = loss, gradients
            continue
        np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
        for found, other in zip(gradients, wanted[1], strict=True):
            scale = float(abs(other).max())
            np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-5 * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark linear_token_logps.")
    parser.add_argument("--shape", choices=SHAPES, default="wide-vocab")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="only the rows compared")
    parser.add_argument("--peak-of", help="used by the benchmark itself")
    flags = parser.parse_args()
    shape = SHAPES[flags.shape]
    rows = contestants(shape, flags.chunk_size)
    if flags.quick:
        rows = {name: rows[name] for name in (LIMIT, NAIVE, OURS)}
    arguments = make_arguments(shape)
    if flags.peak_of:
        print(_measure.peak_bytes_of_first_run(rows[flags.peak_of], arguments))
        return
    check(rows, arguments)
    _measure.time_interleaved(list(rows.values()), arguments, rounds=flags.rounds)
    passed_on = ["--shape", flags.shape]
    if flags.chunk_size:
        passed_on += ["--chunk-size", str(flags.chunk_size)]
    for name, row in rows.items():
        row.peak_bytes = _measure.peak_bytes_in_fresh_process(
            [*passed_on, "--peak-of", name]
        )
    settings = _measure.environment()
    _measure.print_table(
        f"{shape.tokens} tokens, hidden {shape.width}, vocabulary {shape.vocab}, "
        f"float32, forward and backward; {settings['device']}, "
        f"{settings['threads']} threads, jax {settings['jax']}, {settings['malloc']}, "
        f"{flags.rounds} rounds",
        list(rows.values()),
        limit=LIMIT,
        rival=NAIVE,
    )
    verdict = {
        "memory_vs_naive": rows[OURS].temp_bytes / rows[NAIVE].temp_bytes,
        "peak_vs_naive": (rows[OURS].peak_bytes or 0) / (rows[NAIVE].peak_bytes or 1),
        "time_vs_naive": rows[OURS].median_s / rows[NAIVE].median_s,
        "time_vs_products": rows[OURS].median_s / rows[LIMIT].median_s,
    }
    bars = {"memory_vs_naive": 1 / 8, "time_vs_naive": 1.0, "time_vs_products": 1.3}
    bars["peak_vs_naive"] = 1 / 8
    for name, value in verdict.items():
        met = "met" if value <= bars[name] else "MISSED"
        print(f"{name}: {value:.3f} (at most {bars[name]:.3f}): {met}")
    path = _measure.write_json(
        f"linear_logps_{flags.shape}",
        {
            "environment": settings,
            "shape": vars(shape),
            "rows": [row.row() for row in rows.values()],
            "verdict": verdict,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    _measure.use_huge_pages()
    main()
