"""Saved models: what is in them, put together again, refused for other backbones, and whole whatever happens while saving."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
import transformers
from rich.console import Console
from safetensors import safe_open
from tiny_models import ALL_CLIPS, MIXED, build
from torch import nn

from steermoe import SteerMoEForConditionalGeneration, SteerMoEProcessor, saved_model
from steermoe.inspection import inspect
from steermoe.loading import BackboneError
from steermoe.run_checkpoints import SEAL, CheckpointError, seal, staging_folder, verify
from steermoe_kernels import FusedSteerMoE

Model = tuple[Any, Any]
FILES = {"README.md", "config.json", "fingerprints.json", "generation_config.json", "model.safetensors"}
load = SteerMoEForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def made(tiny_encoder: Path, tiny_language_model: Path) -> Model:
    return build(tiny_encoder, tiny_language_model, pool_size=3, top_k=2)


@pytest.fixture
def saved(made: Model, tmp_path: Path) -> Path:
    made[0].save_pretrained(tmp_path / "model")
    made[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def marked(model: Any, value: float) -> None:
    with torch.no_grad():
        model.aligner.layer_scales.fill_(value)


def mark(folder: Path) -> float:
    return load(folder).aligner.layer_scales[0].item()


def test_only_what_was_trained_is_saved(made: Model, saved: Path) -> None:
    model, _ = made
    assert FILES.issubset(path.name for path in saved.iterdir())
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.trained_parameters())
        assert sum(file.get_tensor(name).numel() for name in model.trained_parameters()) == sum(
            p.numel() for p in model.aligner.parameters()
        )
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "steermoe" and config["architectures"] == ["SteerMoEForConditionalGeneration"]
    assert config["audio_model"] == model.config.audio_model and config["text_fingerprint"] == model.fingerprints["text"].digest
    # The kernels' module alone reads it too.
    aligner = FusedSteerMoE.from_checkpoint(str(saved), top_k=2)
    assert all(torch.equal(value, model.aligner.state_dict()[name]) for name, value in aligner.state_dict().items())


def test_the_card_says_what_it_is(made: Model, saved: Path) -> None:
    card = (saved / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in made[0].aligner.parameters())
    assert card.startswith("---\nlibrary_name: steermoe\n") and f"| all | {parameters:,} |" in card
    assert made[0].config.audio_fingerprint in card and "top 2 routing" in card and "max of 3 frames" in card
    assert str(Path(made[0].config.audio_model).parent) not in card, "a card may be published, and folders are nobody's business"


@pytest.mark.parametrize("kind", [SteerMoEForConditionalGeneration, transformers.AutoModel], ids=["own", "auto"])
def test_put_together_again(kind: Any, made: Model, saved: Path) -> None:
    model, processor = made
    again, again_processor = kind.from_pretrained(saved), transformers.AutoProcessor.from_pretrained(saved)
    assert type(again) is SteerMoEForConditionalGeneration and type(again_processor) is SteerMoEProcessor
    batch = again_processor(MIXED, ALL_CLIPS)
    assert torch.equal(again(**batch).logits, model(**processor(MIXED, ALL_CLIPS)).logits)
    assert again.config.to_dict() == model.config.to_dict() | {"architectures": ["SteerMoEForConditionalGeneration"]} | {
        key: again.config.to_dict()[key] for key in ("_name_or_path", "transformers_version") if key in again.config.to_dict()
    }
    assert not again.training and set(again.trained_parameters()) == set(model.trained_parameters())


def test_auto_config(saved: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved)
    assert type(config).__name__ == "SteerMoEConfig" and (config.pool_size, config.top_k) == (3, 2)


def test_the_routers_top_k_is_no_setting_of_generation(saved: Path) -> None:
    """They share a name: transformers would warn that it may be ignored."""
    program = """
import sys
from steermoe import SteerMoEForConditionalGeneration
model = SteerMoEForConditionalGeneration.from_pretrained(sys.argv[1])
print(model.config.top_k, model.aligner.top_k, model.generation_config.top_k)
"""
    run = subprocess.run([sys.executable, "-c", program, str(saved)], capture_output=True, text=True, check=True)
    assert run.stdout == "2 2 None\n" and "top_k" not in run.stderr


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(stored: torch.dtype, tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    """The backbones come back in the dtype they were used in, or another that is asked for, and are known again in any."""
    model, processor = build(tiny_encoder, tiny_language_model, dtype=stored)
    model.save_pretrained(tmp_path)
    for wish, wanted in ((None, stored), ("auto", torch.float32), (torch.float16, torch.float16), ("bfloat16", torch.bfloat16)):
        again = load(tmp_path, **({} if wish is None else {"dtype": wish}))
        assert again.dtype == wanted == again.language_model.dtype and again.aligner.router.weight.dtype == torch.float32
    again = load(tmp_path, device="cpu")
    batch = processor(MIXED, ALL_CLIPS)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_generation_config_is_saved(
    in_place: bool, tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed, or another one."""
    model, processor = build(tiny_encoder, tiny_language_model)
    batch = processor(MIXED, ALL_CLIPS)
    model.save_pretrained(tmp_path / "model")
    if in_place:
        monkeypatch.chdir(tmp_path / "model")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.generation_config.max_new_tokens == 7 and again.generation_config is again.language_model.generation_config
    assert again.generate(**batch, eos_token_id=[]).shape == (4, 7)
    again.generation_config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=263)
    assert again.generate(**batch).shape[1] <= 3
    again.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").generation_config.eos_token_id == 263
    (tmp_path / "model" / "generation_config.json").unlink()
    assert load(tmp_path / "model").generation_config.max_new_tokens is None


def test_torch_dtype_is_dtype(saved: Path, tiny_encoder: Path, tiny_language_model: Path) -> None:
    """Its older name in transformers."""
    for again in (load(saved, torch_dtype=torch.bfloat16), transformers.AutoModel.from_pretrained(saved, torch_dtype="bfloat16")):
        assert again.dtype == torch.bfloat16 == next(again.language_model.parameters()).dtype
    assert load(saved, dtype=torch.float16, torch_dtype=torch.bfloat16).dtype == torch.float16
    new = SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tiny_language_model, torch_dtype=torch.bfloat16)
    assert new.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype must be a torch\.dtype, the name of one, or 'auto', got 'float33'"):
        load(saved, dtype="float33")


def test_arguments_that_do_not_exist(saved: Path, tiny_encoder: Path, tiny_language_model: Path) -> None:
    with pytest.raises(TypeError, match=r"^from_pretrained has no argument 'devcie' \(did you mean 'device'\?\)$"):
        load(saved, devcie="cpu")
    with pytest.raises(TypeError, match=r"^from_pretrained has no argument 'quantization_config'$"):
        transformers.AutoModel.from_pretrained(saved, quantization_config={})
    with pytest.raises(TypeError, match=r"^from_backbones has no argument 'nmu_experts' \(did you mean 'num_experts'\?\)$"):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tiny_language_model, nmu_experts=3)
    transformers.AutoModel.from_pretrained(saved, trust_remote_code=True, local_files_only=True, token=None, low_cpu_mem_usage=True)


def test_backbones_that_have_moved(made: Model, saved: Path, tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "moved")
    language_model = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model)
    again = load(saved, audio_model=tmp_path / "moved", text_model=language_model)
    assert again.config.audio_model == str(tmp_path / "moved") and again.language_model is language_model
    config = json.loads((saved / "config.json").read_text()) | {"audio_model": str(tmp_path / "gone")}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BackboneError, match=r"audio_model '.*gone' does not exist: give the id of a hub's repository or the path of a folder"
    ):
        load(saved)
    assert load(saved, audio_model=tiny_encoder).config.audio_model == str(tiny_encoder)


@pytest.mark.parametrize("kind", ["audio", "text"])
def test_other_backbones_are_refused_and_both_named(kind: str, made: Model, saved: Path, tmp_path: Path) -> None:
    """Same architecture and sizes, other weights: nothing but the fingerprint tells."""
    save = tiny_backbones.save_encoder if kind == "audio" else tiny_backbones.save_language_model
    other = save(tmp_path / "other", seed=5)
    own = getattr(made[0].config, f"{kind}_model")
    with pytest.raises(CheckpointError) as error:
        load(saved, **{f"{kind}_model": other})
    assert f"was trained for the {kind}_model {own!r} with fingerprint {made[0].fingerprints[kind].digest[:12]}" in str(error.value)
    assert f"{str(other)!r} has" in str(error.value) and "has other values and" in str(error.value)
    load(saved, **{f"{kind}_model": other}, check_backbones=False)


def test_a_backbone_of_another_size_is_refused(saved: Path, language_model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match=r"was trained for the text_model .* is missing|is not expected|has shape"):
        load(saved, text_model=language_model_folder("gemma"))


@pytest.mark.parametrize("bytes_left", [0, 7, 200, -1])
def test_cut_off_weights(bytes_left: int, saved: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:bytes_left])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors \({len(whole[:bytes_left])} bytes\) is cut off or damaged"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "fingerprints.json", "generation_config.json"])
def test_cut_off_text(name: str, saved: Path) -> None:
    (saved / name).write_text((saved / name).read_text()[:50])
    with pytest.raises(CheckpointError, match=f"{name} is cut off or damaged"):
        load(saved)
    (saved / name).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it holds no mapping"):
        load(saved)


def test_what_is_no_checkpoint(saved: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is of a 'whisper' model, not of a 'steermoe' one"):
        load(tiny_encoder)
    for name in FILES - {"README.md", "generation_config.json"}:
        folder = tmp_path / f"without-{name}"
        shutil.copytree(saved, folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"or an unfinished one: it has no {name}"):
            load(folder)


def test_weights_of_another_size(made: Model, saved: Path, tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    build(tiny_encoder, tiny_language_model, num_experts=7)[0].save_pretrained(tmp_path / "seven")
    shutil.copy(tmp_path / "seven" / "model.safetensors", saved)
    with pytest.raises(CheckpointError, match=r"does not fit its own config: .*steering_vectors must be \(3, 4, 32\)"):
        load(saved)


@pytest.fixture
def sealed(saved: Path) -> Path:
    """A saved model and processor, sealed as a training run seals its checkpoints."""
    checkpoint = saved.with_name("checkpoint-5")
    saved.rename(staging_folder(checkpoint))
    seal(checkpoint)
    return checkpoint


def flip(path: Path, place: int = -1) -> None:
    """Another value in one byte."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_the_seal_does_not_know_is_refused(sealed: Path) -> None:
    """A changed weight is a weight all the same: nothing but the recorded SHA-256 tells."""
    load(sealed), SteerMoEProcessor.from_pretrained(sealed)
    for name in ("model.safetensors", "fingerprints.json"):
        whole = (sealed / name).read_bytes()
        if name == "model.safetensors":
            flip(sealed / name)
        else:
            (sealed / name).write_text((sealed / name).read_text() + " ")
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or was changed: its SHA-256 is not the one in checkpoint\.json"):
            load(sealed)
        (sealed / name).write_bytes(whole)
    load(sealed)
    (sealed / "chat_template.jinja").write_text((sealed / "chat_template.jinja").read_text()[:40])
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is damaged or was changed"):
        SteerMoEProcessor.from_pretrained(sealed)
    (sealed / SEAL).write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged: it lists no files"):
        load(sealed)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("pool", "mean", "says pool 'mean', and checkpoint.json beside it 'max'"),
        ("top_k", 1, "says top_k 1, and checkpoint.json beside it 2"),
        ("renormalize", False, "says renormalize False, and checkpoint.json beside it True"),
        ("steering_scale", 0.5, "says steering_scale 0.5, and checkpoint.json beside it 1.0"),
        ("audio_token_id", 3, "says audio_token_id 3, and checkpoint.json beside it 260"),
        ("extra", 3, "says extra 3, and checkpoint.json beside it nothing"),
    ],
)
def test_an_altered_config_of_a_sealed_model_is_refused(key: str, value: Any, said: str, sealed: Path, tmp_path: Path) -> None:
    """But for where the backbones lie. Seals from before settings were in them say nothing of the config."""
    text = (sealed / "config.json").read_text()
    before = json.loads(text)
    (sealed / "config.json").write_text(json.dumps(before | {key: value}))
    with pytest.raises(CheckpointError, match=rf"{sealed / 'config.json'} {re.escape(said)}: one of them was altered$"):
        load(sealed)
    moved = shutil.copytree(before["audio_model"], tmp_path / "moved")
    (sealed / "config.json").write_text(json.dumps(before | {"audio_model": str(moved), "backend": "reference"}))
    assert load(sealed).config.audio_model == str(moved)
    verify(sealed)
    (sealed / "config.json").write_text(json.dumps(before | {key: value}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(said)}: one of them was altered$"):
        verify(sealed)
    content = json.loads((sealed / SEAL).read_text())
    del content["settings"]
    (sealed / SEAL).write_text(json.dumps(content))
    (sealed / "config.json").write_text(text)
    verify(sealed)
    (sealed / "config.json").write_text(json.dumps(before | {"steering_scale": 0.5}))
    load(sealed)
    with pytest.raises(CheckpointError, match="cut off or changed"):
        verify(sealed)


def test_a_model_saved_over_a_sealed_one_with_other_settings_is_no_longer_sealed(made: Model, sealed: Path) -> None:
    model = load(sealed)
    model.save_pretrained(sealed)
    assert (sealed / SEAL).exists()
    model.config.top_k = 1
    model.save_pretrained(sealed)
    assert not (sealed / SEAL).exists() and load(sealed).config.top_k == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_saved_over_a_sealed_one_is_no_longer_sealed(
    in_place: bool, made: Model, sealed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made[1].save_pretrained(sealed)
    assert (sealed / SEAL).exists(), "the same processor again leaves the seal true"
    before = made[0].aligner.layer_scales[0].item()
    if in_place:
        monkeypatch.chdir(sealed)
    marked(made[0], before + 1)
    made[0].save_pretrained(sealed)
    marked(made[0], before)
    assert not (sealed / SEAL).exists() and mark(sealed) == before + 1


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("steering_scale", "x", "steering_scale must be a number, got 'x'"),
        ("num_experts", 4.5, "num_experts must be a whole number, got 4.5"),
        ("top_k", "2", "top_k must be a whole number, got '2'"),
        ("audio_token_id", "260", "audio_token_id must be a whole number, got '260'"),
        ("audio_token_id", 3, "says audio_token_id 3, and tokenizer.json beside it 260: one of them was altered"),
        ("dtype", "banana", "dtype must be the name of a torch.dtype, as 'float32', got 'banana'"),
        ("audio_model", 5, "audio_model must be a string, got 5"),
        ("text_revision", 5, "text_revision must be a string, got 5"),
        ("renormalize", "yes", "renormalize must be true or false, got 'yes'"),
        ("pool_size", 0, "pool_size must be a whole number of at least 1, got 0"),
        ("pool_size", 8, "says pool_size 8, and processor_config.json beside it 3: one of them was altered"),
        ("audio_padding", "max_length", "says audio_padding 'max_length', and processor_config.json beside it 'longest'"),
    ],
)
def test_an_altered_config_is_named_with_its_key(key: str, value: Any, said: str, saved: Path) -> None:
    settings = json.loads((saved / "config.json").read_text()) | {key: value}
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"{saved / 'config.json'} .*{said}"):
        load(saved)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_a_processor_that_is_cut_off_or_not_there(name: str, saved: Path, tmp_path: Path) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{saved / name} is cut off or damaged: "):
        SteerMoEProcessor.from_pretrained(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"^{saved} holds no processor, or an unfinished one: it has no {name}$"):
        SteerMoEProcessor.from_pretrained(saved)
    for where in ("/nope", "./nope", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"^there is no processor at {where}$"):
            SteerMoEProcessor.from_pretrained(where)


def test_a_processor_without_a_feature_extractor(saved: Path) -> None:
    settings = json.loads((saved / "processor_config.json").read_text())
    del settings["feature_extractor"]
    (saved / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"its processor_config\.json describes no feature extractor$"):
        SteerMoEProcessor.from_pretrained(saved)
    settings["feature_extractor"] = {"feature_extractor_type": "NoSuchExtractor"}
    (saved / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"^{saved} holds no processor that can be loaded: "):
        SteerMoEProcessor.from_pretrained(saved)


def test_inspection_of_a_run_shorter_than_its_logs(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And names are shown as they are: brackets are no markup."""
    folder = saved.rename(saved.with_name("checkpoint[bold]-5"))
    config = json.loads((folder / "config.json").read_text()) | {"audio_model": "enc[red]oder"}
    (folder / "config.json").write_text(json.dumps(config))
    Console(width=200).print(inspect(folder))
    shown = capsys.readouterr().out
    assert "checkpoint[bold]-5" in shown and "enc[red]oder" in shown
    assert "no router statistics up to here, training writes them every training.logging_steps" in shown


# Saving


def test_other_files_stay(made: Model, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "runs" / "one").mkdir(parents=True)
    (saved / "runs" / "one" / "events").write_text("log")
    with open(saved / "runs" / "one" / "events", "a") as being_written:
        made[0].save_pretrained(saved)
        being_written.write(" goes on")
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "runs" / "one" / "events").read_text() == "log goes on"
    SteerMoEProcessor.from_pretrained(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_into_the_folder_one_is_in(made: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        made[0].save_pretrained(".")
        assert {path.name for path in Path(".").iterdir()} == FILES
    with pytest.raises(NotADirectoryError, match="is a file: give a folder to save to"):
        made[0].save_pretrained("config.json")


@pytest.mark.parametrize("failing", ["save_file", "model_card", "to_disk"])
def test_a_save_that_fails_leaves_the_previous_model(failing: str, made: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the weights, the card, or anything is written."""
    before, (model, _) = mark(saved), made
    files = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saved_model, failing, full)
        marked(model, before + 1)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(saved)
    marked(model, before)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_rename_that_fails_leaves_the_previous_model(calls: int, made: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename, seen = mark(saved), os.rename, []

    def failing(source: Any, target: Any) -> None:
        seen.append(source)
        if len(seen) == calls:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        marked(made[0], before + 1)
        with pytest.raises(OSError, match="Input/output"):
            made[0].save_pretrained(saved)
    marked(made[0], before)
    assert mark(saved) == before and [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["os.rename", "os.fsync", "saved_model.save_file"])
def test_a_process_killed_while_saving_leaves_the_previous_model(moment: str, saved: Path) -> None:
    """Killed at each call of the operation in turn, the first, the second, ...: what is loaded afterwards is one model or the other."""
    before = mark(saved)
    script = textwrap.dedent(
        f"""
        import os, signal, sys, torch
        from steermoe import SteerMoEForConditionalGeneration, saved_model
        folder, calls = sys.argv[1:]
        model = SteerMoEForConditionalGeneration.from_pretrained(folder)
        with torch.no_grad():
            model.aligner.layer_scales.fill_({before + 1})
        for call in range(1, int(calls) + 1):
            if os.fork() == 0:
                operation, seen = {moment}, []
                def killed(*args, **kwargs):
                    seen.append(args)
                    if len(seen) == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return operation(*args, **kwargs)
                {moment} = killed
                model.save_pretrained(folder)
                os._exit(0)
            os.wait()
            print(saved_model.read(folder).weights["layer_scales"][0].item())
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(saved), "8" if moment == "os.fsync" else "2"], capture_output=True, text=True, check=True
    )
    marks = [float(line) for line in run.stdout.split()]
    assert len(marks) == (8 if moment == "os.fsync" else 2) and set(marks) <= {before, before + 1}
    assert marks[0] == before
    assert mark(saved) in (before, before + 1)


# Backbones


def test_a_backbone_that_lacks_weights(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_language_model, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        BackboneError, match=r"text_model '.*cut' lacks weights of Qwen2ForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes((tiny_language_model / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(BackboneError, match=r"text_model '.*cut' cannot be loaded: "):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"audio_model '.*empty' cannot be loaded: "):
        SteerMoEForConditionalGeneration.from_backbones(tmp_path / "empty", tiny_language_model)


def test_a_language_model_without_a_tokenizer(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_language_model / name, tmp_path)
    with pytest.raises(BackboneError, match=r"text_model '.*' has no tokenizer that can be loaded"):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tmp_path)


def test_a_relative_folder_is_found_from_other_folders(
    tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the form that a hub's ids have, too."""
    shutil.copytree(tiny_encoder, tmp_path / "bb" / "enc")
    shutil.copytree(tiny_language_model, tmp_path / "bb" / "lm")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    language_model = transformers.AutoModelForCausalLM.from_pretrained("bb/lm")
    for text_model in ("bb/lm", language_model):
        model = SteerMoEForConditionalGeneration.from_backbones("bb/enc", text_model)
        assert (model.config.audio_model, model.config.text_model) == (str(tmp_path / "bb" / "enc"), str(tmp_path / "bb" / "lm"))
    model.save_pretrained("model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    load(tmp_path / "model")


@pytest.mark.parametrize("name", ["./enc", "~/enc", "bb/enc/", "a/b/enc", "bb\\enc", "bb/enc.pt", Path("bb/enc")], ids=str)
def test_a_path_that_is_not_there_is_said_at_once(name: Any, tiny_encoder: Path, tiny_language_model: Path) -> None:
    said = r"_model '.*enc.*' does not exist: give the id of a hub's repository or the path of a folder$"
    for make in (SteerMoEForConditionalGeneration.from_backbones, SteerMoEProcessor.from_backbones):
        for audio_model, text_model in ((name, tiny_language_model), (tiny_encoder, name)):
            with pytest.raises(BackboneError, match=said):
                make(audio_model, text_model)


def test_modules_of_no_origin_are_asked_for(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = tiny_backbones.ENCODERS["whisper"][0]()
    model = SteerMoEForConditionalGeneration.from_backbones(encoder, tiny_language_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say where its audio_model is, which was given as a module: give audio_model"):
        load(tmp_path)
    torch.manual_seed(0)
    assert isinstance(load(tmp_path, audio_model=tiny_backbones.ENCODERS["whisper"][0]()), nn.Module)
    with pytest.raises(CheckpointError, match=r"was trained for the audio_model 'given as a module' .*, and 'the module given' has"):
        load(tmp_path, audio_model=tiny_backbones.ENCODERS["whisper"][0]())
