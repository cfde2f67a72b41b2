"""The command line: ``steermoe demo | train | eval | transcribe | ask | verify | inspect | data check``.

What a user can put right is said in one sentence, with exit status 1 (2 for arguments that do not fit); ``STEERMOE_DEBUG=1`` shows where
it came from. Results go to standard output, progress and remarks to standard error.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from .interrupt import INTERRUPTED, leaving_at_once

__all__ = ["app", "main"]

# What is said in one sentence: a user can put it right, or can do nothing about it where a traceback would help. Others are our mistakes.
SAID = (ValueError, TypeError, OSError, RuntimeError, ImportError, ArithmeticError, MemoryError)


# The libraries of the extra `system` that commands import.
EXTRA = ("accelerate", "datasets", "jiwer", "matplotlib", "safetensors", "soundfile", "soxr", "tensorboard", "whisper", "yaml")


class _Commands(TyperGroup):
    """Says that Ctrl-C ended a command, which Typer does not. Training says more itself, and leaves without an exception."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _ERRORS.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


class _Command(TyperCommand):
    """Imports the system, which takes seconds, only now that its arguments are known to fit."""

    def invoke(self, ctx: Any) -> Any:
        with leaving_at_once():
            import steermoe  # noqa: F401
        if not sys.stderr.isatty():
            from transformers.utils import logging

            logging.disable_progress_bar()  # transformers' own, for loading weights
        return super().invoke(ctx)


app = typer.Typer(
    name="steermoe",
    cls=_Commands,
    help="Join a frozen audio encoder to a frozen language model by training a few million parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Corpora.", no_args_is_help=True)
app.add_typer(data_app, name="data")

_ERRORS = Console(stderr=True, highlight=False, soft_wrap=True)

Specification = Annotated[
    str, typer.Argument(help="a manifest, a folder or a data set, as in training; or, with options, '{path: corpus, split: dev}'")
]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", "-c", help="a folder that training saved")]
AudioModel = Annotated[str | None, typer.Option(help="where the audio encoder lies now, if not where the checkpoint says")]
TextModel = Annotated[str | None, typer.Option(help="where the language model lies now, if not where the checkpoint says")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")]
Dtype = Annotated[str | None, typer.Option(help="the backbones' dtype: float32, bfloat16 or float16 (default: as in training)")]
BatchSize = Annotated[int, typer.Option(min=1, help="clips generated at once")]


def main() -> None:
    """The command line. Exits with 0, 1 for an error said in one sentence, 2 for bad arguments, 130 after Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name or text that is not Unicode must not cost the result
    try:
        app()
    except KeyboardInterrupt:  # before or after a command
        _ERRORS.print("interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SAID as error:
        if os.environ.get("STEERMOE_DEBUG"):
            raise
        _ERRORS.print(f"error: {_said(error)}", markup=False)
        sys.exit(1)


def _said(error: BaseException) -> str:
    """The error's words; with the file's name where the operating system raised it, and with what brings a library that is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA:
        return f"{error.name} is not installed, and the extra `system` brings it: pip install 'steermoe-kernels[system]'"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    said = str(error) or type(error).__name__
    # torch puts the whole traceback of a DataLoader's worker before the words of the error there.
    if caught := re.match(r"Caught (\w+) in DataLoader worker process \d+\.\n", said):
        said = re.split(rf"\n(?:\w+\.)*{caught[1]}: ", said)[-1].rstrip()
    return said


@app.command(cls=_Command)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="where the trained aligner and the report go")] = Path("steermoe-demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="time to train, for the steered aligner and the projection alone together")] = 3.0,
    seed: Annotated[int, typer.Option(help="of the aligner's first weights and of what is said")] = 0,
) -> None:
    """Train an aligner on synthesised speech and measure it on voices never heard; no download, about five minutes on two idle cores."""
    from steermoe.demo.demonstration import run

    run(output, minutes=minutes, seed=seed)


@app.command(cls=_Command)
def train(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of one in the package: reference explains every key")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as in training.max_steps=100")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest sound checkpoint of training.output_dir")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="go on from this checkpoint")] = None,
) -> None:
    """Train an aligner as a configuration says; Ctrl-C saves a checkpoint and says how to go on."""
    from steermoe.training import train as run
    from steermoe.training_config import load_config

    result = run(load_config(config, overrides or []), resume=resume_from or (True if resume else None))
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    print(result.checkpoint)


@app.command("eval", cls=_Command)
def evaluate(
    corpus: Specification,
    checkpoint: Checkpoint,
    task: Annotated[str | None, typer.Option(help="transcription or question (default: as the rows tell)")] = None,
    prompt: Annotated[str | None, typer.Option(help="what the user turn says, for rows without a prompt of their own")] = None,
    language: Annotated[str, typer.Option(help="of the texts, for normalisation: en, zh, ... or German, ...")] = "en",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a JSONL file with every hypothesis")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    max_bad_rows: Annotated[int, typer.Option(min=0, help="stop past this many rows that cannot be scored")] = 100,
    batch_size: BatchSize = 8,
    workers: Annotated[int, typer.Option(min=0, help="processes that decode audio")] = 0,
    audio_model: AudioModel = None,
    text_model: TextModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score a whole corpus: word and character error rates with intervals, or exact match for questions, and the real-time factor."""
    from steermoe.data import load
    from steermoe.error_rates import language_code
    from steermoe.evaluation import check_output
    from steermoe.evaluation import evaluate as run

    language_code(language)
    rows = load(_specification(corpus))
    if output is not None:
        check_output(output)
    model, processor = _load(checkpoint, audio_model, text_model, device, dtype)
    result = run(
        model,
        processor,
        rows,
        task=task,
        prompt=prompt,
        language=language,
        batch_size=batch_size,
        num_workers=workers,
        max_bad_rows=max_bad_rows,
        progress=sys.stderr.isatty(),
    )
    try:
        if output is not None:
            result.write_jsonl(output)
    finally:  # a disk that is full by now must not cost the scores
        _show(result.to_dict() if as_json else result)


@app.command(cls=_Command)
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="recordings of any length")],
    checkpoint: Checkpoint,
    form: Annotated[str, typer.Option("--format", "-f", help="text, json (an array for several files) or srt")] = "text",
    output_dir: Annotated[Path | None, typer.Option(help="write FILE.txt, .json or .srt into this folder instead")] = None,
    prompt: Annotated[str | None, typer.Option(help="what the user turn says")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="the longest segment (default: what encoder and language model take)")] = None,
    batch_size: BatchSize = 8,
    audio_model: AudioModel = None,
    text_model: TextModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Transcribe recordings. One that cannot be is named; the others are still transcribed, and the exit status is 1."""
    from steermoe.transcription import longest_piece
    from steermoe.transcription import transcribe as run

    forms: dict[str, tuple[str, Callable[[Any], str]]] = {
        "text": (".txt", lambda transcript: transcript.text + "\n"),
        "json": (".json", lambda transcript: transcript.to_json() + "\n"),
        "srt": (".srt", lambda transcript: transcript.to_srt()),
    }
    if form not in forms:
        raise typer.BadParameter(f"must be text, json or srt, got {form!r}", param_hint="--format")
    if form == "srt" and len(files) > 1 and output_dir is None:
        raise typer.BadParameter("subtitles of several files need a file each: give --output-dir", param_hint="--format")
    ending, written = forms[form]
    targets = None if output_dir is None else _targets(files, output_dir, ending)
    model, processor = _load(checkpoint, audio_model, text_model, device, dtype)
    longest_piece(model, processor, prompt=prompt, max_seconds=max_seconds)  # what no file can have is said once
    failed, listed = False, form == "json" and len(files) > 1 and targets is None
    transcripts: list[dict[str, Any]] = []
    try:
        for index, file in enumerate(files):
            try:
                transcript = run(
                    model, processor, file, prompt=prompt, max_seconds=max_seconds, batch_size=batch_size, progress=sys.stderr.isatty()
                )
                text = written(transcript)
                if targets is not None:
                    targets[index].write_text(text, encoding="utf-8", errors="backslashreplace")
            except SAID as error:
                if os.environ.get("STEERMOE_DEBUG"):
                    raise
                said = _said(error)
                _ERRORS.print(f"error: {said}" if str(file) in said else f"error: {file}: {said}", markup=False)
                failed = True
                continue
            for warning in transcript.warnings:
                _ERRORS.print(f"{file}: {warning}", markup=False)
            if listed:
                transcripts.append(transcript.to_dict())
            elif targets is None:
                print(f"{file}: {text}" if form == "text" and len(files) > 1 else text, end="")
    finally:  # after Ctrl-C, those that are done
        if listed:
            _show(transcripts)
    raise typer.Exit(int(failed))


@app.command(cls=_Command)
def ask(
    file: Annotated[Path, typer.Argument(help="a recording")],
    question: Annotated[str, typer.Argument(help="about it")],
    checkpoint: Checkpoint,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="the longest answer")] = 256,
    audio_model: AudioModel = None,
    text_model: TextModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask a question about a recording."""
    from steermoe.transcription import ask as run

    model, processor = _load(checkpoint, audio_model, text_model, device, dtype)
    print(run(model, processor, file, question, max_new_tokens=max_new_tokens))


@app.command(cls=_Command)
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="a folder that training saved")],
    audio_model: AudioModel = None,
    text_model: TextModel = None,
) -> None:
    """Prove, bit for bit, that the backbones on the disk are those recorded when training began, and that with them the model's text-only
    logits and its encoder without steering give what the untouched backbones give."""
    from steermoe.preservation import verify as run

    result = run(_folder(checkpoint), audio_model=audio_model, text_model=text_model)
    print(result.report())
    raise typer.Exit(0 if result.passed else 1)


@app.command(cls=_Command)
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="a folder that training saved")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a PNG of expert usage and layer scales")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """What an aligner is made of: parameters by part, expert usage in training, layer scales."""
    from steermoe.inspection import inspect as run

    found = run(checkpoint)
    _show(found.to_dict() if as_json else found)
    if output is not None:
        found.draw(output)
        _ERRORS.print(f"wrote {output}", markup=False)


@data_app.command(cls=_Command)
def check(
    corpus: Specification,
    sampling_rate: Annotated[int, typer.Option(min=1, help="Hz that recordings should have at least")] = 16000,
    max_seconds: Annotated[float, typer.Option(help="the encoder's longest input")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
) -> None:
    """List what is wrong with a corpus: unreadable files, empty texts, rates, duplicates, durations. Exit status 1 for errors."""
    from steermoe.data.check import check as run

    report = run(_specification(corpus), sampling_rate=sampling_rate, max_seconds=max_seconds, progress=sys.stderr.isatty())
    _show(report.to_dict() if as_json else report)
    raise typer.Exit(report.exit_status)


def _load(checkpoint: Path, audio_model: str | None, text_model: str | None, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model, ready to generate, and its processor."""
    import torch

    from steermoe.model import SteerMoEForConditionalGeneration
    from steermoe.processor import SteerMoEProcessor
    from steermoe.training_config import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    model = SteerMoEForConditionalGeneration.from_pretrained(
        _folder(checkpoint),
        audio_model=audio_model,
        text_model=text_model,
        dtype=None if dtype is None else getattr(torch, dtype),
        device=_device(device),
    )
    return model.eval(), SteerMoEProcessor.from_pretrained(checkpoint)


def _device(name: str | None) -> str:
    """A device that PyTorch can use here, the GPU for None if there is one. ValueError for another."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise typer.BadParameter(f"must be cpu, cuda or cuda:NUMBER, got {name!r}", param_hint="--device") from None
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        if kind == "cuda" and not torch.backends.cuda.is_built():
            raise ValueError(f"--device {name} cannot be used: this PyTorch ({torch.__version__}) has no CUDA") from None
        raise ValueError(f"--device {name} cannot be used here: {str(error).partition(chr(10))[0]}") from None
    return name


def _targets(files: list[Path], folder: Path, ending: str) -> list[Path]:
    """The file for each of ``files``, in a folder that can be written to. ValueError for two that would be one, OSError for the folder."""
    targets = [folder / (file.stem + ending) for file in files]
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise ValueError(f"{files[targets.index(target)]} and {files[index]} would both be written to {target}: transcribe them apart")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output-dir must be a folder, and {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return targets


def _specification(corpus: str) -> Any:
    """A path, or what a configuration would say of a corpus: a mapping or a list in YAML's short form."""
    if not corpus.startswith(("{", "[")) or Path(corpus).exists():
        return corpus
    import yaml

    try:
        return yaml.safe_load(corpus)
    except yaml.YAMLError as error:
        raise ValueError(f"{corpus} is neither a path nor YAML: {error}") from None


def _folder(checkpoint: Path) -> Path:
    """FileNotFoundError if it is none: a name that is not there would be looked for on a hub, for half a minute where there is none."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint: there is no such folder")
    return checkpoint


def _show(result: Any) -> None:
    """To standard output: a mapping or list as JSON, anything else as rich draws it, as wide as the terminal or, in a pipe, as needed."""
    if isinstance(result, dict | list):
        print(json.dumps(result, ensure_ascii=False, indent=2, default=str))
        return
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(result)
