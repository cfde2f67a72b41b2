"""transformers' Whisper encoder, steered: outputs, gradients, and everything else that the library lets its users do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate, stack
from encoder_oracle import Results, assert_same, differentiate, draw_aligner, fused_aligner, hooked, shake
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, steer_encoder, unsteer_encoder
from steermoe_kernels import functional as SF

whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")

BINS, POSITIONS, WIDTH, LAYERS, EXPERTS = 6, 20, 30, 3, 5
DRAWS = 16  # one draw's error, of a gradient of few numbers above all, is a matter of luck: two right ways differ by factors of 3


def plain_encoder(**changes: Any) -> nn.Module:
    options: dict[str, Any] = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 40,
        "max_source_positions": POSITIONS,
        "num_mel_bins": BINS,
    }
    torch.manual_seed(0)
    config = whisper.WhisperConfig(**options | changes)
    return shake(whisper.WhisperEncoder(config)).double().eval()


def draw_input(frames: int = 2 * POSITIONS, seed: int = 3) -> Tensor:
    return torch.randn(2, BINS, frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shortened(encoder: nn.Module, frames: int) -> nn.Module:
    """The plain encoder as it would be for inputs of ``frames`` only: what a short input through a steered one must equal."""
    encoder = copy.deepcopy(encoder)
    vars(encoder.config)["max_source_positions"] = frames / 2  # past its check for integers: an odd length ends in half a position
    table = encoder.embed_positions.weight[: (frames + 1) // 2].detach().clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(table, freeze=True)
    return encoder


def pair(encoder: nn.Module, dtype: torch.dtype = torch.float64, *, pool: str | None = None, pool_size: int = 1, **options: Any):
    """A steered copy and the oracle of it, in ``dtype``."""
    backend = options.pop("backend", "auto")
    aligner = draw_aligner(WIDTH, EXPERTS, len(encoder.layers), **options)
    ours = copy.deepcopy(encoder).to(dtype)
    steer_encoder(ours, fused_aligner(aligner, dtype, backend=backend), pool=pool, pool_size=pool_size)
    return ours, hooked(encoder, lambda e: e.layers, aligner, dtype, pool=pool, pool_size=pool_size)


def last(encoder: nn.Module, x: Tensor) -> Results:
    return {"last": encoder(x).last_hidden_state}


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


# --- hooks ------------------------------------------------------------------------------------------------------------------------------


def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5 - 0.25


def write(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(1.5)


def look(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.isfinite().all()


def change_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] + 0.5, *args[1:])


def write_input(module: nn.Module, args: tuple) -> None:
    args[0].mul_(1.5)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("hook", [replace, write, look])
@pytest.mark.parametrize("place", ["layers.1", "layers.2", "layers.1.fc2", "layers.1.self_attn_layer_norm", "layer_norm"])
def test_forward_hooks(place: str, hook: Any, mode: str) -> None:
    ours, oracle = pair(plain_encoder(), pool="mean", pool_size=3)
    for encoder in (ours, oracle):
        encoder.get_submodule(place).register_forward_hook(hook)
    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
        torch.testing.assert_close(last(ours, draw_input())["last"], last(oracle, draw_input())["last"], rtol=1e-10, atol=1e-10)
    if mode != "grad":
        return
    if hook is write and place in ("layers.1", "layers.2"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the pass keeps its output: refused, not wrong
            differentiate(ours, draw_input(), last)
    else:
        assert_same(differentiate(ours, draw_input(), last), differentiate(oracle, draw_input(), last))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("hook", [change_input, write_input])
@pytest.mark.parametrize("place", ["layers.1", "layers.1.self_attn_layer_norm", "layer_norm"])
def test_forward_pre_hooks(place: str, hook: Any, mode: Any) -> None:
    ours, oracle = pair(plain_encoder())
    for encoder in (ours, oracle):
        encoder.get_submodule(place).register_forward_pre_hook(hook)
    with mode():
        torch.testing.assert_close(last(ours, draw_input())["last"], last(oracle, draw_input())["last"], rtol=1e-10, atol=1e-10)


def test_a_stream_that_requires_a_gradient_from_some_layer_on() -> None:
    """Nothing is trained here; who adapts an encoder, or asks what a layer contributes, makes its output a leaf."""
    found = []
    for encoder in pair(plain_encoder()):
        encoder.requires_grad_(False)
        leaves: list[Tensor] = []
        encoder.layers[1].register_forward_hook(lambda module, args, output, leaves=leaves: leaves.append(output.requires_grad_()))
        y = encoder(draw_input()).last_hidden_state
        found.append(dict(zip(("y", "d leaf"), (y.detach(), *torch.autograd.grad(y.square().sum(), leaves)), strict=True)))
    assert_same(*found)


@pytest.mark.parametrize("inference", [False, True])
def test_a_stream_written_to_between_layers_called_by_hand(inference: bool) -> None:
    ours, oracle = pair(plain_encoder())

    def run(encoder: nn.Module) -> Tensor:
        h = torch.linspace(-1, 1, 2 * 7 * WIDTH, dtype=torch.float64).reshape(2, 7, WIDTH)
        for layer in encoder.layers:
            h = layer(h, None)
            h.mul_(2)
        return encoder.layer_norm(h)

    with torch.inference_mode(inference), torch.no_grad():
        torch.testing.assert_close(run(ours), run(oracle), rtol=1e-10, atol=1e-10)


# --- what is computed, and how often ----------------------------------------------------------------------------------------------------


class Calls:
    """Counts the fused passes, and the norms that PyTorch computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steer_norm = self.steer = self.layer_norm = 0
        for module, name in ((SF, "steer_norm"), (SF, "steer"), (F, "layer_norm")):
            monkeypatch.setattr(module, name, self._counting(name, getattr(module, name)))

    def _counting(self, name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return function(*args, **kwargs)

        return counting


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("frames", [2 * POSITIONS, 15])
def test_one_fused_pass_a_layer(monkeypatch: pytest.MonkeyPatch, frames: int, mode: str) -> None:
    ours, _ = pair(plain_encoder(), torch.float32, pool="max", pool_size=4)
    x = draw_input(frames).float()
    calls = Calls(monkeypatch)
    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
        ours(x)
    # What PyTorch still normalises: each layer's second norm, inside the layer, and the first norm of the first layer.
    assert (calls.steer_norm, calls.steer, calls.layer_norm) == (LAYERS, 0, LAYERS + 1)


def test_a_half_stream_is_not_handed_over_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a norm of the encoder's own may answer in another dtype, differently from device to device."""
    ours, _ = pair(plain_encoder(), torch.bfloat16)
    calls = Calls(monkeypatch)
    ours(draw_input().bfloat16())
    assert (calls.steer_norm, calls.steer) == (LAYERS, 0)
    with torch.autocast("cpu", torch.bfloat16):
        ours(draw_input().bfloat16())
    assert (calls.steer_norm, calls.steer) == (LAYERS, LAYERS)


def test_the_stream_is_copied_once_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(plain_encoder(), torch.float32)
    strides = []
    fused = SF.steer_norm
    monkeypatch.setattr(SF, "steer_norm", lambda x, *args, **kw: strides.append((x, kw["residual"])) or fused(x, *args, **kw))
    ours(draw_input().float())
    assert all(x.is_contiguous() and residual.is_contiguous() for x, residual in strides) and len(strides) == LAYERS


def test_parameters_are_cut_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(plain_encoder())
    cut = []
    whole = FusedSteerMoE.layer_parameters
    monkeypatch.setattr(FusedSteerMoE, "layer_parameters", lambda self: cut.append(1) or whole(self))
    monkeypatch.setattr(FusedSteerMoE, "layer", lambda self, layer: pytest.fail("sliced again"))
    ours(draw_input())
    assert len(cut) == 1


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


# --- gradient checkpointing, compilation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, every: int, frozen: bool) -> None:
    encoder = plain_encoder(dropout=0.1).requires_grad_(not frozen).train()
    ours, oracle = pair(encoder)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for index, layer in enumerate(ours.layers):
        layer.gradient_checkpointing = index % every == 0
    kept = []
    ours.layers[0].register_forward_hook(lambda module, args, output: kept.append(getattr(output, "_steered", None)))

    def gradients(encoder: nn.Module) -> Results:
        torch.manual_seed(11)
        y = encoder(draw_input()).last_hidden_state
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        found = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
        return {"last": y.detach()} | found

    results = gradients(ours)
    assert "steering.layer_scales" in results
    assert_same(results, gradients(oracle))
    assert not any(kept)  # what a checkpoint keeps is the stream, and nothing tied to it


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_ones_own_around_layers(reentrant: bool) -> None:
    ours, oracle = pair(plain_encoder())
    found = []
    for encoder in (ours, oracle):
        x = torch.randn(2, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        h = x
        for layer in encoder.layers:
            h = layer(h, None) if encoder is oracle else torch.utils.checkpoint.checkpoint(layer, h, None, use_reentrant=reentrant)
        y = encoder.layer_norm(h)
        y.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}
        found.append({"y": y.detach(), "x": x.grad} | gradients)
    assert_same(*found)


@pytest.mark.unpoisoned
def test_compiled_in_one_graph_at_any_length() -> None:
    ours, oracle = pair(plain_encoder(encoder_layers=2), torch.float32, pool="max", pool_size=3)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        graphs.append(graph)  # here, as dynamo may start over in the line above
        return compiled

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for frames in (11, 2 * POSITIONS, 17):
        x = draw_input(frames).float()
        results = differentiate(ours, x, lambda _, x: last(compiled, x))
        assert_same(results, differentiate(shortened(oracle, frames), x, last), tolerance=1e-4)
    assert len(graphs) == 2  # the full length, and every shorter one
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum("steermoe.steer" in name for name in called) == 2
        assert sum("layer_norm" in name for name in called) == 3


# --- encoders that are not quite the one this path knows --------------------------------------------------------------------------------


class TupleLayer(whisper.WhisperEncoderLayer):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, attention_mask, **kwargs), "more"


class NewNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def new_norm(encoder: nn.Module) -> None:
    norm = NewNorm(WIDTH).double()
    norm.load_state_dict(encoder.layers[1].self_attn_layer_norm.state_dict())
    encoder.layers[1].self_attn_layer_norm = norm


def norm_without_weights(encoder: nn.Module) -> None:
    encoder.layer_norm = nn.LayerNorm(WIDTH, elementwise_affine=False).double()


def wrapped_forward(encoder: nn.Module) -> None:
    plain = encoder.layers[2].forward
    encoder.layers[2].forward = lambda *args, **kwargs: 1.5 * plain(*args, **kwargs)


def shared_norm(encoder: nn.Module) -> None:
    encoder.layers[2].self_attn_layer_norm = encoder.layers[1].self_attn_layer_norm


def subclassed_layer(encoder: nn.Module) -> None:
    class Layer(whisper.WhisperEncoderLayer):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            return super().forward(0.5 * hidden_states, attention_mask, **kwargs)

    encoder.layers[0].__class__ = Layer


@pytest.mark.parametrize("change", [new_norm, norm_without_weights, shared_norm, subclassed_layer])
def test_changed_encoders_are_steered_by_hooks(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = plain_encoder()
    change(encoder)
    ours, oracle = pair(encoder, pool="mean", pool_size=3)
    assert_same(differentiate(ours, draw_input(), last), differentiate(oracle, draw_input(), last))
    calls = Calls(monkeypatch)
    ours(draw_input())
    assert (calls.steer_norm, calls.steer) == (0, LAYERS)


def test_an_encoder_whose_layers_were_wrapped_is_steered_by_hooks() -> None:
    encoder = plain_encoder()
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    oracle = hooked(encoder, lambda e: e.layers, aligner, torch.float64)
    for each in (encoder, oracle):
        wrapped_forward(each)
    steer_encoder(encoder, fused_aligner(aligner, torch.float64))
    assert_same(differentiate(encoder, draw_input(), last), differentiate(oracle, draw_input(), last))


def test_a_layer_that_takes_other_arguments_is_steered_by_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the library that this file does not know."""

    def forward(self: nn.Module, hidden_states: Tensor, attention_mask: Any = None, position_bias: Any = None, **kwargs: Any) -> Tensor:
        return hidden_states

    monkeypatch.setattr(whisper.WhisperEncoderLayer, "forward", forward)
    ours, _ = pair(plain_encoder())
    calls = Calls(monkeypatch)
    ours(draw_input())
    assert (calls.steer_norm, calls.steer) == (0, LAYERS)


def test_layers_that_return_tuples() -> None:
    encoder = plain_encoder()
    for layer in encoder.layers:
        layer.__class__ = TupleLayer
    ours, oracle = pair(encoder)
    h = torch.randn(1, 5, WIDTH, dtype=torch.float64)
    y, more = ours.layers[1](h, None)
    assert more == "more"
    torch.testing.assert_close(y, oracle.layers[1](h, None)[0], rtol=1e-10, atol=1e-10)
