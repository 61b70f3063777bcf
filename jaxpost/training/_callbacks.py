"""What may listen to a run: the callback protocol, and trackers chosen by name."""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol


class Callback(Protocol):
    """Called by `train` on the first process only; steps are optimizer steps."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self, step: int) -> None: ...


class Tracker:
    """Sends numbers to a dashboard; made by `make_tracker`."""

    def __init__(self, log, finish) -> None:
        self._log = log
        self._finish = finish

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, {k: v for k, v in metrics.items() if _is_number(v)})

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self.on_log(step, metrics)

    def on_end(self, step: int) -> None:
        del step
        self._finish()


def make_tracker(
    name: str,
    folder: pathlib.Path | str,
    *,
    config: Mapping[str, Any] | None = None,
    project: str = "jaxpost",
) -> Tracker:
    """A callback for `tensorboard`, `wandb` or `trackio`; imports it only now.

    Args:
        name: which.
        folder: the run folder; its name is the run's name.
        config: shown beside the run.
        project: groups runs (`wandb`, `trackio`).

    Raises:
        ValueError: an unknown name.
        ImportError: the package is not installed; says which.
    """
    folder = pathlib.Path(folder)
    if name not in _TRACKERS:
        raise ValueError(
            f"tracker must be one of {', '.join(_TRACKERS)}; got {name!r}."
        )
    package = "tensorboardX" if name == "tensorboard" else name
    try:
        return _TRACKERS[name](folder, dict(config or {}), project)
    except ImportError as error:
        raise ImportError(
            f"tracker {name!r} needs the package {package!r}: pip install {package}"
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tensorboard(folder, config, project) -> Tracker:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    del config, project
    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step, metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(folder, config, project) -> Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.init(
        project=project,
        name=folder.name,
        dir=str(folder),
        config=config,
        resume="allow",
    )
    return Tracker(lambda step, metrics: run.log(metrics, step=step), run.finish)


def _trackio(folder, config, project) -> Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(project=project, name=folder.name, config=config)
    return Tracker(
        lambda step, metrics: trackio.log(metrics, step=step), trackio.finish
    )


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
