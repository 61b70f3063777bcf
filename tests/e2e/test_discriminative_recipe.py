"""Discriminative fine-tuning from a config to an export, as a user runs it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config, write_config

from jaxpost import cli, recipes, training, weights
from jaxpost.recipes import _answer_scores
from jaxpost.recipes._reference import StaleReferenceError
from jaxpost.recipes.discriminative import DiscriminativeConfig
from jaxpost.recipes.negatives import NegativesConfig, run_negatives

ROOT = pathlib.Path(__file__).parents[2]
ROWS = "builtin:arithmetic_negatives?grades=1&slips=copy"
CONFIG = toy_config(
    mesh={"devices": 1},
    model={"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
    negatives={"per_prompt": 2},
    data={
        "train": f"{ROWS}&count=20&negatives=4",
        "eval": None,
        "eval_rows": 4,
        "max_length": 96,
    },
    optimizer={"learning_rate": "1e-2", "schedule": "cosine", "warmup_steps": 2},
    train={
        "epochs": 2,
        "batch_size": 4,
        "log_every": 1,
        "save_every": 3,
        "sample_prompts": 0,
    },
) | {"recipe": "discriminative", "p0": "sampling_prompt"}
QUICK = ("--export.enabled", "False")


def load(folder, *flags, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


def named(config, name, **changes):
    return DiscriminativeConfig(**{**vars(config), "name": name, **changes})


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through the command line; its folder."""
    root = tmp_path_factory.mktemp("runs")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        flags = ["--run-root", str(root), *QUICK]
        assert cli.main(["train", str(path), *flags]) == 0
    return root / "toy"


def test_it_trains_and_logs_what_it_remembers(finished):
    lines = [line for line in metrics(finished) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    visited = [line["log_u/visited"] for line in lines]
    assert visited == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/discriminative"])
        assert 0.0 <= line["weights/mean"] <= line["weights/max"] <= 2 / 0.85 + 1e-5
        for name in ("log_u/mean", "objective", "logps/positive", "logps/negative"):
            assert np.isfinite(line[name])
    assert lines[-1]["logps/positive"] > lines[0]["logps/positive"] + 1.0
    last = metrics(finished)[-1]
    assert np.isfinite(last["eval_loss"])
    assert np.isfinite(last["eval_logps/negative"])
    assert last["compile/traces"] == 1
    assert last["learning_rate"] < max(line["learning_rate"] for line in lines)


@pytest.mark.slow
def test_the_export_reloads(tmp_path):
    recipes.run(load(tmp_path, "--train.sample-prompts", "1"))
    folder = tmp_path / "toy"
    receipt = json.loads((folder / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    assert "dft" in (folder / "export" / "README.md").read_text()
    assert set(weights.load(folder / "export").params) >= {"embed", "layers"}
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert "####" in sample["target"]


class Killed(BaseException):
    pass


def killed_at(step):
    """`RunFolder.log_metrics` that dies once it has logged a step."""
    log = training.RunFolder.log_metrics

    def die(self, line):
        log(self, line)
        if line["step"] == step:
            raise Killed

    return die


def test_resuming_is_the_same_run_bit_for_bit(finished, tmp_path, monkeypatch):
    """Killed in the second epoch after a save in the first; other columns follow."""
    config = load(tmp_path, *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(training.RunFolder, "log_metrics", killed_at(5))
        with pytest.raises(Killed):
            recipes.run(config)
    state = recipes.run(config, resume=True)
    wanted, place = training.checkpoint_hashes(finished / "checkpoints", 8)
    found, again = training.checkpoint_hashes(tmp_path / "toy" / "checkpoints", 8)
    assert {"method_state/log_u", "method_state/visits"} <= set(wanted)
    assert found == wanted
    assert again == place
    table, visits = state.method_state["log_u"], state.method_state["visits"]
    assert table.dtype == "float32"
    assert (visits[:16] == 2).all()
    assert not np.any(visits[16:])  # what fills up the table
    assert not np.any(table[16:])
    assert np.all(table[:16])
    without_memory(tmp_path / "toy" / "checkpoints", state)
    with pytest.raises(training.CheckpointError, match=r"method_state/log_u: not in"):
        recipes.run(config, resume=True)


def without_memory(folder, state):
    """Leaves a checkpoint as one of another method would be."""
    shutil.rmtree(folder)
    with training.Checkpoints(folder) as checkpoints:
        checkpoints.save(8, state._replace(method_state=None))


def odd_rows(folder, *flags):
    """A config of rows with a repeated negative and one that is right."""
    file = folder / "rows.jsonl"
    rows = [
        {"prompt": f"{n} + 1 = ", "completion": str(n + 1), "negatives": wrong}
        for n, wrong in ((1, ["3", "3"]), (2, ["5", "3"]), (3, ["5", "6"]))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"train": str(file), "eval": None, "max_length": 96}
    train = CONFIG["train"] | {"epochs": 1, "batch_size": 3}
    chosen = {"data": own, "train": train, "optimizer": {"learning_rate": 1e-2}}
    return load(folder, *QUICK, *flags, **chosen)


DFT2 = ("--variant", "dft2", "--p0", "train_prompt", "--log-u.initial", "-100")


def test_a_right_negative_and_a_missing_probability_are_refused_by_row(tmp_path):
    refusing = odd_rows(tmp_path, *DFT2, "--negatives.equal", "refuse")
    with pytest.raises(recipes.ConfigError, match=r"row 2\); remove them, or set"):
        recipes.run(refusing)
    without = odd_rows(tmp_path, "--name", "p0")
    with pytest.raises(
        recipes.ConfigError, match=r"row 1 has no column negative_logps"
    ):
        recipes.run(without)


@pytest.mark.slow
def test_odd_negatives_are_kept_or_dropped(tmp_path, caplog):
    kept = recipes.run(odd_rows(tmp_path, *DFT2))
    words = [record.getMessage() for record in caplog.records]
    assert any("1 of 6 training negatives equal the right answer" in w for w in words)
    assert any("row 2): negatives.equal is keep" in w for w in words)
    assert any("1 of 6 training negatives repeat another" in w for w in words)
    drop = ("--negatives.equal", "drop", "--negatives.repeated", "drop")
    dropped = recipes.run(odd_rows(tmp_path, *DFT2, *drop, "--name", "dropped"))
    before, after = (run.method_state["log_u"][:3] for run in (kept, dropped))
    # Of the first row one of two equal negatives went, which leaves their mean.
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5)
    assert after[1] != before[1]
    np.testing.assert_allclose(after[2], before[2], rtol=1e-5)


def test_the_data_check_looks_at_the_negatives_that_training_takes(tmp_path, capsys):
    config = odd_rows(tmp_path, *DFT2)
    assert recipes.check_data(config) == 0
    words = capsys.readouterr().out
    assert "negative_equal" in words
    assert "negative_repeated" in words
    changes = [("--train.epochs", "9"), ("--negatives.per-prompt", "9")]
    for number, flags in enumerate(changes):
        more = odd_rows(tmp_path, *DFT2, *flags, "--name", str(number))
        assert recipes.check_data(more) == 1
        assert "few_negatives" in capsys.readouterr().out


def test_too_few_columns_are_refused_with_both_numbers(tmp_path):
    config = load(tmp_path, *QUICK, "--train.epochs", "3")
    with pytest.raises(
        recipes.ConfigError,
        match=r"per_prompt 2 x 3 epochs are 6 columns of negatives, but .* has 4",
    ):
        recipes.run(config)
    by_steps = load(tmp_path, *QUICK, "--train.steps", "9", "--name", "steps")
    with pytest.raises(recipes.ConfigError, match="2 x 3 epochs are 6 columns"):
        recipes.run(by_steps)
    one = load(
        tmp_path,
        *QUICK,
        "--negatives.per-prompt",
        "5",
        "--name",
        "one",
        "--negatives.sample",
        "False",
    )
    with pytest.raises(recipes.ConfigError, match="5 x 1 epochs are 5 columns"):
        recipes.run(one)


@pytest.mark.slow
def test_a_number_that_is_not_finite_names_its_rows(tmp_path, monkeypatch):
    whole = _answer_scores.discriminative_scores

    def broken(*arguments, **options):
        score = whole(*arguments, **options)

        def scores(params, batch):
            found = score(params, batch)
            if found["logps"].shape[0] == 4:
                found["ref_neg_logps"] = found["ref_neg_logps"].at[1].set(-np.inf)
            return found

        return scores

    monkeypatch.setattr(_answer_scores, "discriminative_scores", broken)
    config = load(tmp_path, *QUICK, "--data.eval-rows", "0")
    with pytest.raises(
        training.NonFiniteError,
        match=r"Step 1: .*Log-probs not finite of example id \d",
    ):
        recipes.run(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tau": 0}, "tau must be positive"),
        ({"gamma": 0.0}, r"gamma must lie in \(0, 1\]"),
        ({"gamma": 1.5}, r"gamma must lie in \(0, 1\]"),
        ({"log_u": {"initial": float("inf")}}, "initial must be finite"),
        ({"variant": "dft3"}, "variant must be one of dft, dft2"),
        ({"variant": "dft2"}, "leave out p0 and reference"),
        (
            {"variant": "dft2", "p0": "train_prompt", "reference": "live"},
            "leave out p0 and reference",
        ),
        ({"reference": "live"}, "reference live would not be used"),
        (
            {"p0": "train_prompt", "reference": "none"},
            "variant dft needs the log-probs of the negatives",
        ),
        (
            {"p0": "train_prompt", "reference": "lora_base"},
            "reference is lora_base, but there are no adapters",
        ),
        ({"reference_columns": "x.npz"}, "reference_columns is given"),
        ({"negatives": {"per_prompt": 0}}, "per_prompt must be at least 1"),
        ({"negatives": {"equal": "remove"}}, "equal must be one of"),
    ],
)
def test_bad_settings_are_refused_by_their_key(changes, words, tmp_path):
    with pytest.raises(recipes.ConfigError, match=words):
        load(tmp_path, **changes)


@pytest.mark.slow
def test_a_live_reference_and_its_columns_give_the_same_run(tmp_path):
    columns = tmp_path / "columns.npz"
    flags = (*QUICK, "--p0", "train_prompt")
    live = recipes.run(load(tmp_path, *flags, "--name", "live"))
    stored = ("--reference", "precomputed", "--reference-columns", str(columns))
    config = load(tmp_path, *flags, *stored)
    found = recipes.run(config)
    np.testing.assert_allclose(
        found.method_state["log_u"], live.method_state["log_u"], atol=1e-4
    )
    for one, two in zip(
        metrics(tmp_path / "live"), metrics(tmp_path / "toy"), strict=True
    ):
        for name in ("loss", "eval_loss", "objective"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4), name
    again = recipes.run(named(config, "again"))  # read, not computed again
    np.testing.assert_array_equal(
        again.method_state["log_u"], found.method_state["log_u"]
    )
    with np.load(columns, allow_pickle=False) as arrays:
        assert arrays["ref_logps"].shape == (16 + 4, 5)
    with pytest.raises(StaleReferenceError, match="computed with another model"):
        recipes.run(named(config, "seed", seed=1))
    data = CONFIG["data"] | {"train": f"{ROWS}&count=20&negatives=5&seed=2"}
    other = load(tmp_path, *flags, *stored, "--name", "data", data=data)
    with pytest.raises(StaleReferenceError, match="another data"):
        recipes.run(other)


@pytest.mark.slow
def test_the_table_is_the_same_on_a_mesh_whole_or_split(tmp_path):
    """Gradient descent: Adam would amplify the rounding of sums over devices."""
    flags = (*QUICK, "--optimizer.name", "sgd")
    one = recipes.run(load(tmp_path, *flags, "--name", "one"))
    mesh = ("--mesh.devices", "8", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    for placement, size in (("replicated", 256), ("sharded", 64)):
        chosen = ("--log-u.placement", placement, "--name", placement)
        state = recipes.run(load(tmp_path, *flags, *mesh, *chosen, mesh={}))
        table = state.method_state["log_u"]
        assert table.sharding.shard_shape((256,)) == (size,)
        np.testing.assert_allclose(table, one.method_state["log_u"], atol=1e-4)
        np.testing.assert_array_equal(
            state.method_state["visits"], one.method_state["visits"]
        )


@pytest.mark.slow
def test_adapters_take_their_base_as_p0(tmp_path):
    flags = (*QUICK, "--p0", "train_prompt", "--train.epochs", "1")
    lora = {"rank": 2, "alpha": 8}
    state = recipes.run(load(tmp_path, *flags, lora=lora))
    assert set(state.frozen) == {"embed", "final_norm", "layers"}
    first = metrics(tmp_path / "toy")[1]
    # The first step's policy is the base: d = 0, so u stays 1 and every weight is 1.
    assert first["log_u/mean"] == pytest.approx(0.0, abs=1e-5)
    assert first["weights/mean"] == pytest.approx(1.0, abs=1e-5)
    assert all(jax.numpy.isfinite(state.method_state["log_u"]))


def train(folder, processes):
    """The run over so many processes of four devices in all: lines and table."""
    root = folder / f"{processes}"
    root.mkdir()
    config = CONFIG | {"mesh": {"data": -1, "fsdp": 2}, "name": "toy"}
    config |= {"log_u": {"placement": "sharded"}}
    config["optimizer"] = {"name": "sgd", "learning_rate": 1e-2, "schedule": "constant"}
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "several_processes.py"),
            *(str(processes), write_config(root, config), "--run-root", root),
            *("--export.enabled", "False"),
        ],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    with training.Checkpoints(root / "toy" / "checkpoints") as checkpoints:
        leaves = checkpoints._info(8)["leaves"]
        like = {
            name: np.empty(shape, "uint32" if "key" in dtype else dtype)
            for name, (shape, dtype) in leaves.items()
            if "key" not in dtype
        }
        like |= {n: jax.random.key(0) for n, (_, d) in leaves.items() if "key" in d}
        state = checkpoints.restore(like, step=8).state
    return metrics(root / "toy"), state


@pytest.mark.slow
def test_two_processes_are_the_same_run(tmp_path):
    """An example that only one of them saw has its average on both."""
    one, wanted = train(tmp_path, 1)
    two, found = train(tmp_path, 2)
    for left, right in zip(one, two, strict=True):
        for name in ("loss", "eval_loss", "log_u/mean", "log_u/visited"):
            if name in left:
                assert right[name] == pytest.approx(left[name], rel=1e-4), name
    np.testing.assert_allclose(
        found["method_state/log_u"], wanted["method_state/log_u"], atol=1e-4
    )
    visits = found["method_state/visits"]
    np.testing.assert_array_equal(visits, wanted["method_state/visits"])
    assert visits.sum() == 2 * 16


@pytest.mark.slow
def test_real_problems_with_sampled_negatives(shared_data, tmp_path, monkeypatch):
    """GSM8K, negatives of stories260K by the command; killed once and resumed."""
    stories = shared_data / "weights" / "stories260K"
    problems = shared_data / "prompts" / "gsm8k_train_2000.jsonl"
    if not stories.is_dir() or not problems.is_file():
        pytest.skip("real data not found: stories260K or gsm8k_train_2000.jsonl")
    file = tmp_path / "negatives.jsonl"
    sampling = NegativesConfig(
        model=str(stories),
        data=str(problems),
        out=str(file),
        columns={"prompt": "question", "completion": "answer"},
        prompt_suffix="\n",
        max_new_tokens=24,
        limit=24,
        on_bad_row="skip",
        progress="none",
    )
    run_negatives(sampling)
    rows = {"train": str(file), "eval": None, "eval_rows": 0, "max_length": 512}
    rows |= {"on_bad_row": "skip"}
    changes = {"model": {"path": str(stories)}, "data": rows}
    rate = ("--optimizer.learning-rate", "1e-4", "--log-u.initial", "0")
    for p0 in ("sampling_prompt", "train_prompt"):
        flags = (*QUICK, *rate, "--p0", p0)
        whole = recipes.run(load(tmp_path, *flags, "--name", p0, **changes))
        config = load(tmp_path, *flags, "--name", f"{p0}-cut", **changes)
        with monkeypatch.context() as patch:
            patch.setattr(training.RunFolder, "log_metrics", killed_at(4))
            with pytest.raises(Killed):
                recipes.run(config)
        again = recipes.run(config, resume=True)
        for name, table in whole.method_state.items():
            np.testing.assert_array_equal(again.method_state[name], table)
        lines = [line for line in metrics(tmp_path / p0) if "loss" in line]
        assert np.isfinite([line["loss"] for line in lines]).all()
        if p0 == "train_prompt":  # at the first step the policy is the reference
            assert lines[0]["log_u/mean"] == pytest.approx(0.0, abs=1e-4)
