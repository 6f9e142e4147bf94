"""Which methods count as the same: whatever would compute something else does not."""

import functools

import pytest
import torch
from torch import nn

from peft_engine.same_code import same_method

SCALE = 2.0


def scaled(x):
    return x * SCALE


class Layer(nn.Module):
    """One."""

    def forward(self, x, mask=None, *, wide: bool = True):
        """Its docstring."""
        y = self.part(scaled(x))  # a comment
        return [row + 1.0 for row in y] if wide else torch.relu(y)

    def part(self, x):
        return x.flip(-1)


class Copy(nn.Module):
    """Another, written out anew."""

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        wide=True,
    ) -> list[torch.Tensor]:
        """Another docstring."""
        y: torch.Tensor = self.part(scaled(x))
        return [row + 1.0 for row in y] if wide else torch.relu(y)

    def part(self, x):
        # the same
        return x.flip(-1)


def decorated(function):
    @functools.wraps(function)
    def run(*arguments, **keywords):
        return function(*arguments, **keywords)

    return run


OTHERS = {
    "a constant": ("row + 1.0", "row + 1"),
    "an operation": ("self.part(scaled(x))", "scaled(self.part(x))"),
    "a function": ("scaled(x)", "tripled(x)"),
    "a method": ("x.flip(-1)", "x.flip(0)"),
    "a default": ("wide: bool = True", "wide: bool = False"),
    "an argument's name": ("mask=None", "attention_mask=None"),
    "an order of arguments": ("x, mask=None, *, wide: bool = True", "x, wide=True, mask=None"),
    "a decorator": ("    def forward", "    @decorated\n    def forward"),
    "a global of the same name": ("SCALE = 2.0", "SCALE = 3.0"),
    "a function of the same name": ("return x * SCALE", "return x + SCALE"),
    "a branch": ("if wide else", "if not wide else"),
}
SOURCE = '''
import torch
from torch import nn

SCALE = 2.0

def scaled(x):
    return x * SCALE

def tripled(x):
    return x * 3.0

class Layer(nn.Module):
    def forward(self, x, mask=None, *, wide: bool = True):
        """Without comments."""
        y = self.part(scaled(x))
        return [row + 1.0 for row in y] if wide else torch.relu(y)

    def part(self, x):
        return x.flip(-1)
'''


def of(source: str) -> type:
    space = {"decorated": decorated, "__name__": "elsewhere"}
    exec(source, space)
    return space["Layer"]


def test_a_copy_in_another_module_is_the_same_whatever_its_comments_and_annotations():
    assert same_method("forward", Copy, Layer) and same_method("forward", Layer, Copy)
    assert same_method("forward", of(SOURCE), Layer)
    assert same_method("forward", type("Heir", (Layer,), {}), Layer)


@pytest.mark.parametrize("change", OTHERS)
def test_what_computes_something_else_is_another(change):
    old, new = OTHERS[change]
    assert old in SOURCE
    assert not same_method("forward", of(SOURCE.replace(old, new)), Layer)


def test_a_function_that_is_named_apart_may_differ():
    other = of(SOURCE.replace("return x * SCALE", "return x + SCALE"))
    assert same_method("forward", other, Layer, {"scaled"})


def test_functions_that_call_themselves_are_compared_too():
    def layer(end):
        return of(SOURCE.replace("return x * SCALE", f"return x if x.ndim > {end} else scaled(x[None])"))

    assert same_method("forward", layer(3), layer(3))
    assert not same_method("forward", layer(3), layer(4))


def test_a_class_without_the_method_is_another():
    assert not same_method("forward", nn.Sequential, Layer)
