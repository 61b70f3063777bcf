"""`jaxpost demo` at toy size: its configs and data; slow, all of it."""

import dataclasses
import json

import pytest
import yaml

from jaxpost import data, weights
from jaxpost.recipes import demo

TOY = demo.DemoConfig(
    name="toy",
    base_steps=6,
    steps=6,
    self_rewarding_steps=4,
    policy_steps=2,
    grade=1,
    batch_size=4,
    base_problems=48,
    problems=48,
    prompts=12,
    batch_prompts=4,
    samples=2,
    eval_problems=2,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return demo.run_demo(dataclasses.replace(TOY, run_root=str(root)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with a tokenizer only."""
    found = tmp_path_factory.mktemp("prepared")
    demo.make_tokenizer(TOY, found / "tokenizer")
    return found


MODELS = ["base", "sft", "self_rewarding_ppo", "grpo"]


@pytest.mark.slow
def test_run_folder_is_complete(finished):
    for run in MODELS:
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints"):
            assert (finished.folder / run / name).exists()
    result = json.loads((finished.folder / "result.json").read_text())
    for kind in ("drawn", "greedy"):
        found = result["exact_match"][kind]
        assert list(found) == MODELS
        for name in MODELS:
            assert set(found[name]) == {"exact_match"} | {
                f"exact_match/{grade}" for grade in (1, 2, 3, 4)
            }
    assert sum(result["seconds"].values()) > 0
    lines = (finished.folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(MODELS) * 4 * TOY.eval_problems


@pytest.mark.slow
def test_the_figure_shows_models_and_courses(finished):
    text = (finished.folder / "demo.svg").read_text()
    for name in ("base", "SFT", "Self-Rewarding PPO", "GRPO"):
        assert f">{name}<" in text
    assert text.count("<path") > 16  # a bar for each model and grade, and the courses


@pytest.mark.slow
def test_the_last_two_go_on_from_the_fine_tuned_model_without_answers(finished):
    """Self-Rewarding PPO is given no reward, GRPO right or wrong; of one grade."""
    for run in MODELS[2:]:
        config = yaml.safe_load((finished.folder / run / "config.yaml").read_text())
        assert config["model"]["path"] == str(finished.folder / "sft" / "export")
        prompts = data.load_prompts(
            config["data"]["train"],
            data.load_tokenizer(finished.folder / "tokenizer"),
            max_length=TOY.max_length,
        )
        assert {prompt.columns["grade"] for prompt in prompts} == {TOY.grade}
    lines = (finished.folder / "self_rewarding_ppo/metrics.jsonl").read_text()
    first = next(x for x in map(json.loads, lines.splitlines()) if "loss" in x)
    assert first["reward"] == first["self_reward/mean"]
    assert first["kl/sft"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_base_and_fine_tuning_learn(finished):
    for run in ("base", "sft"):
        losses = list(demo.eval_losses(finished.folder / run).values())
        assert losses[-1] < losses[0]
    assert list(finished.base_losses) == [0, 1, 2, 3, 4, 5, 6]


def test_base_never_sees_a_worked_answer(folder):
    config = demo.base_config(TOY, folder)
    for row in data.load_rows(config.data.train):
        assert set(row.columns) == {"text"}
        assert "=" not in row.columns["text"]
        assert "#" not in row.columns["text"]


def test_fine_tuning_trains_only_on_answers(folder):
    config = demo.sft_config(TOY, folder)
    tokenizer = data.load_tokenizer(folder / "tokenizer")
    row = next(iter(data.load_rows(config.data.train)))
    example = data.encode_row(row, tokenizer, max_length=TOY.max_length)
    trained = example.tokens[example.loss_mask].tolist()
    assert trained[-1] in tokenizer.eos_ids
    assert tokenizer.decode(trained[:-1]) == row.columns["completion"]


def test_every_problem_fits(folder):
    tokenizer = data.load_tokenizer(folder / "tokenizer")
    for row in data.arithmetic_rows("train", count=400, seed=9, grades=4):
        text = row["prompt"] + row["completion"]
        assert len(tokenizer.encode(text)) + 2 <= demo.DemoConfig().max_length


@pytest.mark.slow
def test_export_reloads(finished):
    assert finished.same_completion
    assert finished.largest_logit_difference < 1e-5
    assert (finished.folder / "export" / "export_report.json").is_file()
    model = weights.load(finished.folder / "export")
    assert model.param_count() > 0


def test_held_out_problems_are_not_trained_on(folder):
    asked = {row["prompt"] for row in demo.held_out(TOY)}
    for make in (demo.sft_config, demo.grpo_config, demo.self_rewarding_config):
        config = make(TOY, folder)
        rows = data.load_rows(config.data.train)
        assert not asked & {row.columns["prompt"] for row in rows}


def test_errors(folder):
    again = dataclasses.replace(TOY, run_root=str(folder.parent), name=folder.name)
    with pytest.raises(FileExistsError, match="choose another --name"):
        demo.make_folder(again)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        dataclasses.replace(TOY, steps=0)
    with pytest.raises(ValueError, match="grade must be at most 4, got 5"):
        dataclasses.replace(TOY, grade=5)
