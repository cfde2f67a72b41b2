"""`patch_steermoe`: stand-ins for the versions of the public code, before and after, and code that strays from its formula."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_accurate, stack
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, patch_steermoe, reference
from steermoe_kernels import functional as SF
from steermoe_kernels.encoders.expressions import Expression
from steermoe_kernels.encoders.patching import PatchedRouter

Results = dict[str, Tensor]


class Layer(nn.Module):
    """An encoder's layer; with ``as_tuple`` it answers as older libraries do."""

    def __init__(self, width: int, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(width, width), as_tuple

    def forward(self, x: Tensor, *others: Any, **more: Any) -> Any:
        y = x + torch.tanh(self.linear(x))
        return (y, None) if self.as_tuple else y


class SpeechEncoder(nn.Module):
    def __init__(self, width: int, num_layers: int, as_tuple: bool, name: str = "layers") -> None:
        super().__init__()
        self.add_module(name, nn.ModuleList([Layer(width, as_tuple) for _ in range(num_layers)]))
        self.layer_norm = nn.LayerNorm(width)


class Loaded(nn.Module):
    """What loads the speech encoder from a file in the public code, and holds it."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.speech_encoder = SpeechEncoder(*args)


class PublicBase(nn.Module):
    steers_from: int

    def __init__(self, original_encoder: nn.Module, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.original_encoder = original_encoder.requires_grad_(False)
        self.num_experts, self.num_layers, self.feature_dim = num_experts, num_layers, width
        self.steering_vectors = nn.Parameter(torch.randn(num_layers, num_experts, width))
        self.layer_scales = nn.Parameter(torch.randn(num_layers))


class SingleRouterWhisper(PublicBase):
    """The published version: one router, a method beside ``forward``, pooling after a layer whose number is given."""

    def __init__(self, width: int, num_layers: int, num_experts: int, pooling_position: int = 32) -> None:
        super().__init__(Loaded(width, num_layers, True), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)
        self.pooling_position, self.pooling_layer = pooling_position, nn.MaxPool1d(kernel_size=4)

    def _forward_with_steering(self, mel_features: Tensor, return_gating: bool = False) -> Any:
        x, gating_scores_list = mel_features, []
        for layer_idx, layer in enumerate(self.original_encoder.speech_encoder.layers):
            layer_output = layer(x)[0]
            self.router = self.router.to(self.steering_vectors.device)
            router_output = self.router(layer_output)
            layer_gating_logits = router_output[:, :, layer_idx * self.num_experts : (layer_idx + 1) * self.num_experts]
            gating_scores = F.softmax(layer_gating_logits, dim=-1)
            steering_adjustment = torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors[layer_idx])
            x = layer_output + self.layer_scales[layer_idx] * steering_adjustment
            gating_scores_list.append(gating_scores)
            if layer_idx + 1 == self.pooling_position:
                x = F.pad(x.permute(0, 2, 1), (0, -x.shape[1] % 4))
                x = self.pooling_layer(x).permute(0, 2, 1)
        x = self.original_encoder.speech_encoder.layer_norm(x)
        return (x, gating_scores_list) if return_gating else x

    def tokenize_waveform(self, audio: Tensor, return_gating: bool = False) -> Any:
        return self._forward_with_steering(audio, return_gating)

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        return self._forward_with_steering(mel_spec, return_gating)

    def get_steering_analysis(self, gating_scores_list: list[Tensor]) -> dict[str, Any]:
        averages = [gating_scores.mean(dim=(0, 1)) for gating_scores in gating_scores_list]
        return {"strength": [average.max().item() for average in averages], "scales": self.layer_scales.detach().cpu().numpy().tolist()}


class EarlyWhisper(PublicBase):
    """An early version: the loop in ``forward``, layers that return tensors."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            logits = self.router(h)[:, :, index * self.num_experts : (index + 1) * self.num_experts]
            gates = F.softmax(logits, dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        x = self.original_encoder.layer_norm(x)
        return (x, gates_of_layers) if return_gating else x


class MultiRouterWhisper(PublicBase):
    """One router a layer."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.routers = nn.ModuleList([nn.Linear(width, num_experts) for _ in range(num_layers)])

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            gates = F.softmax(self.routers[index](h), dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        x = self.original_encoder.layer_norm(x)
        return (x, gates_of_layers) if return_gating else x


class SharedRouterWhisper(PublicBase):
    """One small router for all layers, and a matrix for each."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(SpeechEncoder(width, num_layers, False), width, num_layers, num_experts)
        self.shared_router = nn.Linear(width, num_experts)
        self.layer_weights = nn.Parameter(torch.eye(num_experts) + 0.3 * torch.randn(num_layers, num_experts, num_experts))

    def forward(self, mel_spec: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers = mel_spec, []
        for index, layer in enumerate(self.original_encoder.layers):
            h = layer(x)
            logits = torch.einsum("bte,ef->btf", self.shared_router(h), self.layer_weights[index])
            gates = F.softmax(logits, dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            gates_of_layers.append(gates)
        return (x, gates_of_layers) if return_gating else x


class Conformer(PublicBase):
    """Layers in a ``layer_stack``, lengths and a mask in the answer, pooling at the end."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__(Loaded(width, num_layers, False, "layer_stack"), width, num_layers, num_experts)
        self.router = nn.Linear(width, num_experts * num_layers)
        self.pooling_layer = nn.MaxPool1d(kernel_size=2)

    def _forward_with_steering(self, mel_features: Tensor, input_lengths: list[int], return_full_output: bool = False) -> Any:
        enc_output, gating_scores_list = mel_features, []
        for layer_idx, layer in enumerate(self.original_encoder.speech_encoder.layer_stack):
            layer_output = layer(enc_output, None, slf_attn_mask=None, pad_mask=None)
            router_output = self.router(layer_output)
            start_idx, end_idx = layer_idx * self.num_experts, (layer_idx + 1) * self.num_experts
            gating_scores = F.softmax(router_output[:, :, start_idx:end_idx], dim=-1)
            steering_adjustment = torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors[layer_idx])
            enc_output = layer_output + self.layer_scales[layer_idx] * steering_adjustment
            gating_scores_list.append(gating_scores)
        enc_output = F.pad(enc_output.permute(0, 2, 1), (0, enc_output.shape[1] % 2))
        enc_output = self.pooling_layer(enc_output).permute(0, 2, 1)
        lengths = [length // 2 for length in input_lengths]
        return (enc_output, lengths, None, gating_scores_list) if return_full_output else enc_output

    def forward(self, mel_features: Tensor, return_gating: bool = False) -> Any:
        if not return_gating:
            return self._forward_with_steering(mel_features, [mel_features.shape[1]])
        enc_output, _, _, gates = self._forward_with_steering(mel_features, [mel_features.shape[1]], True)
        return enc_output, gates


class SingleAligner(nn.Module):
    """Steers once, after the encoder, and without a scale."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.steering_vectors = nn.Parameter(torch.randn(num_experts, width))
        self.router = nn.Linear(width, num_experts)

    def forward(self, h_audio: Tensor, return_gating: bool = False) -> Any:
        gating_scores = F.softmax(self.router(h_audio), dim=-1)
        h_aligned = h_audio + torch.einsum("bte,ef->btf", gating_scores, self.steering_vectors)
        return (h_aligned, gating_scores) if return_gating else h_aligned


class LayerWiseAligner(nn.Module):
    """Holds the steering, and is handed the encoder with every call."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.steering_vectors = nn.Parameter(torch.randn(num_layers, num_experts, width))
        self.routers = nn.ModuleList([nn.Linear(width, num_experts) for _ in range(num_layers)])
        self.layer_scales = nn.Parameter(torch.randn(num_layers))

    def forward(self, whisper_encoder: nn.Module, audio_input: Tensor, return_gating: bool = False) -> Any:
        x, gates_of_layers, outputs = audio_input, [], []
        for index, layer in enumerate(whisper_encoder.layers):
            h = layer(x)
            gates = F.softmax(self.routers[index](h), dim=-1)
            x = h + self.layer_scales[index] * torch.einsum("bte,ef->btf", gates, self.steering_vectors[index])
            outputs.append(x)
            gates_of_layers.append(gates)
        return (x, gates_of_layers, outputs) if return_gating else x


class WithAligner(nn.Module):
    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.whisper_encoder = SpeechEncoder(width, num_layers, False)
        self.aligner = LayerWiseAligner(width, num_layers, num_experts)

    def forward(self, x: Tensor, return_gating: bool = False) -> Any:
        return self.aligner(self.whisper_encoder, x, return_gating)[:2] if return_gating else self.aligner(self.whisper_encoder, x)


class Model(nn.Module):
    """The whole model: a steered encoder and the projection of what it returns."""

    def __init__(self, width: int, num_layers: int, num_experts: int) -> None:
        super().__init__()
        self.whisper_encoder = SingleRouterWhisper(width, num_layers, num_experts, pooling_position=num_layers)
        self.prompt_proj = nn.Linear(width, 5)

    def forward(self, x: Tensor, return_gating: bool = False) -> Any:
        if not return_gating:
            return self.prompt_proj(self.whisper_encoder._forward_with_steering(x))
        h, gates = self.whisper_encoder.tokenize_waveform(x, return_gating=True)
        return self.prompt_proj(h), gates


VERSIONS = [SingleRouterWhisper, EarlyWhisper, MultiRouterWhisper, SharedRouterWhisper, Conformer, SingleAligner, WithAligner, Model]
DRAWS = 16  # one draw's error, of a gradient of few numbers above all, is a matter of luck
WIDTH, LAYERS, EXPERTS = 12, 3, 4


def build(version: Any, width: int = WIDTH, layers: int = LAYERS, experts: int = EXPERTS) -> nn.Module:
    torch.manual_seed(0)
    return version(width, layers, experts)


def draw(width: int = WIDTH, frames: int = 7, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differentiate(model: nn.Module, x: Tensor) -> Results:
    """Output, gates, and every gradient of a loss that looks at both."""
    x = x.detach().requires_grad_()
    y, gates = model(x, return_gating=True)
    gates = [gates] if isinstance(gates, Tensor) else gates
    assert all(type(g) is Tensor for g in gates)
    loss = (y * torch.linspace(-1, 1, y.shape[-1]).to(y)).sum()
    for g in gates:
        loss = loss + (g * torch.linspace(0, 3, g.shape[-1]).to(g)).square().sum()
    wanted = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {"y": y.detach()} | {f"gates {i}": g.detach() for i, g in enumerate(gates)} | found


def assert_same(ours: Results, public: Results, tolerance: float = 1e-10) -> None:
    assert ours.keys() == public.keys()
    for name, value in public.items():
        assert ours[name].dtype == value.dtype
        largest = value.abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * max(1.0, largest))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every stream that goes through the fused operator."""
    shapes: list[tuple[int, ...]] = []
    steer = SF.steer
    monkeypatch.setattr(SF, "steer", lambda h, *args, **options: shapes.append(tuple(h.shape)) or steer(h, *args, **options))
    return shapes


# --- agreement --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "experts", "frames"), [(12, 4, 7), (33, 7, 1), (7, 1, 13)])
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_gates_and_every_gradient(version: Any, width: int, experts: int, frames: int, backend: str, device: torch.device) -> None:
    public = build(version, width, LAYERS, experts)
    ours = patch_steermoe(copy.deepcopy(public), backend=backend)
    exact = copy.deepcopy(public).double()

    def draws(model: nn.Module, dtype: torch.dtype) -> Results:
        model.to(device)
        return stack(differentiate(model, draw(width, frames, seed=seed).to(device, dtype)) for seed in range(DRAWS))

    assert_as_accurate(draws(ours, torch.float32), draws(public, torch.float32), draws(exact, torch.float64), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision(version: Any, dtype: torch.dtype) -> None:
    public = build(version).to(dtype)
    exact = copy.deepcopy(public).double()
    ours = patch_steermoe(copy.deepcopy(public))

    def draws(model: nn.Module, dtype: torch.dtype) -> Results:
        return stack(differentiate(model, draw(seed=seed).to(torch.bfloat16).to(dtype)) for seed in range(DRAWS))

    results, publics = draws(ours, dtype), draws(public, dtype)
    assert {name: value.dtype for name, value in results.items()} == {name: value.dtype for name, value in publics.items()}
    assert_as_accurate(results, publics, draws(exact, torch.float64), dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_one_fused_pass_a_layer(version: Any, passes: list) -> None:
    ours = patch_steermoe(build(version))
    expected = 1 if version is SingleAligner else LAYERS
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            ours(draw().float())
            ours(draw().float(), return_gating=True)
        assert len(passes) == 2 * expected and set(passes) == {(2, 7, WIDTH)}
        passes.clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_autocast(version: Any, passes: list) -> None:
    public = build(version)
    ours = patch_steermoe(copy.deepcopy(public))
    exact, x = copy.deepcopy(public).double(), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, publics = differentiate(ours, x.float()), differentiate(public, x.float())
    assert passes
    assert {name: value.dtype for name, value in results.items()} == {name: value.dtype for name, value in publics.items()}
    assert_as_accurate(results, publics, differentiate(exact, x), torch.bfloat16)


def test_the_weights_are_shared_and_keep_their_names() -> None:
    public = build(Model)
    parameters, names = list(public.parameters()), list(public.state_dict())
    assert patch_steermoe(public) is public
    assert all(mine is theirs for mine, theirs in zip(public.parameters(), parameters, strict=True))
    assert list(public.state_dict()) == names
    before = public(draw().float())
    with torch.no_grad():
        parameters[0].mul_(2)
    assert not torch.equal(public(draw().float()), before)


def test_training_follows_the_public_code() -> None:
    models = [build(Model).double()]
    models.append(patch_steermoe(copy.deepcopy(models[0])))
    losses = []
    for model in models:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for step in range(10):
            optimizer.zero_grad()
            loss = model(draw(seed=step)).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][0] != losses[0][-1]


def test_other_methods_of_the_public_code() -> None:
    public = build(SingleRouterWhisper)
    ours = patch_steermoe(copy.deepcopy(public))
    _, gates = ours(draw().float(), return_gating=True)
    _, expected = public(draw().float(), return_gating=True)
    mine, theirs = ours.get_steering_analysis(gates), public.get_steering_analysis(expected)
    assert mine["strength"] == pytest.approx(theirs["strength"], rel=1e-5) and mine["scales"] == theirs["scales"]


def test_empty_batches() -> None:
    public = build(EarlyWhisper).double()
    ours = patch_steermoe(copy.deepcopy(public))
    assert_same(differentiate(ours, draw(batch=0)), differentiate(public, draw(batch=0)))


# --- as an object -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(_saved(m), weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("version", [Model, MultiRouterWhisper])
def test_copies_are_patched_and_stand_alone(version: Any, twin: Callable[[nn.Module], nn.Module], passes: list) -> None:
    ours = patch_steermoe(build(version))
    other = twin(ours)
    y = ours(draw().float())
    passes.clear()
    assert torch.equal(other(draw().float()), y) and len(passes) == LAYERS
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(ours(draw().float()), y)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_patching_again_only_changes_the_backend() -> None:
    ours = patch_steermoe(build(Model))
    y, plain = ours(draw().float()), type(ours.whisper_encoder)
    assert patch_steermoe(ours, backend="reference") is ours
    assert type(ours.whisper_encoder) is plain and ours.whisper_encoder.router._backend == "reference"
    torch.testing.assert_close(ours(draw().float()), y, rtol=1e-4, atol=1e-4)


def test_two_models_are_patched_one_by_one(passes: list) -> None:
    first, second = build(Model), build(Model)
    patch_steermoe(first)
    second(draw().float())
    assert not passes


@pytest.mark.parametrize("model", [nn.Linear(3, 3), FusedSteerMoE(8), reference.SteerMoEAligner(8), nn.Sequential(FusedSteerMoE(8))])
def test_nothing_to_patch(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="holds no public SteerMoE code"):
        patch_steermoe(model)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn module, got dict"):
        patch_steermoe({})  # type: ignore[arg-type]
    model = build(Model)
    with pytest.raises(ValueError, match="unknown backend 'opencl'"):
        patch_steermoe(model, backend="opencl")
    assert type(model.whisper_encoder) is SingleRouterWhisper and type(model.whisper_encoder.router) is nn.Linear


# --- code that strays from the formula --------------------------------------------------------------------------------------------------
# A version of the loop's body is a function of the stream, the router and the vectors. Whatever it does, the patched router must give
# what a plain Linear gives: outputs, gradients, and errors.


def touched_logits(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    assert logits.shape == (2, 7, EXPERTS) and logits.dtype == x.dtype and logits.dim() == 3 and len(logits) == 2
    return x + s * torch.einsum("bte,ef->btf", F.softmax(logits, dim=-1), V)


def touched_gates(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    assert bool((gates.sum(-1) - 1 < 1e-6).all())
    return x + s * torch.einsum("bte,ef->btf", gates, V), gates


def gates_written_to(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    delta = torch.einsum("bte,ef->btf", gates, V)
    with torch.no_grad():
        gates.mul_(2)
    return x + s * delta.detach(), gates.detach()


def logits_written_to_through_a_slice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    part = logits[:, :, 1:3]
    logits *= 2
    return x + F.softmax(part, dim=-1) @ V[1:3]


def logits_sliced_then_written_to(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    part = logits[..., :3]
    gates = F.softmax(part, dim=-1)
    part += 1.0
    logits[..., 0] = 0.0
    return x + gates @ V[:3], logits, part


def temperature(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x) / 0.7, dim=-1), V)


def dropped_gates(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    torch.manual_seed(0)
    return x + s * torch.einsum("bte,ef->btf", F.dropout(F.softmax(router(x), dim=-1), 0.5), V)


def another_stream(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return 2 * x + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def equal_but_not_the_same(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x.clone() + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def another_dimension(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=1), V)


def every_spelling(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    first = x + torch.softmax(router(x), -1) @ V * s
    second = torch.add(torch.mul(torch.matmul(router(first).softmax(dim=2), V), s), first)
    third = 0.3 * torch.einsum("xyz, zw -> xyw", nn.Softmax(dim=-1)(router(second)[:, :, :]), V) + second
    return third, torch.einsum("bte,ef->btf", F.softmax(router(third), dim=-1), V) + third


def twice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    delta = s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)
    return x + delta, x + delta, x - delta, delta


def scaled_twice(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * (s * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V))


def a_scale_a_channel(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + V[0] * torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)


def with_alpha(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return torch.add(x, torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V), alpha=3)


def in_place(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    y = x * 1.0
    y += s * torch.einsum("bte,ef->btf", F.softmax(router(y.clone()), dim=-1), V)
    return y


def without_gradient(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    with torch.no_grad():
        gates = F.softmax(router(x), dim=-1)
    return x + s * torch.einsum("bte,ef->btf", gates, V)


def detached(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    return x + s * torch.einsum("bte,ef->btf", F.softmax(router(x).detach(), dim=-1), V)


def only_the_last_step_without_gradient(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    delta = torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V)
    with torch.no_grad():
        y = x + delta
    return y + delta


def stacked(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = [F.softmax(router(x * k), dim=-1) for k in (1, 2, 3)]
    mean = torch.stack(gates).mean(0)
    return x + s * mean @ V, torch.cat([gates[0], gates[2]], dim=-1)


def numbers(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    strongest = float(gates.detach().max()), gates[0, 0, 0].item(), gates.detach().numpy().sum(), [len(row) for row in gates]
    return x + sum(strongest[:3]) * torch.einsum("bte,ef->btf", gates, V)


def arithmetic(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    z = router(x)
    return (1 - z) ** 2 / (2 + z.abs()), -z, z - 1, z @ z.mT, z.mT @ z, (z > 0).to(z), z.exp().log(), 3.0 * z, z + z, abs(z), z[0], z[:, 1:]


def gates_for_another_stream(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    y = x + s * torch.einsum("bte,ef->btf", gates, V)
    return y + s * torch.einsum("bte,ef->btf", gates, V), gates


def rows_of_two_layers(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    y = x + F.softmax(logits[:, :, :2], dim=-1) @ V[:2]
    return x + F.softmax(logits[:, :, -2:], dim=-1) @ V[2:], y, logits


def strided_rows(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    logits = router(x)
    return x + F.softmax(logits[:, :, ::2], dim=-1) @ V[::2] + F.softmax(logits[:, 1:3, :], dim=-1).sum() + logits[None].sum()


def in_a_dict(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
    gates = F.softmax(router(x), dim=-1)
    y = x + s * torch.einsum("bte,ef->btf", gates, V)
    return {"y": y, "more": [{"gates": gates}, (gates, None)]}


STRAYS = [
    *(touched_logits, touched_gates, gates_written_to, logits_written_to_through_a_slice, logits_sliced_then_written_to, temperature),
    *(dropped_gates, another_stream, equal_but_not_the_same, another_dimension, every_spelling, twice, scaled_twice, a_scale_a_channel),
    *(with_alpha, in_place, without_gradient, detached, only_the_last_step_without_gradient, stacked, numbers, arithmetic),
    *(gates_for_another_stream, rows_of_two_layers, strided_rows, in_a_dict),
]


class Stray(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.steering_vectors = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.layer_scales = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Any:
        return self.body(x, self.router, self.steering_vectors, self.layer_scales)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    if isinstance(value, dict):
        return tensors(list(value.values()))
    assert value is None or type(value) is Tensor
    return [] if value is None else [value]


def everything(model: nn.Module) -> Results:
    x = draw().requires_grad_()
    outputs = tensors(model(x))
    loss = sum((output * torch.linspace(-1, 1, output.shape[-1]).to(output)).sum() for output in outputs)
    wanted = {"x": x} | dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {f"d {name}": gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}
    return {str(i): output.detach() for i, output in enumerate(outputs)} | found


@pytest.mark.parametrize("body", STRAYS, ids=lambda body: body.__name__)
def test_code_that_strays_from_the_formula(body: Any) -> None:
    public = Stray(body).double()
    ours = patch_steermoe(copy.deepcopy(public))
    assert_same(everything(ours), everything(public))
    with torch.no_grad():
        for mine, theirs in zip(tensors(ours(draw())), tensors(public(draw())), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        for mine, theirs in zip(tensors(ours(draw())), tensors(public(draw())), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_the_usual_spellings_are_fused(passes: list) -> None:
    patch_steermoe(Stray(every_spelling))(draw().float())
    assert len(passes) == 4


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (lambda x, router, V, s: router(x[..., :5]), RuntimeError),
        (lambda x, router, V, s: router(x[0, 0])[:, :, 0:2], IndexError),
        (lambda x, router, V, s: x + torch.einsum("bte,ef->btf", F.softmax(router(x), dim=-1), V[:2]), RuntimeError),
        (lambda x, router, V, s: x + F.softmax(router(x), dim=-1) @ V[:, :3], RuntimeError),
        (lambda x, router, V, s: x + F.softmax(router(x), dim=-1) @ V.float(), RuntimeError),
        (lambda x, router, V, s: F.softmax(router(x), dim=7), IndexError),
        (lambda x, router, V, s: router(x).no_such_thing, AttributeError),
    ],
)
def test_errors_of_the_public_code_stay_errors(body: Any, error: Any) -> None:
    public = Stray(body).double()
    with pytest.raises(error):
        public(draw())
    with pytest.raises(error):
        patch_steermoe(public)(draw())


@pytest.mark.parametrize("what", ["stream", "router", "vectors", "gates"])
def test_a_late_result_of_something_written_to_is_refused(what: str) -> None:
    def body(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Any:
        x = x.clone()
        gates = F.softmax(router(x), dim=-1)
        delta = torch.einsum("bte,ef->btf", gates, V)
        if what == "gates":
            gates = (x + delta, gates)[1]  # the sum gives the gates their value; the product stays open
        with torch.no_grad():
            {"stream": x, "router": router.weight, "vectors": V, "gates": gates}[what].mul_(2)
        return x + s * delta

    with pytest.raises(RuntimeError, match="changed in place after the router"):
        patch_steermoe(Stray(body))(draw().float())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_the_router_see_tensors(kind: str, passes: list) -> None:
    ours = patch_steermoe(build(EarlyWhisper).double())
    y = ours(draw())
    passes.clear()
    seen = []
    getattr(ours.router, f"register_{kind}_hook")(lambda module, *values: seen.append(values))
    again = ours(draw())
    again.sum().backward()
    assert len(seen) == LAYERS and not passes
    assert all(isinstance(value, (Tensor, tuple)) for values in seen for value in values)
    assert not any(isinstance(item, Expression) for values in seen for value in values if isinstance(value, tuple) for item in value)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)


def test_a_gate_kept_aside_behaves_as_a_tensor() -> None:
    """Outside of what a method returns, an expression may be met; it can be handled, stored and copied like the tensor it stands for."""
    model = Stray(lambda x, router, V, s: setattr(model, "kept", F.softmax(router(x), dim=-1)) or x)
    patch_steermoe(model)(draw().float())
    assert isinstance(model.kept, Expression)
    value = model.kept.tensor()
    assert torch.equal(pickle.loads(pickle.dumps(model.kept)), value)
    assert torch.equal(copy.deepcopy(model.kept.detach()), value)
    assert repr(model.kept) == repr(value)
    assert f"{model.kept.sum():.3f}" == f"{value.sum():.3f}"


def test_what_led_to_the_gates_is_let_go() -> None:
    kept: list[Any] = []

    def body(x: Tensor, router: Any, V: Tensor, s: Tensor) -> Tensor:
        gates = F.softmax(router(x), dim=-1)
        kept.append(gates)
        return x + s * torch.einsum("bte,ef->btf", gates, V)

    with torch.no_grad():
        patch_steermoe(Stray(body))(draw().float())
    held = [value for value in vars(kept[0]).values() if isinstance(value, (Tensor, Expression))]
    assert [tuple(value.shape) for value in held] == [(2, 7, EXPERTS)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    public = build(EarlyWhisper).double()
    found = []
    for model, recompute in ((patch_steermoe(copy.deepcopy(public)), True), (public, False)):
        x = draw().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


@pytest.mark.unpoisoned
def test_compiled_the_formula_runs_as_written() -> None:
    public = build(SingleRouterWhisper, layers=2)
    ours = patch_steermoe(copy.deepcopy(public))
    torch._dynamo.reset()
    try:
        torch.compile(copy.deepcopy(public), fullgraph=True, backend="aot_eager")(draw().float(), return_gating=True)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"this torch does not compile the public implementation: {str(error).splitlines()[0]}")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y, gates = compiled(draw().float(), return_gating=True)
    expected, expected_gates = public(draw().float(), return_gating=True)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gates, expected_gates, rtol=1e-4, atol=1e-4)


def test_a_router_of_another_kind_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    public = build(EarlyWhisper).double()
    public.router = Scaled(WIDTH, LAYERS * EXPERTS).double()
    with pytest.raises(ValueError, match="holds no public SteerMoE code"):
        patch_steermoe(public)
    model = nn.ModuleList([public, build(EarlyWhisper).double()])
    patch_steermoe(model)
    assert type(public.router) is Scaled and isinstance(model[1].router, PatchedRouter)
