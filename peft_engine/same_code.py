"""Whether two classes compute the same in a method: by its code, not by its name.

transformers writes a layer out anew for each family, and most copies are the same to the letter. They are
compared as Python has compiled them, with the functions and methods they call, so that neither comments nor
the file they stand in matter.
"""

from collections.abc import Set
from types import CodeType, FunctionType
from typing import Any


def same_method(name: str, a: type, b: type, apart: Set[str] = frozenset()) -> bool:
    """Whether method `name` of the classes a and b does the same with an instance's attributes.

    apart: names of functions that the method calls and that are not compared.
    """
    return _Comparison(a, b, apart).same(getattr(a, name, None), getattr(b, name, None))


class _Comparison:
    def __init__(self, a: type, b: type, apart: Set[str]):
        self.a, self.b, self.apart = a, b, apart
        self.begun: set[tuple[int, int]] = set()  # a function may call itself

    def same(self, f: Any, g: Any) -> bool:
        """Whether f, of a's module, and g, of b's, are one object, of one code, or equal numbers."""
        if f is g or (id(f), id(g)) in self.begun:
            return True
        if not isinstance(f, FunctionType) or not isinstance(g, FunctionType):
            return isinstance(f, (int, float, str)) and _same_constant(f, g)
        self.begun.add((id(f), id(g)))
        # A decorator keeps the function it stands for in a cell: what lies in cells is not compared.
        if f.__code__.co_freevars or g.__code__.co_freevars:
            return False
        if (f.__defaults__, f.__kwdefaults__) != (g.__defaults__, g.__kwdefaults__):
            return False
        if not _same_code(f.__code__, g.__code__, f.__doc__, g.__doc__):
            return False
        return all(self._same_name(name, f, g) for name in _names(f.__code__) - self.apart)

    def _same_name(self, name: str, f: FunctionType, g: FunctionType) -> bool:
        """Whether a name means the same to both: as a global one, and as an attribute of the class."""
        return self.same(f.__globals__.get(name), g.__globals__.get(name)) and self.same(
            getattr(self.a, name, None), getattr(self.b, name, None)
        )


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function uses, those of the functions inside it too."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


_FIELDS = ("co_code", "co_names", "co_varnames", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount")


def _same_code(a: CodeType, b: CodeType, a_doc: str | None = None, b_doc: str | None = None) -> bool:
    if any(getattr(a, field) != getattr(b, field) for field in _FIELDS) or a.co_flags != b.co_flags:
        return False
    if a.co_exceptiontable != b.co_exceptiontable or len(a.co_consts) != len(b.co_consts):
        return False
    pairs = list(zip(a.co_consts, b.co_consts, strict=True))
    if pairs and (a_doc, b_doc) == pairs[0]:
        del pairs[0]  # a docstring is the first constant
    return all(_same_constant(x, y) for x, y in pairs)


def _same_constant(x: Any, y: Any) -> bool:
    if isinstance(x, CodeType) and isinstance(y, CodeType):
        return _same_code(x, y)
    return type(x) is type(y) and x == y
