"""transformers' Whisper encoder, steered: which passes run and how often, whatever else works on the encoder.

Hooks, gradient checkpointing and torch.compile are the library's and torch's to use; a changed encoder may not be one that the fused path
knows, and is steered by hooks then.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_oracle import Results, assert_same, differentiate, draw_aligner, fused_aligner, hooked
from torch import Tensor, nn
from whisper_encoders import BINS, EXPERTS, LAYERS, POSITIONS, WIDTH, draw_input, last, pair, plain_encoder, shortened, whisper

from steermoe_kernels import FusedSteerMoE, steer_encoder
from steermoe_kernels import functional as SF

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


# --- what somebody outside sees -----------------------------------------------------------------------------------------------------------


def keep(streams: list[Tensor]) -> Any:
    return lambda module, args, output: streams.append(output)


def on_layers(hook: Any) -> Any:
    """For all modules at once. Such hooks run before a module's own: in the oracle, whose hooks steer, before the steering."""
    return lambda module, args, output: hook(module, args, output) if isinstance(module, whisper.WhisperEncoderLayer) else None


def of_hooks(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(keep(streams)) for layer in encoder.layers]
    y = encoder(x).last_hidden_state
    for hook in hooks:
        hook.remove()
    return y, streams


def of_global_hooks(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    streams: list[Tensor] = []
    hook = nn.modules.module.register_module_forward_hook(on_layers(keep(streams)))
    y = encoder(x).last_hidden_state
    hook.remove()
    return y, streams


def of_norms(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the norms are given is what the layers returned."""
    streams: list[Tensor] = []
    norms = [*(layer.self_attn_layer_norm for layer in encoder.layers[1:]), encoder.layer_norm]
    hooks = [norm.register_forward_pre_hook(lambda module, args: streams.append(args[0])) for norm in norms[:2]]
    hooks.append(norms[2].register_forward_hook(lambda module, args, output: streams.append(args[0])))
    y = encoder(x).last_hidden_state
    for hook in hooks:
        hook.remove()
    return y, streams


def of_hidden_states(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    output = encoder(x, output_hidden_states=True)
    return output.last_hidden_state, list(output.hidden_states[1:-1])


def of_the_config(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    encoder.config.output_hidden_states = True
    output = encoder(x)
    return output.last_hidden_state, list(output.hidden_states[1:-1])


def of_calls_by_hand(encoder: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    streams = [x.mT.repeat(1, 1, WIDTH // BINS)]
    for layer in encoder.layers:
        streams.append(layer(streams[-1], None))
    return encoder.layer_norm(streams[-1]), streams[1:]


@pytest.mark.parametrize("frames", [2 * POSITIONS, 15])
@pytest.mark.parametrize("seen", [of_hooks, of_global_hooks, of_norms, of_hidden_states, of_the_config, of_calls_by_hand])
def test_the_gradient_at_what_a_layer_returns_is_whole(seen: Any, frames: int) -> None:
    ours, oracle = pair(plain_encoder())
    found = []
    for encoder, look in ((ours, seen), (shortened(oracle, frames), of_hooks if seen is of_global_hooks else seen)):
        y, streams = look(encoder, draw_input(frames))
        gradients = torch.autograd.grad(y.sin().sum(), streams)
        assert len(gradients) >= LAYERS - 1  # the last of the hidden states has been normalised
        found.append({f"d stream {layer}": gradient for layer, gradient in enumerate(gradients)})
    assert_same(*found)


def test_the_gradient_at_a_stream_that_is_pooled_next() -> None:
    ours, oracle = pair(plain_encoder(), pool="mean", pool_size=3)
    y, streams = of_hooks(ours, draw_input())
    pooled, (*before, last_pooled) = of_hooks(oracle, draw_input())
    *early, late = torch.autograd.grad(y.sin().sum(), streams)
    *expected, expected_late = torch.autograd.grad(pooled.sin().sum(), [*before, last_pooled])
    spread = expected_late.repeat_interleave(3, 1)[:, :POSITIONS]
    spread = spread / torch.tensor([3.0] * 18 + [2.0] * 2)[:, None]
    assert_same(dict(zip("abc", [*early, late], strict=True)), dict(zip("abc", [*expected, spread], strict=True)))


def test_a_gradient_hook_between_layers() -> None:
    found = []
    for encoder in pair(plain_encoder()):
        encoder.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(torch.zeros_like) and None)
        encoder(draw_input()).last_hidden_state.sin().sum().backward()
        found.append({name: parameter.grad for name, parameter in encoder.steering.named_parameters()})
    assert not found[0]["steering_vectors"][0].any()
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_hidden_states_of_checkpointed_layers(reentrant: bool) -> None:
    found = []
    for encoder in pair(plain_encoder().train()):
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        x = draw_input().requires_grad_()  # without which such a checkpoint gives the oracle's layers no gradient
        output = encoder(x, output_hidden_states=True)
        output.hidden_states[1].retain_grad()
        output.last_hidden_state.sin().sum().backward()
        found.append({"x": x.grad, "d stream": output.hidden_states[1].grad, "d V": encoder.steering.steering_vectors.grad})
    assert_same(*found)


def write_data(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data[:, 3:6] = 0


def write_numpy(module: nn.Module, args: Any, output: Tensor) -> None:
    output.detach().numpy()[:, 3:6] = 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("hook", [write_data, write_numpy])
@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_that_write_past_autograd(everywhere: bool, hook: Any, mode: Any) -> None:
    found = []
    for index, encoder in enumerate(pair(plain_encoder())):
        if everywhere and index == 0:
            hooks = [nn.modules.module.register_module_forward_hook(on_layers(hook))]
        else:
            hooks = [layer.register_forward_hook(hook) for layer in encoder.layers]
        with mode():
            found.append(last(encoder, draw_input()))
        for each in hooks:
            each.remove()
    assert_same(*found)


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


def a_hook(encoder: nn.Module) -> dict[str, Any]:
    encoder.layers[1].register_forward_hook(look)
    return {}


def a_pre_hook(encoder: nn.Module) -> dict[str, Any]:
    encoder.layers[1].register_forward_pre_hook(lambda module, args: None)
    return {}


def a_backward_hook(encoder: nn.Module) -> dict[str, Any]:
    encoder.layers[1].register_full_backward_hook(lambda *_: None)
    return {}


def a_hook_on_a_norm(encoder: nn.Module) -> dict[str, Any]:
    encoder.layer_norm.register_forward_hook(look)
    return {}


def hidden_states(encoder: nn.Module) -> dict[str, Any]:
    return {"output_hidden_states": True}


def another_norm(encoder: nn.Module) -> dict[str, Any]:
    encoder.layers[1].self_attn_layer_norm = nn.LayerNorm(WIDTH)
    return {}


def a_wrapped_forward(encoder: nn.Module) -> dict[str, Any]:
    forward = encoder.layers[1].forward
    encoder.layers[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return {}


def a_wrapped_layer(encoder: nn.Module) -> dict[str, Any]:
    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.layer(*args, **kwargs)

    encoder.layers[1] = Wrapper(encoder.layers[1])
    return {}


def a_class_of_their_own(encoder: nn.Module) -> dict[str, Any]:
    class Seeing(type(encoder.layers[1])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    encoder.layers[1].__class__ = Seeing
    return {}


@pytest.mark.parametrize(
    "seen",
    [
        a_hook,
        a_pre_hook,
        a_backward_hook,
        a_hook_on_a_norm,
        hidden_states,
        another_norm,
        a_wrapped_forward,
        a_wrapped_layer,
        a_class_of_their_own,
    ],
)
def test_no_norm_is_computed_for_nothing_where_somebody_sees_the_stream(monkeypatch: pytest.MonkeyPatch, seen: Any) -> None:
    ours, _ = pair(plain_encoder(), torch.float32)
    options = seen(ours)
    calls = Calls(monkeypatch)
    ours(draw_input().float(), **options)
    assert (calls.steer_norm, calls.steer, calls.layer_norm) == (0, LAYERS, 2 * LAYERS + 1)


def test_checkpoints_that_are_not_taken_do_not_slow_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the library takes none."""
    ours, _ = pair(plain_encoder(), torch.float32)
    ours.gradient_checkpointing_enable()
    ours.train()
    calls = Calls(monkeypatch)
    with torch.no_grad():
        ours(draw_input().float())
    assert calls.steer_norm == LAYERS and calls.steer == 0


def test_an_aligner_whose_forward_takes_less_works_where_somebody_sees_the_stream() -> None:
    class Former(FusedSteerMoE):
        def forward(self, h: Tensor, layer: int = 0, *, return_gates: bool = False) -> Any:
            return super().forward(h, layer, return_gates=return_gates)

    encoder = plain_encoder()
    steer_encoder(encoder, Former.for_encoder(encoder, EXPERTS).double())
    torch.testing.assert_close(encoder(draw_input(), output_hidden_states=True)[0], encoder(draw_input())[0])


def test_hidden_states_that_were_asked_for_once_do_not_slow_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's hooks stay on the layers."""
    ours, _ = pair(plain_encoder(), torch.float32)
    ours(draw_input().float(), output_hidden_states=True)
    calls = Calls(monkeypatch)
    ours(draw_input().float())
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


@pytest.mark.unpoisoned
@pytest.mark.parametrize("seen", ["hook", "hidden states"])
def test_compiled_in_one_graph_where_somebody_sees_the_stream(seen: str) -> None:
    ours, oracle = pair(plain_encoder(encoder_layers=2), torch.float32)
    options = {"output_hidden_states": seen == "hidden states"}
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        graphs.append(graph)
        return compiled

    def run(encoder: Any, x: Tensor) -> Results:
        output = encoder(x, **options)
        return {"last": output.last_hidden_state} | ({"state": output.hidden_states[1]} if seen == "hidden states" else {})

    for encoder in (ours, oracle):
        if seen == "hook":
            encoder.layers[0].register_forward_hook(replace)
        else:
            encoder(draw_input().float(), **options)  # the library puts its hooks in place under a lock, which is not traced
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = draw_input().float()
    assert_same(differentiate(ours, x, lambda _, x: run(compiled, x)), differentiate(oracle, x, run), tolerance=1e-4)
    called = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert sum("steermoe.steer.default" in name for name in called) == 2
    assert not any("steer_norm" in name for name in called)


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
