"""Real weights, tokenizers and rows through the command line, where present."""

import json
import pathlib

import pytest

from jaxpost import cli, recipes
from jaxpost.recipes.generate import run_generate

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_says_what_it_costs(path):
    config = recipes.load_config(str(path), [], prog="test")
    assert config.name == path.stem
    head = path.read_text("utf-8").split("recipe:")[0]
    assert "Cost:" in head
    assert "Expected:" in head


@pytest.fixture
def stories(shared_data):
    place = shared_data / "weights" / "stories260K"
    if not place.is_dir():
        pytest.skip("real weights not found: stories260K")
    return place


def test_converted_stories_continue_as_the_reference(stories, tmp_path):
    """`jaxpost convert` of the llama2.c file, then `jaxpost generate`."""
    reference = json.loads((stories / "reference.json").read_text("utf-8"))
    source = stories / "stories260K.bin"
    out = tmp_path / "converted"
    assert (
        cli.main(["convert", str(source), str(out), "--tokenizer", str(stories)]) == 0
    )
    answers = tmp_path / "answers.jsonl"
    new_tokens = len(reference["greedy_ids"]) - 1
    run_generate(
        str(out),
        prompt=[""],
        output=str(answers),
        temperature=0.0,
        max_new_tokens=new_tokens,
    )
    (line,) = [json.loads(x) for x in answers.read_text("utf-8").splitlines()]
    assert line["completion"].strip() == reference["greedy_text"].strip()


def metrics(run):
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_stories_learn_real_problems(stories, shared_data, tmp_path):
    """The config as shipped but for its length; resumed; the export reloads."""
    rows = shared_data / "prompts" / "gsm8k_train_2000.jsonl"
    flags = ["--model.path", str(stories), "--data.train", str(rows)]
    flags += ["--run-root", str(tmp_path), "--mesh.devices", "1"]
    flags += ["--train.steps", "40", "--train.eval-every", "20"]
    flags += ["--train.save-every", "20"]
    config = "configs/sft/stories_gsm8k.yaml"
    assert cli.main(["train", config, *flags]) == 0
    lines = [x for x in metrics(tmp_path / "stories_gsm8k") if "eval_loss" in x]
    first, last = lines[0], lines[-1]
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert last["eval_loss"] < last["eval_unigram_loss"]
    assert 200 < last["data/bad_rows/too_long"] < 260
    receipt = tmp_path / "stories_gsm8k" / "export" / "export_report.json"
    assert json.loads(receipt.read_text())["max_logit_difference"] < 1e-4
