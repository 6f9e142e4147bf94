"""Bottleneck adapters train as those of the `adapters` library, whose losses tests/fixtures holds."""

import json
from pathlib import Path

import parity_cases as cases
import pytest
import torch

import peft_engine as pe
from peft_engine.methods import bottleneck, bottleneck_files
from peft_engine.methods.attach import tensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "adapters_parity.json"
THEIRS = json.loads(FIXTURE.read_text())["cases"]


@pytest.mark.parametrize("case", cases.CASES)
def test_twenty_steps_are_those_of_the_adapters_library(case):
    family, fields = cases.CASES[case]
    model = cases.build(family)
    config = pe.BottleneckConfig(**fields)
    plan = bottleneck.resolve(model, config)
    keys = bottleneck_files.names(plan.sites, config, "task")
    shapes = bottleneck.shapes(model, config, plan)
    pe.attach(model, config)
    mine = tensors(model, "default")
    # A norm in front of the bottleneck has two names there; torch reports the first.
    assert {keys[path]: list(shapes[path]) for path in mine} == THEIRS[case]["tensors"]
    assert {path: tuple(tensor.shape) for path, tensor in mine.items()} == shapes
    assert bottleneck.keys(model, mine, "task") == keys
    cases.set_by_name({keys[path]: tensor for path, tensor in mine.items()})
    losses = cases.train(model, list(mine.values()), family)
    assert len(losses) == cases.STEPS
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(THEIRS[case]["losses"]), rtol=0, atol=1e-4)
