"""The two backbones, by hub id, path or as modules: loaded as they are stored, fingerprinted, and only then brought to a dtype.

The name "shipped" stands for the small ones inside this package, wherever it is installed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)
from transformers.utils import logging as transformers_logging

from .backbones import encoder_path, language_model_path
from .config import AUDIO_TOKEN
from .fingerprint import Fingerprint

__all__ = [
    "Backbone",
    "BackboneError",
    "load_encoder",
    "load_encoder_config",
    "load_feature_extractor",
    "load_language_model",
    "load_tokenizer",
    "with_audio_token",
]

SHIPPED = "shipped"

# Weights that only training of the encoder itself reads; some checkpoints lack them.
_UNUSED = ("masked_spec_embed",)


class BackboneError(OSError):
    """A backbone, its tokenizer or its feature extractor is not there, or is not what is needed. The message names it."""


@dataclass
class Backbone:
    """A loaded backbone: its ``name`` and ``revision``, None where it has none, and the fingerprint of its weights as they are stored."""

    module: Any
    name: str | None
    revision: str | None
    fingerprint: Fingerprint


def load_encoder(source: Any, *, revision: str | None = None, attn_implementation: str | None = None) -> Backbone:
    """The audio encoder of ``source``: a hub id, a folder, an openai-whisper ``.pt`` file, or a module that is taken as it is.

    Of a model with a decoder, the encoder. BackboneError if it cannot be loaded.
    """
    if isinstance(source, nn.Module):
        return _given(_encoder_of(source), revision)
    name = _located("audio_model", source)
    if name.endswith(".pt"):
        return Backbone(module := _openai_whisper(name), name, None, Fingerprint.of(module))
    model = _load(AutoModel, "audio_model", _audio_place(name), revision, attn_implementation)
    encoder = _encoder_of(model)
    return Backbone(encoder, name, revision or _commit(model), Fingerprint.of(encoder))


def load_language_model(source: Any, *, revision: str | None = None, attn_implementation: str | None = None) -> Backbone:
    """The causal language model of ``source``: a hub id, a folder, or a module that is taken as it is. BackboneError as above."""
    if isinstance(source, nn.Module):
        return _given(source, revision)
    name = _located("text_model", source)
    model = _load(AutoModelForCausalLM, "text_model", _text_place(name), revision, attn_implementation)
    return Backbone(model, name, revision or _commit(model), Fingerprint.of(model))


def load_tokenizer(source: str | os.PathLike[str], *, revision: str | None = None, audio_token: str = AUDIO_TOKEN) -> Any:
    """The tokenizer of ``source``, with ``audio_token`` as one of its special tokens.

    BackboneError if there is none, or if it has no chat template.
    """
    name = _located("text_model", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_text_place(name), revision=revision)
    except Exception as error:  # each tokenizer fails in its own way
        raise BackboneError(f"text_model {name!r} has no tokenizer that can be loaded: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without files, the library makes some kinds of tokenizer up, with nothing in them.
        raise BackboneError(f"text_model {name!r} has no tokenizer that can be loaded: its vocabulary is empty")
    return with_audio_token(tokenizer, audio_token)


def with_audio_token(tokenizer: PreTrainedTokenizerBase, audio_token: str) -> Any:
    """``tokenizer``, checked, with ``audio_token`` added as a special token if it has none of that name. BackboneError as above."""
    if not tokenizer.chat_template:
        raise BackboneError(
            f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template: "
            "use a language model tuned for chats, or set tokenizer.chat_template"
        )
    if len(tokenizer.encode(audio_token, add_special_tokens=False)) != 1 or audio_token not in tokenizer.all_special_tokens:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(audio_token, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def load_feature_extractor(source: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The feature extractor of an audio model. BackboneError if there is none."""
    name = _located("audio_model", source)
    if name.endswith(".pt"):
        return WhisperFeatureExtractor(feature_size=_openai_whisper(name).conv1.in_channels)
    try:
        return AutoFeatureExtractor.from_pretrained(_audio_place(name), revision=revision)
    except Exception as error:
        raise BackboneError(f"audio_model {name!r} has no feature extractor that can be loaded: {first_line(error)}") from error


def load_encoder_config(source: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The config of an audio model, without its weights; of an openai-whisper file, its encoder. BackboneError if there is none."""
    name = _located("audio_model", source)
    if name.endswith(".pt"):
        return _openai_whisper(name)
    try:
        return AutoConfig.from_pretrained(_audio_place(name), revision=revision)
    except Exception as error:
        raise BackboneError(f"audio_model {name!r} has no config that can be loaded: {first_line(error)}") from error


def _located(argument: str, source: str | os.PathLike[str]) -> str:
    """``source`` as it is recorded: a hub's id as given, and what is there as an absolute path, to be found from other folders, too.

    BackboneError for what looks like a path and is not there: a hub would be asked for it, for half a minute where there is none.
    """
    name = os.fspath(source)
    if name == SHIPPED:
        return name
    if os.path.isdir(name) or (name.endswith(".pt") and os.path.isfile(name)):
        return os.path.abspath(name)
    # An id is NAME or OWNER/NAME, and nothing else is one.
    looks_local = name.startswith((".", "/", "~")) or name.endswith(("/", ".pt")) or os.path.isabs(name) or name.count("/") > 1
    if isinstance(source, os.PathLike) or looks_local or "\\" in name:
        raise BackboneError(f"{argument} {name!r} does not exist: give the id of a hub's repository or the path of a folder")
    return name


def _audio_place(name: str) -> str:
    return str(encoder_path()) if name == SHIPPED else name


def _text_place(name: str) -> str:
    return str(language_model_path()) if name == SHIPPED else name


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring the weights of a backbone to ``dtype``, as transformers would have loaded them.

    Not ``module.to(dtype)``, which would also cut down what is computed and not stored, such as the frequencies of rotary embeddings.
    """
    wide = [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        wide += [*(getattr(module, "_keep_in_fp32_modules", None) or ())]
    stored = module.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if any(part in name.split(".") for part in wide) else dtype)


def freeze(module: nn.Module) -> None:
    """Eval mode, and no gradients for any parameter."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def _given(module: nn.Module, revision: str | None) -> Backbone:
    name = getattr(module, "name_or_path", None) or getattr(getattr(module, "config", None), "_name_or_path", None) or None
    if name and os.path.isdir(name):
        name = os.path.abspath(name)
    return Backbone(module, name, revision or _commit(module), Fingerprint.of(module))


def _encoder_of(model: Any) -> Any:
    """The encoder of a model with a decoder, or the model itself. Its name goes along."""
    has_decoder = hasattr(model, "decoder") or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder = model
    if has_decoder and hasattr(model, "get_encoder"):
        encoder = model.get_encoder()
    elif hasattr(model, "dims") and hasattr(model, "encoder"):  # openai-whisper's Whisper
        encoder = model.encoder
    if encoder is not model and not getattr(encoder, "name_or_path", None):
        name = getattr(model, "name_or_path", None)
        if name:
            encoder.name_or_path = name
    return encoder


def _openai_whisper(path: str) -> Any:
    if not os.path.isfile(path):
        raise BackboneError(f"audio_model {path!r} does not exist")
    try:
        import whisper
    except ImportError:
        raise BackboneError(f"audio_model {path!r} is an openai-whisper file: install openai-whisper to load it") from None
    try:
        return _encoder_of(whisper.load_model(path, device="cpu"))
    except Exception as error:
        raise BackboneError(f"audio_model {path!r} is no openai-whisper model: {first_line(error)}") from error


def _load(kind: Any, argument: str, name: str, revision: str | None, attn_implementation: str | None) -> Any:
    settings: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # What is missing is an error here, and the library's own table of it would come first.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, told = kind.from_pretrained(name, revision=revision, dtype="auto", output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BackboneError(f"{argument} {name!r} cannot be loaded: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(key for key in told["missing_keys"] if not key.endswith(_UNUSED))
    missing += sorted(str(key) for key in told.get("mismatched_keys", ()))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BackboneError(f"{argument} {name!r} lacks weights of {type(model).__name__}: {shown}")
    return model


def _commit(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
