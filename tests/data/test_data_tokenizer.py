"""Tokenizers: special ids and where they come from, saving, sizes, templates."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxpost import data


@pytest.fixture
def folder(tmp_path, byte_tokenizer):
    """A folder with a tokenizer.json and the JSON files given."""

    def make(**files):
        (tmp_path / "tokenizer.json").write_text(byte_tokenizer.backend.to_str())
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


OWN = {"eos_token": "<|endoftext|>"}


def test_ids_come_from_the_tokenizer_first(folder):
    made = data.load_tokenizer(
        folder(
            tokenizer_config={
                "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
                "pad_token": "<|endoftext|>",
            },
            config={"eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 9},
        )
    )
    assert (made.bos_id, made.eos_ids, made.pad_id) == (1, (2,), 0)


def test_ends_of_the_generation_config_join_in(folder):
    place = folder(
        tokenizer_config=OWN,
        generation_config={"eos_token_id": [2, 0], "pad_token_id": 5},
        config={"eos_token_id": 7},
    )
    made = data.load_tokenizer(place)
    assert made.eos_ids == (0, 2)
    assert made.pad_id == 5
    named = data.load_tokenizer(place, eos_tokens=("<|im_end|>",))
    assert named.eos_ids == (2, 0)


def test_the_model_config_is_the_last_resort(folder):
    made = data.load_tokenizer(folder(config={"text_config": {"eos_token_id": [2, 1]}}))
    assert made.eos_ids == (2, 1)
    assert made.pad_id == 2  # nothing else: masks come from lengths anyway
    assert made.bos_id is None


def test_special_tokens_map(folder):
    assert data.load_tokenizer(folder(special_tokens_map=OWN)).eos_ids == (0,)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "names no end-of-sequence token"),
        ({"tokenizer_config": {"eos_token": "<|im_ent|>"}}, "did you mean '<|im_end|>"),
        (
            {"config": {"eos_token_id": 9999}},
            "eos_token_id 9999 .* is not in its vocab",
        ),
        (
            {"config": {"eos_token_id": 0, "bos_token_id": 999}},
            "bos_token_id 999 .* is not in its vocabulary",
        ),
        ({"config": [1]}, "a JSON object is expected"),
    ],
)
def test_bad_special_ids(folder, files, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        data.load_tokenizer(folder(**files))


def test_bad_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in this folder"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder with"):
        data.load_tokenizer(tmp_path / "gone" / "far" / "off")
    place = folder(tokenizer_config=OWN)
    assert data.load_tokenizer(place / "tokenizer.json").eos_ids == (0,)
    (place / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not valid JSON"):
        data.load_tokenizer(place)


def test_vocabulary_larger_than_the_embedding(folder, byte_tokenizer):
    size = byte_tokenizer.vocab_size
    place = folder(tokenizer_config=OWN)
    assert data.load_tokenizer(place, vocab_limit=size).vocab_size == size
    message = rf"has {size} ids, but the model's embedding has only {size - 1} rows"
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(place, vocab_limit=size - 1)
    with pytest.raises(ValueError, match=message):
        data.check_vocab(byte_tokenizer, size - 1)


def test_vocab_size_counts_to_the_largest_id():
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 41}, unk_token="<unk>"))
    assert data.make_tokenizer(backend, {"eos_token_id": 0}).vocab_size == 42


def test_truncation_and_padding_of_the_file_are_off(byte_tokenizer):
    backend = Backend.from_str(byte_tokenizer.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    made = data.make_tokenizer(backend, {"eos_token_id": 0})
    text = "Hello world, how are you today?"
    assert made.encode(text) == byte_tokenizer.encode(text)


def test_bos_is_seen_in_the_tokenizers_own_behaviour(bos_tokenizer, byte_tokenizer):
    assert bos_tokenizer.adds_bos
    assert not byte_tokenizer.adds_bos
    assert bos_tokenizer.encode("a")[:1] != [1]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer", "word_tokenizer"])
def test_saved_and_loaded_again(kind, request, tmp_path):
    from transformers import AutoTokenizer

    made = request.getfixturevalue(kind)
    made.save(tmp_path)
    again = data.load_tokenizer(tmp_path)
    assert (again.eos_ids[0], again.pad_id) == (made.eos_ids[0], made.pad_id)
    assert again.chat_template == made.chat_template
    assert again.adds_bos == made.adds_bos
    text = "Hello world, how are you?"
    assert again.encode(text) == made.encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == made.encode(text)
    assert theirs.eos_token_id == made.eos_ids[0]


def test_fingerprint_sees_every_part(byte_tokenizer, bos_tokenizer):
    plain = byte_tokenizer.with_chat_template("plain")
    prints = {t.fingerprint() for t in (byte_tokenizer, bos_tokenizer, plain)}
    assert len(prints) == 3
    assert byte_tokenizer.fingerprint() in prints


def test_templates(byte_tokenizer, folder, tmp_path):
    ask = [{"role": "user", "content": "hi"}]
    text = byte_tokenizer.render(ask, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    plain = byte_tokenizer.with_chat_template("plain")
    assert plain.render(ask, add_generation_prompt=True) == "User: hi\nAssistant:"
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert byte_tokenizer.with_chat_template(str(own)).render(ask) == "[hi]"
    with pytest.raises(ValueError, match="neither a built-in .*did you mean 'chatml'"):
        byte_tokenizer.with_chat_template("chatm")
    bad = byte_tokenizer.with_chat_template("{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="the chat template refuses it: no system"):
        bad.render(ask)
    place = folder(tokenizer_config=OWN)
    bare = data.load_tokenizer(place)
    assert bare.chat_template is None
    with pytest.raises(ValueError, match=r"no chat template.*--data\.chat-template"):
        bare.render(ask)


def test_where_templates_are_found(folder):
    place = folder(tokenizer_config={**OWN, "chat_template": "{{ 1 }}"})
    assert data.load_tokenizer(place).chat_template == "{{ 1 }}"
    assert "im_start" in str(
        data.load_tokenizer(place, chat_template="chatml").chat_template
    )
    named = [{"name": "tool_use", "template": "{{ 2 }}"}]
    place = folder(tokenizer_config={**OWN, "chat_template": named})
    assert data.load_tokenizer(place).chat_template is None
    named.append({"name": "default", "template": "{{ 3 }}"})
    place = folder(tokenizer_config={**OWN, "chat_template": named})
    assert data.load_tokenizer(place).chat_template == "{{ 3 }}"
    place = folder(tokenizer_config=OWN, chat_template={"chat_template": "{{ 4 }}"})
    assert data.load_tokenizer(place).chat_template == "{{ 4 }}"
    (place / "chat_template.jinja").write_text("{{ 5 }}")
    assert data.load_tokenizer(place).chat_template == "{{ 5 }}"


def test_hub_name_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def refuse(name, allow_patterns):
        assert "tokenizer.json" in allow_patterns
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"owner/name: no local .*\(no route\)"):
        data.load_tokenizer("owner/name")


def test_stories260k(shared_data):
    place = shared_data / "weights" / "stories260K"
    made = data.load_tokenizer(place, vocab_limit=512)
    assert (made.bos_id, made.eos_ids, made.adds_bos) == (1, (2,), True)
    reference = json.loads((place / "reference.json").read_text(encoding="utf-8"))
    assert [1, *made.encode(reference["probe_text"])] == reference["probe_ids"]
    assert (
        made.decode(reference["probe_ids"], skip_special=True)
        == (reference["probe_text"])
    )


def test_phi3(shared_data, tmp_path):
    from transformers import AutoTokenizer

    made = data.load_tokenizer(shared_data / "tokenizers" / "phi3_mini")
    assert made.encode("Hello world") == [15043, 3186]
    assert (made.bos_id, made.eos_ids, made.pad_id) == (1, (32000,), 32000)
    assert made.vocab_size == 32011
    assert not made.adds_bos
    made.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    text = made.render(messages, add_generation_prompt=True)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == made.encode(text) == [32010, 6324, 32007, 32001]
