"""`jaxpost score` on tiny models: its numbers, its file, its layouts, its refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import cli, data, models, weights
from jaxpost.recipes import score
from jaxpost.recipes.score import ScoreConfig, run_score

WORDS = ["red", "green", "blue", "cold", "warm", "tall", "small", "old"]
QUIET = {"progress": "none"}


def text(rng, count):
    return " ".join(rng.choice(WORDS, count))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, `policy` and `start`, and rows in each layout."""
    folder = tmp_path_factory.mktemp("score")
    tokenizer = data.train_word_tokenizer([" ".join(WORDS)])
    config = models.DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=256,
    )
    for seed, name in enumerate(("policy", "start")):
        model = models.build(config, jax.random.key(seed))
        weights.save(model, folder / name, tokenizer=tokenizer)
    judge = models.add_score_head(model, jax.random.key(2))
    weights.save(judge, folder / "judge", tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    pairs = [
        {
            "prompt": text(rng, 3) + " ",
            "chosen": text(rng, int(rng.integers(4, 90))),
            "rejected": text(rng, int(rng.integers(4, 90))),
            "subset": ("hep-go", "donotanswer", "alpacaeval-easy")[row % 3],
        }
        for row in range(9)
    ]
    styles = [
        {
            "prompt": text(rng, 3) + " ",
            "chosen": [text(rng, n) for n in (4, 9, 20)],
            "rejected": [text(rng, n) for n in (5, 8, 21)],
            "domain": ("chat", "code")[row % 2],
        }
        for row in range(4)
    ]
    for name, rows in (("pairs", pairs), ("styles", styles)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(place, out, **changes):
    settings = {
        "data": str(place / "pairs.jsonl"),
        "reference": str(place / "start"),
        "out": str(out),
        "batch_tokens": 512,
        **QUIET,
    }
    return run_score(ScoreConfig(str(place / "policy"), **{**settings, **changes}))


@pytest.fixture(scope="module")
def finished(place):
    out = place / "full" / "scores.jsonl"
    summary = run(place, out)
    return out, summary


def whole_logps(model, example):
    """Log-probability of the answer from the full logits, in float64."""
    tokens = jnp.asarray(example.tokens)[None]
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model.apply(model.params, tokens, positions).hidden
    logits = np.asarray(hidden @ model.unembed(model.params).weight, np.float64)[0]
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    places = np.flatnonzero(example.loss_mask)
    return sum(logps[t - 1, example.tokens[t]] for t in places)


@pytest.mark.slow
def test_scores_are_log_ratios_of_the_answers(place, finished):
    out, summary = finished
    policy, start = (weights.load(place / name) for name in ("policy", "start"))
    tokenizer = data.load_tokenizer(str(place / "policy"))
    pairs = data.load_pairs(place / "pairs.jsonl", tokenizer)
    lines = {line["id"]: line for line in read(out)}
    assert set(lines) == {pair.id for pair in pairs}
    margins = []
    for pair in pairs:
        line = lines[pair.id]
        for side, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ratio = whole_logps(policy, example) - whole_logps(start, example)
            np.testing.assert_allclose(line[side], [0.1 * ratio], rtol=1e-4, atol=1e-4)
        margins.append(line["chosen"][0] - line["rejected"][0])
    right = np.mean(np.asarray(margins) > 0)
    np.testing.assert_allclose(summary["accuracy"]["value"], right, rtol=1e-12)
    np.testing.assert_allclose(summary["margin"]["value"], np.mean(margins), rtol=1e-12)
    assert summary["items"] == 9
    assert summary["skipped"] == {}
    stored = json.loads((out.parent / "scores.summary.json").read_text())
    assert stored["accuracy"] == summary["accuracy"]
    assert (out.parent / "scores.margins.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_rewards_are_read_at_the_last_token(place, tmp_path):
    out = tmp_path / "rewards.jsonl"
    config = ScoreConfig(
        str(place / "judge"),
        data=str(place / "pairs.jsonl"),
        out=str(out),
        kind="reward",
        batch_tokens=512,
        **QUIET,
    )
    run_score(config)
    judge = weights.load(place / "judge")
    tokenizer = data.load_tokenizer(str(place / "judge"))
    lines = {line["id"]: line for line in read(out)}
    for pair in data.load_pairs(place / "pairs.jsonl", tokenizer):
        for side, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            tokens = jnp.asarray(example.tokens)[None]
            positions = jnp.arange(tokens.shape[1])[None]
            hidden = judge.apply(judge.params, tokens, positions).hidden
            want = np.asarray(hidden[0, -1]) @ np.asarray(
                judge.params["score"]["kernel"]
            )
            got = lines[pair.id][side]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_kind_must_fit_the_head(place, tmp_path):
    settings = {"data": str(place / "pairs.jsonl"), "out": str(tmp_path / "a")}
    with pytest.raises(ValueError, match="no scalar head; score it with --kind imp"):
        run_score(ScoreConfig(str(place / "policy"), kind="reward", **settings))
    with pytest.raises(ValueError, match="a scalar head; score it with --kind reward"):
        run_score(ScoreConfig(str(place / "judge"), reference_free=True, **settings))


def test_a_stopped_file_is_continued(place, finished, tmp_path, monkeypatch):
    whole, summary = finished
    out = tmp_path / "scores.jsonl"
    kept = whole.read_text().splitlines(keepends=True)[:4]
    out.write_text("".join(kept) + '{"id": 17, "chos')  # killed while writing
    scored = []
    original = score._lines

    def spy(items, found, scored_by):
        scored.extend(item.id for item in items)
        return original(items, found, scored_by)

    monkeypatch.setattr(score, "_lines", spy)
    again = run(place, out)
    assert len(scored) == len(set(scored)) == 5
    assert not set(scored) & {json.loads(line)["id"] for line in kept}
    assert out.read_text().startswith("".join(kept))
    want = {line["id"]: line for line in read(whole)}
    for line in read(out):
        np.testing.assert_allclose(
            line["chosen"], want[line["id"]]["chosen"], rtol=1e-4, atol=1e-5
        )
    assert again["accuracy"] == summary["accuracy"]
    scored.clear()
    assert run(place, out)["accuracy"] == summary["accuracy"]
    assert not scored


def test_other_settings_do_not_mix_into_a_file(place, finished, tmp_path):
    out, _ = finished
    before = out.read_bytes()
    for change in ({"beta": 0.2}, {"reference": str(place / "policy")}):
        with pytest.raises(ValueError, match="scored by other weights or settings"):
            run(place, out, **change)
    assert out.read_bytes() == before
    other = tmp_path / "notes.jsonl"
    other.write_text('{"prompt": "red"}\n')
    with pytest.raises(ValueError, match="notes.jsonl:1 is not a line of scores"):
        run(place, other)


def test_a_model_is_even_with_itself(place, tmp_path):
    """Every margin is zero, and ties count half."""
    summary = run(place, tmp_path / "a.jsonl", reference=str(place / "policy"))
    assert summary["ties"] == 9
    assert summary["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert summary["calibration_error"] == 0.0


def test_reward_bench_sections(place, tmp_path):
    out = tmp_path / "scores.jsonl"
    summary = run(place, out, layout="rewardbench")
    lines = read(out)
    found = summary["reward_bench"]
    for section, subset in (
        ("Chat", "alpacaeval-easy"),
        ("Safety", "donotanswer"),
        ("Reasoning", "hep-go"),
    ):
        mine = [line for line in lines if line["group"] == subset]
        right = np.mean([line["chosen"][0] > line["rejected"][0] for line in mine])
        np.testing.assert_allclose(found["sections"][section], right, rtol=1e-12)
    assert "Chat Hard" not in found["sections"]
    assert len(found["missing"]) == 20
    rows = [
        {name: value for name, value in row.items() if name != "subset"}
        for row in read(place / "pairs.jsonl")
    ]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(data.BadRow, match="no text in the column 'subset'"):
        run(place, tmp_path / "b.jsonl", layout="rewardbench", data=str(path))


def test_rm_bench_styles(place, tmp_path):
    out = tmp_path / "scores.jsonl"
    settings = {"layout": "rm-bench", "data": str(place / "styles.jsonl")}
    summary = run(place, out, **settings)
    matrix = np.zeros((3, 3))
    for line in read(out):
        for i, left in enumerate(line["chosen"]):
            for j, right in enumerate(line["rejected"]):
                matrix[i, j] += (left > right) / 4
    found = summary["rm_bench"]
    np.testing.assert_allclose(found["matrix"], matrix, rtol=1e-12)
    hard = (matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3
    np.testing.assert_allclose(found["hard"]["value"], hard, rtol=1e-12)
    assert set(found["domains"]) == {"chat", "code"}
    assert summary["comparisons"] == 36
    with pytest.raises(data.BadRow, match="'chosen' is not a list of 3 texts"):
        run(place, tmp_path / "b.jsonl", layout="rm-bench")


@pytest.mark.slow
def test_rows_that_do_not_fit_are_counted(place, tmp_path):
    rows = (place / "pairs.jsonl").read_text() + json.dumps(
        {"prompt": "red ", "chosen": "old", "rejected": "old"}
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(rows + "\n" + rows.splitlines()[0] + "\n")
    settings = {"data": str(path), "reference": None, "reference_free": True}
    summary = run(place, tmp_path / "a.jsonl", on_bad_row="skip", **settings)
    assert summary["skipped"] == {"equal_pair": 1}
    assert (summary["items"], summary["duplicates"]) == (9, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs either --reference MODEL"),
        ({"reference": "x", "reference_free": True}, "needs either --reference MODEL"),
        ({"kind": "reward", "reference": "x"}, "reward has no reference"),
        ({"reference_free": True, "beta": 0.0}, "beta must be positive"),
        ({"reference_free": True, "batch_tokens": 0}, "batch_tokens must be at least"),
        ({"kind": "judge"}, "kind must be implicit or reward"),
    ],
)
def test_settings_that_contradict_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ScoreConfig("model", data="rows.jsonl", **settings)


def test_the_command_line_refuses_before_it_loads(place, capsys, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "nowhere", "--data", str(place / "pairs.jsonl")])
    assert stop.value.code == 2
    assert "--kind implicit needs either" in capsys.readouterr().err


def test_lengths_come_in_few_buckets():
    buckets = {score.bucket_length(n) for n in range(1, 1025)}
    assert sorted(buckets) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for length in range(1, 1025):
        bucket = score.bucket_length(length)
        assert length <= bucket
        assert bucket == 64 or bucket <= 1.5 * length


@pytest.mark.slow
def test_real_dialogues_with_real_weights(shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", cli.HUGE_PAGES)
    stories = shared_data / "weights" / "stories260K"
    rows = shared_data / "preferences" / "hh_rlhf_harmless_base_test_part1.jsonl.gz"
    for needed in (stories, rows):
        if not needed.exists():
            pytest.skip(f"real data not found: {needed.name}")
    out = tmp_path / "hh.jsonl"
    flags = ["--data", str(rows), "--reference-free", "--on-bad-row", "skip"]
    flags += ["--limit", "40", "--out", str(out)]
    assert cli.main(["score", str(stories), *flags]) == 0
    assert "calibration error" in capsys.readouterr().out
    summary = json.loads((tmp_path / "hh.summary.json").read_text())
    assert summary["items"] + summary["skipped"]["too_long"] == summary["rows"] == 40
    assert summary["items"] >= 10
    # A sum of log-probabilities likes the shorter answer.
    by_length = summary["accuracy_by_length"]
    assert by_length["chosen is shorter"]["accuracy"] > 0.7
    assert by_length["chosen is longer"]["accuracy"] < 0.3


@pytest.mark.slow
def test_a_padding_id_is_never_the_last_token():
    """As transformers reads an exported reward model, whose padding may be its end."""
    config = models.DecoderConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_positions=8,
        head="score",
    )
    model = models.build(config, jax.random.key(0))
    tokens = np.array([[5, 6, 7, 2], [5, 6, 2, 2]], np.int32)
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4)),
        "segment_ids": np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int32),
    }
    found = score.reward_scorer(model, pad_id=2)(batch)["scores"]
    without = score.reward_scorer(model, pad_id=0)(batch)["scores"]
    hidden = model.apply(model.params, tokens, batch["positions"]).hidden
    every = np.asarray(models.scores(model.params, hidden))
    np.testing.assert_allclose(found, [every[0, 2], every[1, 1]], atol=1e-6)
    np.testing.assert_allclose(without, [every[0, 3], every[1, 2]], atol=1e-6)
