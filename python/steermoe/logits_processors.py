"""Processors of logits to which a prompt's padding is nothing: a clip is answered in a batch as alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

__all__ = ["with_unpadded_processors"]


def with_unpadded_processors(settings: dict[str, Any], defaults: Any, attention_mask: Tensor) -> dict[str, Any]:
    """``settings`` of ``generate`` with the penalty on repetition and the least length as processors of logits to which padding is nothing.

    transformers' own take a row's padding for tokens: the penalty passes over as many of the new ones, which are all there are where a
    prompt is given as embeddings, and the least length counts it. ``defaults`` is the language model's generation config.
    """
    config = settings.get("generation_config")

    def setting(name: str) -> Any:
        # In transformers' order: of the call, of the config given with it, of the language model's.
        if name in settings:
            return settings[name]
        of_call = getattr(config, name, None)
        return of_call if of_call is not None else getattr(defaults, name, None)

    given = settings.get("logits_processor") or []
    processors: list[LogitsProcessor] = []
    neutral: dict[str, Any] = {}
    penalty, least, ends = setting("repetition_penalty"), setting("min_length"), setting("eos_token_id")
    # One that is given stands, as in transformers, for the setting.
    if penalty not in (None, 1.0) and not any(isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in given):
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        neutral["repetition_penalty"] = 1.0
    if least and ends is not None and setting("min_new_tokens") is None:
        processors.append(_LeastTokens(least - attention_mask.sum(1), ends))
        neutral["min_length"] = 0
    if not neutral:
        return settings
    settings = {name: value for name, value in settings.items() if name not in neutral}
    if config is None:
        settings |= neutral
    else:
        settings["generation_config"] = copy.deepcopy(config)
        settings["generation_config"].update(**neutral)
    return settings | {"logits_processor": LogitsProcessorList([*processors, *given])}


class _LeastTokens(LogitsProcessor):
    """Keeps each row, or each of its beams, from ending before it has its number ``least`` (B,) of new tokens."""

    def __init__(self, least: Tensor, ends: int | list[int]) -> None:
        self._least = least
        self._ends = ends

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        least = self._least.to(scores.device).repeat_interleave(scores.shape[0] // self._least.shape[0])
        ends = torch.isin(torch.arange(scores.shape[-1], device=scores.device), torch.as_tensor(self._ends, device=scores.device))
        return scores.masked_fill((input_ids.shape[1] < least)[:, None] & ends, -torch.inf)
