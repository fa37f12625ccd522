"""DistillConfig: everything a distillation depends on, flat, frozen and validated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from fedkd.core.config import Decay, Options, Rate, Several, option

CLASSIC = "resnet20"  # the teacher where none is named


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DistillConfig(Options):
    """The options of ``fedkd.distill``, and the keys of its scenario files."""

    teacher: Several = option(
        "",
        "Models",
        "Teachers (several, or a comma list): MODEL is trained here and kept; MODEL:pretrained=FILE is read from a "
        "state dict or safetensors; a run's directory or a student's file is taken as it is. By default resnet20.",
        several=True,
    )
    teachers_from: str = option(
        "", "Models", "A directory of students and runs: they are ranked before training, and the first one teaches."
    )
    student: str = option(
        "resnet8",
        "Models",
        "The student: cnn, resnet8, resnet20, resnet32, resnet56, vit-tiny, row-gru, torchvision:NAME, or your own.",
    )
    norm: Literal["group", "batch"] = option("batch", "Models", "Normalization layers of the built-in models.")

    loss: Several = option(
        "logits",
        "Losses",
        "What pulls the student, added up (several): logits, features, relations, graph, contrastive, self; each with "
        "kind=, weight= and options of its own, as logits:temperature=4,weight=0.9 or features:layers=layer2+layer3.",
        several=True,
    )
    teacher_weighting: Literal["uniform", "entropy", "agreement"] = option(
        "uniform",
        "Losses",
        "What each of several teachers weighs on an image: the same, more where it is certain, or more where it "
        "agrees with the label.",
    )

    dataset: str = option("auto", "Data", "auto (CIFAR-10, else digits), or a data set as fedkd.simulate names it.")
    shifted: str = option(
        "", "Data", "A data set of the same classes whose test images are shifted; by default ours, turned and moved."
    )
    data_dir: str = option("", "Data", "Where data is looked for: torchvision's files or parquet; also FEDKD_DATA.")
    validation: PositiveInt = option(
        1000, "Data", "Training images that nobody is trained on, a tenth at most: teachers are ranked by them."
    )

    epochs: PositiveInt = option(30, "Training", "Epochs of a student, with a teacher or without.")
    teacher_epochs: Annotated[int, Field(ge=0)] = option(
        0, "Training", "Epochs of a teacher; 0 for those of a student."
    )
    batch_size: PositiveInt = option(64, "Training", "Batch size.")
    learning_rate: Rate = option(0.05, "Training", "Learning rate (SGD) at the start; it falls to zero along a cosine.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "Training", "Momentum.")
    weight_decay: Decay = option(0.0005, "Training", "Weight decay.")
    augment: bool = option(True, "Training", "Random crops, and flips where the data allows them.")

    seed: Annotated[int, Field(ge=0)] = option(0, "Run", "Seed of the first repetition.")
    seeds: PositiveInt = option(1, "Run", "Repetitions, with seed, seed + 1, ...; the teachers stay.")
    judge: Annotated[int, Field(ge=0)] = option(
        2000, "Run", "Test images for each corruption and strength when students are judged; 0 to leave this out."
    )
    device: str = option("auto", "Run", "auto, cpu, cuda, cuda:N.")
    threads: PositiveInt = option(1, "Run", "Threads of arithmetic; results depend on it, to the bit.")
    out: str = option("", "Run", "Directory of the run; by default runs/NAME-TIME-HASH.")
    json: bool = option(False, "Run", "One JSON object on standard output, everything else on standard error.")
