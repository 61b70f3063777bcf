"""Distillation from a config to an export, as a user runs it, at toy size."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config

from jaxpost import cli, data, models, recipes, training, weights
from jaxpost.recipes import _distill_cache
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._distill_cache import StaleTeacherError
from jaxpost.recipes._distill_teacher import VocabularyMismatchError

SMALL = {
    "family": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
}
DATA = {
    "train": "builtin:arithmetic?count=60&grades=1",
    "eval": "builtin:arithmetic?count=12&grades=1",
    "max_length": 128,
}
TRAIN = {
    "steps": 6,
    "batch_size": 4,
    "log_every": 1,
    "sample_prompts": 0,
}
RATE = {"learning_rate": "1e-2", "schedule": "linear"}


def config_with(teacher, **sections):
    merged = {
        "mesh": {"devices": 1},
        "model": SMALL,
        "data": DATA,
        "train": TRAIN,
        "optimizer": RATE,
    }
    merged = {
        name: merged.get(name, {}) | sections.pop(name, {})
        for name in (*merged, "on_policy", "teacher", "export")
    }
    merged["teacher"] |= teacher
    config = toy_config(**merged) | {"recipe": "distill"} | sections
    return config


def load(folder, config, *flags):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a model that says much the same everywhere, as its embeddings have
    a part in common, which is learnt in a few steps; and the tokenizer of both."""
    folder = tmp_path_factory.mktemp("teacher")
    texts = [
        text
        for source in (DATA["train"], DATA["eval"])
        for row in data.load_rows(source)
        for text in (row.columns["prompt"], row.columns["completion"])
    ]
    tokenizer = data.train_word_tokenizer(texts)
    config = models.DecoderConfig(
        **SMALL,
        vocab_size=tokenizer.vocab_size,
        head_dim=8,
        max_positions=128,
        tie_embeddings=False,
    )
    model = models.build(config, jax.random.key(5))
    changed = {
        "embed": {"embedding": model.params["embed"]["embedding"] + 1.0},
        "head": {"kernel": 6.0 * model.params["head"]["kernel"]},
    }
    model = model.replace(params=model.params | changed)
    weights.save(model, folder, tokenizer=tokenizer)
    return str(folder)


def run(folder, teacher, *flags, source=None, **sections):
    """A run; its folder."""
    sections["model"] = {"tokenizer": teacher} | sections.get("model", {})
    section = {"path": teacher} if source is None else source
    config = load(folder, config_with(section, **sections), *flags)
    recipes.run(config)
    return folder / config.name


def metrics(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_live_teacher_is_come_closer_to_on_held_out_rows(teacher, tmp_path):
    """Through the command line."""
    config = config_with(
        {"path": teacher},
        alpha=0.3,
        temperature=1.5,
        train={"steps": 20},
        export={"enabled": False},
    )
    config["model"]["tokenizer"] = teacher
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
        assert cli.main(["train", str(path), "--run-root", str(tmp_path)]) == 0
    lines = metrics(tmp_path / "toy")
    first, last = lines[0], lines[-1]
    assert last["eval_loss/divergence"] < 0.8 * first["eval_loss/divergence"]
    # Logged as it is; in the loss times the temperature's square.
    assert last["loss"] == pytest.approx(2.25 * last["loss/divergence"], rel=1e-5)
    assert last["compile/traces"] == 1


@pytest.mark.slow
def test_a_cache_is_made_once_and_refused_when_stale(teacher, tmp_path):
    """And trains without the teacher; where it does not fit, the message says why."""
    source = {"path": teacher, "mode": "cached", "top_k": 4}
    source["cache"] = str(tmp_path / "cache.npz")
    made = run(tmp_path, teacher, "--name", "made", source=source)
    lines = metrics(made)
    assert lines[-1]["eval_loss/divergence"] < lines[0]["eval_loss/divergence"]
    assert 0.0 < lines[-1]["teacher/tail"] < 1.0
    stored = (tmp_path / "cache.npz").read_bytes()
    alone = source | {"path": None}
    packed = {"packing": False}
    read = run(tmp_path, teacher, "--name", "read", source=alone)
    for old, new in zip(lines, metrics(read), strict=True):
        assert old["loss/divergence"] == new["loss/divergence"] if "loss" in old else 1
    assert (tmp_path / "cache.npz").read_bytes() == stored

    def refused(name, match, error=StaleTeacherError, source=source, **sections):
        with pytest.raises(error, match=match):
            run(tmp_path, teacher, "--name", name, source=source, **sections)

    refused("k", "another top_k; delete", source=alone | {"top_k": 5})
    refused("t", "another temperature", source=alone, temperature=2.0)
    refused(
        "d",
        r"other data: \d+ of \d+ examples are not in it",
        source=alone,
        data=packed | {"train": "builtin:arithmetic?count=66&grades=1"},
    )
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    model = weights.load(other)
    moved = jax.tree.map(lambda x: x + 1e-3, model.params)
    weights.save(
        model.replace(params=moved), other, tokenizer=data.load_tokenizer(other)
    )
    refused("o", "another teacher; delete", source=source | {"path": str(other)})
    (tmp_path / "cache.npz").write_bytes(stored[:100])
    refused("b", "not a teacher's cache", error=ConfigError)
    (tmp_path / "cache.npz").unlink()
    refused("m", "no such cache of a teacher", error=ConfigError, source=alone)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "cached", "on_policy"])
def test_a_killed_run_goes_on_bit_for_bit(kind, teacher, tmp_path, monkeypatch):
    """Also where answers are sampled: step 6's are drawn from the resumed weights."""
    sections = {"train": {"save_every": 3}, "data": {"packing": False}}
    source = {"path": teacher, "top_k": 4}
    if kind == "cached":
        source["mode"] = "cached"
    if kind == "on_policy":
        source, sections["on_policy"] = (
            {"path": teacher},
            {
                "every": 2,
                "max_new_tokens": 8,
            },
        )
    sections["model"] = {"tokenizer": teacher}
    config = load(tmp_path, config_with(source, **sections))
    whole = recipes.run(dataclasses.replace(config, name="whole"))
    log = training.RunFolder.log_metrics

    def die(self, line):
        log(self, line)
        if line["step"] == 4 and self.path.name == "killed":
            raise Killed

    monkeypatch.setattr(training.RunFolder, "log_metrics", die)
    killed = dataclasses.replace(config, name="killed")
    with pytest.raises(Killed):
        recipes.run(killed)
    monkeypatch.undo()
    resumed = recipes.run(killed, resume=True)
    for one, two in zip(
        jax.tree.leaves((whole.params, whole.opt_state)),
        jax.tree.leaves((resumed.params, resumed.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    lines = [metrics(tmp_path / name)[-1] for name in ("whole", "killed")]
    for name in ("loss", "grad_norm", "eval_loss"):
        assert lines[0][name] == lines[1][name]


@pytest.mark.slow
def test_on_policy_steps_train_on_the_students_own_answers(teacher, tmp_path):
    """Every second step; its rows hold the data's prompts and sampled answers."""
    seen = []
    original = recipes._on_policy.OnPolicy.__call__

    def watch(self, number, state, batch):
        made = original(self, number, state, batch)
        seen.append((number, batch, made, state))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes._on_policy.OnPolicy, "__call__", watch)
        folder = run(
            tmp_path,
            teacher,
            data={"packing": False},
            on_policy={"every": 2, "max_new_tokens": 8},
            train={"accumulate": 2},
        )
    assert [number for number, *_ in seen] == [1, 2, 3, 4, 5, 6]
    for number, batch, made, _ in seen:
        if number % 2:
            assert made is batch
            continue
        assert made["tokens"].shape == (4, 128)

        for row in range(4):
            start = int(batch["loss_mask"][row].argmax())
            np.testing.assert_array_equal(
                made["tokens"][row, :start], batch["tokens"][row, :start]
            )
            trained = made["loss_mask"][row]
            assert 1 <= trained.sum() <= 8
            np.testing.assert_array_equal(
                np.flatnonzero(trained), start + np.arange(trained.sum())
            )
            length = start + trained.sum()
            assert made["segment_ids"][row].sum() == length
    lines = metrics(folder)
    assert lines[-1]["eval_loss/divergence"] < lines[0]["eval_loss/divergence"]


@pytest.mark.slow
def test_what_does_not_fit_is_refused_by_name(teacher, tmp_path):
    with pytest.raises(ConfigError, match="teacher.path must be given"):
        run(tmp_path, teacher, "--name", "none", source={})
    with pytest.raises(VocabularyMismatchError, match=r"and they differ: id \d+ is "):
        run(
            tmp_path,
            teacher,
            "--name",
            "v",
            model={"tokenizer": "builtin:words"},
            data={
                "train": "builtin:arithmetic?count=30&grades=3",
            },
        )
    on_policy = {"every": 1, "max_new_tokens": 8}
    with pytest.raises(ConfigError, match="set data.packing to false"):
        run(tmp_path, teacher, "--name", "p", on_policy=on_policy)
    with pytest.raises(
        ConfigError, match=r"longest prompt has \d+ tokens, .* 120 more"
    ):
        run(
            tmp_path,
            teacher,
            "--name",
            "l",
            on_policy=on_policy | {"max_new_tokens": 120},
            data={"packing": False},
        )


@pytest.mark.slow
def test_a_cache_holds_what_the_live_teacher_says(teacher, tmp_path):
    """The same run either way, packed or not, on one device or eight."""
    lines = []
    for name, source, sections in (
        ("live", {}, {}),
        ("cached", {"mode": "cached"}, {}),
        ("eight", {}, {"mesh": {"devices": 8, "data": 1, "fsdp": 4, "tensor": 2}}),
        (
            "eight-cached",
            {"mode": "cached"},
            {"mesh": {"devices": 8, "data": 1, "fsdp": 4, "tensor": 2}},
        ),
    ):
        folder = run(
            tmp_path,
            teacher,
            "--name",
            name,
            source={"path": teacher, "top_k": 4} | source,
            optimizer={"name": "sgd"},
            **sections,
        )
        lines.append(metrics(folder))
    for found in lines[1:]:
        for one, two in zip(lines[0], found, strict=True):
            for key in ("loss/divergence", "eval_loss/divergence", "teacher/tail"):
                if key in one:
                    assert two[key] == pytest.approx(one[key], rel=1e-4)
    file = tmp_path / "cached" / "teacher.npz"
    with np.load(file) as stored:
        mass = np.exp(stored["logps"]).sum(axis=1) + np.exp(stored["tail"])
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)
        assert file.name == _distill_cache.FILE


@pytest.mark.slow
def test_adapters_and_bfloat16_learn_from_a_teacher(teacher, tmp_path):
    """With a base beside the teacher, both frozen; in low precision; the exports are
    the student alone."""
    for name, sections in (
        ("lora", {"lora": {"rank": 4}}),
        ("low", {"model": {"compute_dtype": "bfloat16"}}),
    ):
        source = {"path": teacher, "top_k": 4, "support": "student"}
        folder = run(
            tmp_path, teacher, "--name", name, source=source, alpha=0.5, **sections
        )
        lines = metrics(folder)
        assert lines[-1]["eval_loss/divergence"] < lines[0]["eval_loss/divergence"]
        assert json.loads((folder / "export" / "export_report.json").read_text())
        assert "teacher" not in weights.load(folder / "export").params
