"""Parts of `benchmarks/claims/sweet.py` whose numbers are not read off elsewhere."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import save_pair

from jaxpost import data, ops, weights
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_answers import read_texts
from jaxpost.recipes._watermark_judge import settings_of

CLAIMS = pathlib.Path(__file__).parents[2] / "benchmarks" / "claims"


@pytest.fixture(scope="module")
def sweet():
    sys.path.insert(0, str(CLAIMS))
    try:
        import sweet
    finally:
        sys.path.remove(str(CLAIMS))
    return sweet


@pytest.mark.slow
def test_costs_are_those_of_the_marked_distribution(sweet, tmp_path):
    """Against the marked logits themselves, softmax by softmax."""
    folder = save_pair(tmp_path)["base"]
    model, words = weights.load(folder), data.load_tokenizer(folder)
    lab = dataclasses.replace(
        sweet.QUICK, gammas=(0.25, 0.5), deltas=(1.5,), cost_keys=2
    )
    texts = read_texts(
        model,
        [(words.encode(a), words.encode(b)) for a, b in (("a b", "c d e f"),) * 3],
    )
    values = np.unique(texts.entropies[texts.mask])
    widest = int(np.argmax(np.diff(values)))  # no entropy lies near the threshold
    tau = float(values[widest : widest + 2].mean())
    settings = settings_of(("sweet", "wllm"), lab.gammas, lab.deltas, tau=tau)
    found = sweet.costs_of(model, texts, settings, lab, words.vocab_size)
    positions = jnp.broadcast_to(
        jnp.arange(texts.tokens.shape[1])[None], texts.tokens.shape
    )
    hidden = model.apply(model.params, texts.tokens, positions).hidden[:, :-1]
    logits = ops.logits(hidden, model.unembed(model.params))
    mask, after = texts.mask[:, 1:], texts.tokens[:, 1:]
    plain = jax.nn.log_softmax(logits)

    def chosen(logps):
        of_tokens = jnp.take_along_axis(logps, after[..., None], axis=-1)[..., 0]
        return np.where(mask, of_tokens, 0.0).sum(axis=1)

    np.testing.assert_allclose(found.plain, chosen(plain), rtol=1e-5)
    assert (found.tokens == mask.sum(axis=1)).all()
    for place, setting in enumerate(settings):
        if setting.method == "unmarked":
            continue
        logps, kls = [], []
        for n in range(lab.cost_keys):
            marked = watermark.watermark_logits(
                logits.reshape(-1, logits.shape[-1]),
                texts.tokens[:, :-1].reshape(-1),
                watermark.WatermarkKey(lab.secret + n, words.vocab_size),
                gamma=setting.gamma,
                delta=setting.delta,
                tau=setting.tau,
            )
            q = jax.nn.log_softmax(marked).reshape(logits.shape)
            logps.append(chosen(q))
            kl = jnp.sum(jnp.exp(q) * (q - plain), axis=-1)
            kls.append(np.where(mask, kl, 0.0).sum(axis=1))
        np.testing.assert_allclose(found.marked[place], np.mean(logps, 0), rtol=1e-5)
        np.testing.assert_allclose(found.kl[place], np.mean(kls, 0), atol=1e-4)


def test_methods_are_compared_at_equal_cost(sweet):
    """Two methods of known costs and scores; one is better by a known amount."""
    settings = settings_of(("sweet", "wllm"), (0.5,), (1.0, 2.0), tau=1.0)
    count = 40
    z = np.full((5, count), np.nan)
    # Of 40 people's texts with z from 0 to 39, a text of z beats as many as lie below.
    human = np.tile(np.arange(count, dtype=float), (5, 1))
    for place, shift in enumerate((9.5, 29.5, 9.5, 19.5), start=1):
        z[place] = shift
    marks = sweet.Marks(z, human, np.ones((5, count), bool), np.ones((5, count)))
    marked = -np.ones((5, count)) * np.array([1.0, 1.1, 1.2, 1.1, 1.2])[:, None]
    costs = sweet.Costs(np.ones(count), -np.ones(count), marked, marked)
    lab = dataclasses.replace(sweet.QUICK, bootstrap=50)
    found = sweet.compare(settings, marks, costs, lab)
    assert found["costs"][0] == pytest.approx(np.expm1(0.1))
    assert found["costs"][-1] == pytest.approx(np.expm1(0.2))
    difference = found["auroc"]["difference"]
    assert difference[0] == pytest.approx(0.0, abs=1e-12)
    assert difference[-1] == pytest.approx((30 - 20) / count)
    assert found["auroc"]["low"][-1] < 0.25 < found["auroc"]["high"][-1]
    places = sweet.table(settings, marks, costs)
    assert places[0]["perplexity"] == pytest.approx(np.e)
    assert places[1]["perplexity_rise"] == pytest.approx(np.expm1(0.1))


@pytest.mark.slow
def test_a_quick_run_ends_with_its_verdicts(tmp_path):
    command = [sys.executable, str(CLAIMS / "sweet.py"), "--quick"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(CLAIMS.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SWEET is found better than WLLM") == 2
