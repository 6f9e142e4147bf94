"""Trains several methods on the same rows with the same budget and measures each on the same held-out rows.

Every training and every evaluation is a process of its own (`python -m peft_engine`), so that the peak memory
of one is not that of another, and a method that fails leaves the others alone.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft_engine
from peft_engine.train import progress
from peft_engine.train.method_options import DEFAULTS, METHODS, MethodOptions, learning_rate
from peft_engine.train.output import check_output, holds_already, make_output
from peft_engine.train.record import versions, write_json
from peft_engine.train.settings import LoopSettings, RunSettings

RESULT = "compare.json"
ERROR = "peft-engine: error: "
KEPT = ("trainable_parameters", "train_seconds", "peak_rss_bytes", "peak_gpu_bytes", "steps", "tokens")
GRACE = 3.0  # seconds for a process that was interrupted to end by itself
SCORES = ("accuracy", "exact_match", "token_f1", "perplexity")


class ChildError(RuntimeError):
    """A process that failed; the message is its own last line."""


@dataclass(frozen=True)
class Comparison:
    """What is compared. loop's learning rate is not used: rates has that of each method."""

    methods: tuple[str, ...]
    model: str
    data: Path
    eval_data: Path
    output: Path
    quantize: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    overwrite: bool = False
    options: MethodOptions = field(default_factory=MethodOptions)
    rates: dict[str, float] = field(default_factory=dict)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self.options).items():
            if value is not None and not any(name in DEFAULTS[method] for method in self.methods):
                owners = " and ".join(method for method in METHODS if name in DEFAULTS[method])
                raise ValueError(
                    f"--{name.replace('_', '-')}: is an option of {owners}, and --methods has none of them"
                )
        for method in self.methods:
            self.run(method)

    def run(self, method: str) -> RunSettings:
        """The settings of one method's run: the options it has, and what all share."""
        given = {
            name: value
            for name, value in dataclasses.asdict(self.options).items()
            if name in DEFAULTS[method]
        }
        rate = self.rates.get(method, learning_rate(method))
        return RunSettings(
            model=self.model, data=self.data, output=self.output / method, method=method,
            quantize=None if method == "qlora" else self.quantize, dtype=self.dtype,
            max_length=self.max_length, overwrite=self.overwrite, options=MethodOptions(**given),
            loop=dataclasses.replace(self.loop, learning_rate=rate),
        )  # fmt: skip


def methods_of(text: str) -> tuple[str, ...]:
    """The methods of --methods: all, or names with commas, each once. ValueError for one that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wanted = list(METHODS) if names == ["all"] else names
    for name in wanted:
        if name not in METHODS:
            raise ValueError(f"--methods: expected all, or some of {', '.join(METHODS)}; got {name!r}")
    if not wanted:
        raise ValueError(f"--methods: expected all, or some of {', '.join(METHODS)}; got nothing")
    return tuple(dict.fromkeys(wanted))


def rates_of(given: Sequence[str], methods: Sequence[str]) -> dict[str, float]:
    """The rates of --learning-rate: METHOD=RATE, or one number for all. ValueError for what is neither."""
    rates: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if name and name not in methods:
            raise ValueError(
                f"--learning-rate {text}: {name!r} is not compared; --methods has {', '.join(methods)}"
            )
        try:
            rate = float(number)
        except ValueError:
            raise ValueError(f"--learning-rate: expected METHOD=RATE or a number, got {text!r}") from None
        rates |= dict.fromkeys([name] if name else methods, rate)
    return rates


def arguments(settings: RunSettings) -> list[str]:
    """The command line of `train` that means these settings."""
    fields = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.name not in ("options", "loop")
    }
    out = ["train"]
    for name, value in {**fields, **vars(settings.options), **vars(settings.loop)}.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            out.append(option)
        elif value is not None and value is not False:
            out.append(f"{option}={','.join(value) if isinstance(value, list) else value}")
    return out


def command_line(settings: RunSettings, command: str, *without: str) -> list[str]:
    """The words of train, or of a command with its options, for these settings; defaults are left out."""
    loop = LoopSettings(learning_rate=learning_rate(settings.method))
    plain = RunSettings(model="", data=Path(), output=Path(), method=settings.method, loop=loop)
    usual = {*arguments(plain)} - {f"--method={settings.method}", "--data=.", "--output=."}
    words = [word for word in arguments(settings)[1:] if word not in usual]
    left_out = [name.replace("_", "-") for name in without]
    return [command, *(word for word in words if word[2:].partition("=")[0] not in left_out)]


def compare(settings: Comparison, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the comparison and returns what compare.json holds: the base's row, and one for each method."""
    from peft_engine.train.data import read_rows  # torch comes with it

    output = settings.output
    for path in (settings.data, settings.eval_data):
        read_rows(path)  # a row that cannot be used is told before the base is measured, and once
    _check_output(settings)
    make_output(output)
    found: dict[str, Any] = {
        "model": settings.model,
        "data": str(settings.data),
        "eval_data": str(settings.eval_data),
        "budget": {k: v for k, v in dataclasses.asdict(settings.loop).items() if k != "learning_rate"},
        "versions": versions(),
        "rows": [],
    }
    say(f"Comparing {', '.join(settings.methods)} on {settings.model}: {settings.data}, to {output}")
    measure = ["eval", f"--model={settings.model}", f"--data={settings.eval_data}", "--json"]
    measure += [f"--max-length={settings.max_length}"] if settings.max_length else []
    base = [f"--dtype={settings.dtype}", *([f"--quantize={settings.quantize}"] if settings.quantize else [])]
    found["rows"].append(_row("base", run_command([*measure, *base], "base", say)))
    with progress.bar("Comparing", len(settings.methods)) as bar:
        for i, method in enumerate(settings.methods, 1):
            say(f"[{i}/{len(settings.methods)}] {method}")
            found["rows"].append(_method(settings.run(method), measure, say))
            write_json(output / RESULT, found)
            bar.update(i, f"methods done, {method} last")
    return found


def _method(run: RunSettings, measure: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    try:
        record = run_command([*arguments(run), "--json"], run.method, say)
        scores = run_command([*measure, f"--adapter={run.output}"], run.method, say)
    except ChildError as error:
        say(f"{run.method}: failed: {error}")
        return _row(run.method, {}, error=str(error), settings=run.to_dict())
    size = sum(file.stat().st_size for file in run.output.glob("*adapter*") if file.is_file())
    return _row(
        run.method,
        scores,
        **{key: record[key] for key in KEPT},
        file_bytes=size,
        final_loss=record["losses"][-1],
        settings=record["settings"],
    )


def _row(method: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One row of the result; what it has no value for is None."""
    columns = (*SCORES, "file_bytes", *KEPT, "final_loss", "error", "settings")
    return {"method": method} | dict.fromkeys(columns) | {k: scores.get(k) for k in SCORES} | more


def _check_output(settings: Comparison) -> None:
    output = settings.output
    check_output(output)
    there = [path for path in (output / RESULT, *(output / method for method in METHODS)) if path.exists()]
    if there and not settings.overwrite:
        raise holds_already(output, "comparison", there[0].name)
    (output / RESULT).unlink(missing_ok=True)


def run_command(
    line: list[str], label: str, say: Callable[[str], None], temporary: Path | None = None
) -> dict[str, Any]:
    """What a command prints with --json; its progress goes on as ours. Raises ChildError with its error.

    temporary: the folder for its temporary files, for one that may be killed with all that it has there.
    """
    package = str(Path(peft_engine.__file__).parents[1])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_engine", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",  # the bytes of a path that are no text
        env={**os.environ, "PYTHONPATH": path} | ({"TMPDIR": str(temporary)} if temporary else {}),
    )
    errors: list[str] = []

    def tell() -> None:
        for text in process.stderr or ():
            if text.startswith(ERROR):
                errors.append(text.removeprefix(ERROR).strip())
            elif text.strip() and not text.startswith("Next: "):
                say(f"  {label}: {text.rstrip()}")

    teller = threading.Thread(target=tell, daemon=True)
    try:
        teller.start()
        out = process.stdout.read() if process.stdout else ""
        code = process.wait()
    finally:
        _end(process)
        if teller.ident:
            teller.join(timeout=5)
    if code < 0:
        raise ChildError(f"killed by signal {-code}" + ("; was there enough memory?" if code == -9 else ""))
    if code:
        raise ChildError(errors[-1] if errors else f"exit code {code}; its reason is above")
    return json.loads(out)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process that is left when we are interrupted, with time to take its temporary files away."""
    for end in (None, process.terminate, process.kill):  # at first it may have had the Ctrl-C that we had
        if end is not None:
            end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            return
    process.wait()
