"""Training an aligner between frozen backbones: `train`, from a configuration to checkpoints and a score."""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import TrainerCallback

from .data import BadRowLog, Collator, Corpus, Problem, load
from .error_rates import word_errors
from .evaluation import Evaluation
from .model import SteerMoEForConditionalGeneration
from .processor import SteerMoEProcessor
from .run_checkpoints import CheckpointError, checkpoints_in, locked, newest_sound, remove_unfinished, step_of, verify
from .saved_model import read
from .trainer import AUDIO, LOSS_STATE_NAME, ROWS_NAME, AlignerTrainer
from .training_arguments import runs_on_cpu
from .training_config import TRAINING_CONFIG_NAME, ModelConfig, TrainingConfig, load_config

__all__ = ["TrainingResult", "build", "train"]

logger = logging.getLogger(__name__)

BAD_ROWS_NAME = "bad_rows.jsonl"
# What a resumed run may do otherwise than the run that made the checkpoint: nothing that the loss depends on.
RESUMABLE = frozenset(
    {
        "training.output_dir",
        "training.logging_steps",
        "training.eval_steps",
        "training.save_steps",
        "training.save_total_limit",
        "training.early_stopping_patience",
        "training.tensorboard",
        "training.progress",
        "model.backend",
        "data.eval",
        "data.max_bad_rows",
        "data.num_workers",
        "data.eval_batch_size",
        "data.max_new_tokens",
        "data.normalization",
    }
)
# What may be named otherwise: that the content is the same is proved, by fingerprints and files and by the digests of the rows.
BACKBONES = frozenset({"model.audio_model", "model.text_model", "model.audio_revision", "model.text_revision"})
ROWS = "data.train"
# What a tokenizer's file says of where it was found.
TOKENIZER_CONFIG, FOUND_AT = "tokenizer_config.json", frozenset({"is_local", "local_files_only", "name_or_path"})


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    ``model`` has the weights of ``checkpoint``: the best by score if there were scores, else the last. ``last_checkpoint`` is where an
    ``interrupted`` run goes on. ``metric`` ("wer", "cer" or "accuracy") and ``best_score`` are None without an eval corpus; ``evaluation``
    is the latest one. ``history`` is the log: dicts with ``step``, and ``loss`` or ``eval_wer`` and so on. ``bad_rows`` were met and left
    out; ``warnings`` were used and look wrong.
    """

    model: Any
    processor: Any
    steps: int
    checkpoint: Path
    last_checkpoint: Path
    interrupted: bool
    metric: str | None
    best_score: float | None
    evaluation: Evaluation | None
    history: list[dict[str, float]]
    bad_rows: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, mean loss since the log before) in order."""
        return [(int(entry["step"]), entry["loss"]) for entry in self.history if "loss" in entry]


def train(
    config: TrainingConfig | str | os.PathLike[str],
    *,
    resume: bool | str | os.PathLike[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    model: Any = None,
    processor: Any = None,
) -> TrainingResult:
    """Train an aligner as ``config`` says, a `TrainingConfig` or what `load_config` takes.

    ``resume`` goes on from a checkpoint exactly as if the run had never stopped: a folder, or True for the newest sound one in
    ``training.output_dir``. ``callbacks`` are transformers'. ``model`` and ``processor``, both or neither, are used in place of those that
    ``config.model`` describes. Ctrl-C and SIGTERM end the run after the step at hand, with a checkpoint.

    A run that is finished is not trained any further: its result comes back. FileExistsError for an output_dir that another run is writing
    to, or that holds checkpoints which are not of the run to go on with or are later than the one to go on from; CheckpointError for a
    checkpoint that is damaged (named), made under other settings, with other backbones or other rows (those that have only moved are the
    same), or could not be written in the end; ValueError and TooManyBadRows as in `data.load`.
    """
    if not isinstance(config, TrainingConfig):
        config = load_config(config)
    if (model is None) != (processor is None):
        raise ValueError("model and processor must be given together or not at all")
    state = PartialState(cpu=runs_on_cpu())
    with locked(Path(config.training.output_dir)) if state.is_main_process else nullcontext():
        return _train(config, state, resume, callbacks, model, processor)


def _train(
    config: TrainingConfig,
    state: PartialState,
    resume: bool | str | os.PathLike[str] | None,
    callbacks: Sequence[TrainerCallback],
    model: Any,
    processor: Any,
) -> TrainingResult:
    run = Path(config.training.output_dir)
    checkpoint = _checkpoint_to_resume(run, resume)
    _check_folder(run, checkpoint)
    renamed: frozenset[str] = frozenset() if checkpoint is None else _check_resumable(config, checkpoint, state.num_processes)
    train_corpus, eval_corpus, log = _corpora(config)
    if model is None:
        model, processor = build(config.model, seed=config.training.seed)
    if checkpoint is not None:
        _check_backbones(model, checkpoint)
        if renamed & BACKBONES:
            _check_processor(processor, checkpoint)
    data = config.data
    collator = Collator(processor, prompt=data.prompt, bad_rows=log, fallback=train_corpus, max_seconds=data.max_seconds)
    trainer = AlignerTrainer(model, processor, config, collator, train_corpus, eval_corpus, callbacks)
    if checkpoint is not None:
        _check_rows(trainer, checkpoint)
        trainer.origin = checkpoint.parent
    if state.is_main_process:
        remove_unfinished(run)
        if checkpoint is None or ROWS in renamed:  # bad rows go by names, and would be counted under both
            log.path.unlink(missing_ok=True)
        config.save(run / TRAINING_CONFIG_NAME)
    state.wait_for_everyone()
    if checkpoint is not None and trainer.is_finished(checkpoint):
        if checkpoint.parent.resolve() != run.resolve():
            raise CheckpointError(f"{checkpoint} is the end of its run: there is nothing to go on with")
        trainer.restore(checkpoint)
    else:
        trainer.args.eval_on_start = checkpoint is not None and trainer.owes_evaluation(checkpoint)
        try:
            with trainer.interruption.listening():
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            trainer.progress_bar.stop()
    bad_rows = [*train_corpus.problems, *log.errors]
    if state.is_main_process:
        _report(trainer, checkpoint, bad_rows, log.warnings)
    if trainer.last_save_error is not None:
        raise trainer.last_save_error
    return _result(trainer, bad_rows, log.warnings)


def build(config: ModelConfig, *, seed: int = 0) -> tuple[Any, Any]:
    """A model with a new aligner, drawn from ``seed``, and its processor, as ``config`` describes them. Errors are those of loading."""
    audio_model, text_model = config.audio_model, config.text_model
    torch.manual_seed(seed)
    model = SteerMoEForConditionalGeneration.from_backbones(
        audio_model,
        text_model,
        audio_revision=config.audio_revision,
        text_revision=config.text_revision,
        num_experts=config.num_experts,
        top_k=config.top_k,
        renormalize=config.renormalize,
        steering_scale=config.steering_scale,
        pool=config.pool,
        pool_size=config.pool_size,
        backend=config.backend,
        audio_padding=config.audio_padding,
        frame_counts=config.frame_counts,
        dtype=getattr(torch, config.dtype),
    )
    processor = SteerMoEProcessor.from_backbones(
        audio_model,
        text_model,
        audio_revision=config.audio_revision,
        text_revision=config.text_revision,
        pool_size=config.pool_size,
        audio_padding=config.audio_padding,
        frame_counts=config.frame_counts,
    )
    return model, processor


def _checkpoint_to_resume(run: Path, resume: bool | str | os.PathLike[str] | None) -> Path | None:
    """The checkpoint to go on from, verified; a damaged newest one gives way to the one before only where none was named."""
    if resume is None or resume is False:
        return None
    if resume is not True:
        verify(resume)
        return Path(resume)
    remove_unfinished(run)
    checkpoint, problems = newest_sound(run)
    for problem in problems:
        logger.warning("passed over: %s", problem)
    if checkpoint is None:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"there is no sound checkpoint in {run} to resume{listed}")
    return checkpoint


def _check_resumable(config: TrainingConfig, checkpoint: Path, processes: int) -> frozenset[str]:
    """The settings that differ, and are to be proved to name the same content."""
    differing = config.differences(load_config(checkpoint / TRAINING_CONFIG_NAME))
    provable = (BACKBONES if _records_backbones(checkpoint) else frozenset()) | ({ROWS} if AUDIO in _recorded_rows(checkpoint) else set())
    changed = {key: values for key, values in differing.items() if key not in RESUMABLE | provable}
    if changed:
        listed = "".join(f"\n  {key}: {theirs!r} then, {mine!r} now" for key, (mine, theirs) in changed.items())
        raise CheckpointError(f"{checkpoint} was made under other settings, and would not go on as the run it is of:{listed}")
    made_by = len(list(checkpoint.glob(f"{LOSS_STATE_NAME}_*.pt")))
    if made_by != processes:
        raise CheckpointError(f"{checkpoint} was made by {made_by} processes, and this run has {processes}: start as many")
    return frozenset(differing) & provable


def _records_backbones(checkpoint: Path) -> bool:
    """Whether the checkpoint records settings of its backbones, too: weights alone do not prove them the same."""
    return all(fingerprint.settings is not None for fingerprint in read(checkpoint).fingerprints.values())


def _check_folder(run: Path, checkpoint: Path | None) -> None:
    """FileExistsError if the run's folder holds what would be mixed with, or taken for, this run's checkpoints."""
    found = checkpoints_in(run)
    if not found:
        return
    if checkpoint is None or checkpoint.parent.resolve() != run.resolve():
        raise FileExistsError(f"training.output_dir {run} holds {found[-1].name} of an earlier run: resume that, or choose another folder")
    later = [path for path in found if step_of(path) > step_of(checkpoint) and _is_sound(path)]
    if later:
        raise FileExistsError(
            f"{run} holds {later[-1].name}, later than the {checkpoint.name} to go on from: move it away, or choose another "
            "training.output_dir"
        )


def _is_sound(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def _check_backbones(model: Any, checkpoint: Path) -> None:
    recorded = read(checkpoint).fingerprints
    for kind, what in (("audio", "audio_model"), ("text", "text_model")):
        found = model.fingerprints[kind]
        if found.digest != recorded[kind].digest:
            raise CheckpointError(
                f"{checkpoint} was made with a {what} of fingerprint {recorded[kind].digest[:12]}, and this one's is {found.digest[:12]}: "
                "its weights have changed since"
            )
        if changed := recorded[kind].changed_settings(found):
            raise CheckpointError(
                f"{checkpoint} was made with a {what} of other settings, and the weights are the same: {'; '.join(changed)}"
            )
        if recorded[kind].settings is None:
            logger.warning("%s does not record the settings of its %s: they are not compared", checkpoint, what)


def _check_processor(processor: Any, checkpoint: Path) -> None:
    """The fingerprints say nothing of the tokenizer, its chat template and the feature extractor, which come from the same folders."""
    # Both as they are written now: another version of transformers may have written the checkpoint's.
    then, now = _written(SteerMoEProcessor.from_pretrained(checkpoint)), _written(processor)
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise CheckpointError(
                f"{checkpoint} was made with another tokenizer or feature extractor than those of this audio_model and text_model: "
                f"its {name} differs from theirs"
            )


def _written(processor: Any) -> dict[str, Any]:
    """What a processor's files say, by name, but for where its tokenizer was found."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        contents: dict[str, Any] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if (settings := contents.get(TOKENIZER_CONFIG)) is not None:
        contents[TOKENIZER_CONFIG] = {key: value for key, value in json.loads(settings).items() if key not in FOUND_AT}
    return contents


def _recorded_rows(checkpoint: Path) -> dict[str, Any]:
    """What `describe_rows` said of the rows then; nothing where it was not recorded yet."""
    path = checkpoint / ROWS_NAME
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _check_rows(trainer: AlignerTrainer, checkpoint: Path) -> None:
    recorded = _recorded_rows(checkpoint)
    changed = [name for name, value in recorded.items() if trainer.rows.get(name) != value]
    if changed:
        then, now = recorded["rows"], trainer.rows["rows"]
        if changed == [AUDIO]:
            how = f"the texts are those of then, and the audio of the {now} rows is other audio"
        else:
            how = f"{then} rows to learn from then, {now} now" if then != now else f"as many rows as then, {now}, and other ones"
        raise CheckpointError(f"{checkpoint} was made with another data.train, and would not go on as the run it is of: {how}")


def _corpora(config: TrainingConfig) -> tuple[Corpus, Corpus | None, BadRowLog]:
    data = config.data
    train_corpus = load(data.train).for_training(data.max_seconds)
    train_corpus.check_limit(data.max_bad_rows)
    if not len(train_corpus):
        listed = "".join(f"\n  {problem}" for problem in train_corpus.problems[:5])
        raise ValueError(f"data.train has no row to learn from: {len(train_corpus.problems)} bad ones{listed}")
    eval_corpus = None if data.eval is None else load(data.eval)
    if eval_corpus is not None:
        # What scoring would stop at is better said now than at the first evaluation.
        word_errors([""], [""], data.language, normalization=data.normalization)
        scorable = eval_corpus.for_scoring()
        scorable.check_limit(data.max_bad_rows)
        if not len(scorable):
            raise ValueError(f"data.eval has no row to score: {'; '.join(map(str, scorable.problems[:3]))}")
    path = Path(config.training.output_dir) / BAD_ROWS_NAME
    # Rows that loading left out count towards the limit as those do that turn out bad when they are decoded.
    return train_corpus, eval_corpus, BadRowLog(path, limit=data.max_bad_rows - len(train_corpus.problems))


def _result(trainer: AlignerTrainer, bad_rows: list[Problem], warnings: list[Problem]) -> TrainingResult:
    run, state = trainer.run, trainer.state
    last = run / f"checkpoint-{state.global_step}"
    best = _best_checkpoint(trainer) or last
    if best != last and not trainer.interruption.stopped:
        trainer.load_weights(best)
    scored = trainer.eval_corpus is not None
    return TrainingResult(
        model=trainer._bare,
        processor=trainer.processor,
        steps=state.global_step,
        checkpoint=last if trainer.interruption.stopped else best,
        last_checkpoint=last,
        interrupted=trainer.interruption.stopped,
        metric=trainer.metric if scored else None,
        best_score=state.best_metric if scored else None,
        evaluation=trainer.last_evaluation,
        history=list(state.log_history),
        bad_rows=bad_rows,
        warnings=warnings,
    )


def _best_checkpoint(trainer: AlignerTrainer) -> Path | None:
    """None where there is no best one, or it has gone with the folder of a run that this one goes on from."""
    best = trainer.run / f"checkpoint-{trainer.state.best_global_step}"
    return best if best.is_dir() else None


def _report(trainer: AlignerTrainer, checkpoint: Path | None, bad_rows: list[Problem], warnings: list[Problem]) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    run, state = trainer.run, trainer.state
    for what, problems in (("left out", bad_rows), ("used, but look wrong", warnings)):
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:5])
            more = f"\n  and {len(problems) - 5} more, in {run / BAD_ROWS_NAME}" if len(problems) > 5 else ""
            counted = "1 row was" if len(problems) == 1 else f"{len(problems)} rows were"
            console.print(f"{counted} {what}:\n{shown}{more}", markup=False)
    if trainer.last_save_error is not None:
        return
    last = f"checkpoint-{state.global_step}"
    if trainer.interruption.stopped:
        together = f" (in {trainer.args.world_size} processes, as it was started)" if trainer.args.world_size > 1 else ""
        console.print(
            f"stopped after step {state.global_step} of {state.max_steps}, saved in {run / last}\n"
            f"go on with: steermoe train {shlex.quote(str(run / TRAINING_CONFIG_NAME))} --resume{together}",
            markup=False,
        )
        return
    if checkpoint is not None and state.global_step == step_of(checkpoint):
        console.print(f"the run was finished after step {state.global_step} already: nothing was trained", markup=False)
    if state.best_global_step:
        where = f"in {best}" if (best := _best_checkpoint(trainer)) else "in a checkpoint that is not there any more"
        console.print(f"best {trainer.metric} {state.best_metric:.2%} after step {state.best_global_step}, {where}", markup=False)
