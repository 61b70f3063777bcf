"""`jaxpost watermark`: key file, marked completions, their detection, calibration."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import cli, data, models, weights
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_key import KeyFile, read_key_file, write_key_file
from jaxpost.recipes._watermark_texts import encode_text, read_documents, token_pieces

WORDS = [a + b for a in ("ka", "lo", "mi", "su", "te") for b in "bdfgklmnrstv"]
NEW = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of 60 likely words, prompts, and marked completions."""
    folder = tmp_path_factory.mktemp("watermark")
    words = data.train_word_tokenizer([" " + " ".join(WORDS)])
    likely = np.isin(
        np.arange(words.vocab_size), [words.encode(f" {word}")[0] for word in WORDS]
    )
    config = models.DecoderConfig(
        family="llama",
        vocab_size=words.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_positions=128,
        tie_embeddings=False,
    )
    for seed, name in enumerate(("model", "surrogate")):
        model = models.build(config, jax.random.key(seed))
        rng = np.random.default_rng(0)
        table = rng.normal(size=(words.vocab_size, 16))
        kernel = 1.2 * rng.normal(size=(16, words.vocab_size)) * likely
        # No word is spelled in bytes, so that texts have one tokenisation.
        table[:, 0], kernel[0] = 4.0, np.where(likely, 0.0, -5.0)
        params = {
            "embed": {"embedding": jnp.asarray(table, jnp.float32)},
            "head": {"kernel": jnp.asarray(kernel, jnp.float32)},
        }
        model = model.replace(params=model.params | params)
        weights.save(model, folder / name, tokenizer=words)
    rng = np.random.default_rng(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(6):
            prompt = " " + " ".join(rng.choice(WORDS, rng.integers(2, 6)))
            file.write(json.dumps({"prompt": prompt}) + "\n")
    # Not fresh ones, under which a text would now and then go unseen.
    for name, secret in (("key", 1), ("other", 2)):
        key = watermark.WatermarkKey(secret, words.vocab_size)
        write_key_file(folder / f"{name}.json", KeyFile(key, 0.25, 6.0, 1.0))
    assert run(
        "generate",
        folder / "model",
        "--key",
        folder / "key.json",
        "--prompts",
        folder / "prompts.jsonl",
        "--output",
        folder / "marked.jsonl",
        "--max-new-tokens",
        NEW,
    )
    return folder


def run(verb: str, *words) -> bool:
    return cli.main(["watermark", verb, *map(str, words)]) == 0


def detect(capsys, place, *words) -> list[dict]:
    assert run("detect", *words, "--key", place / "key.json", "--json")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_key_file_is_its_owners_and_stays(place, capsys):
    path = place / "new.json"
    asked = ("generate", place / "model", "--key", path, "--prompt", " kab")
    settings = ("--tau", "1.5", "--delta", "2", "--max-new-tokens", "2")
    assert run(*asked, *settings)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    keys = read_key_file(path)
    assert (keys.gamma, keys.delta, keys.tau) == (0.25, 2.0, 1.5)
    assert not run(*asked, "--tau", "2")
    assert "has tau 1.5, not 2.0" in capsys.readouterr().err
    assert read_key_file(path) == keys
    with pytest.raises(FileExistsError):
        write_key_file(path, keys)


def test_marked_rows_do_not_tell_the_secret(place):
    secret = json.loads((place / "key.json").read_text())["secret"]
    assert int(secret, 16) == 1
    assert secret not in (place / "marked.jsonl").read_text()


def test_a_file_of_another_mark_or_model_is_not_continued(place, tmp_path, capsys):
    rows = (place / "prompts.jsonl").read_text().splitlines(keepends=True)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "marked.jsonl"
    prompts.write_text(rows[0])

    def generate(model="model", key="key", *more) -> bool:
        flags = ("--prompts", prompts, "--output", out, "--max-new-tokens", 4)
        words = (place / model, "--key", place / f"{key}.json", *flags)
        return run("generate", *words, *more)

    assert generate()
    first = out.read_text()
    assert generate()  # nothing left to do
    for words, message in (
        (("model", "other"), "marked.jsonl was answered with watermark {"),
        (("surrogate",), "with model fingerprint '"),
        (("model", "key", "--seed", 1), "with seed 0, not 1"),
        (("model", "key", "--temperature", 0.5), "with temperature 1.0, not 0.5"),
    ):
        assert not generate(*words)
        assert message in capsys.readouterr().err
    prompts.write_text(rows[1])
    assert not generate()
    assert "is of 1 rows, and the 1 given do not begin with them" in (
        capsys.readouterr().err
    )
    assert out.read_text() == first
    prompts.write_text("".join(rows[:2]))
    assert generate()
    assert out.read_text().startswith(first)
    assert len(rows_of(out)) == 2


def test_marked_completions_are_found_from_ids_and_from_text(place, capsys):
    marked = rows_of(place / "marked.jsonl")
    assert all(len(row["completion_ids"]) == NEW for row in marked)
    assert (
        marked[0]["watermark"]["key"]
        == read_key_file(place / "key.json").key.fingerprint
    )
    found = detect(
        capsys, place, place / "marked.jsonl", "--model", place / "model", "--tokens"
    )
    assert [row["verdict"] for row in found] == ["watermarked"] * 6
    assert all(row["prediction"] is True and row["p"] < 1e-4 for row in found)
    assert all(row["notes"] == [] for row in found)
    table = found[0]["token_table"]
    assert len(table) == NEW
    assert sum(row["scored"] and row["green"] for row in table) == found[0]["green"]
    assert "".join(row["text"] for row in table) == marked[0]["completion"]
    again = detect(
        capsys,
        place,
        place / "marked.jsonl",
        "--model",
        place / "model",
        "--retokenize",
    )
    assert [row["z"] for row in again] == pytest.approx([row["z"] for row in found])


def test_without_prompts_and_by_a_surrogate(place, capsys):
    blind = detect(
        capsys,
        place,
        place / "marked.jsonl",
        *("--model", place / "model", "--without-prompts"),
    )
    other = detect(
        capsys, place, place / "marked.jsonl", "--model", place / "surrogate"
    )
    for found in (blind, other):
        # Each scores some other tokens than were marked: weaker, but there.
        assert np.mean([row["z"] for row in found]) > 4.0
    # The BOS stands before a text without its prompt, so its first token counts too.
    assert {row["tokens"] for row in blind} == {NEW}


def test_another_key_finds_nothing_and_is_refused_by_the_record(place, capsys):
    words = (place / "marked.jsonl", "--model", place / "model")
    other = ("--key", place / "other.json", "--json")
    assert not run("detect", *words, *other)
    error = capsys.readouterr().err
    assert "marked with key" in error
    assert "--ignore-record" in error
    assert run("detect", *words, *other, "--ignore-record", "--unique")
    lines = capsys.readouterr().out.splitlines()
    assert all(json.loads(line)["z"] < 4 for line in lines)


def test_a_text_file_is_printed_with_its_tokens_coloured(place, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = rows_of(place / "marked.jsonl")[0]
    path = place / "text.txt"
    path.write_text(row["completion"])
    assert run(
        "detect",
        path,
        *("--key", place / "key.json", "--model", place / "model"),
        *("--prompt", row["prompt"], "--windows", "--out", place / "run"),
    )
    shown = capsys.readouterr().out
    assert "\x1b[30;42m" in shown  # green
    assert "\x1b[2;3m" in shown  # the prompt
    assert "watermarked: z =" in shown
    assert "most conspicuous: tokens" in shown
    page = (place / "run" / "watermark.html").read_text()
    assert (
        page.count('class="green" title=')
        == rows_of(place / "run" / "detections.jsonl")[0]["green"]
    )
    assert "<polyline" not in page or "nan" not in page
    assert "<script" not in page


def test_tokens_that_the_text_does_not_give_back_are_warned_of(place, capsys):
    row = rows_of(place / "marked.jsonl")[0]
    ids = row["completion_ids"]
    # Spelled letter by letter, the same text has other tokens.
    words = data.load_tokenizer(str(place / "model"))
    piece = words.decode(ids[:1])
    letters = [words.encode(letter)[0] for letter in piece]
    assert words.decode(letters) == piece
    changed = {**row, "completion_ids": [*letters, *ids[1:]]}
    path = place / "changed.jsonl"
    path.write_text(json.dumps(changed) + "\n")
    (found,) = detect(capsys, place, path, "--model", place / "model")
    assert "from token 0 of the text on" in found["notes"][0]
    assert found["tokens"] == NEW + len(letters) - 1
    (again,) = detect(capsys, place, path, "--model", place / "model", "--retokenize")
    assert again["tokens"] == NEW


def test_entropies_may_come_from_a_file(place, capsys):
    found = detect(
        capsys, place, place / "marked.jsonl", "--model", place / "model", "--tokens"
    )
    values = [[token["entropy"] for token in row["token_table"]] for row in found]
    path = place / "entropies.json"
    path.write_text(json.dumps(values))
    given = ("--entropies", path, "--tokenizer", place / "model")
    same = detect(capsys, place, place / "marked.jsonl", *given)
    assert [row["z"] for row in same] == [row["z"] for row in found]
    path.write_text(json.dumps(values[:-1]))
    words = (place / "marked.jsonl", "--key", place / "key.json", *given)
    assert not run("detect", *words)
    assert "entropies of 5 texts, not of 6" in capsys.readouterr().err
    path.write_text(json.dumps([values[0][:-1], *values[1:]]))
    assert not run("detect", *words)
    assert "59 entropies for the 60 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0.5,", "is not JSON"),
        ('{"a": [0.5]}', "got {'a': [0.5]}."),
        ("3", "got 3."),
        ("[[0.5], 0.5]", "text 2 has 0.5 instead"),
        ('[[0.5], ["0.5"]]', "token 0 of text 2 has '0.5'."),
        ("[0.5, null]", "token 1 of text 1 has None."),
        ("[[0.5, true]]", "token 1 of text 1 has True."),
        ("[[[0.5]]]", "token 0 of text 1 has [0.5]."),
        ("[0.5, NaN]", "token 1 of text 1 has nan."),
        ("[-Infinity]", "token 0 of text 1 has -inf."),
        ("[]", "entropies of 1 texts, not of 6"),
    ],
)
def test_entropies_that_are_no_lists_of_numbers(
    place, tmp_path, capsys, content, message
):
    path = tmp_path / "entropies.json"
    path.write_text(content)
    given = ("--entropies", path, "--tokenizer", place / "model")
    words = (place / "marked.jsonl", "--key", place / "key.json", *given)
    assert not run("detect", *words)
    error = capsys.readouterr().err
    assert error.startswith(f"jaxpost: {path} ")
    assert message in error
    assert error.count("\n") == 1


def test_texts_longer_than_the_model_are_read_in_pieces(place, capsys):
    rows = rows_of(place / "marked.jsonl")
    path = place / "long.txt"
    path.write_text("".join(row["completion"] for row in rows))
    (found,) = detect(capsys, place, path, "--model", place / "model")
    assert 6 * NEW - 2 <= found["tokens"] <= 6 * NEW
    assert found["verdict"] == "watermarked"
    assert found["scored"] > 128


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokenizer", "model"], "pass --model or --entropies"),
        (["--entropies", "e.json"], "without --model, pass --tokenizer"),
        (["--model", "model", "--prompt", "x"], "--prompt goes with a file"),
    ],
)
def test_detection_that_lacks_something(place, capsys, words, message):
    words = [place / word if word == "model" else word for word in words]
    key = ("--key", place / "key.json")
    assert not run("detect", place / "marked.jsonl", *words, *key)
    assert message in capsys.readouterr().err


def test_key_files_that_cannot_be_used(place, capsys):
    good = json.loads((place / "key.json").read_text())
    path = place / "bad.json"
    words = (place / "marked.jsonl", "--model", place / "model", "--key", path)
    assert not run("detect", *words)
    assert "no such key file" in capsys.readouterr().err
    for changed, message in (
        ({"scheme": "simple_1"}, "scheme is 'simple_1'"),
        ({"vocab_size": good["vocab_size"] + 1}, "pass the tokenizer"),
        ({"secret": "zz"}, "not a watermark's key file"),
    ):
        path.write_text(json.dumps({**good, **changed}))
        assert not run("detect", *words)
        assert message in capsys.readouterr().err


def test_calibration_proposes_what_it_forecasts(place, capsys):
    assert run(
        "calibrate",
        place / "model",
        *("--data", place / "marked.jsonl"),
        *("--length", "60", "--false-positive-rate", "0.05", "--power", "0.8"),
        *("--gammas", "0.25", "0.5", "--deltas", "1", "4", "--keys", "2"),
        *("--out", place / "calibration", "--key", place / "proposed.json"),
        *("--progress", "none"),
    )
    shown = capsys.readouterr().out
    found = json.loads((place / "calibration" / "calibration.json").read_text())
    assert found["tokens"] == 6 * NEW
    assert sum(found["entropies"]["histogram"]["counts"]) == found["tokens"]
    assert found["reaches_power"]
    chosen = found["proposal"]
    assert f"proposal: tau {chosen['tau']:g}, gamma {chosen['gamma']:g}" in shown
    assert chosen["power"] >= 0.8
    assert chosen["perplexity"] >= chosen["plain_perplexity"] > 1.0
    keys = read_key_file(place / "proposed.json")
    assert (keys.gamma, keys.delta, keys.tau) == (
        chosen["gamma"],
        chosen["delta"],
        chosen["tau"],
    )
    again = ("calibrate", place / "model", "--data", place / "marked.jsonl")
    assert not run(*again, "--key", place / "proposed.json")
    assert "name a new key file" in capsys.readouterr().err


def test_pieces_of_tokens_join_to_the_text(place):
    words = data.load_tokenizer(str(place / "model"))
    text = " kab löb €😀 sut\n\ttek"
    ids, prompt_length, notes = encode_text(words, text, " lom")
    assert notes == []
    assert ids[0] == words.bos_id
    assert "".join(token_pieces(words, ids[1:])) == " lom" + text
    assert words.decode(ids[prompt_length:]) == text


def test_a_token_over_the_prompts_end_is_warned_of(place):
    words = data.load_tokenizer(str(place / "model"))
    _, prompt_length, notes = encode_text(words, "b mid", " ka")
    assert "end of the prompt" in notes[0]
    assert prompt_length >= 1


def test_rows_that_are_no_texts(place):
    words = data.load_tokenizer(str(place / "model"))
    path = place / "rows.jsonl"
    for row, message in (
        ({"prompt": "a"}, "needs a text in its column"),
        ({"completion": "a", "prompt": 3}, "prompt must be text"),
        ({"completion": "a", "completion_ids": [10**6]}, "list of ids below"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            read_documents(str(path), words)
