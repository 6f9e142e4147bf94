"""The bytes of an adapter folder: written at once or not at all, a safetensors header read without trust."""

import contextlib
import ctypes
import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
import time
from pathlib import Path

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own
STALE = 3600  # seconds after which another process is not still writing its folder


def write_at_once(folder: Path, contents: dict[str, bytes]) -> Path:
    """Puts the files into `folder` at once, and returns it: a new folder beside it, fsync, rename.

    When the folder holds other files too, they stay, and the new ones are renamed in one by one, without
    those that are as before (an adapter's config, between the checkpoints of one run); so where nothing can
    be put beside it, as where it is a mounted disk.
    Raises OSError when the disk refuses; the folder then holds what it held.
    """
    folder = folder.resolve()
    new = None
    try:
        new = staging(folder)
        for file, data in contents.items():
            with open(new / file, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        _sync(new)
        if new.parent == folder or (not _appeared(new, folder) and not _swapped(new, folder, contents)):
            # other files live there: one rename a file, and mostly only the weights have changed
            for file, data in reversed(contents.items()):
                if not (folder / file).is_file() or (folder / file).read_bytes() != data:
                    os.replace(new / file, folder / file)
            _sync(folder)
        _sync(new.parent)
    except OSError as error:
        kept = "; what the folder held before is untouched" if folder.exists() else ""
        raise OSError(error.errno, f"save_adapter: {folder}: {error.strerror or error}{kept}") from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def staging(folder: Path) -> Path:
    """A new folder whose content can be renamed to `folder`, or into it.

    It lies beside it; but in it where something is mounted there, where beside it nothing may be written, and
    where this process stands, whose folder must not be taken from under it. folder: resolved.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file; give a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    inside = folder.is_dir() and not _replaceable(folder)
    stem = f".{folder.name}.saving-"
    for left in (folder if inside else folder.parent).glob(f"{glob.escape(stem)}*"):  # by one that was killed
        with contextlib.suppress(FileNotFoundError):  # its own process was faster
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
    new = (folder if inside else folder.parent) / f"{stem}{secrets.token_hex(4)}"
    new.mkdir()
    return new


def _replaceable(folder: Path) -> bool:
    """Whether another folder can be renamed in its place."""
    if os.path.exists(".") and folder.samefile("."):
        return False
    return not _is_mount(folder) and os.access(folder.parent, os.W_OK | os.X_OK)


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted there, also a folder of the same disk, which os.path.ismount misses."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(folder)
    escaped = re.sub(rb"[\\ \t\n]", lambda m: b"\\%03o" % m[0][0], os.fsencode(folder))
    return any(line.split()[4] == escaped for line in mounts)


def _appeared(new: Path, folder: Path) -> bool:
    """Renames `new` where there is no folder; False where there is, or another process was faster."""
    if folder.exists():
        return False
    try:
        os.rename(new, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _swapped(new: Path, folder: Path, contents: dict[str, bytes]) -> bool:
    """Swaps the folders where nothing but what is written anew would go with the old one."""
    return {entry.name for entry in folder.iterdir()} <= contents.keys() and _exchange(new, folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step (Linux' RENAME_EXCHANGE); False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), 2) == 0


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shape of each tensor, and the metadata; ValueError for a file that is not what its header says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first, brace = file.read(8), file.read(1)
        # The length of a header may begin with a pickle's byte, but what follows it is "{".
        if brace != b"{" and (first[:4] == b"PK\x03\x04" or first[:1] == b"\x80"):
            raise ValueError(
                f"load_adapter: {path} is a pickle under another name; only safetensors are read"
            )
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise ValueError(f"load_adapter: {path} is no safetensors file, or is cut short")
        text = brace + file.read(length - 1)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes, spans = {}, []
        for key, entry in entries.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                raise ValueError(f"{key}: shape {shape} or offsets are no sizes")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{key}: dtype must be one of {', '.join(DTYPES)}, got {entry['dtype']}")
            if end - start != math.prod(shape) * DTYPES[entry["dtype"]]:
                raise ValueError(f"{key}: {end - start} bytes do not hold shape {shape} of {entry['dtype']}")
            shapes[key] = shape
            spans.append((start, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"load_adapter: {path}: the header is broken: {error}") from None
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise ValueError(
                f"load_adapter: {path}: the header is broken: tensors overlap or leave a gap at {start}"
            )
        at = end
    if 8 + length + at != size:
        raise ValueError(
            f"load_adapter: {path}: the header tells of {8 + length + at} bytes, the file has {size}"
        )
    return shapes, metadata


def in_order(data: bytes) -> bytes:
    """The same file with its metadata in order: safetensors writes it in a random one."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[start:]
