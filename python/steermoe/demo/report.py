"""The demo's report: one HTML file with everything in it, pictures and sound included, that needs no network to be read; and its numbers
as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..error_rates import word_errors
from ..evaluation import Evaluation, Hypothesis

if TYPE_CHECKING:
    from .demonstration import DemoResult, Rival

__all__ = ["wer_by_voice", "write_numbers", "write_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #8884; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; border-radius: 4px; } audio { height: 2rem; vertical-align: middle; }
.big { font-size: 2.2rem; font-weight: 600; } .note { opacity: .75; }
"""


def write_report(result: DemoResult, path: Path) -> None:
    """Write ``path``, whole or not at all."""
    _write(path, _page(result))


def write_numbers(result: DemoResult, path: Path) -> None:
    """Write ``path``, JSON: each aligner's word error rates before and after, by voice, too; losses, seconds, versions, hypotheses."""
    sentence, question, expected, answer = result.question
    numbers = {
        "aligners": {rival.name: _numbers(rival) for rival in (result.steered, result.projection)},
        "question": {"sentence": sentence, "question": question, "expected": expected, "answer": answer},
        "backbones_bit_identical": result.preservation.passed,
        "training_step_seconds": result.timings,
        "seconds": result.seconds,
        "stages_begin": result.stages,
        "machine": result.machine,
    }
    # The hypotheses a line a clip: two aligners of one error rate need not have made the same errors.
    clips = ",\n  ".join(json.dumps(clip, ensure_ascii=False) for clip in _clips(result))
    _write(path, json.dumps(numbers, indent=1).removesuffix("\n}") + f',\n "held_out": [\n  {clips}\n ]\n}}\n')


def _clips(result: DemoResult) -> list[dict[str, str]]:
    """The held-out clips, each with what was said and what each aligner, trained, heard."""
    pairs = zip(result.steered.trained.hypotheses, result.projection.trained.hypotheses, strict=True)
    return [
        {
            "id": steered.id,
            "voice": str(steered.extra.get("voice", "?")),
            "said": steered.reference,
            result.steered.name: steered.hypothesis,
            result.projection.name: projection.hypothesis,
        }
        for steered, projection in pairs
    ]


def _numbers(rival: Rival) -> dict[str, Any]:
    def errors(evaluation: Evaluation) -> dict[str, Any]:
        assert evaluation.errors is not None
        wer = evaluation.errors.wer
        return {"wer": wer.rate, "interval": wer.interval, "words": wer.reference_length, "clips": len(evaluation.hypotheses)}

    return {
        "parameters": rival.parameters,
        "steps": rival.steps,
        "seconds": rival.seconds,
        "first_loss": rival.losses[0][1],
        "last_loss": rival.losses[-1][1],
        "untrained": errors(rival.untrained),
        "trained": errors(rival.trained) | {"wer_by_voice": wer_by_voice(rival.trained)},
    }


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def wer_by_voice(evaluation: Evaluation) -> dict[str, float]:
    """Word error rate of each voice's clips, the rows' ``voice``, in the order in which the voices come."""
    voices: dict[str, list[Hypothesis]] = {}
    for row in evaluation.hypotheses:
        voices.setdefault(str(row.extra.get("voice", "?")), []).append(row)
    return {
        voice: word_errors([r.reference for r in rows], [r.hypothesis for r in rows], normalization="basic").wer.rate
        for voice, rows in voices.items()
    }


def _page(result: DemoResult) -> str:
    rivals = (result.steered, result.projection)
    sentence, question, expected, answer = result.question
    preserved = result.preservation.passed
    fused, reference = result.timings.get("cpu"), result.timings.get("reference")
    parts = [
        "<h1>SteerMoE demo</h1>",
        f"<p class=big>{result.wer:.1%} word error rate</p>",
        f"<p>on {len(result.steered.trained.hypotheses)} clips by {len(wer_by_voice(result.steered.trained))} voices that neither the "
        f"encoder nor the aligner had heard, after {result.steered.seconds:.0f} s of training {result.steered.parameters:,} parameters; "
        f"{'both backbones are bit-identical to what they were' if preserved else '<b>a backbone has changed</b>'}.</p>",
        "<h2>Steered, and the projection alone</h2>",
        _table(["", "steered", "projection only"], _comparison(rivals)),
        "<p class=note>Same clips, same steps, same seed. Intervals are 95% bootstraps over clips.</p>",
        _image(_losses(rivals), "training loss of both"),
        "<h2>By voice</h2>",
        _image(_voices(rivals), "word error rate by voice"),
        "<h2>What was heard</h2>",
        _table(["voice", "said", "heard", ""], _examples(result)),
        "<h2>A question</h2>",
        f"<p>“{html.escape(sentence)}” — {html.escape(question)} <b>{html.escape(answer)}</b> "
        f"<span class=note>(expected: {html.escape(expected)})</span></p>",
        "<p class=note>The aligner was trained on transcription only; answering is what the frozen language model could do before.</p>",
    ]
    if result.usage is not None:
        parts += ["<h2>The router</h2>", _image(_router(result.usage), "load by layer and expert, and layer scales")]
    parts += ["<h2>Backbones</h2>", f"<pre>{html.escape(result.preservation.report())}</pre>"]
    parts += ["<h2>Time</h2>", _table(["", "seconds"], [[name, _number(f"{seconds:.3f}")] for name, seconds in _times(result)])]
    if fused and reference:
        parts.append(f"<p>The fused kernels make a training step {reference / fused:.2f} times as fast as the reference's here.</p>")
    parts.append(f"<p class=note>{html.escape(', '.join(f'{name} {value}' for name, value in result.machine.items()))}</p>")
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>SteerMoE demo</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang=en>{head}\n<body>\n{body}\n</body></html>\n"


def _comparison(rivals: Sequence[Rival]) -> list[list[str]]:
    def rate(evaluation: Evaluation) -> str:
        assert evaluation.errors is not None
        low, high = evaluation.errors.wer.interval
        return _number(f"{evaluation.errors.wer.rate:.1%} ({low:.1%} to {high:.1%})")

    return [
        ["trained parameters", *(_number(f"{rival.parameters:,}") for rival in rivals)],
        ["WER, untrained", *(rate(rival.untrained) for rival in rivals)],
        ["WER, trained", *(rate(rival.trained) for rival in rivals)],
        ["steps", *(_number(str(rival.steps)) for rival in rivals)],
        ["training", *(_number(f"{rival.seconds:.0f} s") for rival in rivals)],
        ["real-time factor of transcribing", *(_number(f"{rival.trained.real_time_factor:.3f}") for rival in rivals)],
    ]


def _examples(result: DemoResult, count: int = 6) -> Iterable[list[str]]:
    """One clip of each of some voices, wrong ones first: they say more."""
    seen: set[str] = set()
    rows = sorted(result.steered.trained.hypotheses, key=lambda row: row.reference == row.hypothesis)
    for row in rows:
        voice = str(row.extra.get("voice", "?"))
        if voice not in seen and len(seen) < count:
            seen.add(voice)
            yield [html.escape(voice), html.escape(row.reference), html.escape(row.hypothesis), _sound(Path(row.audio))]


def _times(result: DemoResult) -> list[tuple[str, float]]:
    names = list(result.stages)
    ends = [*list(result.stages.values())[1:], result.seconds]
    spent = [(name, end - result.stages[name]) for name, end in zip(names, ends, strict=True)]
    steps = [(f"one training step, {name} kernels", seconds) for name, seconds in result.timings.items()]
    return [*spent, ("all of it", result.seconds), *steps]


# --- pieces of HTML ---------------------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    lines += ["".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _number(text: str) -> str:
    return f"<td class=number>{html.escape(text)}</td>"


def _image(figure: Any, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _sound(path: Path) -> str:
    if not path.is_file():
        return ""
    return f'<audio controls src="data:audio/flac;base64,{base64.b64encode(path.read_bytes()).decode()}"></audio>'


# --- figures ----------------------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _losses(rivals: Sequence[Rival]) -> Any:
    figure = _figure(8, 3.2)
    axis = figure.subplots()
    for rival in rivals:
        axis.plot(*zip(*rival.losses, strict=True), label=rival.name)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.legend(frameon=False)
    return figure


def _voices(rivals: Sequence[Rival]) -> Any:
    rates = [wer_by_voice(rival.trained) for rival in rivals]
    voices = list(rates[0])
    figure = _figure(8, 0.8 + 0.38 * len(voices))
    axis = figure.subplots()
    for index, (rival, rate) in enumerate(zip(rivals, rates, strict=True)):
        places = [row + (index - 0.5) * 0.38 for row in range(len(voices))]
        axis.barh(places, [100 * rate.get(voice, 0.0) for voice in voices], 0.38, label=rival.name)
    axis.set_yticks(range(len(voices)), voices)
    axis.invert_yaxis()
    axis.set_xlabel("word error rate, %")
    axis.legend(frameon=False)
    return figure


def _router(usage: Any) -> Any:
    layers, experts = usage.load.shape
    figure = _figure(8, 1.2 + 0.45 * layers)
    heat, scales = figure.subplots(1, 2, width_ratios=[2, 1])
    image = heat.imshow(usage.load.numpy(), aspect="auto", cmap="viridis", vmin=0)
    heat.set(xlabel="expert", ylabel="layer", xticks=range(experts), yticks=range(layers), title="load")
    figure.colorbar(image, ax=heat)
    scales.barh(range(layers), usage.layer_scales.tolist())
    scales.invert_yaxis()
    scales.set(xlabel="layer scale", yticks=[])
    return figure
