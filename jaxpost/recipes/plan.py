"""What a run will cost each device, found out before there is a device.

`jaxpost plan CONFIG`, or `plan(config)`. The work is done by child processes, each
with as many virtual CPU devices as the run would have: JAX fixes their number when it
starts, and a compiler that dies takes only the child with it.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from jaxpost import parallel
from jaxpost.recipes import _config, _plan_report, _remedies
from jaxpost.recipes._config import ConfigError

STDERR_LINES = 5
REMATERIALISED = "involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """What a plan is for, besides the config.

    Attributes:
        devices: How many devices; what the config's mesh needs at least, if not given.
        chip: Of which kind: a100-40, a100, h100, h200, b200, v4, v5e, v5p or v6e. Gives
            a verdict on memory and the least time of a step; none plans for CPUs.
        vocab_size: Of a fresh model; the tokenizer's if not given.
        out: JSON file for the whole plan.
    """

    devices: int | None = None
    chip: str | None = None
    vocab_size: int | None = None
    out: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan and its verdict.

    Fields:
        name: of the run.
        forecast: bytes, operations and traffic of one step on one device.
        chip: what it was planned for, or None.
        roofline: the least time of a step on that chip, or None.
        fits: whether memory suffices with the margin; None without a chip.
        remedies: if it does not fit, changes that would make it fit; each was planned
            too.
        notes: what the compiler complained of.
    """

    name: str
    forecast: Any
    chip: parallel.Chip | None
    roofline: parallel.Roofline | None
    fits: bool | None
    remedies: tuple[_remedies.Remedy, ...] = ()
    notes: tuple[str, ...] = ()

    def to_mapping(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        values = dataclasses.asdict(self)
        memory = self.forecast.memory
        values["forecast"]["memory"] |= {"total": memory.total, "needed": memory.needed}
        return values


class PlanError(RuntimeError):
    """The child process that compiles ended without an answer."""


def plan(
    config: Any,
    *,
    devices: int | None = None,
    chip: str | None = None,
    vocab_size: int | None = None,
    folder: str | pathlib.Path = ".",
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Plans a run.

    Args:
        config: a recipe's config.
        devices: how many; None takes the product of the mesh's sizes.
        chip: name in `parallel.CHIPS`; None gives no verdict and no time.
        vocab_size: of a fresh model; None takes the tokenizer's.
        folder: where a relative `model.path` may also lie.
        tell: called with a line of progress before each compilation.

    Raises:
        ConfigError: the config cannot run on that many devices, or its recipe's step
            cannot be forecast yet.
        ValueError: an unknown chip.
        PlanError: the compiler died.
    """
    if config.recipe != "sft":
        raise ConfigError(
            f"plan forecasts the step of recipe sft only so far, not of {config.recipe}"
            ": pairs and a reference would be left out."
        )
    target = None if chip is None else parallel.find_chip(chip)
    count = _default_devices(config) if devices is None else devices
    if count < 1:
        raise ConfigError(f"--devices must be at least 1, got {count}.")
    asker = _Asker(config, vocab_size, pathlib.Path(folder), target is None, tell)
    forecast, notes = asker.compile(config, count)
    if target is None:
        return Plan(
            name=config.name,
            forecast=forecast,
            chip=None,
            roofline=None,
            fits=None,
            notes=notes,
        )
    fits = forecast.memory.needed <= target.hbm_bytes
    remedies = ()
    if not fits:
        tell(
            f"it needs {forecast.memory.needed / parallel.GB:.1f} GB of "
            f"{target.hbm_bytes / parallel.GB:.0f}; looking for what would fit"
        )
        remedies = _remedies.find_remedies(
            config, forecast, target.hbm_bytes, asker.exact, asker.compile
        )
    return Plan(
        name=config.name,
        forecast=forecast,
        chip=target,
        roofline=parallel.roofline(
            target,
            model_flops=forecast.model_flops,
            executed_flops=forecast.executed_flops,
            memory_bytes=forecast.memory_traffic,
            sent_bytes=sum(forecast.sent.values()),
        ),
        fits=fits,
        remedies=remedies,
        notes=notes,
    )


def run_plan(path: str | None, flags: Sequence[str]) -> Plan:
    """`jaxpost plan`: prints the report, and writes it as JSON if asked to.

    Args:
        path: the config; None shows the flags and ends the program.
        flags: those of `PlanFlags` and `--section.key value`.

    Raises:
        ValueError: as `plan`.
        ConfigError: the run does not fit; the message has the changes that would make
            it fit.
    """
    config, wanted = _read(path, flags)
    start = time.monotonic()

    def tell(line: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - start:5.1f} s] {line}\n")
        sys.stderr.flush()

    made = plan(
        config,
        devices=wanted.devices,
        chip=wanted.chip,
        vocab_size=wanted.vocab_size,
        folder=pathlib.Path(path or ".").parent,
        tell=tell,
    )
    if wanted.out is not None:
        text = json.dumps(made.to_mapping(), indent=2)
        pathlib.Path(wanted.out).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(_plan_report.write_report(made))
    sys.stdout.flush()
    if made.fits is False:
        raise ConfigError(_plan_report.write_refusal(made))
    return made


def _read(path: str | None, flags: Sequence[str]) -> tuple[Any, PlanFlags]:
    """The recipe's config and the plan's own flags, from one set of flags."""
    from jaxpost import recipes

    values = {} if path is None else _config.read_yaml(path)
    schema = recipes.config_type(values, path)
    both = dataclasses.make_dataclass(
        "PlanConfig", [], bases=(PlanFlags, schema), frozen=True
    )
    both.__doc__ = "A run's config, and what to plan it for."
    given = _config.from_mapping(both, values, where=str(path))
    given = _config.with_flags(given, flags, prog="jaxpost plan CONFIG")

    def part(kind: Any) -> Any:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(given, name) for name in names})

    return part(schema), part(PlanFlags)


def _default_devices(config: Any) -> int:
    mesh = config.mesh
    if mesh.devices is not None:
        return mesh.devices
    return math.prod(max(size, 1) for size in (mesh.data, mesh.fsdp, mesh.tensor))


class _Asker:
    """Starts child processes and reads their answers."""

    def __init__(
        self,
        config: Any,
        vocab_size: int | None,
        folder: pathlib.Path,
        on_cpu: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._shared = {
            "recipe": config.recipe,
            "vocab_size": vocab_size,
            "folder": str(folder.absolute()),
            "on_cpu": on_cpu,
        }
        self._tell = tell

    def compile(self, config: Any, devices: int) -> tuple[Any, tuple[str, ...]]:
        """A forecast, and what the compiler complained of."""
        from jaxpost.recipes._forecast import Forecast

        self._tell(
            f"compiling for {devices} virtual device{'s' if devices > 1 else ''}"
        )
        (found,), complaints = self._ask("compile", [config], devices)
        memory = parallel.Memory(**found.pop("memory"))
        notes = (
            ("the partitioner copies whole arrays to reshard them: " + REMATERIALISED,)
            if REMATERIALISED in complaints.lower()
            else ()
        )
        return Forecast(memory=memory, **found), notes

    def exact(self, configs: Sequence[Any]) -> list[parallel.Memory]:
        """Bytes that need no compiler; meshes of any size, each given in full."""
        found, _ = self._ask("exact", configs, 1)
        return [parallel.Memory(**one) for one in found]

    def _ask(
        self, what: str, configs: Sequence[Any], devices: int
    ) -> tuple[list[dict[str, Any]], str]:
        request = self._shared | {
            "what": what,
            "configs": [_config.to_mapping(config) for config in configs],
        }
        flags = f"--xla_force_host_platform_device_count={devices}"
        kept = {name: v for name, v in os.environ.items() if not _steers_jax(name)}
        environment = kept | {
            "JAX_PLATFORMS": "cpu",
            # Machine code is never run here, so it need not be good.
            "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
        }
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            child = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import answer; answer()"],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                check=False,
            )
            log.seek(0)
            complaints = log.read()
        try:
            found = json.loads(child.stdout)
        except ValueError:
            raise PlanError(_epitaph(child.returncode, complaints, devices)) from None
        if "error" in found:
            raise ConfigError(found["error"])
        return found["answers"], complaints


def _steers_jax(name: str) -> bool:
    """Whether a variable is about this process's devices or caches."""
    return name in ("XLA_FLAGS", "NPROC") or name.startswith(("JAX_", "LIBTPU_"))


def _epitaph(status: int, complaints: str, devices: int) -> str:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with {status}"
    if status == -9:
        how += " (was there too little memory on this machine?)"
    last = "\n".join(complaints.strip().splitlines()[-STDERR_LINES:])
    return (
        f"the process that compiles for {devices} virtual devices {how}. It said "
        f"last:\n{last or '(nothing)'}"
    )


def answer() -> None:
    """In the child: reads a request from standard input, prints its answer as JSON."""
    warnings.filterwarnings("ignore", "make_mesh", RuntimeWarning)  # nothing is run
    request = json.load(sys.stdin)
    try:
        found = {"answers": list(_answers(request))}
    except (ValueError, OSError, NotImplementedError) as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found))


def _answers(request: dict[str, Any]) -> Any:
    from jaxpost import recipes
    from jaxpost.recipes import _forecast

    schema = recipes.config_type(request, None)
    for values in request["configs"]:
        config = _config.from_mapping(schema, values)
        decoder = _forecast.model_config(
            config, request["vocab_size"], pathlib.Path(request["folder"])
        )
        if request["what"] == "exact":
            made = _forecast.exact_memory(config, decoder, on_cpu=request["on_cpu"])
        else:
            made = _forecast.make_forecast(config, decoder, on_cpu=request["on_cpu"])
        yield dataclasses.asdict(made)
