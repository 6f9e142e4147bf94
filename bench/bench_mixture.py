"""A training step of a mixture of experts, its base dense and in NF4, beside PEFT: suite `mixture`.

    python -m bench.runner mixture

Qwen3-MoE with random weights: 8 layers of 32 experts of 384 x 1024, 4 a token, 356 million weights, 302 of
them in experts; LoRA r=16 on all linear layers as PEFT means it, experts and routers among them, gate and up
with rank 32; AdamW; 4 rows of 256 tokens, one of them half padding. The peer in NF4 has linear layers of
bitsandbytes and dense experts, as transformers loads such a model: PEFT 0.21 cannot train over experts packed
by bitsandbytes' replace_parameter_4bit ("only Tensors of floating point dtype can require gradients"). Memory
as in `methods_step`, but of the steps alone.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from bench import measure, peers
from bench.bench_families import ROWS, TOKENS, batch_of, step
from bench.bench_methods import PEFT, dtypes
from bench.bench_train import Peak, anonymous, import_for, peak_of
from bench.peers import ALPHA, OURS, PEFT_BNB, RANK

BASES = ("dense", "nf4")


def model_of(contender: str, base: str, dtype: torch.dtype, quick: bool) -> Any:
    """The model with LoRA on linear layers and experts, in training mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=1024, num_hidden_layers=1 if quick else 8, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=384, norm_topk_prob=True,
        vocab_size=512 if quick else 32768, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).to(dtype)
    lora = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if contender == OURS:
        import peft_engine as pe

        if base == "nf4":
            pe.quantize_(model)
        pe.attach(model, pe.LoraConfig(**lora))
        pe.optimize(model)
        return model.train()
    import peft

    if base == "nf4":
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                setattr(
                    model.get_submodule(parent), leaf, peers.bnb_linear(module.weight.data, training=True)
                )
    return peft.get_peft_model(model, peft.LoraConfig(**lora)).train()


def mixture(settings: measure.Settings) -> Iterator[measure.Row]:
    """Seconds of a step, and the peak of memory, for each base, dtype and contender."""
    chosen = list(product(BASES, dtypes()))
    for base, dtype in chosen[:1] if settings.quick else chosen:
        name_of_dtype = str(dtype).removeprefix("torch.")
        names = {OURS: OURS, PEFT if base == "dense" else PEFT_BNB: PEFT}
        contenders = {}
        for shown, name in names.items():
            model = model_of(name, base, dtype, settings.quick)
            batch, adam = batch_of("GPT-2"), peers.optimizer(model)
            contenders[shown] = lambda model=model, adam=adam, batch=batch: step(model, adam, batch)
        case = f"{base} base, {name_of_dtype}, {ROWS}x{TOKENS} tokens"
        for name, seconds in measure.interleave(contenders, min(settings.rounds, 5)).items():
            yield measure.row(case, name, "step", "s", seconds)
        del contenders, model, adam
        for shown, name in names.items():
            arguments = (name, base, name_of_dtype, int(settings.quick))
            peaks = [peak_of("bench_mixture", *arguments) / 2**20 for _ in range(1 if settings.quick else 2)]
            yield measure.row(case, shown, "peak over imports", "MiB", peaks)


def _child(threads: str, contender: str, base: str, dtype: str, quick: str) -> None:
    torch.set_num_threads(int(threads))
    import_for(contender)
    before = anonymous()
    model = model_of(contender, base, getattr(torch, dtype), quick == "1")
    adam = peers.optimizer(model)
    with Peak() as peak:  # of the steps: building the model, dense and in full, takes more than some of them
        for _ in range(3):
            step(model, adam, batch_of("GPT-2"))
    print(json.dumps({"peak": peak.bytes - before}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _child(*sys.argv[1:])
