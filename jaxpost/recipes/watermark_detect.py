"""Is a text watermarked? `jaxpost watermark detect`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from tyro.conf import Positional

from jaxpost import data, reports, weights
from jaxpost.generation import watermark
from jaxpost.recipes._watermark_key import KeyFile, check_vocabulary, read_key_file
from jaxpost.recipes._watermark_texts import (
    Document,
    add_entropies,
    folder_of,
    read_documents,
    token_pieces,
)

PAGE = "watermark.html"


@dataclasses.dataclass(frozen=True)
class WatermarkDetectConfig:
    """Test the texts of a file for a watermark.

    Attributes:
        file: A text file, or JSONL rows with `completion` or `text` and perhaps
            `prompt` and ids, as `jaxpost watermark generate` writes them.
        key: Key file that the texts were marked with.
        model: Folder or hub name of the generating model, or of a surrogate with the
            same tokenizer; it supplies the entropies.
        entropies: JSON file with a list of entropies per text, instead of a model.
        tokenizer: Folder or hub name of the tokenizer, if not with the model.
        prompt: What stood before the text, of a file that is one text.
        without_prompts: Test rows as if their prompts were not known.
        retokenize: Encode texts again even where rows have their ids.
        ignore_record: Test rows that say they were marked with another key.
        z_threshold: The z that a watermark must exceed.
        unique: Score only the first of equal pairs of tokens.
        windows: Also look for the part of each text that shows the mark most.
        sliding: Scored tokens of the windows drawn in the HTML page.
        show: Texts to print with coloured tokens.
        json: Print JSON lines instead.
        tokens: Put every token into the JSON lines.
        out: Run folder for `detections.jsonl` and `watermark.html`.
        page: Which text the HTML page shows, from 0.
        limit: Texts to read at most.
        batch_tokens: Tokens read together, padding included.
        dtype: Data type of the model's weights.
    """

    file: Positional[str]
    key: str
    model: str | None = None
    entropies: str | None = None
    tokenizer: str | None = None
    prompt: str | None = None
    without_prompts: bool = False
    retokenize: bool = False
    ignore_record: bool = False
    z_threshold: float = 4.0
    unique: bool = False
    windows: bool = False
    sliding: int = 50
    show: int = 3
    json: bool = False
    tokens: bool = False
    out: str | None = None
    page: int = 0
    limit: int | None = None
    batch_tokens: int = 8192
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Tested:
    """A document, its detection, and its best window if that was looked for."""

    document: Document
    detection: watermark.Detection
    window: watermark.Window | None


def run_watermark_detect(config: WatermarkDetectConfig) -> list[dict[str, Any]]:
    """Tests texts, and prints or writes what was found.

    Args:
        config: the settings.

    Returns:
        One dictionary per text, as in the JSON lines.

    Raises:
        ValueError: neither a model nor entropies are given, and the key's tau needs
            them; the tokenizer is not that of the key; a text says that it was marked
            with another key; a text has nothing to score; and as `read_documents`.
    """
    keys = read_key_file(config.key)
    if config.model is None and config.entropies is None and keys.tau >= 0.0:
        raise ValueError(
            "SWEET detection needs the generating model's entropies; pass --model or "
            "--entropies."
        )
    if config.model is None and config.tokenizer is None:
        raise ValueError("without --model, pass --tokenizer.")
    words = data.load_tokenizer(config.tokenizer or str(config.model))
    check_vocabulary(keys, words.vocab_size, "the tokenizer")
    documents = read_documents(
        config.file,
        words,
        prompt=config.prompt,
        use_prompts=not config.without_prompts,
        retokenize=config.retokenize,
        entropies=config.entropies,
        limit=config.limit,
    )
    for document in documents:
        if not config.ignore_record:
            keys.check_record(document.record, document.name)
        if len(document.ids) <= document.prompt_length:
            raise ValueError(f"{document.name}: nothing to score, the text is empty.")
    if config.entropies is None and config.model is not None and keys.tau >= 0.0:
        model = weights.load(config.model, dtype=jnp.dtype(config.dtype))
        data.check_vocab(words, model.config.vocab_size)
        documents = add_entropies(documents, model, batch_tokens=config.batch_tokens)
    tested = [
        _test(document, keys, config.z_threshold, config.unique, config.windows)
        for document in documents
    ]
    lines = [_line(one, keys, words, config.tokens) for one in tested]
    _show(tested, lines, words, config)
    if config.out is not None:
        _write(tested, lines, keys, words, config)
    return lines


def _test(
    document: Document, keys: KeyFile, z_threshold: float, unique: bool, windows: bool
) -> Tested:
    found = watermark.detect(
        document.ids,
        document.entropies,
        document.prompt_length,
        keys.key,
        gamma=keys.gamma,
        tau=keys.tau,
        z_threshold=z_threshold,
        unique=unique,
    )
    window = None
    if windows:
        marks = watermark.TokenMarks(*(array[None] for array in found.marks))
        (window,) = watermark.best_windows(marks, gamma=keys.gamma)
    return Tested(document, found, window)


def _line(
    tested: Tested, keys: KeyFile, words: data.Tokenizer, with_tokens: bool
) -> dict[str, Any]:
    found = dataclasses.asdict(tested.detection)
    del found["marks"]
    window = tested.window
    line = {
        "name": tested.document.name,
        **found,
        "prediction": tested.detection.prediction,
        "tokens": len(tested.document.ids) - tested.document.prompt_length,
        "notes": list(tested.document.notes),
        "watermark": keys.record,
        "window": None if window is None else window._asdict(),
    }
    if with_tokens:
        line["token_table"] = _token_table(tested, words)
    return line


def _token_table(tested: Tested, words: data.Tokenizer) -> list[dict[str, Any]]:
    """Each token of the text, not the prompt's."""
    document, marks = tested.document, tested.detection.marks
    entropies = document.entropies
    pieces = token_pieces(words, document.ids.tolist())
    return [
        {
            "place": place,
            "id": int(document.ids[place]),
            "text": pieces[place],
            "entropy": None if entropies is None else round(float(entropies[place]), 5),
            "scored": bool(marks.scored[place]),
            "green": bool(marks.green[place]),
            "near": bool(marks.near[place]),
        }
        for place in range(document.prompt_length, len(document.ids))
    ]


def kinds(tested: Tested) -> list[reports.TokenKind]:
    """What to colour each token as."""
    marks = tested.detection.marks
    return [
        "prompt"
        if place < tested.document.prompt_length
        else "unscored"
        if not marks.scored[place]
        else "green"
        if marks.green[place]
        else "red"
        for place in range(len(tested.document.ids))
    ]


_STYLES = {
    "green": "black on green",
    "red": "black on red",
    "unscored": "dim",
    "prompt": "dim italic",
}


def coloured(tested: Tested, words: data.Tokenizer) -> Any:
    """The text for a terminal: a `rich.text.Text`."""
    import rich.text

    text = rich.text.Text()
    pieces = token_pieces(words, tested.document.ids.tolist())
    for piece, kind in zip(pieces, kinds(tested), strict=True):
        # Control characters could move the cursor or hide what comes after them.
        shown = "".join(
            c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece
        )
        text.append(shown, _STYLES[kind])
    return text


def _show(
    tested: Sequence[Tested],
    lines: Sequence[dict[str, Any]],
    words: data.Tokenizer,
    config: WatermarkDetectConfig,
) -> None:
    if config.json:
        for line in lines:
            sys.stdout.write(json.dumps(line) + "\n")
        return
    import rich.console

    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False)
    for one in tested[: config.show]:
        console.print(one.document.name, style="bold")
        console.print(coloured(one, words))
        _say(console, one)
    for one in tested[config.show :]:
        console.print(f"{one.document.name}: {one.detection.verdict}", end="; ")
        console.print(f"z = {one.detection.z:.2f}")
    if len(tested) > 1:
        names = [one.detection.verdict for one in tested]
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted({*names}))
        console.print(f"{len(tested)} texts: {counts}")


def _say(console: Any, one: Tested) -> None:
    found = one.detection
    style = {"watermarked": "bold green", "not detected": "bold"}
    console.print(
        f"{found.verdict}: {found.reason}", style=style.get(found.verdict, "yellow")
    )
    console.print(
        f"z = {found.z:.2f}, p = {found.p:.2g} (exact {found.p_exact:.2g}); "
        f"{found.green} of {found.scored} scored tokens are green, "
        f"{found.watermarked_fraction:.0%} of the text is scored"
    )
    if found.near:
        console.print(
            f"{found.near} tokens have an entropy within 1e-4 nats of tau: decoding "
            "may have decided otherwise there",
            style="yellow",
        )
    if one.window is not None:
        w = one.window
        console.print(
            f"most conspicuous: tokens {w.start} to {w.end}, {w.green} of {w.scored} "
            f"scored ones are green, z = {w.z:.2f}; p = {w.p:.2g} counting all "
            f"{w.windows} windows"
        )
    for note in one.document.notes:
        console.print(f"warning: {note}", style="yellow")


def _write(
    tested: Sequence[Tested],
    lines: Sequence[dict[str, Any]],
    keys: KeyFile,
    words: data.Tokenizer,
    config: WatermarkDetectConfig,
) -> None:
    """The run folder: every text's line, and one text's page."""
    if not 0 <= config.page < len(tested):
        raise ValueError(
            f"--page {config.page} is none of the {len(tested)} texts; from 0."
        )
    folder = folder_of(str(config.out))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "detections.jsonl").write_text(text, encoding="utf-8")
    one = tested[config.page]
    found, document = one.detection, one.document
    pieces = token_pieces(words, document.ids.tolist())
    table = _token_table(one, words)
    columns = [{"id": str(i)} for i in document.ids[: document.prompt_length]]
    columns += [
        {
            "id": str(row["id"]),
            "entropy": "" if row["entropy"] is None else f"{row['entropy']:.4f}",
            "green": "yes" if row["green"] else "no",
        }
        for row in table
    ]
    shown = [
        reports.ShownToken(piece, kind, row)
        for piece, kind, row in zip(pieces, kinds(one), columns, strict=True)
    ]
    marks = watermark.TokenMarks(*(array[None] for array in found.marks))
    sliding = watermark.sliding_z(marks, gamma=keys.gamma, size=config.sliding)[0]
    facts = {
        **{name: str(value) for name, value in keys.record.items()},
        "z": f"{found.z:.3f} (threshold {config.z_threshold})",
        "p": f"{found.p:.3g} (exact {found.p_exact:.3g})",
        "scored tokens": f"{found.scored} of {len(table)}",
        "green tokens": f"{found.green} ({found.green_fraction:.1%})",
        "within 1e-4 nats of tau": str(found.near),
    }
    reports.write_watermark_page(
        folder / PAGE,
        title=f"Watermark test: {document.name}",
        verdict=f"{found.verdict}: {found.reason}",
        facts=facts,
        tokens=shown,
        notes=document.notes,
        sliding=sliding.tolist(),
        threshold=config.z_threshold,
    )
