"""Loading an aligner: our own state dicts, public checkpoints, files, and the ones that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steermoe_kernels import FusedSteerMoE, reference

WIDTH, EXPERTS, LAYERS, OUTPUT = 12, 4, 3, 7


def own_state(output_dim: int | None = OUTPUT, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    aligner = reference.SteerMoEAligner(WIDTH, EXPERTS, LAYERS, output_dim=output_dim)
    for parameter in aligner.parameters():
        nn.init.normal_(parameter)
    return aligner.state_dict()


def public_state(prefix: str = "whisper_encoder.", output_dim: int | None = OUTPUT) -> dict[str, Tensor]:
    """As the public implementation saves it: the aligner among the weights of both backbones."""
    own = own_state(output_dim)
    state = {prefix + "original_encoder.speech_encoder.layers.0.fc1.weight": torch.zeros(3, 3)}
    state |= {key if key.startswith("prompt_proj.") else prefix + key: tensor for key, tensor in own.items()}
    return state | {"llm_decoder.model.embed_tokens.weight": torch.zeros(5, 2), "llm_decoder.lm_head.weight": torch.zeros(5, 2)}


def aligner(**options: Any) -> FusedSteerMoE:
    return FusedSteerMoE(WIDTH, EXPERTS, LAYERS, **{"output_dim": OUTPUT} | options)


def assert_holds(fused: FusedSteerMoE, state: dict[str, Tensor]) -> None:
    assert fused.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in fused.state_dict().items())


@pytest.mark.parametrize("state", [own_state(), public_state(), public_state("conformer_encoder.")], ids=["own", "whisper", "conformer"])
def test_loading_into_an_aligner(state: dict[str, Tensor]) -> None:
    fused = aligner()
    fused.load_state_dict(state)
    assert_holds(fused, own_state())


@pytest.mark.parametrize("output_dim", [OUTPUT, None])
@pytest.mark.parametrize("prefix", ["", "whisper_encoder.", "conformer_encoder."])
def test_sizes_are_read_off_the_checkpoint(prefix: str, output_dim: int | None) -> None:
    state = public_state(prefix, output_dim) if prefix else own_state(output_dim)
    fused = FusedSteerMoE.from_checkpoint(state, top_k=2, dtype=torch.float64)
    assert (fused.feature_dim, fused.num_experts, fused.num_layers, fused.top_k) == (WIDTH, EXPERTS, LAYERS, 2)
    assert fused.steering_vectors.dtype == torch.float64
    assert (fused.prompt_proj is None) == (output_dim is None)
    assert all(torch.equal(value, own_state(output_dim)[key].double()) for key, value in fused.state_dict().items())


def test_a_reference_aligner_and_a_fused_one_load_each_other() -> None:
    plain = reference.SteerMoEAligner(WIDTH, EXPERTS, LAYERS, output_dim=OUTPUT)
    fused = aligner()
    fused.load_state_dict(plain.state_dict())
    assert_holds(fused, plain.state_dict())
    plain.load_state_dict(aligner().state_dict())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "aligner.pt", "model.safetensors"])
def test_files_and_folders(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(public_state(), path)
    else:
        torch.save(public_state(), path)
    assert_holds(FusedSteerMoE.from_checkpoint(str(path)), own_state())
    if name != "aligner.pt":
        assert_holds(FusedSteerMoE.from_checkpoint(str(tmp_path)), own_state())


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        FusedSteerMoE.from_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["aligner.bin", "aligner.safetensors"])
def test_a_file_that_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"rubbish")
    with pytest.raises(RuntimeError, match=re.escape(f"{file} cannot be read as a checkpoint: ")):
        FusedSteerMoE.from_checkpoint(str(file))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(RuntimeError, match=r"list\.pt must hold a state dict, it holds a list"):
        FusedSteerMoE.from_checkpoint(str(tmp_path / "list.pt"))


def test_sizes_are_the_checkpoints_to_say() -> None:
    with pytest.raises(TypeError, match=r"feature_dim must be left to the checkpoint, which says .*'feature_dim': 12"):
        FusedSteerMoE.from_checkpoint(own_state(), feature_dim=9)
    with pytest.raises(TypeError, match="steering_scale must be left to the checkpoint"):
        FusedSteerMoE.from_checkpoint(own_state(), steering_scale=3.0)


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in public_state().items() if not key.endswith(keys)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (without("layer_scales", "router.bias"), ["missing router.bias (12,)", "missing layer_scales (3,)"]),
        (without("prompt_proj.weight"), ["missing prompt_proj.weight (7, 12)"]),
        (own_state() | {"aligner.extra": torch.zeros(1), "more": torch.zeros(2)}, ["unknown aligner.extra", "unknown more"]),
        (
            public_state() | {"whisper_encoder.steering_vectors": torch.zeros(2, 4, 12), "prompt_proj.bias": torch.zeros(9)},
            [
                "steering_vectors must be (3, 4, 12), the checkpoint's is (2, 4, 12)",
                "prompt_proj.bias must be (7,), the checkpoint's is (9,)",
            ],
        ),
        (own_state() | {"layer_scales": 0.1}, ["layer_scales must be (3,), the checkpoint's is no tensor but a float"]),
        (
            {"router.weight": torch.zeros(1, 1), "stranger": torch.zeros(1)},
            ["missing steering_vectors (3, 4, 12)", "missing layer_scales (3,)", "unknown stranger", "router.weight must be (12, 12)"],
        ),
    ],
    ids=["missing", "missing projection", "unknown", "of another shape", "no tensor", "everything at once"],
)
def test_what_does_not_fit_is_named_in_one_message_and_nothing_is_loaded(state: dict[str, Tensor], words: list[str]) -> None:
    fused = aligner()
    before = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    with pytest.raises(RuntimeError, match="nothing was loaded") as caught:
        fused.load_state_dict(state)
    for word in words:
        assert word in str(caught.value)
    assert_holds(fused, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensor: tensor.to("meta"), "(12,) meta"),
        (lambda tensor: tensor.to_sparse(), "(12,) sparse_coo"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "(12,) quantized"),
        (lambda tensor: tensor.to(torch.complex64), "(12,) complex"),
    ],
    ids=["meta", "sparse", "quantized", "complex"],
)
def test_what_holds_no_numbers_to_copy(change: Callable[[Tensor], Tensor], word: str) -> None:
    fused = aligner()
    before = {key: tensor.clone() for key, tensor in fused.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    with pytest.raises(RuntimeError, match=re.escape(f"router.bias must be (12,), the checkpoint's is {word}")):
        fused.load_state_dict(state | {"router.bias": change(state["router.bias"])})
    assert_holds(fused, before)
    with pytest.raises(RuntimeError, match=re.escape(word)):
        FusedSteerMoE.from_checkpoint(state | {"router.bias": change(state["router.bias"])})


def test_meta_tensors_may_be_assigned() -> None:
    fused = aligner()
    fused.load_state_dict({key: tensor.to("meta") for key, tensor in fused.state_dict().items()}, assign=True)
    assert all(parameter.is_meta for parameter in fused.parameters())


@pytest.mark.parametrize("what", [None, "x", 3])
def test_no_state_dict(what: object) -> None:
    with pytest.raises(TypeError, match=f"state_dict must be a mapping of names to tensors, got {type(what).__name__}"):
        aligner().load_state_dict(what)  # type: ignore[arg-type]
    if not isinstance(what, str):
        with pytest.raises(TypeError, match=f"checkpoint must be a path or a state dict, got {type(what).__name__}"):
            FusedSteerMoE.from_checkpoint(what)  # type: ignore[arg-type]


def test_everything_that_cannot_be_an_aligners_is_named_at_once() -> None:
    state = own_state() | {"layer_scales": torch.zeros(5), "steering_vectors": torch.zeros(4, 12), "prompt_proj.weight": torch.zeros(7)}
    del state["router.bias"]
    with pytest.raises(RuntimeError, match="holds no aligner that can be loaded: ") as caught:
        FusedSteerMoE.from_checkpoint(state)
    for words in (
        "missing router.bias (layers * experts,)",
        "steering_vectors must be (layers, experts, width), the checkpoint's is (4, 12)",
        "prompt_proj.weight must be (output_dim, width), the checkpoint's is (7,)",
    ):
        assert words in str(caught.value)
    with pytest.raises(RuntimeError, match=r"missing router\.bias \(12,\); layer_scales must be \(3,\), the checkpoint's is \(5,\)"):
        FusedSteerMoE.from_checkpoint(without("router.bias") | {"whisper_encoder.layer_scales": torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r"steering_vectors must be \(layers, experts, width\), the checkpoint's is \(0, 4, 12\)"):
        FusedSteerMoE.from_checkpoint(own_state() | {"steering_vectors": torch.zeros(0, 4, 12)})


def test_a_checkpoint_with_two_aligners() -> None:
    with pytest.raises(RuntimeError, match=re.escape("under whisper_encoder. and conformer_encoder.")):
        aligner().load_state_dict(public_state() | public_state("conformer_encoder."))


@pytest.mark.parametrize("keys", [("steering_vectors",), ("router.weight", "layer_scales")])
def test_sizes_that_cannot_be_read(keys: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError, match="the checkpoint holds no aligner that can be loaded: missing") as caught:
        FusedSteerMoE.from_checkpoint(without(*keys))
    assert all(key in str(caught.value) for key in keys)


def test_vectors_of_another_rank() -> None:
    with pytest.raises(RuntimeError, match=re.escape("steering_vectors must be (layers, experts, width), the checkpoint's is (4, 12)")):
        FusedSteerMoE.from_checkpoint(public_state() | {"whisper_encoder.steering_vectors": torch.zeros(4, 12)})


@pytest.mark.parametrize(("key", "form"), [("steering_vectors", "(layers, experts, width)"), ("prompt_proj.weight", "(output_dim, 12)")])
def test_sizes_of_what_is_no_tensor(key: str, form: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"{key} must be {form}, the checkpoint's is no tensor but a str")):
        FusedSteerMoE.from_checkpoint(own_state() | {key: "?"})  # type: ignore[dict-item]


def test_what_does_not_fit_its_own_sizes() -> None:
    with pytest.raises(RuntimeError, match=r"router\.weight must be \(12, 12\), the checkpoint's is \(11, 12\)"):
        FusedSteerMoE.from_checkpoint(public_state() | {"whisper_encoder.router.weight": torch.zeros(11, 12)})


def test_loading_what_is_there_when_not_strict() -> None:
    fused = aligner()
    scales = fused.layer_scales.detach().clone()
    result = fused.load_state_dict(without("layer_scales"), strict=False)
    assert result.missing_keys == ["layer_scales"] and torch.equal(fused.layer_scales, scales)
    assert torch.equal(fused.steering_vectors, own_state()["steering_vectors"])


def test_an_aligner_inside_a_model_loads_as_any_module_does() -> None:
    model = nn.Sequential(aligner())
    model.load_state_dict({f"0.{key}": tensor for key, tensor in own_state().items()})
    assert_holds(model[0], own_state())
