"""What transformers' Trainer is told for one of our configurations: its arguments, and the score that a run is judged by."""

from __future__ import annotations

import math
import os

import torch
from transformers import TrainingArguments

from .data import Corpus
from .error_rates import UNSPACED_LANGUAGES, language_code
from .evaluation import Evaluation
from .training_config import TrainingConfig

__all__ = ["runs_on_cpu", "score_of", "scores", "training_arguments"]


def runs_on_cpu() -> bool:
    """Whether training stays on the CPU: where there is nothing else, or ``accelerate launch --cpu`` asks for it.

    accelerate has to be told: it starts several processes on CPUs only where it knows that CPUs are meant.
    """
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.accelerator.is_available()


def score_of(config: TrainingConfig, corpus: Corpus | None) -> tuple[str, bool]:
    """The score a run is judged by, and whether more of it is better: accuracy for questions, else the language's error rate."""
    task = config.data.task
    if task is None and corpus is not None and any(row.answers for row in corpus):
        task = "question"
    if task == "question":
        return "accuracy", True
    return ("cer" if language_code(config.data.language) in UNSPACED_LANGUAGES else "wer"), False


def scores(evaluation: Evaluation) -> dict[str, float]:
    """The numbers of an evaluation that a log holds."""
    found: dict[str, float] = {}
    if evaluation.errors is not None:
        for name in ("wer", "cer", "raw_wer", "raw_cer"):
            found[name] = getattr(evaluation.errors, name).rate
    if evaluation.match is not None:
        found["accuracy"] = evaluation.match.accuracy
    found["bad_rows"] = float(len(evaluation.problems))
    found["real_time_factor"] = evaluation.real_time_factor
    return found


def training_arguments(config: TrainingConfig, rows: int, metric: str | None, greater_is_better: bool) -> TrainingArguments:
    """transformers' arguments for a configuration and a corpus of so many rows; ``metric`` None: nothing is scored."""
    settings = config.training
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_steps,
        average_tokens_across_devices=True,
        learning_rate=max(settings.steering_learning_rate, settings.router_learning_rate, settings.projection_learning_rate),
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=settings.logging_steps,
        # A loss that is no number is an error here, not something to average away.
        logging_nan_inf_filter=False,
        eval_strategy="no" if metric is None else "steps",
        metric_for_best_model=metric,
        greater_is_better=greater_is_better,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        report_to=["tensorboard"] if settings.tensorboard else [],
        disable_tqdm=True,
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=not runs_on_cpu(),
        use_cpu=runs_on_cpu(),
        # Examples, not rows of tensors.
        remove_unused_columns=False,
        label_names=["labels"],
        # Every trained parameter takes part in every pass, and the backbones' buffers never change.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    rows_a_step = settings.batch_size * settings.accumulation_steps * arguments.world_size
    # The last rows of an epoch, if they do not divide among the processes, would be filled up by rows seen already.
    arguments.dataloader_drop_last = arguments.world_size > 1 and rows >= rows_a_step
    arguments.eval_steps = settings.eval_steps or max(1, math.ceil(rows / rows_a_step))
    return arguments
