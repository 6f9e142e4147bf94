"""What bottleneck adapters refuse, each with its reason, and their file's fields both ways."""

import json

import pytest
import torch
from families import build
from torch import nn

import peft_engine as pe
from peft_engine.methods import bottleneck, bottleneck_files, bottleneck_layers
from peft_engine.methods.attach import tensors

# As the library (1.3.0) wrote it: DoubleSeqBnConfig(reduction_factor=4), BertForSequenceClassification.
THEIR_FILE = """{"config": {"adapter_residual_before_ln": false, "cross_adapter": false, "dropout": 0.0,
"factorized_phm_W": true, "factorized_phm_rule": false, "hypercomplex_nonlinearity": "glorot-uniform",
"init_weights": "bert", "init_weights_seed": null, "inv_adapter": null, "inv_adapter_reduction_factor":
null, "is_parallel": false, "learn_phm": true, "leave_out": [], "ln_after": false, "ln_before": false,
"mh_adapter": true, "non_linearity": "swish", "original_ln_after": true, "original_ln_before": false,
"output_adapter": true, "phm_bias": true, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range":
0.0001, "phm_layer": false, "phm_rank": 1, "reduction_factor": 4, "residual_before_ln": true, "scaling":
1.0, "shared_W_phm": false, "shared_phm_rule": true, "stochastic_depth": 0.0, "use_gating": false},
"hidden_size": 32, "model_class": "BertForSequenceClassification", "model_name": "", "model_type":
"bert", "name": "a", "version": "adapters.1.3.0"}"""


@pytest.mark.parametrize(
    "fields,message",
    (
        ({"original_ln_after": False}, "original_ln_after=False is not offered, only True"),
        ({"use_gating": True}, "use_gating=True is not offered"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice' is not offered"),
        ({"phm_layer": True}, "phm_layer=True is not offered"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.1 is not offered"),
        ({"scaling": "learned"}, "scaling='learned' is not offered"),
        ({"scaling": float("nan")}, "scaling must be a finite number"),
        ({"mh_adapter": 1}, "mh_adapter must be True or False"),
        ({"output_adapter": False}, "leaves no adapter"),
        ({"width": 4, "reduction_factor": 8}, "both say how wide"),
        ({"width": 0}, "width must be an integer of at least 1"),
        ({"reduction_factor": 0}, "reduction_factor must be a number of at least 0.001"),
        ({"reduction_factor": {"first": 2}}, "reduction_factor's keys are layer indices"),
        ({"non_linearity": "gelu_new"}, "non_linearity must be one of"),
        ({"init_weights": "xavier"}, "init_weights must be one of"),
        ({"residual_before_ln": "after"}, "residual_before_ln must be"),
        ({"residual_before_ln": "post_add"}, "only with original_ln_before=True"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"leave_out": [-1]}, "leave_out must be a list of layer indices"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list"),
    ),
)
def test_a_field_that_cannot_be_is_named_with_the_reason(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pe.BottleneckConfig(**fields)


@pytest.mark.parametrize(
    "family,config,message",
    (
        ("bert", pe.BottleneckConfig.houlsby(leave_out=[5]), "leave_out names layer 5, and the model has 2"),
        ("bert", pe.BottleneckConfig.houlsby(leave_out=[0, 1]), "leaves no layer an adapter"),
        (
            "gpt2",
            pe.BottleneckConfig(cross_adapter=True),
            "no attention to an encoder was found in GPT2LMHead",
        ),
        ("bert", pe.BottleneckConfig(reduction_factor={"0": 4}), "says nothing of layer 1; add a 'default'"),
        ("bloom", pe.BottleneckConfig.pfeiffer(), "BloomForCausalLM is of no family known here"),
        ("bert", pe.BottleneckConfig(modules_to_save=["nose"]), "modules_to_save names 'nose'"),
    ),
)
def test_what_does_not_fit_the_model_leaves_it_unchanged(family, config, message):
    model = build(family)
    with pytest.raises((TypeError, ValueError), match=message):
        pe.attach(model, config)
    assert not bottleneck_layers.of(model) and not hasattr(model, "peft_engine_adapters")


def test_a_model_without_sublayers_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"no feed-forward was found in Sequential.*use LoRA"):
        pe.attach(nn.Sequential(nn.Linear(4, 4)), pe.BottleneckConfig())


@pytest.mark.parametrize("preset", ("houlsby", "parallel"))
def test_an_unknown_family_gets_adapters_by_name_and_the_report_says_so(preset):
    model, ids = build("bloom"), torch.arange(12).view(2, 6) + 3
    base = model(ids).logits
    pe.attach(model, getattr(pe.BottleneckConfig, preset)(width=4))
    with torch.no_grad():
        for tensor in tensors(model, "default").values():
            tensor.add_(0.1)
    out = model(ids).logits
    out.sum().backward()
    assert not torch.allclose(out, base) and not pe.methods.adapters_without_gradient(model)
    lines = [line for line in pe.explain(model).layers if line.op == "bottleneck"]
    assert len(lines) == len(bottleneck_layers.of(model))
    assert all("of no family known here" in line.reason for line in lines)


def test_presets_are_those_of_the_library():
    houlsby, pfeiffer, parallel = (
        getattr(pe.BottleneckConfig, name)() for name in ("houlsby", "pfeiffer", "parallel")
    )
    assert (houlsby.mh_adapter, houlsby.output_adapter) == (True, True)
    assert (houlsby.non_linearity, houlsby.reduction_factor) == ("swish", 16)
    assert (pfeiffer.mh_adapter, pfeiffer.original_ln_before) == (False, True)
    assert (pfeiffer.non_linearity, pfeiffer.reduction_factor) == ("relu", 16)
    assert (parallel.is_parallel, parallel.scaling, parallel.reduction_factor) == (True, 4.0, 2)
    assert parallel.init_weights == "mam_adapter"
    assert pe.BottleneckConfig.parallel(width=3).width_of(64, 0) == 3


def test_widths_go_by_layer():
    model = build("bart")
    pe.attach(model, pe.BottleneckConfig(reduction_factor={1: 4, "default": 16}, leave_out=[3]))
    widths = {
        path: t.shape[0] for path, t in tensors(model, "default").items() if path.endswith("down.0.weight")
    }
    layers = [".".join(path.split(".")[1:4]) for path in widths]
    assert layers == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"]
    assert list(widths.values()) == [2, 8, 2]


# --- the file -----------------------------------------------------------------------------------------------

# Read off modeling_*.py and mixin_*.py of the library.
KEYS = {
    "bert": (
        "bert.encoder.layer.0.attention.output.adapters.N.adapter_down.0.weight",
        "bert.encoder.layer.1.output.adapters.N.adapter_up.bias",
    ),
    "gpt2": (
        "transformer.h.0.attention_adapters.adapters.N.adapter_down.0.bias",
        "transformer.h.1.output_adapters.adapters.N.adapter_up.weight",
    ),
    "llama": (
        "model.layers.0.attention_adapters.adapters.N.adapter_down.0.weight",
        "model.layers.1.output_adapters.adapters.N.adapter_up.weight",
    ),
    "t5": (
        "encoder.block.0.layer.0.adapters.N.adapter_down.0.weight",
        "decoder.block.0.layer.1.adapters.N.adapter_down.0.weight",
        "decoder.block.1.layer.2.adapters.N.adapter_up.weight",
    ),
    "bart": (
        "model.encoder.layers.0.attention_adapters.adapters.N.adapter_down.0.weight",
        "model.decoder.layers.1.cross_attention_adapters.adapters.N.adapter_up.weight",
        "model.decoder.layers.1.output_adapters.adapters.N.adapter_up.bias",
    ),
}


@pytest.mark.parametrize("family", KEYS)
def test_keys_are_those_of_the_library(family):
    model = build(family)
    config = pe.BottleneckConfig.houlsby(cross_adapter=family in ("t5", "bart"), width=4)
    plan = bottleneck.resolve(model, config)
    names = bottleneck_files.names(plan.sites, config, "N")
    assert set(KEYS[family]) <= set(names.values())
    assert (
        len(set(names.values())) == len(names)
        and names.keys() == bottleneck.shapes(model, config, plan).keys()
    )
    assert bottleneck.keys(model, names, "N") == names


def test_a_file_of_the_library_is_read_and_written_alike():
    theirs = json.loads(THEIR_FILE)
    assert bottleneck.owns(theirs) and not bottleneck.owns({"peft_type": "LORA"})
    config = bottleneck_files.config_from_file(theirs, "here")
    assert config == pe.BottleneckConfig.houlsby(reduction_factor=4)
    written = bottleneck_files.config_to_file(build("bert"), config, "a")
    known = {key: value for key, value in theirs["config"].items() if key in written["config"]}
    assert written["config"] == known and set(known) | set(bottleneck_files.INERT) >= set(theirs["config"])
    assert {k: written[k] for k in ("hidden_size", "model_type", "name", "version", "model_class")} == {
        k: theirs[k] for k in ("hidden_size", "model_type", "name", "version", "model_class")
    }


@pytest.mark.parametrize("width", (1, 3, 5, 7, 11, 31, 32, 40))
def test_a_width_comes_back_from_its_file(width):
    config = pe.BottleneckConfig(width=width, task_type="SEQ_CLS", modules_to_save=["classifier"])
    fields = json.loads(json.dumps(bottleneck_files.config_to_file(build("bert"), config, "a")))
    again = bottleneck_files.config_from_file(fields, "here")
    assert again.width_of(32, 0) == width
    assert (again.task_type, again.modules_to_save) == ("SEQ_CLS", ["classifier"])


@pytest.mark.parametrize(
    "change,message",
    (
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"config": {"mh_adapter": True, "alpha": 2}}, "unknown key 'config.alpha'"),
        ({"config": {"architecture": "lora", "r": 8}}, "architecture='lora' is no bottleneck adapter"),
        ({"config": None}, "fields under 'config'"),
        ({"config": {"mh_adapter": True}}, "config has no output_adapter"),
    ),
)
def test_a_broken_file_is_refused(change, message):
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        bottleneck_files.config_from_file(json.loads(THEIR_FILE) | change, "here")


@pytest.mark.parametrize(
    "field,value", (("phm_layer", True), ("scaling", "learned"), ("original_ln_after", False))
)
def test_a_file_with_what_is_not_offered_is_refused(field, value):
    fields = json.loads(THEIR_FILE)
    fields["config"][field] = value
    with pytest.raises(ValueError, match=f"here: BottleneckConfig: {field}="):
        bottleneck_files.config_from_file(fields, "here")


def test_an_adapter_goes_through_a_folder(tmp_path):
    model, ids = build("bert"), torch.arange(12).view(2, 6) + 3
    pe.attach(model, pe.BottleneckConfig.houlsby(width=4), "task")
    with pytest.raises(ValueError, match="untouched by training"):
        pe.save_adapter(model, tmp_path / "out", "task")
    with torch.no_grad():
        for tensor in tensors(model, "task").values():
            tensor.add_(0.1)
    pe.save_adapter(model, tmp_path / "out", "task")
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    other = build("bert")
    assert pe.load_adapter(other, tmp_path / "out") == "task"
    assert torch.equal(other(ids).logits, model(ids).logits)
