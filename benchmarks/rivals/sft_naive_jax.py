"""A naive but sensible JAX step: whole logits, Optax AdamW, jitted and donated.

What a careful user writes in an afternoon with nothing but jax and optax. Runs in the
project's own environment; prints one JSON line.
"""

import os

from sft_settings import Clock, batches, parse, report

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax


def init(sizes: dict, key: jax.Array) -> dict:
    """Random parameters: a dict of arrays, one dict per layer."""
    d, f, h = sizes["hidden"], sizes["ffn"], sizes["head_dim"]
    n, k = sizes["heads"], sizes["kv_heads"]
    keys = iter(jax.random.split(key, 7 * sizes["layers"] + 2))

    def normal(*shape):
        return 0.02 * jax.random.normal(next(keys), shape)

    params = {
        "embed": normal(sizes["vocab"], d),
        "norm": jnp.ones(d),
        "layers": [
            {
                "norm1": jnp.ones(d),
                "q": normal(d, n, h),
                "k": normal(d, k, h),
                "v": normal(d, k, h),
                "o": normal(n, h, d),
                "norm2": jnp.ones(d),
                "gate": normal(d, f),
                "up": normal(d, f),
                "down": normal(f, d),
            }
            for _ in range(sizes["layers"])
        ],
    }
    if not sizes["tied"]:
        params["head"] = normal(d, sizes["vocab"])
    return params


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rope(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def block(p, x):
    y = norm(x, p["norm1"])
    q = rope(jnp.einsum("btd,dnh->btnh", y, p["q"]))
    k = rope(jnp.einsum("btd,dkh->btkh", y, p["k"]))
    v = jnp.einsum("btd,dkh->btkh", y, p["v"])
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("btnh,nhd->btd", mixed, p["o"])
    y = norm(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def main() -> None:
    args = parse(__doc__)
    sizes = args.sizes
    layer = jax.checkpoint(block) if args.remat else block

    def loss_fn(params, tokens):
        x = params["embed"][tokens]
        for p in params["layers"]:
            x = layer(p, x)
        head = params["embed"].T if sizes["tied"] else params["head"]
        logits = norm(x, params["norm"]) @ head
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        ).mean()

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(sizes["learning_rate"], weight_decay=sizes["weight_decay"]),
    )

    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(lambda key: init(sizes, key))(jax.random.key(0))
    state = jax.jit(tx.init)(params)
    step = jax.jit(step, donate_argnums=(0, 1))
    clock = Clock(args.warmup)
    for tokens in batches(sizes, args.warmup + args.steps):
        params, state, loss = step(params, state, tokens)
        loss.block_until_ready()
        clock.tick()
    report(
        "naive JAX step",
        args,
        clock,
        settings="whole logits, jit, donated, optax AdamW",
        versions=f"jax {jax.__version__}, optax {optax.__version__}",
        loss=float(loss),
    )


if __name__ == "__main__":
    main()
