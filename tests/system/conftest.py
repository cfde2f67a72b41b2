"""Tiny backbones, saved once a session: everybody reads them, nobody writes to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_backbones


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``encoder_folder(kind)``: a saved encoder of one of `tiny_backbones.ENCODERS`."""
    return cache(lambda kind: tiny_backbones.save_encoder(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def language_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``language_model_folder(kind)``: a saved language model of one of `tiny_backbones.LANGUAGE_MODELS`, with its tokenizer."""
    return cache(lambda kind: tiny_backbones.save_language_model(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="session")
def tiny_encoder(encoder_folder: Callable[[str], Path]) -> Path:
    """The folder of a Whisper encoder of 2 s, 16 mel bins, width 32, 3 layers."""
    return encoder_folder("whisper")


@pytest.fixture(scope="session")
def tiny_language_model(language_model_folder: Callable[[str], Path]) -> Path:
    """The folder of a Qwen2 language model of width 32, 2 layers, and a byte-level tokenizer with a chat template."""
    return language_model_folder("qwen2")
