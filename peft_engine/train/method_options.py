"""The options of `train` that belong to a method: what each takes, what it comes to, the config they make."""

from dataclasses import asdict, dataclass
from typing import Any

from peft_engine.train.data_files import check_text

METHODS = ("lora", "qlora", "prefix", "prompt", "bottleneck")
INITS = ("random", "vocab", "text")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
STARTS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT"}  # PEFT's words

# Mean training loss of steps 5-8 and 13-16 (8 rows a step, cosine over 24) on SmolLM2-135M in float32, on the
# demo's reviews of at most 90 characters, one seed:
#   prefix, 16 tokens   vocab 1e-2: 0.27, 0.30    vocab 5e-2: 0.65, -       random 1e-2: 7.19, 0.97
#   prompt, 32 tokens   vocab 1e-1: 1.01, 0.26    vocab 1e-2: 1.03, 0.34    text 1e-1: 0.58, -
# So a start from real tokens is the default (`_virtual`). That of bottleneck has not been measured.
LEARNING_RATES = {"lora": 2e-4, "qlora": 2e-4, "prefix": 1e-2, "prompt": 1e-1, "bottleneck": 1e-3}

# The activation and the reduction factor that each placement was published with, as `adapters` has them.
_OF_PLACEMENT = {"houlsby": ("silu", 16.0), "pfeiffer": ("relu", 16.0), "parallel": ("relu", 2.0)}
BOUND = 2**31  # above all that an option counts: 1e300 is a slip
LARGEST = 2.0**127  # float32 ends soon after
PLACEMENTS = tuple(_OF_PLACEMENT)
_LORA = {
    "rank": 16, "alpha": None, "dropout": 0.0, "target_modules": "all-linear", "target_parameters": None,
    "dora": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": _LORA,
    "qlora": _LORA,
    "prefix": {"virtual_tokens": 16, "prefix_projection": False, "init": None, "init_text": None},
    "prompt": {"virtual_tokens": 32, "init": None, "init_text": None},
    "bottleneck": {
        "placement": "pfeiffer", "width": None, "reduction_factor": None, "activation": None, "dropout": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class MethodOptions:
    """The options as they were given; None: not given."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    dora: bool | None = None
    virtual_tokens: int | None = None
    prefix_projection: bool | None = None
    init: str | None = None
    init_text: str | None = None
    width: int | None = None
    reduction_factor: float | None = None
    placement: str | None = None
    activation: str | None = None

    def of(self, method: str) -> dict[str, Any]:
        """What the method's options come to, by name; ValueError for another method's, and for a bad one."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        for name in sorted(given.keys() - DEFAULTS[method].keys()):
            owners = [m for m in METHODS if name in DEFAULTS[m]]
            raise ValueError(
                f"{_option(name)}: {method} has no such option, it belongs to {' and '.join(owners)}; "
                f"leave it out, or take --method {owners[0]}"
            )
        values = DEFAULTS[method] | given
        _CHECKS[method](values)
        return values


def learning_rate(method: str) -> float:
    """The rate a method trains at unless told otherwise."""
    return LEARNING_RATES.get(method, LEARNING_RATES["lora"])


def virtual_tokens(values: dict[str, Any]) -> int:
    """How many positions of the model the adapter takes."""
    return values.get("virtual_tokens") or 0


def describe(method: str, values: dict[str, Any]) -> str:
    """What is trained, for a person."""
    if method in ("lora", "qlora"):
        kind = "DoRA" if values.get("dora") else "LoRA"
        on = [
            values["target_modules"],
            *([values["target_parameters"]] if values["target_parameters"] else []),
        ]
        return f"{kind}, rank {values['rank']} on {' and '.join(map(str, on))}"
    if method == "bottleneck":
        width = f"width {values['width']}" if values["width"] else f"reduction {values['reduction_factor']:g}"
        return f"bottleneck, {values['placement']} placement, {width}, {values['activation']}"
    start = {"random": "random", "vocab": "tokens of the vocabulary", "text": repr(values["init_text"])}
    how = "made by an MLP" if values.get("prefix_projection") else f"from {start[values['init']]}"
    what = "prefix at every attention layer" if method == "prefix" else "prompt at the input"
    return f"{what}, {values['virtual_tokens']} virtual tokens, {how}"


def title(method: str, values: dict[str, Any]) -> str:
    """The method and its size, for a picture."""
    if method in ("lora", "qlora"):
        return f"{method}{' with dora' if values.get('dora') else ''}, rank {values['rank']}"
    if method == "bottleneck":
        return f"{method}, {values['placement']}"
    return f"{method}, {values['virtual_tokens']} virtual tokens"


def config_of(method: str, values: dict[str, Any], model: str, base: Any = None) -> Any:
    """The config to attach; `model` is where the tokenizer of an initial text is read from, `base` the
    model's config.
    """
    import peft_engine
    from peft_engine.train import encoder_decoder

    task = "SEQ_2_SEQ_LM" if encoder_decoder.is_one(base) else "CAUSAL_LM"

    if method in ("lora", "qlora"):
        return peft_engine.LoraConfig(
            r=values["rank"],
            lora_alpha=values["alpha"],
            lora_dropout=values["dropout"],
            target_modules=values["target_modules"],
            target_parameters=values["target_parameters"],
            use_dora=values["dora"],
            task_type=task,
        )
    if method == "bottleneck":
        given = {
            "non_linearity": values["activation"],
            "dropout": values["dropout"],
            "task_type": task,
        }
        size = "width" if values["width"] else "reduction_factor"
        preset = getattr(peft_engine.BottleneckConfig, values["placement"])
        return preset(**given, **{size: values[size]})
    text = values["init_text"]
    start: dict[str, Any] = {
        "num_virtual_tokens": values["virtual_tokens"],
        "tokenizer_name_or_path": model if text else None,
        "task_type": task,
    }
    if method == "prefix":
        return peft_engine.PrefixTuningConfig(
            prefix_projection=values["prefix_projection"],
            prefix_init=STARTS[values["init"]],
            prefix_init_text=text,
            **start,
        )
    return peft_engine.PromptTuningConfig(
        prompt_tuning_init=STARTS[values["init"]], prompt_tuning_init_text=text, **start
    )


# --- checks: each also fills in what depends on another option ----------------------------------------------


def require(fits: bool, name: str, expected: str, got: Any) -> None:
    """ValueError that names the option, unless the value fits."""
    if not fits:
        raise ValueError(f"{_option(name)}: expected {expected}, got {got!r}")


def require_count(name: str, value: int | None) -> None:
    """`require` for a number of things; None: not given."""
    require(value is None or 1 <= value < BOUND, name, "at least 1, below 2^31", value)


def require_positive(name: str, value: float) -> None:
    """`require` for a number above 0 that float32 holds."""
    require(0 < value < LARGEST, name, "a number above 0, below 2^127", value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _lora(values: dict[str, Any]) -> None:
    require_count("rank", values["rank"])
    if values["alpha"] is None:
        values["alpha"] = 2.0 * values["rank"]
    require_positive("alpha", values["alpha"])
    _dropout(values)
    targets = values["target_modules"]
    require(bool(targets), "target_modules", "all-linear, or names of layers", targets)
    plain = not values["target_parameters"] or not (values["dropout"] or values["dora"])
    require(plain, "target_parameters", "neither --dropout nor --dora beside it: experts have none", "both")


def _dropout(values: dict[str, Any]) -> None:
    require(0 <= values["dropout"] < 1, "dropout", "a number from 0 up to 1", values["dropout"])


def _virtual(values: dict[str, Any]) -> None:
    count, init, text = values["virtual_tokens"], values["init"], values["init_text"]
    require_count("virtual_tokens", count)
    require(init in (None, *INITS), "init", f"one of {', '.join(INITS)}", init)
    if text is not None:
        require(bool(text.strip()), "init_text", "some text", text)
        check_text("--init-text", "the text", text)
        require(init in (None, "text"), "init_text", "--init text beside it", f"--init {init}")
        values["init"] = "text"
    require(init != "text" or text is not None, "init", "--init-text beside --init text", "none")
    made = values.get("prefix_projection")
    require(
        not (made and values["init"] in ("vocab", "text")),
        "prefix_projection",
        "--init random, or no --init: an MLP makes the prefix",
        f"--init {values['init']}",
    )
    if values["init"] is None:
        values["init"] = "random" if made else "vocab"


def _bottleneck(values: dict[str, Any]) -> None:
    placement = values["placement"]
    require(placement in PLACEMENTS, "placement", f"one of {', '.join(PLACEMENTS)}", placement)
    if values["activation"] is None:
        values["activation"] = _OF_PLACEMENT[placement][0]
    activation, width, factor = values["activation"], values["width"], values["reduction_factor"]
    require(activation in ACTIVATIONS, "activation", f"one of {', '.join(ACTIVATIONS)}", activation)
    require_count("width", width)
    require(width is None or factor is None, "width", "no --reduction-factor beside it", "both")
    if width is None:
        values["reduction_factor"] = _OF_PLACEMENT[placement][1] if factor is None else factor
        require_positive("reduction_factor", values["reduction_factor"])
    _dropout(values)


_CHECKS = {"lora": _lora, "qlora": _lora, "prefix": _virtual, "prompt": _virtual, "bottleneck": _bottleneck}
