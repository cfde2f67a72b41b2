"""`verify`: it passes for what is untouched in every architecture and dtype, and finds a single flipped bit wherever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import ALL_CLIPS, ANSWERS, MIXED, build

from steermoe import SteerMoEForConditionalGeneration
from steermoe.fingerprint import Fingerprint
from steermoe.loading import BackboneError
from steermoe.preservation import verify
from steermoe.run_checkpoints import CheckpointError

Folder = Callable[[str], Path]
PAIRS = [("whisper", "qwen2"), ("wav2vec2", "llama"), ("conformer", "mistral"), ("w2v_bert", "gemma"), ("whisper_generation", "gemma3")]


def flip(tensor: torch.Tensor, place: int = 5) -> None:
    """The lowest bit of one number."""
    bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    tensor.detach().view(bits).reshape(-1)[place] ^= 1


def alter(folder: Path, settings: dict[str, Any]) -> None:
    """Settings of the config in ``folder``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def trained(model: Any, processor: Any) -> Any:
    """The model after a few steps that move the aligner a lot."""
    optimizer = torch.optim.SGD(model.trained_parameters().values(), lr=0.5)
    model.train()
    for _ in range(2):
        model(**processor(MIXED, ALL_CLIPS, answers=ANSWERS)).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_a_trained_model_passes(kinds: tuple[str, str], dtype: torch.dtype, encoder_folder: Folder, language_model_folder: Folder) -> None:
    model = trained(*build(encoder_folder(kinds[0]), language_model_folder(kinds[1]), dtype=dtype))
    result = verify(model)
    assert result.passed, result.report()
    assert len(result.checks) == 8 and not result.faults
    assert "both backbones are untouched" in str(result) and str(encoder_folder(kinds[0])) in str(result)
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


def test_a_saved_model_passes(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    trained(*build(tiny_encoder, tiny_language_model)).save_pretrained(tmp_path)
    assert verify(tmp_path).passed and verify(str(tmp_path)).passed


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.mlp.down_proj.weight",
        "language_model.model.norm.weight",
        "language_model.model.rotary_emb.inv_freq",
        "encoder.layers.2.fc1.weight",
        "encoder.conv1.bias",
        "encoder.embed_positions.weight",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_flipped_bit_is_found_and_named(name: str, dtype: torch.dtype, tiny_encoder: Path, tiny_language_model: Path) -> None:
    model, _ = build(tiny_encoder, tiny_language_model, dtype=dtype)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    flip(tensors[name], place=1)
    result = verify(model)
    assert not result.passed
    part, tensor = name.split(".", 1)
    assert any(fault.startswith(f"{tensor} has 1 of ") for fault in result.faults), result.report()
    wrong = {check.name for check in result.checks if check.passed is False}
    assert f"{'language model' if part == 'language_model' else 'audio encoder'}: weights" in wrong
    assert "DIFFERS" in result.report() and "NOT shown to be untouched" in result.report()


def test_what_is_computed_shows_too(tiny_encoder: Path, tiny_language_model: Path) -> None:
    """Weights untouched, and yet other logits and other frames: as from a hook that someone has left behind."""
    model, _ = build(tiny_encoder, tiny_language_model)
    model.language_model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.001)
    model.encoder.layers[0].fc1.register_forward_hook(lambda module, args, output: output * 1.001)
    result = verify(model)
    assert {check.name for check in result.checks if not check.passed} == {
        "audio encoder, unsteered: output",
        "language model: text-only logits",
    }


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_a_backbone_that_changed_on_the_disk(kind: str, tmp_path: Path) -> None:
    """The model and the files agree, and are not what the aligner was trained for."""
    tiny_backbones.save_encoder(tmp_path / "audio")
    tiny_backbones.save_language_model(tmp_path / "text")
    build(tmp_path / "audio", tmp_path / "text")[0].save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / kind / "model.safetensors")
    name = {"audio": "encoder.layers.0.fc2.weight", "text": "model.layers.0.self_attn.q_proj.weight"}[kind]
    flip(weights[name])
    save_file(weights, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
    result = verify(tmp_path / "model")
    assert not result.passed and result.faults == [f"{name.removeprefix('encoder.')} has other values"]
    (wrong,) = [check for check in result.checks if not check.passed]
    assert wrong.name == f"{ {'audio': 'audio encoder', 'text': 'language model'}[kind] }: files and recorded fingerprint"


@pytest.mark.parametrize(
    ("kind", "altered", "faults"),
    [
        # The tensors of two heads of twice the size are the same.
        ("audio", {"encoder_attention_heads": 2}, ["setting encoder_attention_heads is 2 instead of 4"]),
        (
            "text",
            {"rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 5e3, "rope_type": "default"}},
            ["setting rms_norm_eps is 0.1 instead of 1e-06", "setting rope_parameters.rope_theta is 5000.0 instead of 10000.0"],
        ),
        (
            "text",
            {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            [
                "setting rope_parameters.rope_type is 'linear' instead of 'default'",
                "setting rope_parameters.factor is 2.0 instead of not set",
            ],
        ),
    ],
)
def test_a_backbone_whose_settings_changed_on_the_disk(kind: str, altered: dict[str, Any], faults: list[str], tmp_path: Path) -> None:
    """Every tensor is what it was, and another function is computed with them."""
    tiny_backbones.save_encoder(tmp_path / "audio")
    tiny_backbones.save_language_model(tmp_path / "text")
    build(tmp_path / "audio", tmp_path / "text")[0].save_pretrained(tmp_path / "model")
    alter(tmp_path / kind, altered)
    result = verify(tmp_path / "model")
    assert sorted(result.faults) == sorted(faults) and "NOT shown to be untouched" in result.report()
    (wrong,) = [check for check in result.checks if not check.passed]
    assert wrong.passed is False and wrong.name == f"{ {'audio': 'audio encoder', 'text': 'language model'}[kind] }: settings"
    with pytest.raises(
        CheckpointError, match=rf"for the {kind}_model .* has its weights under other settings: setting .*{faults[0][8:20]}"
    ):
        SteerMoEForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_settings_that_change_nothing_may_change(tmp_path: Path) -> None:
    tiny_backbones.save_encoder(tmp_path / "audio")
    tiny_backbones.save_language_model(tmp_path / "text")
    build(tmp_path / "audio", tmp_path / "text")[0].save_pretrained(tmp_path / "model")
    alter(tmp_path / "audio", {"dropout": 0.3, "decoder_layers": 0, "transformers_version": "4.30.0", "torch_dtype": "float16"})
    alter(tmp_path / "text", {"use_cache": False, "architectures": None, "attention_dropout": 0.2, "initializer_range": 1.0})
    result = verify(tmp_path / "model")
    assert result.passed, result.report()
    # Another version of transformers gave the language model a setting more, and one fewer.
    path = tmp_path / "model" / "fingerprints.json"
    recorded = json.loads(path.read_text())
    settings = recorded["text"]["settings"]
    settings |= {"transformers_version": "5.0.0", "of_old": 1}
    del settings["rms_norm_eps"]
    path.write_text(json.dumps(recorded))
    assert verify(tmp_path / "model").passed
    settings["transformers_version"] = transformers.__version__
    path.write_text(json.dumps(recorded))
    assert verify(tmp_path / "model").faults == [
        "setting of_old is not set instead of 1",
        "setting rms_norm_eps is 1e-06 instead of not set",
    ]


def test_heads_of_a_module_without_a_config() -> None:
    """As openai-whisper's encoders are."""

    class Attention(torch.nn.Linear):
        n_head = 4

    one, other = torch.nn.Sequential(Attention(8, 8)), torch.nn.Sequential(Attention(8, 8))
    other[0].n_head = 2  # type: ignore[assignment]
    assert Fingerprint.of(one).changed_settings(Fingerprint.of(other)) == ["setting 0.n_head is 2 instead of 4"]


def test_a_checkpoint_that_records_no_settings(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    """As they were before: the tensors alone."""
    build(tiny_encoder, tiny_language_model)[0].save_pretrained(tmp_path)
    path = tmp_path / "fingerprints.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({kind: entry["tensors"] for kind, entry in recorded.items()}))
    SteerMoEForConditionalGeneration.from_pretrained(tmp_path)
    result = verify(tmp_path)
    assert not result.passed and [check.name for check in result.checks if check.passed is not True] == [
        "audio encoder: settings",
        "language model: settings",
    ]
    assert "language model: settings: not compared (not recorded)" in result.report()


def test_untouched_backbones_elsewhere_or_gone(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "audio")
    model, _ = build(tmp_path / "audio", tiny_language_model)
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(BackboneError, match=r"the untouched backbone to compare with cannot be had: audio_model '.*audio' does not exist"):
        verify(model)
    assert verify(model, audio_model=tiny_encoder).passed


def test_a_module_of_no_origin_is_held_against_its_fingerprint(tiny_language_model: Path) -> None:
    torch.manual_seed(0)
    encoder = tiny_backbones.ENCODERS["whisper"][0]()
    model = SteerMoEForConditionalGeneration.from_backbones(encoder, tiny_language_model, dtype=torch.bfloat16)
    result = verify(model)
    assert not result.passed and [check.passed for check in result.checks] == [True, True, None, True, True, True, True]
    assert "not compared" in result.report() and "a module of no known origin" in result.report()
    flip(model.encoder.layers[1].fc1.weight)
    assert "layers.1.fc1.weight has other values" in verify(model).faults


def test_fingerprints() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 0))
    one = Fingerprint.of(module)
    assert one == Fingerprint.of(module) == Fingerprint.from_dict(json.loads(json.dumps(one.to_dict())))
    assert one.settings == {} and len(one.digest) == 64 and set(one.tensors) == set(module.state_dict())
    # Views, and tensors that are not contiguous, count by what they hold.
    module[0].weight.data = module[0].weight.data.T.contiguous().T
    assert Fingerprint.of(module).digest == one.digest
    half = Fingerprint.of(module.half())
    assert one.differences(half)[0] == "0.weight is float16 instead of float32"
    assert half.matching(module.float()) == half and half.matching(module) != one
    flip(module[0].bias, 0)
    assert half.differences(half.matching(module)) == []  # the bit that float16 does not hold
    flip(module[0].bias.data.view(torch.int16), 1)
    assert half.differences(half.matching(module)) == ["0.bias has other values"]
    del module[2]
    assert half.differences(half.matching(module))[:2] == ["2.weight is missing", "2.bias is missing"]
