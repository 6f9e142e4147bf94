"""CUDA kernels on the CPU (cuda_on_cpu.py): the library in this process, programs under the sanitizers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cuda_cases
import cuda_on_cpu
import pytest
from planted import Fault

from peft_engine import native
from peft_engine.kernels import scratch


@pytest.fixture(scope="session", autouse=True)
def _cache() -> None:
    cuda_on_cpu.forget_old()


@pytest.fixture(scope="session")
def kernels() -> cuda_on_cpu.Library:
    """csrc/cuda, in this process."""
    return cuda_cases.kernels()


@pytest.fixture(scope="session")
def program() -> Callable[..., cuda_on_cpu.Program]:
    """csrc/cuda, in a process of its own: program(kind, arch=900)."""

    def make(kind: str, arch: int = 900) -> cuda_on_cpu.Program:
        return cuda_on_cpu.Program(cuda_on_cpu.build(cuda_on_cpu.sources(), kind, arch=arch), kind)

    return make


@pytest.fixture
def as_if_on_a_gpu(request, monkeypatch) -> Iterator[None]:
    """native.cuda() is the emulated library of the module's LIBRARY, its functions' types set."""
    stems = (request.module.LIBRARY, "library")
    built = cuda_on_cpu.build([path for path in cuda_on_cpu.sources() if path.stem in stems], "library")
    library = cuda_on_cpu.Library(built).dll
    for name, (result, arguments) in native._CUDA_FUNCTIONS.items():
        if hasattr(library, name):
            getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    monkeypatch.setattr(native, "cuda", lambda: library)
    scratch._held.clear()
    yield
    scratch._held.clear()


@pytest.fixture(scope="module")
def planted(request, tmp_path_factory) -> Iterator[Callable[[Fault], cuda_on_cpu.Program]]:
    """The program with a fault in it. The next ones are compiled while a test runs."""
    defines = getattr(request.module, "DEFINES", ())
    tests = [item for item in request.session.items if item.module is request.module]
    faults = [item.callspec.params["fault"] for item in tests if "fault" in item.fixturenames]
    with ThreadPoolExecutor(max_workers=2) as pool:
        programs = {f: pool.submit(f.program, tmp_path_factory.mktemp("fault"), defines) for f in faults}
        yield lambda fault: programs[fault].result()
        pool.shutdown(cancel_futures=True)
