"""The key file of a watermark: the secret and the settings that detection shares."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from jaxpost.generation import watermark


@dataclasses.dataclass(frozen=True)
class KeyFile:
    """What `generate` and `detect` must agree on.

    Fields:
        key: the secret, its vocabulary and scheme.
        gamma, delta, tau: as in `watermark.processor`.
    """

    key: watermark.WatermarkKey
    gamma: float
    delta: float
    tau: float

    @property
    def record(self) -> dict[str, Any]:
        """What marked texts say of it; the secret stays out."""
        return {
            "scheme": self.key.scheme,
            "key": self.key.fingerprint,
            "gamma": self.gamma,
            "delta": self.delta,
            "tau": self.tau,
        }

    def check_record(self, record: Any, where: str) -> None:
        """Raises a ValueError if a text says that it was marked otherwise.

        Args:
            record: the text's column `watermark`; None passes.
            where: names the text.
        """
        if record is None:
            return
        own = self.record
        if not isinstance(record, dict) or "key" not in record:
            raise ValueError(
                f"{where}: its column 'watermark' must be an object as `jaxpost "
                f"watermark generate` writes it, got {record!r:.60}."
            )
        for name in ("scheme", "key", "gamma", "tau"):
            if record.get(name) != own[name]:
                raise ValueError(
                    f"{where}: marked with {name} {record.get(name)!r}, but the key "
                    f"file has {own[name]!r}: pass the key file that it was marked "
                    "with, or --ignore-record to test for this one's mark."
                )


def write_key_file(path: str | os.PathLike[str], content: KeyFile) -> None:
    """Writes a new key file that only its owner can read.

    Raises:
        FileExistsError: there is one; a secret is never written over.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "scheme": content.key.scheme,
        "secret": f"{content.key.secret:032x}",
        "vocab_size": content.key.vocab_size,
        "gamma": content.gamma,
        "delta": content.delta,
        "tau": content.tau,
    }
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2) + "\n")


def read_key_file(path: str | os.PathLike[str]) -> KeyFile:
    """Reads a key file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not such a file, or of another scheme.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such key file; `jaxpost watermark generate --key {path}` "
            "makes one with a fresh secret."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        secret = int(fields["secret"], 16)
        settings = {name: float(fields[name]) for name in ("gamma", "delta", "tau")}
        scheme, vocab_size = fields["scheme"], fields["vocab_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a watermark's key file ({error!r}): it needs scheme, secret, "
            "vocab_size, gamma, delta and tau."
        ) from error
    try:
        return KeyFile(watermark.WatermarkKey(secret, vocab_size, scheme), **settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_vocabulary(keys: KeyFile, vocab_size: int, where: str) -> None:
    """Raises a ValueError unless the key is for a tokenizer of so many ids."""
    if keys.key.vocab_size != vocab_size:
        raise ValueError(
            f"the key is for a vocabulary of {keys.key.vocab_size} ids, but {where} "
            f"has {vocab_size}: pass the tokenizer that the text was marked with."
        )
