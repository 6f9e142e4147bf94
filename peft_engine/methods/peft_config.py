"""What the adapter_config.json of every method of PEFT has in common; a closed schema."""

import re
from collections.abc import Iterable
from typing import Any

# Fields that say nothing about an adapter's maths; any value is taken.
INERT = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config",
)  # fmt: skip
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
PEFT_VERSION = (0, 21)  # the newest whose fields are known here


def check_task(who: str, task: Any) -> None:
    """TypeError or ValueError unless it is None or one of PEFT's words for a task."""
    if task is not None and not isinstance(task, str):
        raise TypeError(f"{who}: task_type must be a string, got {task!r}")
    if task is not None and task not in TASKS:
        raise ValueError(f"{who}: task_type must be one of {', '.join(TASKS)}, or None, got {task!r}")


def check_inference_mode(who: str, value: Any) -> None:
    """ValueError unless a config is one to train, as all are here."""
    if value is not False:
        raise ValueError(
            f"{who}: inference_mode must be False, got {value!r}; attach makes an adapter to train: "
            "load_adapter reads one, and peft_engine.active(model, None) switches it off"
        )


def language_task(model: Any) -> str | None:
    """PEFT's word for the task of a model with a language head, by its class; None for others."""
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def check(fields: Any, peft_type: str, known: Iterable[str], where: str) -> dict[str, Any]:
    """`fields`; ValueError for what is no object of `peft_type`, and for a key that is not known."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    if fields.get("peft_type") != peft_type:
        raise ValueError(f"{where}: peft_type must be {peft_type!r}, got {fields.get('peft_type')!r}")
    unknown = sorted(fields.keys() - set(known) - set(INERT))
    if unknown:
        written = str(fields.get("peft_version") or "")
        number = re.match(r"(\d+)\.(\d+)", written)
        newer = number is not None and (int(number[1]), int(number[2])) > PEFT_VERSION
        why = f"; it was written by PEFT {written}, newer than this version knows" if newer else ""
        raise ValueError(f"{where}: unknown key {', '.join(map(repr, unknown))}{why}")
    return fields


def build(kind: Any, given: dict[str, Any], where: str) -> Any:
    """kind(**given), a config; its TypeError or ValueError becomes a ValueError that says which file."""
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
