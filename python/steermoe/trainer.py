"""transformers' Trainer for an aligner between frozen backbones: its rates, losses, scores and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback, TrainerState

from .data import Corpus, LengthBucketSampler, Problem
from .data.audio import beginning
from .error_rates import word_errors
from .evaluation import Evaluation, evaluate, exact_match
from .router_losses import load_balancing_loss, record_router_logits, router_z_loss, valid_logits
from .run_checkpoints import CheckpointError, checkpoints_in, remove_old, seal, staging_folder
from .saved_model import WEIGHTS_NAME, read_weights
from .statistics import STATISTICS_NAME, RouterCounts, append_statistics, drop_statistics_after
from .training_arguments import score_of, scores, training_arguments
from .training_callbacks import DeafToSignals, EarlyStopping, Interruption, ProgressBar
from .training_config import TRAINING_CONFIG_NAME, TrainingConfig

__all__ = ["GROUPS", "AlignerTrainer", "parameter_groups"]

logger = logging.getLogger(__name__)

LOSS_STATE_NAME = "loss_state"
ROWS_NAME = "training_rows.json"
AUDIO = "audio_sha256"
# Of how many clips, spread over the corpus, the first so many bytes are read to know the audio by: all of it can be terabytes.
KNOWN_CLIPS, KNOWN_BYTES = 256, 1 << 20
# The last part of the names of the aligner's parameters, by group.
GROUPS = {
    "steering": ("steering_vectors", "layer_scales"),
    "router": ("router.weight", "router.bias"),
    "projection": ("prompt_proj.weight", "prompt_proj.bias"),
}


def parameter_groups(aligner: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of an aligner by group and name: steering (vectors and scales), router, projection."""
    named = dict(aligner.named_parameters())
    return {group: {name: named[name] for name in names if name in named} for group, names in GROUPS.items()}


def freeze_unlearning(aligner: nn.Module, config: TrainingConfig) -> None:
    """Take the gradient from groups with a learning rate of 0, and give it to the others."""
    for group, parameters in parameter_groups(aligner).items():
        for parameter in parameters.values():
            parameter.requires_grad_(getattr(config.training, f"{group}_learning_rate") > 0)


def describe_rows(corpus: Corpus) -> dict[str, Any]:
    """What a run learns from, to be recognised by wherever it lies.

    The number of its rows, a SHA-256 over what they say and which sections they are, and one over the audio: all rows' durations, by
    which batches are made, and the beginnings of `KNOWN_CLIPS` clips. Of a larger corpus, other clips in place of a few are not noticed.
    """
    digest = hashlib.sha256()
    for row in corpus:
        digest.update(repr((row.text, row.prompt, row.offset, row.duration, tuple(row.answers))).encode("utf-8", "surrogatepass"))
    audio = hashlib.sha256(corpus.durations().tobytes())
    for index in np.linspace(0, len(corpus) - 1, min(len(corpus), KNOWN_CLIPS)).round().astype(int):
        audio.update(hashlib.sha256(beginning(corpus[index].audio, KNOWN_BYTES)).digest())
    return {"rows": len(corpus), "sha256": digest.hexdigest(), AUDIO: audio.hexdigest()}


class AlignerTrainer(Trainer):
    """Trains ``model.aligner`` as ``config`` says: three rates, the router's losses and statistics, error rates as score.

    ``model`` is a `SteerMoEForConditionalGeneration`, ``collator`` makes its batches. A checkpoint holds the trained weights, the
    processor, the configuration, and the states of optimizer, schedule, random numbers and loss: a run resumed from it goes on exactly as
    if it had never stopped.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        config: TrainingConfig,
        collator: Any,
        train_corpus: Corpus,
        eval_corpus: Corpus | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.config = config
        self.processor = processor
        self.train_corpus = train_corpus
        self.rows = describe_rows(train_corpus)
        self.eval_corpus = eval_corpus
        self.metric, self.greater_is_better = score_of(config, eval_corpus)
        self.last_evaluation: Evaluation | None = None
        self.last_save_error: CheckpointError | None = None
        self.origin: Path | None = None  # the folder of the run that this one goes on from
        self._counts = RouterCounts()
        self._auxiliary: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}
        freeze_unlearning(model.aligner, config)
        arguments = training_arguments(config, len(train_corpus), self.metric if eval_corpus is not None else None, self.greater_is_better)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_corpus,
            eval_dataset=eval_corpus,
            callbacks=[*callbacks],
        )
        # The model divides its loss by num_items_in_batch, which counts the labels of all passes and processes of an optimizer step.
        self.model_accepts_loss_kwargs = True
        for plain in (PrinterCallback, ProgressCallback):
            self.remove_callback(plain)
        self.interruption = Interruption(self._any_process)
        self.add_callback(self.interruption)
        self.progress_bar = ProgressBar(self.metric)
        if config.training.progress:
            self.add_callback(self.progress_bar)
        patience = config.training.early_stopping_patience
        self.early_stopping = None if patience is None else EarlyStopping(self.metric, patience, self.greater_is_better)
        if self.early_stopping is not None:
            self.add_callback(self.early_stopping)
        self.add_callback(_EpochOrder(self))

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config.training.output_dir)

    @property
    def _bare(self) -> Any:
        """The model without what DDP and the like wrap around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _any_process(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum"))

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        rows = self.args.per_device_train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        self.sampler = LengthBucketSampler(self.train_corpus.durations(), rows, seed=self.config.training.seed)
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """transformers' own, with workers that leave signals to this process."""
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wraps the one that starts the workers
        inner.worker_init_fn = DeafToSignals(self.interruption.runs, inner.worker_init_fn)
        return loader

    # Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over what learns, a group a rate. Biases and scales do not decay."""
        if self.optimizer is None:
            groups = []
            bare = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
            for group, parameters in parameter_groups(bare.aligner).items():
                learning = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
                rate, decay = getattr(self.config.training, f"{group}_learning_rate"), self.config.training.weight_decay
                matrices = [parameter for name, parameter in learning.items() if decay and parameter.ndim > 1]
                others = [parameter for name, parameter in learning.items() if not decay or parameter.ndim <= 1]
                for chosen, weight_decay in ((matrices, decay), (others, 0.0)):
                    if chosen:
                        groups.append({"params": chosen, "lr": rate, "weight_decay": weight_decay, "name": group})
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, bare)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """The first group's rate; called between an optimizer step and the schedule's, where every group's is taken for the log."""
        self._rates = {group["name"]: float(group["lr"]) for group in _present(self.optimizer).param_groups}
        return next(iter(self._rates.values()))

    # Loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Cross entropy over the answers' tokens, plus the weighted router losses: means over layers, passes and processes."""
        settings = self.config.training
        routed = settings.load_balancing_weight > 0 or settings.z_loss_weight > 0
        counted = self._logs_after_this_step()
        aligner = self._bare.aligner
        with contextlib.ExitStack() as recording:
            record = recording.enter_context(record_router_logits(aligner)) if routed else {}
            loss, outputs = super().compute_loss(
                model, {**inputs, "output_gates": counted or routed}, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if routed:
            logits = [valid_logits(passes, outputs["frame_mask"]) for passes in record.values()]
            balance = torch.stack([load_balancing_loss(layer, aligner.top_k) for layer in logits]).mean()
            z = torch.stack([router_z_loss(layer) for layer in logits]).mean()
            weighted = settings.load_balancing_weight * balance + settings.z_loss_weight * z
            # The cross entropy is a share of the optimizer step's; these are means, to be divided by its number of passes.
            loss = loss + weighted / self.current_gradient_accumulation_steps
            self._auxiliary = {"load_balancing_loss": balance.detach(), "z_loss": z.detach()}
        if counted:
            self._counts.add(outputs["gates"], outputs["frame_mask"])
        return (loss, outputs) if return_outputs else loss

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step % self.args.logging_steps == 0

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with every group's rate and the router's statistics. FloatingPointError for a loss that is no number any more."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rates or set training.max_grad_norm; "
                    f"{self._previous()}"
                )
            logs.pop("learning_rate", None)
            logs |= {f"learning_rate_{group}": rate for group, rate in self._rates.items()}
            logs |= {name: float(value) for name, value in self._auxiliary.items()}
            self._log_router(logs)
        self._saving_space(super().log, logs, start_time)

    def _log_router(self, logs: dict[str, float]) -> None:
        counts = self._counts.statistics(_whole(self._bare.aligner.layer_scales), self._sum_over_processes)
        self._counts.reset()
        if counts is None:
            return
        logs |= counts.summary()
        if not self.args.should_save:
            return
        self._saving_space(append_statistics, self.run / STATISTICS_NAME, self.state.global_step, counts)
        for callback in self.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None) if isinstance(callback, TensorBoardCallback) else None
            if writer is not None:
                for name, value in counts.scalars().items():
                    self._saving_space(writer.add_scalar, name, value, self.state.global_step)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _saving_space(self, write: Any, *arguments: Any) -> None:
        """Write to a log; a disk that has no room for it must not end the run."""
        try:
            write(*arguments)
        except OSError as error:
            if not getattr(self, "_log_failed", False):
                self._log_failed = True
                logger.error("the logs in %s cannot be written from step %d on: %s", self.run, self.state.global_step, error)

    # Scores

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Score the eval corpus by generation, all of it, shared out among the processes."""
        corpus: Any = self.eval_corpus if eval_dataset is None else eval_dataset
        data = self.config.data
        scorable = corpus.for_scoring()
        # Sharded backbones generate in step or not at all, so there every process scores everything.
        shared = 1 if self.is_fsdp_enabled or len(scorable) < self.args.world_size else self.args.world_size
        mine = scorable[self.args.process_index :: shared] if shared > 1 else corpus
        self.interruption.may_raise = self.args.world_size == 1
        try:
            evaluation = evaluate(
                self._bare,
                self.processor,
                mine,
                # One process's rows need not tell, as the whole corpus does.
                task=data.task or ("question" if any(row.answers for row in scorable) else "transcription"),
                prompt=data.prompt,
                language=data.language,
                normalization=data.normalization,
                batch_size=data.eval_batch_size,
                num_workers=data.num_workers,
                max_bad_rows=data.max_bad_rows,
                max_new_tokens=data.max_new_tokens,
            )
        except KeyboardInterrupt:
            if not self.interruption.may_raise or self.interruption.stopped:
                raise
            self.interruption.stop(self.control)
            return {}
        finally:
            self.interruption.may_raise = False
        if shared > 1:
            evaluation = self._gathered(evaluation, scorable.problems)
        self.last_evaluation = evaluation
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores(evaluation).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> dict[str, float]:
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler:
            # The evaluation before the first step is one that the resumed run owes: it may be the best one.
            self._determine_best_metric(metrics, trial)
        return metrics

    def is_finished(self, checkpoint: Path) -> bool:
        """Whether the run that made ``checkpoint`` ended with it: all steps done, or stopped early."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        over = self.early_stopping is not None and self.early_stopping.is_over(state)
        return over or state.global_step >= state.max_steps

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint's weights and log without training on."""
        self.load_weights(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def owes_evaluation(self, checkpoint: Path) -> bool:
        """Whether a run that goes on from ``checkpoint`` has to score it first: it was stopped between a step and its evaluation."""
        if self.eval_corpus is None:
            return False
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        done = any(f"eval_{self.metric}" in entry and entry["step"] == state.global_step for entry in state.log_history)
        return state.global_step % self.args.eval_steps == 0 and not done

    def _gathered(self, mine: Evaluation, left_out: Sequence[Problem]) -> Evaluation:
        """The evaluation of the whole corpus from those of all processes' shares, each of which begins its problems with ``left_out``."""
        shares: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(shares, mine)
        hypotheses = [
            dataclasses.replace(row, place=row.place * len(shares) + process)
            for process, share in enumerate(shares)
            for row in share.hypotheses
        ]
        hypotheses.sort(key=lambda row: row.place)
        data = self.config.data
        texts = [row.hypothesis for row in hypotheses]
        errors = match = None
        if mine.task == "transcription":
            errors = word_errors([row.reference for row in hypotheses], texts, data.language, normalization=data.normalization)
        else:
            answers = [row.answers or (row.reference,) for row in hypotheses]
            match = exact_match(texts, answers, data.language, normalization=data.normalization)
        return dataclasses.replace(
            mine,
            rows=sum(share.rows - len(left_out) for share in shares) + len(left_out),
            hypotheses=hypotheses,
            problems=[*left_out, *(problem for share in shares for problem in share.problems[len(left_out) :])],
            warnings=[warning for share in shares for warning in share.warnings],
            errors=errors,
            match=match,
            audio_seconds=sum(share.audio_seconds for share in shares),
            seconds=max(share.seconds for share in shares),
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best score so far, which is saved at once: it need not fall on a step of ``save_steps``."""
        if not metrics:
            return False
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.control.should_save = True
        return best

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside and put it in place. A failure is told, leaves the previous one, and does not end the run."""
        checkpoint = self.run / f"checkpoint-{self.state.global_step}"
        staging = staging_folder(checkpoint)
        error: Exception | None = None
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        except OSError as failure:
            error = failure
        if not self._any_process(error is not None):
            try:
                self._write_checkpoint(staging)
            except Exception as failure:
                error = failure
        failed = self._any_process(error is not None)
        if not failed:
            try:
                if self.args.should_save:
                    self._bring_best()
                    seal(checkpoint)
            except OSError as failure:
                error = failure
            failed = self._any_process(error is not None)
        if failed:
            self._tell_failure(checkpoint, error)
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            return
        self.last_save_error = None
        if self.args.should_save:
            remove_old(self.run, self.args.save_total_limit, (self.state.best_global_step, self.state.global_step))

    def _bring_best(self) -> None:
        """Copy the best checkpoint so far out of the run that this one goes on from in a folder of its own."""
        if self.origin is None or not self.state.best_global_step:
            return
        best = self.run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == self.state.global_step or best.exists() or not (self.origin / best.name).is_dir():
            return
        shutil.rmtree(staging_folder(best), ignore_errors=True)
        shutil.copytree(self.origin / best.name, staging_folder(best))
        staging_folder(best).rename(best)

    def _write_checkpoint(self, folder: Path) -> None:
        broken = [name for name, parameter in self._bare.trained_parameters().items() if not bool(_whole(parameter).isfinite().all())]
        if broken:
            raise FloatingPointError(f"{', '.join(broken)} hold values that are no numbers any more")
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            (folder / ROWS_NAME).write_text(json.dumps(self.rows), encoding="utf-8")
            stateful: Any = self.state.stateful_callbacks
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    stateful[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _tell_failure(self, checkpoint: Path, error: Exception | None) -> None:
        reason = f"{error or 'another process failed'}"
        self.last_save_error = CheckpointError(f"{checkpoint} could not be saved: {reason}; {self._previous()}")
        self.last_save_error.__cause__ = error
        if self.args.should_save:
            logger.error("%s", self.last_save_error)

    def _previous(self) -> str:
        """What is safe, for messages about what is not."""
        found = checkpoints_in(self.run)
        return f"{found[-1]} is untouched, resume from there" if found else "there is no earlier checkpoint"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights, the processor and the configuration. Every process has to call it: weights may be sharded."""
        weights = {name: _whole(parameter) for name, parameter in self._bare.trained_parameters().items()}
        if self.args.should_save:
            folder = Path(output_dir or self.run)
            self._bare.save_pretrained(folder, state_dict={f"encoder.steering.{name}": value for name, value in weights.items()})
            self.processor.save_pretrained(folder)
            self.config.save(folder / TRAINING_CONFIG_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """transformers' own would save the frozen weights along, where these are sharded or in DeepSpeed's hands."""
        model: Any = self.model_wrapped
        if self.is_fsdp_enabled:
            state = tree_map_only(DTensor, lambda value: value.full_tensor(), _present(self.optimizer).state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
        elif self.is_deepspeed_enabled:
            model.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(_present(self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Onto the CPU first: of a sharded run the state is whole there, and "cpu:0", which accelerate calls the device of a run on CPUs,
        is nothing that torch loads onto."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = _present(self.optimizer)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            for name, value in values.items():
                # Moments have the parameter's shape and are sharded as it is; the count of steps is a number.
                if value.shape == parameters[index].shape:
                    values[name] = _sharded_like(value, parameters[index])
        optimizer.load_state_dict(state)
        _present(self.lr_scheduler).load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Not strictly: the frozen weights are not among what was saved.
        engine: Any = self.model_wrapped
        engine.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _loss_state(self, folder: str) -> Path:
        return Path(folder) / f"{LOSS_STATE_NAME}_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # A checkpoint may fall between two logs: the part of the logged mean that has been summed up goes along.
        torch.save({"sum": self._tr_loss.cpu(), "from_step": self._globalstep_last_logged}, self._loss_state(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._loss_state(checkpoint).is_file():
            state = torch.load(self._loss_state(checkpoint), weights_only=True)
            self._tr_loss = state["sum"].to(self.args.device)
            self._globalstep_last_logged = state["from_step"]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def load_weights(self, folder: Path) -> None:
        """Put the trained weights of a checkpoint into the model. CheckpointError if they are damaged or not this model's."""
        saved = read_weights(folder / WEIGHTS_NAME)
        own = self._bare.trained_parameters()
        if saved.keys() != own.keys() or any(saved[name].shape != own[name].shape for name in own):
            raise CheckpointError(f"{folder / WEIGHTS_NAME} does not hold the trained weights of this model")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(_sharded_like(saved[name], parameter))


def _whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, gathered from all processes if it is sharded: then each of them has to ask."""
    values: Any = parameter.detach()
    whole: Tensor = values.full_tensor() if isinstance(values, DTensor) else values
    return whole


def _sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of ``value`` where ``parameter`` is sharded, else ``value``; on the device of ``parameter``."""
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else value


def _present(part: Any) -> Any:
    """An optimizer or schedule that exists by the time it is asked for, which its type does not say."""
    assert part is not None
    return part


class _EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins: of a resumed epoch's loader, which skips batches, no one else reaches it."""

    def __init__(self, trainer: AlignerTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = self.trainer.run / STATISTICS_NAME
        if args.should_save:
            drop_statistics_after(path, state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))
