"""Where the time of a training step goes: train itself under torch.profiler, its events added up by op.

The same few steps run three times: to warm up, timed as they are, and profiled. An event's own time goes to
the outermost op of ours around it (an autograd function or a raw op), else to its name in torch; what of the
measured time no event covers is Python, the Trainer and the waiting between ops, and is shown as that. So
the rows add up to the step. On a GPU it is the time of the kernels that is added up.
"""

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_engine.train import progress
from peft_engine.train.data import read_rows
from peft_engine.train.probe import InTurn
from peft_engine.train.run import NAME, prepare, tokenized
from peft_engine.train.settings import RunSettings

HOST = "Python, the Trainer"
MODULE = "module "  # before the name of a range that one of our hooks opens
OURS = re.compile(r"peft_engine::(\w+?)(?:_forward|_backward)?$|_([A-Z]\w*?)(?:Backward)?$")
ENGINE = "autograd::engine::evaluate_function: "
NAMES = {"frozen": "dense", "deferred": "lazy_logits"}


def profile(settings: RunSettings, steps: int, say: Callable[[str], None], trace: Path) -> dict[str, Any]:
    """Milliseconds of a step by op and by kind of layer; writes the events to `trace`."""
    documents = tokenized(settings, read_rows(settings.data))[0]
    from peft_engine.train import trainer

    say(f"Model: {settings.model}, {settings.method}")
    model, report = prepare(settings, None)
    size, loop = settings.loop.batch_size, settings.loop
    wanted = steps * loop.gradient_accumulation_steps
    batches = [rows for rows, _ in zip(trainer.order(model, documents, loop), range(wanted), strict=False)]
    batches = [rows for rows in batches if len(rows) == size] or batches[:1]
    batches = [batches[i % len(batches)] for i in range(wanted)]
    rows = InTurn([documents[i] for batch in batches for i in batch])
    loop = replace(
        loop, max_steps=3 * steps, batch_size=len(batches[0]), eval_steps=None, save_steps=3 * steps,
        warmup_ratio=0.0,
    )  # fmt: skip
    say(f"Profiling {steps} steps of {loop.batch_size} rows, after as many to warm up and as many timed")
    with progress.bar("Profiling", 3 * steps) as bar, tempfile.TemporaryDirectory() as output:
        clock = _Clock(model, steps, bar.update)
        outcome = trainer.train(model, rows, Path(output), loop, name=NAME, watch=clock.watch, say=say)
    clock.profiler.export_chrome_trace(str(trace))
    found = _added_up(clock.profiler.events(), clock.profiled / steps, steps)
    layers = [line for line in report.layers if not line.fused]
    return found | {
        "step_ms": 1e3 * clock.plain / steps,
        "profiled_step_ms": 1e3 * clock.profiled / steps,
        "steps": steps,
        "tokens": outcome.tokens // (3 * steps),
        "method": settings.method,
        "model": settings.model,
        "not_fused": [{"name": line.name, "kind": line.kind, "reason": line.reason} for line in layers],
    }


class _Clock:
    """Watches the steps: times the second third, profiles the last."""

    def __init__(self, model: Any, steps: int, tell: Callable[[int], None]):
        import torch

        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.model, self.steps, self.tell = model, steps, tell
        self.plain = self.profiled = self.since = 0.0

    def watch(self, outcome: Any, total: int, eval_loss: float | None) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, done = time.perf_counter(), outcome.steps
        if done == 2 * self.steps:
            self.plain = now - self.since
            self.hooks = _ranges(self.model)
            self.profiler.start()
        elif done == 3 * self.steps:
            self.profiled = now - self.since
            self.profiler.stop()
            for hook in self.hooks:
                hook.remove()
        self.tell(done)
        if done % self.steps == 0:
            self.since = time.perf_counter()


def _ranges(model: Any) -> list[Any]:
    """Hooks that mark the forward of each module by the last part of its name; a layer's, by its class."""
    import torch

    hooks = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if not module._parameters and type(modules[parent]).__module__.startswith("peft_engine."):
            continue  # an activation that a fused layer passes by, unless somebody watches it
        kind = type(module).__name__ if not last or last.isdigit() else last
        opened: list[Any] = []

        def before(module, args, kind=kind, opened=opened):
            opened.append(torch.profiler.record_function(MODULE + kind))
            opened[-1].__enter__()

        def after(module, args, output, opened=opened):
            opened.pop().__exit__(None, None, None)

        hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(after))
    return hooks


# --- adding up ----------------------------------------------------------------------------------------------


def _added_up(events: Any, step: float, steps: int) -> dict[str, Any]:
    """The events' own times, in ms a step, by op and by kind of layer; `step`: seconds of one, profiled."""
    import torch

    gpu = torch.cuda.is_available()
    ops: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    layers: dict[tuple[str, str], float] = defaultdict(float)
    layer_of = {
        event.sequence_nr: _layer(event)
        for event in events
        if event.sequence_nr >= 0 and _phase(event) == "forward" and _layer(event)
    }
    for event in events:
        on_device = event.device_type != torch.autograd.DeviceType.CPU  # its op has its time already
        if event.name.startswith(MODULE) or on_device:
            continue
        own = (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3 / steps
        (name, called), phase = _op(event), _phase(event)
        ops[name, phase][0] += own
        ops[name, phase][1] += called / steps
        kind = layer_of.get(_sequence(event)) if phase == "backward" else _layer(event)
        layers[kind or f"no layer, {phase}", phase] += own
    rest = 1e3 * step - sum(ms for ms, _ in ops.values())
    rows: list[dict[str, Any]] = [
        {"op": n, "phase": p, "ms": ms, "calls": round(c, 1)} for (n, p), (ms, c) in ops.items()
    ]
    rows.append({"op": HOST, "phase": "host", "ms": rest, "calls": None})
    by_layer: list[dict[str, Any]] = [{"layer": n, "phase": p, "ms": ms} for (n, p), ms in layers.items()]
    by_layer.append({"layer": HOST, "phase": "host", "ms": rest})
    for row in (*rows, *by_layer):
        row["share"] = row["ms"] / (1e3 * step)
    return {
        "ops": sorted(rows, key=lambda row: -row["ms"]),
        "layers": sorted(by_layer, key=lambda row: -row["ms"]),
    }


def _up(event: Any) -> Iterator[Any]:
    """The event and those around it, from the inside."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _op(event: Any) -> tuple[str, bool]:
    """The outermost op of ours that the event belongs to, else its own name; whether it is a call of it."""
    found = event.name.removeprefix(ENGINE), True
    for outer in _up(event):
        name = outer.name.removeprefix(ENGINE)
        ours = OURS.match(name)
        if ours:
            words = ours[1] or re.sub(r"(?<!^)(?=[A-Z])", "_", ours[2]).lower()
            found = NAMES.get(words, words), outer is event
        elif name.startswith("Optimizer."):
            found = "optimiser", outer is event
    return found


def _phase(event: Any) -> str:
    names = [outer.name for outer in _up(event)]
    if any(name.startswith(ENGINE) for name in names):
        return "backward"
    if any(name.startswith("Optimizer.") for name in names):
        return "optimiser"
    return "forward" if any(name.startswith(MODULE) for name in names) else "between"


def _layer(event: Any) -> str:
    """The kind of the innermost module that was running; empty outside of the model."""
    names = (outer.name for outer in _up(event) if outer.name.startswith(MODULE))
    return next(names, "").removeprefix(MODULE)


def _sequence(event: Any) -> int:
    """The number of the forward's op whose backward the event belongs to."""
    return next((outer.sequence_nr for outer in _up(event) if outer.name.startswith(ENGINE)), -1)
