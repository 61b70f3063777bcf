"""What the clnr recipe leaves behind: JSON, a table, embeddings, a picture of them."""

import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost import graphs

_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)


class EmbeddingFile(NamedTuple):
    """What `load_embeddings` reads.

    Fields:
        embeddings: float32 `[N, D]`.
        nodes: names, or numbers, of the nodes in the order of the rows, `[N]`.
        dataset: what was embedded, as it was named.
    """

    embeddings: np.ndarray
    nodes: np.ndarray
    dataset: str


def save_embeddings(
    path: str | os.PathLike, embeddings: Any, data: graphs.NodeData, *, dataset: str
) -> pathlib.Path:
    """Writes `embeddings` `[N, D]`, `nodes` `[N]` in the same order, and `dataset`.

    `nodes` are the source's names, or numbers from 0 if it has none. Whole or not at
    all.

    Raises:
        ValueError: the name does not end in `.npz`, or the rows are not the nodes.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the name must end in .npz.")
    rows = np.asarray(embeddings, np.float32)
    if rows.shape[0] != data.node_count:
        raise ValueError(
            f"{rows.shape[0]} embeddings for {data.node_count} nodes of {data.name}."
        )
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, embeddings=rows, nodes=names_of(data), dataset=np.str_(dataset))
    part.replace(path)
    return path


def load_embeddings(path: str | os.PathLike) -> EmbeddingFile:
    """Reads what `save_embeddings` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no `.npz`, or lacks an array.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with np.load(path, allow_pickle=False) as held:
            return EmbeddingFile(
                held["embeddings"], held["nodes"], str(held["dataset"])
            )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: holds no embeddings ({error}); `jaxpost graph embed` writes such "
            "files."
        ) from error


def in_order_of(file: EmbeddingFile, data: graphs.NodeData) -> np.ndarray:
    """The file's rows in the data set's order of nodes, `[N, D]`.

    Raises:
        ValueError: the two do not have the same nodes; names the first that is missing.
    """
    wanted = names_of(data)
    if np.array_equal(file.nodes, wanted):
        return file.embeddings
    place = {name: row for row, name in enumerate(file.nodes.tolist())}
    missing = [name for name in wanted.tolist() if name not in place]
    if missing or len(place) != len(wanted):
        first = f"node {missing[0]!r} has none" if missing else "some are of no node"
        raise ValueError(
            f"{len(file.nodes)} embeddings of {file.dataset}, but {data.name} has "
            f"{len(wanted)} nodes: {first}."
        )
    return file.embeddings[[place[name] for name in wanted.tolist()]]


def names_of(data: graphs.NodeData) -> np.ndarray:
    """Names of the nodes, or their numbers, `[N]`."""
    if data.node_names is None:
        return np.arange(data.node_count)
    return np.array(data.node_names, np.str_)


def fingerprint(data: graphs.NodeData) -> str:
    """Of everything a run reads, for `environment.json`."""
    digest = hashlib.sha256()
    features = graphs.features_of(data.graph)
    parts: list[Any] = [*graphs.edges_of(data.graph), data.labels]
    if isinstance(features, graphs.SparseFeatures):
        parts += [features.values, features.rows, features.columns]
    else:
        parts.append(features)
    for part in (*parts, *(data.masks or {}).values()):
        if part is not None:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def write(path: pathlib.Path, config: Any, data: graphs.NodeData, found: Any) -> None:
    """`results.json`, `clnr.md`, `embeddings.npz`, a plot, and lines on the screen."""
    import rich.console

    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False)
    results = as_json(found)
    _write(path / "results.json", json.dumps(results, indent=2) + "\n")
    text = table(results)
    _write(path / "clnr.md", text)
    console.print(text)
    for seed, columns in enumerate(found.constant):
        if columns:
            shown = ", ".join(map(str, columns[:8])) + (", ..." if columns[8:] else "")
            console.print(
                f"warning: {len(columns)} embedding columns of seed {seed} are the "
                f"same for all nodes ({shown}): dead units. Lower "
                "train.learning_rate, or set objective.eps (such as 1e-6)."
            )
    save_embeddings(path / "embeddings.npz", found.first, data, dataset=config.dataset)
    if config.embed.plot != "none":
        picture = plot(found.first, data.labels, kind=config.embed.plot)
        (path / "embeddings.svg").write_bytes(picture)
    console.print(f"wrote {path}/results.json, clnr.md, embeddings.npz")


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def as_json(found: Any) -> dict[str, Any]:
    """Lists with a number per seed."""
    results = {
        "alignment": found.alignment.tolist(),
        "uniformity": found.uniformity.tolist(),
    }
    if found.probe is not None:
        names = ("accuracy", "clean", "optimistic", "last", "validation", "epoch")
        results = {
            name: np.asarray(getattr(found.probe, name)).tolist() for name in names
        } | results
    return results


_ROWS = {
    "clean": "test accuracy, first epoch with the best validation accuracy",
    "optimistic": "test accuracy, published rule (looks at the test nodes)",
    "last": "test accuracy, last epoch",
    "validation": "best validation accuracy",
    "alignment": "alignment of two views",
    "uniformity": "uniformity of two views",
}


def table(results: dict[str, Any]) -> str:
    """Markdown: mean, standard deviation and error over the seeds."""
    lines = ["| | mean | std | standard error | seeds |", "|---|---|---|---|---|"]
    for name, shown in _ROWS.items():
        if name not in results:
            continue
        mean, std, error = spread(results[name])
        lines.append(
            f"| {shown} | {mean:.4f} | {std:.4f} | {error:.4f} | {len(results[name])} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, sample standard deviation and standard error; NaN for one value."""
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return float(array.mean()), float("nan"), float("nan")
    std = float(array.std(ddof=1))
    return float(array.mean()), std, std / float(np.sqrt(array.size))


def need_plotting(kind: str) -> None:
    """Before hours of training, not after.

    Raises:
        ImportError: a library that the plot needs is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the plot needs matplotlib: pip install 'jaxpost[report]'"
        ) from error
    if kind == "tsne":
        _tsne_class()


def _tsne_class() -> Any:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "t-SNE needs scikit-learn: pip install 'jaxpost[graphs]', or plot "
            "principal components (pca)"
        ) from error
    return TSNE


def plane(embeddings: Any, *, kind: str) -> np.ndarray:
    """Embeddings in the plane, float64 `[N, 2]`.

    Args:
        embeddings: `[N, D]`.
        kind: "pca", the two first principal components; or "tsne", scikit-learn's
            t-SNE from there.

    Raises:
        ValueError: another kind.
        ImportError: scikit-learn is not installed.
    """
    rows = np.asarray(embeddings, np.float64)
    if kind == "pca":
        centred = rows - rows.mean(axis=0)
        _, vectors = np.linalg.eigh(centred.T @ centred)
        return centred @ vectors[:, :-3:-1]
    if kind == "tsne":
        made = _tsne_class()(init="pca", random_state=0)
        return np.asarray(made.fit_transform(rows), np.float64)
    raise ValueError(f"kind must be pca or tsne, got {kind!r}.")


def plot(embeddings: Any, labels: np.ndarray | None, *, kind: str) -> bytes:
    """An SVG of `plane`, coloured by class; nodes without one are grey.

    Raises:
        ValueError, ImportError: see `plane`.
    """
    from matplotlib.figure import Figure

    points = plane(embeddings, kind=kind)
    figure = Figure(figsize=(6.0, 5.0))
    axes = figure.add_subplot()
    labels = np.full(len(points), -1) if labels is None else labels
    for name in np.unique(labels):
        rows = points[labels == name]
        color = "#bbbbbb" if name < 0 else _COLORS[name % len(_COLORS)]
        shown = "no class" if name < 0 else f"class {name}"
        axes.plot(*rows.T, ".", markersize=3, color=color, label=shown)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(markerscale=3, fontsize="small")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode("utf-8")
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).encode("utf-8")
