"""Tiny random backbones, made offline from seeds and saved as any other checkpoint would be: encoders, language models, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

WIDTH, LAYERS, HEADS, BINS = 32, 3, 4, 16
SECONDS = 2  # the longest input of the Whisper encoders
SAMPLING_RATE = 16000

END, PAD = "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, so any text survives encoding and decoding."""
    specials = (PAD, "<|im_start|>", END)
    vocabulary = {token: index for index, token in enumerate((*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def _language_model(kind: str, config: str | None = None, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        **overrides,
    }
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{config or kind}Config")(**settings))


# model_type -> a function that makes the language model, with random weights.
LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: _language_model("Qwen2"),
    "llama": lambda: _language_model("Llama"),
    "mistral": lambda: _language_model("Mistral", sliding_window=64),
    "gemma": lambda: _language_model("Gemma", head_dim=8),
    "gemma2": lambda: _language_model("Gemma2", head_dim=8, final_logit_softcapping=5.0, sliding_window=64),
    "gemma3": lambda: _language_model("Gemma3", "Gemma3Text", head_dim=8, sliding_window=64),
}


def _whisper_config() -> Any:
    return transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=BINS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=48,
        max_source_positions=SECONDS * 50,
        max_target_positions=32,
        init_std=0.2,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _wav2vec2_settings(norm: str) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 8, 8),
        "conv_stride": (5, 8, 8),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 15,
        "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "conv_bias": norm == "layer",
        "initializer_range": 0.2,
        "vocab_size": 40,
        "layerdrop": 0.0,
    }


def _w2v_bert() -> Any:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        feature_projection_input_dim=2 * BINS,
        conv_depthwise_kernel_size=7,
        vocab_size=40,
        layerdrop=0.0,
    )
    return transformers.Wav2Vec2BertModel(config)


# name -> functions that make the model and its feature extractor.
ENCODERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "whisper": (
        lambda: transformers.WhisperModel(_whisper_config()),
        lambda: WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS),
    ),
    "whisper_generation": (
        lambda: transformers.WhisperForConditionalGeneration(_whisper_config()),
        lambda: WhisperFeatureExtractor(feature_size=BINS, chunk_length=SECONDS),
    ),
    "wav2vec2": (
        lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_wav2vec2_settings("layer"))),
        lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "wav2vec2_group": (
        lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_wav2vec2_settings("group"))),
        lambda: Wav2Vec2FeatureExtractor(return_attention_mask=False),
    ),
    "conformer": (
        lambda: transformers.Wav2Vec2ConformerModel(
            transformers.Wav2Vec2ConformerConfig(**_wav2vec2_settings("layer"), conv_depthwise_kernel_size=7)
        ),
        lambda: Wav2Vec2FeatureExtractor(return_attention_mask=True),
    ),
    "w2v_bert": (_w2v_bert, lambda: SeamlessM4TFeatureExtractor(feature_size=BINS, num_mel_bins=BINS, stride=2)),
}


def save_encoder(folder: Path, kind: str = "whisper", seed: int = 0) -> Path:
    """The encoder of this kind and its feature extractor in ``folder``."""
    make, make_extractor = ENCODERS[kind]
    torch.manual_seed(seed)
    model = make()
    if kind == "w2v_bert":
        _widen(model)
    model.save_pretrained(folder)
    make_extractor().save_pretrained(folder)
    return folder


def save_language_model(folder: Path, kind: str = "qwen2", seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """The language model of this kind and the tokenizer in ``folder``."""
    torch.manual_seed(seed)
    LANGUAGE_MODELS[kind]().save_pretrained(folder)
    build_tokenizer(chat_template).save_pretrained(folder)
    return folder


def _widen(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that rises and falls, mono float32 at 16 kHz: no two pieces of it are alike."""
    count = round(seconds * SAMPLING_RATE)
    rng = np.random.default_rng(seed)
    envelope = 0.6 + 0.4 * np.sin(np.arange(count) * (2 * np.pi / 3000) + seed)
    return (0.1 * rng.standard_normal(count) * envelope).astype(np.float32)
