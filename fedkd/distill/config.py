"""DistillConfig: all options of a distillation, flat, frozen and validated."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fedkd.core.options import MAX_PIXELS_TEXT, PRECISION_TEXT, RESIZE_TEXT, SKIP_TEXT, Options, in_sentences, option
from fedkd.core.values import (
    MAX_PIXELS,
    Momentum,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Processes,
    Rate,
    Repetitions,
    Resize,
    Seed,
    Several,
)

CLASSIC = "resnet20"  # the default teacher


@in_sentences
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DistillConfig(Options):
    """The options of ``fedkd.distill``, and the keys of its scenario files."""

    RESUMABLE = frozenset({"device", "precision", "data_dir", "checkpoint_every", "resume", "out", "json"})
    REASONS = dict.fromkeys(("epochs", "teacher_epochs"), "the learning rate of each epoch depends on it")

    teacher: Several = option(
        "",
        "Models",
        "Teachers (several, or a comma list): MODEL is trained here and cached; MODEL:pretrained=FILE is read from a "
        "state dict or safetensors; a run directory or a student's file is loaded, not trained. By default resnet20.",
        several=True,
    )
    teachers_from: str = option(
        "",
        "Models",
        "A directory of student files and run directories: they are ranked, and the best one is the teacher.",
    )
    student: str = option(
        "resnet8",
        "Models",
        "The student: cnn, resnet8, wrn-16-2, vit-tiny and others of fedkd.list, torchvision:NAME or user-defined; "
        "each optionally with pretrained=FILE.",
    )
    norm: Literal["group", "batch"] = option("batch", "Models", "Normalization layers of the built-in models.")

    loss: Several = option(
        "logits",
        "Losses",
        "Terms of the distillation loss, added (several): logits, features, relations, graph, contrastive, self, "
        "exits; each with options, such as logits:temperature=4,weight=0.9 or features:layers=layer2+layer3 "
        "(all: python -m fedkd.list distillation).",
        several=True,
    )
    loss_warmup: NonNegativeInt = option(
        0,
        "Losses",
        "Epochs N over which the weights of all terms rise linearly: in epoch e below N they are e / N of what they are"
        " later (20 in DKD's code); 0: they are constant.",
    )
    teacher_weighting: Literal["uniform", "entropy", "agreement"] = option(
        "uniform",
        "Losses",
        "Weights of several teachers for each image: equal (uniform), higher for a lower entropy of the prediction "
        "(entropy), or higher for a lower cross-entropy to the label (agreement).",
    )

    dataset: str = option("auto", "Data", "auto (CIFAR-10, else digits), or a data set as in fedkd.simulate.")
    shifted: str = option(
        "",
        "Data",
        "A data set of the same classes with shifted test images; by default the test images, rotated and translated.",
    )
    data_dir: str = option("", "Data", "Folder with torchvision's files, their archive, or parquet; also FEDKD_DATA.")
    validation: NonNegativeInt = option(
        1000,
        "Data",
        "Number of training images used for validation and for the ranking of teachers, not for training; at most a "
        "tenth of the training set; 0: all are trained on.",
    )

    resize: Resize = option("crop", "Data", RESIZE_TEXT)
    max_pixels: PositiveInt = option(MAX_PIXELS, "Data", MAX_PIXELS_TEXT)
    skip_damaged: bool = option(False, "Data", SKIP_TEXT)

    epochs: PositiveInt = option(30, "Training", "Epochs of a student, with a teacher or without.")
    teacher_epochs: NonNegativeInt = option(0, "Training", "Epochs of a teacher; 0 for the same as the student.")
    batch_size: PositiveInt = option(64, "Training", "Batch size.")
    learning_rate: Rate = option(0.05, "Training", "Initial learning rate (SGD).")
    schedule: str = option(
        "cosine",
        "Training",
        "How it changes: cosine, in every step, towards zero; after epochs step:milestones=150+180+210,gamma=0.1 or "
        "exponential:gamma=0.99; constant.",
    )
    momentum: Momentum = option(0.9, "Training", "Momentum.")
    weight_decay: NonNegativeFloat = option(0.0005, "Training", "Weight decay.")
    augment: bool = option(True, "Training", "Random crops, and flips if the data set allows them.")

    seed: Seed = option(0, "Run", "Seed of the first repetition.")
    seeds: Repetitions = option(1, "Run", "Number of repetitions, with seed, seed + 1, ...; all use the same teachers.")
    corrupted_images: NonNegativeInt = option(
        2000, "Run", "Number of test images that are corrupted for the evaluation; 0 for none."
    )
    device: str = option("auto", "Run", "auto, cpu, cuda, cuda:N.")
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = option("auto", "Run", PRECISION_TEXT)
    threads: Processes = option(1, "Run", "Threads of PyTorch; changing it can change the last bits of results.")
    checkpoint_every: NonNegativeInt = option(
        1, "Run", "Write a checkpoint every N epochs of a network, and after the last one; 0: never."
    )
    resume: str = option("", "Run", "Continue the run in this directory, with its options.")
    out: str = option("", "Run", "Run directory; by default runs/NAME-TIME-HASH.")
    json: bool = option(False, "Run", "Print result.json on standard output, and everything else on standard error.")
