"""What runs in a model: a LayerReport for each layer, gathered in a Report that prints a line per kind."""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    name     its path in the model
    op       the op it stands for ("lora_linear", "rms_norm", ...)
    backend  what computes it now: a backend of peft-engine, or the library whose own code runs
    fused    True when a kernel of peft-engine runs
    reason   why not, or why no faster backend; empty when there is nothing to say
    kind     the class of the layer as the model has it, with its package
    """

    name: str
    op: str
    backend: str
    fused: bool
    reason: str = ""
    kind: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Report:
    """The layers of a model, and the CPU instruction set that the kernels run with."""

    layers: tuple[LayerReport, ...]
    cpu: str = ""

    @property
    def fused_count(self) -> int:
        return sum(layer.fused for layer in self.layers)

    @property
    def total(self) -> int:
        return len(self.layers)

    def kinds(self) -> dict[LayerReport, int]:
        """How many layers agree in all but the name, most first; the keys have an empty name."""
        counts = Counter(dataclasses.replace(layer, name="") for layer in self.layers)
        return dict(sorted(counts.items(), key=lambda item: (not item[0].fused, -item[1])))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises TypeError: somebody took it for the model."""
        raise TypeError(
            "optimize changes the model in place and returns a report of what runs; call optimize(model) and "
            "go on with model"
        )

    def __str__(self) -> str:
        lines = [f"peft-engine: {self.fused_count} of {self.total} layers fused; CPU kernels: {self.cpu}"]
        kinds = self.kinds()
        wide = [
            max((len(getattr(kind, part)) for kind in kinds), default=0) for part in ("kind", "op", "backend")
        ]
        for kind, count in kinds.items():
            state = "fused" if kind.fused else "not fused"
            why = f": {kind.reason}" if kind.reason else ""
            names = f"{kind.kind:<{wide[0]}}  {kind.op:<{wide[1]}}  {kind.backend:<{wide[2]}}"
            lines.append(f"{count:5d} x {names}  {state}{why}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: cpu, fused_count, total, kinds (with their count) and layers."""
        kinds = [{"count": count, **kind.to_dict()} for kind, count in self.kinds().items()]
        for kind in kinds:
            del kind["name"]
        return {
            "cpu": self.cpu,
            "fused_count": self.fused_count,
            "total": self.total,
            "kinds": kinds,
            "layers": [layer.to_dict() for layer in self.layers],
        }
