"""What LoRA refuses: configs that make no sense, models they do not fit, names that cannot be."""

import time

import families
import pytest
import torch
import transformers
from method_cases import ALL
from torch import nn
from torch.nn.utils import prune

import peft_engine as pe
from peft_engine.methods import BottleneckConfig, LoraConfig, active, attach, detach
from peft_engine.nn import NF4Linear
from peft_engine.quantize import quantize_


def state(model: nn.Module) -> dict:
    """What a refused call must leave alone."""
    classes = {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()}
    flags = {path: (id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)}
    return {"modules": classes, "parameters": flags}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=0), "r must be an integer of at least 1, got 0"),
        (dict(r=2.5), "r must be an integer"),
        (dict(r=True), "r must be an integer"),
        (dict(rank_pattern={"q": 0}), r"rank_pattern\['q'\]"),
        (dict(lora_alpha=float("nan")), "lora_alpha must be a finite number"),
        (dict(lora_dropout=1.0), r"lora_dropout must be in \[0, 1\)"),
        (dict(bias="some"), "bias must be one of none, all, lora_only"),
        (dict(init_lora_weights="pissa"), "init_lora_weights must be one of"),
        (dict(target_modules=[]), "target_modules is empty"),
        (dict(target_modules="(q_proj"), "not a regular expression"),
        (dict(target_modules="a{99999999999}"), "not a regular expression"),
        (dict(target_modules="(" * 3000 + ")" * 3000), "not a regular expression"),
        (dict(target_modules=[3]), "target_modules must be a list of names"),
        (dict(modules_to_save="lm_head"), "modules_to_save must be a list"),
        (dict(target_modules="all-linear", layers_to_transform=[0]), "needs target_modules to be a list"),
        (dict(layers_pattern="layers"), "only with layers_to_transform"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(settings, message):
    with pytest.raises((TypeError, ValueError), match=f"LoraConfig: .*{message}|LoraConfig: {message}"):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(r=65, target_modules="all-linear"),
            r"rank 65 is above what model.layers.0.self_attn.q_proj .* 64",
        ),
        (dict(rank_pattern={"k_proj": 33}, target_modules=["k_proj"]), "rank 33 is above .*k_proj"),
        (dict(target_modules=["_proj"]), "'_proj' match no module"),
        (dict(target_modules=["k_proj"], rank_pattern={"k": 2}), "rank_pattern: 'k' decides no"),
        (dict(target_modules=["q_prj"]), "'q_prj' match no module.*q_proj"),
        (dict(target_modules=["q_proj", "query"]), "'query' match no module"),
        (dict(target_modules=".*nothing"), "targets nothing"),
        (dict(target_modules="all-linear", exclude_modules=".*"), "all 14 that match are excluded"),
        (dict(target_modules=["q_proj"], rank_pattern={"k_proj": 2}), "rank_pattern: 'k_proj' decides no"),
        (
            dict(target_modules="all-linear", exclude_modules=["up_prj"]),
            "'up_prj' matches no.*near it: up_proj",
        ),
        (
            dict(target_modules="all-linear", exclude_modules="up_proj"),
            "exclude_modules 'up_proj' matches no",
        ),
        (dict(target_modules=["embed_tokens"]), "embed_tokens is Embedding"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_hed"]), "'lm_hed'.*near it: lm_head"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_and_nothing_changes(tiny_llama, settings, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        attach(model, LoraConfig(**settings))
    assert state(model) == before


def test_names_and_indices_may_come_from_what_gives_them_once():
    config = LoraConfig(target_modules=map(str, ["q_proj"]), layers_to_transform=iter([1]))
    assert config.target_modules == ["q_proj"] and config.layers_to_transform == [1]
    assert BottleneckConfig(leave_out=filter(None, [1, 0])).leave_out == [1]


def test_the_rank_may_be_all_that_the_layer_holds(tiny_llama):
    attach(tiny_llama(), LoraConfig(r=64, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 32}))


@pytest.mark.parametrize("name", ["", "a.b", "values", "training", "__base__", 3])
def test_a_name_that_a_module_cannot_hold_is_refused(tiny_llama, name):
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        attach(tiny_llama(), ALL, name)


def test_a_name_that_is_taken_is_refused(tiny_llama):
    model = attach(tiny_llama(), ALL)
    with pytest.raises(ValueError, match="'default' is attached already"):
        attach(model, ALL)


def test_adapters_of_a_part_are_not_written_over(tiny_llama):
    model = tiny_llama()
    attach(model.model, ALL)
    before = state(model)
    with pytest.raises(ValueError, match=r"attach: model has adapters of its own \(default\).*detach them"):
        attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert state(model) == before
    detach(model.model)
    attach(model, ALL)


def test_a_module_is_adapted_or_trained_whole_but_not_both(tiny_llama):
    model = attach(tiny_llama(), ALL, "a")
    with pytest.raises(ValueError, match="adapted or trained whole"):
        attach(model, LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["q_proj"]), "b")
    model = attach(tiny_llama(), LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["q_proj"]), "b")
    with pytest.raises(TypeError, match="adapted or trained whole"):
        attach(model, ALL, "a")


def test_a_whole_module_in_nf4_cannot_be_trained(tiny_llama):
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.q_proj = NF4Linear.from_linear(attention.q_proj)
    with pytest.raises(TypeError, match=r"layers\.1.*quantised .*skip_modules"):
        attach(model, LoraConfig(target_modules=["k_proj"], modules_to_save=["q_proj"]))


def test_experts_in_one_parameter_are_refused_by_name():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=32,
    )
    model = transformers.MixtralForCausalLM(config)
    for targets in (["q_proj", "experts"], ["gate_up_proj"], r".*\.experts.*"):
        with pytest.raises(ValueError, match=r"experts\.(gate_up|down)_proj .* 3-D parameter"):
            attach(model, LoraConfig(target_modules=targets))
    attach(model, LoraConfig(target_modules=["q_proj"]))


def test_a_mixed_batch_through_routed_experts_is_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    model = nn.Sequential(model)
    attach(model, LoraConfig(r=2, target_modules="all-linear"), "a")
    active(model, "a")
    with pytest.raises(ValueError, match=r"experts\.0 gets its rows from a router"):
        active(model, ["a", None])


def test_a_mixed_batch_through_a_replaced_forward_is_refused_and_nothing_switches(tiny_llama):
    model = attach(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "a")
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ValueError, match="lm_head has its forward replaced"):
        active(model, ["a", None])
    assert model.peft_engine_active == "a"
    assert model.model.layers[0].self_attn.q_proj.active_adapter == "a"


def test_a_layer_that_runs_a_mixed_batch_of_copies_is_adapted_after_it(tiny_llama):
    model = tiny_llama(attention_bias=True)
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "a")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"]), "b")
    more = LoraConfig(r=2, target_modules=["k_proj"])
    with (
        active(model, ["a", "b"]),
        pytest.raises(ValueError, match=r"k_proj runs a mixed batch .*activate one adapter first"),
    ):
        attach(model, more, "c")
    attach(model, more, "c")


@pytest.mark.peers
def test_a_peft_model_is_sent_to_optimize(tiny_llama):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the adapters of this model are PEFT's"):
        detach(model, "default")
    with pytest.raises(TypeError, match=r"must be one of peft_engine.LoraConfig.*got peft"):
        attach(tiny_llama(), peft.LoraConfig())
    for whole in (model, model.base_model.model):
        with pytest.raises(ValueError, match="PEFT's adapters already"):
            attach(whole, ALL)


def test_a_pattern_that_takes_forever_is_refused_in_a_second(llama):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"takes over 1.0 s to compare.*without a repeat inside a repeat"):
        attach(llama(), LoraConfig(target_modules=r"(.|.)*[X-Z]"))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("how", ["pruned", "weight_norm"])
def test_a_weight_that_is_no_parameter_is_refused_by_name(tiny_llama, how):
    model = tiny_llama()
    layer = model.model.layers[0].self_attn.q_proj
    if how == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.3)
    else:
        torch.nn.utils.weight_norm(layer)
    with pytest.raises(TypeError, match=r"weight of model.layers.0.self_attn.q_proj is no parameter"):
        attach(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises((TypeError, ValueError), match=r"q_proj has a weight that is no parameter"):
        quantize_(model)
    attach(model, LoraConfig(target_modules=["k_proj"]))


def test_a_rank_that_a_classifier_cannot_hold_is_refused_with_the_task_that_trains_it_whole():
    model = families.build("bert")
    before = state(model)
    said = "rank 8 is above what classifier .* trained whole.*task_type='SEQ_CLS' or 'TOKEN_CLS'"
    with pytest.raises(ValueError, match=said):
        attach(model, LoraConfig(r=8, target_modules="all-linear"))
    assert state(model) == before
    attach(model, LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS"))
    assert any(p.requires_grad for name, p in model.named_parameters() if "classifier" in name)


@pytest.mark.parametrize(
    "kind", ["LoraConfig", "PrefixTuningConfig", "PromptTuningConfig", "BottleneckConfig"]
)
def test_a_task_is_one_of_pefts_and_inference_mode_is_off(kind, tmp_path):
    config = getattr(pe, kind)
    with pytest.raises(ValueError, match=f"{kind}: task_type must be one of CAUSAL_LM, .*got 'seq_cls'"):
        config(task_type="seq_cls")
    with pytest.raises(TypeError, match="task_type must be a string, got 3"):
        config(task_type=3)
    if kind != "BottleneckConfig":
        assert config(inference_mode=False) == config()
        with pytest.raises(ValueError, match=f"{kind}: inference_mode must be False, got True"):
            config(inference_mode=True)


def test_a_string_that_is_a_name_is_told_to_be_an_expression(tiny_llama):
    with pytest.raises(ValueError, match="a string is one expression for whole paths: give a list of names"):
        pe.attach(tiny_llama(), pe.LoraConfig(target_modules="q_proj"))
