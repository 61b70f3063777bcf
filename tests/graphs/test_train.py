"""The contrastive step on a small graph."""

import jax
import numpy as np
import optax
import pytest

from jaxpost import graphs


@pytest.fixture(scope="module")
def ring() -> object:
    """Twelve nodes in a ring, with eight random features each."""
    nodes = np.arange(12)
    edges = np.stack([nodes, (nodes + 1) % 12])
    features = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    return graphs.make_graph(features, np.concatenate([edges, edges[::-1]], axis=1))


def test_clnr_lowers_its_loss_and_embeds(ring):
    config = graphs.ContrastiveConfig(graphs.EncoderConfig(widths=(16, 16)))
    tx = optax.adam(1e-2)
    state = graphs.init_state(config, tx, 8, key=jax.random.key(0))
    train = jax.jit(
        lambda state: graphs.train_epochs(config, tx, state, ring, epochs=60)
    )
    after, metrics = train(state)
    losses = np.asarray(metrics["loss"])
    assert losses.shape == (60,)
    assert losses[-10:].mean() < losses[:10].mean()
    assert graphs.embed(config, after.params, ring).shape == (12, 16)
