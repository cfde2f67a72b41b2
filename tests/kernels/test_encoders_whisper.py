"""transformers' Whisper encoder, steered: outputs, gradients and gates, for whatever inputs and masks it is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate, stack
from encoder_oracle import Results, assert_same, differentiate, draw_aligner, fused_aligner, hooked, shake
from torch import Tensor, nn
from whisper_encoders import BINS, EXPERTS, LAYERS, POSITIONS, WIDTH, draw_input, last, pair, plain_encoder, shortened, whisper

from steermoe_kernels import FusedSteerMoE, steer_encoder, unsteer_encoder

DRAWS = 16  # one draw's error, of a gradient of few numbers above all, is a matter of luck: two right ways differ by factors of 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"top_k": 2, "renormalize": False},
        {"pool": "max", "pool_size": 3},
        {"pool": "mean", "pool_size": 8},
        {"pool": "max", "pool_size": 100, "top_k": 1},
    ],
    ids=str,
)
def test_outputs_and_every_gradient(options: dict[str, Any], backend: str, device: torch.device) -> None:
    encoder = plain_encoder()
    _, exact = pair(encoder, torch.float64, **options)
    ours, plain = pair(encoder, torch.float32, backend=backend, **options)

    def draws(encoder: nn.Module, dtype: torch.dtype) -> Results:
        encoder.to(device)
        return stack(differentiate(encoder, draw_input(seed=seed).to(device, dtype), last) for seed in range(DRAWS))

    assert_as_accurate(draws(ours, torch.float32), draws(plain, torch.float32), draws(exact, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stream_under_float32_parameters(dtype: torch.dtype) -> None:
    encoder = plain_encoder()
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    exact = hooked(encoder, lambda e: e.layers, aligner, torch.float64)
    plain = hooked(encoder, lambda e: e.layers, aligner, dtype, aligner_dtype=torch.float32)
    ours = steer_encoder(copy.deepcopy(encoder).to(dtype), fused_aligner(aligner, torch.float32))

    def draws(encoder: nn.Module, dtype: torch.dtype) -> Results:
        return stack(differentiate(encoder, draw_input(seed=seed).to(dtype), last) for seed in range(DRAWS))

    results = draws(ours, dtype)
    assert results["last"].dtype == dtype
    assert results["d steering.steering_vectors"].dtype == torch.float32
    assert_as_accurate(results, draws(plain, dtype), draws(exact, torch.float64), dtype)


def test_autocast() -> None:
    encoder = plain_encoder()

    def run(encoder: nn.Module, x: Tensor) -> Results:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            return last(encoder, x)

    _, exact = pair(encoder)
    ours, plain = pair(encoder, torch.float32)

    def draws(encoder: nn.Module, dtype: torch.dtype) -> Results:
        return stack(differentiate(encoder, draw_input(seed=seed).to(dtype), run) for seed in range(DRAWS))

    results, oracles = draws(ours, torch.float32), draws(plain, torch.float32)
    assert results["last"].dtype == oracles["last"].dtype
    assert_as_accurate(results, oracles, draws(exact, torch.float64), torch.bfloat16)


def test_float16_is_clamped_before_it_is_steered() -> None:
    encoder = plain_encoder()
    with torch.no_grad():
        encoder.layers[0].fc2.bias[3] = 40000
        encoder.layers[1].fc2.bias[3] = 40000
    encoder.half()
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float32))
    plain = hooked(encoder, lambda e: e.layers, aligner, torch.float16, aligner_dtype=torch.float32)
    stream = ours(draw_input().half(), output_hidden_states=True).hidden_states[2]
    oracle = plain(draw_input().half(), output_hidden_states=True).hidden_states[2]
    limit = torch.finfo(torch.float16).max - 1000
    assert (oracle[..., 3] - limit).abs().max() < 100
    torch.testing.assert_close(stream, oracle, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_draws_the_same_random_numbers(attention: str) -> None:
    encoder = plain_encoder(dropout=0.2, attention_dropout=0.1, activation_dropout=0.3, attn_implementation=attention).train()
    ours, oracle = pair(encoder)

    def run(encoder: nn.Module, x: Tensor) -> Results:
        torch.manual_seed(5)
        return last(encoder, x)

    assert_same(differentiate(ours, draw_input(), run), differentiate(oracle, draw_input(), run))


@pytest.mark.parametrize("frames", [2 * POSITIONS, 2 * POSITIONS - 7])
def test_layerdrop_skips_the_same_layers(frames: int) -> None:
    encoder = plain_encoder(encoder_layerdrop=0.5, encoder_layers=5, dropout=0.1).train()
    ours, oracle = pair(encoder, pool="mean", pool_size=4)
    oracle = shortened(oracle, frames)
    sizes = set()
    for seed in range(6):
        with ours.steering.record_gates() as gates:
            torch.manual_seed(seed)
            y = ours(draw_input(frames)).last_hidden_state
        torch.manual_seed(seed)
        expected = oracle(draw_input(frames)).last_hidden_state
        if 4 not in gates:  # the oracle pools in the last layer's hook; ours pools whether or not that layer was left out
            continue
        sizes.add(len(gates))
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert len(sizes) > 1


def test_pooling_does_not_depend_on_the_last_layer_running() -> None:
    encoder = plain_encoder(encoder_layerdrop=1.0).train()
    ours, _ = pair(encoder, pool="max", pool_size=6)
    assert ours(draw_input()).last_hidden_state.shape == (2, 4, WIDTH)


@pytest.mark.parametrize("frames", [2 * POSITIONS, 13])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions(frames: int, attention: str) -> None:
    encoder = plain_encoder(attn_implementation=attention)
    ours, oracle = pair(encoder)
    oracle = shortened(oracle, frames)
    attentions = attention == "eager"

    def run(encoder: nn.Module, x: Tensor) -> Results:
        output = encoder(x, output_hidden_states=True, output_attentions=attentions)
        states = {f"state {i}": state for i, state in enumerate(output.hidden_states)}
        weights = {f"attention {i}": weight for i, weight in enumerate(output.attentions or ())} if attentions else {}
        assert len(states) == LAYERS + 1 and len(weights) == (LAYERS if attentions else 0)
        return states | weights | {"last": output.last_hidden_state}

    assert_same(differentiate(ours, draw_input(frames), run), differentiate(oracle, draw_input(frames), run))
    as_tuple = ours(draw_input(frames), output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2 and len(as_tuple[1]) == LAYERS + 1
    for state in as_tuple[1]:
        assert getattr(state, "_steered", None) is None  # a kept state keeps nothing else alive


# --- inputs of any length, masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 13, 2 * POSITIONS - 1])
def test_short_inputs(frames: int) -> None:
    # Releases differ in whether they draw a number for a layer that is never dropped: let it be dropped once in a billion times.
    encoder = plain_encoder(dropout=0.1, encoder_layerdrop=1e-9).train()
    ours, oracle = pair(encoder, pool="max", pool_size=3)

    def run(encoder: nn.Module, x: Tensor) -> Results:
        torch.manual_seed(7)
        return last(encoder, x)

    results = differentiate(ours, draw_input(frames), run)
    oracles = differentiate(shortened(oracle, frames), draw_input(frames), run)
    assert results["last"].shape == (2, -(-((frames + 1) // 2) // 3), WIDTH)
    assert_same(results, oracles)


@pytest.mark.parametrize("pool, pool_size", [(None, 1), ("max", 3), ("mean", 2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("frames", [2 * POSITIONS, 30])
def test_a_clip_among_longer_ones_is_what_it_is_alone(frames: int, attention: str, pool: str | None, pool_size: int) -> None:
    """Outputs, gates and gradients, whatever fills the clips up; alone, a clip needs no mask."""
    encoder, _ = pair(plain_encoder(attn_implementation=attention), pool=pool, pool_size=pool_size)
    lengths = [frames, 12, 24] if pool else [frames, 9, 16]  # whole windows, where there are windows
    clips = [draw_input(length, seed)[:1] for seed, length in enumerate(lengths)]
    together = torch.cat([F.pad(clip, (0, frames - clip.shape[2]), value=1e6) for clip in clips])
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    sizes = [(length + 1) // 2 for length in lengths]
    pooled = [-(-size // pool_size) for size in sizes]
    aligner = encoder.steering

    with aligner.record_gates() as gates:
        out = encoder(together, attention_mask=mask).last_hidden_state
    wanted = [torch.randn(1, size, WIDTH, dtype=torch.float64) for size in pooled]
    sum((out[i : i + 1, :size] * weight).sum() for i, (size, weight) in enumerate(zip(pooled, wanted, strict=True))).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in aligner.named_parameters() if parameter.grad is not None}
    aligner.zero_grad()
    for index, (clip, weight) in enumerate(zip(clips, wanted, strict=True)):
        with aligner.record_gates() as alone:
            single = encoder(clip).last_hidden_state
        torch.testing.assert_close(out[index : index + 1, : pooled[index]], single)
        for layer in range(LAYERS):
            torch.testing.assert_close(gates[layer][index : index + 1, : sizes[index]], alone[layer])
        (single * weight).sum().backward()
    assert len(gradients) > 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, aligner.get_parameter(name).grad)


@pytest.mark.parametrize("frames", [2 * POSITIONS, 30])
def test_a_mask_of_ones_is_none(frames: int) -> None:
    encoder, _ = pair(plain_encoder())
    x = draw_input(frames)
    plain = encoder(x).last_hidden_state
    assert torch.equal(encoder(x, attention_mask=None).last_hidden_state, plain)
    for ones in (torch.ones(2, frames), torch.ones(2, frames, dtype=torch.long), torch.ones(2, frames, dtype=torch.bool)):
        torch.testing.assert_close(encoder(x, ones).last_hidden_state, plain)


@pytest.mark.parametrize("shape", [(2, 2 * POSITIONS - 1), (1, 2 * POSITIONS), (2, 1, 2 * POSITIONS)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    encoder, _ = pair(plain_encoder())
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, frames\), \(2, 40\), got"):
        encoder(draw_input(), attention_mask=torch.ones(shape))


@pytest.mark.parametrize(("given", "said"), [((None,), "input_features .* NoneType"), ((draw_input(), [1, 1]), "attention_mask .* list")])
def test_what_is_no_tensor_is_refused(given: tuple[Any, ...], said: str) -> None:
    encoder, _ = pair(plain_encoder())
    with pytest.raises(TypeError, match=said):
        encoder(*given)


@pytest.mark.parametrize("shape", [(2, BINS, 0), (2, BINS, 2 * POSITIONS + 1), (2, BINS + 1, 2 * POSITIONS), (BINS, 2 * POSITIONS)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    ours, _ = pair(plain_encoder())
    with pytest.raises(ValueError, match="input_features must"):
        ours(torch.zeros(shape, dtype=torch.float64))


# --- gates, one layer alone, a model around it --------------------------------------------------------------------------------------------


def test_gates_are_recorded() -> None:
    ours, _ = pair(plain_encoder(), top_k=2)
    with ours.steering.record_gates() as gates:
        ours(draw_input())
    assert sorted(gates) == list(range(LAYERS))
    for layer_gates in gates.values():
        assert layer_gates.shape == (2, POSITIONS, EXPERTS)
        assert ((layer_gates != 0).sum(-1) == 2).all()
    torch.stack(list(gates.values())).square().sum().backward()
    assert ours.steering.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_are_recorded_with_a_gradient_under_checkpoints_or_not_at_all(reentrant: bool) -> None:
    ours, _ = pair(plain_encoder().train())
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with ours.steering.record_gates() as gates:
        if reentrant:
            with pytest.raises(RuntimeError, match="reentrant checkpoint have no gradient"):
                ours(draw_input())
        else:
            ours(draw_input())
            assert {gate.requires_grad for gate in gates.values()} == {True}
        with torch.no_grad():
            ours(draw_input())
    assert sorted(gates) == list(range(LAYERS)) and not any(gate.requires_grad for gate in gates.values())


def test_one_layer_called_by_itself() -> None:
    ours, oracle = pair(plain_encoder())
    h = torch.randn(2, 7, WIDTH, dtype=torch.float64).transpose(0, 1)
    assert_same(
        differentiate(ours.layers[1], h, lambda layer, h: {"y": layer(h, None)}),
        {k: v for k, v in differentiate(oracle.layers[1], h, lambda layer, h: {"y": layer(h, None)}).items() if "steering" not in k},
    )


def test_inside_a_larger_model() -> None:
    config = whisper.WhisperConfig(
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=POSITIONS,
        num_mel_bins=BINS,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = shake(whisper.WhisperModel(config)).eval()
    x, tokens = draw_input().float(), torch.tensor([[1, 4, 7]] * 2)
    before = model(x, decoder_input_ids=tokens).last_hidden_state
    steer_encoder(model.encoder, FusedSteerMoE.for_encoder(model.encoder, 4, steering_scale=5.0))
    steered = model(x, decoder_input_ids=tokens, output_hidden_states=True)
    assert len(steered.encoder_hidden_states) == 3
    assert (steered.last_hidden_state - before).abs().max() > 1e-3
    assert any(name.startswith("encoder.steering.") for name in model.state_dict())
    unsteer_encoder(model.encoder)
    assert torch.equal(model(x, decoder_input_ids=tokens).last_hidden_state, before)
