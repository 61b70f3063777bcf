"""The host's side of `generate_stream`: admits prompts, takes answers back."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxpost.generation._cache_rows import CacheAxes
from jaxpost.generation._config import SamplerPlan, SamplerValues
from jaxpost.generation._decode import Functions, decoding_params
from jaxpost.generation._generate import bucket_length
from jaxpost.generation._processors import Processor, ProcessorPlan
from jaxpost.generation._slot_state import (
    FULL,
    STOPPED,
    WAITING,
    Admission,
    Orders,
    Report,
    Sizes,
    open_slots,
)
from jaxpost.generation._slots import admit, collect, serve
from jaxpost.typing import Params


class Finished(NamedTuple):
    """One answer and its statistics; NumPy arrays of its length `n`.

    Fields:
        prompt, sample: which prompt, and which of its samples.
        tokens: int32 `[n]`, the stop token included.
        logps, sampling_logps, entropies: of each token, nats, float32 `[n]`; as in
            `Rollout`.
        finish_reason: `"stop"` (stop token), `"length"`, or `"cut"` (by `stop`).
        near: draws of this answer within 1e-5 of another token, which rounding might
            have tipped; see `generate_stream`.
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    logps: np.ndarray
    sampling_logps: np.ndarray
    entropies: np.ndarray
    finish_reason: Literal["stop", "length", "cut"]
    near: int


@dataclasses.dataclass
class StreamStats:
    """Sums so far.

    Fields:
        sequences, new_tokens, near: of the answers yielded; see `Finished`.
        steps: decoding steps, each for all slots.
        busy: slots that decoded, summed over steps.
        slots: how many there are.
    """

    sequences: int = 0
    new_tokens: int = 0
    near: int = 0
    steps: int = 0
    busy: int = 0
    slots: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the slots that decoded, on average over steps."""
        return self.busy / (self.steps * self.slots) if self.steps else 0.0


Stop = Callable[[list[int]], int | None]
"""Answer so far to its final number of tokens, or None to go on."""


class Ask(NamedTuple):
    """What to answer, checked.

    Fields:
        prompts: int32 arrays.
        limits: int32 `[prompts]`.
        ids: uint32 `[prompts, G]`.
        samples: `G`.
    """

    prompts: list[np.ndarray]
    limits: np.ndarray
    ids: np.ndarray
    samples: int


class Programs(NamedTuple):
    """The compiled programs' arguments that stay the same."""

    functions: Functions
    params: Params
    plan: SamplerPlan
    values: SamplerValues
    processors: tuple[Processor, ...]
    sizes: Sizes
    axes: CacheAxes
    cache_dtype: Any
    key: jax.Array
    placement: Any


class _Live(NamedTuple):
    """A sequence that has a record; `since` is the first report that knows it."""

    prompt: int
    sample: int
    since: int


class Server:
    """The host's side of one stream: gives records and rows out, and takes them back.

    With `overlap`, a call of `serve` is under way while the report of the one before
    is read.
    """

    def __init__(
        self,
        programs: Programs,
        ask: Ask,
        refill_every: int,
        stop: Stop | None,
        stats: StreamStats,
    ):
        self.programs, self.ask, self.stop, self.stats = programs, ask, stop, stats
        self.refill_every = refill_every
        self.overlap = 0 if stop else 1
        sizes = programs.sizes
        self.next_prompt = 0
        self.tail = 0  # sequences put into the ring so far
        self.calls = 0  # of `serve`
        self.free_rows = collections.deque(range(sizes.rows))
        self.free_records = collections.deque(range(sizes.records))
        # Rows in use, with what `tail` was once their last sequence was in the ring.
        self.rows: collections.deque[tuple[int, int]] = collections.deque()
        self.live: dict[int, _Live] = {}
        self.dropped = np.zeros((sizes.records,), np.bool_)

    def run(self) -> Iterator[Finished]:
        programs = self.programs
        self.decoding = decoding_params(programs.functions.restore(), programs.params)
        self.state = open_slots(
            programs.functions,
            programs.params,
            programs.key,
            sizes=programs.sizes,
            cache_dtype=programs.cache_dtype,
            with_context=bool(programs.processors),
            placement=programs.placement,
        )
        reports: collections.deque[tuple[int, Report]] = collections.deque()
        asked: list[tuple[list, Any]] = []
        while self.next_prompt < len(self.ask.prompts) or self.live:
            while self._admit():
                pass
            reports.append((self.calls, self._serve()))
            self.calls += 1
            if len(reports) > self.overlap:
                ready, asked = asked, self._read(*reports.popleft())
                if not self.overlap:
                    ready, asked = asked, []
                for part in ready:
                    yield from self._finish(*part)
        for part in asked:
            yield from self._finish(*part)

    def _admit(self) -> bool:
        """Queue a group of prompts if there is room; False if not."""
        sizes, ask = self.programs.sizes, self.ask
        most = max(sizes.rows // 2, 1)
        count = min(most, len(ask.prompts) - self.next_prompt)
        sequences = count * ask.samples
        if not count or len(self.free_rows) < count:
            return False
        if len(self.free_records) < sequences:
            return False
        numbers = range(self.next_prompt, self.next_prompt + count)
        width = max(len(ask.prompts[number]) for number in numbers)
        width = min(bucket_length(width), sizes.width)
        group = Admission(
            tokens=np.zeros((most, width), np.int32),
            lengths=np.zeros((most,), np.int32),
            rows=np.full((most,), sizes.rows, np.int32),
            places=np.full((most * ask.samples,), sizes.entries, np.int32),
            row=np.zeros((most * ask.samples,), np.int32),
            record=np.full((most * ask.samples,), sizes.records, np.int32),
            limit=np.ones((most * ask.samples,), np.int32),
            ids=np.zeros((most * ask.samples,), np.uint32),
        )
        for place, number in enumerate(numbers):
            prompt, row = ask.prompts[number], self.free_rows.popleft()
            group.tokens[place, : len(prompt)] = prompt
            group.lengths[place], group.rows[place] = len(prompt), row
            for sample in range(ask.samples):
                entry = place * ask.samples + sample
                record = self.free_records.popleft()
                self.live[record] = _Live(number, sample, self.calls)
                group.places[entry] = self.tail % sizes.entries
                group.row[entry], group.record[entry] = row, record
                group.limit[entry] = ask.limits[number]
                group.ids[entry] = ask.ids[number, sample]
                self.tail += 1
            self.rows.append((self.tail, row))
        self.next_prompt += count
        self.state = admit(
            self.programs.functions,
            self.programs.params,
            self.state,
            group,
            self.programs.key,
            axes=self.programs.axes,
            cache_dtype=self.programs.cache_dtype,
            placement=self.programs.placement,
        )
        return True

    def _serve(self) -> Report:
        """Dispatch a call of `serve`; does not wait for it."""
        programs = self.programs
        orders = Orders(
            steps=np.int32(self.refill_every),
            tail=np.int32(self.tail),
            more=np.bool_(self.next_prompt < len(self.ask.prompts)),
            dropped=self.dropped.copy(),
        )
        self.dropped[:] = False
        processing, arrays = ProcessorPlan.of(programs.processors)
        self.state, report = serve(
            programs.functions,
            self.decoding,
            self.state,
            orders,
            programs.values,
            arrays,
            plan=programs.plan,
            processing=processing,
            axes=programs.axes,
            watched=self.stop is not None,
            placement=programs.placement,
        )
        for leaf in report:
            leaf.copy_to_host_async()
        return report

    def _read(self, call: int, report: Report) -> list[tuple[list, Any]]:
        """Wait for a report; ask for the answers that it says are finished."""
        report = jax.device_get(report)
        self.stats.steps += int(report.steps)
        self.stats.busy += int(report.busy)
        while self.rows and self.rows[0][0] <= report.head:
            self.free_rows.append(self.rows.popleft()[1])
        done = []
        for record, live in list(self.live.items()):
            if live.since > call:
                continue
            status, length = int(report.status[record]), int(report.lengths[record])
            cut = None
            if self.stop is not None and length:
                cut = self.stop(report.tokens[record, :length].tolist())
            if status == WAITING and cut is None:
                continue
            if status == WAITING:
                self.dropped[record] = True
            length = length if cut is None else min(cut, length)
            reason = "cut" if cut is not None else _REASONS[status]
            done.append((record, live, length, reason))
            del self.live[record]
        return [
            self._collect(done[begin : begin + self.programs.sizes.slots])
            for begin in range(0, len(done), self.programs.sizes.slots)
        ]

    def _collect(self, done: list) -> tuple[list, Any]:
        """Dispatch the hand-over of some records, which are free from now on."""
        rows = np.zeros((self.programs.sizes.slots,), np.int32)
        rows[: len(done)] = [record for record, *_ in done]
        arrays = collect(self.state.records, rows)
        for array in arrays:
            array.copy_to_host_async()
        # Whoever is admitted next writes them only after they were read: the device
        # keeps the order of calls.
        self.free_records.extend(record for record, *_ in done)
        return done, arrays

    def _finish(self, done: list, arrays: Any) -> Iterator[Finished]:
        tokens, numbers, near = jax.device_get(arrays)
        for place, (_, live, length, reason) in enumerate(done):
            logps, sampling_logps, entropies = numbers[place, :length].T.copy()
            yield Finished(
                live.prompt,
                live.sample,
                tokens[place, :length].copy(),
                logps,
                sampling_logps,
                entropies,
                reason,
                int(near[place]),
            )


_REASONS: dict[int, Literal["stop", "length"]] = {STOPPED: "stop", FULL: "length"}
