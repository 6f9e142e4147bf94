"""The folder of --output: that it can be one, its checkpoints, and that one run at a time writes to it."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import zipfile
from collections.abc import Iterator
from pathlib import Path

from peft_engine.adapter_files import read_header

LOCK, STAGING = ".lock", ".saving"
CHECKPOINT = "checkpoint-"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of some network file systems


class OutputError(ValueError):
    """A folder that cannot be written to; the message names it, says why, and what to give instead."""


def check_output(output: Path) -> None:
    """OutputError where a file or a link to nowhere stands in the place of the folder or of one above it, and
    where the nearest of them that is there may not be written to.
    """
    for folder in (output, *output.parents):
        what = "is" if folder == output else f"{folder} is"
        if folder.is_symlink() and not folder.exists():
            raise OutputError(
                f"--output {output}: {what} a symbolic link to {os.readlink(folder)}, which does not exist; "
                "make that folder, mend the link, or give another folder"
            )
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"--output {output}: {what} a file; give a folder")
    nearest = next(folder for folder in (output, *output.parents) if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        what = "" if nearest == output else f"{nearest} "
        raise OutputError(
            f"--output {output}: {what}cannot be written to; give another folder, or its rights"
        )


def make_output(output: Path) -> None:
    """Makes the folder of --output; OutputError where the system refuses."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"--output {output}: cannot be made ({error.strerror}); give another folder"
        ) from error


def holds_already(output: Path, what: str, file: str, mend: str = "") -> OutputError:
    """The error for a folder with a `what` that would be lost; file: one of it."""
    return OutputError(
        f"--output {output}: holds a {what} already ({file}); give another folder, {mend}or --overwrite to "
        "replace it"
    )


def checkpoints(output: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest last; a user's own checkpoint-best is none of them."""
    found = [path for path in output.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, None when there is none."""
    return next((folder for folder in reversed(checkpoints(output)) if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether each file is there to its end: a copy may have cut one, and the checkpoint before be whole."""
    try:
        for file in ("trainer_state.json", "adapter_config.json"):
            json.loads((checkpoint / file).read_text("utf-8"))
        weights = [read_header(file) for file in checkpoint.glob("adapter*.safetensors")]
    except (OSError, ValueError):
        return False
    states = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # torch.save's, whose index is at the end
    return bool(weights) and all(zipfile.is_zipfile(checkpoint / file) for file in states)


@contextlib.contextmanager
def sole_run(output: Path) -> Iterator[None]:
    """Keeps the folder, which exists, to this run: another one that asks for it gets OutputError at once.

    The kernel lets the lock go when the process ends, however it ends; a file that is left locks nothing.
    """
    path = output / LOCK
    file = _locked(output, path)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        os.close(file)


def _locked(output: Path, path: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(
                f"--output {output}: cannot be written to: {error.strerror}; give another folder"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_at(file, path):
                return file
        except BlockingIOError:
            who = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise OutputError(
                f"--output {output}: another run is writing to it now ({who}); wait for its end, or give "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            os.close(file)
            raise
        os.close(file)  # the run before it ended, and took its file away, between the two calls


def _is_file_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
