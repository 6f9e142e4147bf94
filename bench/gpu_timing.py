"""Timing on a GPU: events, graph replays, contenders that take turns, clocks, and a section's rows and time.

Every call is a contender of a case. One that raises becomes a row that says so, and the others go on; a
section that is out of time says so for the cases it leaves out. On CPU tensors (the tests) the same code runs
without graphs.
"""

import contextlib
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from bench import measure

Call = Callable[[], object]
Maker = Callable[[], Call]  # makes a contender's tensors and gives back what is timed
Rounds = list[list[float]]  # seconds of single calls, by round


class Missing(Exception):
    """A contender that this machine does not have; its text is the row's note."""


class DeviceLost(Exception):
    """The CUDA context no longer answers: this process can measure nothing more."""


def one_line(error: BaseException, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    if "pinned but cannot run this call: " in text:  # no fault: this path is not for these arguments
        return f"refused: {text.split('cannot run this call: ')[1][:limit]}"
    return f"failed: {type(error).__name__}: {text[:limit]}"


# --- calls -----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def warm(call: Call, device: torch.device, times: int = 3) -> None:
    """Runs `call`, on a GPU on the stream that graphs are captured on: compiles, loads, takes workspaces."""
    if device.type != "cuda":
        call()
        return
    stream = _capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device)


def captured(call: Call, device: torch.device) -> Call:
    """`call`, warmed up and captured in a CUDA graph: the replay, free of Python and of launches.

    torch.cuda.graph empties the allocator's cache at each capture; here there are some hundred. No garbage is
    collected within one: what it destroys may not be destroyed while a stream is captured.
    """
    warm(call, device)
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    gc.collect(0)
    gc.disable()
    try:
        with torch.cuda.stream(_capture_stream(device)):
            graph.capture_begin()
            try:
                call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is void; the call's error is the news
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        gc.enable()
    synchronize(device)
    return graph.replay


# --- turns -----------------------------------------------------------------------------------------------


def _spans(call: Call, times: int, device: torch.device) -> Callable[[], list[float]]:
    """Starts `times` calls; what it returns waits for them and gives the seconds of each."""
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(times):
            call()
            stamps.append(time.perf_counter())
        return lambda: [after - before for before, after in pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()

    def wait() -> list[float]:
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]

    return wait


def interleave(
    calls: dict[str, Call],
    device: torch.device,
    *,
    rounds: int = 10,
    turn_seconds: float = 0.02,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Rounds]:
    """The seconds of single calls, by contender and round.

    In a round each has a turn, in an order that moves on by one: a call that is not timed, then as many timed
    ones as fit `turn_seconds` (1 to 20). `watch` is called while the GPU is at work on a turn.
    """
    times = {}
    for name, call in calls.items():
        once = statistics.median(_spans(call, 3, device)())
        times[name] = max(1, min(20, int(turn_seconds / max(once, 1e-7))))
    samples: dict[str, Rounds] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds if names else 0):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            calls[name]()
            wait = _spans(calls[name], times[name], device)
            watch()
            samples[name].append(wait())
    return samples


def flat(rounds: Rounds) -> list[float]:
    return [seconds for turn in rounds for seconds in turn]


def ratios(slower: Rounds, faster: Rounds) -> list[float]:
    """How many times faster, round by round: what a slow spell does to both cancels."""
    return [statistics.median(s) / statistics.median(f) for s, f in zip(slower, faster, strict=True)]


# --- clocks ----------------------------------------------------------------------------------------------


def clock_reader() -> Callable[[], tuple[int, int]] | None:
    """Reads the SM and memory clock in MHz, at the cost of a call; None without NVML's Python package."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(measure.gpu_uuid())
        read = functools.partial(pynvml.nvmlDeviceGetClockInfo, handle)
        kinds = pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM
        read(kinds[0])
    except Exception:  # no package, no driver, or one that does not tell: the CSV says "-"
        return None
    return lambda: (read(kinds[0]), read(kinds[1]))


# --- a section -------------------------------------------------------------------------------------------


@dataclass
class Section:
    """What a section is given, and the rows it has so far."""

    name: str  # of the CSV
    device: torch.device
    folder: Path
    deadline: float = float("inf")  # of time.monotonic()
    rounds: int = 10
    copy_bandwidth: float = float("nan")  # bytes/s, read and written
    skip: dict[tuple[str, str], str] = field(default_factory=dict)  # (case, contender) to why it must not run
    rows: list[measure.Row] = field(default_factory=list)
    done: set[str] = field(default_factory=set)  # cases whose rows are complete
    case: str = ""
    clocks: list[tuple[int, int]] = field(default_factory=list)
    read_clocks: Callable[[], tuple[int, int]] | None = None
    progress: Path | None = None  # a file that says what is run now, for whoever waits

    def watch(self) -> None:
        self.tell("all")
        if self.read_clocks is not None:
            self.clocks.append(self.read_clocks())

    def add(self, contender: str, metric: str, unit: str, samples: Iterable[float], note: str = "") -> None:
        """A figure of the case begun last."""
        self.rows.append(measure.row(self.case, contender, metric, unit, samples, note))

    def none(self, contender: str, why: str) -> None:
        """The row of a contender that has no figure."""
        self.add(contender, "none", "", [], why)

    def tell(self, contender: str, why: str = "failed: it hung") -> None:
        """Says what runs now, and what is to be written of it when it never ends."""
        if self.progress is not None:
            self.progress.write_text(json.dumps([self.case, contender, why]))

    def begin(self, case: str) -> bool:
        """Starts a case and writes those before it; False when it is done already, or time is up."""
        self.finish()
        self.case = case
        if case in self.done:
            return False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the graphs of the case before held
        why = self.skip.get((case, "all"))
        if why is None and time.monotonic() >= self.deadline:
            why = "not measured: the section's time was up"
        if why is not None:
            self.none("all", why)
        return why is None

    def finish(self) -> None:
        """The case begun last is complete: its rows are on disk."""
        if self.case and self.case not in self.done:
            self.done.add(self.case)
            self.write()

    def give_up(self) -> None:
        """The case begun last has no rows: it has to be begun again, in another process."""
        self.rows = [row for row in self.rows if row.case in self.done]

    @contextlib.contextmanager
    def attempt(self, contender: str) -> Iterator[None]:
        """A contender's own errors become its row. Raises DeviceLost when the GPU does not survive them."""
        self.tell(contender)
        try:
            yield
        except Missing as error:
            self.none(contender, str(error))
        except Exception as error:
            self.none(contender, one_line(error))
            try:
                synchronize(self.device)
            except Exception as lost:
                self.tell(contender, one_line(error))
                raise DeviceLost(f"{self.case}: {contender}: {one_line(error)}") from lost

    def make(self, makers: dict[str, Maker], check: Callable[[str, Call], None] | None = None):
        """The contenders that could be made, ran, and passed `check`."""
        calls: dict[str, Call] = {}
        for name, maker in makers.items():
            if (self.case, name) in self.skip:
                self.none(name, self.skip[self.case, name])
                continue
            with self.attempt(name):
                call = maker()
                warm(call, self.device, times=1)
                if check is not None:
                    check(name, call)
                calls[name] = call
        return calls

    def capture(self, calls: dict[str, Call]) -> dict[str, Call]:
        """Those of `calls` that can be captured, as replays."""
        replays: dict[str, Call] = {}
        for name, call in calls.items():
            with self.attempt(name):
                replays[name] = captured(call, self.device)
        return replays

    def interleave(self, calls: dict[str, Call], turn_seconds: float = 0.02) -> dict[str, Rounds]:
        with self.attempt("all"):
            return interleave(
                calls, self.device, rounds=self.rounds, turn_seconds=turn_seconds, watch=self.watch
            )
        return {}

    def write(self) -> None:
        where = dict(_environment(self.device.type))
        if self.device.type == "cuda":
            sm, memory = zip(*self.clocks, strict=True) if self.clocks else ((), ())
            if self.clocks:  # while it measured, in place of this moment's
                where |= {"sm_mhz": f"{statistics.median(sm):.0f}", "memory_mhz": f"{max(memory)}"}
            where["sm_mhz_range"] = f"{min(sm)}-{max(sm)}" if self.clocks else "-"
        measure.write_csv(self.folder / f"{self.name}.csv", self.name, self.rows, where)


@functools.cache
def _environment(device: str) -> dict[str, str]:
    return measure.environment(device)
