"""``MODEL_CARD.md``: a student's architecture, training and measurements, from recorded files only."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from fedkd.core import run_directory
from fedkd.core.report.grid import Grid
from fedkd.core.report.text import percent
from fedkd.data import pictures
from fedkd.export.check import grid

PRIVACY = "Only logits being shared is *not* a privacy guarantee. No formal privacy is claimed."


def card(report: dict[str, Any], trained: list[str]) -> str:
    """The model card of a report as Markdown; ``trained`` are lines about the training."""
    about = report["student"]
    pixels, classes = about["pixels"], about["classes"]
    named = f": {', '.join(about['names'])}, in this order" if about["names"] else ", numbered from 0"
    norm = ", BatchNorm" if about["norm"] == "batch" else ""
    files = {about["file"]: about, **{entry["file"]: entry for entry in report["files"].values()}}
    listed = Grid(
        ["file", "bytes", "sha256"],
        [[name, f"{entry['bytes']:,}", f"`{entry['sha256']}`"] for name, entry in files.items()],
        "",
    )
    return "\n".join(
        [
            f"# {about['model']} for {about['dataset']}",
            "",
            f"An image classifier written by fedkd {report['environment']['fedkd']}: `{about['model']}`{norm}, "
            f"{about['parameters']:,} parameters, {classes} classes{named}.",
            "",
            "## How it was trained",
            "",
            *trained,
            "",
            "## Input and output",
            "",
            f"- Input `pixels`: uint8 [N, {pixels}, {pixels}, 3], RGB, 0 to 255, not scaled; rows from the top.",
            f"- Pixels of an image: {pictures.words(pixels, about['resize'])}.",
            "- The file includes the scaling `(pixels - mean) / std` by channel, with mean "
            f"{about['mean']} and std {about['std']}.",
            f"- Output `logits`: float32 [N, {classes}]; softmax gives probabilities, the largest logit is the class.",
            *[f"- `{entry['file']}` takes one image per call." for entry in report["files"].values() if entry["batch"]],
            "",
            "## Measurements",
            "",
            *_measured(report),
            "",
            "## Files",
            "",
            listed.markdown().rstrip(),
            "",
            "## Limits",
            "",
            f"- {PRIVACY}",
            f"- It assigns every image to one of the {classes} classes of {about['dataset']}.",
            "- Probabilities are not calibrated, and no images from other sources were tested.",
            "- The publisher of the weights must state their license; the terms of the data set may apply.",
            "",
        ]
    )


def _measured(report: dict[str, Any]) -> list[str]:
    """The table of the check, if there was one, with the data and the machine."""
    if "original" not in report:
        return ["None: the files were written without a check (`--no-check`)."]
    checks = [entry["check"] for entry in report["files"].values() if entry["check"]]
    images = " or ".join(sorted({f"{check['images']:,} test images of {check['dataset']}" for check in checks}))
    environment = report["environment"]
    machine = f"{environment['processor']}, one thread, PyTorch {environment['torch']}"
    calibrated = [e for e in report["files"].values() if e["calibration_images"]]
    return [
        f"On {images}; latency on {machine}.",
        *(f"`{e['file']}` was calibrated on {e['calibration_images']} training images." for e in calibrated),
        "",
        grid(report).markdown(),
    ]


def trained(file: Path) -> list[str]:
    """Lines about a student's training, from the run directory of its file if there is one."""
    try:
        config = tomllib.loads((file.parent / "config.toml").read_text(encoding="utf-8"))
        result = json.loads((file.parent / "result.json").read_text(encoding="utf-8"))
        return (_distilled if "teacher" in config else _simulated)(config, result, file.name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return ["Unknown: the student is not in the directory of a finished run."]


def _simulated(config: dict[str, Any], result: dict[str, Any], name: str) -> list[str]:
    """For a run of ``fedkd.simulate``."""
    runs, last = result["runs"], name.replace("student-best", "student", 1)  # the name of the last round's student
    files = run_directory.student_files(runs)
    entry = next(run for run in runs if files.get((run["algorithm"], run["seed"])) == last)
    round_, accuracy = "the last round", entry["test_accuracy"]
    if name != last:
        round_, accuracy = f"round {entry['best_round']}, the best by validation accuracy", entry["best_test_accuracy"]
    return [
        f"- Method: `{entry['algorithm']}`, simulated by fedkd, {entry['rounds']} rounds, seed {entry['seed']}.",
        f"- Clients: {entry['clients']}, {percent(config['participation'], 0)} of them sampled per round, "
        f"partition `{config['partitioner']}`.",
        f"- Their models: `{config['model']}`, {config['local-epochs']} local epochs per round.",
        f"- Proxy set: `{config['proxy']}`.",
        f"- Accuracy after {round_}, as the run measured it on its test images: {percent(accuracy, 2)}.",
    ]


def _distilled(config: dict[str, Any], result: dict[str, Any], name: str) -> list[str]:
    """For a run of ``fedkd.distill``: ``student.safetensors`` is that of the first seed; other names have the seed."""
    model, _, seed = name.removesuffix(".safetensors").partition("-seed")
    entry = next(run for run in result["runs"] if run["seed"] == int(seed or config["seed"]))
    objective = f"by `{config['loss']}`" + (f" from {', '.join(result['teachers'])}" if result["teachers"] else "")
    return [
        f"- Trained by fedkd {'on labels only' if model == 'baseline' else objective}, "
        f"{config['epochs']} epochs, seed {entry['seed']}.",
        f"- Accuracy after the last epoch, as the run measured it on its test images: "
        f"{percent(entry['evaluation'][model]['accuracy'], 2)}.",
    ]
