"""Speech through a steered Whisper encoder: read a recording, steer, pool, project, and compare with the plain reference.

    python examples/steer_speech.py FILE [--model tiny] [--weights PATH_OR_ID] [--experts 8] [--top-k 2] [--output-dim 896]

FILE is anything libsndfile reads (wav, flac, ogg, ...), at any rate and with any number of channels. Audio over 30 s is processed in pieces
of 30 s, as Whisper hears it; the last piece is padded with silence, and the features of the padding are dropped. Needs the extra `whisper`.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steermoe_kernels import FusedSteerMoE, reference, steer_encoder
from steermoe_kernels.backends import select_backend
from steermoe_kernels.choice import Shape

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

RATE = 16_000
PIECE = 30 * RATE
SAMPLES_PER_FRAME = 320  # of the encoder: a mel frame is 160 samples, and the second convolution halves their number
FRAMES = PIECE // SAMPLES_PER_FRAME
SEED = 0
REPEATS = 5  # of each timing

GEOMETRY = {  # width, layers, heads, mel bins
    "tiny": (384, 4, 6, 80),
    "base": (512, 6, 8, 80),
    "small": (768, 12, 12, 80),
    "medium": (1024, 24, 16, 80),
    "large-v2": (1280, 32, 20, 80),
    "large-v3": (1280, 32, 20, 128),
    "large-v3-turbo": (1280, 32, 20, 128),
}


class InputError(Exception):
    """Something the user gave will not do, in one sentence."""


# --- audio --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Audio:
    samples: Tensor  # (n,) float32, mono, at RATE
    rate: int  # Hz, of the file
    channels: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE


def read_audio(path: Path) -> Audio:
    """The file's channels averaged, and resampled to 16 kHz. `InputError` for a file that is missing, unreadable or empty."""
    import soundfile
    import soxr

    if not path.is_file():
        raise InputError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    try:
        samples, rate = soundfile.read(os.fsencode(path), dtype="float32", always_2d=True)  # (n, channels); a name may be no text
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path} cannot be read as audio: {error}") from error
    mono = soxr.resample(samples.mean(axis=1), rate, RATE) if len(samples) else samples[:, 0]
    if not len(mono):
        raise InputError(f"{path} holds no audio")
    found = torch.from_numpy(mono)
    if not found.isfinite().all():
        raise InputError(f"{path} holds samples that are not finite numbers")
    return Audio(found, rate, samples.shape[1])


def log_mel(audio: Audio, num_mels: int) -> Tensor:
    """openai-whisper's features of every piece of 30 s: (pieces, num_mels, 3000)."""
    import whisper

    pieces = [whisper.pad_or_trim(piece, PIECE) for piece in audio.samples.split(PIECE)]
    return torch.stack([whisper.log_mel_spectrogram(piece, num_mels) for piece in pieces])


# --- encoder ------------------------------------------------------------------------------------------------------------------------------


def load_encoder(model: str, weights: str | None) -> tuple[WhisperEncoder, str]:
    """transformers' Whisper encoder, frozen, and where its weights come from."""
    if weights is None:
        if model not in GEOMETRY:
            raise InputError(f"unknown model {model!r}: choose one of {', '.join(GEOMETRY)}")
        encoder, origin = random_encoder(model), f"whisper {model} with random weights, seed {SEED}: its features mean nothing"
    elif weights.endswith(".pt"):
        encoder, origin = openai_encoder(Path(weights)), f"the weights of {weights}"
    else:
        encoder, origin = pretrained_encoder(weights), f"the weights of {weights}"
    return encoder.eval().requires_grad_(False), origin


def random_encoder(model: str) -> WhisperEncoder:
    width, layers, heads, mels = GEOMETRY[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return _encoder(width, layers, heads, mels)


def pretrained_encoder(weights: str) -> WhisperEncoder:
    from transformers import WhisperModel

    try:
        return WhisperModel.from_pretrained(weights).encoder
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no Whisper weights can be loaded from {weights}: {_first_line(error)}") from error


# openai-whisper's names of an encoder's weights, part by part, and transformers' for the same
_RENAMED = {
    "blocks.": "layers.",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
    "ln_post": "layer_norm",
    "positional_embedding": "embed_positions.weight",
}


def openai_encoder(path: Path) -> WhisperEncoder:
    """The encoder in a ``.pt`` file of openai-whisper, as transformers' encoder."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        dims, state = saved["dims"], saved["model_state_dict"]
        encoder = _encoder(dims["n_audio_state"], dims["n_audio_layer"], dims["n_audio_head"], dims["n_mels"])
        found = {_renamed(key.removeprefix("encoder.")): tensor for key, tensor in state.items() if key.startswith("encoder.")}
        encoder.load_state_dict(found)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except Exception as error:  # unpickling can fail in any way
        raise InputError(f"{path} is not a checkpoint of openai-whisper: {_first_line(error)}") from error
    return encoder


def _renamed(key: str) -> str:
    for theirs, ours in _RENAMED.items():
        key = key.replace(theirs, ours)
    return key


def _encoder(width: int, layers: int, heads: int, mels: int) -> WhisperEncoder:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    sizes: dict[str, Any] = {"d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width}
    return WhisperEncoder(WhisperConfig(**sizes, num_mel_bins=mels))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- steering -----------------------------------------------------------------------------------------------------------------------------


class Fused:
    """The steered encoder: `steer_encoder`, then the aligner's projection."""

    def __init__(self, encoder: WhisperEncoder, aligner: FusedSteerMoE, pool_size: int) -> None:
        self.encoder, self.aligner = steer_encoder(_twin(encoder), aligner, pool="max", pool_size=pool_size), aligner

    def pooled(self, mel: Tensor) -> Tensor:
        return self.encoder(mel).last_hidden_state

    def __call__(self, mel: Tensor) -> Tensor:
        return self.aligner.project(self.pooled(mel))


class Plain:
    """The same with nothing fused: `reference.SteerMoEAligner` after every layer, by hooks."""

    def __init__(self, encoder: WhisperEncoder, aligner: reference.SteerMoEAligner, pool_size: int) -> None:
        self.encoder, self.aligner, self.pool_size = encoder, aligner, pool_size
        for index, layer in enumerate(encoder.layers):
            layer.register_forward_hook(lambda module, args, output, index=index: self._steered(output, index))

    def _steered(self, h: Tensor, layer: int) -> Tensor:
        y = self.aligner(h, layer)
        return reference.pool_frames(y, "max", self.pool_size) if layer == self.aligner.num_layers - 1 else y

    def __call__(self, mel: Tensor) -> Tensor:
        return self.aligner.project(self.encoder(mel).last_hidden_state)


def build(encoder: WhisperEncoder, arguments: argparse.Namespace) -> tuple[Fused, Plain, Plain]:
    """The fused one, the plain one, and the plain one in float64, all with the same weights."""
    settings = {"top_k": arguments.top_k, "output_dim": arguments.output_dim}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            aligner = FusedSteerMoE.for_encoder(encoder, arguments.experts, backend=arguments.backend, device="cpu", **settings)
        select_backend(arguments.backend, arguments.device, arguments.dtype)
        aligner.to(arguments.device)
        fused = Fused(encoder, aligner, arguments.pool_size)
    except (ValueError, RuntimeError) as error:
        raise InputError(_first_line(error)) from error
    plain = reference.SteerMoEAligner(aligner.feature_dim, aligner.num_experts, aligner.num_layers, **settings).to(arguments.device)
    plain.load_state_dict(aligner.state_dict())
    exact = Plain(copy.deepcopy(encoder).double(), copy.deepcopy(plain).double(), arguments.pool_size)
    return fused, Plain(_twin(encoder), plain, arguments.pool_size), exact


def _twin(encoder: WhisperEncoder) -> WhisperEncoder:
    """Another encoder with the very same weights."""
    return copy.deepcopy(encoder, memo={id(parameter): parameter for parameter in encoder.parameters()})


# --- measuring ----------------------------------------------------------------------------------------------------------------------------


def time_in_turns(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each, run one after the other `REPEATS` times."""

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for run in runs.values():
        seconds(run)
    durations: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            durations[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in durations.items()}


def kept_for_backward(run: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes of the storages that the backward of ``run`` holds on to, each once, parameters left out."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    there_anyway = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    del output
    return sum(size for pointer, size in saved.items() if pointer not in there_anyway)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


# --- command line -------------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="steer_speech.py", description="Speech through a steered Whisper encoder.")
    parser.add_argument("file", type=Path, metavar="FILE", help="a recording: wav, flac, ...")
    parser.add_argument("--model", default="tiny", help=f"geometry of the encoder where no weights are given: {', '.join(GEOMETRY)}")
    parser.add_argument("--weights", metavar="PATH_OR_ID", help="a folder or hub id for transformers, or a .pt file of openai-whisper")
    parser.add_argument("--experts", type=int, default=8, help="steering vectors a layer (default 8)")
    parser.add_argument("--top-k", type=int, help="experts used by a frame (default: all of them)")
    parser.add_argument("--output-dim", type=int, default=896, help="width of the language model (default 896)")
    parser.add_argument("--pool-size", type=int, default=4, help="frames pooled into one (default 4)")
    parser.add_argument("--backend", default="auto", help="auto, or one of steermoe_kernels.available_backends()")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the encoder (default float32)")
    arguments = parser.parse_args(argv)
    arguments.device, arguments.dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2, and one sentence, for anything given that will not do."""
    arguments = parse(argv)
    try:
        run(arguments)
    except InputError as error:
        print(f"steer_speech.py: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"steer_speech.py: {error.name} is not installed, and the extra `whisper` brings it", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU and a PyTorch that can use it")
    audio = read_audio(arguments.file)
    encoder, origin = load_encoder(arguments.model, arguments.weights)
    encoder.to(arguments.device, arguments.dtype)
    fused, plain, exact = build(encoder, arguments)
    aligner = fused.aligner
    mel = log_mel(audio, encoder.num_mel_bins).to(arguments.device, arguments.dtype)
    if not mel.isfinite().all():
        raise InputError(f"{arguments.file} holds samples too large for a log-mel spectrogram: they should lie between -1 and 1")

    say("audio", f"{audio.seconds:.2f} s, {audio.rate} Hz, {audio.channels} channel{'s' * (audio.channels > 1)}")
    say("resampled", f"{tuple(audio.samples.shape)} at {RATE} Hz")
    say("log-mel", f"{tuple(mel.shape)}: {len(mel)} piece{'s' * (len(mel) > 1)} of 30 s, the last padded with silence")
    say("encoder", f"{origin}; {aligner.num_layers} layers of width {aligner.feature_dim}")
    count = sum(parameter.numel() for parameter in aligner.parameters())
    routing = "dense" if arguments.top_k is None else f"top-{arguments.top_k}"
    say("aligner", f"{aligner.num_experts} experts a layer, {routing}, {count:,} parameters, untrained")
    shape = Shape(aligner.num_experts, FRAMES, aligner.feature_dim)  # a piece at a time
    backend = select_backend(arguments.backend, arguments.device, arguments.dtype, shape).__name__.rpartition(".")[2]
    say("runs on", f"{arguments.device}, {str(arguments.dtype).removeprefix('torch.')}, backend {backend}")
    with torch.no_grad():
        features = steer_pieces(fused, mel, -(-len(audio.samples) // SAMPLES_PER_FRAME), arguments.pool_size)
    say("projected", f"{tuple(features.shape)}: a frame for every {1000 * SAMPLES_PER_FRAME * arguments.pool_size // RATE} ms of audio")

    first = mel[:1]
    with torch.no_grad():
        truth = exact(first.double())
        errors = {name: relative_error(which(first), truth) for name, which in (("reference", plain), ("fused", fused))}
        seconds = time_in_turns({"reference": partial(plain, first), "fused": partial(fused, first)}, arguments.device)
    weights = [*encoder.parameters(), *aligner.parameters(), *plain.aligner.parameters()]
    kept = {name: kept_for_backward(partial(which, first), weights) for name, which in (("reference", plain), ("fused", fused))}
    print("the first piece, by the plain reference and fused:")
    say("error", f"reference {errors['reference']:.2e}, fused {errors['fused']:.2e}, against the reference in float64")
    ratio = seconds["reference"] / seconds["fused"]
    say("time", f"reference {1e3 * seconds['reference']:.1f} ms, fused {1e3 * seconds['fused']:.1f} ms: {ratio:.2f}x, medians of {REPEATS}")
    say(
        "kept",
        f"reference {kept['reference'] / 1e6:.1f} MB, fused {kept['fused'] / 1e6:.1f} MB, for backward, the encoder's share included",
    )


def steer_pieces(fused: Fused, mel: Tensor, frames: int, pool_size: int) -> Tensor:
    """Steer, pool and project every piece, and print the shapes of the first: (1, pooled frames of audio, output_dim)."""
    heard = []
    for index, piece in enumerate(mel.split(1)):
        with fused.aligner.record_gates() as gates:
            pooled = fused.pooled(piece)
        if index == 0:
            say("steered", f"{(*gates[0].shape[:2], pooled.shape[-1])} after each of {len(gates)} layers, gates {tuple(gates[0].shape)}")
            say("pooled", f"{tuple(pooled.shape)}, the maximum of {pool_size} frames, normalised")
        of_audio = min(frames - index * FRAMES, FRAMES)
        heard.append(fused.aligner.project(pooled)[:, : -(-of_audio // pool_size)])
    return torch.cat(heard, dim=1)


def say(what: str, text: Any) -> None:
    print(f"{what:<10} {text}")


if __name__ == "__main__":
    sys.exit(main())
