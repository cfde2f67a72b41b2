"""Trains the tiny speech encoder that the demo steers, from nothing: ``python -m steermoe.backbones.train_encoder --minutes 65``.

A Whisper encoder of two million parameters hears synthesised sentences, random words, digits and made-up words, spoken by many voices, in
espeak-ng's accents and in made-up ones, and distorted as recordings are. Two linear heads read its last hidden states: one names the
phoneme of every 20 ms frame (espeak-ng says when each began, so nothing has to be aligned), one spells by CTC. What both can read, a
projection into a language model can. Voices and sentences of `HELD_OUT_VOICES` and the "heldout" split are for measuring only.

Writes the encoder (float16, transformers' format), the spelling head and training.json with times, versions and error rates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from ..demo.phrases import LEXICON, sentences, split_of
from ..demo.speech import HELD_OUT_VOICES, SAMPLING_RATE, TRAINING_VOICES, Utterance, Voice, augment, utter
from ..label_loss import IGNORED
from .accents import Accent

CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"
PHONEMES = (
    "_", "0", "3", "3:", "A:", "A@", "E", "I", "IR", "O2", "O:", "O@", "OI", "V", "VR", "a", "aU", "aa", "e@", "eI", "i:", "i@", "i@3",
    "o@", "u:", "oU", "@", "@2", "@L", "D", "I2", "N", "R", "S", "T", "U", "U@", "Z", "a#", "aI", "aI2", "aI@", "aU@", "b", "d", "dZ",
    "f", "g", "i", "j", "k", "l", "m", "n", "p", "r", "r-", "s", "t", "tS", "v", "w", "w#", "z", "h", ";", "t2", "t#", "?", "A", "O",
)  # fmt: skip
"""espeak-ng's names less the stress; whatever else it says counts as the first, silence."""

_FRAME = 320  # samples of one encoder frame: 160 a mel frame, and a convolution of stride 2


def build(seed: int) -> WhisperModel:
    """The untrained encoder, in a WhisperModel whose decoder has no layers."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=192,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=768,
        num_mel_bins=80,
        max_source_positions=1500,
        decoder_layers=0,
        decoder_attention_heads=4,
        decoder_ffn_dim=4,
        max_target_positions=1,
        vocab_size=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperModel(config)
    # On clips this short the library's plain attention steps faster on a CPU than the fused kernel, whose backward pass takes a mask badly.
    model.set_attn_implementation("eager")
    return model


class Heads(nn.Module):
    """What reads the hidden states: phonemes from the second layer and the last, spelling from the last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.early_phonemes = nn.Linear(width, len(PHONEMES))
        self.phonemes = nn.Linear(width, len(PHONEMES))
        self.spelling = nn.Linear(width, len(CHARACTERS) + 1)  # the last is CTC's blank


def encode(encoder: Any, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T / 2, D) after the second layer and, normalised, after the last, of mel ``features`` (B, 80, T).

    ``frames`` (B,): encoder frames of each clip; the rest is padding, which nobody attends to.
    """
    x = F.gelu(encoder.conv1(features))
    x = F.gelu(encoder.conv2(x)).mT
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    inside = torch.arange(x.shape[1], device=x.device) < frames[:, None]
    mask = torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype, device=x.device).masked_fill(
        ~inside[:, None, None], torch.finfo(x.dtype).min
    )
    early = x
    for index, layer in enumerate(encoder.layers):
        output = layer(x, mask)
        x = output if isinstance(output, Tensor) else output[0]
        if index == 1:
            early = x
    return early, encoder.layer_norm(x)


# --- clips ------------------------------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """``spelt`` is empty for made-up words: how they are spelt cannot be heard."""

    utterance: Utterance
    spelt: str


class Batch(NamedTuple):
    features: Tensor  # (B, 80, T), zeros behind each clip
    frames: Tensor  # (B,) encoder frames
    phonemes: Tensor  # (B, T / 2), IGNORED behind each clip
    spelt: Tensor  # the characters of all clips, one after another
    lengths: Tensor  # (B,) characters of each


def text(rng: random.Random) -> tuple[str, bool]:
    """Something to say, and whether its spelling can be heard. No sentence of the "heldout" split, not even by chance."""
    while True:
        said, heard = _any_text(rng)
        if len(said.split()) < 3 or split_of(said) == "train":  # single words and pairs are nobody's sentences
            return said, heard


def _any_text(rng: random.Random) -> tuple[str, bool]:
    kind = rng.random()
    if kind < 0.55:
        return next(iter(sentences(rng.getrandbits(40), 1))), True
    if kind < 0.8:
        return " ".join(rng.choices(_words(), k=rng.randint(1, 6))), True
    if kind < 0.9:
        return " ".join(rng.choices(LEXICON["digit"], k=rng.randint(1, 7))), True
    syllables = ["".join((rng.choice(_ONSETS), rng.choice(_NUCLEI), rng.choice(_CODAS))) for _ in range(rng.randint(2, 7))]
    return " ".join("".join(syllables[i : i + 2]) for i in range(0, len(syllables), 2)), False


_ONSETS = (
    *"bcdfghjklmnprstvwyz", "ch", "sh", "th", "br", "cr", "dr", "fr", "gr", "pr", "tr", "st", "sp", "sk", "pl", "bl", "cl", "fl",
    "sl", "sw", "qu",
)  # fmt: skip
_NUCLEI = (*"aeiou", "ai", "ee", "oa", "oo", "ou", "ar", "er", "or", "igh", "oy")
_CODAS = ("", "", "", *"bdgklmnpstz", "ng", "sh", "ch", "th", "ck", "nt", "st", "ld")


def _words() -> list[str]:
    return sorted({word for words in LEXICON.values() for word in words})


def clips(seed: int) -> Iterator[Clip]:
    """Clips without end by voices of training; every sentence is heard from a few voices."""
    rng = random.Random(seed)
    while True:
        said, heard = text(rng)
        for voice in rng.sample(TRAINING_VOICES, 2):
            accent = Accent(rng) if rng.random() < 0.5 else None
            yield Clip(utter(said, voice.varied(rng), accent), said if heard else "")


@dataclass
class Batches(torch.utils.data.IterableDataset):
    """Batches without end: of every clip kept, several distortions, a part of the clips renewed at every batch."""

    seed: int
    size: int
    pool: int = 1500

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        seed = 1000 * self.seed + (info.id if info else 0)
        source, rng, extractor = clips(seed), random.Random(seed), WhisperFeatureExtractor()
        kept = [next(source) for _ in range(self.size)]
        while True:
            kept += [next(source) for _ in range(max(4, self.size // 4))]
            if len(kept) > self.pool:
                kept = rng.sample(kept, self.pool)
            # Neighbours in length, so that little is padding.
            near = sorted(rng.sample(kept, min(len(kept), 4 * self.size)), key=lambda clip: len(clip.utterance.audio))
            at = rng.randrange(len(near) - self.size + 1)
            yield collate(near[at : at + self.size], extractor, rng)


def collate(chosen: list[Clip], extractor: WhisperFeatureExtractor, rng: random.Random | None = None) -> Batch:
    """Features and targets of ``chosen``, distorted anew where ``rng`` is given."""
    mels, labels, spelt = [], [], []
    for clip in chosen:
        audio = clip.utterance.audio
        before = rng.randrange(0, 3200) if rng else 0  # silence before and behind, as recordings have it
        padded = np.pad(audio, (before, rng.randrange(0, 3200) if rng else 0))
        heard = augment(padded, rng) if rng else padded
        frames = -(-len(heard) // _FRAME)
        heard = np.pad(heard, (0, frames * _FRAME - len(heard)))
        mel = extractor(heard, sampling_rate=SAMPLING_RATE, padding="do_not_pad", truncation=False, return_tensors="np").input_features[0]
        mel = torch.from_numpy(np.asarray(mel))
        mels.append(_masked(_stretched(mel, rng), rng) if rng else mel)
        labels.append(_frame_labels(clip.utterance, before, frames))
        spelt.append(torch.tensor([CHARACTERS.index(character) for character in clip.spelt], dtype=torch.long))
    longest = max(mel.shape[1] for mel in mels)
    return Batch(
        torch.stack([F.pad(mel, (0, longest - mel.shape[1])) for mel in mels]),
        torch.tensor([len(label) for label in labels]),
        torch.stack([F.pad(label, (0, longest // 2 - len(label)), value=IGNORED) for label in labels]),
        torch.cat(spelt),
        torch.tensor([len(characters) for characters in spelt]),
    )


def _stretched(mel: Tensor, rng: random.Random) -> Tensor:
    """As from a throat of another length: every frequency a factor higher or lower, the timing kept."""
    if rng.random() < 0.4:
        return mel
    factor = math.exp(rng.uniform(math.log(0.8), math.log(1.35)))
    source = np.clip(np.interp(_MEL_CENTRES / factor, _MEL_CENTRES, np.arange(80)), 0, 79)
    below = torch.from_numpy(np.minimum(source.astype(int), 78))
    above = torch.from_numpy(source).to(mel.dtype)[:, None] - below[:, None]
    return torch.lerp(mel[below], mel[below + 1], above)


_MEL_CENTRES = np.asarray(mel_to_hertz(np.linspace(0, hertz_to_mel(SAMPLING_RATE / 2, "slaney"), 82), "slaney"))[1:-1]  # Hz


def _masked(mel: Tensor, rng: random.Random) -> Tensor:
    """A band and a moment blanked out now and then, so that no single cue is relied on."""
    if rng.random() < 0.4:
        return mel
    mel, floor = mel.clone(), mel.min()
    width, at = rng.randint(2, 10), rng.randrange(70)
    mel[at : at + width] = floor
    width, at = rng.randint(1, 6), rng.randrange(mel.shape[1])
    mel[:, at : at + width] = floor
    return mel


def _frame_labels(utterance: Utterance, before: int, frames: int) -> Tensor:
    """(frames,): the phoneme at the middle of each encoder frame."""
    labels = torch.zeros(frames, dtype=torch.long)
    for name, start in utterance.phonemes:
        plain = name.strip("',|%=")
        at = (before + start * SAMPLING_RATE) / _FRAME
        labels[max(0, round(at)) :] = PHONEMES.index(plain) if plain in PHONEMES else 0
    labels[(before + len(utterance.audio)) // _FRAME :] = 0
    return labels


# --- training ---------------------------------------------------------------------------------------------------------------------------


def loss_of(encoder: Any, heads: Heads, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    early, last = encode(encoder, batch.features, batch.frames)
    named = F.cross_entropy(heads.phonemes(last).float().mT, batch.phonemes, ignore_index=IGNORED)
    early_named = F.cross_entropy(heads.early_phonemes(early).float().mT, batch.phonemes, ignore_index=IGNORED)
    log_probs = heads.spelling(last).float().log_softmax(-1).transpose(0, 1)
    ctc = F.ctc_loss(log_probs, batch.spelt, batch.frames, batch.lengths, blank=len(CHARACTERS), reduction="none", zero_infinity=True)
    heard = batch.lengths > 0
    spelling = (ctc * heard).sum() / batch.lengths.sum().clamp(min=1)
    return named + 0.3 * early_named + 0.7 * spelling, {"phonemes": named.item(), "spelling": spelling.item()}


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    model, began = build(arguments.seed), time.monotonic()
    encoder, heads = model.encoder, Heads(model.config.d_model)
    past: list[dict[str, Any]] = []
    if arguments.start_from:
        load(model, heads, arguments.start_from)
        past = json.loads((arguments.start_from / "training.json").read_text())["stages"]
    parameters = [p for p in [*encoder.parameters(), *heads.parameters()] if p.requires_grad]
    # Muon on the layers' matrices: of two runs from one encoder, the one with AdamW everywhere learnt far less in a hundred steps.
    matrices = [p for p in encoder.layers.parameters() if p.ndim == 2]
    others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=arguments.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )
    loader = iter(torch.utils.data.DataLoader(Batches(arguments.seed, arguments.batch), batch_size=None, num_workers=1, prefetch_factor=8))
    seconds, step, shown = 60 * arguments.minutes, 0, {"phonemes": 0.0, "spelling": 0.0}
    saved = 0.0
    while (spent := time.monotonic() - began) < seconds:
        done = spent / seconds  # the schedule follows the clock: a busy machine takes fewer steps, not longer
        rate = arguments.rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        for optimizer, share in zip(optimizers, (1.0, 2 / 3), strict=True):
            optimizer.param_groups[0]["lr"] = share * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss, parts = loss_of(encoder, heads, next(loader))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for name, value in parts.items():
            shown[name] += 0.02 * (value - shown[name]) if step > 1 else value
        if step % 100 == 0:
            print(f"step {step}  {spent:.0f} s  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()), flush=True)
        if spent - saved > 60 * arguments.save_every:
            saved = spent
            save(model, heads, arguments, [*past, stage(arguments, step, spent)])
    save(model, heads, arguments, [*past, stage(arguments, step, time.monotonic() - began)])


def stage(arguments: argparse.Namespace, steps: int, seconds: float) -> dict[str, Any]:
    """What training.json says of one run of this script."""
    told = {name: getattr(arguments, name) for name in ("seed", "batch", "rate", "threads", "bf16")}
    return {"steps": steps, "seconds": round(seconds), **told}


def load(model: WhisperModel, heads: Heads, folder: Path) -> None:
    """Takes over the encoder and the spelling head that `save` wrote into ``folder``; the heads of phonemes are not kept and start anew."""
    model.load_state_dict(WhisperModel.from_pretrained(folder, dtype=torch.float32).state_dict())
    heads.spelling.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "spelling_head.safetensors").items()})


def save(model: WhisperModel, heads: Heads, arguments: argparse.Namespace, stages: list[dict[str, Any]]) -> None:
    found = measure(model.encoder, heads.spelling)
    print(f"after {stages[-1]['steps']} steps, {stages[-1]['seconds']} s: {found['all']}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(arguments.output, state_dict=weights)
    WhisperFeatureExtractor().save_pretrained(arguments.output)
    head = {name: tensor.detach().half().contiguous() for name, tensor in heads.spelling.state_dict().items()}
    save_file(head, arguments.output / "spelling_head.safetensors")
    account = {
        "stages": stages,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "greedy CTC on held-out voices and sentences": found,
    }
    (arguments.output / "training.json").write_text(json.dumps(account, indent=1) + "\n")


# --- measuring --------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def spell(encoder: Any, spelling: nn.Linear, batch: Batch) -> list[str]:
    """Greedy CTC: the best character of each frame, repeats and blanks taken out."""
    best = spelling(encode(encoder, batch.features, batch.frames)[1]).argmax(-1)
    spelt = []
    for row, frames in zip(best.tolist(), batch.frames.tolist(), strict=True):
        kept = [now for before, now in zip([None, *row[:frames]], row[:frames], strict=False) if now != before]
        spelt.append("".join(CHARACTERS[index] for index in kept if index < len(CHARACTERS)))
    return spelt


def measure(
    encoder: Any, spelling: nn.Linear, voices: tuple[Voice, ...] = HELD_OUT_VOICES, per_voice: int = 12
) -> dict[str, dict[str, float]]:
    """Word and character error rates of greedy CTC, by voice and of all, on sentences and voices nobody trained on."""
    import jiwer

    extractor, found = WhisperFeatureExtractor(), {}
    everything: tuple[list[str], list[str]] = ([], [])
    for index, voice in enumerate(voices):
        said = list(sentences(1000 + index, per_voice, "heldout"))
        spelt = spell(encoder, spelling, collate([Clip(utter(sentence, voice), sentence) for sentence in said], extractor))
        found[str(voice)] = {"wer": round(jiwer.wer(said, spelt), 4), "cer": round(jiwer.cer(said, spelt), 4)}
        everything[0].extend(said)
        everything[1].extend(spelt)
    return found | {"all": {"wer": round(jiwer.wer(*everything), 4), "cer": round(jiwer.cer(*everything), 4)}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's tiny speech encoder on synthesised speech.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "encoder")
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--batch", type=int, default=24, help="clips a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of the layers' matrices")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="go on from an encoder this script saved")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
