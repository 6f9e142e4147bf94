"""A training step of models other than Llama's relatives, beside PEFT: suite `families`.

    python -m bench.runner families

GPT-2, BERT, T5 and BART in their base sizes (T5 small), and Gemma 3 of 270 million weights with its 262,144
tokens; random weights, the dropout that their configs have; LoRA r=16 on every linear layer, the base dense,
AdamW; 4 rows of 256 tokens, one of them half padding, 64 labels a row behind an encoder. Memory as in
`methods_step`.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from bench import measure, peers
from bench.bench_methods import PEFT, dtypes
from bench.bench_train import Peak, anonymous, import_for, peak_of
from bench.peers import ALPHA, OURS, RANK

# Family: the class of the model, its config's, and the fields that are not the config's defaults.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "BERT": ("BertForSequenceClassification", "BertConfig", {}),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
        },
    ),
    "T5 small": ("T5ForConditionalGeneration", "T5Config", {"decoder_start_token_id": 0}),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
            "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
            "attention_dropout": 0.1,
        },
    ),
}  # fmt: skip
DECODERS = ("GPT-2", "Gemma 3")
TINY = {
    "n_layer": 1, "num_hidden_layers": 1, "num_layers": 1, "num_decoder_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "vocab_size": 512,
}  # fmt: skip
ROWS, TOKENS, LABELS = 4, 256, 64


def model_of(contender: str, family: str, dtype: torch.dtype, quick: bool) -> Any:
    """The model with LoRA on every linear layer but the output head, in training mode."""
    import transformers

    torch.manual_seed(0)
    kind, config, fields = FAMILIES[family]
    config = getattr(transformers, config)(**fields)
    for name, value in TINY.items() if quick else ():
        if hasattr(config, name):
            setattr(config, name, value)
    model = getattr(transformers, kind)(config).to(dtype)
    if contender == OURS:
        import peft_engine as pe

        pe.attach(model, pe.LoraConfig(**_lora(family)))
        pe.optimize(model)
        return model.train()
    import peft

    settings = peft.LoraConfig(**_lora(family), fan_in_fan_out=family == "GPT-2")
    return peft.get_peft_model(model, settings).train()


def _lora(family: str) -> dict[str, Any]:
    task = {"BERT": "SEQ_CLS"}.get(family, "CAUSAL_LM" if family in DECODERS else "SEQ_2_SEQ_LM")
    return {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": task}


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """Rows of random tokens, the second half padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 0
    if family == "BERT":
        labels = torch.randint(0, 2, (ROWS,), generator=generator)
    elif family in DECODERS:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = ids[:, :LABELS].contiguous()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, adam: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """Forward, backward and update on one batch; the loss."""
    loss = model(**batch).loss
    loss.backward()
    adam.step()
    adam.zero_grad(set_to_none=True)
    return loss.item()


def families(settings: measure.Settings) -> Iterator[measure.Row]:
    """Seconds of a step, and the peak of memory, for each family and contender."""
    chosen = list(product(FAMILIES, dtypes()))
    for family, dtype in chosen[:1] if settings.quick else chosen:
        name_of_dtype = str(dtype).removeprefix("torch.")
        contenders = {}
        for name in (OURS, PEFT):
            model = model_of(name, family, dtype, settings.quick)
            batch, adam = batch_of(family), peers.optimizer(model)
            contenders[name] = lambda model=model, adam=adam, batch=batch: step(model, adam, batch)
        case = f"{family}, {name_of_dtype}, {ROWS}x{TOKENS} tokens"
        for name, seconds in measure.interleave(contenders, min(settings.rounds, 5)).items():
            yield measure.row(case, name, "step", "s", seconds)
        del contenders, model, adam
        for name in (OURS, PEFT):
            arguments = (name, family, name_of_dtype, int(settings.quick))
            peaks = [peak_of("bench_families", *arguments) / 2**20 for _ in range(1 if settings.quick else 2)]
            yield measure.row(case, name, "peak over imports", "MiB", peaks)


def _child(threads: str, contender: str, family: str, dtype: str, quick: str) -> None:
    torch.set_num_threads(int(threads))
    import_for(contender)
    before = anonymous()
    with Peak() as peak:
        model = model_of(contender, family, getattr(torch, dtype), quick == "1")
        adam = peers.optimizer(model)
        for _ in range(5):
            step(model, adam, batch_of(family))
    print(json.dumps({"peak": peak.bytes - before}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _child(*sys.argv[1:])
