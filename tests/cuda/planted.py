"""Faults planted in a copy of CUDA sources, each with what must find it (compare tests/kernels/faulty.py)."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_on_cpu
import pytest
from cuda_on_cpu import CSRC, Program


@dataclass(frozen=True)
class Fault:
    """In `source`, whose folder is copied, `old` becomes `new`. `check` must then raise `found`, exactly.

    `check` calls functions of the .cu files in `of` alone: the others, where several include what is changed,
    are left as they are. Empty: all have the fault.
    """

    what: str
    source: Path
    kind: str  # of the program that must find it: plain, address or thread
    old: str
    new: str
    found: type[AssertionError]
    check: Callable[[Program], object]
    of: tuple[str, ...] = ()

    def plant(self, folder: Path) -> list[Path]:
        """A copy in `folder` of the files beside the source and of the headers above, the fault in it."""
        to = folder / "planted"
        to.mkdir(parents=True)
        here = self.source.parent
        for path in (*here.glob("*.cu"), *here.glob("*.cuh"), *here.glob("*.h")):
            shutil.copy(path, to)
        for header in here.parent.glob("*.h"):
            shutil.copy(header, folder)
        text = (to / self.source.name).read_text()
        assert self.old in text, f"{self.source.name} no longer holds {self.old!r}: the fault is not planted"
        (to / self.source.name).write_text(text.replace(self.old, self.new))
        if not self.of:
            return cuda_on_cpu.sources(to)
        return [(to if path.stem in self.of else here) / path.name for path in cuda_on_cpu.sources(here)]

    def program(self, folder: Path, defines: Sequence[str] = ()) -> Program:
        built = cuda_on_cpu.build(self.plant(folder), self.kind, defines=defines)
        return Program(built, self.kind)

    def must_be_found(self, program: Program) -> None:
        with pytest.raises(self.found) as caught:
            self.check(program)
        assert type(caught.value) is self.found, f"found in another way: {caught.value}"


def in_kernel(of, what, name, kind, old, new, found, check) -> Fault:
    """A fault in a file of csrc/cuda."""
    return Fault(what, CSRC / "cuda" / name, kind, old, new, found, check, of)
