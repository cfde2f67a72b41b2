"""Configurations: what is shipped can be read, and every mistake is named with what would do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from steermoe.training_config import CONFIG_FOLDER, TrainingConfig, load_config, shipped_configs

PLAIN: dict[str, dict[str, Any]] = {
    "model": {"audio_model": "a", "text_model": "b"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "training": {"output_dir": "run"},
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, yaml.safe_dump(PLAIN))


def test_values_defaults_and_overrides(path: Path) -> None:
    config = load_config(path)
    assert config.model.num_experts == 8 and config.training.max_steps is None
    config = load_config(
        path,
        [
            "training.max_steps=100",
            "training.router_learning_rate=1e-3",
            "model.top_k=2",
            "model.pool=null",
            "training.bf16=true",
            "training.output_dir=a=b",
        ],
    )
    assert config.training.max_steps == 100 and config.training.bf16 is True and config.training.output_dir == "a=b"
    assert config.training.router_learning_rate == 1e-3 and isinstance(config.training.router_learning_rate, float)
    assert config.model.top_k == 2 and config.model.pool is None


def test_overrides_reach_into_mappings(path: Path) -> None:
    config = load_config(path, ["data.eval={path: x}", "data.eval.first=5", "data.train=[a, {path: b}]"])
    assert config.data.eval == {"path": "x", "first": 5} and config.data.train == ["a", {"path": "b"}]
    with pytest.raises(ValueError, match=r"data\.train is 'train\.jsonl' \(str\), which has no keys"):
        load_config(path, ["data.train.first=5"])


def test_what_is_saved_is_read_again(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["data.train={path: x, first: 5}", "training.z_loss_weight=0.5"])
    config.save(tmp_path / "again.yaml")
    again = load_config(tmp_path / "again.yaml")
    assert again == config and not again.differences(config)
    other = load_config(path, ["data.train={path: x, first: 6}", "training.z_loss_weight=0.5"])
    assert other.differences(config) == {"data.train": ({"path": "x", "first": 6}, {"path": "x", "first": 5})}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=1", r"unknown key training\.max_step \(did you mean 'max_steps'\?\)"),
        ("training.lr=1", r"unknown key training\.lr; training has output_dir, epochs"),
        ("modell.pool=max", r"unknown section 'modell'; a configuration has model, data, training \(did you mean 'model'\?\)"),
        ("max_steps=1", r"must be like training\.max_steps=100, got 'max_steps=1'"),
        ("training.max_steps", r"must be like training\.max_steps=100"),
        ("training.max_steps=many", r"training\.max_steps must be a whole number or null, got 'many' \(str\)"),
        ("training.max_steps=1.5", r"training\.max_steps must be a whole number or null, got 1\.5 \(float\)"),
        ("training.batch_size=null", r"training\.batch_size must be a whole number, got null"),
        ("training.batch_size=true", r"training\.batch_size must be a whole number, got True \(bool\)"),
        ("training.bf16=1", r"training\.bf16 must be true or false, got 1 \(int\)"),
        ("training.output_dir=3", r"training\.output_dir must be a text, got 3 \(int\)"),
        ("training.batch_size=0", r"training\.batch_size must be at least 1, got 0"),
        ("training.router_learning_rate=-1", r"training\.router_learning_rate must be at least 0, got -1\.0"),
        ("training.router_learning_rate=.nan", r"training\.router_learning_rate must be at least 0, got nan"),
        ("training.schedule=cosin", r"training\.schedule must be one of linear, cosine, constant, constant_with_warmup, got 'cosin'"),
        ("training.warmup_steps=10.5", r"training\.warmup_steps must be a whole number of steps, or a fraction"),
        ("training.early_stopping_patience=0", r"training\.early_stopping_patience must be at least 1"),
        ("model.top_k=9", r"model\.top_k must be at most num_experts \(8\), got 9"),
        ("model.pool=sum", r"model\.pool must be one of max, mean, null, got 'sum'"),
        ("model.frame_counts={layout: mel, kernels: 3}", r"model\.frame_counts must be FrameCounts, or a mapping"),
        ("model.dtype=bf16", r"model\.dtype must be one of float32, bfloat16, float16, got 'bf16'"),
        ("data.train=null", r"data\.train must be a path, a mapping with 'path', or a list of those, got null"),
        ("data.train=3", r"data\.train must be a path"),
        ("data.max_seconds=0", r"data\.max_seconds must be more than 0 seconds, or null"),
        ("data.task=translate", r"data\.task must be one of transcription, question, null"),
        ("training.seed=4294967296", r"training\.seed must be at most 4294967295, got 4294967296"),
        ("training.epochs=.inf", r"training\.epochs must be a finite number above 0, got inf"),
        ("training.epochs=.nan", r"training\.epochs must be a finite number above 0, got nan"),
        (f"training.epochs=1{'0' * 400}", r"training\.epochs must be a finite number above 0, got inf"),
        ("training.warmup_steps=.inf", r"training\.warmup_steps must be at least 0, got inf"),
        ("training.output_dir=conftest.py/run", r"training\.output_dir must be a folder, got 'conftest\.py/run'"),
        ("data.max_seconds=.inf", r"data\.max_seconds must be more than 0 seconds, or null"),
        ("data.train=[5]", r"data\.train must be a path, a mapping with 'path', or a list of those, got \[5\]"),
        ("data.eval=[a, {first: 3}]", r"data\.eval must be a path, a mapping with 'path', or a list of those"),
        ("data.train={path: 5}", r"data\.train must be a path, a mapping with 'path', or a list of those"),
        ("data.train=2024-13-45", r"the value of data\.train is not valid YAML: month must be in 1\.\.12"),
        ("data.language=klingon", r"data\.language must be a code like en, zh or yue, or an English name like German, got 'klingon'"),
        ("model=3", r"model must be a section with keys of its own, got 3"),
        ("training.max_steps=[1", r"not valid YAML"),
    ],
)
def test_a_mistake_is_named(path: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    if override == "model=3":
        path.write_text(yaml.safe_dump(PLAIN | {"model": 3}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_config(path)
    else:
        with pytest.raises(ValueError, match=message):
            load_config(path, [override])


def test_mistakes_that_hang_together(path: Path) -> None:
    rates = [f"training.{name}_learning_rate=0" for name in ("steering", "router", "projection")]
    with pytest.raises(ValueError, match="nothing would be trained"):
        load_config(path, rates)
    load_config(path, rates[:2])
    with pytest.raises(ValueError, match=r"training\.z_loss_weight must be 0 where training\.router_learning_rate is 0"):
        load_config(path, [rates[1], "training.z_loss_weight=0.1"])
    with pytest.raises(ValueError, match=r"early_stopping_patience must be null without data\.eval"):
        load_config(path, ["data.eval=null", "training.early_stopping_patience=3"])
    with pytest.raises(ValueError, match=r"training\.bf16 must be false where model\.dtype is float16 .*, got True"):
        load_config(path, ["model.dtype=float16", "training.bf16=true"])
    load_config(path, ["model.dtype=bfloat16", "training.bf16=true"])


def test_merge_keys(tmp_path: Path) -> None:
    text = """
    model: {audio_model: a, text_model: b, pool: mean}
    data: {train: x, eval: {<<: {path: y, first: 5}, first: 6}}
    training: {output_dir: z}
    """
    assert load_config(written(tmp_path, text)).data.eval == {"path": "y", "first": 6}
    chained = "a: &a {path: x}\nb: &b {<<: *a, path: y}\ndata: {train: {<<: *b, path: z}}\nmodel: {}\ntraining: {}"
    with pytest.raises(ValueError, match="unknown section 'a'"):
        load_config(written(tmp_path, chained))
    with pytest.raises(ValueError, match=r"line 1 is not valid YAML: the key 'b' comes twice"):
        load_config(written(tmp_path, "a: {<<: {b: 1}, b: 2, b: 3}"))


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml is not there; the configurations shipped by name are .*demo"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match="a folder, not a YAML file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.yaml must hold the sections model, data and training, got null"):
        load_config(written(tmp_path, ""))
    with pytest.raises(ValueError, match=r"config\.yaml, line 2 is not valid YAML"):
        load_config(written(tmp_path, "model: {}\ndata: ]"))
    with pytest.raises(ValueError, match=r"line 3 is not valid YAML: the key 'pool' comes twice"):
        load_config(written(tmp_path, "model:\n  pool: max\n  pool: mean\n"))
    with pytest.raises(ValueError, match=r"config\.yaml, line 1 is not valid YAML: found unhashable key"):
        load_config(written(tmp_path, "? [a]\n: 1\n"))
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML: unacceptable character #x0001"):
        load_config(written(tmp_path, "model: \x01"))
    (tmp_path / "config.yaml").write_bytes("model: {pool: größte}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML file in UTF-8: its byte 16 cannot be decoded"):
        load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml: missing model\.audio_model, model\.text_model"):
        load_config(written(tmp_path, "data: {train: x}\ntraining: {output_dir: y}"))
    with pytest.raises(ValueError, match=r"unknown section 'batch_size'.* belongs into the section 'training'"):
        load_config(written(tmp_path, "batch_size: 3"))


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_are_read_by_name(name: str) -> None:
    config = load_config(name, ["training.seed=3"])
    assert config.training.seed == 3
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_the_reference_explains_every_key_and_gives_its_default() -> None:
    text = (CONFIG_FOLDER / "reference.yaml").read_text(encoding="utf-8")
    explained = set(re.findall(r"^  (\w+): \S+ +# \w", text, re.MULTILINE))
    written, config = yaml.safe_load(text), load_config("reference")
    for name in ("model", "data", "training"):
        fields = dataclasses.fields(getattr(config, name))
        assert list(written[name]) == [field.name for field in fields] and explained.issuperset(written[name])
        for field in fields:
            if field.default is not dataclasses.MISSING:
                assert written[name][field.name] == field.default, field.name


def test_what_is_shipped() -> None:
    assert {"demo", "whisper-large-v3_qwen2.5-7b", "conformer_qwen2.5-3b"} <= set(shipped_configs())


@pytest.mark.parametrize("file", sorted((CONFIG_FOLDER / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    wanted = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert str(config.distributed_type).rpartition(".")[2] == wanted[file.stem]


def test_all_three_ways_to_many_devices_are_shipped() -> None:
    assert {file.stem for file in (CONFIG_FOLDER / "accelerate").glob("*.yaml")} == {"ddp", "fsdp", "deepspeed_zero2"}
