"""Reward models from a config to an export and back, as a user runs them, toy size."""

import csv
import json

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config

from jaxpost import cli, models, recipes, training, weights
from jaxpost.recipes.reward import RewardConfig

CONFIG = toy_config(
    mesh={"devices": 1},
    data={
        "train": "builtin:arithmetic_pairs?count=60&grades=1&slips=copy&flip=20",
        "eval": "builtin:arithmetic_pairs?count=12&grades=1&slips=copy",
    },
    loss={"name": "r3m", "lam": 0.4},
    lora={"rank": 2, "alpha": 4, "targets": ["q", "down"]},
    optimizer={"learning_rate": "2e-2", "schedule": "linear"},
    train={
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "log_every": 1,
        "save_every": 3,
    },
    export={"lora": "both"},
) | {"recipe": "reward", "centering": 0.01}


def load(folder, *flags, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with adapters through the command line; its folder."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(["train", str(path), "--run-root", str(root)]) == 0
    return root / "toy"


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_logs_and_lists_its_pairs(finished):
    lines = metrics(finished)
    assert lines[-1]["compile/traces"] == 1
    names = {"accuracies", "margins", "chosen", "rejected"}
    assert {f"rewards/{name}" for name in names} <= lines[1].keys()
    assert {"delta/share", "loss/r3m", "loss/centering"} <= lines[1].keys()
    assert {f"eval_rewards/{name}" for name in names} <= lines[-1].keys()
    gap = lines[1]["rewards/chosen"] - lines[1]["rewards/rejected"]
    assert gap == pytest.approx(lines[1]["rewards/margins"], abs=1e-5)
    assert lines[-1]["eval_rewards/margins"] != lines[0]["eval_rewards/margins"]
    with (finished / "pairs" / "pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 72
    held_out = [float(row["margin"]) for row in rows if row["part"] == "held out"]
    assert np.mean(held_out) == pytest.approx(lines[-1]["eval_rewards/margins"], 1e-4)


def test_adapters_and_head_are_trained_and_nothing_else(finished):
    hashes, _ = training.checkpoint_hashes(finished / "checkpoints", 6)
    places = [n for n in hashes if n.startswith("params")]
    assert sum("score" in name for name in places) == 1
    assert all("lora_" in name or "score" in name for name in places)
    assert len(places) == 2 * 2 + 1


def test_both_exports_are_the_trained_model(finished):
    receipt = json.loads((finished / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    exported = weights.load(finished / "export")
    assert exported.config.head == "score"
    fields = json.loads((finished / "export" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["pad_token_id"] is not None
    adapter = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] == ["score"]
    card = (finished / "export" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card


def test_resuming_is_the_same_run_bit_for_bit(finished, tmp_path):
    class Killed(BaseException):
        pass

    log = training.RunFolder.log_metrics

    def die_after_four(self, line):
        log(self, line)
        if line["step"] == 4:
            raise Killed

    config = load(tmp_path, "--report.pairs", "0", "--export.lora", "merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.RunFolder, "log_metrics", die_after_four)
        with pytest.raises(Killed):
            recipes.run(config)
    recipes.run(config, resume=True)
    ours, _ = training.checkpoint_hashes(tmp_path / "toy" / "checkpoints", 6)
    theirs, _ = training.checkpoint_hashes(finished / "checkpoints", 6)
    assert ours == theirs
    again = weights.load(tmp_path / "toy" / "export")
    whole = weights.load(finished / "export")
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


@pytest.mark.slow
def test_training_goes_on_from_an_exported_reward_model(finished, tmp_path):
    """Its head is kept; and the whole model is trained, on several devices."""
    path = str(finished / "export")
    config = load(
        tmp_path,
        model={"path": path},
        lora={},
        mesh={"fsdp": 2, "tensor": 2, "devices": 4},
        loss={"name": "adaptive_scaling", "rho0": 0.1, "tau_min": 0.1, "tau_max": 4.0},
        train=CONFIG["train"] | {"steps": 1, "accumulate": 1},
        centering=0.0,
    )
    state = recipes.run(config)
    before = weights.load(path).params["score"]["kernel"]
    after = np.asarray(state.params["score"]["kernel"])
    assert 0 < np.abs(after - before).max() <= 0.03  # one step of Adam
    lines = metrics(tmp_path / "toy")
    last = metrics(finished)[-1]["eval_rewards/margins"]
    assert lines[0]["eval_rewards/margins"] == pytest.approx(last, abs=1e-4)
    assert "tau/mean" in lines[1]


def rows_file(folder, row):
    good = {"prompt": "a b", "chosen": " c", "rejected": " d"}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, row)))
    return {"train": str(path), "max_length": 32}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "same|identical"),
        ({"prompt": "a", "chosen": "", "rejected": " b"}, "empty"),
    ],
)
def test_pairs_that_say_nothing_are_refused(row, words, tmp_path):
    config = load(tmp_path, data=rows_file(tmp_path, row))
    with pytest.raises(ValueError, match=words):
        recipes.run(config)


@pytest.mark.slow
def test_margins_that_are_not_finite_name_their_pairs(tmp_path, monkeypatch):
    from jaxpost.recipes import reward

    scores = reward.reward_scores

    def spoiled(*args, **options):
        score = scores(*args, **options)

        def infinite(params, batch):
            found = score(params, batch)
            margins = found["margins"].at[1].set(np.inf)
            return {"rewards": found["rewards"], "margins": margins}

        return infinite

    monkeypatch.setattr(reward, "reward_scores", spoiled)
    train = CONFIG["train"] | {"accumulate": 1}
    with pytest.raises(training.NonFiniteError, match=r"not finite of example id \d+"):
        recipes.run(load(tmp_path, train=train))


def test_a_reward_model_is_refused_where_text_is_needed(finished, tmp_path):
    changes = {"model": {"path": str(finished / "export")}, "recipe": "dpo"}
    config = CONFIG | changes
    del config["centering"]
    path = tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump(config))
    loaded = recipes.load_config(str(path), ["--run-root", str(tmp_path)], prog="t")
    with pytest.raises(recipes.ConfigError, match="holds a reward model"):
        recipes.run(loaded)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(recipes.ConfigError, match="centering must be finite"):
        load(tmp_path, centering=-1.0)
    with pytest.raises(recipes.ConfigError, match="loss: r3m needs lam"):
        load(tmp_path, loss={"name": "r3m"})
    assert RewardConfig().loss.name == "bradley_terry"
    assert models.DecoderConfig.head == "vocabulary"
