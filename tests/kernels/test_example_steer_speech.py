"""examples/steer_speech.py on recordings and on a tone, and its one sentence for input that will not do."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

soundfile = pytest.importorskip("soundfile", reason="the example needs the extra `whisper`")
soxr = pytest.importorskip("soxr", reason="the example needs the extra `whisper`")
whisper = pytest.importorskip("whisper", reason="the example needs the extra `whisper`")
transformers = pytest.importorskip("transformers", reason="the example needs the extra `whisper`")

_ROOT = Path(__file__).parents[2]
_SPEECH = _ROOT.parent / "shared" / "data" / "speech"
MINI = (64, 2, 2, 80)  # a geometry that takes no time


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("steer_speech", _ROOT / "examples" / "steer_speech.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "steer_speech", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.GEOMETRY, "mini", MINI)
    monkeypatch.setattr(module, "REPEATS", 1)
    return module


def tone(path: Path, seconds: float, rate: int, channels: int = 1, subtype: str | None = None) -> Path:
    times = torch.arange(int(seconds * rate)) / rate
    wave = 0.3 * torch.sin(2 * torch.pi * 440 * times)
    soundfile.write(path, torch.stack([wave] * channels, 1).numpy(), rate, subtype=subtype)
    return path


def run(example: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """The lines it prints, by their first word."""
    assert example.main([str(argument) for argument in arguments]) == 0
    return {line.split()[0]: line.partition(" ")[2].strip() for line in capsys.readouterr().out.splitlines()}


def assert_sound(lines: dict[str, str]) -> None:
    """The fused features are as accurate as the reference's, and it keeps less for backward."""
    plain, fused = (float(number) for number in re.findall(r"\d\.\d+e-\d+", lines["error"]))
    assert fused <= 2 * plain
    plain, fused = (float(number) for number in re.findall(r"([\d.]+) MB", lines["kept"]))
    assert 0 < fused < plain
    assert re.fullmatch(r"reference [\d.]+ ms, fused [\d.]+ ms: [\d.]+x, medians of \d+", lines["time"])


def test_a_tone(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(example, capsys, tone(tmp_path / "tone.wav", 1.0, 22050), "--model", "mini", "--output-dim", 48)
    assert lines["audio"] == "1.00 s, 22050 Hz, 1 channel"
    assert lines["resampled"] == "(16000,) at 16000 Hz"
    assert lines["log-mel"].startswith("(1, 80, 3000): 1 piece")
    assert "random weights" in lines["encoder"] and "2 layers of width 64" in lines["encoder"]
    assert lines["steered"] == "(1, 1500, 64) after each of 2 layers, gates (1, 1500, 8)"
    assert lines["pooled"].startswith("(1, 375, 64)")
    assert lines["projected"].startswith("(1, 13, 48)")  # 50 frames hold the second
    assert_sound(lines)


def test_over_thirty_seconds_every_setting(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tone(tmp_path / "tone.flac", 30.5, 8000, channels=2, subtype="PCM_24")
    sizes = ["--experts", 5, "--top-k", 2, "--pool-size", 7, "--output-dim", 16]
    lines = run(example, capsys, path, "--model", "mini", "--backend", "reference", *sizes)
    assert lines["audio"] == "30.50 s, 8000 Hz, 2 channels"
    assert lines["log-mel"].startswith("(2, 80, 3000): 2 pieces")
    assert lines["aligner"].startswith("5 experts a layer, top-2")
    assert lines["runs"].endswith("backend reference")
    assert lines["pooled"].startswith("(1, 215, 64)")
    assert lines["projected"].startswith(f"(1, {215 + 4}, 16)")  # 25 frames hold the half second
    assert_sound(lines)


@pytest.mark.parametrize(
    "name, described", [("read/jfk.flac", "11.00 s, 44100 Hz, 2 channels"), ("fsdd/0_george_0.wav", "0.30 s, 8000 Hz, 1 channel")]
)
def test_a_recording(example: ModuleType, name: str, described: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = _SPEECH / name
    if not path.is_file():
        pytest.skip(f"the recordings are not here: {path}")
    lines = run(example, capsys, path, "--model", "tiny" if name.endswith("flac") else "mini")
    assert lines["audio"] == described
    assert_sound(lines)


def test_weights_of_transformers(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    width, layers, heads, mels = MINI
    config = transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        num_mel_bins=mels,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
    )
    model = transformers.WhisperModel(config)
    model.save_pretrained(tmp_path / "model")
    encoder, origin = example.load_encoder("tiny", str(tmp_path / "model"))
    assert torch.equal(encoder.conv1.weight, model.encoder.conv1.weight) and "random" not in origin
    lines = run(example, capsys, tone(tmp_path / "tone.wav", 0.5, 16000), "--weights", tmp_path / "model")
    assert "2 layers of width 64" in lines["encoder"] and "random" not in lines["encoder"]


def test_weights_of_openai_whisper(example: ModuleType, tmp_path: Path) -> None:
    width, layers, heads, mels = MINI
    dims = whisper.model.ModelDimensions(mels, 1500, width, heads, layers, 10, 4, width, 2, 1)
    model = whisper.model.Whisper(dims).eval()
    torch.nn.init.normal_(model.encoder.conv1.weight)
    torch.save({"dims": asdict(dims), "model_state_dict": model.state_dict()}, tmp_path / "mini.pt")
    encoder, _ = example.load_encoder("tiny", str(tmp_path / "mini.pt"))
    mel = torch.randn(1, mels, 3000)
    with torch.no_grad():
        torch.testing.assert_close(encoder(mel).last_hidden_state, model.encoder(mel))


def test_the_same_run_twice_prints_the_same_error(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tone(tmp_path / "tone.wav", 0.5, 16000)
    first, second = (run(example, capsys, path, "--model", "mini")["error"] for _ in range(2))
    assert first == second


def silence(folder: Path) -> Path:
    soundfile.write(folder / "empty.wav", torch.zeros(0).numpy(), 16000)
    return folder / "empty.wav"


def noise(folder: Path) -> Path:
    (folder / "text.wav").write_text("this is not audio")
    return folder / "text.wav"


def infinite(folder: Path) -> Path:
    soundfile.write(folder / "inf.wav", torch.full((1600,), torch.inf).numpy(), 16000, subtype="FLOAT")
    return folder / "inf.wav"


def loud(folder: Path) -> Path:
    soundfile.write(folder / "loud.wav", torch.full((1600,), 1e38).numpy(), 16000, subtype="FLOAT")
    return folder / "loud.wav"


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: folder / "none.wav", "there is no file"),
        (lambda folder: folder, "is no file"),
        (noise, "cannot be read as audio"),
        (silence, "holds no audio"),
        (infinite, "not finite"),
        (loud, "too large for a log-mel spectrogram"),
    ],
    ids=["missing", "folder", "text", "empty", "infinite", "loud"],
)
def test_audio_that_will_not_do(example: ModuleType, tmp_path: Path, make, said: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path)
    assert example.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and str(path) in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "gigantic"], "unknown model 'gigantic': choose one of tiny"),
        (["--model", "mini", "--top-k", "9"], "top_k must be between 1 and num_experts (8), got 9"),
        (["--model", "mini", "--experts", "0"], "num_experts must be at least 1, got 0"),
        (["--model", "mini", "--pool-size", "0"], "pool_size must be at least 1, got 0"),
        (["--model", "mini", "--output-dim", "0"], "output_dim must be at least 1, got 0"),
        (["--model", "mini", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["--weights", "/nowhere/weights.pt"], "there is no file /nowhere/weights.pt"),
    ],
)
def test_settings_that_will_not_do(
    example: ModuleType, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main([str(tone(tmp_path / "tone.wav", 0.1, 16000)), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_weights_that_will_not_do(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tone(tmp_path / "tone.wav", 0.1, 16000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pt").write_text("this is not a checkpoint")
    for weights, said in (("folder", "no Whisper weights can be loaded from"), ("text.pt", "is not a checkpoint of openai-whisper")):
        assert example.main([str(path), "--weights", str(tmp_path / weights)]) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.count("\n") == 1


def test_a_missing_package_is_named(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert example.main([str(tone(tmp_path / "tone.wav", 0.1, 16000))]) == 2
    assert "soxr is not installed" in capsys.readouterr().err
