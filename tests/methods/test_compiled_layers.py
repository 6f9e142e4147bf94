"""Layers that are compiled one by one, in a model whose other parts, and whose hooks, are not."""

import copy

import pytest
import torch
import transformers
from method_cases import shake

import peft_engine as pe

CONFIGS = {
    "lora": pe.LoraConfig(r=4, target_modules="all-linear"),
    "prefix": pe.PrefixTuningConfig(num_virtual_tokens=4),
    "prompt": pe.PromptTuningConfig(num_virtual_tokens=4),
    "houlsby": pe.BottleneckConfig.houlsby(reduction_factor=4),
    "pfeiffer": pe.BottleneckConfig.pfeiffer(reduction_factor=4),
    "parallel": pe.BottleneckConfig.parallel(reduction_factor=4),
}
PARTS = {
    "layers": lambda model: list(model.model.layers),
    "attention": lambda model: [layer.self_attn for layer in model.model.layers],
    "mlp": lambda model: [layer.mlp for layer in model.model.layers],
}


@pytest.fixture(autouse=True)
def fresh_cache():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(model, method):
    torch.manual_seed(5)
    return shake(pe.attach(model, CONFIGS[method]))


def results(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "method, part, when",
    [
        *((method, "layers", "before") for method in CONFIGS),
        ("prompt", "layers", "after"),
        ("prompt", "attention", "before"),
        ("prefix", "attention", "after"),
        ("pfeiffer", "mlp", "before"),
        ("parallel", "mlp", "after"),
    ],
)
def test_an_adapter_does_what_it_does_uncompiled(tiny_llama, method, part, when):
    base = tiny_llama().eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    wanted = results(adapted(copy.deepcopy(base), method), ids)

    def compile_parts():
        for module in PARTS[part](base):
            module.compile(backend="aot_eager")

    if when == "before":
        compile_parts()
        with torch.no_grad():
            plain = base(input_ids=ids, labels=ids, use_cache=False).loss
    adapted(base, method)
    if when == "after":
        compile_parts()
    for _ in range(2):
        base.zero_grad()
        found = results(base, ids)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if when == "before":
        pe.detach(base)
        with torch.no_grad():
            assert torch.equal(base(input_ids=ids, labels=ids, use_cache=False).loss, plain)


def test_positions_move_where_the_embeddings_are_compiled_alone():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **sizes)).eval()
    ids = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    shake(pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=4)))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        model.bert.embeddings.compile(backend="aot_eager")
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
