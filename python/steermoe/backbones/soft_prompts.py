"""Soft prompts of the kind a linear projection of speech frames makes, simulated from text.

An aligner hands the language model one vector a 40 ms frame: a character or sound lasts one or two of them, neighbours blend, spaces are
silence or nothing, confusable sounds mix, and everything is noisy, shifted and scaled. Two simulations cover that:

`frame_weights` writes a sentence as frames x symbols (letters as spelled, or sounds as heard), with durations, blends, blanks and spikes;
`perturb` treats the vectors made from it (weights times the model's own embeddings) with noise, offset, scale and a mild rotation.
`SimulatedEncoder` codes the same weights by fixed random vectors through a random non-linear map, as a speech encoder would, and leaves
the way into the embedding space to a projection that has to be learned: the situation the language model will be in, frozen.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from torch import Tensor, nn

from .pronunciation import LETTERS_OF_PHONE, PHONES, phones
from .tokenizer import CHARACTERS, SPECIAL_TOKENS

VOICES = ("en-us", "en-gb-x-rp")
NUM_TOKENS = len(SPECIAL_TOKENS) + len(CHARACTERS)
TOKEN_OF = {character: index + len(SPECIAL_TOKENS) for index, character in enumerate(CHARACTERS)}
LETTER_BLANK = NUM_TOKENS
"""The symbol after the tokens: a frame in which nothing is said."""
SPACE_SOUND, SOUND_BLANK = len(PHONES), len(PHONES) + 1
SOUND_OF = {phone: index for index, phone in enumerate(PHONES)}

CONFUSABLE = (
    "aeiouy",
    "aeu",
    "iey",
    "ou",
    "bp",
    "dt",
    "gk",
    "ckq",
    "kx",
    "fv",
    "szc",
    "sx",
    "mn",
    "jg",
    "jy",
    "wuv",
    "lr",
    "h ",
    "th",
    "td",
    "ao",
)


def _confusions() -> np.ndarray:
    """(tokens + 1, tokens + 1) rows that sum to one: what a letter may be taken for."""
    table = np.zeros((NUM_TOKENS + 1, NUM_TOKENS + 1), dtype=np.float32)
    for group in CONFUSABLE:
        for heard in group:
            for taken in group:
                if heard != taken:
                    table[TOKEN_OF[heard], TOKEN_OF[taken]] += 1
    lonely = table.sum(1) == 0
    table[lonely, LETTER_BLANK] = 1
    return table / table.sum(1, keepdims=True)


CONFUSIONS = _confusions()


def letter_rows(text: str, rng: random.Random) -> np.ndarray:
    """(units, tokens + 1): the text as it is spelled, one unit a letter, with a share of letters dropped, doubled or taken for another."""
    wrong = rng.choice((0.0, 0.0, 0.03, 0.08, 0.15))
    spaces = rng.choice((1.0, 1.0, 0.7, 0.0))
    symbols: list[int] = []
    for character in text:
        symbol = TOKEN_OF[character]
        if character == " ":
            if rng.random() < spaces:
                symbols.append(symbol)
            continue
        if rng.random() < wrong:
            kind = rng.random()
            if kind < 0.4:
                continue
            if kind < 0.8:
                symbol = rng.choices(range(NUM_TOKENS + 1), CONFUSIONS[symbol])[0]
            else:
                symbols.append(symbol)
        symbols.append(symbol)
    return np.eye(NUM_TOKENS + 1, dtype=np.float32)[symbols or [TOKEN_OF[text[0]]]]  # something is heard of every content


def sounded_rows(text: str, rng: random.Random) -> np.ndarray:
    """(units, tokens + 1): the text as it sounds, in letters. A sound of two letters is two units, or one unit that is both at once."""
    voice, merged, spaces = rng.choice(VOICES), rng.choice((0.0, 0.5, 1.0)), rng.choice((1.0, 0.7, 0.0))
    usual = {phone: rng.choice(letters) for phone, letters in LETTERS_OF_PHONE.items()} if rng.random() < 0.7 else None
    rows: list[np.ndarray] = []
    for position, word in enumerate(text.split()):
        if position and rng.random() < spaces:
            rows.append(_row(" "))
        for phone in phones(word, voice):
            letters = usual[phone] if usual else rng.choice(LETTERS_OF_PHONE[phone])
            rows.extend([_row(letters)] if rng.random() < merged else [_row(letter) for letter in letters])
    return np.stack(rows)


def sounds(text: str, rng: random.Random) -> np.ndarray:
    """(units, sounds + 2): the text as sounds of one voice, for an encoder that knows nothing of spelling."""
    voice, spaces = rng.choice(VOICES), rng.choice((1.0, 0.5, 0.0))
    symbols: list[int] = []
    for position, word in enumerate(text.split()):
        if position and rng.random() < spaces:
            symbols.append(SPACE_SOUND)
        symbols.extend(SOUND_OF[phone] for phone in phones(word, voice))
    return np.eye(SOUND_BLANK + 1, dtype=np.float32)[symbols]


def _row(letters: str) -> np.ndarray:
    row = np.zeros(NUM_TOKENS + 1, dtype=np.float32)
    for letter in letters:
        row[TOKEN_OF[letter]] += 1 / len(letters)
    return row


def frame_weights(rows: np.ndarray, rng: random.Random, *, longest: int = 120) -> np.ndarray:
    """(units, symbols) -> (frames, symbols): how much of each symbol every frame holds; the last symbol is blank, rows sum to one.

    A unit lasts 1.0 to 3.2 frames on average, single ones from next to nothing (it then shares a frame with its neighbour) to six. Then,
    each with some probability: spikes (a unit speaks in one of its frames, blank in the others), smearing over neighbours, silence at both
    ends. Frames past `longest` are avoided by speaking faster.
    """
    units, blank = len(rows), rows.shape[1] - 1
    pace = min(rng.uniform(1.0, 3.2), (longest - 24) / max(units, 1))
    noise = np.random.default_rng(rng.getrandbits(32))
    durations = np.clip(pace * noise.lognormal(0.0, rng.uniform(0.05, 0.6), units), 0.15, 6.0)
    durations *= min(1.0, (longest - 24) / float(durations.sum()))
    ends = np.cumsum(durations)
    starts = ends - durations
    frames = max(1, math.ceil(float(ends[-1])))
    clock = np.arange(frames)[:, None]
    overlap = np.clip(np.minimum(ends, clock + 1) - np.maximum(starts, clock), 0.0, None)  # (frames, units)
    overlap[-1] *= 1.0 / max(float(overlap[-1].sum()), 1e-3)
    if rng.random() < 0.35:
        overlap = np.eye(units)[overlap.argmax(1)]  # one unit a frame, as after an argmax: the shortest units are lost
    if rng.random() < 0.45:
        spike = overlap == overlap.max(0, keepdims=True)
        overlap = overlap * np.maximum(spike, rng.choice((0.0, 0.0, 0.2, 0.5)))
    weights = overlap @ rows
    weights[:, blank] += 1.0 - weights.sum(1)
    before, after = (int(rng.choice((0, 1, 2, 4, 8, 12)) * rng.random()) for _ in range(2))
    silence = np.zeros((1, rows.shape[1]), dtype=np.float32)
    silence[0, blank] = 1.0
    weights = np.concatenate([silence.repeat(before, 0), weights, silence.repeat(after, 0)])
    if rng.random() < 0.5:
        side = rng.uniform(0.0, 0.3)
        padded = np.concatenate([weights[:1], weights, weights[-1:]])
        weights = (1 - 2 * side) * weights + side * (padded[:-2] + padded[2:])
    return weights[:longest].astype(np.float32)


def soften(weights: np.ndarray, rng: random.Random) -> np.ndarray:
    """Letter weights (frames, tokens + 1) mixed with what each letter may be taken for, by a share of the clip and of the frame."""
    if rng.random() < 0.4:
        return weights
    noise = np.random.default_rng(rng.getrandbits(32))
    share = rng.uniform(0.0, 0.5) * noise.beta(0.8, 1.2, size=(len(weights), 1)).astype(np.float32)
    return (1 - share) * weights + share * (weights @ CONFUSIONS)


def perturb(vectors: Tensor, embedding_rms: float, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Noise, a common offset, a mild rotation and a scale of 0.3 to 3 on the vectors (frames, width) of one clip.

    Noise and offset are in units of `embedding_rms`, the root mean square of the embeddings' entries.
    """
    frames, width = vectors.shape
    if rng.random() < 0.3:
        turn = torch.randn(width, width, generator=generator) / math.sqrt(2 * width)
        vectors = vectors + rng.uniform(0.0, 0.4) * (vectors @ (turn - turn.T))
    if rng.random() < 0.75:
        vectors = vectors + rng.random() ** 2 * 1.6 * embedding_rms * torch.randn(frames, width, generator=generator)
    if rng.random() < 0.5:
        vectors = vectors + rng.random() ** 2 * 2.0 * embedding_rms * torch.randn(1, width, generator=generator)
    return vectors * (math.exp(rng.uniform(math.log(0.3), math.log(3.0))) if rng.random() < 0.7 else 1.0)


def blank_vector(space: Tensor, embedding_rms: float, rng: random.Random, generator: torch.Generator) -> Tensor:
    """What silence looks like in one clip: nothing, the space's embedding, or a random vector. (width,)"""
    kind = rng.random()
    if kind < 0.3:
        return torch.zeros_like(space)
    if kind < 0.5:
        return space
    return rng.uniform(0.2, 1.5) * embedding_rms * torch.randn(space.shape, generator=generator)


class SimulatedEncoder(nn.Module):
    """A frozen stand-in for a speech encoder: symbol weights in, `feature_dim` features a frame out, and a projection to be learned.

    feature = LayerNorm(W2 tanh(W1 (code[t] + a code'[t-1] + a code''[t+1] + speaker)) + noise), all random and fixed but the speaker and
    the noise, which are drawn for every clip; `prompt_proj`, initialised as `nn.Linear` is, is the only parameter.

    Args:
        num_symbols: letters or sounds, with blank.
        feature_dim: width of features; also of the embeddings.
        seed: of everything random in it.
        coarticulation: a, the neighbours' share.
        noise: standard deviation of the noise, in units of the features' own.
    """

    code: Tensor
    hidden: Tensor
    out: Tensor

    def __init__(self, num_symbols: int, feature_dim: int, seed: int, *, coarticulation: float = 0.3, noise: float = 0.5) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.coarticulation, self.noise = coarticulation, noise
        normal = lambda *size: torch.randn(*size, generator=self.generator)  # noqa: E731
        self.register_buffer("code", normal(3, num_symbols, 64))
        self.register_buffer("hidden", normal(64, 256) / 8)
        self.register_buffer("out", normal(256, feature_dim) / 16)
        self.prompt_proj = nn.Linear(feature_dim, feature_dim)
        with torch.no_grad():
            bound = feature_dim**-0.5
            for parameter in self.prompt_proj.parameters():
                parameter.copy_((torch.rand(parameter.shape, generator=self.generator) * 2 - 1) * bound)

    def features(self, weights: Tensor) -> Tensor:
        """(clips, frames, symbols) -> (clips, frames, feature_dim)."""
        before = torch.cat([weights[:, :1], weights[:, :-1]], dim=1)
        after = torch.cat([weights[:, 1:], weights[:, -1:]], dim=1)
        code = weights @ self.code[0] + self.coarticulation * (before @ self.code[1] + after @ self.code[2])
        code = code + 0.3 * torch.randn(len(weights), 1, code.shape[-1], generator=self.generator)
        features = torch.tanh(code @ self.hidden) @ self.out
        features = nn.functional.layer_norm(features, features.shape[-1:])
        features = features + self.noise * torch.randn(features.shape, generator=self.generator)
        return nn.functional.layer_norm(features, features.shape[-1:])

    def forward(self, weights: Tensor) -> Tensor:
        return self.prompt_proj(self.features(weights))


__all__ = [
    "LETTER_BLANK",
    "SOUND_BLANK",
    "SimulatedEncoder",
    "blank_vector",
    "frame_weights",
    "letter_rows",
    "perturb",
    "soften",
    "sounded_rows",
    "sounds",
]
