"""transformers' ``WhisperEncoder``: the fused path, for inputs of any length up to the model's maximum."""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .class_swap import swap
from .steering import Steering
from .stream import (
    EncoderPass,
    Steered,
    SteeredLayer,
    all_distinct,
    begin_pass,
    enter_checkpoints,
    fusible_norm,
    in_rows,
    place_layers,
)

PRIORITY = 10

_MODELING = "transformers.models.whisper.modeling_whisper"


def takes(encoder: Any) -> bool:
    """Exactly transformers' encoder, layers and norms, as this file knows them; anything else is steered by hooks instead."""
    modeling = sys.modules.get(_MODELING)
    if modeling is None or type(encoder) is not modeling.WhisperEncoder or "forward" in encoder.__dict__:
        return False
    layers = list(encoder.layers)
    width = encoder.config.d_model
    norms = [*(layer.self_attn_layer_norm for layer in layers if hasattr(layer, "self_attn_layer_norm")), encoder.layer_norm]
    known = inspect.signature(modeling.WhisperEncoderLayer.forward).parameters.keys() == {
        "self",
        "hidden_states",
        "attention_mask",
        "kwargs",
    }
    return (
        known
        and hasattr(modeling, "capture_outputs")
        and all(type(layer) is modeling.WhisperEncoderLayer and "forward" not in layer.__dict__ for layer in layers)
        and all(fusible_norm(norm, nn.LayerNorm, width) for norm in norms)
        and all_distinct(layers, norms)
    )


def layers(encoder: Any) -> list[nn.Module]:
    return list(encoder.layers)


def steer(encoder: Any, steering: Steering) -> None:
    place_layers(layers(encoder), _norms(encoder), SteeredWhisperLayer, steering)
    swap(encoder, SteeredWhisperEncoder, _steering=steering)


def _norms(encoder: Any) -> list[Any]:
    """The norms that read the stream after each layer."""
    return [*(getattr(layer, "self_attn_layer_norm", None) for layer in list(encoder.layers)[1:]), encoder.layer_norm]


class SteeredWhisperLayer(SteeredLayer):
    """``WhisperEncoderLayer``, steered."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_pass: EncoderPass | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = in_rows(hidden_states)
        x = self.self_attn_layer_norm(residual)
        x, _ = self.self_attn(hidden_states=x, attention_mask=attention_mask, **kwargs)
        x = F.dropout(x, p=self.dropout, training=self.training)
        residual = residual + x
        x = self.final_layer_norm(residual)
        x = self.activation_fn(self.fc1(x))
        x = F.dropout(x, p=self.activation_dropout, training=self.training)
        x = self.fc2(x)
        x = F.dropout(x, p=self.dropout, training=self.training)
        if torch.promote_types(x.dtype, residual.dtype) == torch.float16:
            limit = torch.finfo(torch.float16).max - 1000
            return self.steer(torch.clamp(residual + x, min=-limit, max=limit), None, encoder_pass)
        return self.steer(x, residual, encoder_pass)


class SteeredWhisperEncoder(Steered):
    """``WhisperEncoder``, steered. The library's own forward runs inputs of full length, `_forward_any` shorter and masked ones."""

    _added: ClassVar[tuple[str, ...]] = ("_steering",)
    _forward_any: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        modeling = sys.modules[_MODELING]
        cls._forward_any = modeling.merge_with_config_defaults(modeling.capture_outputs(_forward_any))

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """``input_features`` (B, mel bins, M), with M up to twice ``max_source_positions``. ValueError for any other shape,
        TypeError for what is no tensor.

        ``attention_mask`` (B, M) is true, or 1, on the first frames of each clip and false, or 0, on those that fill it up. The library
        ignores it; here the frames that fill up are attended by nobody and reach no other frame through the convolutions, so that a clip
        gives what it gives alone. What comes out for them is of no meaning; a window of the pool that holds some pools them too, so the
        clips of a batch should fill whole windows.
        """
        longest = self.config.max_source_positions * self.conv1.stride[0] * self.conv2.stride[0]
        for name, given in (("input_features", input_features), ("attention_mask", attention_mask)):
            if not isinstance(given, Tensor) and (given is not None or name == "input_features"):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if input_features.dim() != 3 or input_features.shape[1] != self.num_mel_bins:
            raise ValueError(f"input_features must be (batch, {self.num_mel_bins}, frames), got {tuple(input_features.shape)}")
        if not 1 <= input_features.shape[2] <= longest:
            raise ValueError(f"input_features must have between 1 and {longest} frames, got {input_features.shape[2]}: cut longer audio")
        if attention_mask is not None and attention_mask.shape != (input_features.shape[0], input_features.shape[2]):
            raise ValueError(
                f"attention_mask must be (batch, frames), {(input_features.shape[0], input_features.shape[2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        collected = kwargs.get("output_hidden_states")
        if collected is None:  # some versions of the library take that for the config's word, others for no
            collected = getattr(self.config, "output_hidden_states", False)
        encoder_pass = begin_pass(self, self._steering, layers(self), _norms(self), collected=bool(collected))
        input_features = enter_checkpoints(encoder_pass.aligner, self.layers, input_features)
        if input_features.shape[2] == longest and attention_mask is None:
            return super().forward(input_features, encoder_pass=encoder_pass, **kwargs)
        return self._forward_any(input_features, attention_mask, encoder_pass=encoder_pass, **kwargs)


def _forward_any(self: Any, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The library's forward with the first positions instead of all of them, and with the mask that it lacks."""
    if attention_mask is None:
        x = F.gelu(self.conv1(input_features))
    else:
        # conv1 spreads a clip's last frame one further, where conv2 would see it; a clip by itself has zeros there.
        filling = ~attention_mask.to(device=input_features.device, dtype=torch.bool)
        x = F.gelu(self.conv1(input_features.masked_fill(filling[:, None], 0.0))).masked_fill(filling[:, None], 0.0)
    x = F.gelu(self.conv2(x)).permute(0, 2, 1)
    hidden_states = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))
    hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
    mask = None if attention_mask is None else _layer_mask(self, hidden_states, ~filling)
    for layer in self.layers:
        if self.training and self.layerdrop > 0.0 and torch.rand([]) < self.layerdrop:
            continue
        hidden_states = layer(hidden_states, mask, **kwargs)
    return sys.modules[_MODELING].BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))


def _layer_mask(encoder: Any, hidden_states: Tensor, heard: Tensor) -> Tensor | None:
    """What the attention implementation in use wants, from the mel frames (B, M) to hear. Frame t is centred on mel frame t * stride."""
    from transformers.masking_utils import create_bidirectional_mask

    return create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden_states, attention_mask=heard[:, :: encoder.conv2.stride[0]]
    )
