"""What a run leaves behind besides the adapter: run.json, and loss.png."""

import json
import os
import platform
import secrets
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft_engine
from peft_engine.train.console import plain


def peak_rss_bytes() -> int:
    """The most memory this process ever held, as the system counts it (VmHWM)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def peak_gpu_bytes() -> int | None:
    """The most memory that tensors of this process ever held on the GPU; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def versions() -> dict[str, str | None]:
    """peft-engine, Python, and the packages that decide the numbers."""
    out: dict[str, str | None] = {"peft-engine": peft_engine.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "safetensors"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = None
    return out


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file at once or not at all; numbers that are not finite become null."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(new, path)
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, f"{path}: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


def draw_losses(path: Path, losses: list[float], eval_losses: dict[int, float], title: str) -> None:
    """The loss of each step, its running mean, and the evaluations, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
    if len(losses) >= 10:
        axes.plot(
            steps, _running_mean(losses, max(5, len(losses) // 20)), color="#1f4e8c", label="running mean"
        )
    if eval_losses:
        axes.plot(list(eval_losses), list(eval_losses.values()), "o-", color="#c8553d", label="evaluation")
    axes.set(xlabel="optimiser step", ylabel="loss (nats a labelled token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _running_mean(values: list[float], window: int) -> list[float]:
    out = []
    for i in range(len(values)):
        part = values[max(0, i - window + 1) : i + 1]
        out.append(sum(part) / len(part))
    return out
