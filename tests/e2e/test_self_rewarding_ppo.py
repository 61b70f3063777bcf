"""PPO recipes from a config to an export, as a user runs them, at toy size."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config
from toy_models import TRAIN, save_pair

from jaxpost import data, recipes, weights
from jaxpost.recipes import ppo, self_rewarding_ppo
from jaxpost.recipes._config import ConfigError
from jaxpost.recipes._frozen import VocabularyMismatchError
from jaxpost.typing import BRANCH

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


def load(folder, folders, *flags, **changes):
    sections = {
        "mesh": {"devices": 1},
        "model": {"path": folders["sft"], "tokenizer": folders["sft"]},
        "data": {"train": TRAIN, "eval": None, "max_length": 100},
        "rollout": {
            "samples": 2,
            "epochs": 2,
            "minibatches": 2,
            "slots": 8,
            "max_new_tokens": NEW_TOKENS,
            "show_every": 2,
        },
        "self_reward": {"base": folders["base"]},
        "optimizer": {"learning_rate": "1e-3", "schedule": "constant"},
        "critic": {"learning_rate": "1e-2"},
        "train": {
            "steps": 9,
            "batch_size": 4,
            "log_every": 1,
            "save_every": 2,
        },
    }
    if "self_reward" in changes and changes["self_reward"] is None:
        del sections["self_reward"], changes["self_reward"]
    merged = {n: v | changes.pop(n, {}) for n, v in sections.items()}
    config = toy_config(**merged) | {"recipe": "self_rewarding_ppo"} | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


def lines_of(folder, name="metrics"):
    text = (folder / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def same(one, two):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_a_run_resumed_within_a_round_is_the_same_bit_for_bit(folders, tmp_path):
    """Rounds are of four steps; what is left of one run ends after its sixth step."""
    config = load(
        tmp_path, folders, "--train.keep-last", "9", export={"enabled": False}
    )
    whole = recipes.run(config)
    shutil.copytree(tmp_path / "toy", tmp_path / "killed")
    for step in (8, 9):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step_{step:08d}")
    killed = dataclasses.replace(config, name="killed")
    same(whole, recipes.run(killed, resume=True))
    one, two = (lines_of(tmp_path / name) for name in ("toy", "killed"))
    timed = ("seconds", "/s", "step_time", "tokens_per_s", "tflops")
    for left, right in zip(one, two, strict=True):
        kept = {k: v for k, v in left.items() if not any(t in k for t in timed)}
        kept.pop("compile/traces", None)
        assert kept.items() <= right.items()
    check_numbers(one[1:])
    samples = lines_of(tmp_path / "toy", "samples")
    assert {line["step"] for line in samples} == {0, 8}
    assert all(line["reward"] != 0.0 for line in samples)
    assert set(whole.params) == {*models_params(folders), "critic"}
    assert np.any(whole.params["critic"]["score"]["kernel"])  # no longer zero


def models_params(folders):
    return weights.load(folders["sft"]).params


def check_numbers(lines):
    first, last = lines[0], lines[-1]
    # The policy starts as the fine-tuned model: no KL to it, and the reward's mean is
    # an estimate of the KL to the base.
    assert first["kl/sft"] == pytest.approx(0.0, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["self_reward/mean"] == pytest.approx(first["kl/base"], abs=1e-5)
    assert first["self_reward/mean"] > 0.0
    for line in lines:
        assert line["reward"] == pytest.approx(line["objective/scores"], rel=1e-6)
        assert line["self_reward/mean"] == pytest.approx(line["reward"], rel=1e-6)
        per_token = line["self_reward/mean"] / line["completions/mean_length"]
        assert line["self_reward/per_token"] == pytest.approx(per_token, rel=1e-6)
        total = line["objective/scores"] + line["objective/non_score_reward"]
        assert line["objective/rlhf_reward"] == pytest.approx(total, rel=1e-6)
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert line["loss/value"] > 0.0
    assert last["compile/traces"] == 1
    assert last["kl/sft"] != first["kl/sft"]
    ratios = [line["val/ratio"] for line in lines]
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)  # the round's first step
    assert ratios[3] != pytest.approx(1.0, abs=1e-5)


def check_export(folder, folders):
    receipt = json.loads((folder / "export" / "export_report.json").read_text())
    assert receipt["max_logit_difference"] <= 1e-4
    exported = weights.load(folder / "export")
    assert exported.config.head == "vocabulary"
    assert set(exported.params) == set(models_params(folders))
    assert "log-ratio" in (folder / "export" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["sft", "base", "none"])
def test_every_reference_and_per_token_rewards(reference, folders, tmp_path):
    """At a temperature, which the reward does not know."""
    config = load(
        tmp_path,
        folders,
        reference=reference,
        kl={"in_reward": 0.0 if reference == "none" else 0.1},
        rollout={"temperature": 1.5},
        self_reward={"place": "token"},
        train={"steps": 5, "accumulate": 2},
        advantage={"bootstrap_truncated": True},
        export={"enabled": reference == "sft"},
    )
    recipes.run(config)
    if reference == "sft":
        check_export(tmp_path / "toy", folders)
    first, last = lines_of(tmp_path / "toy")[1], lines_of(tmp_path / "toy")[-1]
    assert first["kl/sft"] == pytest.approx(0.0, abs=1e-5)
    wanted = {"sft": 0.0, "base": first["kl/base"], "none": 0.0}[reference]
    assert first["objective/kl"] == pytest.approx(wanted, abs=1e-5)
    # Of the raw distributions, so no longer that of the sampler's KL.
    assert first["self_reward/mean"] != pytest.approx(first["kl/base"], abs=1e-3)
    assert ("kl" in last) == (reference != "none")


def test_models_that_make_no_reward_are_pointed_out(folders, tmp_path, caplog):
    """The same model twice, and the two swapped."""
    options = {"train": {"steps": 1}, "export": {"enabled": False}}
    same = {"base": folders["sft"]}
    with caplog.at_level(logging.WARNING, "jaxpost"):
        recipes.run(load(tmp_path, folders, self_reward=same, **options))
    assert "the sft and the base model are the same" in caplog.text
    assert "earn exactly 0" in caplog.text
    line = lines_of(tmp_path / "toy")[-1]
    assert line["self_reward/mean"] == line["self_reward/std"] == 0.0
    caplog.clear()
    swapped = {"base": folders["sft"], "sft": folders["base"]}
    with caplog.at_level(logging.WARNING, "jaxpost"):
        recipes.run(
            load(tmp_path, folders, "--name", "s", self_reward=swapped, **options)
        )
    assert "SELF-REWARD IS NEGATIVE" in caplog.text
    assert lines_of(tmp_path / "s")[-1]["self_reward/mean"] < 0.0


def test_self_rewards_by_hand():
    """Rows of two answers, the second left out of training."""
    batch = data.join_samples([[5, 6]] * 2, [[[7, 8], [9]]] * 2, 64)
    mask = batch["loss_mask"] & (batch["segment_ids"] // BRANCH == 1)
    sft, base = np.full(mask.shape, np.nan), np.full(mask.shape, np.nan)
    sft[mask], base[mask] = np.log([0.5, 0.4] * 2), np.log([0.25, 0.5] * 2)
    batch |= {
        "loss_mask": mask,
        "answer_lengths": np.array([[2.0, 0.0]] * 2, np.float32),
        "old_logps": np.where(mask, sft, 0.0).astype(np.float32),
        "sft_logps": np.where(mask, sft, 0.0).astype(np.float32),
        "base_logps": np.where(mask, base, 0.0).astype(np.float32),
    }
    played = type("Played", (), {"lengths": np.array([[2, 1, 2, 1]])})()
    ratio = np.log(2.0) + np.log(0.8)

    def earned(place, **changes):
        earn = self_rewarding_ppo.earn_self_rewards(place, watch=True, policy="it")
        return earn(played, batch | changes)

    found = earned("end")
    np.testing.assert_allclose(found.rewards, [[ratio, 0.0, ratio, 0.0]], rtol=1e-6)
    assert found.token_rewards is None
    assert found.numbers["self_reward/mean"] == pytest.approx(ratio)
    assert found.numbers["self_reward/per_token"] == pytest.approx(ratio / 2)
    tokens = earned("token").token_rewards
    np.testing.assert_allclose(tokens[mask], np.log([2.0, 0.8] * 2), rtol=1e-6)
    np.testing.assert_array_equal(tokens[~mask], 0.0)
    broken = np.where(mask, np.nan, 0.0)
    with pytest.raises(ValueError, match="answers 0, 1 have a self-reward that is not"):
        earned("end", base_logps=broken)


def test_models_and_settings_that_do_not_fit_are_refused(folders, tmp_path):
    def refused(words, error=ConfigError, **changes):
        with pytest.raises(error, match=words):
            recipes.run(load(tmp_path, folders, **changes))
        shutil.rmtree(tmp_path / "toy", ignore_errors=True)

    refused("self_reward.base must be given", self_reward={"base": None})
    refused("lora.rank is 4", lora={"rank": 4})
    refused("reference is none, but kl has the coefficient 0.05", reference="none")
    other = tmp_path / "other"
    model = weights.load(folders["base"])
    more = data.train_word_tokenizer(["other words than those"])
    weights.save(model, other, tokenizer=more)
    refused(
        r"the base model's \S+other 263, and they differ: id \d+ is ",
        VocabularyMismatchError,
        self_reward={"base": str(other)},
    )
    short = dataclasses.replace(model, config=model.config.replace(max_positions=104))
    weights.save(
        short, tmp_path / "short", tokenizer=data.load_tokenizer(folders["base"])
    )
    refused(
        "80 more is over the base model's 104 positions",
        self_reward={"base": str(tmp_path / "short")},
        data={"max_length": 100},
        rollout={"max_new_tokens": 80},
    )


@pytest.mark.slow
def test_ppo_learns_from_a_function_and_pulls_in_the_loss(folders, tmp_path):
    """Rewarded: tokens of the lower half of the ids; some answers without verdict."""
    seen = []

    def low(completion_ids, answer):
        assert len(answer) == len(completion_ids)
        found = [float(np.mean(np.array(ids) < 190)) for ids in completion_ids]
        seen.append(np.mean(found))
        return [None if n % 8 == 7 else reward for n, reward in enumerate(found)]

    config = load(
        tmp_path,
        folders,
        recipe="ppo",
        self_reward=None,
        kl={"in_loss": 0.01, "in_reward": 0.0},
        rollout={"samples": 4, "temperature": 1.2, "mask_truncated": False},
        policy={"entropy_coefficient": 1e-3},
        optimizer={"learning_rate": "1e-2"},
        critic={"clip": 0.2},
        train={"steps": 48, "batch_size": 16, "save_every": 0},
        export={"enabled": False},
    )
    state = ppo.run(config, rewards={"low": low})
    lines = lines_of(tmp_path / "toy")
    first, last = lines[1], lines[-1]
    assert last["reward"] > first["reward"] + 0.2
    assert last["val/explained_variance"] > first["val/explained_variance"]
    assert last["rewards/low/mean"] == pytest.approx(last["reward"], abs=1e-6)
    assert {"loss/kl", "loss/entropy", "val/clipfrac_avg"} <= last.keys()
    assert last["objective/non_score_reward"] == 0.0
    assert set(state.frozen) == {"reference"}
    assert len(seen) == 48 // 4
