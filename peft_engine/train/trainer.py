"""transformers' Trainer on packed micro-batches, for an adapter that is attached and active.

The loss is the sum over the labelled tokens of an optimiser step divided by their number, whatever the split
into micro-batches; a model that cannot take packed ones gets padded ones. A checkpoint is written beside its
place and renamed, so a full disk or a kill leaves the last one whole; it holds the adapter and the state of
the optimiser, the schedule and the random generators.
"""

import contextlib
import errno
import itertools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import TrainerCallback

from peft_engine.checkpoint import save_adapter
from peft_engine.methods import adapters_without_gradient
from peft_engine.methods.attach import attached
from peft_engine.train.console import say as console_say
from peft_engine.train.data import Collate, Document, labelled_in, pack, tokens_in
from peft_engine.train.evaluate import perplexity_loss
from peft_engine.train.finite import first_non_finite
from peft_engine.train.interrupt import ending_well
from peft_engine.train.memory import ran_out
from peft_engine.train.output import CHECKPOINT, STAGING, checkpoints, last_checkpoint, step_of
from peft_engine.train.packing import Say, collator
from peft_engine.train.settings import LoopSettings

KEEP = 2  # checkpoints


class TrainError(RuntimeError):
    """Training cannot go on; the message says where it stopped, why, and what was kept."""


@dataclass
class Outcome:
    """What a training did. Tokens and seconds are this call's; losses, one a step, are the whole run's."""

    losses: list[float] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    resumed_from_step: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    train_seconds: float = 0.0
    saved: str = "last"
    best_step: int | None = None
    without_gradient: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds else 0.0


Watcher = Callable[[Outcome, int, float | None], None]
"""Called after each step with the outcome so far, the total of steps, and an evaluation's loss or None."""


def train(
    model: Any,
    documents: Sequence[Document],
    output: Path,
    settings: LoopSettings,
    *,
    name: str = "default",
    eval_documents: Sequence[Document] = (),
    resume_from: Path | None = None,
    other_data: bool = False,
    watch: Watcher = lambda outcome, total, eval_loss: None,
    on_checkpoint: Callable[[Path], None] = lambda folder: None,
    say: Say = console_say,
) -> Outcome:
    """Trains adapter `name` of `model`, which is attached and active, and saves it to `output`.

    With eval_documents, `output` holds at the end the state of the lowest evaluation loss; without, the last.
    resume_from: a checkpoint whose adapter the model already has; the steps after it are those of the run
    that was not interrupted, bit for bit. other_data: its evaluations were of other documents, and do not say
    which state is the best. on_checkpoint is called with the folder of each checkpoint before it is put in
    place, to add files to it. say gets a line where the model cannot train on packed documents. Ctrl-C or
    SIGTERM ends it after the step, with a checkpoint.
    Raises TrainError for a loss or gradient that is not finite, for memory that runs out, for a failed save,
    and where it was ended.
    """
    collate = collator(model, say)
    trainer = _AdapterTrainer(
        model, documents, output, settings, name, eval_documents, watch, on_checkpoint, collate, other_data
    )
    cache = getattr(model.config, "use_cache", None)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # the embeddings are frozen
    try:
        told = "Stopping after this step, with a checkpoint; once more stops at once"
        with _memory_explained(trainer), ending_well(say, told) as trainer.signal:
            trainer.run(resume_from)
        outcome = trainer.outcome
        if outcome.best_step is None:
            trainer.write(lambda: save_adapter(model, output, name), output)
        else:
            outcome.saved = "best"
    finally:
        shutil.rmtree(output / STAGING, ignore_errors=True)
        model.config.use_cache = cache
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        model.eval()
    return outcome


def order(model: Any, documents: Sequence[Document], settings: LoopSettings) -> Iterator[list[int]]:
    """The documents of each micro-batch, by number, as `train` will take them."""
    left = settings.total_steps(len(documents)) * settings.gradient_accumulation_steps
    with tempfile.TemporaryDirectory() as output:  # the Trainer makes one
        trainer = _AdapterTrainer(
            model, documents, Path(output), settings, "", (), lambda *_: None, lambda _: None, pack
        )
    loader: Any = trainer.get_train_dataloader()
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for rows in itertools.islice(loader.batch_sampler, left):
            yield rows
            left -= 1
        if left <= 0:
            return


def evaluation_loss(
    model: Any, documents: Sequence[Document], batch_size: int, collate: Collate | None = None
) -> float:
    """Mean loss over all labelled tokens of the documents, in eval mode; the model's mode is put back.

    collate: what `collator` gives for this model; None asks it.
    """
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return perplexity_loss(model, documents, batch_size, collate or collator(model))[0]
    finally:
        model.train(mode)


class _AdapterTrainer(transformers.Trainer):
    """The Trainer with our batches, our evaluation, our checkpoints, and no silence about NaN."""

    def __init__(
        self,
        model: Any,
        documents: Sequence[Document],
        output: Path,
        settings: LoopSettings,
        name: str,
        eval_documents: Sequence[Document],
        watch: Watcher,
        on_checkpoint: Callable[[Path], None],
        collate: Collate,
        other_data: bool = False,
    ):
        per_epoch = settings.steps_per_epoch(len(documents))
        args = transformers.TrainingArguments(
            output_dir=str(output),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            warmup_steps=int(settings.warmup_ratio * settings.total_steps(len(documents))),
            lr_scheduler_type=settings.scheduler,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            data_seed=settings.seed,
            save_strategy="steps",
            save_steps=settings.save_steps or per_epoch,
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        args._n_gpu = min(1, args.n_gpu)  # a packed row cannot be cut for DataParallel
        dataset: Any = documents  # a sequence is all that the Trainer needs
        super().__init__(model, args, train_dataset=dataset, data_collator=collate, callbacks=[_Steps(self)])  # type: ignore[arg-type]
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = True  # as for one that does, compute_loss weighs the micro-batches
        self.adapted = model
        self.outcome = Outcome()
        self.settings, self.documents = settings, len(documents)
        self.name = name
        self.output = output
        self.watch = watch
        self.on_checkpoint = on_checkpoint
        self.eval_documents = eval_documents
        self.collate = collate
        self.other_data = other_data
        self.best = math.inf
        self.signal: Callable[[], str] = lambda: ""
        self.eval_every = settings.eval_steps or per_epoch
        self.since = 0.0
        self.largest_batch = 0

    def run(self, resume_from: Path | None) -> None:
        """Trains to the end, or to a signal."""
        last = self.settings.total_steps(self.documents)
        if resume_from is not None and step_of(resume_from) >= last:
            # All steps are done. The Trainer would go on to the end of one more before it asks.
            self.state = transformers.TrainerState.load_from_json(str(resume_from / "trainer_state.json"))
            self.callback_handler.on_train_begin(self.args, self.state, self.control)
            return
        self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        done, came = self.state.global_step, self.signal()
        if came and done < self.state.max_steps:
            kept = last_checkpoint(self.output)
            left = f"{kept} is saved: {self.again()}" if kept else "nothing is saved yet"
            raise TrainError(f"train: ended by {came} after step {done} of {self.state.max_steps}; {left}")

    # --- the step -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and how many labelled tokens they have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(labelled_in(batch) for batch in batches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's mean, times the micro-batch's share of the step's labelled tokens.

        Not by num_items_in_batch: some models take it and pay it no heed (T5's own loss is a mean always).
        """
        share = labelled_in(inputs) / num_items_in_batch
        return model(**inputs, use_cache=False).loss * share

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.largest_batch = max(self.largest_batch, inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            where = first_non_finite(model, self._prepare_inputs(inputs)) or "the loss itself"
            raise TrainError(
                self.stopped(
                    f"the loss is {float(loss)}; the first values that are not finite come from {where}"
                )
            )
        if self.accelerator.sync_gradients:
            self.check_gradients(model)
        self.outcome.tokens += tokens_in(inputs)
        self.outcome.labelled_tokens += labelled_in(inputs)
        return loss

    def check_gradients(self, model: torch.nn.Module) -> None:
        grads = [(path, p.grad) for path, p in model.named_parameters() if p.grad is not None]
        finite = (
            torch.isfinite(torch.stack(torch._foreach_norm([g for _, g in grads])))
            if grads
            else torch.ones(0).bool()
        )
        if not finite.all():
            # Backward runs from the last layer to the first: the one nearest the loss is where it began.
            where = [path for (path, _), good in zip(grads, finite.tolist(), strict=True) if not good][-1]
            raise TrainError(self.stopped(f"the gradient is not finite, first in {where}"))
        if self.outcome.steps == self.outcome.resumed_from_step:
            self.outcome.without_gradient = adapters_without_gradient(model)
            if not grads or not any(g.any() for _, g in grads):
                raise TrainError(
                    self.stopped(
                        "no tensor of the adapter has a gradient, so nothing would be learnt",
                        "choose other --target-modules, or another method",
                    )
                )

    def stopped(self, why: str, mend: str = "lower --learning-rate, or check the data of this step") -> str:
        kept = last_checkpoint(self.output)
        what = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return f"train: step {self.state.global_step + 1}: {why}; {what}; {mend}"

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        loss = evaluation_loss(self.model, self.eval_documents, self.settings.batch_size, self.collate)
        self.log({"eval_loss": loss})
        if loss < self.best and not self.untouched():
            self.write(lambda: save_adapter(self.adapted, self.output, self.name), self.output)
            self.outcome.best_step, self.best = self.state.global_step, loss
        self.outcome.eval_losses[self.state.global_step] = loss
        self.watch(self.outcome, self.state.max_steps, loss)
        self.control.should_evaluate = False  # or the end of the epoch asks for the same again
        return {"eval_loss": loss}

    def untouched(self) -> bool:
        """Whether no step has had a learning rate above zero yet (a warm-up starts at zero)."""
        return not any(entry.get("learning_rate") for entry in self.state.log_history)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        return str(self.output / STAGING)

    def _save_checkpoint(self, model, trial):
        if self.untouched():
            return
        folder = f"{CHECKPOINT}{self.state.global_step}"
        staged = self.output / STAGING / folder

        def save() -> None:
            super(_AdapterTrainer, self)._save_checkpoint(model, trial)
            self.on_checkpoint(staged)
            for file in staged.iterdir():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(self.output / folder, ignore_errors=True)
            os.rename(staged, self.output / folder)

        shutil.rmtree(staged, ignore_errors=True)
        self.write(save, self.output / folder)
        for checkpoint in checkpoints(self.output)[:-KEEP]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _save(self, output_dir=None, state_dict=None):
        save_adapter(self.adapted, output_dir, self.name)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Nothing: the adapter was loaded from the checkpoint when it was attached."""

    def write(self, save: Callable[[], Any], what: Path) -> None:
        try:
            save()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            shutil.rmtree(self.output / STAGING, ignore_errors=True)
            kept = last_checkpoint(self.output)
            left = (
                f"the checkpoint before it, {kept}, is whole" if kept else "there is no checkpoint before it"
            )
            mend = "free some space" if _is_full(error) else "mend that"
            again = self.again() if kept else "run again"
            raise TrainError(f"train: saving {what} failed: {error}; {left}; {mend} and {again}") from error

    def again(self) -> str:
        """What to do to go on from a checkpoint."""
        if getattr(attached(self.adapted).get(self.name), "prefix_projection", False):
            return "run again from the beginning, as it holds the prefix without the MLP that makes it"
        return "run again with --resume to go on"


def _is_full(error: Exception) -> bool:
    """Whether the disk, the quota or the limit of a file's size is what ended a save."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)  # torch.save's


class _Steps(TrainerCallback):
    """Keeps the outcome, asks for evaluations, and tells the watcher."""

    def __init__(self, trainer: _AdapterTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        outcome = self.trainer.outcome
        outcome.resumed_from_step = outcome.steps = state.global_step
        outcome.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        outcome.eval_losses = {
            entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry
        }
        state.save_steps = args.save_steps  # the checkpoint's own came with it
        kept = any(self.trainer.output.glob("adapter*.safetensors")) and not self.trainer.other_data
        finite = {step: loss for step, loss in outcome.eval_losses.items() if math.isfinite(loss)}
        if self.trainer.eval_documents and kept and finite:
            outcome.best_step = min(finite, key=lambda step: finite[step])
            self.trainer.best = finite[outcome.best_step]

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.outcome.train_seconds += time.perf_counter() - self.trainer.since
        self.trainer.outcome.steps = state.global_step
        last = state.global_step >= state.max_steps
        if self.trainer.eval_documents and (last or state.global_step % self.trainer.eval_every == 0):
            control.should_evaluate = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.trainer.outcome.losses.append(logs["loss"])
            self.trainer.watch(self.trainer.outcome, state.max_steps, None)
            if self.trainer.signal():  # this is asked once a step, before what is saved
                control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _memory_explained(trainer: _AdapterTrainer):
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        rows, accumulation = trainer.settings.batch_size, trainer.settings.gradient_accumulation_steps
        raise TrainError(
            f"train: out of memory at step {trainer.state.global_step + 1}, with {trainer.largest_batch} "
            f"tokens in the largest micro-batch of {rows} rows; try --batch-size {max(1, rows // 2)} "
            f"--gradient-accumulation-steps {accumulation * 2} (the same step in less memory), then "
            "--gradient-checkpointing"
        ) from error
