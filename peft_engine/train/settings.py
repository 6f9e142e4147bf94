"""The options of `train`, checked: what the loop does, and the run around it. Imports nothing heavy."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_engine.train.method_options import (
    BOUND,
    LARGEST,
    METHODS,
    MethodOptions,
    require,
    require_count,
    require_positive,
)

QUANTIZE = ("nf4", "none")
DTYPES = ("auto", "bfloat16", "float16", "float32")
SCHEDULERS = (
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
)  # fmt: skip


@dataclass(frozen=True)
class LoopSettings:
    """What the loop does. Steps are optimiser steps; eval_steps and save_steps None: once an epoch."""

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "save_steps"):
            require_count(name, getattr(self, name))
        require(0 < self.epochs < BOUND, "epochs", "a number above 0, below 2^31", self.epochs)
        require_positive("learning_rate", self.learning_rate)
        norm, decay = self.max_grad_norm, self.weight_decay
        require(0 < norm < math.inf, "max_grad_norm", "a number above 0", norm)  # a large one clips nothing
        require(0 <= decay < LARGEST, "weight_decay", "a number from 0, below 2^127", decay)
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", "a number from 0 up to 1", self.warmup_ratio)
        require(0 <= self.seed < 2**32, "seed", "a number from 0 up to 2^32", self.seed)
        require(self.scheduler in SCHEDULERS, "scheduler", f"one of {', '.join(SCHEDULERS)}", self.scheduler)

    def steps_per_epoch(self, documents: int) -> int:
        return math.ceil(math.ceil(documents / self.batch_size) / self.gradient_accumulation_steps)

    def total_steps(self, documents: int) -> int:
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(documents))


@dataclass(frozen=True)
class RunSettings:
    """A run. quantize None: nf4 for qlora, none for the others; options: those of the method."""

    model: str
    data: Path
    output: Path
    eval_data: Path | None = None
    method: str = "qlora"
    quantize: str | None = None
    dtype: str = "auto"
    max_length: int | None = None
    resume: bool = False
    overwrite: bool = False
    options: MethodOptions = field(default_factory=MethodOptions)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}", self.method)
        allowed = ("nf4",) if self.method == "qlora" else QUANTIZE  # qlora is lora over a quantised base
        require(
            self.quantize in (None, *allowed),
            "quantize",
            f"{' or '.join(allowed)} with {self.method}",
            self.quantize,
        )
        require(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        require(self.max_length is None or self.max_length >= 2, "max_length", "at least 2", self.max_length)
        require(not (self.resume and self.overwrite), "resume", "without --overwrite", "both")
        self.options.of(self.method)

    @property
    def base(self) -> str:
        """What the base is read into: "nf4" or "none"."""
        return self.quantize or ("nf4" if self.method == "qlora" else "none")

    @property
    def method_options(self) -> dict[str, Any]:
        """The method's options by name, with what the defaults came to."""
        return self.options.of(self.method)

    def to_dict(self) -> dict[str, Any]:
        """The options by name, with what the defaults came to."""
        run = dataclasses.asdict(self)
        loop, _ = run.pop("loop"), run.pop("options")
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in run.items()}
        return plain | {"quantize": self.base} | self.method_options | loop
