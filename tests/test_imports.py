"""What importing peft_engine costs and touches. The matrix of installs is in .ci/imports.sh."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, cwd: Path = ROOT) -> str:
    """Standard output of `code` in a fresh interpreter."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_root_kernels_folder_does_not_shadow_the_pypi_package(tmp_path: Path):
    # transformers and bitsandbytes ask for a package named `kernels`; ours must stay a plain folder.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers, bitsandbytes, peft_engine.kernels.nf4 as k; print(k.__name__, k.__file__)"
    for cwd in (ROOT, tmp_path):
        name, file = run(code, cwd).split()
        assert name == "peft_engine.kernels.nf4"
        assert Path(file) == ROOT / "kernels" / "nf4" / "__init__.py"


def test_import_takes_less_than_300_ms_over_torch():
    code = "import time, torch; t = time.process_time(); import peft_engine; print(time.process_time() - t)"
    assert statistics.median(float(run(code)) for _ in range(3)) < 0.3


def test_the_command_starts_without_what_its_commands_import():
    """peft_engine.methods brings torch._dynamo, which takes longer than all else together."""
    code = """
import sys, peft_engine.cli
print([m for m in ("peft_engine.methods", "torch._dynamo", "transformers", "matplotlib") if m in sys.modules])
"""
    assert run(code) == "[]"


def test_import_leaves_torch_and_transformers_classes_as_they_are():
    code = """
import torch, transformers
from transformers.models.llama import modeling_llama
watched = [torch.nn.Linear, torch.nn.Module, modeling_llama.LlamaForCausalLM, modeling_llama.LlamaMLP,
           transformers.Trainer]
before = [dict(vars(cls)) for cls in watched]
functional = dict(vars(torch.nn.functional))
import peft_engine
assert [dict(vars(cls)) for cls in watched] == before
assert dict(vars(torch.nn.functional)) == functional
print("unchanged")
"""
    assert run(code) == "unchanged"


def test_import_loads_neither_transformers_nor_bitsandbytes():
    code = """
import sys, peft_engine
print([m for m in ("transformers", "bitsandbytes", "peft", "matplotlib", "triton") if m in sys.modules])
"""
    assert run(code) == "[]"
