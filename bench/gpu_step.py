"""The GPU suite's whole training step: some of an 8B Llama's layers and its head, QLoRA r=16 on every linear.

Forward, backward and AdamW, run eagerly, as a training loop does it: with few tokens that is the time Python
takes. Random weights, the same for all; every token labelled. Memory is the peak over the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench import gpu_peers, peers
from bench.gpu_sections import Sizes, peak_bytes
from bench.gpu_timing import Call, Section, flat

PEFT_BF16 = f"{peers.PEFT_BNB}, bf16 adapters"
WITH_LIGER = f"{peers.PEFT_BNB}, bf16 adapters, Liger"
WRONG = 0.01  # of the loss: what bf16 leaves of a few layers is below a tenth of it


def train_step(section: Section, sizes: Sizes) -> None:
    for batch, length in sizes.step_tokens:
        layers = f"{sizes.step_layers} layer{'s' * (sizes.step_layers > 1)}"
        if not section.begin(f"{batch}x{length} tokens, {layers}, hidden {sizes.row_hidden}"):
            continue
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, sizes.head[1], (batch, length), generator=generator).to(section.device)
        losses: dict[str, float] = {}

        def check(name: str, call: Call, losses=losses) -> None:
            losses[name] = float(call())  # type: ignore[arg-type]
            first = next(iter(losses.values()))
            if not abs(losses[name] - first) <= WRONG * abs(first):
                raise ValueError(
                    f"wrong result: the loss is {losses[name]}, that of {next(iter(losses))} {first}"
                )

        makers = {
            name: partial(step_of, make, sizes, section.device, ids)
            for name, make in {
                peers.OURS: our_model,
                peers.PEFT_BNB: partial(peft_model, adapters=torch.float32),
                PEFT_BF16: partial(peft_model, adapters=torch.bfloat16),
                WITH_LIGER: partial(peft_model, adapters=torch.bfloat16, liger=True),
            }.items()
        }
        calls = section.make(makers, check)
        if section.device.type == "cuda":
            for name, call in calls.items():
                section.add(name, "peak over model", "MiB", [peak_bytes(call, section.device) / 2**20])
        for name, rounds in section.interleave(calls, turn_seconds=0.2).items():
            seconds = flat(rounds)
            section.add(name, "step", "ms", (s * 1e3 for s in seconds))
            section.add(name, "rate", "tokens/s", (ids.numel() / s for s in seconds))


def llama(sizes: Sizes, device: torch.device) -> Any:
    """The model of these sizes in bf16, the same weights each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads, kv_heads, head_dim = sizes.prefix_heads
    config = LlamaConfig(
        vocab_size=sizes.head[1], hidden_size=sizes.row_hidden, intermediate_size=sizes.row_intermediate,
        num_hidden_layers=sizes.step_layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def our_model(sizes: Sizes, device: torch.device) -> tuple[Any, Callable]:
    import peft_engine as pe

    model = pe.quantize_(llama(sizes, device))
    pe.attach(model, pe.LoraConfig(r=peers.RANK, lora_alpha=peers.ALPHA, target_modules="all-linear"))
    pe.optimize(model)
    return model, _nothing


def peft_model(
    sizes: Sizes, device: torch.device, *, adapters: torch.dtype, liger: bool = False
) -> tuple[Any, Callable]:
    """PEFT's LoRA over bitsandbytes' Linear4bit; with Liger's kernels for all but the linears where asked."""
    bnb, peft = gpu_peers.need("bitsandbytes"), gpu_peers.need("peft")
    model, during = llama(sizes, device), _nothing
    if liger:
        during = _liger(model)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, gpu_peers.bnb_linear(module.weight.detach()))
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    config = peft.LoraConfig(
        r=peers.RANK, lora_alpha=peers.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wide = adapters == torch.float32
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=wide)
    if not wide:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapters)
    return model, during


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _liger(model: Any) -> Callable:
    """Liger's kernels in this model; what it changes of transformers for all holds in the context given."""
    gpu_peers.need("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=model)
    changed = {name: value for name, value in vars(modeling_llama).items() if before.get(name) is not value}
    vars(modeling_llama).update({name: before[name] for name in changed if name in before})

    @contextmanager
    def during() -> Iterator[None]:
        vars(modeling_llama).update(changed)
        try:
            yield
        finally:
            vars(modeling_llama).update({name: before[name] for name in changed if name in before})

    return during


def step_of(make: Callable, sizes: Sizes, device: torch.device, ids: torch.Tensor) -> Call:
    model, during = make(sizes, device)
    model.train()
    adam = peers.optimizer(model, lr=0.0)  # the same loss in every step

    def step() -> torch.Tensor:
        with during():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.detach()

    return step
