"""Adapters from a config to an export and back, as a user runs it, at toy size."""

import json

import jax
import numpy as np
import pytest
import yaml

from jaxpost import cli, models, recipes, training, weights
from jaxpost.recipes.sft import SFTConfig

SIZES = {
    "tokenizer": "builtin:words",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 128,
}
CONFIG = {
    "recipe": "sft",
    "name": "toy",
    "mesh": {"devices": 1},
    "model": SIZES,
    "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v", "down"]},
    "data": {
        "train": "builtin:arithmetic?count=120&grades=1",
        "eval": "builtin:arithmetic?count=16&grades=1",
        "max_length": 128,
    },
    "optimizer": {"learning_rate": "3e-2", "schedule": "linear"},
    "train": {
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "log_every": 1,
        "save_every": 3,
        "sample_prompts": 1,
        "sample_tokens": 4,
    },
    "export": {"lora": "both"},
}


def load(folder, *flags, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through the command line, its folder and what it printed."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(["train", str(path), "--run-root", str(root)]) == 0
    return root / "toy"


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_learns_and_exports_twice(finished):
    lines = metrics(finished)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.05
    assert lines[-1]["compile/traces"] == 1
    receipt = json.loads((finished / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    merged = weights.load(finished / "export")
    assert merged.config.lora is None
    fields = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "v_proj", "down_proj"]


@pytest.mark.slow
def test_the_checkpoint_holds_the_adapters_and_their_moments_only(finished):
    hashes, _ = training.checkpoint_hashes(finished / "checkpoints", 6)
    named = {name for name in hashes if "layers" in name or "embed" in name}
    leaves = {name.rsplit("/", 1)[1] for name in named}
    assert leaves == {"lora_a", "lora_b"}
    assert {name.split("/")[0] for name in named} == {"params", "opt_state"}
    assert len(named) == 3 * 2 * 3  # three targets; weights and two moments


@pytest.mark.slow
def test_resuming_is_the_same_run_and_the_export_is_base_plus_adapter(
    finished, tmp_path
):
    config = load(tmp_path, "--export.lora", "adapter")
    whole = recipes.run(config)
    assert not (tmp_path / "toy" / "export").exists()

    class Killed(BaseException):
        pass

    log = training.RunFolder.log_metrics

    def die_after_four(self, line):
        log(self, line)
        if line["step"] == 4:
            raise Killed

    resumed = SFTConfig(**{**vars(config), "name": "again"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.RunFolder, "log_metrics", die_after_four)
        with pytest.raises(Killed):
            recipes.run(resumed)
    again = recipes.run(resumed, resume=True)
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)
    jax.tree.map(np.testing.assert_array_equal, whole.opt_state, again.opt_state)
    # The base is what a run without steps would have started from.
    base = models.Model(whole.frozen, weights.load(finished / "export").config)
    adapted = weights.load_adapter(base, tmp_path / "again" / "adapter")
    exported = weights.load(finished / "export")
    for one, two in zip(
        jax.tree.leaves(models.merge_lora(adapted).params),
        jax.tree.leaves(exported.params),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.slow
def test_another_base_is_refused_on_resume(finished, tmp_path):
    config = load(tmp_path, "--export.enabled", "False", "--train.steps", "3")
    recipes.run(config)
    model = SIZES | {"path": str(finished / "export")}
    model["tokenizer"] = str(finished / "export")
    other = load(
        tmp_path, "--export.enabled", "False", "--train.steps", "4", model=model
    )
    with pytest.raises(
        training.CheckpointError, match="embedding: other values|kernel"
    ):
        recipes.run(other, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantised_base(kind, tmp_path):
    pytest.importorskip("qwix", reason="needs the extra `quant`")
    recipes.run(load(tmp_path, "--lora.quantize", kind))
    lines = metrics(tmp_path / "toy")
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.05
    receipt = json.loads(
        (tmp_path / "toy" / "export" / "export_report.json").read_text()
    )
    assert receipt["max_logit_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"rank": 2, "targets": ["qq"]}, "lora: LoraConfig.targets names 'qq'"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"quantize": "nf4"}, "rank is 0"),
        ({"rnk": 2}, "Did you mean 'rank'"),
    ],
)
def test_bad_settings_are_refused(section, words, tmp_path):
    with pytest.raises(recipes.ConfigError, match=words):
        load(tmp_path, lora=section)
