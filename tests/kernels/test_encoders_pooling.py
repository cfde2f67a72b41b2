"""Pooling after the last layer of an encoder that is steered by hooks: what it fits, and what it is refused for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_oracle import draw_aligner, fused_aligner
from layered_encoders import (
    ENCODERS,
    EXPERTS,
    LAYERS,
    WIDTH,
    Block,
    Stack,
    conformer_model,
    frames,
    made,
    time_first_encoder,
)
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference, steer_encoder, unsteer_encoder
from steermoe_kernels.encoders import layered


def test_pooling_refuses_a_training_step_that_may_skip_the_last_layer() -> None:
    encoder = conformer_model().train()
    encoder.config.layerdrop = 0.1
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="mean", pool_size=4)
    x = frames(2, 200).float()
    with pytest.raises(RuntimeError, match="set layerdrop to 0"):
        encoder(x)
    assert encoder.eval()(x).last_hidden_state.shape[1] == 3
    encoder.config.layerdrop = 0.0
    assert encoder.train()(x).last_hidden_state.shape[1] == 3


def test_layers_that_take_time_first_are_not_pooled() -> None:
    encoder = made(time_first_encoder)
    names, x = list(encoder.state_dict()), frames(7, 2, WIDTH)
    plain = encoder(x)
    aligner = FusedSteerMoE.for_encoder(encoder)
    with pytest.raises(ValueError, match=r"TransformerEncoder take \(time, batch, width\).* pooling needs \(batch, time, width\)"):
        steer_encoder(encoder, aligner, pool="max", pool_size=4)
    assert list(encoder.state_dict()) == names and torch.equal(encoder(x), plain)
    steer_encoder(encoder, aligner)


class Wrapped(nn.Module):
    """A layer of torch's inside one of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


def test_wrapped_layers_that_take_time_first_are_not_pooled() -> None:
    encoder = Stack(Wrapped(), Wrapped())
    with pytest.raises(ValueError, match=r"Stack take \(time, batch, width\)"):
        steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=4)


class Looped(Stack):
    """Runs each layer twice."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(super().forward(h))


class Widening(Stack):
    """Gives its output the length of its input."""

    def forward(self, h: Tensor) -> Tensor:
        y = super().forward(h)
        return nn.functional.pad(y, (0, 0, 0, h.shape[1] - y.shape[1]))


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Looped, "the last layer has run more than once"), (Widening, "Widening returned 11 frames after its last layer was pooled to 6")],
)
def test_what_pooling_does_not_fit_shows_when_it_runs(kind: type[Stack], said: str) -> None:
    encoder, h = kind(Block(), Block()), frames(2, 11, WIDTH).float()
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=said):
            encoder(h)
    assert encoder.layers[1](encoder.layers[1](h)).shape[1] == 3, "layers that are called by themselves are nobody's pass"
    plain = Stack(Block(), Block())
    steer_encoder(plain, FusedSteerMoE.for_encoder(plain), pool="max", pool_size=2)
    assert plain(h).shape[1] == 6
    assert not unsteer_encoder(encoder)._forward_hooks_always_called
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder))
    assert encoder(h).shape == h.shape


class Returning(Stack):
    """``shape`` says what of its input and its stream it returns."""

    def __init__(self, shape: Any) -> None:
        super().__init__(Block(), Block())
        self.shape = shape

    def forward(self, h: Tensor) -> Any:
        return self.shape(h, super().forward(h))


@pytest.mark.parametrize(
    "shape",
    [
        lambda h, y: (y.transpose(1, 2), torch.tensor([11, 11])),
        lambda h, y: {"features": h, "out": y},
        lambda h, y: torch.cat([y.mean(1, keepdim=True), y], 1),
        lambda h, y: y[:, ::2],
    ],
    ids=["channels first", "input beside it", "a summary in front", "strided"],
)
def test_what_encoders_may_return_beside_or_of_a_pooled_stream(shape: Any) -> None:
    encoder = Returning(shape)
    encoder.register_forward_hook(lambda module, args, output: None)
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=4)
    encoder(frames(2, 11, WIDTH).float())


def test_a_hook_may_give_a_pooled_stream_its_length_back() -> None:
    encoder, h = Stack(Block(), Block()), frames(2, 12, WIDTH).float()
    encoder.register_forward_hook(lambda module, args, output: output.repeat_interleave(4, 1))
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=4)
    assert encoder(h).shape == h.shape


class Transposing(nn.Module):
    """Attention by (T, B, D) inside a layer whose frames are (B, T, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, h: Tensor) -> Tensor:
        h = h.transpose(0, 1)
        return self.inner(h, h, h)[0].transpose(0, 1)


def test_attention_that_transposes_for_itself_is_pooled() -> None:
    encoder = Stack(*(nn.Sequential(nn.LayerNorm(WIDTH), Transposing()) for _ in range(2)))
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=4)
    assert encoder(frames(2, 11, WIDTH).float()).shape == (2, 3, WIDTH)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_ends_early_leaves_the_next_one_alone(error: type[BaseException]) -> None:
    encoder, h = Stack(Block(), Block()), frames(2, 11, WIDTH).float()
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=2)

    def fail(*_: Any) -> None:
        raise error

    failing = encoder.norm.register_forward_pre_hook(fail)
    with pytest.raises(error):
        encoder(h)
    failing.remove()
    if error is not KeyboardInterrupt:  # to which torch gives no hook
        assert layered._passes.get() == ()
    assert encoder(h).shape[1] == 6 and layered._passes.get() == ()


def test_streams_without_clips_are_not_pooled() -> None:
    encoder = Stack(Block(), Block())
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=2)
    with pytest.raises(ValueError, match=r"the last layer's output must be \(batch, time, width\) to be pooled .*\(11, 12\)"):
        encoder(frames(11, WIDTH).float())


def test_a_speech_encoders_own_layerdrop_counts() -> None:
    encoder = Stack(Block(), Block())
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder), pool="max", pool_size=2)
    h = frames(2, 11, WIDTH).float()
    encoder.config = SimpleNamespace(speech_encoder_layerdrop=0.1, encoder_layerdrop=0.0)
    with pytest.raises(RuntimeError, match="set speech_encoder_layerdrop to 0"):
        encoder(h)
    encoder.config = SimpleNamespace(speech_encoder_layerdrop=0.0, encoder_layerdrop=0.1)  # the second is of a text encoder beside it
    assert encoder(h).shape[1] == 6


def test_half_precision_streams_are_pooled_in_float32() -> None:
    encoder = made(ENCODERS["own"][0]).to(torch.bfloat16)
    encoder.norm = nn.Identity()
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    steer_encoder(encoder, fused_aligner(aligner, torch.float32), pool="mean", pool_size=11)
    stream = []
    encoder.layers[2].register_forward_hook(lambda module, args, output: stream.append(args[0]))
    y = encoder(frames(1, 11, WIDTH).bfloat16())
    unpooled = aligner.float()(Block.forward(encoder.layers[2], stream[0]), 2)
    assert torch.equal(y, reference.pool_frames(unpooled.float(), "mean", 11).bfloat16())
