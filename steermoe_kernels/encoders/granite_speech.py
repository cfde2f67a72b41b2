"""transformers' encoders of Granite Speech: steered by hooks, although they write into what a layer has returned.

Half way up, they add a prediction of the text to the stream, in place. The backward of the steering reads the stream as the layer returned
it, so while gradients are wanted that layer gives the encoder a copy.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from . import layered
from .steering import Steering

PRIORITY = 5

_ENCODERS = {
    "transformers.models.granite_speech.modeling_granite_speech": "GraniteSpeechCTCEncoder",
    "transformers.models.granite_speech_plus.modeling_granite_speech_plus": "GraniteSpeechPlusCTCEncoder",
}


def takes(encoder: nn.Module) -> bool:
    return any(isinstance(encoder, getattr(sys.modules.get(modeling), name, ())) for modeling, name in _ENCODERS.items())


def layers(encoder: nn.Module) -> list[nn.Module]:
    return layered.layers(encoder)


def steer(encoder: Any, steering: Steering) -> None:
    layered.steer(encoder, steering, written=encoder.num_layers // 2 - 1)
