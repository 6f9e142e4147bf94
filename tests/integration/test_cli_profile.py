"""`peft-engine profile`: its parts add up to the step, and each op's time stands under its name."""

import json
from types import SimpleNamespace

import pytest
import torch
from texts import reviews, write_jsonl

from peft_engine.train import profile
from peft_engine.train.profile_command import FILES, advice, by_name, shortened, table


@pytest.fixture
def run(command, model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews(4))

    def profiled(*more):
        line = ["profile", "--model", model, "--data", data, "--output", tmp_path / "out", "--batch-size", 4]
        return command(*line, *more)

    return profiled


@pytest.mark.parametrize(
    ("method", "op", "layer"),
    [
        ("qlora", "lora_linear", "q_proj"),
        ("prefix", "prefix_attention", "self_attn"),
        ("bottleneck", "bottleneck", "mlp"),
    ],
)
def test_the_parts_add_up_to_the_step(run, tmp_path, method, op, layer):
    code, out, err = run("--method", method, "--steps", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "out" / "profile.json").read_text())
    for rows in (found["ops"], found["layers"]):
        assert sum(row["ms"] for row in rows) == pytest.approx(found["profiled_step_ms"])
        assert sum(row["share"] for row in rows) == pytest.approx(1.0)
        assert all(row["ms"] >= 0 for row in rows)
    phases = {row["phase"]: row for row in found["ops"] if row["op"] == op}
    assert phases.keys() == {"forward", "backward"}
    expected = {"lora_linear": 14, "prefix_attention": 2, "bottleneck": 2}[op]
    assert phases["forward"]["calls"] == phases["backward"]["calls"] == expected
    names = {row["op"] for row in found["ops"]}
    assert {"optimiser", "rms_norm", "swiglu", profile.HOST} <= names
    assert not any(name.startswith(("peft_engine::", "_", "autograd::engine", "module ")) for name in names)
    kinds = {(row["layer"], row["phase"]) for row in found["layers"]}
    assert {(layer, "forward"), (layer, "backward"), ("input_layernorm", "forward")} <= kinds
    assert found["step_ms"] > 0 and found["tokens"] > 20 and found["steps"] == 2
    assert "ui.perfetto.dev" in err and "Next: peft-engine explain --model" in err


def test_three_files_are_written_and_a_profile_is_not_lost(run, tmp_path):
    code, out, err = run("--method", "lora", "--steps", 1)
    assert code == 0, err
    assert "The profiler's own cost: a step took" in out and "Python, the Trainer" in out
    assert [(tmp_path / "out" / name).stat().st_size > 0 for name in FILES] == [True] * 3
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "_LoraLinear" for event in events)
    code, out, err = run("--method", "lora")
    assert code == 1 and out == "" and "holds a profile already (profile.json)" in err


def test_the_model_is_left_without_hooks(model):
    seen = torch.nn.Sequential(torch.nn.Linear(2, 2))
    hooks = profile._ranges(seen)
    assert len(hooks) == 4 and seen._forward_hooks
    seen(torch.ones(1, 2))
    for hook in hooks:
        hook.remove()
    assert not seen._forward_hooks and not seen[0]._forward_pre_hooks


def event(name, parent=None, sequence=-1):
    return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=sequence)


def test_an_event_belongs_to_the_outermost_op_of_ours():
    module = event("module q_proj", event("module LlamaForCausalLM"))
    function = event("_LinearCrossEntropy", module)
    raw = event("peft_engine::cross_entropy_rows", function)
    inside = event("aten::mm", raw)
    assert profile._op(function) == ("linear_cross_entropy", True)
    assert profile._op(inside) == ("linear_cross_entropy", False)
    assert profile._op(event("aten::add", module)) == ("aten::add", True)
    assert profile._op(event("aten::mul", event("Optimizer.step#AdamW.step"))) == ("optimiser", False)
    assert (profile._phase(inside), profile._layer(inside)) == ("forward", "q_proj")
    engine = event("autograd::engine::evaluate_function: _LoraLinearBackward", sequence=7)
    nested = event("peft_engine::lora_linear_backward", event("_LoraLinearBackward", engine))
    assert profile._op(engine) == ("lora_linear", True) and profile._op(nested) == ("lora_linear", False)
    assert profile._phase(nested) == "backward" and profile._sequence(nested) == 7
    assert profile._phase(event("aten::linalg_vector_norm")) == "between"


def test_small_rows_are_shown_together_and_the_rest_last():
    rows = [
        {"op": f"op{i}", "phase": "forward", "ms": 100.0 - i, "share": 0.01, "calls": 1} for i in range(40)
    ]
    rows.append({"op": profile.HOST, "phase": "host", "ms": 1e4, "share": 0.6, "calls": None})
    shown = shortened(by_name(rows, "op"))
    assert shown[-1][0] == "sum" and shown[-2][0] == profile.HOST and shown[-3][0] == "18 others"
    assert shown[-1][1]["ms"] == sum(row["ms"] for row in rows)
    found = {
        "ops": rows,
        "layers": [{**row, "layer": row["op"]} for row in rows],
        "tokens": 5,
        "method": "lora",
    }
    assert "(+50.0%)" in table(found | {"step_ms": 10.0, "profiled_step_ms": 15.0})


def test_the_layers_that_are_not_fused_are_told_with_their_share():
    layers = [{"layer": "lm_head", "phase": p, "ms": 1.0, "share": 0.02} for p in ("forward", "backward")]
    line = {"name": "model.lm_head", "kind": "Linear", "reason": "its bias is trained"}
    told = advice({"layers": layers, "not_fused": [line]})
    assert told == ["Not fused: lm_head, 4.0% of the step: its bias is trained"]
    assert advice({"layers": layers, "not_fused": []}) == ["All layers that have a fused twin are fused"]
