"""The README.md of a saved model, in the hub's format."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from steermoe_kernels import __version__

from .config import SteerMoEConfig

__all__ = ["model_card"]

_PARTS = {
    "steering vectors": ("steering_vectors",),
    "router": ("router.weight", "router.bias"),
    "layer scales": ("layer_scales",),
    "projection": ("prompt_proj.weight", "prompt_proj.bias"),
}


def model_card(config: SteerMoEConfig, weights: Mapping[str, Tensor]) -> str:
    """What the folder holds, what it was trained for, and how it is used."""
    counts = {part: sum(weights[name].numel() for name in names if name in weights) for part, names in _PARTS.items()}
    layers, experts, width = weights["steering_vectors"].shape
    routing = "dense" if config.top_k is None else f"top {config.top_k}"
    pooling = "none" if config.pool is None else f"{config.pool} of {config.pool_size} frames"
    on_hub = [name for name in (config.audio_model, config.text_model) if name and not os.path.exists(name) and name.count("/") == 1]
    base_models = "".join(f"\n- {name}" for name in on_hub)
    front = "".join(
        f"{line}\n" for line in ("library_name: steermoe", "pipeline_tag: audio-text-to-text", "tags:", "- steermoe", "- audio")
    )
    if on_hub:
        front += f"base_model:{base_models}\n"
    rows = "".join(f"| {part} | {count:,} |\n" for part, count in counts.items())
    return f"""---
{front}---

# SteerMoE aligner

The trained part of a speech language model: after each of the {layers} layers of a frozen audio encoder of width {width}, a router mixes
{experts} steering vectors ({routing} routing) into every frame; the frames are pooled ({pooling}) and projected to the embeddings of a
frozen language model ([arXiv 2510.13558](https://arxiv.org/abs/2510.13558)). The backbones are not in this folder and not changed: they are
loaded from where they are, and their fingerprints are compared.

| | backbone | revision | SHA-256 of its weights |
| --- | --- | --- | --- |
| audio encoder | {_shown(config.audio_model)} | {config.audio_revision or "-"} | `{config.audio_fingerprint}` |
| language model | {_shown(config.text_model)} | {config.text_revision or "-"} | `{config.text_fingerprint}` |

| trained | parameters |
| --- | --- |
{rows}| all | {sum(counts.values()):,} |

```python
from steermoe import SteerMoEForConditionalGeneration, SteerMoEProcessor

model = SteerMoEForConditionalGeneration.from_pretrained("PATH")
processor = SteerMoEProcessor.from_pretrained("PATH")
inputs = processor([{{"role": "user", "content": "{config.audio_token}Transcribe the speech."}}], audio=[samples])
tokens = model.generate(**inputs.to(model.device), max_new_tokens=448)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
```

`samples` are mono float32 at `processor.sampling_rate`. Saved by steermoe {__version__}.
"""


def _shown(name: str | None) -> str:
    """A hub's id as it is; of a folder only its own name, as the card may be published."""
    if name is None:
        return "given as a module"
    return os.path.basename(os.path.normpath(name)) if os.path.exists(name) else name
