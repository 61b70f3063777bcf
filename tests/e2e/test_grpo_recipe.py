"""Group-relative runs from a config to an export, as a user runs them, at toy size."""

import json

import jax
import numpy as np
import pytest
import yaml
from toy_config import toy_config

from jaxpost import data, models, recipes, rewards, training, weights
from jaxpost.recipes import grpo
from jaxpost.recipes._config import ConfigError

CONFIG = toy_config(
    mesh={"devices": 1},
    data={"train": "builtin:arithmetic?count=40&grades=1"},
    rollout={
        "samples": 4,
        "max_new_tokens": 8,
        "epochs": 2,
        "minibatches": 2,
        "answers_per_row": 2,
        "show_every": 1,
        "show_prompts": 1,
    },
    kl={"in_loss": 0.05},
    optimizer={"learning_rate": "3e-2", "schedule": "constant"},
    train={"steps": 8, "batch_size": 4, "log_every": 1, "save_every": 3},
) | {
    "recipe": "grpo",
    "rewards": [
        {"name": "regex", "settings": {"pattern": r"\d"}, "isolate": "none"},
        {"name": "arithmetic", "weight": 0.5},
    ],
}

NAMES = {
    *("reward", "reward_std", "frac_reward_zero_std", "entropy", "kl", "loss/kl"),
    *("rewards/regex/mean", "rewards/arithmetic/std", "completions/mean_length"),
    *("completions/clipped_ratio", "completions/max_terminated_length", "epoch"),
    *("clip_ratio/region_mean", "sampling/importance_sampling_ratio/mean"),
    *("sampling/sampling_logp_difference/max", "rollout/near_draws"),
}


def load(folder, *flags, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return recipes.load_config(str(path), ["--run-root", str(folder), *flags], prog="t")


def lines(folder, name="metrics"):
    text = (folder / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds of four steps; its folder and its last state."""
    root = tmp_path_factory.mktemp("runs")
    return root / "toy", recipes.run(load(root))


def test_it_logs_under_trls_names(finished):
    folder, _ = finished
    found = [line for line in lines(folder) if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, 9))
    assert found[0].keys() >= NAMES, NAMES - found[0].keys()
    # The sampler and the trainer are one function.
    for line in found:
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert line["compile/traces"] <= 3
    # The policy is its own reference at first, and moves away.
    assert abs(found[0]["kl"]) < 1e-6 < found[-1]["kl"]
    assert found[0]["reward"] == found[3]["reward"]  # of one round
    evaluated = [line for line in lines(folder) if "eval_reward" in line]
    assert [line["step"] for line in evaluated] == [0, 8]


def test_samples_are_written_each_round(finished):
    folder, _ = finished
    samples = lines(folder, "samples")
    assert [line["step"] for line in samples] == [0] * 4 + [4] * 4
    parts = samples[0]["rewards"]
    assert samples[0]["reward"] == parts["regex"] + 0.5 * parts["arithmetic"]


def test_the_export_is_the_policy(finished):
    folder, state = finished
    loaded = weights.load(folder / "export")
    for a, b in zip(
        jax.tree.leaves(loaded.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kept", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_resuming_within_a_round_is_the_same_run(finished, tmp_path, kept):
    """Killed after a step in the middle of a round, which the checkpoint holds."""
    folder, wanted = finished
    config = load(tmp_path, "--train.keep-last", "9")
    with pytest.MonkeyPatch.context() as patch:
        real = training.Checkpoints.save

        def save_and_stop(self, step, *args, **kwargs):
            real(self, step, *args, **kwargs)
            self.wait()
            if step == kept:
                raise KeyboardInterrupt

        patch.setattr(training.Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            recipes.run(config)
    found = recipes.run(config, resume=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    timed = ("seconds", "tokens/s", "tokens_per_s", "time", "tflops", "traces")
    for old, new in zip(lines(folder), lines(tmp_path / "toy"), strict=True):
        for name, value in old.items():
            if not any(word in name for word in timed):
                assert new[name] == value, name


@pytest.mark.slow
def test_on_four_devices_it_is_the_same_run(finished, tmp_path):
    """The first round token for token, and its first step; Adam, which divides by the
    gradient's size, makes noise of rounding after that."""
    folder, _ = finished
    mesh = {"data": 2, "fsdp": 1, "tensor": 2, "devices": 4}
    flags = ("--train.steps", "1")
    recipes.run(load(tmp_path, *flags, mesh=mesh, export={"enabled": False}))
    old, new = (lines(f)[1] for f in (folder, tmp_path / "toy"))
    assert new["step"] == 1
    for name in ("reward", "completions/mean_length", "loss", "kl", "grad_norm"):
        assert new[name] == pytest.approx(old[name], rel=1e-4, abs=1e-6), name
    texts = [
        [line["completion"] for line in lines(f, "samples")[:4]]
        for f in (folder, tmp_path / "toy")
    ]
    assert texts[0] == texts[1]


def test_rewards_may_be_functions(tmp_path):
    """A column of the rows comes by name; an answer without verdict is left out."""
    asked = []

    def short(prompts, completions, completion_ids, *, answer, **columns):
        asked.extend(answer)
        given = [None if n % 4 == 0 else -len(c) for n, c in enumerate(completions)]
        return given

    config = load(tmp_path, "--train.steps", "2", export={"enabled": False})
    state = grpo.run(config, rewards={"short": short})
    assert int(state.step) == 2
    assert len(asked) >= 16
    assert all(a.isdigit() for a in asked)
    line = lines(tmp_path / "toy")[-1]
    assert line["rewards/short/no_verdict"] > 0


def test_a_reward_that_fails_is_named(tmp_path):
    def broken(completions, **columns):
        return [0.0]

    with pytest.raises(rewards.RewardError, match=r"'broken' returned 1 values for 16"):
        grpo.run(load(tmp_path), rewards={"broken": broken})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"rollout": CONFIG["rollout"] | {"max_new_tokens": 126}},
            r"the longest prompt has \d+ tokens.*rollout.max_new_tokens 126",
        ),
        (
            {"train": CONFIG["train"] | {"batch_size": 3}},
            "batch_size is 3 prompts.*minibatches 2",
        ),
        (
            {"mesh": {"data": 8}},
            r"microbatch has 2 prompts|do not divide over the 8 devices",
        ),
        (
            {"rewards": [{"name": "arithmetc"}]},
            "Did you mean 'arithmetic'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, changes, match):
    with pytest.raises((ConfigError, ValueError), match=match):
        recipes.run(load(tmp_path, **changes))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    rows = data.arithmetic_rows("train", count=40, grades=1)
    words = data.train_word_tokenizer(r["prompt"] + r["completion"] for r in rows)
    words.save(tmp_path / "words")
    path = tmp_path / "words" / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("eos_token")
    path.write_text(json.dumps(fields))
    model = CONFIG["model"] | {"tokenizer": str(tmp_path / "words")}
    with pytest.raises(ValueError, match=r"words names no end-of-seq.*--data.eos-tok"):
        recipes.run(load(tmp_path, model=model))


@pytest.mark.slow
def test_adapters_alone_are_trained(tmp_path):
    """The base without them is the reference; killed within a round, it goes on bit
    for bit; the export is base plus adapters."""
    changes = {
        "lora": {"rank": 4, "alpha": 8, "targets": ["q", "v", "down"]},
        "export": {"lora": "both"},
    }
    state = recipes.run(load(tmp_path, **changes))
    found = [line for line in lines(tmp_path / "toy") if "loss" in line]
    assert abs(found[0]["kl"]) < 1e-6 < found[-1]["kl"]
    for line in found:
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
    moved = [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(state.params)]
    assert len(moved) == 6  # A and B of three targets, and nothing else
    assert min(moved) > 0.0

    merged = weights.load(tmp_path / "toy" / "export")
    base = models.Model(state.frozen, merged.config)
    adapted = weights.load_adapter(base, tmp_path / "toy" / "adapter")
    for one, two in zip(
        jax.tree.leaves(models.merge_lora(adapted).params),
        jax.tree.leaves(merged.params),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-6)

    class Killed(BaseException):
        pass

    log = training.RunFolder.log_metrics

    def die_after_seven(self, line):
        log(self, line)
        if line["step"] == 7:
            raise Killed

    again = load(tmp_path, "--name", "again", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.RunFolder, "log_metrics", die_after_seven)
        with pytest.raises(Killed):
            recipes.run(again)
    resumed = recipes.run(again, resume=True)
    for one, two in zip(
        jax.tree.leaves(resumed.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_array_equal(one, two)
