"""The tiny frozen backbones that come with the package: a Whisper-architecture encoder and a Llama-architecture language model.

Both were trained by the scripts in this folder; README.md says on what, for how long, and how good they are.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["encoder_path", "language_model_path"]

_HERE = Path(__file__).parent


def encoder_path() -> Path:
    """The folder of the shipped encoder, for ``AutoModel.from_pretrained``. FileNotFoundError in an install without it."""
    return _shipped("encoder")


def language_model_path() -> Path:
    """The folder of the shipped language model and its tokenizer. FileNotFoundError in an install without it."""
    return _shipped("language_model")


def _shipped(name: str) -> Path:
    folder = _HERE / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors: this install lacks the shipped backbones, or train_{name}.py has not run"
        )
    return folder
