"""Damaged, wrong or dangerous folders end in an error that names the fault."""

import json
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
from tiny_families import CONFIGS, build

from jaxpost import weights

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "out"
    weights.save(build(CONFIGS["llama"]), folder)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    for file in pristine.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / FILE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / FILE)


def set_header(path, header: bytes, data: bytes = b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1, -5000])
def test_truncated_file(folder, keep):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:keep])
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors.*again"):
        weights.load(folder)


def test_trailing_bytes(folder):
    with open(folder / FILE, "ab") as file:
        file.write(b"\0" * 16)
    with pytest.raises(weights.WeightsError, match="bytes to spare"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[1]", "not a JSON object"),
        (b"{\xff}", "not JSON"),
        (b'{"a": {"dtype": "F32"}}', "entry of a lacks"),
        (b'{"a": 3}', "entry of a lacks"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', "needs 4 bytes"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "from 0 up"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "starts at byte 4"),
        (b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}', "dtype 'F33'"),
        (b'{"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}', "unknown dtype"),
    ],
)
def test_forged_header(folder, header, match):
    set_header(folder / FILE, header, b"\0" * 8)
    with pytest.raises(weights.WeightsError, match=match):
        weights.load(folder)


def test_header_longer_than_the_file_is_not_allocated(folder):
    (folder / FILE).write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(weights.WeightsError, match="the header claims"):
        weights.load(folder)


def test_missing_extra_and_misshaped_tensors_are_all_named(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        name = "model.layers.2.self_attn.k_proj.weight"
        tensors[name] = np.zeros((20, 12), np.float32)

    rewrite(folder, change)
    with pytest.raises(weights.WeightsError) as caught:
        weights.load(folder)
    message = str(caught.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 not expected: model.layers.9.mlp.up_proj.weight" in message
    assert "k_proj.weight is [20, 12], expected [12, 20]" in message


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, lambda t: [t.pop(key) for key in list(t) if "layers.1" in key])
    with pytest.raises(weights.WeightsError, match=r"9 missing: .* and 1 more"):
        weights.load(folder)


def test_missing_head_says_how_to_tie(folder):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(weights.WeightsError, match="set tie_word_embeddings to true"):
        weights.load(folder)


def test_tolerated_tensors_are_not_read(folder):
    def change(tensors):
        bad = np.full(3, np.nan, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = bad
        tensors["model.rotary_emb.inv_freq"] = bad

    rewrite(folder, change)
    weights.load(folder)


def test_tied_head_in_the_file_is_tolerated(tmp_path):
    config = CONFIGS["llama_tied_biased"]
    weights.save(build(config), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.norm.weight"]}))
    assert weights.load(tmp_path).config.tie_embeddings


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_non_finite_weights_are_named(bad, dtype, tmp_path):
    weights.save(build(CONFIGS["llama"]), tmp_path, dtype=dtype)
    name = "model.layers.2.mlp.down_proj.weight"

    def spoil(tensors):
        values = tensors[name].copy()
        values[-1, -1] = bad
        tensors[name] = values

    rewrite(tmp_path, spoil)
    with pytest.raises(weights.WeightsError, match=rf"{name} holds NaN or infinity"):
        weights.load(tmp_path)
    model = weights.load(tmp_path, check_finite=False)
    down = np.asarray(model.params["layers"]["mlp"]["down"]["kernel"], np.float32)
    assert not np.isfinite(down[2, -1, -1])
    with pytest.raises(weights.WeightsError, match="mlp/down/kernel is not finite"):
        weights.save(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_overflow_on_the_way_to_float16_is_named(folder):
    rewrite(
        folder,
        lambda t: t.update({"model.norm.weight": np.full(20, 1e6, np.float32)}),
    )
    with pytest.raises(weights.WeightsError, match="too large for float16"):
        weights.load(folder, dtype="float16")


class Bomb:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(folder, name):
    (folder / FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(weights.WeightsError, match=rf"pickled weights \({name}\)"):
        weights.load(folder)
    with pytest.raises(weights.WeightsError, match="pickled"):
        weights.convert(folder / name, folder / "out")


def test_a_pickle_named_safetensors_is_not_opened(folder):
    (folder / FILE).write_bytes(pickle.dumps(Bomb()) * 100)
    with pytest.raises(weights.WeightsError):
        weights.load(folder)


def test_empty_folder_says_what_it_looked_for(folder):
    (folder / FILE).unlink()
    with pytest.raises(weights.WeightsError, match=r"neither model\.safetensors nor"):
        weights.load(folder)


def test_missing_shard_and_lying_index(tmp_path):
    weights.save(build(CONFIGS["llama"]), tmp_path, max_shard_bytes=5000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = json.loads(json.dumps(index))
    names = sorted(set(wrong["weight_map"].values()))
    wrong["weight_map"]["model.norm.weight"] = names[0]
    path.write_text(json.dumps(wrong))
    with pytest.raises(weights.WeightsError, match=r"disagrees.*model\.norm\.weight"):
        weights.load(tmp_path)
    wrong["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    path.write_text(json.dumps(wrong))
    with pytest.raises(weights.WeightsError, match="outside its folder"):
        weights.load(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / names[1]).unlink()
    with pytest.raises(weights.WeightsError, match=rf"lacks {names[1]}"):
        weights.load(tmp_path)


def test_quantised_weights_are_refused(folder):
    name = "model.norm.weight"
    rewrite(folder, lambda t: t.update({name: np.zeros(20, np.int8)}))
    with pytest.raises(weights.WeightsError, match=rf"{name} has dtype I8"):
        weights.load(folder)


def test_folder_and_hub_names_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="give a folder or a hub name"):
        weights.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="give a folder or a hub name"):
        weights.load("./nowhere/at/all")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(weights.WeightsError, match="could not be fetched"):
        weights.load("nobody/no-such-model")


def test_config_json_missing_or_broken(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(weights.WeightsError, match=r"config\.json is not valid JSON"):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(weights.WeightsError, match=r"config\.json is missing"):
        weights.load(folder)
