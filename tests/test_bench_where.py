"""What the results of a GPU say of where they were measured."""

import sys
import types
from pathlib import Path

import torch

from bench import gpu_timing, measure


def test_driver_and_clocks_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch):
    third_of_four(monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.gpu_state() == {"driver": "-", "sm_mhz": "-", "memory_mhz": "-"}
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\necho '580.1, 1980, 3201'\n")
    command.chmod(0o755)
    assert measure.gpu_state() == {"driver": "580.1", "sm_mhz": "1980", "memory_mhz": "3201"}
    assert "--id=GPU-third" in (tmp_path / "asked").read_text()


def third_of_four(monkeypatch):
    """torch sees one GPU, number 0, which is the machine's third."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="third")
    )


def test_clocks_are_those_of_the_gpu_that_measures(monkeypatch):
    third_of_four(monkeypatch)
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-third": 2}[uuid],
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * handle + kind,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_timing.clock_reader()() == (2001, 2002)


def test_a_gpu_s_results_say_which_gpu_and_which_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (SXM)")
    monkeypatch.setattr(measure, "gpu_state", lambda: {"driver": "580.1"})
    monkeypatch.setenv("PEFT_ENGINE_COMMIT", "abc")
    assert measure.device_name("cuda") == "nvidia-h200-sxm"
    found = measure.environment("cuda")
    assert (found["gpu"], found["driver"], found["commit"]) == ("NVIDIA H200 (SXM)", "580.1", "abc")
    assert {"cuda", "torch", "triton", "bitsandbytes", "peft", "unsloth", "liger_kernel"} <= set(found)
