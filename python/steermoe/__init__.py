"""SteerMoE: a frozen audio encoder joined to a frozen language model by a small trained aligner.

Importing it registers the model with transformers' AutoConfig, AutoModel and AutoProcessor.
"""

from __future__ import annotations

try:
    from transformers import AutoConfig, AutoModel, AutoProcessor
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "steermoe, the system around the kernels, needs transformers and more: pip install 'steermoe-kernels[system]'",
        name=error.name,
    ) from None

from .audio_frames import FrameCounts
from .config import SteerMoEConfig
from .model import SteerMoEForConditionalGeneration, SteerMoEOutput
from .processor import SteerMoEProcessor

__all__ = ["FrameCounts", "SteerMoEConfig", "SteerMoEForConditionalGeneration", "SteerMoEOutput", "SteerMoEProcessor"]

AutoConfig.register(SteerMoEConfig.model_type, SteerMoEConfig, exist_ok=True)
AutoModel.register(SteerMoEConfig, SteerMoEForConditionalGeneration, exist_ok=True)
AutoProcessor.register(SteerMoEConfig, SteerMoEProcessor, exist_ok=True)
