"""Real speech: connected digits from recorded single ones, trained on some speakers, measured on one who was held out.

    python examples/train_digits.py RECORDINGS [--held-out yweweler] [--projection-only] [--audio-model shipped] [--text-model shipped]

Needs the extra `system`. RECORDINGS is the folder of the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset):
files DIGIT_SPEAKER_TAKE.wav. Strings of three to six digits are put together from one speaker's takes, with short pauses. The data set's
own split is kept: takes 5 and up are trained on, takes 0 to 4 are not. Three word error rates come out of it: of the training speakers'
takes 0 to 4, by which the best checkpoint is chosen; of the held-out speaker's, chosen by nothing; and the latter before training. They
are printed, and written to scores.json in the output folder. `--audio-model` takes a hub id, a folder or openai-whisper's .pt file,
`--text-model` a hub id or a folder; without them the small backbones inside this package are used.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers

import steermoe_kernels
from steermoe.data import load
from steermoe.evaluation import Evaluation, evaluate
from steermoe.training import build, train
from steermoe.training_config import DataConfig, ModelConfig, TrainingConfig, TrainingSection

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_TAKES = 5  # the data set's own split
DIGITS = (3, 6)
PAUSES = (0.05, 0.25)  # seconds
# The shipped language model was taught to transcribe by this instruction.
PROMPT = "transcribe the audio."
# Speaker -> digit -> take -> file.
Takes = dict[str, dict[int, dict[int, Path]]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        takes = find_takes(options.recordings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    speakers = sorted(takes)
    if options.held_out not in speakers or len(speakers) < 2:
        print(f"error: --held-out must be one of the speakers in {options.recordings}, {', '.join(speakers)}", file=sys.stderr)
        return 1
    began = time.perf_counter()
    heard = [speaker for speaker in speakers if speaker != options.held_out]
    rng = random.Random(options.seed)
    output: Path = options.output
    strings = output / "strings"
    corpora = {
        "train": write_strings(strings / "train", takes, heard, options.strings, rng, test=False),
        "validation": write_strings(strings / "validation", takes, heard, options.test_strings, rng, test=True),
        "held out": write_strings(strings / "held-out", takes, [options.held_out], options.test_strings, rng, test=True),
    }
    config = TrainingConfig(
        ModelConfig(
            options.audio_model,
            options.text_model,
            num_experts=8,
            pool="max",
            pool_size=options.pool_size,
            steering_scale=0.0 if options.projection_only else 0.1,
        ),
        DataConfig(str(corpora["train"]), str(corpora["validation"]), prompt=PROMPT, normalization="basic", max_new_tokens=64),
        TrainingSection(
            str(output / "run"),
            max_steps=options.steps,
            batch_size=options.batch_size,
            # Without steering nothing of it learns: scales of zero, which no gradient moves.
            steering_learning_rate=0.0 if options.projection_only else options.learning_rates[0],
            router_learning_rate=0.0 if options.projection_only else options.learning_rates[1],
            projection_learning_rate=options.learning_rates[2],
            warmup_steps=0.05,
            seed=options.seed,
            logging_steps=10,
            eval_steps=max(1, options.steps // 4),
            save_steps=max(1, options.steps // 4),
        ),
    )
    model, processor = build(config.model, seed=options.seed)
    learning = ("prompt_proj",) if options.projection_only else ("",)
    trained = sum(parameter.numel() for name, parameter in model.trained_parameters().items() if name.startswith(learning))
    print(f"{len(heard)} speakers train {trained:,} parameters: {', '.join(heard)}; held out: {options.held_out}")
    untrained = score(model, processor, corpora["held out"])
    result = train(config, model=model, processor=processor)
    if result.interrupted:
        return 130
    seen, unseen = (score(result.model, processor, corpora[name]) for name in ("validation", "held out"))
    scores = {"held-out speaker, untrained": untrained, "training speakers, new takes": seen, "held-out speaker": unseen}
    for name, evaluation in scores.items():
        report(name, evaluation)
    run = {
        "held_out": options.held_out,
        "steered": not options.projection_only,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }
    run |= {"audio_model": options.audio_model, "text_model": options.text_model, "parameters": trained}
    run |= {"seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    numbers = json.dumps(run | {"wer": {name: errors(evaluation) for name, evaluation in scores.items()}}, indent=1)
    (output / "scores.json").write_text(numbers + "\n", encoding="utf-8")
    for row in unseen.hypotheses[:5]:
        print(f"  said {row.reference!r}, heard {row.hypothesis!r}")
    print(f"checkpoint: {result.checkpoint}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="folder of DIGIT_SPEAKER_TAKE.wav")
    parser.add_argument("--held-out", default="yweweler", help="the speaker to test on")
    parser.add_argument("--audio-model", default="shipped")
    parser.add_argument("--text-model", default="shipped")
    parser.add_argument("--projection-only", action="store_true", help="leave the encoder unsteered, for comparison")
    parser.add_argument("--pool-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rates", type=float, nargs=3, default=(1e-2, 3e-3, 3e-3), metavar=("STEERING", "ROUTER", "PROJECTION"))
    parser.add_argument("--strings", type=int, default=2000, help="digit strings to train on")
    parser.add_argument("--test-strings", type=int, default=100, help="digit strings to score, for each of both scores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    return parser.parse_args(arguments)


def find_takes(folder: Path) -> Takes:
    """Speaker -> digit -> take -> file. ValueError for a folder without any, or a speaker without a take of a digit to train or test on."""
    found: Takes = defaultdict(lambda: defaultdict(dict))
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    for path in sorted(folder.glob("[0-9]_*_*.wav")):
        digit, speaker, take = path.stem.split("_")
        found[speaker][int(digit)][int(take)] = path
    if not found:
        raise ValueError(f"{folder} holds no files named DIGIT_SPEAKER_TAKE.wav")
    for speaker, digits in found.items():
        for value in range(10):
            takes = digits.get(value, {})
            if not any(take < TEST_TAKES for take in takes) or not any(take >= TEST_TAKES for take in takes):
                raise ValueError(f"{folder} has no take of {value} by {speaker} to train or none to test on: both are needed")
    return found


def write_strings(folder: Path, takes: Takes, speakers: Sequence[str], count: int, rng: random.Random, *, test: bool) -> Path:
    """A manifest of ``count`` connected digit strings, each by one of ``speakers``, from the takes to test or to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        speaker = speakers[index % len(speakers)]
        digits = [rng.randrange(10) for _ in range(rng.randint(*DIGITS))]
        parts = []
        rate = 0
        for digit in digits:
            allowed = [path for take, path in takes[speaker][digit].items() if (take < TEST_TAKES) == test]
            samples, rate = soundfile.read(rng.choice(allowed), dtype="float32")
            parts += [samples, np.zeros(round(rng.uniform(*PAUSES) * rate), dtype=np.float32)]
        soundfile.write(folder / f"{index}.wav", np.concatenate(parts), rate)
        rows.append({"audio_filepath": f"{index}.wav", "text": " ".join(WORDS[digit] for digit in digits), "speaker": speaker})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def score(model: object, processor: object, corpus: Path) -> Evaluation:
    # Numbers stay words: the English normaliser would join those of a string to one.
    return evaluate(model, processor, load(corpus), prompt=PROMPT, normalization="basic", batch_size=16, max_new_tokens=64)


def errors(evaluation: Evaluation) -> dict[str, object]:
    assert evaluation.errors is not None
    rate = evaluation.errors.wer
    return {"rate": rate.rate, "interval": rate.interval, "words": rate.reference_length}


def versions() -> dict[str, str]:
    modules = (steermoe_kernels, torch, transformers)
    return {"python": platform.python_version()} | {module.__name__: str(module.__version__) for module in modules}


def report(name: str, evaluation: Evaluation) -> None:
    assert evaluation.errors is not None
    rate = evaluation.errors.wer
    low, high = rate.interval
    print(f"{name:<29} WER {rate.rate:.2%} (95%: {low:.2%} to {high:.2%}; {rate.reference_length} words)")


if __name__ == "__main__":
    sys.exit(main())
