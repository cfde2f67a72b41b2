"""openai-whisper's AudioEncoder, steered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate, stack
from encoder_oracle import Results, assert_same, differentiate, draw_aligner, fused_aligner, hooked, shake
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, steer_encoder
from steermoe_kernels import functional as SF

model = pytest.importorskip("whisper.model")

BINS, POSITIONS, WIDTH, LAYERS, EXPERTS = 6, 20, 30, 3, 5
DRAWS = 16  # one draw's error, of a gradient of few numbers above all, is a matter of luck: two right ways differ by factors of 3


def plain_encoder(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return shake(model.AudioEncoder(BINS, POSITIONS, WIDTH, 3, layers)).double().eval()


def in_float64(encoder: nn.Module) -> nn.Module:
    """The library's LayerNorm computes in float32; an exact result needs one that does not."""
    for module in encoder.modules():
        if type(module) is model.LayerNorm:
            module.__class__ = nn.LayerNorm
    return encoder


def draw_input(frames: int = 2 * POSITIONS, seed: int = 3) -> Tensor:
    return torch.randn(2, BINS, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shortened(encoder: nn.Module, frames: int) -> nn.Module:
    encoder = copy.deepcopy(encoder)
    encoder.positional_embedding = encoder.positional_embedding[: (frames + 1) // 2]
    return encoder


def steered(encoder: nn.Module, dtype: torch.dtype, *, pool: str | None = None, pool_size: int = 1, **options: Any) -> nn.Module:
    backend = options.pop("backend", "auto")
    aligner = fused_aligner(draw_aligner(WIDTH, EXPERTS, len(encoder.blocks), **options), dtype, backend=backend)
    return steer_encoder(copy.deepcopy(encoder).to(dtype), aligner, pool=pool, pool_size=pool_size)


def oracle(encoder: nn.Module, dtype: torch.dtype, *, pool: str | None = None, pool_size: int = 1, **options: Any) -> nn.Module:
    aligner = draw_aligner(WIDTH, EXPERTS, len(encoder.blocks), **options)
    return hooked(encoder, lambda e: e.blocks, aligner, dtype, pool=pool, pool_size=pool_size)


def run(encoder: nn.Module, x: Tensor) -> Results:
    return {"last": encoder(x)}


@pytest.mark.parametrize("frames", [2 * POSITIONS, 13])
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "pool": "max", "pool_size": 3}, {"pool": "mean", "pool_size": 8}], ids=str)
def test_outputs_and_every_gradient(options: dict[str, Any], frames: int, backend: str, device: torch.device) -> None:
    encoder = plain_encoder()
    exact = shortened(in_float64(oracle(encoder, torch.float64, **options)), frames)
    plain = shortened(oracle(encoder, torch.float32, **options), frames)
    ours = steered(encoder, torch.float32, backend=backend, **options)

    def draws(encoder: nn.Module, dtype: torch.dtype) -> Results:
        encoder.to(device)
        return stack(differentiate(encoder, draw_input(frames, seed).to(device, dtype), run) for seed in range(DRAWS))

    assert_as_accurate(draws(ours, torch.float32), draws(plain, torch.float32), draws(exact, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_mel_under_float32_weights(dtype: torch.dtype) -> None:
    """As the library runs it: float32 weights, a half-precision spectrogram."""
    encoder = plain_encoder()

    def draws(encoder: nn.Module, dtype: torch.dtype) -> Results:
        return stack(differentiate(encoder, draw_input(seed=seed).to(dtype), run) for seed in range(DRAWS))

    ours, plain = draws(steered(encoder, torch.float32), dtype), draws(oracle(encoder, torch.float32), dtype)
    assert ours["last"].dtype == dtype
    assert_as_accurate(ours, plain, draws(in_float64(oracle(encoder, torch.float64)), torch.float64), dtype)


@pytest.mark.parametrize("frames", [1, 2, 13, 2 * POSITIONS - 1])
def test_short_inputs(frames: int) -> None:
    encoder = plain_encoder()
    # Made exact after it was steered: it is still the library's encoder for whoever steers it.
    ours = differentiate(in_float64(steered(encoder, torch.float64)), draw_input(frames), run)
    assert_same(ours, differentiate(shortened(in_float64(oracle(encoder, torch.float64)), frames), draw_input(frames), run))
    assert ours["last"].shape == (2, (frames + 1) // 2, WIDTH)


@pytest.mark.parametrize("shape", [(2, BINS, 0), (2, BINS, 2 * POSITIONS + 1), (2, BINS + 1, 2 * POSITIONS), (BINS, 2 * POSITIONS)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the mel spectrogram must"):
        steered(plain_encoder(), torch.float32)(torch.zeros(shape))
    with pytest.raises(TypeError, match="the mel spectrogram must be a tensor, got NoneType"):
        steered(plain_encoder(), torch.float32)(None)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_fused_pass_a_layer(monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    ours = steered(plain_encoder(), torch.float32, pool="mean", pool_size=4)
    counts = {"steer_norm": 0, "steer": 0, "layer_norm": 0}

    def counting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counting(SF, "steer_norm")
    counting(SF, "steer")
    counting(F, "layer_norm")
    with mode():
        assert ours(draw_input().float()).shape == (2, 5, WIDTH)
    assert counts == {"steer_norm": LAYERS, "steer": 0, "layer_norm": LAYERS + 1}


@pytest.mark.parametrize("place", ["blocks.1", "blocks.2", "blocks.0.mlp", "ln_post"])
def test_forward_hooks_that_replace_what_they_see(place: str) -> None:
    encoder = plain_encoder()
    ours, plain = steered(encoder, torch.float32), oracle(encoder, torch.float32)
    for each in (ours, plain):
        each.get_submodule(place).register_forward_hook(lambda module, args, output: 1.5 * output - 0.25)
    torch.testing.assert_close(ours(draw_input().float()), plain(draw_input().float()), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(ours(draw_input().float()), plain(draw_input().float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [2 * POSITIONS, 13])
def test_the_gradient_at_what_a_block_returns_is_whole(frames: int) -> None:
    found = []
    for each in (steered(plain_encoder(), torch.float32), shortened(oracle(plain_encoder(), torch.float32), frames)):
        streams: list[Tensor] = []
        for block in each.blocks:
            block.register_forward_hook(lambda module, args, output, streams=streams: streams.append(output))
        y = each(draw_input(frames).float())
        gradients = torch.autograd.grad(y.sin().sum(), streams)
        found.append({f"d stream {layer}": gradient for layer, gradient in enumerate(gradients)})
    assert len(found[0]) == LAYERS
    assert_same(*found, tolerance=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", [lambda y: y.data[:, 3:6].zero_(), lambda y: y.detach().numpy()[:, 3:6].fill(0)], ids=["data", "numpy"])
def test_hooks_that_write_past_autograd(write: Any, mode: Any) -> None:
    found = []
    for each in (steered(plain_encoder(), torch.float32), oracle(plain_encoder(), torch.float32)):
        each.blocks[1].register_forward_hook(lambda module, args, output: (write(output), None)[1])
        with mode():
            found.append(run(each, draw_input().float()))
    assert_same(*found, tolerance=1e-4)


def test_no_norm_is_computed_for_nothing_where_somebody_sees_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = steered(plain_encoder(), torch.float32)
    ours.blocks[0].register_forward_hook(lambda module, args, output: None)
    monkeypatch.setattr(SF, "steer_norm", lambda *_, **__: pytest.fail("the norm was computed beside the stream"))
    ours(draw_input().float())


def test_gates_are_recorded() -> None:
    ours = steered(plain_encoder(), torch.float32)
    with ours.steering.record_gates() as gates:
        ours(draw_input(13).float())
    assert {layer: tuple(g.shape) for layer, g in gates.items()} == dict.fromkeys(range(LAYERS), (2, 7, EXPERTS))


def test_in_the_whole_model_the_tokens_change_with_the_steering() -> None:
    sizes = model.ModelDimensions(BINS, POSITIONS, 24, 2, 2, 50, 12, 24, 2, 1)
    whole = model.Whisper(sizes).eval()
    nn.init.zeros_(whole.decoder.positional_embedding)  # the library leaves it to the checkpoint
    shake(whole)
    x, tokens = draw_input().float(), torch.tensor([[1, 4, 7]] * 2)
    before = whole(x, tokens)
    steer_encoder(whole.encoder, FusedSteerMoE.for_encoder(whole.encoder, 4, steering_scale=5.0))
    assert (whole(x, tokens) - before).abs().max() > 1e-3


def test_without_the_librarys_own_attention_kernel() -> None:
    encoder, x = plain_encoder(), draw_input().float()
    with model.disable_sdpa():
        torch.testing.assert_close(steered(encoder, torch.float32)(x), oracle(encoder, torch.float32)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.unpoisoned
def test_compiled_in_one_graph() -> None:
    encoder, x = plain_encoder(2), draw_input(13).float()
    ours, plain = steered(encoder, torch.float32), shortened(oracle(encoder, torch.float32), 13)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(differentiate(ours, x, lambda _, x: run(compiled, x)), differentiate(plain, x, run), tolerance=1e-4)


def test_changed_blocks_are_steered_by_hooks() -> None:
    encoder = plain_encoder()
    encoder.blocks[1].attn_ln = nn.LayerNorm(WIDTH, elementwise_affine=False).double()
    ours, plain = steered(encoder, torch.float32), oracle(encoder, torch.float32)
    assert type(ours.blocks[0]) is model.ResidualAttentionBlock
    torch.testing.assert_close(ours(draw_input().float()), plain(draw_input().float()), rtol=1e-4, atol=1e-4)
