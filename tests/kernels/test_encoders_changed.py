"""A steered encoder that others change: another aligner, replaced or altered modules, compilation in place."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from small_encoders import KINDS, LAYERS, WIDTH, Encoder, aligner_for, layers_of, run, snapshot, spectrograms, whisper
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference, steer_encoder, unsteer_encoder
from steermoe_kernels.encoders import class_swap
from steermoe_kernels.encoders.stream import Steered

# --- another aligner in the place of the first ------------------------------------------------------------------------------------------


class Trained(nn.Module):
    """As peft wraps a module of ``modules_to_save``: it trains a copy, and forwards attributes to what it has in use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module, self.trained, self.enabled = module, copy.deepcopy(module), True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.trained if self.enabled else self.original_module, name)


@pytest.mark.parametrize("pooling", [{}, {"pool": "max", "pool_size": 3}], ids=["unpooled", "pooled"])
def test_another_aligner_steers_from_the_next_pass_on(encoder: nn.Module, x: Tensor, pooling: dict[str, Any]) -> None:
    before, plain = snapshot(encoder), run(encoder, x)
    other, first = aligner_for(encoder, top_k=1), aligner_for(encoder)
    expected = run(steer_encoder(copy.deepcopy(encoder), copy.deepcopy(other), **pooling), x)
    steer_encoder(encoder, first, **pooling)
    steered = run(encoder, x)
    encoder.steering = other
    with other.record_gates() as gates, first.record_gates() as none:
        assert torch.equal(run(encoder, x), expected) and not torch.equal(expected, steered)
    assert len(gates) == LAYERS and not none
    run(encoder, x).sum().backward()
    assert other.steering_vectors.grad is not None and first.steering_vectors.grad is None
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(run(twin, x), expected)
        twin.steering = copy.deepcopy(first)
        assert torch.equal(run(twin, x), steered) and torch.equal(run(encoder, x), expected)
    unsteer_encoder(encoder)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), plain)


def test_a_layer_called_by_hand_is_steered_by_the_aligner_there_is(kind: str) -> None:
    encoder = KINDS[kind][0]().eval()
    h, layer = torch.randn(2, 7, WIDTH), layers_of(encoder)[1]
    more = (None,) if type(encoder).__name__ == "WhisperEncoder" else ()
    plain = layer(h, *more)
    steer_encoder(encoder, aligner_for(encoder))
    encoder.steering = other = aligner_for(encoder, top_k=1)
    expected = other(plain, 1)
    torch.testing.assert_close(layer(h, *more), expected)
    del encoder
    gc.collect()
    torch.testing.assert_close(layer(h, *more), expected)


def test_a_wrapper_that_trains_a_copy_of_the_aligner(encoder: nn.Module, x: Tensor) -> None:
    plain = run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    steered = run(encoder, x)
    encoder.steering = wrapper = Trained(encoder.steering)
    assert torch.equal(run(encoder, x), steered)
    run(encoder, x).sum().backward()
    assert wrapper.trained.steering_vectors.grad.any() and wrapper.original_module.steering_vectors.grad is None
    with torch.no_grad():
        wrapper.trained.layer_scales.zero_()
    torch.testing.assert_close(run(encoder, x), plain)
    wrapper.enabled = False
    assert torch.equal(run(encoder, x), steered)
    assert torch.equal(run(unsteer_encoder(encoder), x), plain)


def test_pefts_modules_to_save(encoder: nn.Module, x: Tensor) -> None:
    peft = pytest.importorskip("peft")
    plain = run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    steered = run(encoder, x)
    target = {"WhisperEncoder": "q_proj", "AudioEncoder": "query", "Encoder": "linear"}[type(encoder).__name__]
    model = peft.get_peft_model(encoder, peft.LoraConfig(target_modules=[target], modules_to_save=["steering"]))
    assert torch.equal(run(encoder, x), steered)
    run(encoder, x).sum().backward()
    trained = encoder.steering.modules_to_save["default"]
    assert trained.steering_vectors.grad.any() and encoder.steering.original_module.steering_vectors.grad is None
    with torch.no_grad():
        trained.layer_scales.zero_()
    torch.testing.assert_close(run(encoder, x), plain)
    with model.disable_adapter():
        torch.testing.assert_close(run(encoder, x), steered)
    model.merge_and_unload()
    assert encoder.steering is trained
    torch.testing.assert_close(run(encoder, x), plain)


@pytest.mark.parametrize(
    ("other", "error", "said"),
    [
        (lambda: FusedSteerMoE(WIDTH + 1, 4, LAYERS), ValueError, "in 3 layers of width 12, its new aligner has 3 of width 13"),
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS - 1), ValueError, "in 3 layers of width 12, its new aligner has 2 of width 12"),
        (lambda: reference.SteerMoEAligner(WIDTH, 4, LAYERS), TypeError, "must be a FusedSteerMoE, .* got SteerMoEAligner"),
        (nn.Identity, TypeError, "must be a FusedSteerMoE, .* got Identity"),
        (lambda: None, RuntimeError, "its aligner, the submodule steering, is gone"),
    ],
)
def test_a_new_aligner_that_does_not_fit(encoder: nn.Module, x: Tensor, other: Any, error: Any, said: str) -> None:
    first = aligner_for(encoder)
    steer_encoder(encoder, first)
    y = run(encoder, x)
    encoder.steering = other()
    with pytest.raises(error, match=said):
        run(encoder, x)
    encoder.steering = first
    assert torch.equal(run(encoder, x), y)


def test_a_deleted_aligner(encoder: nn.Module, x: Tensor) -> None:
    steer_encoder(encoder, aligner_for(encoder))
    del encoder.steering
    with pytest.raises(RuntimeError, match="is gone: put it back, or call unsteer_encoder"):
        run(encoder, x)


def test_an_encoder_is_freed_when_it_is_let_go(kind: str) -> None:
    encoder, x = KINDS[kind][0](), KINDS[kind][1]()
    steer_encoder(encoder, aligner_for(encoder))
    run(encoder, x).sum().backward()
    gone, parts = weakref.ref(encoder), weakref.ref(layers_of(encoder)[0])
    gc.disable()
    try:
        del encoder
        assert gone() is None and parts() is None
    finally:
        gc.enable()


# --- the modules of a steered encoder, changed by others --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whisper", "openai-whisper"])
def test_a_last_norm_that_was_replaced_does_not_lose_the_pooling(name: str) -> None:
    make, inputs = KINDS[name]
    encoder, x = make().eval(), inputs()
    steer_encoder(encoder, aligner_for(encoder), pool="max", pool_size=3)
    y, norm = run(encoder, x), "layer_norm" if name == "whisper" else "ln_post"
    own = getattr(encoder, norm)
    setattr(encoder, norm, nn.LayerNorm(WIDTH))
    with pytest.raises(RuntimeError, match=r"the last norm of .* was replaced since it was steered, and the pooling with it"):
        run(encoder, x)
    setattr(encoder, norm, Trained(own))  # which has the norm inside
    getattr(encoder, norm).forward = lambda h: getattr(encoder, norm).trained(h)
    torch.testing.assert_close(run(encoder, x), y)
    setattr(encoder, norm, own)
    assert torch.equal(run(encoder, x), y)


@pytest.mark.parametrize("name", ["whisper", "openai-whisper"])
def test_a_norm_that_is_parametrized_is_not_unsteered(name: str) -> None:
    make, inputs = KINDS[name]
    encoder, x = make().eval(), inputs()
    before, plain = snapshot(encoder), run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    where = "layers.1.self_attn_layer_norm" if name == "whisper" else "blocks.1.attn_ln"
    norm, steered = encoder.get_submodule(where), snapshot(encoder)
    y = run(encoder, x)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    torch.testing.assert_close(run(encoder, x), y)
    changed = snapshot(encoder)
    with pytest.raises(RuntimeError, match=f"the class was exchanged for ParametrizedLayerNorm, of {where}, since it was steered; undo"):
        unsteer_encoder(encoder)
    assert snapshot(encoder) == changed
    torch.testing.assert_close(run(encoder, x), y)
    nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert {key: value for key, value in snapshot(encoder).items() if key != "state"}.keys() == steered.keys() - {"state"}
    unsteer_encoder(encoder)
    assert {key: value[0] for key, value in snapshot(encoder).items()} == {key: value[0] for key, value in before.items()}
    assert torch.equal(run(encoder, x), plain)


@pytest.mark.parametrize("where", ["", "layers.1", "layer_norm"])
def test_a_wrapped_forward_is_not_unsteered(where: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    encoder, x = whisper().eval(), spectrograms()
    before, plain = snapshot(encoder), run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    y, module = run(encoder, x), encoder.get_submodule(where)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    with pytest.raises(RuntimeError, match=f"the forward was wrapped, of {where or 'the encoder itself'}, since it was steered; undo"):
        unsteer_encoder(encoder)
    torch.testing.assert_close(run(encoder, x), y)
    hooks.remove_hook_from_module(module)  # leaves the steered forward on the instance
    unsteer_encoder(encoder)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), plain)


def test_an_encoder_whose_class_was_exchanged_is_not_unsteered() -> None:
    encoder, x = whisper().eval(), spectrograms()
    steer_encoder(encoder, aligner_for(encoder))
    y, ours = run(encoder, x), type(encoder)
    encoder.__class__ = type("Sharded", (ours,), {})  # as fully_shard does
    with pytest.raises(RuntimeError, match=r"the class was exchanged for .*Sharded, of the encoder itself"):
        unsteer_encoder(encoder)
    assert torch.equal(run(encoder, x), y) and isinstance(encoder.layers[0], Steered)
    encoder.__class__ = ours
    unsteer_encoder(encoder)


def test_classes_that_are_used_no_more_are_let_go() -> None:
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    made = type("OnTheFly", (modeling.WhisperEncoderLayer,), {})
    module, twin = made(whisper().config), whisper()
    class_swap.swap(module, Steered)
    swapped = type(module)
    assert class_swap._swapped_class(Steered, made) is swapped
    steer_encoder(twin, aligner_for(twin))
    other = weakref.ref(type(twin))
    references = weakref.ref(made), weakref.ref(swapped)
    class_swap.unswap(module)
    del module, made, swapped
    gc.collect()  # the one, and with it what knew the other
    gc.collect()
    assert [reference() for reference in references] == [None, None] and other() is type(twin)


# --- compiled in place ------------------------------------------------------------------------------------------------------------------


@pytest.mark.unpoisoned
def test_an_encoder_that_was_compiled_in_place(encoder: nn.Module, x: Tensor) -> None:
    """Its graph does not see hooks come and go; where classes are exchanged, it is made anew."""
    torch._dynamo.reset()
    before, plain, aligner = snapshot(encoder), run(encoder, x), aligner_for(encoder)
    steered = run(steer_encoder(copy.deepcopy(encoder), aligner), x)
    encoder.compile(backend="eager")
    torch.testing.assert_close(run(encoder, x), plain)
    if type(encoder) is Encoder:
        compiled = snapshot(encoder)
        with pytest.raises(ValueError, match=r"Encoder was compiled in place, .*set its _compiled_call_impl to None and call"):
            steer_encoder(encoder, aligner)
        assert snapshot(encoder) == compiled
        encoder._compiled_call_impl = None
        torch._dynamo.reset()
    steer_encoder(encoder, aligner)
    encoder.compile(backend="eager")
    torch.testing.assert_close(run(encoder, x), steered)
    if type(encoder) is Encoder:
        with pytest.raises(RuntimeError, match="Encoder was compiled in place, with the hooks that steer it"):
            unsteer_encoder(encoder)
        torch.testing.assert_close(run(encoder, x), steered)
        encoder._compiled_call_impl = None
        torch._dynamo.reset()
    unsteer_encoder(encoder)
    torch.testing.assert_close(run(encoder, x), plain)
    vars(encoder).pop("_compiled_call_impl")
    assert snapshot(encoder) == before


@pytest.mark.unpoisoned
def test_layers_that_were_compiled_in_place(encoder: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    plain, aligner = run(encoder, x), aligner_for(encoder)
    steered = run(steer_encoder(copy.deepcopy(encoder), aligner), x)
    for layer in layers_of(encoder):
        layer.compile(backend="eager")
    torch.testing.assert_close(run(encoder, x), plain)
    torch.testing.assert_close(run(steer_encoder(encoder, aligner), x), steered)
    torch.testing.assert_close(run(unsteer_encoder(encoder), x), plain)


@pytest.mark.unpoisoned
def test_a_compiled_encoder_is_steered_by_the_aligner_there_is(encoder: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    plain = run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    steered, first = run(encoder, x), encoder.steering
    other = copy.deepcopy(first)
    nn.init.zeros_(other.layer_scales)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), steered)
    encoder.steering = other
    torch.testing.assert_close(run(compiled, x), plain)
    encoder.steering = Trained(first)
    torch.testing.assert_close(run(compiled, x), steered)
