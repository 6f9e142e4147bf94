"""One training run from its settings: the checks, the data, the model, the loop, and the record."""

import contextlib
import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from peft_engine.train import encoder_decoder, progress
from peft_engine.train import method_options as of_method
from peft_engine.train.data import Document, Row, length_limit, read_rows, tokenize
from peft_engine.train.memory import cannot_fit, dtype_in_words
from peft_engine.train.models import (
    RECORD,
    check_vocabulary,
    load_base,
    load_config,
    load_tokenizer,
    run_record,
)
from peft_engine.train.output import (
    STAGING,
    check_output,
    checkpoints,
    holds_already,
    last_checkpoint,
    make_output,
    sole_run,
    step_of,
)
from peft_engine.train.record import draw_losses, peak_gpu_bytes, peak_rss_bytes, versions, write_json
from peft_engine.train.settings import RunSettings

NAME = "default"
# Settings that may differ between a run and its continuation.
FREE = {
    "output", "resume", "overwrite", "data", "eval_data", "model", "epochs", "max_steps", "save_steps",
    "eval_steps",
}  # fmt: skip


class RunError(ValueError):
    """A run that cannot start; the message says which option to change."""


def run(settings: RunSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains as `settings` say, tells of it through `say`, and returns what run.json holds."""
    output = settings.output
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            f"train: runs in one process, and WORLD_SIZE is {os.environ['WORLD_SIZE']} (torchrun? accelerate "
            "launch?): several would write one folder; in a loop of your own DistributedDataParallel and "
            "fully_shard work, docs/methods.md says how"
        )
    check_output(output)
    with contextlib.ExitStack() as held:
        if output.is_dir():
            held.enter_context(sole_run(output))
        return _run(settings, say, held)


def _run(settings: RunSettings, say: Callable[[str], None], held: contextlib.ExitStack) -> dict[str, Any]:
    output, is_new = settings.output, not settings.output.is_dir()
    resume_from = _checkpoint(settings)
    rows = read_rows(settings.data)
    eval_rows = read_rows(settings.eval_data) if settings.eval_data else []
    documents, eval_documents = tokenized(settings, rows, eval_rows)

    from peft_engine import layer_lines
    from peft_engine.train import trainer  # Trainer takes seconds to import: the data has been checked by now

    loop = settings.loop
    _tell_plan(settings, (rows, documents), (eval_rows, eval_documents), resume_from, say)
    _tell_memory(settings, say)
    model, report = prepare(settings, resume_from)
    say(f"Layers: {report.fused_count} of {report.total} fused (peft-engine explain says which and why)")
    if lines := layer_lines.slow(report):
        say(f"{lines}: --dtype float32 is many times faster")
    if is_new:  # not before all is checked: a run that is refused leaves what there was
        make_output(output)
        held.enter_context(sole_run(output))
        _checkpoint(settings)  # again: another run may have come and gone since
    if resume_from is None:
        _clear(output)

    record = _record(settings, model, len(rows))
    total = loop.total_steps(len(documents))
    with progress.bar("Training", total, 0 if resume_from is None else step_of(resume_from)) as bar:

        def watch(outcome: trainer.Outcome, total: int, eval_loss: float | None) -> None:
            told = f"loss {outcome.losses[-1]:.4f}  {outcome.tokens_per_second:,.0f} tokens/s"
            if eval_loss is not None:
                best = " (best so far)" if outcome.best_step == outcome.steps else ""
                say(f"Step {outcome.steps}: evaluation loss {eval_loss:.4f}{best}")
            bar.update(outcome.steps, told)

        outcome = trainer.train(
            model,
            documents,
            output,
            loop,
            name=NAME,
            eval_documents=eval_documents,
            resume_from=resume_from,
            other_data=resume_from is not None and _other_data(resume_from, settings),
            watch=watch,
            on_checkpoint=lambda folder: write_json(folder / RECORD, record),
            say=say,
        )
    return _finish(output, record, outcome)


def tokenized(settings: RunSettings, *files: list[Row]) -> list[list[Document]]:
    """The documents of each file's rows."""
    config, tokenizer = load_config(settings.model), load_tokenizer(settings.model)
    taken = of_method.virtual_tokens(settings.method_options)
    limit = length_limit(config, settings.max_length, taken)
    split = settings.max_length is not None
    if encoder_decoder.is_one(config):
        found = [encoder_decoder.documents(rows, tokenizer, limit) for rows in files]
    else:
        found = [tokenize(rows, tokenizer, limit, split_text=split) for rows in files]
    check_vocabulary(config, tokenizer, (ids for d in chain(*found) for ids in (d.input_ids, d.labels)))
    return found


def _checkpoint(settings: RunSettings) -> Path | None:
    """The checkpoint to go on from; RunError when the output holds a run that would be lost."""
    output = settings.output
    there = [
        p.name for p in (*output.glob("adapter*.safetensors"), *checkpoints(output), *output.glob(RECORD))
    ]
    if not settings.resume:
        if there and not settings.overwrite:
            raise holds_already(output, "run", there[0], "--resume to go on from its last checkpoint, ")
        return None
    checkpoint = last_checkpoint(output)
    if checkpoint is None:
        raise RunError(
            f"--resume: {output} holds no whole checkpoint; leave --resume out to start from the beginning"
        )
    before, now = run_record(checkpoint).get("settings", {}), settings.to_dict()
    if before.get("prefix_projection"):
        raise RunError(
            f"--resume: {checkpoint} holds the prefix that the MLP of --prefix-projection made, without the "
            "MLP, so its training cannot go on; leave --resume out to start from the beginning"
        )
    changed = [
        f"{key} was {before[key]!r}, is {now[key]!r}"
        for key in before.keys() & now.keys() - FREE
        if before[key] != now[key]
    ]
    if changed:
        raise RunError(
            f"--resume: {checkpoint} was trained with other settings: {'; '.join(sorted(changed))}; give "
            "these as they were, or another folder, or --overwrite in place of --resume"
        )
    return checkpoint


def _other_data(checkpoint: Path, settings: RunSettings) -> bool:
    """Whether the checkpoint's evaluations were of another file."""
    return run_record(checkpoint).get("settings", {}).get("eval_data") != settings.to_dict()["eval_data"]


def _clear(output: Path) -> None:
    """Takes an earlier run's files away, so that none of them passes for this run's."""
    for path in (*checkpoints(output), output / STAGING):
        shutil.rmtree(path, ignore_errors=True)
    for file in (*output.glob("adapter*.safetensors"), output / "adapter_config.json", output / RECORD):
        file.unlink(missing_ok=True)
    (output / "loss.png").unlink(missing_ok=True)


def _tell_plan(
    settings: RunSettings,
    data: tuple[list[Row], list[Document]],
    eval_data: tuple[list[Row], list[Document]],
    resume_from: Path | None,
    say: Callable[[str], None],
) -> None:
    loop, (rows, documents) = settings.loop, data
    unit = "rows" if len(documents) == len(rows) else "pieces"
    tokens = sum(document.tokens for document in documents)
    labelled = sum(document.labelled for document in documents)
    dtype = dtype_in_words(settings.model, settings.dtype, load_config(settings.model))
    say(f"Model: {settings.model}, {'in NF4' if settings.base == 'nf4' else 'dense'}, dtype {dtype}")
    say(f"Data: {_counted(*data)} of {settings.data}, {tokens:,} tokens, {labelled:,} of them labelled")
    if settings.eval_data:
        say(f"Evaluation: {_counted(*eval_data)} of {settings.eval_data}; the best state is kept")
    say(f"Adapter: {of_method.describe(settings.method, settings.method_options)}, to {settings.output}")
    say(
        f"Training: {loop.total_steps(len(documents))} steps of {loop.batch_size} x "
        f"{loop.gradient_accumulation_steps} {unit}, learning rate {loop.learning_rate:g}, {loop.scheduler}"
    )
    if resume_from is not None:
        say(f"Going on from {resume_from}")


def _counted(rows: list[Row], documents: list[Document]) -> str:
    """How many rows; of long texts, in how many pieces --max-length cuts them."""
    cut = "" if len(documents) == len(rows) else f"{len(documents)} pieces of "
    return f"{cut}{len(rows)} rows"


def _tell_memory(settings: RunSettings, say: Callable[[str], None]) -> None:
    """A line where the run cannot fit. It goes on: the system may find room, in its swap or a cache."""
    try:
        why = cannot_fit(settings, load_config(settings.model))
    except Exception as error:  # a model's own code, which may do anything on a device without memory
        if str(error).startswith("attach: "):
            return  # the model itself is refused the same in a moment
        say(f"Memory: could not be counted beforehand: {' '.join(str(error).split())[:200]}")
        return
    if why is not None:
        say(f"Memory: this cannot fit: {why}; peft-engine estimate says what would take less")


def prepare(settings: RunSettings, resume_from: Path | None, folder: str | None = None) -> tuple[Any, Any]:
    """The model, checked, with the adapter on it and fused; and the report.

    folder: where another base lies, to take in place of the settings'.
    """
    import torch

    from peft_engine import attach, load_adapter, optimize
    from peft_engine.methods.targets import RANK_MEND
    from peft_engine.train.finite import check_weights

    model = load_base(folder or settings.model, quantize=settings.base, dtype=settings.dtype)
    check_weights(model)
    torch.manual_seed(settings.loop.seed)
    if resume_from is not None:
        load_adapter(model, resume_from, NAME)
    else:
        options = settings.method_options
        config = of_method.config_of(settings.method, options, settings.model, model.config)
        try:
            attach(model, config, NAME)
        except ValueError as error:
            option = "lower --rank, or leave the layer out of --target-modules"
            raise RunError(str(error).replace(RANK_MEND, option)) from error
    return model, optimize(model)


def _record(settings: RunSettings, model: Any, rows: int) -> dict[str, Any]:
    return {
        "method": settings.method,
        "rows": rows,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "settings": settings.to_dict(),
        "versions": versions(),
    }


def _finish(output: Path, record: dict[str, Any], outcome: Any) -> dict[str, Any]:
    done = record | {
        "losses": outcome.losses,
        "eval_losses": {str(step): loss for step, loss in outcome.eval_losses.items()},
        "steps": outcome.steps,
        "resumed_from_step": outcome.resumed_from_step,
        "tokens": outcome.tokens,
        "labelled_tokens": outcome.labelled_tokens,
        "train_seconds": outcome.train_seconds,
        "tokens_per_second": outcome.tokens_per_second,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": peak_gpu_bytes(),
        "saved": outcome.saved,
        "saved_step": outcome.best_step if outcome.saved == "best" else outcome.steps,
        "without_gradient": outcome.without_gradient,
    }
    write_json(output / RECORD, done)
    title = of_method.title(record["method"], record["settings"])
    draw_losses(output / "loss.png", outcome.losses, outcome.eval_losses, title)
    return done
