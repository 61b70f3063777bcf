"""Preference runs from a config to an export, as a user runs them, at toy size."""

import csv
import json

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config

from jaxpost import cli, losses, recipes, training, weights
from jaxpost.recipes._reference import StaleReferenceError
from jaxpost.recipes.dpo import DPOConfig

CONFIG = toy_config(
    mesh={"devices": 1},
    data={
        "train": "builtin:arithmetic_pairs?count=60&grades=1&slips=copy&flip=30",
        "eval": "builtin:arithmetic_pairs?count=12&grades=1&slips=copy",
    },
    loss={"name": "r3m", "lam": 0.4},
    optimizer={"learning_rate": "1e-2", "schedule": "linear"},
    train={
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "log_every": 1,
        "save_every": 3,
        "sample_prompts": 1,
        "sample_tokens": 4,
    },
) | {"recipe": "dpo", "beta": 0.3}


def load(folder, *flags, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


def named(config, name, **changes):
    return DPOConfig(**{**vars(config), "name": name, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through the command line; its folder."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(["train", str(path), "--run-root", str(root)]) == 0
    return root / "toy"


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_learns_and_logs_under_trls_names(finished):
    lines = metrics(finished)
    first, last = lines[0], lines[-1]
    assert first["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert last["compile/traces"] == 1
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")
    for name in (*names, "rewards/margins", "logps/chosen", "logps/rejected"):
        assert np.isfinite(last[name])
        assert np.isfinite(last[f"eval_{name}"])
    assert last["rewards/chosen"] != 0.0
    assert 0.0 <= last["delta/share"] <= 1.0
    assert "eval_unigram_loss" not in last
    assert last["loss"] == pytest.approx(last["loss/r3m"])


def test_the_export_is_the_policy_alone_and_reloads(finished):
    receipt = json.loads((finished / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    assert set(weights.load(finished / "export").params) >= {"embed", "layers"}
    assert "r3m" in (finished / "export" / "README.md").read_text()
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert "####" in sample["target"]


def test_the_report_lists_every_pair_by_its_id(finished):
    listed = rows(finished / "pairs" / "pairs.csv")
    assert len(listed) == 60 + 12
    assert len({row["example_id"] for row in listed}) == 72
    threshold = np.log(1 / 0.4 - 1)
    for row in listed:
        margin = float(row["chosen_reward"]) - float(row["rejected_reward"])
        assert float(row["margin"]) == pytest.approx(margin, abs=1e-4)
        wanted = max(threshold - float(row["margin"]), 0.0)
        assert float(row["delta"]) == pytest.approx(wanted, abs=1e-5)
    shown = rows(finished / "pairs" / "outliers.csv")
    deltas = [float(row["delta"]) for row in shown]
    assert deltas == sorted(deltas, reverse=True)
    assert deltas[0] == max(float(row["delta"]) for row in listed)
    assert all("####" in row["chosen"] and row["prompt"] for row in shown)
    summary = {row["part"]: row for row in rows(finished / "pairs" / "summary.csv")}
    last = metrics(finished)[-1]
    found = float(summary["held out"]["accuracy"])
    assert found == pytest.approx(last["eval_rewards/accuracies"], abs=1e-4)
    assert (finished / "pairs" / "plot.png").stat().st_size > 1000
    assert "Pairs to look at" in (finished / "pairs" / "report.md").read_text()


def same(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


class Killed(BaseException):
    pass


@pytest.fixture
def die_after_four(monkeypatch):
    log = training.RunFolder.log_metrics

    def die(self, line):
        log(self, line)
        if line["step"] == 4 and self.path.name == "killed":
            raise Killed

    monkeypatch.setattr(training.RunFolder, "log_metrics", die)
    return monkeypatch


@pytest.mark.parametrize(
    "reference", ["live", pytest.param("precomputed", marks=pytest.mark.slow)]
)
def test_resuming_is_the_same_run_bit_for_bit(reference, tmp_path, die_after_four):
    config = load(
        tmp_path,
        "--export.enabled",
        "False",
        "--report.pairs",
        "0",
        "--reference",
        reference,
    )
    whole = recipes.run(config)
    with pytest.raises(Killed):
        recipes.run(named(config, "killed"))
    die_after_four.undo()
    again = recipes.run(named(config, "killed"), resume=True)
    same(whole, again)
    losses = [[m["loss"] for m in metrics(tmp_path / n)[1:]] for n in ("toy", "killed")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "toy" / "pairs").exists()


@pytest.mark.slow
def test_precomputed_columns_give_the_same_run_and_are_refused_when_stale(
    finished, tmp_path
):
    columns = tmp_path / "columns.npz"
    config = load(
        tmp_path,
        "--export.enabled",
        "False",
        "--reference",
        "precomputed",
        "--reference-columns",
        str(columns),
        "--train.sample-prompts",
        "0",
    )
    recipes.run(config)
    for one, two in zip(metrics(finished), metrics(tmp_path / "toy"), strict=True):
        for name in ("rewards/margins", "loss", "eval_loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=2e-5), name
    before = columns.stat().st_mtime_ns
    recipes.run(named(config, "again"))  # read, not computed again
    assert columns.stat().st_mtime_ns == before
    same_lines = zip(
        metrics(tmp_path / "toy"), metrics(tmp_path / "again"), strict=True
    )
    assert all(a.get("loss") == b.get("loss") for a, b in same_lines)

    with pytest.raises(
        StaleReferenceError, match="computed with another model; delete"
    ):
        recipes.run(named(config, "seed", seed=1))
    data = {"train": CONFIG["data"]["train"].replace("=60", "=56")}
    changed = load(
        tmp_path,
        "--export.enabled",
        "False",
        "--reference",
        "precomputed",
        "--reference-columns",
        str(columns),
        "--name",
        "data",
        data=CONFIG["data"] | data,
    )
    with pytest.raises(StaleReferenceError, match="another data"):
        recipes.run(changed)
    with np.load(columns, allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays["ref_chosen_logps"][3] = np.inf
    np.savez(columns, **arrays)
    with pytest.raises(recipes.ConfigError, match=str(arrays["example_id"][3])):
        recipes.run(named(config, "bad"))
    columns.write_bytes(columns.read_bytes()[:100])
    with pytest.raises(recipes.ConfigError, match="not a file of reference columns"):
        recipes.run(named(config, "cut"))


@pytest.mark.slow
def test_adapters_take_their_base_as_reference(tmp_path):
    lora = {"rank": 2, "alpha": 8}
    config = load(tmp_path, "--train.sample-prompts", "0", lora=lora)
    state = recipes.run(config)
    assert set(state.frozen) == {"embed", "final_norm", "layers"}
    lines = metrics(tmp_path / "toy")
    assert lines[0]["eval_rewards/margins"] == 0.0
    assert lines[-1]["rewards/chosen"] != 0.0
    receipt = json.loads(
        (tmp_path / "toy" / "export" / "export_report.json").read_text()
    )
    assert receipt["max_logit_difference"] <= 1e-4


@pytest.mark.slow
def test_a_margin_that_is_not_finite_names_its_pairs(tmp_path, monkeypatch):
    whole = losses.dpo_margins

    def broken(*arguments, **options):
        margins = whole(*arguments, **options)
        return margins.at[1].set(np.nan) if margins.shape[0] == 4 else margins

    monkeypatch.setattr(losses, "dpo_margins", broken)
    config = load(tmp_path, "--train.accumulate", "1", "--data.eval", "None")
    with pytest.raises(training.NonFiniteError, match=r"Step 1: .*example id \d+\.$"):
        recipes.run(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta": 0}, "beta must be positive"),
        ({"beta": -0.1}, "beta must be positive"),
        ({"loss": {"name": "r3m", "lam": 1.0}}, "loss: lam must lie in"),
        (
            {"loss": {"name": "r3m", "lam": 0.5, "label_smoothing": 0.1}},
            "loss: r3m does not read label_smoothing",
        ),
        ({"loss": {"name": "r3m"}}, "loss: r3m needs lam"),
        (
            {
                "loss": {
                    "name": "adaptive_scaling",
                    "rho0": 0.7,
                    "tau_min": 0.1,
                    "tau_max": 1.0,
                }
            },
            "loss: rho0",
        ),
        (
            {
                "loss": {
                    "name": "adaptive_scaling",
                    "rho0": 0.1,
                    "tau_min": 1.0,
                    "tau_max": 0.5,
                }
            },
            "loss: tau_max",
        ),
        ({"loss": {"name": "bradly_terry"}}, "Did you mean 'bradley_terry'"),
        ({"reference": "lora_base"}, "reference is lora_base, but there are no"),
        ({"reference": "live", "lora": {"rank": 2}}, "set reference to lora_base"),
        ({"reference_columns": "x.npz"}, "reference_columns is given"),
        ({"report": {"pairs": -1}}, "report: pairs must be at least 0"),
    ],
)
def test_bad_settings_are_refused_by_their_key(changes, words, tmp_path):
    with pytest.raises(recipes.ConfigError, match=words):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "1 + 1 = ", "chosen": "2", "rejected": "2"}, "row 1: .*the same"),
        ({"prompt": "1 + 1 = ", "chosen": "2", "rejected": " "}, "row 1: .*empty"),
        ({"prompt": "1 + 1 = ", "completion": "2"}, "row 1: has no pair"),
    ],
)
def test_bad_pairs_are_refused_by_their_row(row, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    config = load(tmp_path, "--data.train", str(file), "--data.eval", "None")
    with pytest.raises(ValueError, match=words):
        recipes.run(config)


def test_loss_on_is_not_read(tmp_path):
    with pytest.raises(recipes.ConfigError, match=r"data\.loss_on"):
        recipes.run(load(tmp_path, "--data.loss-on", "completion"))


def test_a_plan_would_be_wrong_and_is_refused(tmp_path):
    from jaxpost.recipes import plan

    with pytest.raises(recipes.ConfigError, match="recipe sft only so far, not of dpo"):
        plan.plan(load(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("hh_rlhf_harmless_base_test_part1", {}),
        ("ultrafeedback_train_500", {}),
        ("dpo_en_demo_300", {"format": "sharegpt"}),
    ],
)
def test_real_pairs_with_real_weights(shared_data, file, options, tmp_path):
    """hh-rlhf, UltraFeedback and ShareGPT rows; resumed once; exported; reloaded."""
    stories = shared_data / "weights" / "stories260K"
    path = shared_data / "preferences" / f"{file}.jsonl.gz"
    if not stories.is_dir() or not path.is_file():
        pytest.skip(f"real data not found: {file}")
    data = {
        "train": str(path),
        "eval_rows": 8,
        "max_rows": 80,
        "max_length": 512,  # in pieces of 512: many prompts alone are longer
        "on_too_long": "truncate",
        "on_bad_row": "skip",
        "chat_template": "plain",
    } | options
    changes = {"data": data, "model": {"path": str(stories)}}
    flags = ("--train.sample-prompts", "0", "--optimizer.learning-rate", "1e-3")
    recipes.run(load(tmp_path, *flags, "--train.steps", "3", **changes))
    recipes.run(load(tmp_path, *flags, **changes), resume=True)
    lines = metrics(tmp_path / "toy")
    assert lines[-1]["step"] == 6
    assert lines[-1]["rewards/chosen"] != 0.0
    assert np.isfinite(lines[-1]["eval_rewards/accuracies"])
    assert weights.load(tmp_path / "toy" / "export").config.num_layers == 5
