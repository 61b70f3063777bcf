"""Text to token ids and back, with the special ids a trainer needs.

`tokenizer.json` is the authority: it is used as it stands, so the ids are those of the
`tokenizers` library and of every server that reads that file. Knows no rows.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpost.data._sources import is_hub_name, nearest
from jaxpost.prompts import CHAT_TEMPLATES

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its special ids.

    Fields:
        backend: the `tokenizers.Tokenizer`.
        bos_id: begins a text, or None.
        eos_ids: every id that ends a text, at least one; the first is the one appended.
        pad_id: fills up batches. May equal an end id: masks come from lengths.
        chat_template: Jinja text, or None.
        adds_bos: whether the tokenizer itself puts `bos_id` before plain text.
        config: what stood in `tokenizer_config.json`, to be saved again.
        name: folder or hub name, for messages.
    """

    backend: Any
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    chat_template: str | None = None
    adds_bos: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is put before or after it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, the characters `[start, end)` it stands for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        ids = [int(token) for token in ids]
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token: int) -> str:
        """The vocabulary's own spelling of one id, `<unused>` where it has none."""
        return self.backend.id_to_token(int(token)) or "<unused>"

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id plus one: what a model's embedding must hold."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens marked special, and of those named here."""
        added = self.backend.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        named = {*self.eos_ids, *([] if self.bos_id is None else [self.bos_id])}
        return frozenset(special | named)

    @functools.cached_property
    def _renderer(self) -> Any:
        """transformers' tokenizer, made for its chat templates only."""
        previous = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = (
            "1"  # no torch is no news here
        )
        try:
            from transformers import PreTrainedTokenizerFast
        finally:
            if previous is None:
                del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
            else:
                os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = previous
        bos = {} if self.bos_id is None else {"bos_token": self._spelling(self.bos_id)}
        return PreTrainedTokenizerFast(
            tokenizer_object=self.backend,
            eos_token=self._spelling(self.eos_ids[0]),
            pad_token=self._spelling(self.pad_id),
            **bos,
        )

    def _spelling(self, token: int) -> str:
        return self.backend.id_to_token(token)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        **template_options: Any,
    ) -> str:
        """A conversation as text, by the chat template.

        Args:
            messages: each `{"role", "content"}`.
            add_generation_prompt: end with what comes before an assistant's words.
            template_options: further variables of the template, such as `tools`.

        Raises:
            ValueError: there is no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                f"the tokenizer {self.name or '(unnamed)'} has no chat template, but "
                "the data are conversations; choose one with --data.chat-template "
                f"({', '.join(CHAT_TEMPLATES)}, or a .jinja file)."
            )
        import jinja2

        try:
            return self._renderer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_options,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another chat template.

        Args:
            template: the name of a built-in one, a `.jinja` file, or Jinja text.

        Raises:
            ValueError: it is none of these.
        """
        return dataclasses.replace(self, chat_template=_resolve_template(template))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into `folder`.

        The config names the class that reads `tokenizer.json` as it stands, in
        transformers 4 and 5 alike: `AutoTokenizer` gives the same ids.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        config = {
            **self.config,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._spelling(self.eos_ids[0]),
            "pad_token": self._spelling(self.pad_id),
            "clean_up_tokenization_spaces": False,
        }
        for key in ("auto_map", "chat_template"):
            config.pop(key, None)
        if self.bos_id is not None:
            config["bos_token"] = self._spelling(self.bos_id)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """sha256 of vocabulary, special ids and chat template, hexadecimal."""
        ids = (self.bos_id, self.eos_ids, self.pad_id, self.adds_bos)
        parts = (self.backend.to_str(), repr(ids), self.chat_template or "")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_tokenizer(
    path_or_name: str | os.PathLike[str],
    *,
    vocab_limit: int | None = None,
    chat_template: str | None = None,
    eos_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Loads a tokenizer in the Hugging Face layout; never runs code that comes with it.

    Special ids come from the tokenizer's own files, then `generation_config.json`, then
    `config.json` beside it. The ends of text are those of the tokenizer and of the
    generation config together; the model config is asked only if both name none.

    Args:
        path_or_name: a folder with `tokenizer.json`, that file itself, or a hub name.
        vocab_limit: rows of the model's embedding; a larger vocabulary is an error.
        chat_template: replaces the tokenizer's own: a built-in name, a `.jinja` file or
            Jinja text.
        eos_tokens: further tokens that end a text, such as `("<|im_end|>",)`; they
            come first.

    Raises:
        FileNotFoundError: no `tokenizer.json` there.
        ValueError: no end-of-sequence id anywhere, an id outside the vocabulary, an
            unknown token, or a vocabulary over `vocab_limit`.
    """
    from tokenizers import Tokenizer as Backend

    name = os.fspath(path_or_name)
    folder = _find_folder(name)
    # The Rust library raises bare `Exception`, so the JSON is checked before it.
    _read_json(folder / "tokenizer.json")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    config = _read_json(folder / "tokenizer_config.json")
    own = _own_specials(folder, config, backend)
    if chat_template is None:
        chat_template = _find_template(folder, config)
    tokenizer = make_tokenizer(
        backend,
        own,
        _read_json(folder / "generation_config.json"),
        _model_config(folder),
        eos_tokens=eos_tokens,
        chat_template=chat_template,
        config=config,
        name=name,
    )
    if vocab_limit is not None:
        check_vocab(tokenizer, vocab_limit)
    return tokenizer


def make_tokenizer(
    backend: Any,
    *sources: Mapping[str, Any],
    eos_tokens: Sequence[str] = (),
    chat_template: str | None = None,
    config: Mapping[str, Any] | None = None,
    name: str = "",
) -> Tokenizer:
    """A `Tokenizer` of a `tokenizers.Tokenizer` and where its special ids stand.

    Args:
        backend: the `tokenizers.Tokenizer`.
        sources: mappings with `bos_token_id`, `eos_token_id` (one or a list) and
            `pad_token_id`, in order of precedence: tokenizer, generation config, model
            config.
        eos_tokens: further tokens that end a text; they come first.
        chat_template: a built-in name, a `.jinja` file or Jinja text.
        config: what `save` writes along in `tokenizer_config.json`.
        name: for messages.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    extra = [_id_of(token, vocabulary, name) for token in eos_tokens]
    found = [_eos_of(source) for source in sources]
    eos = [token for ids in found[:2] for token in ids] or [
        token for ids in found[2:] for token in ids
    ]
    eos_ids = tuple(dict.fromkeys([*extra, *eos]))
    if not eos_ids:
        raise ValueError(
            f"the tokenizer {name or '(unnamed)'} names no end-of-sequence token, and "
            "neither do generation_config.json and config.json beside it; name one "
            "with --data.eos-tokens, or write eos_token_id into generation_config.json."
        )
    bos_id = _first(sources, "bos_token_id")
    pad_id = _first(sources, "pad_token_id")
    pad_id = eos_ids[0] if pad_id is None or pad_id < 0 else pad_id
    for key, token in [
        *(("eos", token) for token in eos_ids),
        ("bos", bos_id),
        ("pad", pad_id),
    ]:
        if token is not None and backend.id_to_token(token) is None:
            raise ValueError(
                f"{key}_token_id {token} of {name or 'the tokenizer'} is not in its "
                f"vocabulary of {size}; correct it in generation_config.json or "
                "config.json."
            )
    marked = backend.encode("a", add_special_tokens=True).ids
    return Tokenizer(
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        pad_id=pad_id,
        chat_template=None
        if chat_template is None
        else _resolve_template(chat_template),
        adds_bos=bos_id is not None and marked[:1] == [bos_id],
        config=dict(config or {}),
        name=name,
    )


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Refuses a tokenizer with more ids than the model has embedding rows.

    Raises:
        ValueError: the tokenizer's largest id has no row.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name or '(unnamed)'} has {tokenizer.vocab_size} "
            f"ids, but the model's embedding has only {model_vocab_size} rows; use the "
            "tokenizer that came with the model, or build the model with vocab_size="
            f"{tokenizer.vocab_size} or more."
        )


def _find_folder(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_file() and path.name == "tokenizer.json":
        return path.parent
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return path
        raise FileNotFoundError(
            f"{name}: no tokenizer.json in this folder; save one there with "
            "`PreTrainedTokenizerFast.save_pretrained` (a tokenizer.model alone must "
            "be converted first)."
        )
    if path.exists() or not is_hub_name(name):
        raise FileNotFoundError(
            f"{name}: not a folder with tokenizer.json, nor a hub name owner/name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no local folder of that name, and the hub has no tokenizer to "
            f"give ({str(error).splitlines()[0]})."
        ) from error
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{name}: the hub repository holds no tokenizer.json.")
    return folder


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected.")
    return value


def _model_config(folder: pathlib.Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _own_specials(
    folder: pathlib.Path, config: Mapping[str, Any], backend: Any
) -> dict[str, int]:
    named = {**_read_json(folder / "special_tokens_map.json"), **config}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    ids = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            ids[f"{key}_id"] = _id_of(token, vocabulary, str(folder))
    return ids


def _id_of(token: str, vocabulary: Mapping[str, int], name: str) -> int:
    if token not in vocabulary:
        raise ValueError(
            f"the token {token!r} is not in the vocabulary of {name or 'the tokenizer'}"
            f"{nearest(token, vocabulary)}; correct tokenizer_config.json or the "
            "setting that names it."
        )
    return vocabulary[token]


def _eos_of(source: Mapping[str, Any]) -> list[int]:
    value = source.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and token >= 0]


def _first(sources: Sequence[Mapping[str, Any]], key: str) -> int | None:
    found = (source[key] for source in sources if source.get(key) is not None)
    return next(found, None)


def _find_template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    template = template or _read_json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def _resolve_template(template: str) -> str:
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template]
    if "{%" in template or "{{" in template:
        return template
    path = pathlib.Path(template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise ValueError(
        f"chat template {template!r} is neither a built-in "
        f"({', '.join(CHAT_TEMPLATES)}){nearest(template, CHAT_TEMPLATES)}, nor a "
        "file, nor Jinja text."
    )
