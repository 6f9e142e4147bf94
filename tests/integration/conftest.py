"""The command in this process; models with adapters of PEFT, and with the head joined with its loss."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from texts import tiny_model_folder

import peft_engine as pe
from peft_engine.heads import attach_head


@pytest.fixture
def make_base(tiny_llama, tmp_path):
    """A factory of the same tiny Llama, dense, in our NF4 or in bitsandbytes' 4 bit, in training mode."""

    def make(base, dtype=torch.float32, **quantization):
        torch.manual_seed(0)
        # 128: bitsandbytes' CPU kernel takes a wrong scale where in_features is no multiple of the block size
        model = tiny_llama(dtype, intermediate_size=128)
        if base == "nf4":
            pe.quantize_(model)
        elif base == "bnb":
            model.save_pretrained(tmp_path / "dense")
            settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | quantization
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "dense", quantization_config=config, dtype=dtype, device_map="cpu"
            )
        return model.train()

    return make


@pytest.fixture
def make(make_base):
    """A factory of a PeftModel over such a base, with adapters that do something."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")

    def build(base, dtype=torch.float32, *, adapters=1, **changes):
        model = make_base(base, dtype)
        config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes))
        model = peft.get_peft_model(model, config, adapter_name="a0")
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, std=0.2)
        return model

    return build


@pytest.fixture
def head_pair(tiny_llama):
    """A factory: a plain model, and a copy of it with its head joined with its loss."""

    def make(dtype=torch.float32, **changes):
        plain = tiny_llama(dtype, **changes)
        fused = copy.deepcopy(plain)
        report = attach_head(fused)
        assert report.fused and report.backend == "cpu" and report.name == "lm_head", report
        return plain, fused

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tiny model and its tokenizer, for the tests of the command."""
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command; the exit code, standard output, standard error."""

    from peft_engine.cli import main

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-engine", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run
