"""`jaxpost negatives` on tiny models: what is drawn, its file, its refusals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import data, generation, models, weights
from jaxpost.recipes import _negatives_file
from jaxpost.recipes._negatives_draw import faults_of
from jaxpost.recipes._negatives_rows import sampling_prompt, split_answer
from jaxpost.recipes.generate import run_generate
from jaxpost.recipes.negatives import NegativesConfig, _Counter, run_negatives

WORDS = ["red", "green", "blue", "cold", "warm", "tall", "small", "old"]
NEW = 12
TOP_K = 3
ROWS = 11


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, `base` and `other`, and rows of text."""
    folder = tmp_path_factory.mktemp("negatives")
    tokenizer = data.train_word_tokenizer([" " + " ".join(WORDS)])
    words = [tokenizer.encode(f" {word}")[0] for word in WORDS]
    likely = np.isin(np.arange(tokenizer.vocab_size), [*words, *tokenizer.eos_ids])
    tokenizer = tokenizer.with_chat_template("plain")
    config = models.DecoderConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=96,
    )
    for seed, name in enumerate(("base", "other")):
        model = models.build(config, jax.random.key(seed))
        # Words whole and ends are the likeliest, so that texts have one tokenisation.
        kernel = np.random.default_rng(seed).normal(size=(16, len(likely))) * likely
        model.params["head"]["kernel"] = jnp.asarray(0.4 * kernel, jnp.float32)
        weights.save(model, folder / name, tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": " " + " ".join(rng.choice(WORDS, rng.integers(2, 9))),
            "completion": " " + " ".join(rng.choice(WORDS, 3)),
        }
        for _ in range(ROWS)
    ]
    write(folder / "rows.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def run(place, out, **changes):
    settings = {
        "data": str(place / "rows.jsonl"),
        "out": str(out),
        "samples_per_prompt": 2,
        "epochs": 1,
        "max_new_tokens": NEW,
        "top_k": TOP_K,
        "batch_size": 1,  # windows of four rows
        "redraw": (),
        "progress": "none",
    }
    settings = {"model": str(place / "base"), **settings, **changes}
    return run_negatives(NegativesConfig(**settings))


@pytest.fixture(scope="module")
def finished(place):
    """An uninterrupted run."""
    out = place / "full" / "negatives.jsonl"
    return out, run(place, out)


def sampling_logp(model, prompt, answer, *, temperature, top_k):
    """Log-probability of `answer` under the distribution drawn from, in float64."""
    tokens = np.zeros((1, 96), np.int32)  # what follows an answer is not seen
    tokens[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    hidden = jax.jit(model.apply)(model.params, tokens, np.arange(96)[None]).hidden
    head = np.asarray(model.unembed(model.params).weight, np.float64)
    logits = np.asarray(hidden, np.float64)[0] @ head
    total = 0.0
    for place, token in enumerate(answer, start=len(prompt) - 1):
        scores = logits[place] / temperature
        kept = np.sort(scores)[-top_k:]
        assert scores[token] >= kept[0]
        total += scores[token] - np.log(np.sum(np.exp(kept)))
    return total


def test_a_line_has_texts_and_the_sampler_s_log_probs(place, finished):
    out, summary = finished
    model = weights.load(place / "base")
    tokenizer = data.load_tokenizer(str(place / "base"))
    source = read(place / "rows.jsonl")
    lines = read(out)
    ended = 0
    for row, line in zip(source, lines, strict=True):
        assert (line["prompt"], line["completion"]) == (
            row["prompt"],
            row["completion"],
        )
        asked = data.Row({"prompt": row["prompt"]}, "", 1)
        prompt = data.encode_prompt(asked, tokenizer)
        for text, logp, done in zip(
            line["negatives"],
            line["negative_logps"],
            line["negative_finished"],
            strict=True,
        ):
            answer = tokenizer.encode(text) + [tokenizer.eos_ids[0]] * done
            if done:
                assert "<eos>" not in text
            else:
                assert len(answer) == NEW
            want = sampling_logp(model, prompt, answer, temperature=0.7, top_k=TOP_K)
            np.testing.assert_allclose(logp, want, rtol=1e-4, atol=1e-4)
            ended += done
    assert 0 < ended < 2 * ROWS  # both kinds were seen
    assert summary["unfinished"] == 2 * ROWS - ended
    assert summary["rows"] == ROWS
    assert summary["negatives"] == 2 * ROWS
    want = np.mean([line["negative_logps"] for line in lines])
    np.testing.assert_allclose(summary["mean_logp"], want, rtol=1e-12)
    stored = json.loads((out.parent / "negatives.summary.json").read_text())
    assert stored == summary


def test_ids_are_those_that_training_gives(place, finished):
    out, _ = finished
    tokenizer = data.load_tokenizer(str(place / "base"))
    examples = data.load_examples(out, tokenizer)
    assert [line["id"] for line in read(out)] == [example.id for example in examples]
    assert len({example.id for example in examples}) == ROWS


def test_a_column_is_what_generate_draws_with_its_seed(place, tmp_path):
    out = tmp_path / "negatives.jsonl"
    run(place, out, seeds=(5, 3))
    for column, seed in enumerate((5, 3)):
        answers = tmp_path / f"{seed}.jsonl"
        run_generate(
            str(place / "base"),
            prompts=str(place / "rows.jsonl"),
            output=str(answers),
            max_new_tokens=NEW,
            temperature=0.7,
            top_k=TOP_K,
            batch_size=1,
            seed=seed,
        )
        found = {line["id"]: line["completion"] for line in read(answers)}
        got = [line["negatives"][column] for line in read(out)]
        assert got == [found[number] for number in range(ROWS)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.999, 1.0])
def test_a_stopped_file_ends_as_an_uninterrupted_one(place, finished, tmp_path, share):
    """Wherever it was cut, in a line or between two."""
    whole, summary = finished
    text = whole.read_bytes()
    out = tmp_path / "negatives.jsonl"
    out.write_bytes(text[: int(share * len(text))])
    settings = (whole.parent / "negatives.settings.json").read_bytes()
    (tmp_path / "negatives.settings.json").write_bytes(settings)
    assert run(place, out) == summary
    assert out.read_bytes() == text
    assert (tmp_path / "negatives.settings.json").read_bytes() == settings


def test_whole_windows_are_not_drawn_again(place, finished, tmp_path):
    """Other texts in the first window stay; the second, cut short, is drawn anew."""
    whole, _ = finished
    lines = read(whole)
    for line in lines[:6]:
        line["negatives"] = ["kept", "kept"]
    out = tmp_path / "negatives.jsonl"
    write(out, lines[:6])
    about = (whole.parent / "negatives.settings.json").read_bytes()
    (tmp_path / "negatives.settings.json").write_bytes(about)
    run(place, out)
    found, want = read(out), read(whole)
    assert [line["negatives"] for line in found[:4]] == [["kept", "kept"]] * 4
    assert found[4:] == want[4:]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 1.0}, r"temperature 0\.7, not 1\.0"),
        ({"top_k": None, "top_p": 0.9}, "top_k 3, not None"),
        ({"seed": 1}, r"seeds \[0, 1\], not \[1, 2\]"),
        ({"system_message": "old"}, "system_message None, not 'old'"),
        ({"epochs": 2}, "epochs 1, not 2"),
        ({"batch_size": 2}, "batch_size 1, not 2"),
        ({"redraw": ("empty",)}, r"redraw \[\], not \['empty'\]"),
        ({"limit": 3}, "another data"),
        ({"model": "other"}, "another model"),
        ({"chat_template": "chatml"}, "another chat template"),
    ],
)
def test_other_settings_do_not_mix_into_a_file(place, finished, change, named):
    out, _ = finished
    before = out.read_bytes()
    if "model" in change:
        change = {"model": str(place / change["model"])}
    with pytest.raises(ValueError, match=f"was sampled with {named}"):
        run(place, out, **change)
    assert out.read_bytes() == before


def test_foreign_files_are_refused(place, finished, tmp_path):
    whole, _ = finished
    out = tmp_path / "negatives.jsonl"
    out.write_text('{"prompt": "red"}\n' * 4)
    with pytest.raises(ValueError, match=r"but not negatives\.settings\.json"):
        run(place, out)
    (tmp_path / "negatives.settings.json").write_text('{"settings": 3}')
    with pytest.raises(ValueError, match="does not hold settings of negatives"):
        run(place, out)
    about = (whole.parent / "negatives.settings.json").read_bytes()
    (tmp_path / "negatives.settings.json").write_bytes(about)
    with pytest.raises(ValueError, match=r"negatives.jsonl:1 is not a line of neg"):
        run(place, out)
    assert out.read_text() == '{"prompt": "red"}\n' * 4


def test_the_system_message_is_sampled_with_and_not_written(place, finished, tmp_path):
    plain, _ = finished
    out = tmp_path / "negatives.jsonl"
    run(place, out, system_message="cold blue", limit=4)
    model = weights.load(place / "base")
    tokenizer = data.load_tokenizer(str(place / "base"))
    for line, before in zip(read(out), read(plain)[:4], strict=True):
        assert line["prompt"] == before["prompt"]
        assert line["id"] == before["id"]
        assert line["negatives"] != before["negatives"]
        asked = data.Row({"prompt": "cold blue\n\n" + line["prompt"]}, "", 1)
        prompt = data.encode_prompt(asked, tokenizer)
        answer = tokenizer.encode(line["negatives"][0])
        answer += [tokenizer.eos_ids[0]] * line["negative_finished"][0]
        want = sampling_logp(model, prompt, answer, temperature=0.7, top_k=TOP_K)
        np.testing.assert_allclose(line["negative_logps"][0], want, rtol=1e-4)


@pytest.mark.slow
def test_conversations_keep_their_messages(place, tmp_path):
    """Prompts stay messages, answers become texts; template blanks are not doubled."""
    user = {"role": "user", "content": "red old"}
    right = {"role": "assistant", "content": "blue"}
    rows = [
        {"prompt": [user], "completion": [right]},
        {"messages": [{"role": "system", "content": "warm"}, user, right]},
        {"prompt": "tall", "completion": "small"},
    ]
    out = tmp_path / "negatives.jsonl"
    source = write(tmp_path / "rows.jsonl", rows)
    run(place, out, data=source, chat=True, system_message="cold", temperature=2.0)
    lines = read(out)
    assert lines[0]["prompt"] == [user]
    assert lines[1]["prompt"] == rows[1]["messages"][:2]
    assert lines[2]["prompt"] == [{"role": "user", "content": "tall"}]
    assert [line["completion"] for line in lines] == ["blue", "blue", "small"]
    texts = [text for line in lines for text in line["negatives"]]
    assert all(text == text.lstrip() for text in texts)
    tokenizer = data.load_tokenizer(str(place / "base"))
    examples = data.load_examples(out, tokenizer)
    assert [example.id for example in examples] == [line["id"] for line in lines]


def test_strip_leading(place, tmp_path):
    """Plain texts keep their blanks, unless told otherwise."""
    changes = {"temperature": 2.0, "limit": 4}
    run(place, tmp_path / "kept.jsonl", **changes)
    run(place, tmp_path / "bare.jsonl", strip_leading="always", **changes)
    kept, bare = (
        [t for line in read(tmp_path / name) for t in line["negatives"]]
        for name in ("kept.jsonl", "bare.jsonl")
    )
    assert any(text != text.lstrip() for text in kept)
    assert bare == [text.lstrip() for text in kept]


def test_faults_are_drawn_again_then_kept_and_counted(place, tmp_path):
    """One token out of three leaves three texts for four columns: one must repeat."""
    few = {"max_new_tokens": 1, "epochs": 2, "temperature": 5.0}
    before = run(place, tmp_path / "a.jsonl", **few)
    out = tmp_path / "b.jsonl"
    after = run(place, out, redraw=("duplicate",), max_redraws=3, **few)
    assert before["redraws"] == 0
    assert ROWS <= after["duplicate"] < before["duplicate"]
    lines = read(out)
    draws = np.array([line["negative_draws"] for line in lines])
    assert draws.max() == 4
    assert (draws[:, 0] == 1).all()  # the first of its row repeats nothing
    assert after["redrawn"] == int((draws > 1).sum())
    assert after["redraws"] == int((draws - 1).sum())
    for line in lines:
        assert len(set(line["negatives"])) in (2, 3)
    first = [line["negatives"][0] for line in read(tmp_path / "a.jsonl")]
    assert [line["negatives"][0] for line in lines] == first


def test_a_right_answer_is_drawn_again(place, finished, tmp_path):
    """Rows whose right answer is what the first column drew."""
    whole, _ = finished
    lines = read(whole)
    drawn = [line["negatives"][0] for line in lines]
    rows = [
        {"prompt": line["prompt"], "completion": f" {text.strip() or 'tall'} "}
        for line, text in zip(lines, drawn, strict=True)
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    kept = run(place, tmp_path / "kept.jsonl", data=source)
    equal = sum(text != "" for text in drawn)
    assert kept["positive"] >= equal > 0
    redraw = ("positive",)
    found = run(
        place, tmp_path / "other.jsonl", data=source, redraw=redraw, max_redraws=20
    )
    assert found["positive"] == 0
    assert found["redraws"] >= equal
    after = [line["negatives"][0] for line in read(tmp_path / "other.jsonl")]
    for text, before in zip(after, drawn, strict=True):
        assert (text == before) == (before == "")


def test_faults_of_texts():
    tokenizer = data.train_word_tokenizer(["red"])
    found = faults_of([" red", "blue", "", "blue ", " "], "red ", tokenizer)
    assert found == [{"positive"}, set(), {"empty"}, {"duplicate"}, found[4]]
    assert found[4] == {"empty", "duplicate"}


def row_of(**columns):
    return data.Row(columns, "rows", 3)


def test_the_right_answer_of_each_kind_of_row():
    user = {"role": "user", "content": "red"}
    right = {"role": "assistant", "content": "blue"}
    for row in (
        row_of(prompt="red", completion="blue", label=True),
        row_of(prompt="red", chosen="blue", rejected="old"),
    ):
        assert split_answer(row, chat=False) == ("red", "blue")
        assert split_answer(row, chat=True) == ([user], "blue")
    for row in (
        row_of(messages=[user, right]),
        row_of(prompt="red", completion=[right]),
        row_of(chosen=[user, right], rejected=[user, {**right, "content": "old"}]),
    ):
        assert split_answer(row, chat=False) == ([user], "blue")
    for row, words in (
        (row_of(prompt="red"), "has no right answer"),
        (row_of(text="red"), "has no right answer"),
        (row_of(prompt="red", completion="blue", label=False), "has no right answer"),
        (row_of(prompt="red", completion=" "), "the right answer is empty"),
        (row_of(messages=[right]), "the prompt is empty"),
        (row_of(messages=[user]), "not one message in words of the assistant"),
        (row_of(prompt=[user], completion=[right, user]), "not one message"),
    ):
        with pytest.raises(data.BadRow, match=words):
            split_answer(row, chat=False)


def test_a_system_message_takes_the_place_of_another():
    user = {"role": "user", "content": "red"}
    old = {"role": "system", "content": "warm"}
    want = [{"role": "system", "content": "cold"}, user]
    assert sampling_prompt([old, user], "cold") == want
    assert sampling_prompt([user], "cold") == want
    assert sampling_prompt("red", "cold") == "cold\n\nred"


def test_bad_rows_stop_or_are_counted(place, tmp_path):
    rows = [
        {"prompt": "red ", "completion": "old"},
        {"prompt": "red " * 90, "completion": "old"},
        {"prompt": "red ", "completion": ""},
        {"prompt": "red ", "completion": "old"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "negatives.jsonl"
    with pytest.raises(data.BadRow, match=r"row 2: the prompt has 94 tokens.*most 84"):
        run(place, out, data=source)
    assert not out.exists()
    summary = run(place, out, data=source, on_bad_row="skip")
    assert summary["skipped"] == {"too_long": 1, "nothing_supervised": 1}
    assert summary["repeated_rows"] == 1
    assert len(read(out)) == 1
    nothing = write(tmp_path / "none.jsonl", rows[2:3])
    with pytest.raises(data.DataError, match="no row could be used"):
        run(place, tmp_path / "x.jsonl", data=nothing, on_bad_row="skip")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_redraws": -1}, "max_redraws must not be negative"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0: greedy"),
        ({"redraw": ("same",)}, "redraw must be some of empty, duplicate, positive"),
        ({"seeds": (1, 2, 3)}, r"3 seeds for 2 samples per prompt x 2 epochs = 4 col"),
        ({"seed": -1}, "seeds must not be negative"),
        ({"out": "a.json"}, r"out must be the name of a \.jsonl file, got a\.json"),
    ],
)
def test_settings_out_of_range(change, words):
    with pytest.raises(ValueError, match=words):
        NegativesConfig("base", data="rows", **change)


def test_log_probs_that_are_not_finite_are_named(place, tmp_path):
    model = weights.load(place / "base")
    model.params["head"]["kernel"] = jnp.full((16, 267), 3e38)  # sums overflow
    tokenizer = data.load_tokenizer(str(place / "base"))
    weights.save(model, tmp_path / "nan", tokenizer=tokenizer)
    with pytest.raises(FloatingPointError, match=r"rows.jsonl, row 1: a negative's"):
        run(place, tmp_path / "negatives.jsonl", model=str(tmp_path / "nan"))


def test_the_settings_file_says_what_was_sampled(place, finished):
    out, _ = finished
    about = json.loads((out.parent / "negatives.settings.json").read_text())
    assert about["settings"]["temperature"] == 0.7
    assert about["settings"]["top_k"] == TOP_K
    assert about["settings"]["seeds"] == [0, 1]
    assert about["sources"]["model"] == str(place / "base")
    assert about["versions"]["jax"] == jax.__version__
    model = weights.load(place / "base")
    tokenizer = data.load_tokenizer(str(place / "base"))
    again = _negatives_file.fingerprint(model, tokenizer, [])
    kept = {name: d for name, d in about["fingerprint"].items() if name != "data"}
    assert kept.items() <= again.items()


@pytest.mark.slow
def test_a_killed_command_goes_on_bit_for_bit(place, tmp_path):
    """The real command, killed by the system at two moments, then left to finish."""
    rows = [
        {"prompt": f"{WORDS[n % 8]} {n} ", "completion": WORDS[n % 7]}
        for n in range(400)
    ]
    source = write(tmp_path / "rows.jsonl", rows)

    def start(out):
        flags = ["--data", source, "--out", str(out), "--max-new-tokens", "32"]
        flags += ["--redraw", "empty", "duplicate", "--batch-size", "4"]
        command = [sys.executable, "-m", "jaxpost.cli", "negatives"]
        return subprocess.Popen(
            [*command, str(place / "base"), *flags, "--progress", "plain"],
            env={
                **os.environ,
                "XLA_FLAGS": "",
                "GLIBC_TUNABLES": "glibc.malloc.check=0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    process = start(whole)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert "left" in shown
    for lines in (1, 200):
        process = start(out)
        while process.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert lines <= out.read_bytes().count(b"\n") < 400
    process = start(out)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    assert "already has" in shown
    assert out.read_bytes() == whole.read_bytes()
    summaries = [tmp_path / f"{p.stem}.summary.json" for p in (whole, out)]
    assert summaries[0].read_bytes() == summaries[1].read_bytes()


def test_progress_adds_up_columns_and_windows():
    shown = []

    class Shown:
        def update(self, done, values):
            shown.append((done, values["tokens/s"]))

    count = _Counter(6, Shown())
    # A window of three prompts, then one of two, with two columns each.
    for done, tokens, seconds in (
        (1, 10, 1.0),
        (3, 30, 2.0),
        (3, 30, 1.0),
        (1, 4, 1.0),
        (2, 10, 1.0),
        (2, 10, 1.0),
    ):
        count(generation.TextStats(done, 9, 0, tokens, 0, seconds))
    assert [done for done, _ in shown] == [7, 9, 12, 13, 14, 16]
    rates = [10.0, 15.0, 20.0, 16.0, 17.5, 16.0]
    assert [rate for _, rate in shown] == pytest.approx(rates)
