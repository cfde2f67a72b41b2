"""Generation: every way of transformers' ``generate``, in batches and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
from tiny_models import ALL_CLIPS, ANSWERS, CLIPS, GREEDY, MIXED, build
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor, TextStreamer

from steermoe.data import BadRowLog
from steermoe.generation import Request, respond

Model = tuple[Any, Any]


@pytest.fixture(scope="module")
def made(tiny_encoder: Path, tiny_language_model: Path) -> Model:
    return build(tiny_encoder, tiny_language_model)


def test_greedy_is_the_argmax_step_by_step(made: Model) -> None:
    """Against the model's own forward over the growing text, without any cache."""
    model, processor = made
    batch = dict(processor(MIXED, ALL_CLIPS))
    tokens = model.generate(**batch, **GREEDY)
    ended = torch.zeros(4, dtype=torch.bool)
    for step in range(tokens.shape[1]):
        wanted = model(**batch).logits[:, -1].argmax(-1).masked_fill(ended, 0)
        assert torch.equal(tokens[:, step], wanted)
        ended |= wanted == 2
        batch["input_ids"] = torch.cat([batch["input_ids"], wanted[:, None]], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.0, "num_return_sequences": 2}], ids=str)
def test_beams_in_a_batch_and_alone(how: dict[str, Any], made: Model) -> None:
    model, processor = made
    tokens = model.generate(**processor(MIXED, ALL_CLIPS), **GREEDY, **how)
    each = how.get("num_return_sequences", 1)
    assert len(tokens) == 4 * each
    for index, (chat, clips) in enumerate(zip(MIXED, CLIPS, strict=True)):
        alone = model.generate(**processor(chat, clips), **GREEDY, **how)
        assert torch.equal(tokens[index * each : (index + 1) * each, : alone.shape[1]], alone)


def alone_and_together(made: Model, **how: Any) -> torch.Tensor:
    """The tokens of a batch, each row's being those it gets alone."""
    model, processor = made
    tokens = model.generate(**processor(MIXED, ALL_CLIPS), **how)
    for row, chat, clips in zip(tokens, MIXED, CLIPS, strict=True):
        alone = model.generate(**processor(chat, clips), **how)[0]
        assert torch.equal(row[: len(alone)], alone)
    return tokens


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`:UserWarning")
def test_repetition_is_penalised_in_a_batch_as_alone(beams: int, made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made
    how = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "eos_token_id": 263}
    free = alone_and_together(made, **how)
    tokens = alone_and_together(made, **how, repetition_penalty=50.0)
    assert not torch.equal(tokens, free)
    if beams == 1:
        assert all(len(row.unique()) == 24 for row in tokens) and not all(len(row.unique()) == 24 for row in free)
    config = GenerationConfig(**how, repetition_penalty=50.0)
    assert torch.equal(alone_and_together(made, generation_config=config), tokens) and config.repetition_penalty == 50.0
    # What the language model brings with it, as Qwen2.5's does; what the call says goes before it.
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 50.0)
    assert torch.equal(alone_and_together(made, **how), tokens) and model.generation_config.repetition_penalty == 50.0
    assert torch.equal(alone_and_together(made, generation_config=GenerationConfig(**how)), tokens)
    assert torch.equal(alone_and_together(made, **how, repetition_penalty=1.0), free)
    own = [RepetitionPenaltyLogitsProcessor(1.0), SuppressTokensLogitsProcessor([int(free[0, 0])])]
    tokens = alone_and_together(made, **how, logits_processor=own[1:])
    assert not (tokens == free[0, 0]).any() and (beams > 1 or all(len(row.unique()) == 24 for row in tokens))
    assert torch.equal(alone_and_together(made, **how, logits_processor=own[:1]), free)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_least_length_counts_no_padding(beams: int, made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every token ends a turn, so that a row is about as long as it has to be."""
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    lengths = batch["attention_mask"].sum(1)
    how = {"max_new_tokens": 60, "do_sample": False, "num_beams": beams, "eos_token_id": [2, *range(8, 264)]}
    least = int(lengths.max()) - 2
    tokens = alone_and_together(made, **how, min_length=least)
    assert ((tokens != 0).cumsum(1).argmax(1) + 1 > least - lengths).all()
    monkeypatch.setattr(model.generation_config, "min_length", least)
    assert torch.equal(alone_and_together(made, **how), tokens) and model.generation_config.min_length == least
    assert alone_and_together(made, **how, min_new_tokens=1).shape[1] < 8  # which goes before it


@pytest.mark.parametrize(
    "how",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 50.0},
        {"min_new_tokens": 4, "eos_token_id": [2, *range(8, 264)]},
        {"begin_suppress_tokens": list(range(100))},
        {"forced_eos_token_id": 9},
        {"exponential_decay_length_penalty": (2, 1.5)},
    ],
    ids=lambda how: next(iter(how)),
)
@pytest.mark.filterwarnings("ignore:Passing `:UserWarning")
def test_other_processors_of_logits_in_a_batch_and_alone(how: dict[str, Any], made: Model) -> None:
    alone_and_together(made, **GREEDY | how)


def test_sampling(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, max_new_tokens=6, do_sample=True, temperature=1.5, top_k=50))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_streamer(made: Model, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = made
    batch = processor(MIXED[0], CLIPS[0])
    tokens = model.generate(**batch, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=False))
    assert capsys.readouterr().out.strip("\n") == processor.decode(tokens[0]).strip("\n")


def test_outputs_and_configuration(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    output = model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=3), return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape[1] <= 3 and len(output.scores) == output.sequences.shape[1]
    assert torch.equal(output.sequences, model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert model.generation_config is model.language_model.generation_config and model.can_generate()


def test_the_answer_ends_where_its_turn_does(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    free = model.generate(**batch, max_new_tokens=4, do_sample=False)
    end = int(free[0, 1])
    ended = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=end)
    first = int((free[0] == end).nonzero()[0, 0])
    assert torch.equal(ended[0, : first + 1], free[0, : first + 1]) and (ended[0, first + 1 :] == processor.tokenizer.pad_token_id).all()


def test_training_is_left_as_it_was_and_nothing_has_a_graph(made: Model) -> None:
    model, processor = made
    model.train()
    tokens = model.generate(**processor(MIXED, ALL_CLIPS), **GREEDY)
    model.eval()
    assert torch.equal(tokens, model.generate(**processor(MIXED, ALL_CLIPS), **GREEDY))
    with torch.inference_mode():
        assert torch.equal(tokens, model.generate(**processor(MIXED, ALL_CLIPS), **GREEDY))


def test_padding_on_the_right_is_refused(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    batch.pop("labels")
    with pytest.raises(ValueError, match="attention_mask ends in padding, and generation continues at the end: pad on the left"):
        model.generate(**batch)


def test_padding_is_told_without_a_mask(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    wanted = model.generate(**batch, **GREEDY)
    mask = batch.pop("attention_mask")
    assert not mask.all() and torch.equal(model.generate(**batch, **GREEDY), wanted)
    # The pad token may also end turns, or begin texts that do not all begin with it.
    monkeypatch.setattr(model.generation_config, "bos_token_id", 0)
    assert torch.equal(model.generate(**batch, **GREEDY, eos_token_id=[2, 0]), wanted)
    answered = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    with pytest.raises(ValueError, match="input_ids end in padding, and generation continues at the end: pad on the left"):
        model.generate(**{key: value for key, value in answered.items() if key not in ("labels", "attention_mask")}, **GREEDY)
    texts = torch.tensor([[0, 0, 70, 71], [0, 72, 73, 74]])
    with pytest.raises(ValueError, match="token 0 is both padding and what texts begin with: give attention_mask"):
        model.generate(texts, **GREEDY)
    with pytest.raises(ValueError, match="token 0 is both padding and what texts begin with"):
        model.generate(texts, generation_config=GenerationConfig(max_new_tokens=3))
    alone = model.generate(texts[1:], **GREEDY)
    assert torch.equal(alone, model.generate(texts[1:], torch.ones(1, 4, dtype=torch.long), **GREEDY))
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    assert torch.equal(model.generate(texts, **GREEDY), model.generate(texts, (texts != 0).long(), **GREEDY))


def test_several_rows_without_a_mask_or_a_pad_token_are_refused(made: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = made
    monkeypatch.setattr(model.generation_config, "pad_token_id", None)
    monkeypatch.setattr(model.language_model.config, "pad_token_id", None)
    batch = processor(MIXED, ALL_CLIPS)
    mask = batch.pop("attention_mask")
    with pytest.raises(ValueError, match="attention_mask is missing, and the language model names no pad token: give the processor's"):
        model.generate(**batch, **GREEDY)
    model.generate(**batch, attention_mask=mask, **GREEDY)
    single = processor(MIXED[0], CLIPS[0])
    wanted = model.generate(**single, **GREEDY)
    single.pop("attention_mask")
    assert torch.equal(model.generate(**single, **GREEDY), wanted)


def test_a_request_that_the_processor_refuses_is_named(made: Model, tmp_path: Path) -> None:
    """It gets no response, and the others of its batch do."""
    model, processor = made
    audio = (tiny_backbones.noise(0.5), 16000)
    prompts = ["What?", "x" * 600, "Who?"]
    requests = [Request(index, audio, ((0.0, 0.5),), prompt, f"m:{index}") for index, prompt in enumerate(prompts)]
    log = BadRowLog(tmp_path / "bad_rows.jsonl", limit=1)
    limit = processor.tokenizer.model_max_length
    processor.tokenizer.model_max_length = 512
    try:
        texts = {response.request.key: response.text for response in respond(model, processor, requests, bad_rows=log, max_new_tokens=3)}
        assert set(texts) == {0, 2} and [problem.where for problem in log.errors] == ["m:1"]
        assert log.errors[0].reason.endswith("tokens with its audio, and the language model takes 512")
        with pytest.raises(ValueError, match=r"^m:1: the chat comes to 6"):
            list(respond(model, processor, requests, max_new_tokens=3))
        assert not list(respond(model, processor, requests[1:2], bad_rows=log))
    finally:
        processor.tokenizer.model_max_length = limit
    alone = {response.request.key: response.text for response in respond(model, processor, requests[::2], max_new_tokens=3)}
    assert alone == texts
