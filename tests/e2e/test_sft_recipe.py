"""Fine-tuning from a config to an export, as a user runs it, at toy size."""

import json

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config, write_config

from jaxpost import cli, recipes, weights
from jaxpost.recipes.sft import SFTConfig

CONFIG = toy_config(
    mesh={"devices": 1},
    optimizer={"learning_rate": "1e-2", "schedule": "linear"},
    train={
        "steps": 6,
        "batch_size": 4,
        "accumulate": 2,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 3,
        "sample_prompts": 1,
        "sample_tokens": 8,
    },
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), CONFIG)


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """A run through the command line; its folder."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        status = cli.main(["train", str(config_file), "--run-root", str(root)])
    assert status == 0
    return root / "toy"


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_run_folder_is_complete(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["name"] == "toy"
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["seeds"] == {"seed": 0}
    assert any("builtin:arithmetic" in name for name in environment["data"])
    sample = json.loads((finished / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "target"} <= sample.keys()
    assert "####" in sample["target"]


def test_it_learns_and_logs_by_optimizer_step(finished):
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert lines[-1]["eval_loss"] < 0.9 * lines[0]["eval_loss"]
    assert lines[0]["data/bad_rows"] == 0
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens"):
        assert np.isfinite(lines[-1][name])
    assert lines[-1]["compile/traces"] == 1
    assert lines[-1]["tokens/s"] > 0


def test_the_export_reloads_with_a_receipt(finished):
    receipt = json.loads((finished / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    model = weights.load(finished / "export")
    assert model.config.num_layers == 2
    assert "Supervised fine-tuning" in (finished / "export" / "README.md").read_text()


def test_resuming_gives_the_same_run_bit_for_bit(config_file, finished, tmp_path):
    flags = ["--run-root", str(tmp_path), "--export.enabled", "False"]
    config = recipes.load_config(str(config_file), flags, prog="test")
    whole = recipes.run(config)
    resumed = SFTConfig(**{**vars(config), "name": "again"})

    class Killed(BaseException):
        pass

    from jaxpost.training import RunFolder

    log = RunFolder.log_metrics

    def die_after_four(self, line):
        log(self, line)
        if line["step"] == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log_metrics", die_after_four)
        with pytest.raises(Killed):
            recipes.run(resumed)
    again = recipes.run(resumed, resume=True)
    leaves = zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True)
    for left, right in leaves:
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)
    losses = [[m["loss"] for m in metrics(tmp_path / n)[1:]] for n in ("toy", "again")]
    assert losses[0] == losses[1]


def test_an_existing_run_is_not_overwritten(config_file, finished, capsys):
    root = str(finished.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(["train", str(config_file), "--run-root", root]) == 2
    assert "--resume" in capsys.readouterr().err


def test_generate_writes_a_file_that_can_be_continued(finished, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Ivy has {n} apples.", "id": f"p{n}"} for n in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    words = ["generate", str(finished / "export"), "--prompts", str(prompts)]
    words += ["--output", str(out), "--max-new-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(words) == 0
        first = out.read_text()
        assert cli.main(words) == 0  # nothing left to do
    assert out.read_text() == first
    assert {json.loads(line)["id"] for line in first.splitlines()} == {"p0", "p1", "p2"}


def test_data_check_lists_what_is_wrong(config_file, tmp_path, capsys):
    rows = [
        {"prompt": "1 + 1 = ", "completion": "2"},
        {"prompt": "1 + 1 = ", "completion": "2"},
        {"prompt": "1 + 2 = ", "completion": ""},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "check", str(config_file), "--data.train", str(file)]
    status = cli.main([*words, "--data.eval", "None"])
    shown = capsys.readouterr().out
    assert status == 1
    assert "duplicates" in shown
    assert "nothing_supervised" in shown


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_model_is_refused(config_file, finished, tmp_path):
    flags = ["--run-root", str(tmp_path), "--model.path", str(finished / "export")]
    flags += ["--data.train", "builtin:python-stdlib", "--data.eval", "None"]
    config = recipes.load_config(str(config_file), flags, prog="test")
    with pytest.raises(ValueError, match="embedding has only"):
        recipes.run(config)
