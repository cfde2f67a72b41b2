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
from small_encoders import LAYERS, WIDTH, Block, Encoder, aligner_for, layers_of, run, snapshot, spectrograms, whisper
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, encoders, reference, steer_encoder, unsteer_encoder
from steermoe_kernels.encoders import describe_encoder
from steermoe_kernels.encoders.stream import Steered


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
    layer, numbers = layers_of(encoder)[0], 0
    for module in (layer, encoder.steering):
        numbers += sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    saved = io.BytesIO()
    torch.save(layer, saved)
    assert saved.tell() < numbers + 20_000
    gone = weakref.ref(copied := copy.deepcopy(encoder))
    alone = copy.deepcopy(layers_of(copied)[0])
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
