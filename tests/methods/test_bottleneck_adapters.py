"""Bottleneck adapters on models of each family: what they compute, and that they come and go."""

import copy
import pickle
import threading

import families
import pytest
import torch
from families import build, inputs
from method_cases import quantized, shake
from torch import nn
from torch.nn import functional as F

import peft_engine as pe
from peft_engine import dispatch
from peft_engine.methods import bottleneck_layers
from peft_engine.methods.attach import tensors
from peft_engine.methods.bottleneck_sites import find

HOULSBY = pe.BottleneckConfig.houlsby(width=5)
PFEIFFER = pe.BottleneckConfig.pfeiffer(width=6)
PARALLEL = pe.BottleneckConfig.parallel(width=7)
CONFIGS = {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "parallel": PARALLEL}
POST_NORM = ("bert", "roberta", "bart")


def logits(model: nn.Module, x: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**x).logits


def attached(family: str, config=HOULSBY, name: str = "default", model=None) -> nn.Module:
    model = build(family) if model is None else model
    torch.manual_seed(1)
    return shake(pe.attach(model, config, name), name, seed=len(name))


# --- what is computed ---------------------------------------------------------------------------------------


class ByHand:
    """A base model with adapters as a plain reading of the papers has them, by its layers' own modules."""

    def __init__(self, model: nn.Module, config):
        self.config = config
        self.base = copy.deepcopy(model)
        weights = {path: held.adapters["default"] for path, held in bottleneck_layers.of(model).items()}
        pe.detach(self.base)
        for site in find(self.base):
            if site.path in weights:
                self.place(site, weights[site.path])

    def place(self, site, adapter) -> None:
        seen = {}
        layer = self.base

        def before(module, args, kwargs):
            given = [*args, *kwargs.values()] if args else [kwargs["hidden_states"]]
            seen["s"] = given[site.argument]

        def after(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            y = self.adapt(adapter, h, seen["s"], site)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        layer.get_submodule(site.source).register_forward_pre_hook(before, with_kwargs=True)
        layer.get_submodule(site.path).register_forward_hook(after)

    def adapt(self, a, h, s, site):
        config = self.config
        x = s if config.is_parallel else h
        if config.original_ln_before:
            x = h + s
            if site.norm is not None:
                x = self.base.get_submodule(site.norm)(x)
        middle = x @ a.down_weight.T + a.down_bias
        middle = F.silu(middle) if config.non_linearity == "swish" else middle.clamp(min=0)
        return h + config.scaling * (middle @ a.up_weight.T + a.up_bias)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_forward_is_that_of_the_papers(family, preset):
    model = attached(family, CONFIGS[preset])
    base = logits(build(family), inputs(family))
    wanted = logits(ByHand(model, CONFIGS[preset]).base, inputs(family))
    got = logits(model, inputs(family))
    assert not torch.allclose(got, base, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_sites_are_where_the_sublayers_are(family):
    sites = find(build(family))
    encoders = family in families.ENCODER_DECODERS
    kinds = [site.kind for site in sites]
    assert kinds.count("mh_adapter") == kinds.count("output_adapter") == (4 if encoders else 2)
    assert kinds.count("cross_adapter") == (2 if encoders else 0)
    assert sorted({site.layer for site in sites}) == list(range(4 if encoders else 2))
    assert all((site.norm is not None) == (family in POST_NORM) for site in sites)
    assert all(site.width == 32 and not site.generic for site in sites)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_an_adapter_starts_near_the_base_and_trains_alone(family):
    model, x = build(family), inputs(family)
    base = logits(model, x)
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    pe.attach(model, HOULSBY)
    torch.testing.assert_close(logits(model, x), base, rtol=0.05, atol=0.02)
    mine = tensors(model, "default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(**x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not pe.methods.adapters_without_gradient(model)
    assert {id(p) for p in mine.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters() if name in held)


def test_a_parallel_adapter_starts_at_the_base():
    model, x = build("gpt2"), inputs("gpt2")
    base = logits(model, x)
    assert torch.equal(logits(pe.attach(model, PARALLEL), x), base)


# --- coming and going ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_detach_leaves_the_base_bit_for_bit(family, preset):
    model, x = build(family), inputs(family)
    base, keys = logits(model, x), list(model.state_dict())
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    attached(family, CONFIGS[preset], "a", model)
    attached(family, HOULSBY, "b", model)
    with pe.active(model, None):
        assert torch.equal(logits(model, x), base)
    pe.detach(model, "a")
    pe.active(model, "b")
    assert not torch.equal(logits(model, x), base)
    pe.detach(model)
    assert torch.equal(logits(model, x), base)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())
    now = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    assert now == hooks


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("twin", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_copies_and_pickles_stand_on_their_own(preset, twin):
    model, x = attached("bert", CONFIGS[preset]), inputs("bert")
    model(**x)
    wanted = logits(model, x)
    other = twin(model)
    assert torch.equal(logits(other, x), wanted)
    shake(other, seed=7)
    other.bert.encoder.layer[0].output.LayerNorm.weight.data.add_(1.0)
    assert torch.equal(logits(model, x), wanted)
    held = bottleneck_layers.of(other)["bert.encoder.layer.0.output.dropout"]
    assert held.norm[0] is other.bert.encoder.layer[0].output.LayerNorm
    changed = logits(other, x)
    assert not torch.equal(changed, wanted)
    pe.detach(other)
    assert not torch.equal(logits(other, x), changed)


@pytest.mark.parametrize("alike", (True, False), ids=("rows-apart", "as-on-a-gpu"))
@pytest.mark.parametrize("family", families.FAMILIES)
def test_rows_of_a_mixed_batch_have_the_bits_of_their_adapter(family, alike, monkeypatch):
    monkeypatch.setattr(bottleneck_layers, "_sums_alike", lambda h, rows: alike)
    model, x = build(family), inputs(family)
    base = logits(model, x)
    apart = {}
    for name, config in CONFIGS.items():
        attached(family, config, name, model)
        apart[name] = logits(model, x)
    names = ["pfeiffer", None, "parallel", "houlsby"]
    with pe.active(model, names):
        together = logits(model, x)
    for row, name in enumerate(names):
        wanted = base if name is None else apart[name]
        assert torch.equal(together[row], wanted[row]), f"row {row}, {name}"


@pytest.mark.parametrize("family", ("llama", "bert", "bart"))
def test_it_stacks_on_lora_and_a_prefix(family):
    model, x = build(family), inputs(family)
    lora = pe.LoraConfig(r=2, target_modules="all-linear")
    attached(family, PFEIFFER, "bottle", model)
    attached(family, lora, "lora", model)
    attached(family, pe.PrefixTuningConfig(num_virtual_tokens=3), "prefix", model)
    assert not any("peft_engine_" in path for path in tensors(model, "lora"))
    seen = {}
    for which in ("bottle", "lora", "prefix", "bottle+lora", "bottle+lora+prefix"):
        with pe.active(model, which):
            seen[which] = logits(model, x)
    assert len({tuple(out.flatten().tolist()) for out in seen.values()}) == len(seen)
    mixed = ["bottle+lora", None, "bottle+lora+prefix", "lora"]
    with pe.active(model, mixed):
        together = logits(model, x)
    with pe.active(model, None):
        seen[None] = logits(model, x)
    for row, name in enumerate(mixed):
        torch.testing.assert_close(together[row], seen[name][row])
    with pytest.raises(ValueError, match="cannot stack"):
        pe.active(pe.attach(model, HOULSBY, "more"), "bottle+more")


def test_lora_and_quantisation_pass_by_what_a_method_put_in():
    model = build("llama")
    linears = {path for path, m in model.named_modules() if type(m) is nn.Linear and path != "lm_head"}
    attached("llama", HOULSBY, "bottle", model)
    prefix = pe.PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True)
    pe.attach(model, prefix, "prefix")
    pe.quantize_(model)
    dense = {path for path, m in model.named_modules() if type(m) is nn.Linear and path != "lm_head"}
    assert dense and all("peft_engine_" in path for path in dense)
    pe.attach(model, pe.LoraConfig(r=2, target_modules="all-linear", bias="all"), "lora")
    held = tensors(model, "lora")
    assert {path.rpartition(".lora_")[0] for path in held if ".lora_" in path} == linears
    assert not any("peft_engine_" in path for path in held)


# --- training settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("family", ("llama", "bert", "bart", "t5"))
def test_gradient_checkpointing_gives_the_same_gradients(family, preset):
    grads = []
    for checkpointing in (False, True):
        model = attached(family, CONFIGS[preset]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(family)).loss.backward()
        grads.append([p.grad for p in tensors(model, "default").values()])
    if family == "t5":  # its layers sum the gradient of the position bias in another order, with any adapter
        return torch.testing.assert_close(*grads)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("preset", CONFIGS)
def test_it_trains_over_an_nf4_base_in_bfloat16(preset):
    model = quantized(build("llama", dtype=torch.bfloat16))
    x = inputs("llama")
    base = logits(model, x)
    pe.attach(model, CONFIGS[preset])
    mine = tensors(model, "default")
    assert all(p.dtype == torch.float32 for p in mine.values())
    optimizer = torch.optim.AdamW(mine.values(), lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(**x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and model(**x).logits.dtype == torch.bfloat16
    pe.detach(model)
    assert torch.equal(logits(model, x), base)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("first", (True, False))
def test_optimize_goes_before_and_after(preset, first):
    model, x = build("llama"), inputs("llama")
    wanted = logits(attached("llama", CONFIGS[preset]), x)
    if first:
        pe.optimize(model)
    attached("llama", CONFIGS[preset], model=model)
    report = pe.optimize(model)
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-4, atol=1e-5)
    lines = [line for line in report.layers if line.op == "bottleneck"]
    assert len(lines) == len(bottleneck_layers.of(model))
    assert "bottleneck" in str(report)


@pytest.mark.parametrize("family,preset", (("llama", "parallel"), ("bert", "pfeiffer")))
def test_it_compiles_whole(family, preset):
    model = attached(family, CONFIGS[preset], model=build(family, num_hidden_layers=1))
    model.config.use_cache = False
    mine = list(tensors(model, "default").values())
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        out = run(**inputs(family))
        results.append([out.logits, *torch.autograd.grad(out.loss, mine)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("preset", ("pfeiffer", "parallel"))
def test_a_forward_in_the_middle_of_another_threads_keeps_its_states(preset):
    model = attached("bert", getattr(pe.BottleneckConfig, preset)(width=4)).eval()
    batches = [inputs("bert", seed=seed) for seed in (0, 5)]
    want, got = [model(**batch).logits for batch in batches], []

    def meanwhile(module, args):
        hook.remove()
        other = threading.Thread(target=lambda: got.append(model(**batches[1]).logits))
        other.start()
        other.join()

    hook = model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(meanwhile)
    got.append(model(**batches[0]).logits)
    assert torch.equal(got[1], want[0]) and torch.equal(got[0], want[1])


def test_dropout_is_for_training_and_repeats_with_the_seed():
    model, x = attached("bert", pe.BottleneckConfig.houlsby(width=5, dropout=0.5)), inputs("bert")
    still = logits(model, x)
    assert torch.equal(still, logits(model, x))
    assert torch.equal(still, logits(attached("bert", HOULSBY), x))
    model.train()
    torch.manual_seed(3)
    first = logits(model, x)
    assert not torch.equal(first, logits(model, x))
    torch.manual_seed(3)
    assert torch.equal(first, logits(model, x))


def test_autocast_casts_the_layers_and_not_the_adapters():
    model, x = attached("llama", PARALLEL), inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**x)
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in tensors(model, "default").values()
    )


def test_generate_with_a_cache_and_a_mixed_batch():
    model, x = build("llama"), inputs("llama", pad="left")
    ask = {
        "input_ids": x["input_ids"],
        "attention_mask": x["attention_mask"],
        "max_new_tokens": 4,
        "do_sample": False,
    }
    alone = {}
    for name, config in CONFIGS.items():
        attached("llama", config, name, model)
        alone[name] = model.generate(**ask, num_beams=2)
    names = ["parallel", "houlsby", "pfeiffer", "houlsby"]
    with pe.active(model, names):
        together = model.generate(**ask, num_beams=2)
    for row, name in enumerate(names):
        assert torch.equal(together[row], alone[name][row])


def test_the_backend_that_is_pinned_runs():
    model, x = attached("llama"), inputs("llama")
    wanted = logits(model, x)
    with dispatch.force_backend("reference"):
        torch.testing.assert_close(logits(model, x), wanted, rtol=1e-4, atol=1e-5)
