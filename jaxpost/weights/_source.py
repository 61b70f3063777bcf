"""Where weights come from: a checkpoint's tensors by Hugging Face name, read by rows.

Finds the safetensors files of a folder or of a hub repository. Pickled weights are
never opened: unpickling runs whatever code the file holds.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from jaxpost.weights._errors import WeightsError, listed
from jaxpost.weights._safetensors import SafetensorsFile

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a hub repository is asked for; its pickled files are never fetched.
_HUB_PATTERNS = [
    *("*.safetensors", INDEX_NAME, "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.*", "vocab.json", "merges.txt"),
    *("tokenizer.model", "README.md", "LICENSE*"),
]


class TensorSource(Protocol):
    """Tensors by name, read a block of rows at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the first axis, a new array."""
        ...

    def place(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...


class SafetensorsFolder:
    """The tensors of one or several open safetensors files."""

    def __init__(self, files: list[SafetensorsFile]):
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._file_of:
                    raise WeightsError(
                        f"tensor {name} is both in {self._file_of[name].path} and in "
                        f"{file.path}."
                    )
                self._file_of[name] = file
        self.shapes = {
            name: file.tensors[name].shape for name, file in self._file_of.items()
        }

    def dtype(self, name: str) -> np.dtype:
        return self._file_of[name].dtype(name)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._file_of[name].read_rows(name, start, stop)

    def place(self, name: str) -> str:
        return str(self._file_of[name].path)


@contextlib.contextmanager
def open_folder(folder: pathlib.Path) -> Iterator[SafetensorsFolder]:
    """Open the weights of a local folder.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the
            files it names.

    Raises:
        WeightsError: neither is there (pickled files are refused by name), a file is
            damaged, or index and files disagree.
    """
    paths, index = _weight_files(folder)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in paths]
        source = SafetensorsFolder(files)
        if index is not None:
            _check_index(folder, index, source)
        yield source


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object.")
    return value


def resolve(path_or_hub_name: str | os.PathLike[str]) -> pathlib.Path:
    """The local folder of a path, or of a hub repository after fetching it.

    Args:
        path_or_hub_name: a folder, or `owner/name` with an optional `@revision`.

    Returns:
        An existing folder.

    Raises:
        FileNotFoundError: there is no such folder and the name is no hub name.
        WeightsError: the hub cannot be reached, or has no such repository.
    """
    path = pathlib.Path(path_or_hub_name)
    if path.is_dir():
        return path
    name = str(path_or_hub_name)
    if path.exists():
        raise WeightsError(
            f"{path} is a file; give the folder that holds config.json and "
            f"{WEIGHTS_NAME}."
        )
    if not isinstance(path_or_hub_name, str) or not _is_hub_name(name):
        raise FileNotFoundError(
            f"no folder {name!r}; give a folder or a hub name (owner/name)."
        )
    return _download(name)


def _is_hub_name(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return bool(slash and owner.strip(".~") and rest) and "/" not in rest


def _download(name: str) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_HUB_PATTERNS
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise WeightsError(
            f"{name!r} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Check the name and the connection, or "
            "copy the repository here and give its folder."
        ) from error
    return pathlib.Path(folder)


def _weight_files(
    folder: pathlib.Path,
) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """Files to open, and the index's map from tensor to file name."""
    if (folder / INDEX_NAME).is_file():
        index = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise WeightsError(f"{folder / INDEX_NAME} has no weight_map.")
        names = sorted({str(name) for name in index.values()})
        # An index may come from anywhere; it must not lead out of its folder.
        if odd := [name for name in names if pathlib.PurePath(name).name != name]:
            raise WeightsError(
                f"{folder / INDEX_NAME} names files outside its folder: {listed(odd)}."
            )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise WeightsError(
                f"{folder} lacks {listed(missing)}, which {INDEX_NAME} names; copy or "
                "download the missing files."
            )
        return [folder / name for name in names], index
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME], None
    present = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in present if name.endswith(_PICKLED)]
    if pickled:
        raise WeightsError(
            f"{folder} holds only pickled weights ({listed(pickled)}); opening them "
            "can run any code, so jaxpost does not. Convert them to safetensors where "
            "they can be trusted (transformers: save_pretrained), or fetch a revision "
            "that has safetensors."
        )
    raise WeightsError(
        f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; it holds "
        f"{listed(present) or 'nothing'}."
    )


def _check_index(
    folder: pathlib.Path, index: Mapping[str, str], source: SafetensorsFolder
) -> None:
    wrong = [
        f"{name} (not in {file})"
        for name, file in index.items()
        if name not in source.shapes or pathlib.Path(source.place(name)).name != file
    ]
    if wrong:
        raise WeightsError(
            f"{folder / INDEX_NAME} disagrees with its files: {listed(wrong)}."
        )
