"""Host memory while loading and saving, measured by the kernel."""

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from tiny_families import CONFIGS, build

from jaxpost import models, weights

CONFIG = models.DecoderConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_positions=64,
)
LARGEST = 4 * 8192 * 1024  # embedding, head, and each stacked feed-forward matrix
_CHILD = """
import json, pathlib, sys
import jax
from jaxpost import weights

def status(field):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

def growth(action):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = status("VmRSS")
    result = action()
    return result, status("VmHWM") - before

small, large, out = sys.argv[1:]
tiny = weights.load(small, dtype="float32")  # imports and compilation come first
weights.save(tiny, out + "-tiny")
load = lambda: jax.block_until_ready(weights.load(large, dtype="float32"))
model, loading = growth(load)
_, saving = growth(lambda: weights.save(model, out))
result = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(json.dumps({"result": result, "loading": loading, "saving": saving}))
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(),
    reason="the peak can be reset on Linux only",
)
def test_peak_is_the_result_and_one_parameter(tmp_path):
    weights.save(build(CONFIGS["llama"]), tmp_path / "small", dtype="bfloat16")
    (tmp_path / "large").mkdir()
    tensors = {
        name: np.full(shape, 0.01, ml_dtypes.bfloat16)
        for name, shape in expected_shapes().items()
    }
    safetensors.numpy.save_file(tensors, tmp_path / "large/model.safetensors")
    fields = json.dumps(weights.to_hf_config(CONFIG))
    (tmp_path / "large/config.json").write_text(fields)
    del tensors
    arguments = [str(tmp_path / name) for name in ("small", "large", "out")]
    output = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    figures = json.loads(output)
    assert figures["result"] > 5 * LARGEST
    assert figures["loading"] <= figures["result"] + 1.5 * LARGEST, figures
    # Without the result the bound would hold for a loader that keeps nothing.
    assert figures["loading"] >= 0.9 * figures["result"], figures
    assert figures["saving"] <= 1.5 * LARGEST, figures


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Written out, so that the table under test has no part in it."""
    width, inner, vocab = 1024, 2048, 8192
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for layer in range(4):
        root = f"model.layers.{layer}"
        shapes |= {
            f"{root}.input_layernorm.weight": (width,),
            f"{root}.post_attention_layernorm.weight": (width,),
            f"{root}.self_attn.q_proj.weight": (128, width),
            f"{root}.self_attn.k_proj.weight": (64, width),
            f"{root}.self_attn.v_proj.weight": (64, width),
            f"{root}.self_attn.o_proj.weight": (width, 128),
            f"{root}.mlp.gate_proj.weight": (inner, width),
            f"{root}.mlp.up_proj.weight": (inner, width),
            f"{root}.mlp.down_proj.weight": (width, inner),
        }
    return shapes
