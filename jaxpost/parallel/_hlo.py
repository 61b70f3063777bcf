"""What a compiled program sends between devices and multiplies, read off its text.

Knows XLA's HLO text as `compiled.as_text()` gives it, and nothing else. XLA's own cost
analysis counts the body of a loop once; here it counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?P<role>body|condition|calls|to_apply|branch_computations|true_computation|"
    r"false_computation|called_computations)=\{?(?P<names>%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
# Move or rename a whole array; what is kept of it is decided further on.
_PASSING = ("bitcast", "copy", "convert", "transpose", "reshape", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices.

    Fields:
        kind: one of `KINDS`. An `all-reduce` of which each device keeps only its part
            is a `reduce-scatter`: compilers for accelerators make it one, XLA's for
            CPUs does not.
        input_bytes: of one device's operands, each time.
        group: how many devices exchange with each other.
        times: how often a device runs it in one run of the program.
        bounded: False inside a loop whose length is not known; counted once there.
        where: the traced operation, for people.
    """

    kind: str
    input_bytes: int
    group: int
    times: int
    bounded: bool = True
    where: str = ""

    @property
    def sent_bytes(self) -> float:
        """What one device sends in one run of the program, by the ring algorithms."""
        others = self.group - 1
        share = {
            "all-gather": others,
            "collective-permute": 1,
            "collective-broadcast": 1,
            "all-reduce": 2 * others / self.group,
        }.get(self.kind, others / self.group)
        return share * self.input_bytes * self.times


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product of one device.

    Fields:
        flops: of one run of it, two per multiplication and addition.
        times, bounded, where: as of `Collective`.
    """

    flops: float
    times: int
    bounded: bool = True
    where: str = ""


@dataclasses.dataclass
class _Line:
    name: str
    opcode: str
    shape: str
    operands: list[str]
    inside: str
    attributes: str


@dataclasses.dataclass
class _Program:
    computations: dict[str, dict[str, _Line]]
    entry: str
    devices: int


def list_collectives(
    program: str, *, loops: Mapping[str, int] | None = None
) -> tuple[Collective, ...]:
    """Every collective that a compiled program runs between several devices.

    Args:
        program: HLO text of one compiled program.
        loops: how often loops run whose length the text does not tell: part of the
            traced operation's name to a count, the first that matches.

    Raises:
        ValueError: the text is no HLO module with an entry.
    """
    parsed = _parse(program)
    found = []
    for computation, times, bounded in _walk(parsed, loops or {}):
        lines = parsed.computations[computation]
        for line in lines.values():
            kind = line.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            group = _group(line, parsed.devices)
            if group < 2:
                continue
            # Several arrays may travel together; each has its own use.
            for number, operand in enumerate(line.operands):
                size = _bytes(lines[operand].shape)
                alone = len(line.operands) == 1
                result = line if alone else _element(lines, line.name, number)
                scattered = (
                    kind == "all-reduce"
                    and result is not None
                    and _kept(parsed, computation, result.name)
                    == _elements(lines[operand].shape) // group
                )
                found.append(
                    Collective(
                        "reduce-scatter" if scattered else kind,
                        size,
                        group,
                        times,
                        bounded,
                        _where(line),
                    )
                )
    return tuple(found)


def list_products(
    program: str, *, loops: Mapping[str, int] | None = None
) -> tuple[Product, ...]:
    """Every matrix product of one device; arguments as of `list_collectives`."""
    parsed = _parse(program)
    found = []
    for computation, times, bounded in _walk(parsed, loops or {}):
        lines = parsed.computations[computation]
        for line in lines.values():
            if line.opcode != "dot":
                continue
            left = _dimensions(lines[line.operands[0]].shape)
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
            axes = [int(axis) for axis in over[1].split(",") if axis] if over else []
            depth = math.prod(left[axis] for axis in axes)
            flops = 2.0 * _elements(line.shape) * depth
            found.append(Product(flops, times, bounded, _where(line)))
    return tuple(found)


def _parse(program: str) -> _Program:
    computations: dict[str, dict[str, _Line]] = {}
    entry, current = None, None
    for text in program.splitlines():
        if text.startswith("}"):
            current = None
        elif current is None:
            header = _HEADER.match(text)
            if header and not text.startswith("HloModule"):
                current = computations.setdefault(header["name"], {})
                entry = header["name"] if header["entry"] else entry
        elif line := _read_line(text):
            current[line.name] = line
    if entry is None:
        raise ValueError("this is no HLO module: there is no ENTRY computation.")
    head = program.split("\n", 1)[0]
    parts = [
        int(match[1]) if (match := re.search(rf"{name}=(\d+)", head)) else 1
        for name in ("num_partitions", "replica_count")
    ]
    return _Program(computations, entry, math.prod(parts))


def _read_line(text: str) -> _Line | None:
    match = _LINE.match(text)
    if not match:
        return None
    rest = re.sub(r"/\*.*?\*/", "", match["rest"])
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ") - 1
    shape, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    opcode, bracket, _ = rest.partition("(")
    if not bracket:
        return None
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    operands = _NAMES.findall(inside)
    return _Line(match["name"], opcode, shape, operands, inside, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _walk(
    program: _Program, loops: Mapping[str, int]
) -> Iterator[tuple[str, int, bool]]:
    """Each computation with how often it runs, once per place that calls it."""
    waiting = [(program.entry, 1, True)]
    while waiting:
        name, times, bounded = waiting.pop()
        yield name, times, bounded
        for line in program.computations[name].values():
            rounds, known = 1, True
            if line.opcode == "while":
                count = _rounds(line, loops)
                rounds, known = (1, False) if count is None else (count, True)
            for call in _CALLED.finditer(line.attributes):
                if line.opcode not in ("while", "conditional", "call", "fusion") and (
                    call["role"] == "to_apply"
                ):
                    continue  # the sum within a reduction
                for inner in _NAMES.findall(call["names"]):
                    if inner in program.computations and times * rounds:
                        waiting.append((inner, times * rounds, bounded and known))


def _rounds(line: _Line, loops: Mapping[str, int]) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
    if known:
        return int(known[1])
    where = _where(line)
    return next((count for part, count in loops.items() if part in where), None)


def _where(line: _Line) -> str:
    match = re.search(r'op_name="([^"]*)"', line.attributes)
    return match[1] if match else ""


def _group(line: _Line, devices: int) -> int:
    """How many devices exchange data with each other."""
    text = line.attributes
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = re.findall(r"(\d+),(\d+)", match[1])
        return 2 if any(a != b for a, b in pairs) else 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return match[1].count(",") + 1
    # A named mesh: `mesh['a'=4,'b'=2], device_ids=(...) {'a'}`, or `'a':(1)2`, a part.
    if match := re.search(r"replica_groups=@?\w*\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w.]+)'=(\d+)", match[1]))
        parts = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return devices


def _element(lines: dict[str, _Line], name: str, number: int) -> _Line | None:
    for line in lines.values():
        if (
            line.opcode == "get-tuple-element"
            and line.operands == [name]
            and re.search(rf"\bindex={number}\b", line.attributes)
        ):
            return line
    return None


def _kept(program: _Program, computation: str, name: str) -> int | None:
    """Elements of an array that are read, if only slices of one size are; else None."""
    lines = program.computations[computation]
    sizes: set[int | None] = set()
    for user in lines.values():
        if name not in user.operands:
            continue
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            sizes.add(_elements(user.shape))
        elif user.opcode in _PASSING:
            sizes.add(_kept(program, computation, user.name))
        elif user.opcode == "fusion":
            called = _CALLED.search(user.attributes)
            inner = called["names"].lstrip("%") if called else ""
            parameters = {
                int(line.inside): line.name
                for line in program.computations.get(inner, {}).values()
                if line.opcode == "parameter"
            }
            for number, operand in enumerate(user.operands):
                if operand == name:
                    sizes.add(
                        _kept(program, inner, parameters[number])
                        if number in parameters
                        else None
                    )
        else:
            sizes.add(None)
    return sizes.pop() if len(sizes) == 1 else None


def _dimensions(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []


def _elements(shape: str) -> int:
    return math.prod(_dimensions(shape))


def _bytes(shape: str) -> int:
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
        bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
        total += math.prod(int(s) for s in sizes.split(",") if s) * bits // 8
    return total
