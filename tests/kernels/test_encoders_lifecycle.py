"""A steered encoder as an object: copied, saved, moved, steered twice, unsteered; and the arguments that are refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, encoders, reference, steer_encoder, unsteer_encoder
from steermoe_kernels.encoders import class_swap, describe_encoder
from steermoe_kernels.encoders.stream import Steered

BINS, POSITIONS, WIDTH, LAYERS = 6, 10, 12, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(self.norm(h))


class Encoder(nn.Module):
    """Takes spectrograms, as the others here do."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(BINS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x.mT)
        for layer in self.layers:
            h = layer(h)
        return h


def whisper() -> nn.Module:
    modeling = pytest.importorskip("transformers.models.whisper.modeling_whisper")
    config = modeling.WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_source_positions=POSITIONS,
        num_mel_bins=BINS,
    )
    return modeling.WhisperEncoder(config)


def openai_whisper() -> nn.Module:
    return pytest.importorskip("whisper.model").AudioEncoder(BINS, POSITIONS, WIDTH, 2, LAYERS)


def spectrograms() -> Tensor:
    return torch.randn(2, BINS, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))


# An encoder of WIDTH with LAYERS layers, and what it takes.
KINDS = {"whisper": (whisper, spectrograms), "openai-whisper": (openai_whisper, spectrograms), "layered": (Encoder, spectrograms)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


@pytest.fixture
def x(kind: str) -> Tensor:
    return KINDS[kind][1]()


def run(encoder: nn.Module, x: Tensor) -> Tensor:
    output = encoder(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def aligner_for(encoder: nn.Module, **options: Any) -> FusedSteerMoE:
    torch.manual_seed(1)
    aligner = FusedSteerMoE.for_encoder(encoder, 4, steering_scale=3.0, **options)
    nn.init.normal_(aligner.steering_vectors)
    return aligner


def snapshot(encoder: nn.Module) -> dict[str, Any]:
    """All there is to an encoder beside its tensors: classes, attributes, hooks, names."""
    return {
        name: (type(module), sorted(module.__dict__), list(module._modules), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in encoder.named_modules()
    } | {"state": list(encoder.state_dict())}


@pytest.mark.parametrize("pooling", [{}, {"pool": "max", "pool_size": 3}], ids=["unpooled", "pooled"])
def test_unsteering_leaves_no_trace(encoder: nn.Module, x: Tensor, pooling: dict[str, Any]) -> None:
    hook = encoder.get_submodule("layers.1" if hasattr(encoder, "layers") else "blocks.1").register_forward_hook(lambda *_: None)
    before, y = snapshot(encoder), run(encoder, x)
    aligner = aligner_for(encoder)
    assert steer_encoder(encoder, aligner, **pooling) is encoder
    assert snapshot(encoder) != before and not torch.equal(run(encoder, x)[:, :1], y[:, :1])
    assert unsteer_encoder(encoder) is encoder
    assert snapshot(encoder) == before
    assert torch.equal(run(encoder, x), y)
    hook.remove()
    steer_encoder(encoder, aligner)  # and once more
    assert encoder.steering is aligner


def test_unsteering_twice(encoder: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="is not steered"):
        unsteer_encoder(encoder)
    steer_encoder(encoder, aligner_for(encoder))
    unsteer_encoder(encoder)
    with pytest.raises(RuntimeError, match="is not steered"):
        unsteer_encoder(encoder)


def test_steering_twice(encoder: nn.Module, x: Tensor) -> None:
    steer_encoder(encoder, aligner_for(encoder))
    y, before = run(encoder, x), snapshot(encoder)
    with pytest.raises(RuntimeError, match="is steered already: call unsteer_encoder"):
        steer_encoder(encoder, aligner_for(encoder))
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), y)


def test_steering_that_fails_half_way_changes_nothing(encoder: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    before, y = snapshot(encoder), run(encoder, x)
    aligner, kind = aligner_for(encoder), encoders._kind(encoder)
    steer = kind.steer

    def fails(*arguments: Any) -> None:
        steer(*arguments)
        raise MemoryError("no room")

    monkeypatch.setattr(kind, "steer", fails)
    with pytest.raises(MemoryError):
        steer_encoder(encoder, aligner)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), y)
    monkeypatch.undo()
    unsteer_encoder(steer_encoder(encoder, aligner))


def test_an_aligner_that_was_deleted_can_still_be_unsteered(encoder: nn.Module, x: Tensor) -> None:
    before, y = snapshot(encoder), run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    del encoder.steering
    unsteer_encoder(encoder)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), y)


def test_a_wrapped_encoder_names_what_it_wraps(encoder: nn.Module) -> None:
    for wrapped, inside in ((torch.compile(encoder), r"\._orig_mod"), (nn.DataParallel(encoder), r"\.module")):
        for function in (describe_encoder, lambda module: steer_encoder(module, aligner_for(encoder))):
            with pytest.raises(ValueError, match=f"wraps an encoder: pass what it wraps, its {inside}"):
                function(wrapped)


def test_steering_around_a_steered_encoder(encoder: nn.Module) -> None:
    outer = nn.Sequential(encoder)
    steer_encoder(encoder, aligner_for(encoder))
    with pytest.raises(RuntimeError, match="is steered already"):
        steer_encoder(outer, aligner_for(encoder))
    with pytest.raises(RuntimeError, match="is not steered"):
        unsteer_encoder(outer)


def test_unsteering_a_part_of_a_steered_encoder(encoder: nn.Module, x: Tensor) -> None:
    before, y = snapshot(encoder), run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    steered = run(encoder, x)
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.blocks
    for part in (layers, layers[0], encoder.steering):
        with pytest.raises(RuntimeError, match="is not steered"):
            unsteer_encoder(part)
    assert torch.equal(run(encoder, x), steered)
    unsteer_encoder(encoder)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), y)


def test_the_class_keeps_its_name_and_other_instances_their_class(encoder: nn.Module, x: Tensor) -> None:
    other = copy.deepcopy(encoder)
    plain, y = type(encoder), run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder))
    assert isinstance(encoder, plain) and str(type(encoder)) == str(plain)
    assert not any(isinstance(module, Steered) for module in other.modules())
    assert torch.equal(run(other, x), y)


def test_the_aligner_is_a_part_of_the_encoder(encoder: nn.Module) -> None:
    names = set(encoder.state_dict())
    steer_encoder(encoder, aligner_for(encoder))
    added = {"steering_vectors", "layer_scales", "router.weight", "router.bias"}
    assert set(encoder.state_dict()) - names == {f"steering.{name}" for name in added}
    assert names < set(encoder.state_dict())
    assert {name for name, _ in encoder.named_parameters()} >= {f"steering.{name}" for name in added}
    assert len(list(encoder.parameters())) == len({id(parameter) for parameter in encoder.parameters()})


def test_a_copy_is_steered_by_its_own_aligner(encoder: nn.Module, x: Tensor) -> None:
    steer_encoder(encoder, aligner_for(encoder), pool="mean", pool_size=3)
    twin = copy.deepcopy(encoder)
    y = run(encoder, x)
    assert torch.equal(run(twin, x), y)
    assert twin.steering is not encoder.steering
    with torch.no_grad():
        twin.steering.layer_scales.zero_()
    assert torch.equal(run(encoder, x), y) and not torch.equal(run(twin, x), y)
    run(twin, x).sum().backward()
    assert twin.steering.layer_scales.grad is not None and encoder.steering.layer_scales.grad is None
    unsteer_encoder(twin)
    assert torch.equal(run(encoder, x), y)


@pytest.mark.parametrize("save", ["pickle", "torch.save"])
def test_a_pickled_encoder_comes_back_steered(encoder: nn.Module, x: Tensor, save: str) -> None:
    plain = run(encoder, x)
    steer_encoder(encoder, aligner_for(encoder), pool="max", pool_size=3)
    if save == "pickle":
        twin = pickle.loads(pickle.dumps(encoder))
    else:
        file = io.BytesIO()
        torch.save(encoder, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(run(twin, x), run(encoder, x))
    with torch.no_grad():
        twin.steering.layer_scales.zero_()
    assert not torch.equal(run(twin, x), run(encoder, x))
    assert torch.equal(run(unsteer_encoder(twin), x), plain)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_a_copy_asks_itself_for_its_aligner(encoder: nn.Module, x: Tensor, how: Any) -> None:
    again = how(steer_encoder(encoder, aligner_for(encoder)))
    assert torch.equal(run(again, x), run(encoder, x))
    again.steering = aligner_for(unsteer_encoder(copy.deepcopy(encoder)))
    torch.nn.init.zeros_(again.steering.layer_scales)
    torch.testing.assert_close(run(again, x), run(unsteer_encoder(encoder), x))


def test_a_layer_that_is_saved_or_copied_leaves_the_encoder_behind(encoder: nn.Module, x: Tensor) -> None:
    steer_encoder(encoder, aligner_for(encoder))
    layer, numbers = encoders._kind(unsteer_encoder(copy.deepcopy(encoder))).layers(encoder)[0], 0
    for module in (layer, encoder.steering):
        numbers += sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    saved = io.BytesIO()
    torch.save(layer, saved)
    assert saved.tell() < numbers + 20_000
    gone = weakref.ref(copied := copy.deepcopy(encoder))
    alone = copy.deepcopy(encoders._kind(unsteer_encoder(copy.deepcopy(copied))).layers(copied)[0])
    del copied
    gc.collect()
    assert gone() is None and alone is not None


def test_a_pickled_encoder_comes_back_in_another_process(tmp_path: Any) -> None:
    encoder, x = whisper().eval(), spectrograms()
    steer_encoder(encoder, aligner_for(encoder))
    torch.save((encoder, x, run(encoder, x).detach()), tmp_path / "steered.pt")
    program = "import sys, torch; e, x, y = torch.load(sys.argv[1], weights_only=False); assert torch.equal(e(x).last_hidden_state, y)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "steered.pt")], check=True)


def test_a_state_dict_carries_the_steering_over(encoder: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(encoder)
    steer_encoder(encoder, aligner_for(encoder))
    steer_encoder(twin, FusedSteerMoE.for_encoder(twin, 4))
    assert not torch.equal(run(twin, x), run(encoder, x))
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(run(twin, x), run(encoder, x))


@pytest.mark.parametrize(
    "move", [lambda e: e.double(), lambda e: e.to(torch.bfloat16), lambda e: e.to("meta")], ids=["double", "bf16", "meta"]
)
def test_moving_an_encoder_moves_its_aligner(encoder: nn.Module, move: Callable[[nn.Module], nn.Module]) -> None:
    steer_encoder(encoder, aligner_for(encoder))
    moved = move(encoder)
    wanted = next(moved.parameters())
    assert all((parameter.dtype, parameter.device) == (wanted.dtype, wanted.device) for parameter in moved.steering.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_moved_encoder_runs(encoder: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    if type(encoder).__name__ == "AudioEncoder":
        pytest.skip("openai-whisper's norms run with float32 weights only")
    steer_encoder(encoder, aligner_for(encoder))
    y = run(encoder, x)
    assert (run(encoder.to(dtype), x.to(dtype)).double() - y.double()).abs().max() < 0.3
    assert run(encoder, x.to(dtype)).dtype == dtype


def test_several_encoders_at_once(encoder: nn.Module, x: Tensor) -> None:
    other = Encoder()
    steer_encoder(encoder, aligner_for(encoder))
    y = run(encoder, x)
    steer_encoder(other, aligner_for(other))
    assert torch.equal(run(encoder, x), y)
    unsteer_encoder(other)
    assert torch.equal(run(encoder, x), y)


def test_one_aligner_for_two_encoders(encoder: nn.Module, x: Tensor) -> None:
    twin, aligner = copy.deepcopy(encoder), aligner_for(encoder)
    steer_encoder(encoder, aligner)
    steer_encoder(twin, aligner)
    (run(encoder, x).sum() + run(twin, x).sum()).backward()
    both = aligner.steering_vectors.grad.clone()
    aligner.zero_grad()
    run(encoder, x).sum().backward()
    torch.testing.assert_close(both, 2 * aligner.steering_vectors.grad)


def test_training_only_the_aligner(encoder: nn.Module, x: Tensor) -> None:
    encoder.requires_grad_(False)
    steer_encoder(encoder, aligner_for(encoder))
    run(encoder, x).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == name.startswith("steering."), name


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    return encoder.layers if hasattr(encoder, "layers") else encoder.blocks


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_layers_return_can_be_kept_and_saved(encoder: nn.Module, x: Tensor, mode: Any) -> None:
    """Plain tensors come out, with nothing tied to them that files and copies would take along."""
    steer_encoder(encoder, aligner_for(encoder))
    outputs: list[Tensor] = []
    for layer in layers_of(encoder):
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with mode():
        run(encoder, x)
        if type(encoder).__name__ == "WhisperEncoder":
            outputs += encoder(x, output_hidden_states=True).hidden_states
    assert len(outputs) >= LAYERS
    for output in outputs:
        assert not vars(output)
        file = io.BytesIO()
        torch.save(output, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=True), output)


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


class Chain(nn.Module):
    """No list of layers, which no kind knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, h: Tensor) -> Tensor:
        return self.second(self.first(h))


CHAIN = """
from . import layered

PRIORITY = 5

def takes(encoder): return type(encoder).__name__ == "Chain"

def layers(encoder): return [encoder.first, encoder.second]

def width(encoder): return encoder.first.norm.normalized_shape[0]

def steer(encoder, steering):
    layered.steer(encoder, steering, members=layers(encoder))
"""


def test_a_kind_is_one_file(drop_in: Callable[..., None]) -> None:
    encoder, h = Chain(), torch.randn(2, 7, WIDTH)
    encoder.config = {"d_model": WIDTH + 1}  # of something else
    with pytest.raises(ValueError, match="Chain has no layers to steer"):
        describe_encoder(encoder)
    drop_in(encoders, encoders._kinds, CHAIN)
    before, y = snapshot(encoder), encoder(h)
    steer_encoder(encoder, aligner_for(encoder), pool="max", pool_size=3)
    assert encoder.steering.num_layers == 2 and encoder(h).shape == (2, 3, WIDTH)
    unsteer_encoder(encoder)
    assert snapshot(encoder) == before and torch.equal(encoder(h), y)


# --- refused, and nothing changed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aligner", "options", "error", "words"),
    [
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS + 1), {}, ValueError, "has 3 layers, the aligner has 4"),
        (lambda: FusedSteerMoE(WIDTH + 1, 4, LAYERS), {}, ValueError, "has width 12, the aligner has 13"),
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS, device="meta"), {}, ValueError, "is on cpu, the aligner on meta"),
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS), {"pool": "median"}, ValueError, "pool must be None, 'max' or 'mean', got 'median'"),
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS), {"pool": "max", "pool_size": 0}, ValueError, "pool_size must be at least 1, got 0"),
        (lambda: FusedSteerMoE(WIDTH, 4, LAYERS), {"pool": "max", "pool_size": 2.0}, TypeError, "pool_size must be an integer"),
        (lambda: reference.SteerMoEAligner(WIDTH, 4, LAYERS), {}, TypeError, "aligner must be a FusedSteerMoE, got SteerMoEAligner"),
        (lambda: None, {}, TypeError, "aligner must be a FusedSteerMoE, got NoneType"),
    ],
)
def test_bad_arguments_change_nothing(encoder: nn.Module, x: Tensor, aligner: Any, options: Any, error: Any, words: str) -> None:
    before, y = snapshot(encoder), run(encoder, x)
    with pytest.raises(error, match=words):
        steer_encoder(encoder, aligner(), **options)
    assert snapshot(encoder) == before and torch.equal(run(encoder, x), y)


def test_a_name_that_is_taken(encoder: nn.Module) -> None:
    encoder.steering = nn.Identity()
    with pytest.raises(ValueError, match="has an attribute called steering"):
        steer_encoder(encoder, FusedSteerMoE(WIDTH, 4, LAYERS))


@pytest.mark.parametrize("function", [lambda e: steer_encoder(e, FusedSteerMoE(WIDTH, 4, LAYERS)), FusedSteerMoE.for_encoder])
def test_something_that_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn module, got str"):
        function("openai/whisper-tiny")
    with pytest.raises(RuntimeError, match="str is not steered"):
        unsteer_encoder("openai/whisper-tiny")  # type: ignore[arg-type]


def test_importing_the_package_imports_no_encoder() -> None:
    program = "import sys, steermoe_kernels; print([name for name in ('transformers', 'whisper') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_steering_ones_own_encoder_imports_no_other() -> None:
    program = (
        "import sys; sys.modules['transformers'] = sys.modules['whisper'] = None\n"
        "from torch import nn; from steermoe_kernels import FusedSteerMoE, steer_encoder\n"
        "class Encoder(nn.Module):\n"
        "    def __init__(self): super().__init__(); self.layers = nn.ModuleList([nn.LayerNorm(4)])\n"
        "steer_encoder(e := Encoder(), FusedSteerMoE.for_encoder(e))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
