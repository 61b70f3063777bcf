"""The control recipe from its command, and PPO on a reward that is known."""

import json
import pathlib

import jax
import numpy as np
import pytest

from jaxpost import cli
from jaxpost.recipes._control_pendulum import pendulum
from jaxpost.recipes._control_ppo import PPOConfig, init_policy, train_ppo

CONFIG = pathlib.Path(__file__).parents[2] / "configs/control/pendulum_quick.yaml"


@pytest.mark.slow
def test_quick_config_runs_end_to_end(tmp_path, capsys):
    flags = ["--run-root", str(tmp_path), "--ppo.iterations", "4"]
    flags += ["--preferences.rounds", "0", "2", "3"]
    assert cli.main(["train", str(CONFIG), *flags]) == 0
    folder = tmp_path / CONFIG.stem
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert [(c["noise"], c["loss"]) for c in results["cells"]] == [
        ("stochastic", "bradley_terry"),
        ("stochastic", "r3m"),
        ("irrational", "bradley_terry"),
        ("irrational", "r3m"),
    ]
    for cell in results["cells"]:
        for name in ("flipped", "accuracy", "correlation", "returns"):
            assert len(cell[name]) == 2
            assert np.isfinite(cell[name]).all()
        assert all(-2000.0 < value < 0.0 for value in cell["returns"])
    assert results["cells"][2]["flipped"] == [0.25, 0.25]
    table = (folder / "control.md").read_text("utf-8")
    assert table.count("| R³M | lam 0.5 |") == 2
    assert (folder / "control.svg").read_bytes().startswith(b"<?xml")
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert "return/stochastic_1/r3m" in json.loads(lines[0])
    assert "results.json" in capsys.readouterr().out

    assert cli.main(["train", str(CONFIG), *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_ppo_improves_the_true_return():
    """Smaller and shorter than the config: not to the end, but far from chance.

    The returns of 16 untrained episodes have a standard deviation of about 300, their
    mean one of about 75.
    """
    config = PPOConfig(iterations=18, episodes=16, hidden=16)

    def train(key):
        return train_ppo(
            pendulum(),
            lambda seen, torque, true: (true + 5.0) / 4.0,
            config,
            init_policy(jax.random.fold_in(key, 1), config.hidden),
            key,
        )[1]

    curves = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    before, after = curves[:, :2].mean(axis=1), curves[:, -2:].mean(axis=1)
    assert np.all(before < -900.0)
    assert np.all(after > before + 400.0), (before, after)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("data check", "recipe control reads no rows"),
        ("verify-resume", "recipe control saves no checkpoints"),
        ("plan", "forecasts the step of recipe sft only so far, not of control"),
    ],
)
def test_verbs_that_do_not_apply_say_so(verb, words, capsys):
    assert cli.main([*verb.split(), str(CONFIG)]) == 2
    assert words in capsys.readouterr().err
