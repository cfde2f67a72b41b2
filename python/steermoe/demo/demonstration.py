"""``steermoe demo``: an aligner trained before your eyes, on speech made on the spot, between the backbones inside this package.

`run` synthesises sentences in many voices, trains a steered aligner, and on the same budget one with the projection alone; measures both on
sentences and voices nobody has heard; asks a question about a clip; proves the backbones untouched; and leaves one HTML file that shows all
of it. Every number is measured in the run.
"""

from __future__ import annotations

import json
import math
import platform
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import steermoe_kernels
from steermoe_kernels.backends import get_backend

from ..backbones import encoder_path, language_model_path
from ..data import Collator, load
from ..evaluation import Evaluation, evaluate
from ..preservation import verify
from ..statistics import STATISTICS_NAME, RouterStatistics, read_statistics
from ..training import build, train
from ..training_config import LARGEST_SEED, DataConfig, ModelConfig, TrainingConfig, TrainingSection
from ..transcription import ask
from .phrases import Phrase, phrases
from .report import write_numbers, write_report
from .speech import HELD_OUT_VOICES, SAMPLING_RATE, TRAINING_VOICES, Voice, synthesise

__all__ = ["PROMPT", "DemoResult", "Rival", "run"]

PROMPT = "transcribe the audio."
TRAINING_CLIPS, SENTENCES_A_VOICE, BATCH = 1600, 12, 16
FEWEST_STEPS, MOST_STEPS = 40, 600
LONGEST_ANSWER = 64  # tokens, which are characters: the longest sentence has fewer
# What a run replaces of an earlier one; the marker, written before anything else, tells such a folder from one of the user's.
REPLACED = ("training", "held-out", "steered", "projection-only")
MARKER = "made-by-steermoe-demo.txt"


@dataclass(frozen=True)
class Rival:
    """One of the aligners compared: how it was trained and what it came to."""

    name: str
    parameters: int
    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    untrained: Evaluation
    trained: Evaluation
    checkpoint: Path


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows. ``timings``: seconds of a training step's encoder, by backend."""

    steered: Rival
    projection: Rival
    question: tuple[str, str, str, str]  # sentence, question, expected, answer
    preservation: Any
    usage: RouterStatistics | None
    timings: dict[str, float]
    seconds: float
    machine: dict[str, str]
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def wer(self) -> float:
        """The steered aligner's word error rate on the held-out voices."""
        assert self.steered.trained.errors is not None
        return self.steered.trained.errors.wer.rate


def run(
    output: str | Path, *, minutes: float = 3.0, seed: int = 0, training_clips: int = TRAINING_CLIPS, per_voice: int = SENTENCES_A_VOICE
) -> DemoResult:
    """Run the demo; ``minutes`` of training are shared by the two aligners. Writes ``output``/report.html, its numbers
    as report.json, checkpoints and the clips.

    ``output`` is new, empty or an earlier demo's, whose results are replaced. FileExistsError for a folder of anything else,
    NotADirectoryError for a file, FileNotFoundError without the shipped backbones, RuntimeError without espeak-ng, ValueError for a budget
    of no time and a ``seed`` outside 0 to 2^32 - 1; all but espeak-ng's before anything is written. KeyboardInterrupt after Ctrl-C, also
    where training has ended in order.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be above 0 and finite, got {minutes:g}")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}")
    began, stages = time.perf_counter(), {}
    folder, console = Path(output), Console(stderr=True, highlight=False)
    encoder_path(), language_model_path()  # better missed now than after a minute of synthesis
    _claim(folder)

    def stage(name: str) -> None:
        stages[name] = time.perf_counter() - began
        console.print(f"[bold]{name}[/bold] ({stages[name]:.0f} s)")

    stage("synthesising speech")
    for stale in REPLACED:
        shutil.rmtree(folder / stale, ignore_errors=True)
    training = _record(folder / "training", phrases(seed, training_clips, "train"), TRAINING_VOICES, seed, varied=True)
    said = phrases(1000 + seed, per_voice * len(HELD_OUT_VOICES), "heldout")
    heard = _record(folder / "held-out", said, HELD_OUT_VOICES, seed, varied=False)

    model_config = ModelConfig("shipped", "shipped", pool="max", pool_size=2)
    steps = _affordable_steps(model_config, training, 60 * minutes / 2, seed)
    rivals, models = [], []
    for name, config in (("steered", model_config), ("projection-only", _projection_only(model_config))):
        stage(f"training: {name}, {steps} steps of {BATCH} clips")
        rival, trained = _train(name, config, training, heard, folder / name, steps, seed, console)
        rivals.append(rival)
        models.append(trained)
    steered, projection = rivals

    stage("asking a question")
    model, processor = _reload(steered.checkpoint)
    question = _ask(model, processor, said, heard)
    stage("verifying the backbones")
    preservation = verify(models[0])  # the very modules that training went through, against the untouched files
    stage("timing the kernels")
    timings = _time_backends(model, processor, training)
    stages["writing the report"] = time.perf_counter() - began
    usage = [statistics for _, statistics in read_statistics(folder / "steered" / STATISTICS_NAME)]
    result = DemoResult(
        steered,
        projection,
        question,
        preservation,
        usage[-1] if usage else None,
        timings,
        time.perf_counter() - began,
        _machine(),
        stages,
    )
    write_report(result, folder / "report.html")
    write_numbers(result, folder / "report.json")
    Console(highlight=False).print(_summary(result, folder / "report.html"))
    return result


def _claim(folder: Path) -> None:
    """Make ``folder`` the demo's, or refuse it: a run removes folders in it, whose names a user's own might have."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: the demo needs a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise FileExistsError(
            f"{folder} is not empty and not an earlier demo's, whose {', '.join(REPLACED)} would be replaced: give a new or empty folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(f"steermoe demo made this folder; when run again, it replaces {', '.join(REPLACED)} and the report.\n")


# --- speech -----------------------------------------------------------------------------------------------------------------------------


def _record(folder: Path, said: Sequence[Phrase], voices: Sequence[Voice], seed: int, *, varied: bool) -> Path:
    """Speak ``said`` into FLAC files, by the voices in turn; the manifest's path. ``varied``: by random ones, at rates and pitches anew."""
    import soundfile

    folder.mkdir()
    rng = random.Random(f"voices-{seed}")
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as manifest:
        for index, phrase in enumerate(said):
            voice = rng.choice(voices).varied(rng) if varied else voices[index % len(voices)]
            audio = synthesise(phrase.text, voice)
            name = f"{index:04d}.flac"
            soundfile.write(folder / name, audio, SAMPLING_RATE)
            row = {"audio_filepath": name, "text": phrase.text, "duration": len(audio) / SAMPLING_RATE, "id": name, "voice": str(voice)}
            manifest.write(json.dumps(row) + "\n")
    return folder / "manifest.jsonl"


# --- training ---------------------------------------------------------------------------------------------------------------------------


def _projection_only(config: ModelConfig) -> ModelConfig:
    """The same aligner with nothing to steer by: scales of zero, which no gradient moves."""
    return ModelConfig(**(vars(config) | {"steering_scale": 0.0}))


def _config(model: ModelConfig, training: Path, folder: Path, steps: int, seed: int) -> TrainingConfig:
    steers = model.steering_scale != 0
    section = TrainingSection(
        output_dir=str(folder),
        max_steps=steps,
        batch_size=BATCH,
        steering_learning_rate=1e-2 if steers else 0.0,
        router_learning_rate=2e-3 if steers else 0.0,
        projection_learning_rate=5e-3,
        warmup_steps=0.05,
        save_steps=steps,
        logging_steps=max(1, steps // 40),
        seed=seed,
        tensorboard=False,
    )
    return TrainingConfig(model, DataConfig(str(training), prompt=PROMPT, normalization="basic", max_new_tokens=LONGEST_ANSWER), section)


def _affordable_steps(config: ModelConfig, training: Path, seconds: float, seed: int) -> int:
    """How many optimizer steps fit into ``seconds`` on this machine, by timing a few."""
    model, processor = build(config, seed=seed)
    rows = load(str(training))
    collate = Collator(processor, prompt=PROMPT)
    spent = []
    for turn in range(4):
        batch = collate([rows[index] for index in range(turn * BATCH, (turn + 1) * BATCH)])
        start = time.perf_counter()
        model(**batch).loss.backward()
        spent.append(time.perf_counter() - start)
    # The first one warms up; a fifth on top for decoding, the optimizer and logs.
    return max(FEWEST_STEPS, min(MOST_STEPS, int(seconds / (1.2 * sorted(spent[1:])[1]))))


def _train(
    name: str, model_config: ModelConfig, training: Path, heard: Path, folder: Path, steps: int, seed: int, console: Console
) -> tuple[Rival, Any]:
    model, processor = build(model_config, seed=seed)
    # An untrained aligner says something, and never stops: a few clips of each voice show that.
    untrained = _evaluate(model, processor, heard, first=2 * len(HELD_OUT_VOICES))
    console.print(f"  untrained: {_words(untrained)}")
    start = time.perf_counter()
    result = train(_config(model_config, training, folder, steps, seed), model=model, processor=processor)
    if result.interrupted:  # it has said how to go on with this aligner; what is left of the demo would go on without
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    trained = _evaluate(result.model, processor, heard)
    console.print(f"  trained:   {_words(trained)}")
    learnt = [parameter for parameter in result.model.trained_parameters().values() if parameter.requires_grad]
    rival = Rival(
        name,
        sum(parameter.numel() for parameter in learnt),
        result.steps,
        seconds,
        result.losses,
        untrained,
        trained,
        result.last_checkpoint,
    )
    return rival, result.model


def _evaluate(model: Any, processor: Any, heard: Path, first: int | None = None) -> Evaluation:
    corpus = load(str(heard) if first is None else {"path": str(heard), "first": first})
    return evaluate(model.eval(), processor, corpus, prompt=PROMPT, normalization="basic", batch_size=20, max_new_tokens=LONGEST_ANSWER)


def _words(evaluation: Evaluation) -> str:
    assert evaluation.errors is not None
    low, high = evaluation.errors.wer.interval
    return f"WER {evaluation.errors.wer.rate:.1%} ({low:.1%} to {high:.1%}) on {len(evaluation.hypotheses)} clips of held-out voices"


# --- the rest ---------------------------------------------------------------------------------------------------------------------------


def _reload(checkpoint: Path) -> tuple[Any, Any]:
    """As a user would: from what training saved."""
    from ..model import SteerMoEForConditionalGeneration
    from ..processor import SteerMoEProcessor

    return SteerMoEForConditionalGeneration.from_pretrained(checkpoint).eval(), SteerMoEProcessor.from_pretrained(checkpoint)


def _ask(model: Any, processor: Any, said: Sequence[Phrase], heard: Path) -> tuple[str, str, str, str]:
    """A question about the first held-out clip of which one can be asked: nothing was trained to answer about audio."""
    index, phrase = next((index, phrase) for index, phrase in enumerate(said) if phrase.questions)
    question, expected = phrase.questions[0]
    answer = ask(model, processor, heard.parent / f"{index:04d}.flac", question, max_new_tokens=LONGEST_ANSWER)
    return phrase.text, question, expected, answer


def _time_backends(model: Any, processor: Any, training: Path) -> dict[str, float]:
    """Median seconds of a training step's forward and backward with each backend that runs here, taking turns."""
    rows = load(str(training))
    batch = Collator(processor, prompt=PROMPT)([rows[index] for index in range(BATCH)])
    device = model.aligner.steering_vectors.device
    backends = {name: get_backend(name) for name in steermoe_kernels.available_backends()}
    names = [name for name, backend in backends.items() if name == "reference" or device.type in backend.AUTO_DEVICES]
    spent: dict[str, list[float]] = {name: [] for name in names}
    before = model.aligner.backend
    for _ in range(6):
        for name in names:
            model.aligner.backend = name
            start = time.perf_counter()
            model(**batch).loss.backward()
            spent[name].append(time.perf_counter() - start)
    model.aligner.backend = before
    model.zero_grad(set_to_none=True)
    return {name: sorted(seconds[1:])[len(seconds[1:]) // 2] for name, seconds in spent.items()}


def _machine() -> dict[str, str]:
    return {
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steermoe_kernels": steermoe_kernels.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _summary(result: DemoResult, report: Path) -> Table:
    table = Table("", "steered", "projection only", title="held-out voices", title_justify="left")
    rivals = (result.steered, result.projection)
    table.add_row("trained parameters", *(f"{rival.parameters:,}" for rival in rivals))
    table.add_row("untrained", *(_words(rival.untrained).split(" on ")[0] for rival in rivals))
    table.add_row("trained", *(_words(rival.trained).split(" on ")[0] for rival in rivals))
    sentence, question, _, answer = result.question
    table.add_row(f"{question} ({sentence})", answer, "")
    table.add_row("backbones", "bit-identical" if result.preservation.passed else "CHANGED", "")
    table.add_row("all of it", f"{result.seconds:.0f} s", "")
    table.caption = str(report)
    return table
