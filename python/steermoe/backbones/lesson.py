"""Training examples of the shipped language model, and their batches: written and spoken contents, an instruction, an answer.

Layout of a sequence, as the chat template has it: `<|user|>` content instruction `<|end|><|assistant|>` answer `<|end|>`, perhaps with a
second instruction and answer. A spoken content is a soft prompt: its place is kept by pad tokens and filled with vectors later.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..demo.phrases import Phrase
from ..label_loss import IGNORED
from . import chat_tasks
from .soft_prompts import frame_weights, letter_rows, soften, sounded_rows, sounds
from .tokenizer import ASSISTANT, END, LETTERS, USER

WRITTEN, BLENDED, CODED_LETTERS, CODED_SOUNDS = "written", "blended", "coded letters", "coded sounds"
"""How a content reaches the model: as tokens, as mixed embeddings, or through a simulated encoder that codes letters or sounds."""


@dataclass
class Example:
    """One sequence: token ids (pads where frames will stand), labels, and the frames' symbol weights (frames, symbols) from position 1."""

    kind: str
    ids: list[int]
    labels: list[int]
    weights: np.ndarray | None = None


@dataclass
class Batch:
    """Examples padded on the right. `frames[kind]` is (rows of the batch, weights (clips, longest, symbols), lengths)."""

    ids: Tensor
    labels: Tensor
    frames: dict[str, tuple[Tensor, Tensor, list[int]]] = field(default_factory=dict)


class Lesson:
    """Draws examples from sentences.

    Args:
        tokenizer: the character tokenizer.
        phrases: sentences to draw from.
        seed: of every draw.
        shares: share of each kind of content.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, phrases: list[Phrase], seed: int, shares: dict[str, float]) -> None:
        self.tokenizer, self.phrases, self.shares = tokenizer, phrases, shares
        self.rng = random.Random(f"lesson-{seed}")
        vocabulary = tokenizer.get_vocab()
        self.token = {character: vocabulary[character] for character in vocabulary}
        self.user, self.assistant, self.end = ([vocabulary[token]] for token in (USER, ASSISTANT, END))

    def encode(self, text: str) -> list[int]:
        return [self.token[character] for character in text]

    def example(self, phrase: Phrase, turns: list[chat_tasks.Turn], kind: str, content: str | None = None) -> Example:
        """A sequence about one phrase. `content` replaces the phrase's text in a written one."""
        rng = self.rng
        weights = None
        if kind == WRITTEN:
            body = self.encode((content or phrase.text) + rng.choice(("\n", "\n", "\n", " ", ". ", ".\n")))
        else:
            if kind == BLENDED:
                rows = letter_rows(phrase.text, rng) if rng.random() < 0.5 else sounded_rows(phrase.text, rng)
                weights = soften(frame_weights(rows, rng), rng)
            elif kind == CODED_LETTERS:
                weights = frame_weights(letter_rows(phrase.text, rng), rng)
            else:
                weights = frame_weights(sounds(phrase.text, rng), rng)
            body = [self.tokenizer.pad_token_id] * len(weights) + self.encode(rng.choice(("", "", "", " ", "\n")))
        ids, labels = [], []
        for turn in turns:
            asked = self.user + body + self.encode(turn.instruction) + self.end + self.assistant
            answer = self.encode(turn.answer) + self.end
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
            body = []
        return Example(kind, ids, labels, weights)

    def draw(self) -> Example:
        """One random example."""
        rng = self.rng
        kind = rng.choices(list(self.shares), list(self.shares.values()))[0]
        phrase = rng.choice(self.phrases)
        if rng.random() < 0.1:  # single words and short pieces, so that spelling and repeating do not need a sentence
            listed = phrase.text.split()
            start = rng.randrange(len(listed))
            phrase = Phrase(" ".join(listed[start : start + rng.randint(1, 3)]))
        if kind == WRITTEN and rng.random() < 0.2:
            # Repeating is of anything written, words that do not exist included.
            text = self.gibberish() if rng.random() < 0.5 else phrase.text
            phrase = Phrase(text)
            return self.example(phrase, [chat_tasks.repeat(phrase, rng)], kind)
        turns = [chat_tasks.sample_turn(phrase, rng)]
        if rng.random() < 0.15:
            turns.append(chat_tasks.sample_turn(phrase, rng))
        return self.example(phrase, turns, kind)

    def gibberish(self) -> str:
        rng = self.rng
        return " ".join("".join(rng.choices(LETTERS + "0123456789'", k=rng.randint(1, 7))) for _ in range(rng.randint(1, 5)))

    def batches(self, tokens: int, pool: int = 12, multiple: int = 16) -> Iterator[Batch]:
        """Batches of about `tokens` positions, padding included, without end: `pool` of them at a time are sorted by length and shuffled.

        Lengths are rounded up to `multiple` and batches are full, so that few shapes occur: matrix libraries
        prepare, and keep, a kernel for each.
        """
        carried: list[Example] = []
        while True:
            by_length: dict[int, list[Example]] = {}
            for example in carried + [self.draw() for _ in range(pool * tokens // 128)]:
                by_length.setdefault(-(-len(example.ids) // multiple) * multiple, []).append(example)
            groups: list[tuple[int, list[Example]]] = []
            carried = []  # what fills no batch at its own length is padded to the next, the longest wait for the next pool
            for length in sorted(by_length):
                examples = carried + by_length[length]
                size = max(1, tokens // length)
                groups.extend((length, examples[start : start + size]) for start in range(0, len(examples) - size + 1, size))
                carried = examples[len(examples) // size * size :]
            self.rng.shuffle(groups)
            for length, group in groups:
                yield collate(group, self.tokenizer.pad_token_id, length)


def collate(examples: list[Example], pad: int, longest: int | None = None) -> Batch:
    """Examples -> Batch, padded to `longest` positions or to the longest of them."""
    longest = longest or max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), IGNORED)
    spoken: dict[str, list[tuple[int, np.ndarray]]] = {}
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
        if example.weights is not None:
            spoken.setdefault(example.kind, []).append((row, example.weights))
    batch = Batch(ids, labels)
    for kind, clips in spoken.items():
        lengths = [len(weights) for _, weights in clips]
        padded = np.zeros((len(clips), max(lengths), clips[0][1].shape[1]), dtype=np.float32)
        padded[:, :, -1] = 1.0
        for clip, (_, weights) in enumerate(clips):
            padded[clip, : len(weights)] = weights
        batch.frames[kind] = (torch.tensor([row for row, _ in clips]), torch.from_numpy(padded), lengths)
    return batch


def token_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The model's table of input embeddings."""
    return cast(nn.Embedding, model.get_input_embeddings())


def place(embedded: Tensor, rows: Tensor, vectors: Tensor, lengths: list[int]) -> Tensor:
    """`embedded` (sequences, positions, width) with clips put into its rows from position 1 on.

    `vectors` (clips, frames, width) holds them padded: of clip i the first `lengths[i]` frames go into row `rows[i]`.
    """
    width = torch.arange(vectors.shape[1])
    inside = width[None, :] < torch.tensor(lengths)[:, None]  # (clips, frames)
    clip, frame = inside.nonzero(as_tuple=True)
    return embedded.index_put((rows[clip], frame + 1), vectors[clip, frame].to(embedded.dtype))
