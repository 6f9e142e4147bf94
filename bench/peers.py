"""The contenders: our layers and models, and the peers' at their best settings, from the same weights.

Each maker returns something ready to time. bitsandbytes is measured in training mode before any evaluation of
the same module: on a CPU with AVX512-BF16 its eval repacks the weight for good.
"""

from pathlib import Path
from typing import Any

import torch

from peft_engine import dense

RANK, ALPHA = 16, 32
# What all train in: on processors where torch has no fast products of bfloat16, float32.
DTYPE = torch.float32 if dense.is_slow(torch.bfloat16) else torch.bfloat16

OURS, PEFT_BNB = "peft-engine", "PEFT + bitsandbytes"
PEFT_DENSE = "PEFT fp32" if DTYPE.itemsize == 4 else "PEFT bf16"


# --- layers ----------------------------------------------------------------------------------------------


def bnb_linear(weight: torch.Tensor, *, training: bool) -> torch.nn.Module:
    """bitsandbytes' Linear4bit over `weight` (N, K), nf4 with double quantisation, in train or eval mode."""
    import bitsandbytes as bnb

    n, k = weight.shape
    linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return linear.to("cpu").train(training)


def peft_layer(linear: torch.nn.Module, *, dora: bool = False) -> torch.nn.Module:
    """PEFT's LoRA or DoRA (r=16) around one linear, bitsandbytes' or a plain one, in train mode."""
    import peft

    holder = torch.nn.Sequential()
    holder.add_module("linear", linear)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"], use_dora=dora)
    peft.inject_adapter_in_model(config, holder)
    return holder.train()


def our_layer(weight: torch.Tensor, *, dora: bool = False) -> torch.nn.Module:
    """Our LoRA or DoRA (r=16) over NF4, in train mode."""
    import peft_engine as pe

    holder = torch.nn.Sequential()
    holder.add_module("linear", dense_linear(weight))
    pe.quantize_(holder, skip_modules=[])
    config = pe.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"], use_dora=dora)
    pe.attach(holder, config)
    return holder.train()


def dense_linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return linear


# --- models ----------------------------------------------------------------------------------------------


def our_model(path: Path, dtype: torch.dtype = DTYPE, *, dora: bool = False) -> Any:
    """Ours: NF4 read shard by shard, LoRA or DoRA r=16 on every linear, fused layers in."""
    import peft_engine as pe

    model = pe.load_quantized(str(path), dtype=dtype)
    config = pe.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora)
    pe.attach(model, config)
    pe.optimize(model)
    return model.train()


def peft_bnb_model(path: Path, dtype: torch.dtype = DTYPE, *, dora: bool = False) -> Any:
    """PEFT's LoRA or DoRA over bitsandbytes' NF4 (double quantisation), adapters fp32."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=dtype, device_map="cpu"
    )
    return peft.get_peft_model(model, _peft_config(dora)).train()


def peft_dense_model(path: Path, dtype: torch.dtype = DTYPE, *, dora: bool = False) -> Any:
    """PEFT's LoRA or DoRA over the dense model."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return peft.get_peft_model(model, _peft_config(dora)).train()


def _peft_config(dora: bool):
    import peft

    return peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora
    )


MODELS = {OURS: our_model, PEFT_BNB: peft_bnb_model, PEFT_DENSE: peft_dense_model}


def copy_adapter(source: Any, target: Any) -> None:
    """The LoRA weights of a PEFT model into ours, so that both start from the same."""
    modules = dict(target.named_modules())
    copied = 0
    with torch.no_grad():
        for name, module in source.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                ours = modules[name.removeprefix("base_model.model.")]
                ours.lora_A["default"].copy_(module.lora_A["default"].weight)
                ours.lora_B["default"].copy_(module.lora_B["default"].weight)
                copied += 1
    if not copied:
        raise RuntimeError("copy_adapter: the PEFT model has no LoRA layer")


# --- one training step -----------------------------------------------------------------------------------


def optimizer(model: torch.nn.Module, lr: float = 5e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def step(model: Any, adam: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """Forward, backward and update on one batch; the loss."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.item()


def tokens_batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, every one labelled."""
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def documents(model: Path, data: Path, count: int) -> list[Any]:
    """The first `count` rows of a data file as tokens, by the engine's own rules (the same for all)."""
    from transformers import AutoTokenizer

    from peft_engine.train.data import read_rows, tokenize

    return tokenize(read_rows(data)[:count], AutoTokenizer.from_pretrained(model), 2048)


def padded(group: list[Any], pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch as the peers are given it: padded on the right to its longest row."""
    longest = max(len(d.input_ids) for d in group)
    fill = [longest - len(d.input_ids) for d in group]
    return {
        "input_ids": torch.tensor([[*d.input_ids, *[pad] * n] for d, n in zip(group, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in fill]),
        "labels": torch.tensor([[*d.labels, *[-100] * n] for d, n in zip(group, fill, strict=True)]),
    }


def packed(group: list[Any]) -> dict[str, torch.Tensor]:
    """The same batch as ours: back to back, without padding."""
    from peft_engine.train.data import pack

    return pack(group)
