"""What every command shares: where lines go, how an error ends it, how a result is printed."""

import contextlib
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

LABEL = 16  # columns of a label in a confusion table, more where shorter ones would be alike
BYTES = re.compile("([\udc80-\udcff]+)")  # as Python decodes those that are no text: PEP 383


def say(line: str) -> None:
    _put(line, sys.stderr)


def _put(text: str, file: Any, end: str = "\n") -> None:
    """Prints; the bytes of a path that the locale cannot decode go out as they were given.

    A character that the locale cannot encode is written by its number: a lost answer would be worse.
    """
    buffer = getattr(file, "buffer", None)
    if buffer is None:
        print(text, file=file, end=end, flush=True)
        return
    file.flush()
    for i, piece in enumerate(BYTES.split(text + end)):
        buffer.write(piece.encode(file.encoding, "surrogateescape" if i % 2 else "backslashreplace"))
    buffer.flush()


def next_command(*words: object) -> None:
    """Says which command to type next, as a shell reads it."""
    say(f"Next: {shlex.join(['peft-engine', *map(str, words)])}")


@contextlib.contextmanager
def command(debug: bool) -> Iterator[Callable[..., None]]:
    """Runs a command's work: stray prints go to standard error, an error becomes one line and exit code 1.

    Yields show(value, end="\\n"), which prints on the real standard output: a string as it is, else as JSON.
    """
    out = sys.stdout

    def show(value: Any, end: str = "\n") -> None:
        text = value if isinstance(value, str) else json.dumps(plain(value), indent=2)
        _put(text, out, end)

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield show
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        say("peft-engine: interrupted")
        raise typer.Exit(1) from None
    except BrokenPipeError:  # by `| head`, say: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (ValueError, OSError, RuntimeError, TypeError))
        say(
            f"peft-engine: error: {text if known else f'{type(error).__name__}: {text}; --debug shows where'}"
        )
        for note in getattr(error, "__notes__", ()):
            say(note)
        raise typer.Exit(1) from None


def plain(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A ValueError of settings is wrong usage: exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def choice(option: str, value: str | None, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise typer.BadParameter(f"{option}: expected one of {', '.join(allowed)}, got {value!r}")


def check_base(quantize: str | None, dtype: str | None) -> None:
    """Of the options that say how the base is loaded."""
    from peft_engine.train.settings import DTYPES, QUANTIZE

    choice("--quantize", quantize, QUANTIZE)
    choice("--dtype", dtype, DTYPES)


def quiet() -> None:
    """The bars and advice of the libraries below would drown ours."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Its Trainer calls its own deprecated method.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing.* is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # imported by transformers where it is installed


def width() -> int:
    """Columns of the terminal that results go to; 110 where they go elsewhere."""
    out = sys.__stdout__  # sys.stdout is standard error while a command runs
    return shutil.get_terminal_size().columns if out is not None and out.isatty() else 110


def table(found: dict[str, Any], name: str) -> str:
    lines = [
        f"{name}: {found['rows']} rows in {found['seconds']:.1f} s "
        f"({found['tokens_per_second']:,.0f} tokens/s)"
    ]
    for key in ("accuracy", "exact_match", "token_f1", "perplexity"):
        if found[key] is not None:
            lines.append(f"  {key:<12} {found[key]:.4f}")
    if found["labels"]:
        lines += [f"  {line}" for line in _confusion(found["labels"], found["confusion"], width() - 2)]
    return "\n".join(lines)


def _confusion(labels: list[str], counts: list[list[int]], room: int) -> list[str]:
    """The table as lines, of at most `room` columns; without it a line that says where it is."""
    shown = _shortened([json.dumps(label, ensure_ascii=False) for label in labels])
    columns = [max(len(title), *(len(str(row[i])) for row in counts)) + 2 for i, title in enumerate(shown)]
    first = max(map(len, shown))
    if first + sum(columns) > room:
        return [f"confusion of {len(labels)} labels: too wide for {room + 2} columns; --json has it"]
    lines = ["confusion (rows: the data's, columns: the model's)"]
    titles: list[list[Any]] = [shown]
    for title, row in zip(("", *shown), titles + counts, strict=True):
        lines.append(f"{title:<{first}}" + "".join(f"{x:>{n}}" for x, n in zip(row, columns, strict=True)))
    return lines


def _shortened(labels: list[str]) -> list[str]:
    """Long ones without their middle, as much of it as leaves all distinct."""
    longest = max(map(len, labels))
    for most in range(LABEL, longest, 8):
        half = most // 2
        short = [x if len(x) <= most else f"{x[: half - 1]}…{x[-half:]}" for x in labels]
        if len(set(short)) == len(labels):
            return short
    return labels


def drawn(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], columns: int | None = None) -> str:
    """A table as wide as the terminal, or `columns`; the first column, and what has no header, are words."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(header):
        drawn.add_column(title, justify="right" if i and title else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=columns or width()).print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
