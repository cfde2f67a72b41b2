"""Encoders steered by hooks: whatever keeps its layers in one ``nn.ModuleList``. And what can be told of an encoder by looking at it."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from encoder_oracle import Results, assert_same, differentiate, draw_aligner, fused_aligner, hooked
from layered_encoders import (
    ENCODERS,
    EXPERTS,
    LAYERS,
    WIDTH,
    Block,
    Stack,
    frames,
    made,
    run,
    time_first_encoder,
)
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, steer_encoder, unsteer_encoder
from steermoe_kernels.encoders import describe_encoder


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"pool": "max", "pool_size": 3}, {"pool": "mean", "pool_size": 4}], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_and_every_gradient(name: str, options: dict[str, Any]) -> None:
    make, layers, x = ENCODERS[name]
    encoder = made(make)
    routing = {key: value for key, value in options.items() if key == "top_k"}
    pooling = {key: value for key, value in options.items() if key != "top_k"}
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS, **routing)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64), **pooling)
    oracle = hooked(encoder, layers, aligner, torch.float64, **pooling)
    assert_same(differentiate(ours, x.clone(), run), differentiate(oracle, x.clone(), run))
    with torch.inference_mode():
        torch.testing.assert_close(run(ours, x.clone())["last"], run(oracle, x.clone())["last"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_shape_of_an_encoder(name: str) -> None:
    encoder = made(ENCODERS[name][0])
    assert describe_encoder(encoder) == (WIDTH, LAYERS, torch.device("cpu"), torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert describe_encoder(encoder.to(dtype)).dtype == torch.float32  # parameters stay in float32 under a half-precision stream
    aligner = FusedSteerMoE.for_encoder(encoder, 4, top_k=2)
    assert aligner.steering_vectors.shape == (LAYERS, 4, WIDTH)
    steer_encoder(encoder, aligner)


@pytest.mark.parametrize("name", ["whisper", "openai-whisper"])
def test_the_shape_of_a_whisper_encoder(name: str) -> None:
    encoder: nn.Module
    if name == "whisper":
        whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper")
        encoder = whisper.WhisperEncoder(whisper.WhisperConfig(d_model=24, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32))
    else:
        encoder = pytest.importorskip("whisper.model").AudioEncoder(6, 10, 24, 2, 2)
    assert describe_encoder(encoder) == (24, 2, torch.device("cpu"), torch.float32)
    assert describe_encoder(encoder.half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["conformer", "vit"])
def test_hidden_states(name: str) -> None:
    make, layers, x = ENCODERS[name]
    encoder = made(make)
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64), pool="mean", pool_size=4)
    oracle = hooked(encoder, layers, aligner, torch.float64, pool="mean", pool_size=4)
    for state, expected in zip(
        ours(x, output_hidden_states=True).hidden_states, oracle(x, output_hidden_states=True).hidden_states, strict=True
    ):
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("name", ["GraniteSpeech", "GraniteSpeechPlus"])
def test_an_encoder_that_writes_into_a_layers_output(name: str, num_layers: int) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}EncoderConfig"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}EncoderConfig")(
        input_dim=6,
        num_layers=num_layers,
        hidden_dim=WIDTH,
        feedforward_mult=2,
        num_heads=2,
        dim_head=6,
        output_dim=5,
        context_size=4,
        max_pos_emb=8,
        conv_kernel_size=3,
        dropout=0.0,
    )
    modeling = importlib.import_module(getattr(transformers, f"{name}PreTrainedModel").__module__)
    encoder = made(lambda: getattr(modeling, f"{name}CTCEncoder")(config))
    aligner, x = draw_aligner(WIDTH, EXPERTS, num_layers), frames(2, 11, 6)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64))
    oracle = hooked(encoder, lambda e: e.layers, aligner, torch.float64)
    assert_same(differentiate(ours, x, run), differentiate(oracle, x, run))
    with torch.no_grad():
        torch.testing.assert_close(run(ours, x), run(oracle, x), rtol=1e-10, atol=1e-10)
    assert torch.equal(run(unsteer_encoder(ours), x)["last"], run(encoder, x)["last"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("frozen", [False, True])
def test_padding_in_a_torch_encoder(frozen: bool) -> None:
    """Without gradients, torch takes the padding out and runs the layers on nested tensors, which cannot be steered."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    encoder = made(lambda: nn.TransformerEncoder(layer, LAYERS)).requires_grad_(not frozen)
    aligner, x = draw_aligner(WIDTH, EXPERTS, LAYERS), frames(2, 7, WIDTH)
    heard = torch.arange(7) < torch.tensor([[7], [4]])

    def run_heard(encoder: nn.Module, x: Tensor) -> Results:
        return {"last": encoder(x, src_key_padding_mask=~heard)[heard]}

    plain, attributes = run_heard(encoder, x)["last"], dict(encoder.__dict__)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64))
    dense = copy.deepcopy(encoder)
    dense.use_nested_tensor = False
    oracle = hooked(dense, lambda e: e.layers, aligner, torch.float64)
    for twin in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(differentiate(twin, x, run_heard), differentiate(oracle, x, run_heard))
        with torch.no_grad():
            torch.testing.assert_close(run_heard(twin, x), run_heard(oracle, x), rtol=1e-10, atol=1e-10)
        unsteer_encoder(twin)
        assert type(twin) is type(encoder) and twin.__dict__.keys() == attributes.keys() and twin.use_nested_tensor
        assert torch.equal(run_heard(twin, x)["last"], plain)


def test_hooks_that_were_there_before_see_the_steered_stream() -> None:
    encoder = made(ENCODERS["own"][0])
    seen = []
    encoder.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    x = frames(1, 5, WIDTH)
    plain = encoder.layers[0](x)
    steer_encoder(encoder, fused_aligner(aligner, torch.float64))
    encoder(x)
    torch.testing.assert_close(seen[1], aligner(plain, 0), rtol=1e-10, atol=1e-10)


def test_gates_are_recorded() -> None:
    encoder = made(ENCODERS["conformer"][0])
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder, 4))
    with encoder.steering.record_gates() as gates:
        length = run(encoder, frames(2, 200))["last"].shape[1]
    assert {layer: tuple(g.shape) for layer, g in gates.items()} == dict.fromkeys(range(LAYERS), (2, length, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    encoder = made(ENCODERS["conformer encoder"][0]).train()
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64))
    for layer in ours.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=reentrant
        )
    found = []
    for each in (ours, hooked(encoder, lambda e: e.layers, aligner, torch.float64)):
        x = frames(2, 11, WIDTH).requires_grad_()
        y = run(each, 1 * x)["last"]
        y.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in each.named_parameters() if parameter.grad is not None}
        found.append({"y": y.detach(), "x": x.grad} | gradients)
    assert_same(*found)


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "shape",
    [
        lambda y: (y, "more"),
        lambda y: [y, "more"],
        lambda y: Pair(y, "more"),
        lambda y: {"first": y, "second": "more"},
        lambda y: OrderedDict(first=y, second="more"),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "OrderedDict"],
)
def test_layers_that_return_more_than_the_stream(shape: Any) -> None:
    plain = made(lambda: Stack(*(Block() for _ in range(LAYERS))))
    encoder = copy.deepcopy(plain)
    for layer in encoder.layers:
        layer.shape = shape
    aligner = draw_aligner(WIDTH, EXPERTS, LAYERS)
    steer_encoder(encoder, fused_aligner(aligner, torch.float64))
    x = frames(2, 11, WIDTH)
    output = encoder.layers[0](x)
    assert type(output) is type(shape(x)) and len(output) == 2 and (output["second"] if isinstance(output, dict) else output[1]) == "more"
    assert_same(differentiate(encoder, x, run), differentiate(hooked(plain, lambda e: e.layers, aligner, torch.float64), x, run))


def test_model_outputs_stay_model_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    encoder = made(lambda: Stack(*(Block(shape=lambda y: outputs.BaseModelOutput(last_hidden_state=y)) for _ in range(LAYERS))))
    steer_encoder(encoder, fused_aligner(draw_aligner(WIDTH, EXPERTS, LAYERS), torch.float64))
    output = encoder.layers[0](frames(2, 11, WIDTH))
    assert isinstance(output, outputs.BaseModelOutput) and output.last_hidden_state is output[0]


@pytest.mark.parametrize("shape", [lambda y: None, lambda y: (), lambda y: 3])
def test_layers_that_return_no_stream(shape: Any) -> None:
    encoder = made(lambda: Stack(*(Block(shape=shape) for _ in range(LAYERS))))
    steer_encoder(encoder, fused_aligner(draw_aligner(WIDTH, EXPERTS, LAYERS), torch.float64))
    with pytest.raises(TypeError, match="a steered layer must return a tensor"):
        encoder.layers[0](frames(2, 11, WIDTH))


def test_layers_that_take_time_first_are_steered() -> None:
    encoder = made(time_first_encoder)
    aligner, x = draw_aligner(WIDTH, EXPERTS, LAYERS), frames(7, 2, WIDTH)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64))
    with ours.steering.record_gates() as gates:
        results = differentiate(ours, x, run)
    assert_same(results, differentiate(hooked(encoder, lambda e: e.layers, aligner, torch.float64), x, run))
    assert {gate.shape for gate in gates.values()} == {(7, 2, EXPERTS)}


# --- which layers -----------------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two stacks side by side, as an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(Block(), Block()), Stack(Block())


class Nested(nn.Module):
    """A list whose members hold lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stack(Block(), Block()), Stack(Block(), Block())])

    def forward(self, h: Tensor) -> Tensor:
        for stage in self.stages:
            h = stage(h)
        return h


class WithConvolutions(nn.Module):
    """A feature extractor with a longer list of its own, of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 1), nn.LayerNorm(WIDTH)) for _ in range(7)])
        self.stack = Stack(*(Block() for _ in range(LAYERS)))


def test_a_feature_extractors_convolutions_are_not_the_layers() -> None:
    assert describe_encoder(WithConvolutions()) == (WIDTH, LAYERS, torch.device("cpu"), torch.float32)


def test_the_outermost_list_holds_the_layers() -> None:
    encoder = Nested().double()
    aligner = draw_aligner(WIDTH, EXPERTS, 2)
    ours = steer_encoder(copy.deepcopy(encoder), fused_aligner(aligner, torch.float64))
    x = frames(2, 11, WIDTH)
    assert_same(differentiate(ours, x, run), differentiate(hooked(encoder, lambda e: e.stages, aligner, torch.float64), x, run))


def test_two_stacks_are_an_error_that_names_them() -> None:
    with pytest.raises(ValueError, match=r"not clear which layers of Two to steer: it holds the lists encoder\.layers, decoder\.layers"):
        describe_encoder(Two())
    steer_encoder(Two().encoder, FusedSteerMoE(WIDTH, 4, 2))


@pytest.mark.parametrize("encoder", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)), Stack()], ids=["Linear", "Sequential", "empty list"])
def test_an_encoder_without_layers(encoder: nn.Module) -> None:
    with pytest.raises(ValueError, match="no layers to steer"):
        steer_encoder(encoder, FusedSteerMoE(3, 4, 1))
    with pytest.raises(ValueError, match="no layers to steer"):
        FusedSteerMoE.for_encoder(encoder)


def test_one_layer_used_several_times() -> None:
    block = Block()
    with pytest.raises(ValueError, match="uses one layer several times"):
        steer_encoder(Stack(block, block), FusedSteerMoE(WIDTH, 4, 2))


def test_a_list_of_lists() -> None:
    encoder = Stack(nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()]))
    for call in (FusedSteerMoE.for_encoder, lambda encoder: steer_encoder(encoder, FusedSteerMoE(WIDTH, 4, 2))):
        with pytest.raises(ValueError, match="the layers of Stack are lists of modules"):
            call(encoder)


class Calls(nn.ModuleList):
    def forward(self, h: Tensor) -> Tensor:
        for member in self:
            h = member(h)
        return h


def test_a_list_that_can_be_called_is_a_layer() -> None:
    encoder = Stack(Calls([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)]))
    steer_encoder(encoder, FusedSteerMoE(WIDTH, 4, 1))
    assert encoder(frames(2, 11, WIDTH).float()).shape == (2, 11, WIDTH)


def test_an_aligner_on_several_devices() -> None:
    encoder = Stack(Block(), Block())
    aligner = FusedSteerMoE.for_encoder(encoder)
    aligner.router.to("meta")
    with pytest.raises(ValueError, match=r"the aligner's router\.weight is on meta, its steering_vectors on cpu"):
        steer_encoder(encoder, aligner)


def test_a_width_that_cannot_be_told() -> None:
    encoder = Stack(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ValueError, match="width of Stack cannot be told"):
        FusedSteerMoE.for_encoder(encoder)
    steer_encoder(encoder, FusedSteerMoE(WIDTH, 4, 2))
    assert encoder(frames(2, 11, WIDTH).float()).shape == (2, 11, WIDTH)


def test_a_width_that_only_the_config_tells() -> None:
    encoder = Stack(nn.Linear(WIDTH, WIDTH))
    encoder.config = {"d_model": WIDTH}
    assert describe_encoder(encoder).feature_dim == WIDTH
    with pytest.raises(ValueError, match="width 12, the aligner has 7"):
        steer_encoder(encoder, FusedSteerMoE(7, 4, 1))


def swin(stages: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * stages, num_heads=[2] * stages, window_size=2, drop_path_rate=0.0
    )
    return transformers.SwinModel(config)


@pytest.mark.parametrize("stages", [3, 4])
def test_stages_of_several_widths(stages: int) -> None:
    encoder = swin(stages)
    names = list(encoder.state_dict())
    with pytest.raises(ValueError, match=rf"SwinModel has width {8 * 2 ** (stages - 1)}, but its layer 0 returns another \(16, it seems\)"):
        FusedSteerMoE.for_encoder(encoder)
    with pytest.raises(ValueError, match="an aligner has one width for all layers"):
        steer_encoder(encoder, FusedSteerMoE(encoder.config.hidden_size, 4, stages))
    assert list(encoder.state_dict()) == names


def test_two_stages_return_one_width() -> None:
    """The first doubles its width on its way out."""
    encoder = swin(2).eval()
    plain = run(encoder, x := frames(1, 3, 32, 32).float())["last"]
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder, 4, steering_scale=3.0))
    with encoder.steering.record_gates() as gates:
        assert not torch.equal(run(encoder, x)["last"], plain)
    assert sorted(gates) == [0, 1]


class ByHead(nn.Module):
    """A layer whose only norm, by its class's name, is over the width of a head; ``last`` is what it registers last."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.query, self.head_norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH // 2), last

    def forward(self, h: Tensor) -> Tensor:
        return h + self.head_norm(self.query(h).unflatten(-1, (2, -1))).flatten(-2)


@pytest.mark.parametrize("last", [nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH), nn.Identity()], ids=str)
def test_norms_of_a_heads_width_only(last: nn.Module) -> None:
    encoder = Stack(ByHead(last), ByHead(last))
    encoder.config = {"hidden_size": WIDTH}
    steer_encoder(encoder, FusedSteerMoE.for_encoder(encoder, 4))
    assert encoder(frames(2, 5, WIDTH).float()).shape == (2, 5, WIDTH)
