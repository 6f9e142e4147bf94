"""Two processes that train one model: DistributedDataParallel, and fully_shard (FSDP2), on the CPU.

Each works on half of a batch; gradients and files are those of one process that works on all of it.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import peft_engine as pe

CONFIGS = {
    "lora": pe.LoraConfig(r=4, target_modules="all-linear"),
    "qlora": pe.LoraConfig(r=4, target_modules="all-linear"),
    "dora": pe.LoraConfig(r=4, target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
    "prefix": pe.PrefixTuningConfig(num_virtual_tokens=5),
    "prompt": pe.PromptTuningConfig(num_virtual_tokens=5),
    "bottleneck": pe.BottleneckConfig.pfeiffer(reduction_factor=8),
}


# torch 2.11's fully_shard takes no uint8 parameters
SHARDED = [m for m in CONFIGS if m != "qlora" or torch.__version__ >= "2.13"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=101,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(method: str) -> LlamaForCausalLM:
    model = base()
    if method == "qlora":
        pe.quantize_(model)
    torch.manual_seed(1)
    pe.attach(model, CONFIGS[method], name="task")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    pe.optimize(model)
    return model.train()


def ids() -> torch.Tensor:
    return torch.randint(0, 101, (4, 13), generator=torch.Generator().manual_seed(2))


def backward(model: torch.nn.Module, rows: torch.Tensor) -> None:
    model(input_ids=rows, labels=rows).loss.backward()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: torch.nn.Module) -> None:
    """By hand, large enough to change every tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.5)


def sharded(model: LlamaForCausalLM, every: bool = False) -> LlamaForCausalLM:
    """Its layers by themselves; every: also each module in them and the head."""
    for layer in model.model.layers:
        for path, module in list(layer.named_modules()) if every else ():
            if path.endswith(("_proj", "norm")):
                fully_shard(module)
        fully_shard(layer)
    if every:
        fully_shard(model.lm_head)
    return fully_shard(model)


def work(rank: int, folder: Path) -> None:
    """What a process does; it leaves what it found in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mine = ids()[2 * rank : 2 * rank + 2]
    found = {}
    for method in CONFIGS:
        model = adapted(method)
        backward(DistributedDataParallel(model), mine)
        found["ddp", method] = gradients(model)
        if method not in SHARDED:
            continue
        model = adapted(method)
        if method in ("qlora", "prompt"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = fused(model)
        sharded(model, every=method in ("lora", "dora"))
        found["explained", method] = before, fused(model)
        backward(model, mine)
        found["fsdp", method] = {name: grad.full_tensor() for name, grad in gradients(model).items()}
        step(model)
        pe.save_adapter(model, folder / f"fsdp-{method}", name="task")
    found["switched"] = switched(mine)
    found["errors"] = [error(model, folder, what) for what in ERRORS]
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def fused(model: torch.nn.Module) -> dict[str, bool]:
    return {layer.name: layer.fused for layer in pe.explain(model).layers}


def switched(rows: torch.Tensor) -> list[set[str]]:
    """The adapters whose tensors have a gradient, as `active` switches after fully_shard."""
    model = base()
    pe.attach(model, CONFIGS["lora"], name="first")
    pe.attach(model, CONFIGS["bottleneck"], name="second")
    pe.optimize(model)
    sharded(model, every=True).train()
    out = []
    for which in ("first", "second", ["first", "second"]):
        pe.active(model, which)
        backward(model, rows)
        out.append({part for name in gradients(model) for part in name.split(".")} & {"first", "second"})
        model.zero_grad()
    return out


def error(model: LlamaForCausalLM, folder: Path, what: str) -> str:
    try:
        ERRORS[what](model, folder)
    except (ValueError, OSError, RuntimeError) as raised:
        return str(raised)
    return "nothing was raised"


def _part_of_a_layer(model: LlamaForCausalLM, folder: Path) -> None:
    """The backward of what was taken from inside a layer."""
    model = sharded(adapted("lora"))
    taken = []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, args, out: taken.append(out))
    model(input_ids=ids())
    taken[0].sum().backward()


def _save_into_a_file(model: LlamaForCausalLM, folder: Path) -> None:
    (folder / "file").write_text("")
    pe.save_adapter(model, folder / "file", name="task")


def _save_untrained(model: LlamaForCausalLM, folder: Path) -> None:
    fresh = base()
    pe.attach(fresh, pe.LoraConfig(r=4), name="task")
    pe.save_adapter(sharded(fresh), folder / "untrained", name="task")


ERRORS = {
    "attach": lambda model, folder: pe.attach(model, pe.LoraConfig(r=2), name="other"),
    "load_adapter": lambda model, folder: pe.load_adapter(model, folder / "fsdp-lora", name="other"),
    "merge_": lambda model, folder: pe.merge_(model, name="task"),
    "detach": lambda model, folder: pe.detach(model),
    "quantize_": lambda model, folder: pe.quantize_(sharded(base())),
    "untrained": _save_untrained,
    "file": _save_into_a_file,
    "freed": _part_of_a_layer,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    if sys.platform != "linux":
        pytest.skip("two processes meet by gloo on Linux alone")
    folder = tmp_path_factory.mktemp("two")
    spawn(work, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _skip_unless_it_shards(method: str) -> None:
    if method not in SHARDED:
        pytest.skip(f"fully_shard of torch {torch.__version__} takes no uint8 parameters (NF4)")


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(two, kind, method):
    if kind == "fsdp":
        _skip_unless_it_shards(method)
    model = adapted(method)
    backward(model, ids())
    exact = gradients(model)
    for found in two[1]:
        assert found[kind, method].keys() == exact.keys()
        for name, grad in exact.items():
            torch.testing.assert_close(found[kind, method][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_sharded_model_s_file_is_that_of_one_process(two, tmp_path, method):
    _skip_unless_it_shards(method)
    model = adapted(method)
    backward(model, ids())
    step(model)
    pe.save_adapter(model, tmp_path / "one", name="task")
    there, here = two[0] / f"fsdp-{method}", tmp_path / "one"
    assert {file.name for file in there.iterdir()} == {file.name for file in here.iterdir()}
    config = "adapter_config.json"
    assert json.loads((there / config).read_text()) == json.loads((here / config).read_text())
    (weights,) = (file.name for file in here.iterdir() if file.name != config)
    a, b = load_file(there / weights), load_file(here / weights)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    fresh = base()
    if method == "qlora":
        pe.quantize_(fresh)
    pe.load_adapter(fresh, there)  # which compares the bases
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.eval()(input_ids=ids()).logits, model.eval()(input_ids=ids()).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("method", CONFIGS)
def test_explain_says_the_same_of_a_sharded_model(two, method):
    _skip_unless_it_shards(method)
    before, after = two[1][0]["explained", method]
    if method in (
        "lora",
        "dora",
    ):  # a head that is sharded by itself has its weight while it runs: no fused loss
        assert before.pop("lm_head") and not after.pop("lm_head")
    assert after == before


def test_active_switches_a_sharded_model(two):
    for found in two[1]:
        assert found["switched"] == [{"first"}, {"second"}, {"first", "second"}]


@pytest.mark.parametrize("what", ["attach", "load_adapter", "merge_", "detach", "quantize_"])
def test_what_changes_layers_is_refused_after_fully_shard(two, what):
    for found in two[1]:
        told = found["errors"][list(ERRORS).index(what)]
        assert told.startswith(f"{what}: ") and f"call {what} first, then fully_shard" in told


def test_a_save_that_fails_in_the_first_process_fails_in_all(two):
    for found in two[1]:
        assert "save_adapter" in found["errors"][list(ERRORS).index("file")]
        assert "untouched by training" in found["errors"][list(ERRORS).index("untrained")]


def test_a_weight_that_fully_shard_has_freed_is_told_and_not_read(two):
    for found in two[1]:
        assert "was freed" in found["errors"][list(ERRORS).index("freed")]
