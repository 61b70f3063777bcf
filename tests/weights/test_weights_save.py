"""What an export holds, and that it appears whole or not at all."""

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from tiny_families import CONFIGS, assert_same_params, build

from jaxpost import weights
from jaxpost.weights import _safetensors

CARD = weights.ModelCard(
    title="Tiny | decoder",
    licence="mit",
    data={"TinyStories": "CDLA-Sharing-1.0", "rows|with pipes": "cc0"},
    method="Supervised fine-tuning.",
    base_model="nobody/base",
    metrics={"exact match": "87%"},
)


class FakeTokenizer:
    """What `save` asks of a tokenizer."""

    def __init__(self, vocab_size=61, bos_id=1, eos_ids=(2, 7), pad_id=2):
        self.vocab_size, self.bos_id = vocab_size, bos_id
        self.eos_ids, self.pad_id = eos_ids, pad_id

    def save(self, folder):
        (pathlib.Path(folder) / "tokenizer.json").write_text("{}")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def test_files_of_an_export(tmp_path):
    out = weights.save(
        build(CONFIGS["llama"]),
        tmp_path / "deep/out",
        tokenizer=FakeTokenizer(),
        generation_config={"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 32},
        card=CARD,
    )
    assert sorted(contents(out)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    generation = read(out / "generation_config.json")
    assert generation == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 32,
    }
    config = read(out / "config.json")
    assert config["eos_token_id"] == [2, 7]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_transformers_accepts_the_generation_config(tmp_path):
    # The first import of transformers warns that torch is missing; it is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import GenerationConfig

    for number, fields in enumerate(
        [None, {"temperature": 0}, {"top_k": 5}, {"do_sample": True, "min_p": 0.1}]
    ):
        out = weights.save(
            build(CONFIGS["llama"]),
            tmp_path / str(number),
            tokenizer=FakeTokenizer(),
            generation_config=fields,
        )
        read_back = GenerationConfig.from_pretrained(out)
        read_back.validate(strict=True)
        assert read_back.eos_token_id == [2, 7]
        assert bool(read_back.do_sample) is (number >= 2)


def test_card_is_markdown_with_a_yaml_header():
    import yaml

    text = CARD.render()
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "mit"
    assert fields["base_model"] == "nobody/base"
    assert fields["language"] == ["en"]
    assert "| TinyStories | CDLA-Sharing-1.0 |" in body
    assert "rows\\|with pipes" in body
    assert "Supervised fine-tuning." in body


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"do_sample": False, "temperature": 0.5}, "do_sample is False but temper"),
        ({"do_sample": True, "temperature": 0}, "do_sample with temperature 0"),
        ({"eos_token_id": 61}, "eos_token_id=61 lies outside"),
        ({"eos_token_id": "x"}, "eos_token_id must be whole"),
    ],
)
def test_contradicting_generation_config(fields, match, tmp_path):
    with pytest.raises(weights.WeightsError, match=match):
        weights.save(
            build(CONFIGS["llama"]), tmp_path / "out", generation_config=fields
        )
    assert not (tmp_path / "out").exists()


def test_tokenizer_of_another_model(tmp_path):
    with pytest.raises(weights.WeightsError, match="62 ids but the embedding only 61"):
        weights.save(
            build(CONFIGS["llama"]), tmp_path / "out", tokenizer=FakeTokenizer(62)
        )


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    weights.save(build(CONFIGS["llama"]), out, max_shard_bytes=5000, card=CARD)
    weights.save(build(CONFIGS["gemma2"]), out)
    assert sorted(contents(out)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert weights.load(out).config.family == "gemma2"
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex, which no export writes"):
        weights.save(build(CONFIGS["llama"]), out)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(FileExistsError, match="is a file"):
        weights.save(build(CONFIGS["llama"]), out / "thesis.tex")


def test_without_an_atomic_exchange_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxpost.weights._atomic._exchange", lambda *_: False)
    weights.save(build(CONFIGS["llama"]), tmp_path / "out")
    weights.save(build(CONFIGS["gemma2"]), tmp_path / "out")
    assert weights.load(tmp_path / "out").config.family == "gemma2"
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def limited_file_size():
    """No file may grow past 20 kB: the kernel itself refuses the write."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_refused_write_leaves_the_old_export(tmp_path, limited_file_size):
    out = tmp_path / "out"
    weights.save(build(CONFIGS["phi3"]), out, max_shard_bytes=5000)
    before = contents(out)
    with pytest.raises(OSError, match="too large"):
        weights.save(build(CONFIGS["llama"]), out)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("budget", [0, 100, 9000, 30000])
def test_full_disk_leaves_the_old_export(budget, tmp_path, monkeypatch):
    out = tmp_path / "out"
    model = build(CONFIGS["gemma2"])
    weights.save(model, out)
    before = contents(out)
    room = [budget]
    write_all = _safetensors._write_all

    def write_until_full(file, data):
        fits = data[: room[0]]
        room[0] -= len(fits)
        write_all(file, fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_safetensors, "_write_all", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(build(CONFIGS["llama"]), out, max_shard_bytes=5000)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(OSError, match="No space left"):
        weights.save(build(CONFIGS["llama"]), tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]


_CHILD = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
from tiny_families import CONFIGS, build
from jaxpost import weights
from jaxpost.weights import _safetensors

first, second = build(CONFIGS["llama"]), build(CONFIGS["gemma2"])
out, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
weights.save(first, out)
if mode == "slow":
    write_all = _safetensors._write_all
    def slowly(file, data):
        write_all(file, data)
        if file.tell() > 10_000:
            print("half way", flush=True)
            time.sleep(60)
    _safetensors._write_all = slowly
else:
    print("half way", flush=True)
for _ in range(100_000):
    weights.save(second, out)
    weights.save(first, out)
"""


@pytest.mark.parametrize("mode", ["slow", "loop"])
def test_kill_while_saving(mode, tmp_path):
    code = textwrap.dedent(_CHILD.format(tests=str(pathlib.Path(__file__).parent)))
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(out), mode], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "half way"
    if mode == "loop":
        time.sleep(0.3)
    child.kill()
    child.wait()
    child.stdout.close()
    back = weights.load(out)
    names = (
        {"llama": "llama"} if mode == "slow" else {"llama": "llama", "gemma2": "gemma2"}
    )
    assert back.config.family in names
    assert_same_params(back.params, build(CONFIGS[back.config.family]).params)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == [
        "out"
    ]
    # What the killed process left is swept by the next save.
    weights.save(build(CONFIGS["qwen3"]), out)
    assert os.listdir(tmp_path) == ["out"]


def test_verify_export_writes_its_report(tmp_path):
    model = build(CONFIGS["gemma2"])
    weights.save(model, tmp_path / "out", max_shard_bytes=5000)
    report = weights.verify_export(model, tmp_path / "out", with_transformers=False)
    assert report.max_logit_difference == 0.0
    assert report.parameters == model.param_count()
    assert report.dtypes == ("float32",)
    written = read(tmp_path / "out/export_report.json")
    assert written["tensors"] == report.tensors == 2 + 11 * 3
    assert written["total_bytes"] == report.total_bytes
    assert not report.transformers_used
    assert "torch" not in report.versions
    # An export that differs is told, and the report says by how much.
    other = build(CONFIGS["gemma2"].replace(final_softcap=None))
    with pytest.raises(weights.WeightsError, match="differ from those of the model in"):
        weights.verify_export(other, tmp_path / "out", with_transformers=False)
    found = read(tmp_path / "out/export_report.json")["max_logit_difference"]
    assert found > 1e-3
    weights.verify_export(
        other, tmp_path / "out", tolerance=None, with_transformers=False
    )


def test_narrower_export_is_measured(tmp_path):
    model = build(CONFIGS["llama"])
    weights.save(model, tmp_path / "out", dtype="bfloat16")
    report = weights.verify_export(
        model,
        tmp_path / "out",
        tolerance=None,
        probe_tokens=np.ones((1, 4), np.int32),
        with_transformers=False,
    )
    assert 0 < report.max_logit_difference < 0.1 * report.max_logit
    assert report.probe_tokens == 4
