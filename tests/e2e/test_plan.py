"""`jaxpost plan`: published shapes planned for devices that are not here."""

import json
import pathlib

import pytest

from jaxpost import cli, parallel, recipes
from jaxpost.recipes import plan as plans

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "plan"
# Of each: parameters, of which looked up only; layers, heads, head width.
SHAPES = {
    "qwen3_0.6b": (596_049_920, 0, 28, 16, 128),
    "llama3_8b": (8_030_261_248, 128256 * 4096, 32, 32, 128),
}


def planned(name, *flags, **options):
    path = str(CONFIGS / f"{name}.yaml")
    config = recipes.load_config(path, flags, prog="jaxpost plan")
    return plans.plan(config, folder=CONFIGS, **options)


def check_against_formulas(made, name, fsdp, tensor):
    """Bytes from sizes alone, and 6 N per token with causal attention."""
    total, looked_up, layers, heads, width = SHAPES[name]
    found, memory = made.forecast, made.forecast.memory
    assert (found.parameters, found.trained) == (total, total)
    parts = fsdp * tensor
    assert memory.parameters == pytest.approx(4 * total / parts, rel=0.01)
    assert memory.gradients == memory.parameters
    assert memory.moments == pytest.approx(8 * total / parts, rel=0.01)
    attention = 3 * 4 * (found.row_tokens / 2) * layers * heads * width
    per_device = found.tokens / found.devices
    plain = (6 * total + attention) * per_device
    assert found.model_flops == pytest.approx(plain, rel=0.1)
    precise = (6 * (total - looked_up) + attention) * per_device
    assert found.model_flops == pytest.approx(precise, rel=0.01)
    # Whole layers are recomputed: a third more of what lies in them, at most.
    assert 1.1 < found.executed_flops / found.model_flops < 4 / 3


def check_traffic(made, name):
    """Of fsdp alone: layers gathered forward and backward, gradients scattered once."""
    total, looked_up = SHAPES[name][:2]
    whole = 2 * total  # bfloat16
    assert whole < made.forecast.sent["all-gather"] < 2.2 * whole
    # A device adds up its own columns of an embedding's gradient; nothing is sent.
    ring = (made.forecast.devices - 1) / made.forecast.devices
    scattered = 2 * (total - looked_up) * ring
    assert made.forecast.sent["reduce-scatter"] == pytest.approx(scattered, rel=0.01)
    assert made.forecast.sent.get("all-reduce", 0) < 0.01 * whole


def test_qwen3_on_8_devices():
    made = planned("qwen3_0.6b", devices=8, chip="v5e")
    check_against_formulas(made, "qwen3_0.6b", 8, 1)
    check_traffic(made, "qwen3_0.6b")
    memory = made.forecast.memory
    assert made.fits
    assert not made.remedies
    assert memory.batch == 64 * 2048 * 13 // 8
    assert made.forecast.logits_avoided == 64 * 2048 * 151936 * 4 // 8
    # Each layer's input is kept for its recomputation, in bfloat16.
    inputs = 28 * (64 // 8) * 2048 * 1024 * 2
    assert inputs < memory.temporaries < made.forecast.temporaries_float32
    assert made.roofline.limit == "compute"
    assert 0.5 < made.roofline.utilisation < 1
    text = json.dumps(made.to_mapping())
    assert json.loads(text)["forecast"]["memory"]["total"] == memory.total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "tensor"),
    [
        ("qwen3_0.6b", 64, 1),
        ("qwen3_0.6b", 256, 4),
        ("llama3_8b", 8, 1),
        ("llama3_8b", 8, 2),
        ("llama3_8b", 64, 2),
        ("llama3_8b", 256, 4),
    ],
)
def test_published_shapes_on_many_devices(name, devices, tensor):
    flags = ("--mesh.tensor", str(tensor))
    made = planned(name, *flags, devices=devices, chip="h200")
    check_against_formulas(made, name, devices // tensor, tensor)
    assert made.fits
    assert made.forecast.devices == devices
    if tensor == 1:
        check_traffic(made, name)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(capsys, tmp_path):
    path, out = str(CONFIGS / "llama3_8b.yaml"), tmp_path / "plan.json"
    words = ["plan", path, "--chip", "v5e", "--train.batch_size", "8"]
    assert cli.main([*words, "--devices", "1", "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert "does not fit 16.0 GB" in shown.out
    assert "What would fit:" in shown.err
    (remedy,) = json.loads(out.read_text())["remedies"]
    assert remedy["total"] * (1 + parallel.MARGIN) <= parallel.CHIPS["v5e"].hbm_bytes
    assert f"{remedy['flags']}   (" in shown.err
    # What was named must do.
    assert cli.main([*words, *remedy["flags"].split()]) == 0
    assert "fits 16.0 GB" in capsys.readouterr().out


def small(*flags):
    """A fresh model without a tokenizer or rows."""
    words = ("--model.tokenizer", "nowhere", "--train.batch_size", "16", *flags)
    return recipes.load_config(None, words, prog="jaxpost plan")


@pytest.mark.slow
def test_a_single_change_on_the_same_devices(monkeypatch):
    config = small("--data.max_length", "512", "--mesh.fsdp", "2")
    base = plans.plan(config, vocab_size=1000, chip="v5e")
    size = base.forecast.memory.total  # without the margin
    chip = parallel.Chip("tight", 1e12, size, 1e12, 1e12, 8)
    monkeypatch.setitem(parallel.CHIPS, "tight", chip)
    made = plans.plan(config, vocab_size=1000, chip="tight")
    assert made.fits is False
    assert made.remedies
    allowed = size / (1 + parallel.MARGIN)
    assert all(remedy.total <= allowed for remedy in made.remedies)
    words = made.remedies[0].flags.split()
    again = small("--data.max_length", "512", "--mesh.fsdp", "2", *words)
    applied = plans.plan(again, vocab_size=1000, chip="tight")
    assert applied.fits
    assert applied.forecast.memory.total == made.remedies[0].total


@pytest.mark.slow
def test_programs_to_compile_and_rows_that_are_padded():
    made = plans.plan(small("--data.packing", "False"), vocab_size=100)
    assert made.forecast.programs == 3
    assert made.chip is None
    assert made.fits is None
    assert made.forecast.compute_dtype == "float32"
    assert made.forecast.sent == {}  # one device


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chip", "v5x"), "no chip 'v5x'. Did you mean v5"),
        (("--devices", "8", "--mesh.fsdp", "3"), "needs 3 devices, but there are 8"),
        (("--devices", "0"), "--devices must be at least 1"),
        (("--devices", "128"), "64 rows, which do not divide over the 128 devices"),
        (("--model.path", "no/such"), "no config.json at 'no/such'"),
        (("--data.max_length", "99999"), "the model has 40960 positions"),
    ],
)
def test_bad_input_is_refused_by_name(words, message, capsys):
    assert cli.main(["plan", str(CONFIGS / "qwen3_0.6b.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_wrong_flags_name_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(CONFIGS / "qwen3_0.6b.yaml"), "--devicess", "8"])
    assert stop.value.code == 2
    assert "--devices" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--chip", "--out", "--train.batch-size"))


def test_a_compiler_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(plans.sys, "executable", "/bin/false")
    with pytest.raises(plans.PlanError, match=r"ended with 1. It said last:\n\(noth"):
        plans.plan(small(), vocab_size=100)
