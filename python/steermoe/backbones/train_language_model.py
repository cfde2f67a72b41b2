"""Trains the tiny language model that the demo steers an encoder towards: `python -m steermoe.backbones.train_language_model`.

A Llama of 1.8 million parameters over characters learns from generated sentences (`demo/phrases.py`) to transcribe, repeat, spell, count,
find words and answer. Its contents are written, or spoken: soft prompts as in `soft_prompts.py`. More than half of the spoken ones come
through simulated encoders whose projection is being learned from scratch at that moment and is thrown away after a few hundred steps for
another: so the model has met every stage of an aligner's training, the hopeless beginning included, before it is frozen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ..demo.phrases import phrases
from . import chat_tasks
from .lesson import BLENDED, CODED_LETTERS, CODED_SOUNDS, IGNORED, WRITTEN, Batch, Lesson, place, token_embeddings
from .projection_probe import generate_padded, probe
from .soft_prompts import LETTER_BLANK, SOUND_BLANK, TOKEN_OF, SimulatedEncoder, blank_vector, perturb
from .tokenizer import build_tokenizer

SHARES = {WRITTEN: 0.25, BLENDED: 0.3, CODED_LETTERS: 0.2, CODED_SOUNDS: 0.25}
BEGINNING = {WRITTEN: 0.35, BLENDED: 0.65}
"""Shares of the first twentieth of training: a learner's projection can only follow a model that already reads its own embeddings."""


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The untrained model. Its embeddings start at a scale a freshly initialised projection of normalised features has, 0.5."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # at these lengths matrix products beat the fused attention's backward on a CPU: 1.5x in a step
    nn.init.normal_(token_embeddings(model).weight, std=0.5)
    return model


class Learners:
    """Simulated encoders with a projection in the middle of being learned, one a kind of symbol; replaced after a random lifetime."""

    def __init__(self, feature_dim: int, seed: int) -> None:
        self.feature_dim, self.rng = feature_dim, random.Random(f"learners-{seed}")
        self.symbols = {CODED_LETTERS: LETTER_BLANK + 1, CODED_SOUNDS: SOUND_BLANK + 1}
        self.current: dict[str, tuple[SimulatedEncoder, torch.optim.Optimizer]] = {}
        self.left = dict.fromkeys(self.symbols, 0)
        self.born = 0

    def of(self, kind: str) -> SimulatedEncoder:
        if self.left[kind] == 0:
            rng = self.rng
            encoder = SimulatedEncoder(
                self.symbols[kind],
                self.feature_dim,
                rng.getrandbits(40),
                coarticulation=rng.choice((0.0, 0.2, 0.4, 0.6)),
                noise=rng.choice((0.1, 0.3, 0.5, 0.8)),
            )
            rate = math.exp(rng.uniform(math.log(1e-3), math.log(1e-2)))
            self.current[kind] = (encoder, torch.optim.Adam(encoder.parameters(), lr=rate))
            self.left[kind] = rng.randint(100, 400)
            self.born += 1
        return self.current[kind][0]

    def step(self, kinds: list[str]) -> None:
        for kind in kinds:
            encoder, optimizer = self.current[kind]
            nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.left[kind] -= 1


def embed(model: LlamaForCausalLM, batch: Batch, learners: Learners, rng: random.Random, generator: torch.Generator) -> Tensor:
    """Token embeddings with the soft prompts in their places. (sequences, positions, width)"""
    table = token_embeddings(model).weight
    embedded = nn.functional.embedding(batch.ids, table)
    for kind, (rows, weights, lengths) in batch.frames.items():
        if kind != BLENDED:
            embedded = place(embedded, rows, learners.of(kind)(weights), lengths)
            continue
        rms = float(table.detach().pow(2).mean().sqrt())
        clips = []
        for clip in weights:
            blank = blank_vector(table[TOKEN_OF[" "]], rms, rng, generator)
            clips.append(perturb(clip[:, :-1] @ table + clip[:, -1:] * blank, rms, rng, generator))
        embedded = place(embedded, rows, torch.stack(clips), lengths)
    return embedded


def parameter_groups(model: LlamaForCausalLM, weight_decay: float) -> tuple[list[nn.Parameter], list[dict]]:
    """The layers' matrices, for Muon, and AdamW's groups: the output matrix decayed, embeddings and norms not."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in model.model.parameters() if parameter.ndim == 1] + [token_embeddings(model).weight]
    return matrices, [{"params": list(model.lm_head.parameters()), "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Factor of the peak rate: warmup, then a cosine to 2%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def task_accuracies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int = 64, seed: int = 11) -> dict[str, float]:
    """Share of exactly right greedy answers about `count` written held-out sentences, by task."""
    lesson = Lesson(tokenizer, phrases(seed, count * 3, "heldout"), seed, {})
    rng = random.Random(f"accuracies-{seed}")
    accuracies = {}
    for task in (*chat_tasks.TASKS, chat_tasks.repeat):
        asked = [phrase for phrase in lesson.phrases if phrase.questions or task is not chat_tasks.ask][:count]
        turns = [task(phrase, rng) for phrase in asked]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{phrase.text}\n{turn.instruction}"}], add_generation_prompt=True, return_dict=False
            )
            for phrase, turn in zip(asked, turns, strict=True)
        ]
        batch = torch.full((count, max(map(len, prompts))), tokenizer.pad_token_id)
        for row, prompt in enumerate(prompts):
            batch[row, : len(prompt)] = torch.tensor(prompt)
        answers = generate_padded(model, tokenizer, token_embeddings(model)(batch), [len(prompt) for prompt in prompts], 60)
        name = Counter(turn.task for turn in turns).most_common(1)[0][0]  # a task that does not fit a sentence hands it to another
        accuracies[name] = sum(answer == turn.answer for answer, turn in zip(answers, turns, strict=True)) / count
    return accuracies


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, report: dict) -> None:
    """Write the float16 model, its tokenizer, greedy generation settings and the report of its training."""
    shipped = copy.deepcopy(model).half().eval()
    shipped.config.dtype = torch.float16
    shipped.config._attn_implementation = "sdpa"
    shipped.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shipped.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def train(
    folder: Path,
    *,
    steps: int,
    tokens: int = 6144,
    seed: int = 0,
    learning_rate: float = 2e-3,
    optimizer: str = "muon",
    compiled: bool = True,
    save_every: int = 500,
    resume: bool = False,
) -> dict:
    """Train for `steps` batches of at most `tokens` positions and save into `folder`; returns the report that is saved beside the weights.

    `resume` goes on from what an interrupted run saved in `folder`: the weights and the schedule; the optimizers' moments and the simulated
    encoders begin anew, and so do the draws, from another seed.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    done, seconds_before, losses_before = 0, 0, {}
    if resume:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
        saved = json.loads((folder / "training.json").read_text())
        losses_before, seconds_before = saved["losses"], saved["training_seconds"]
        done = saved["saved_at_step"]
        seed += done  # other draws than those already seen
    generator = torch.Generator().manual_seed(seed)
    rng, learners = random.Random(f"train-{seed}"), Learners(model.config.hidden_size, seed)
    lesson = Lesson(tokenizer, phrases(seed, 60_000), seed, dict(BEGINNING))
    batches = lesson.batches(tokens)
    matrices, others = parameter_groups(model, 0.05)
    optimizers: list[torch.optim.Optimizer]
    if optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98)),
        ]
    else:
        optimizers = [torch.optim.AdamW([*others, {"params": matrices, "weight_decay": 0.05}], lr=learning_rate, betas=(0.9, 0.98))]
    forward = torch.compile(model, dynamic=True) if compiled else model
    report: dict = {
        "machine": f"{processor_name()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": seed - done,
        "steps": steps,
        "tokens_per_step": tokens,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "resumed_at": done or None,
        "losses": losses_before,
    }
    started = time.perf_counter()
    sums: dict[str, list[float]] = {}
    for step in range(done, steps):
        if step >= steps // 20:
            lesson.shares.clear()
            lesson.shares.update(SHARES)
        batch = next(batches)
        factor = schedule(step, steps) * min(1.0, (step - done + 1) / 50)  # moments that begin anew need a warmup
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = learning_rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(inputs_embeds=embed(model, batch, learners, rng, generator), use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2).float(), batch.labels[:, 1:], ignore_index=IGNORED, reduction="none"
        )
        # An answer weighs as the root of its length: by the token, "six" would hardly count beside a sentence.
        lengths = (batch.labels != IGNORED).sum(1)
        weight = lengths.float().rsqrt()
        ((losses.sum(1) * weight).sum() / (lengths * weight).sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad()
        learners.step([kind for kind in batch.frames if kind != BLENDED])
        note_losses(sums, batch, losses.detach())
        if (step + 1) % 100 == 0:
            means = {kind: round(total / count, 4) for kind, (total, count) in sorted(sums.items())}
            report["losses"][str(step + 1)] = means
            sums.clear()
            print(f"step {step + 1}/{steps}  {time.perf_counter() - started:.0f} s  {means}", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            report["training_seconds"] = seconds_before + round(time.perf_counter() - started)
            report["saved_at_step"] = step + 1
            report["simulated_encoders"] = learners.born
            save(model, tokenizer, folder, report)
    return report


def measure(folder: Path) -> dict:
    """Task accuracies and projection probes of a saved model, added to its training.json."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report = json.loads((folder / "training.json").read_text())
    report["task_accuracies"] = task_accuracies(model, tokenizer)
    report["probe"] = {symbols: vars(probe(model, tokenizer, symbols)) for symbols in ("letters", "sounds")}
    for curve in report["probe"].values():
        # Ten steps' mean each: single batches of 16 clips are noisy.
        curve["losses"] = [round(sum(curve["losses"][start : start + 10]) / 10, 3) for start in range(0, len(curve["losses"]), 10)]
        curve["hypotheses"] = curve["hypotheses"][:5]
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def processor_name() -> str:
    """The processor's model name where the system tells it, its architecture elsewhere."""
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", information.read_text()) if information.is_file() else None
    return found.group(1) if found else platform.machine()


def note_losses(sums: dict[str, list[float]], batch: Batch, losses: Tensor) -> None:
    """Add a batch's answer losses to the running (total, count) of each kind of content."""
    kinds = [WRITTEN] * len(batch.ids)
    for kind, (rows, _, _) in batch.frames.items():
        for row in rows.tolist():
            kinds[row] = kind
    per_row, answered = losses.sum(1).tolist(), (batch.labels != IGNORED).sum(1).tolist()
    for kind, total, count in zip(kinds, per_row, answered, strict=True):
        entry = sums.setdefault(kind, [0.0, 0.0])
        entry[0] += total
        entry[1] += count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "language_model")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--tokens", type=int, default=6144, help="positions a batch, padding included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on from what an interrupted run left in the output folder")
    parser.add_argument("--measure-only", action="store_true", help="measure the model in the output folder instead of training one")
    arguments = parser.parse_args()
    if not arguments.measure_only:
        train(
            arguments.output,
            steps=arguments.steps,
            tokens=arguments.tokens,
            seed=arguments.seed,
            learning_rate=arguments.learning_rate,
            optimizer=arguments.optimizer,
            compiled=not arguments.no_compile,
            resume=arguments.resume,
        )
    report = measure(arguments.output)
    print(json.dumps({key: report[key] for key in ("task_accuracies", "probe")}, indent=2))


if __name__ == "__main__":
    main()
