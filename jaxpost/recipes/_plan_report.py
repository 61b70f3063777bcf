"""A plan as text."""

from typing import Any

from jaxpost import parallel

WIDTH = 34


def write_report(plan: Any) -> str:
    """The whole plan, one figure a line."""
    forecast, memory = plan.forecast, plan.forecast.memory
    mesh = ", ".join(f"{axis}: {size}" for axis, size in forecast.mesh.items())
    trained = forecast.parameters - forecast.trained
    frozen = f", of which {forecast.trained:,} are trained" if trained else ""
    target = "CPUs" if plan.chip is None else f"{plan.chip.name} chips"
    lines = [
        f"{plan.name}: {forecast.model}, {forecast.parameters:,} parameters{frozen}",
        f"{forecast.devices} x {target}, mesh {{{mesh}}}, computed in "
        f"{forecast.compute_dtype}",
        f"{forecast.tokens:,} tokens a step in rows of {forecast.row_tokens:,}; "
        f"{forecast.programs} program{'s' if forecast.programs > 1 else ''} to compile",
        "",
        "memory of one device",
        _row("parameters", _gb(memory.parameters)),
        _row("gradients", _gb(memory.gradients)),
        _row("optimizer moments", _gb(memory.moments)),
    ]
    if memory.frozen:
        lines.append(_row("frozen parameters", _gb(memory.frozen)))
    lines += [
        _row("other state", _gb(memory.other)),
        _row("batch", _gb(memory.batch)),
        _row("activations and temporaries", f"{_gb(memory.temporaries)}  estimate"),
        _row("total", _gb(memory.total) + _verdict(plan)),
        _row("logits avoided", f"{_gb(forecast.logits_avoided)}  never stored"),
        "",
        "one step of one device",
        _row("model FLOPs", f"{forecast.model_flops:10.2e}"),
        _row("executed FLOPs", f"{forecast.executed_flops:10.2e}  with recomputation"),
    ]
    for kind, sent in forecast.sent.items():
        lines.append(_row(f"sent by {kind}", _gb(sent)))
    if plan.roofline is not None:
        lines += ["", *_times(plan)]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines) + "\n"


def write_refusal(plan: Any) -> str:
    """Why a plan is refused, and what would fit."""
    memory, chip = plan.forecast.memory, plan.chip
    text = (
        f"{plan.name} does not fit: {_short(memory.total)} and "
        f"{100 * parallel.MARGIN:.0f}% to spare are {_short(memory.needed)} on each "
        f"device; a {chip.name} has {_short(chip.hbm_bytes)}."
    )
    if not plan.remedies:
        return (
            f"{text} No change that a plan tries makes it fit; parameters, gradients, "
            f"moments and batch alone take {_short(memory.exact)}."
        )
    tried = "\n".join(
        f"  {remedy.flags}   ({_short(remedy.total)})" for remedy in plan.remedies
    )
    return f"{text} What would fit:\n{tried}"


def _times(plan: Any) -> list[str]:
    forecast, roofline, chip = plan.forecast, plan.roofline, plan.chip
    limits = (
        ("compute", roofline.compute_s),
        ("memory", roofline.memory_s),
        ("links", roofline.link_s),
    )
    lines = [f"least time of a step on {chip.name}, all overlapping"]
    lines += [_row(name, f"{1e3 * seconds:10.1f} ms") for name, seconds in limits]
    speed = forecast.tokens / roofline.step_s
    lines.append(
        f"at least {1e3 * roofline.step_s:.1f} ms, limited by {roofline.limit}: "
        f"{speed:,.0f} tokens/s and {100 * roofline.utilisation:.0f}% model-FLOP "
        "utilisation at most"
    )
    if forecast.devices > chip.linked:
        lines.append(
            f"note: {chip.linked} {chip.name} chips share fast links; over the network "
            "between them, sending takes longer"
        )
    return lines


def _verdict(plan: Any) -> str:
    if plan.chip is None:
        return ""
    memory, has = plan.forecast.memory, plan.chip.hbm_bytes
    verdict = "fits" if plan.fits else "does not fit"
    return (
        f"  {verdict} {_short(has)}: {_short(memory.needed)} with "
        f"{100 * parallel.MARGIN:.0f}% to spare"
    )


def _row(name: str, value: str) -> str:
    return f"  {name:<{WIDTH}}{value}"


def _gb(count: float) -> str:
    return f"{count / parallel.GB:10.3f} GB"


def _short(count: float) -> str:
    return f"{count / parallel.GB:.1f} GB"
