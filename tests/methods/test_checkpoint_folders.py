"""The folders an adapter can be saved into: a mounted disk, where a process stands, below others'."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from method_cases import ALL, shake

import peft_engine as pe
from peft_engine import adapter_files
from peft_engine.adapter_files import staging
from peft_engine.checkpoint import CONFIG, WEIGHTS, load_adapter, save_adapter
from peft_engine.methods import attach
from peft_engine.methods.attach import tensors


@pytest.fixture
def trained(llama):
    return shake(attach(llama(), ALL))


@pytest.mark.parametrize("files", [[], ["run.json"]])
def test_a_mounted_folder_is_written_from_within(llama, trained, tmp_path, monkeypatch, files):
    for file in files:
        (tmp_path / file).touch()
    monkeypatch.setattr(adapter_files, "_is_mount", lambda folder: folder == tmp_path)
    monkeypatch.setattr(adapter_files, "_exchange", lambda *folders: pytest.fail("a mount cannot be swapped"))
    for seed in (0, 1):  # the second time over the first
        save_adapter(shake(trained, seed=seed), tmp_path)
        load_adapter(llama(), tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted([CONFIG, WEIGHTS, *files])


def test_what_is_mounted_is_known_by_the_system(tmp_path):
    assert adapter_files._is_mount(Path("/proc")) and not adapter_files._is_mount(tmp_path)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or bool(os.system("unshare -m true 2>/dev/null")),
    reason="nothing can be mounted here: needs root and unshare",
)
def test_a_folder_of_the_same_disk_mounted_in_another_place(tmp_path):
    for name in ("a", "with space"):
        (tmp_path / name).mkdir()
    script = (
        f"mount --bind '{tmp_path}/a' '{tmp_path}/with space' && .venv/bin/python -c "
        '"import sys; from pathlib import Path; from peft_engine.adapter_files import write_at_once; '
        "write_at_once(Path(sys.argv[1]), {'x': b'1'})\" "
        f"'{tmp_path}/with space'"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "a") == ["x"]


def test_what_was_loaded_does_not_change_with_its_file(llama, trained, tmp_path):
    folder = save_adapter(trained, tmp_path / "adapter")
    model = llama()
    load_adapter(model, folder)
    before = {path: p.clone() for path, p in tensors(model, "default").items()}
    assert all(p.data_ptr() % 16 == 0 for p in tensors(model, "default").values())
    data = (folder / WEIGHTS).read_bytes()
    with open(folder / WEIGHTS, "r+b") as file:  # in place, as cp writes
        file.write(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert all(torch.equal(p, before[path]) for path, p in tensors(model, "default").items())


def test_the_folder_that_the_process_stands_in_stays_the_same(llama, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.stat(".").st_ino
    for seed in (0, 1):
        save_adapter(shake(trained, seed=seed), ".")
        assert os.getcwd() == str(tmp_path) and os.stat(tmp_path).st_ino == before
        load_adapter(llama(), ".")
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]


def test_a_parent_that_may_not_be_written_to(trained, tmp_path, monkeypatch):
    folder = tmp_path / "theirs" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent)
    save_adapter(trained, folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS] and os.listdir(folder.parent) == ["mine"]


def test_what_another_process_takes_away_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / ".mine.saving-1").mkdir()
    real = Path.stat

    def gone(path, **more):
        if path.name == ".mine.saving-1":
            raise FileNotFoundError
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", gone)
    assert staging(tmp_path / "mine").parent == tmp_path


@pytest.mark.peers
def test_pefts_auto_class_finds_the_base_of_a_language_model(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (the `peers` extra)")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    pe.attach(model, pe.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    pe.save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits + 0)


def test_a_base_saved_with_an_adapter_attached_is_told_to_be_one(tiny_llama, tmp_path):
    model = pe.quantize_(tiny_llama())
    pe.attach(model, pe.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"was saved with an adapter attached: .*lora_A.default.*detach or merge_"
    ):
        pe.load_quantized(tmp_path)
