"""Adapters written here and read by PEFT on torch, and the other way."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import models, ops, weights

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
with warnings.catch_warnings():
    # Deprecations inside these libraries' own modules are not ours to fix.
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="needs the extra `parity`")
    from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.parity,
    # PEFT reads a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "max_positions": 64,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 10},
    "phi3": {},
}
MODULES = {
    "llama": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "qwen3": ["k_proj", "v_proj", "gate_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
}


def random_like(tree, seed, spread):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(spread * draw.standard_normal(x.shape), jnp.float32),
        tree,
    )


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    """A random base, and its folder as both libraries read it."""
    config = models.DecoderConfig(
        family=request.param, **(SIZES | FAMILIES[request.param])
    )
    model = models.build(config, abstract=True)
    model = model.replace(params=random_like(model.params, 0, 0.3))
    return model, weights.save(model, tmp_path / "base")


def tokens():
    return np.random.default_rng(3).integers(0, 61, (2, 9))


def our_logits(model):
    batch = jnp.asarray(tokens(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), batch.shape)
    hidden = model.apply(model.params, batch, positions).hidden
    return np.asarray(ops.logits(hidden, model.unembed(model.params)))


def their_base(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(tokens())).logits.numpy()


def check(ours, theirs, plain):
    largest = np.abs(ours).max()
    assert np.abs(ours - theirs).max() <= 1e-4 * largest
    assert np.abs(ours - plain).max() > 0.1 * largest  # the adapter does something


@pytest.mark.parametrize("targets", [("all-linear",), ("q", "v", "up")], ids=str)
def test_peft_reads_ours(saved, targets, tmp_path):
    base, folder = saved
    lora = models.LoraConfig(rank=3, alpha=5.0, targets=targets)
    model = models.add_lora(base, lora, jax.random.key(0))
    adapters, frozen = models.split_lora(model.params)
    model = model.replace(params=ops.join_trees(frozen, random_like(adapters, 1, 0.2)))
    weights.save_adapter(model, tmp_path / "adapter", base_name=str(folder))
    theirs = peft.PeftModel.from_pretrained(their_base(folder), tmp_path / "adapter")
    check(our_logits(model), their_logits(theirs.eval()), our_logits(base))


@pytest.mark.parametrize("stabilised", [False, True])
def test_we_read_pefts(saved, stabilised, tmp_path):
    base, folder = saved
    modules = MODULES[base.config.family]
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=modules,
        rank_pattern={modules[0]: 2, modules[1]: 5},
        alpha_pattern={modules[1]: 3},
        use_rslora=stabilised,
    )
    theirs = peft.get_peft_model(their_base(folder), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = weights.load_adapter(base, tmp_path / "adapter")
    check(our_logits(ours), their_logits(theirs), our_logits(base))
