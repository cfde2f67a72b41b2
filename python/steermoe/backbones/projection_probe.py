"""How readily a frozen language model lets a linear projection speak to it: the measure that its training is steered by.

A `SimulatedEncoder` codes training sentences as noisy features; its projection alone is trained through the frozen model, as
an aligner's would be, and held-out sentences are then decoded greedily.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import jiwer
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ..demo.phrases import phrases
from .chat_tasks import TRANSCRIBE, Turn
from .lesson import CODED_LETTERS, CODED_SOUNDS, IGNORED, Batch, Lesson, collate, place, token_embeddings
from .soft_prompts import LETTER_BLANK, SOUND_BLANK, SimulatedEncoder


@dataclass
class ProbeCurve:
    """Loss at every step, and word error rate on held-out sentences at some."""

    symbols: str
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    word_error_rates: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    hypotheses: list[str] = field(default_factory=list)


def embed(model: LlamaForCausalLM, encoder: SimulatedEncoder, batch: Batch) -> Tensor:
    embedded = token_embeddings(model)(batch.ids)
    for rows, weights, lengths in batch.frames.values():
        embedded = place(embedded, rows, encoder(weights), lengths)
    return embedded


def probe(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    symbols: str = "letters",
    *,
    steps: int = 250,
    clips: int = 16,
    learning_rate: float = 5e-3,
    noise: float = 0.5,
    measure_at: tuple[int, ...] = (100, 250),
    heldout: int = 48,
    seed: int = 1,
) -> ProbeCurve:
    """Train a projection of simulated features ("letters" or "sounds") through the frozen model: Adam, a warmup of ten steps, a cosine."""
    kind, count = (CODED_LETTERS, LETTER_BLANK + 1) if symbols == "letters" else (CODED_SOUNDS, SOUND_BLANK + 1)
    encoder = SimulatedEncoder(count, model.config.hidden_size, seed, noise=noise)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=min(0.1, 10 / steps))
    train = Lesson(tokenizer, phrases(90_000 + seed, steps * clips), seed, {})
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    curve = ProbeCurve(symbols, learning_rate)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = train.phrases[(step - 1) * clips : step * clips]
        batch = collate(
            [train.example(phrase, [Turn("transcribe", TRANSCRIBE, phrase.text)], kind) for phrase in chosen], tokenizer.pad_token_id
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=embed(model, encoder, batch), use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.losses.append(loss.item())
        if step in measure_at:
            curve.word_error_rates[step], curve.hypotheses = word_error_rate(model, tokenizer, encoder, kind, heldout)
    curve.seconds = time.perf_counter() - started
    for parameter, before in required:
        parameter.requires_grad_(before)
    return curve


@torch.no_grad()
def word_error_rate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, encoder: SimulatedEncoder, kind: str, count: int
) -> tuple[float, list[str]]:
    """Word error rate of greedy decoding of `count` held-out sentences, and what was decoded."""
    lesson = Lesson(tokenizer, phrases(7, count, "heldout"), 7, {})
    examples = [lesson.example(phrase, [Turn("transcribe", TRANSCRIBE, phrase.text)], kind) for phrase in lesson.phrases]
    for example, phrase in zip(examples, lesson.phrases, strict=True):
        example.ids = example.ids[: len(example.ids) - len(phrase.text) - 1]
        example.labels = example.labels[: len(example.ids)]
    batch = collate(examples, tokenizer.pad_token_id)
    embedded = embed(model, encoder, batch)
    texts = generate_padded(model, tokenizer, embedded, [len(example.ids) for example in examples], 60)
    return jiwer.wer([phrase.text for phrase in lesson.phrases], [text or "-" for text in texts]), texts


@torch.no_grad()
def generate_padded(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, embedded: Tensor, lengths: list[int], max_new_tokens: int
) -> list[str]:
    """Greedy answers to prompts given as embeddings (prompts, positions, width), padded on the right to be moved to the left."""
    longest = embedded.shape[1]
    moved = torch.stack([prompt.roll(longest - length, dims=0) for prompt, length in zip(embedded, lengths, strict=True)])
    mask = (torch.arange(longest)[None, :] >= longest - torch.tensor(lengths)[:, None]).long()
    tokens = model.generate(
        inputs_embeds=moved.to(model.dtype),
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)
