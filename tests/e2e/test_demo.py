"""`jaxpost demo` at toy size: all its parts, in seconds; not its accuracy."""

import dataclasses
import json

import pytest

from jaxpost import data, weights
from jaxpost.recipes import demo

TOY = demo.DemoConfig(
    name="toy",
    base_steps=6,
    steps=6,
    batch_size=4,
    base_problems=48,
    problems=48,
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


def test_run_folder_is_complete(finished):
    for run in ("base", "sft"):
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "checkpoints"):
            assert (finished.folder / run / name).exists()
    result = json.loads((finished.folder / "result.json").read_text())
    assert set(result["before"]) == {"exact_match"} | {
        f"exact_match/{grade}" for grade in (1, 2, 3, 4)
    }
    assert sum(result["seconds"].values()) > 0
    lines = (finished.folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 4 * TOY.eval_problems


def test_both_runs_learn(finished):
    for run in ("base", "sft"):
        losses = list(demo.eval_losses(finished.folder / run).values())
        assert losses[-1] < losses[0]
    assert list(finished.base_losses) == [0, 1, 2, 3, 4, 5, 6]


def test_base_never_sees_a_worked_answer(finished):
    config = demo.base_config(TOY, finished.folder)
    for row in data.load_rows(config.data.train):
        assert set(row.columns) == {"text"}
        assert "=" not in row.columns["text"]
        assert "#" not in row.columns["text"]


def test_fine_tuning_trains_only_on_answers(finished):
    config = demo.sft_config(TOY, finished.folder)
    tokenizer = data.load_tokenizer(finished.folder / "tokenizer")
    row = next(iter(data.load_rows(config.data.train)))
    example = data.encode_row(row, tokenizer, max_length=TOY.max_length)
    trained = example.tokens[example.loss_mask].tolist()
    assert trained[-1] in tokenizer.eos_ids
    assert tokenizer.decode(trained[:-1]) == row.columns["completion"]


def test_every_problem_fits(finished):
    tokenizer = data.load_tokenizer(finished.folder / "tokenizer")
    for row in data.arithmetic_rows("train", count=400, seed=9, grades=4):
        text = row["prompt"] + row["completion"]
        assert len(tokenizer.encode(text)) + 2 <= demo.DemoConfig().max_length


def test_export_reloads(finished):
    assert finished.same_completion
    assert finished.largest_logit_difference < 1e-5
    assert (finished.folder / "export" / "export_report.json").is_file()
    model = weights.load(finished.folder / "export")
    assert model.param_count() > 0


def test_held_out_problems_are_not_trained_on(finished):
    config = demo.sft_config(TOY, finished.folder)
    trained = {row.columns["completion"] for row in data.load_rows(config.data.train)}
    assert not trained & {item.completion for item in finished.before.judged}
    asked = {item.prompt for item in finished.after.judged}
    assert not asked & {r.columns["prompt"] for r in data.load_rows(config.data.train)}


def test_errors(finished):
    with pytest.raises(FileExistsError, match="choose another --name"):
        demo.make_folder(dataclasses.replace(TOY, run_root=str(finished.folder.parent)))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        dataclasses.replace(TOY, steps=0)
