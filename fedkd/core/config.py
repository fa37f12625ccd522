"""Config: everything a run depends on, flat, frozen and validated.

Scalars only, since that is all Flower's run config can carry; several values stand in one string,
separated by spaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from fedkd.core.errors import UsageError, unknown


def _joined(value: object) -> object:
    """A list, as a scenario file or repeated flags give it, as one string."""
    return " ".join(str(item) for item in value) if isinstance(value, list | tuple) else value


Several = Annotated[str, BeforeValidator(_joined)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Rate = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Decay = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]


def option(default: Any, group: str, text: str, several: bool = False) -> Any:
    """A field with its place and its text in ``--help``; ``several`` values may follow the flag."""
    return Field(default, description=text, json_schema_extra={"group": group, "several": several})


class Options:
    """What the configs of all commands have and can do."""

    out: str
    json: bool

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """A config from keys with dashes or underscores.

        Raises:
            UsageError: an unknown key or a value out of range, named in one sentence.

        """
        named = {key.replace("-", "_"): value for key, value in values.items()}
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in named:
            if key not in known:
                raise UsageError(unknown(f"key{source}:", key, known).replace("_", "-"))
        try:
            return TypeAdapter(cls).validate_python(named)
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0]).replace("_", "-")
            raise UsageError(f"--{key} {first['input']!r} is not usable: {first['msg'].lower()}.") from error

    def run_config(self) -> dict[str, str | int | float | bool]:
        """The same as Flower carries it: keys with dashes, scalars."""
        return {key.replace("_", "-"): value for key, value in dataclasses.asdict(self).items()}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Config(Options):
    """The options of ``fedkd.simulate``, the keys of a scenario file and of Flower's run config."""

    # What is compared
    algorithm: str = option(
        "ensemble",
        "Methods",
        "What clients and server do. Soft labels on the proxy: ensemble, fedmd, nfdp, dsfl, cronus, cfd, selective-fd, "
        "density, scarlet, comet, kt-pfl, fedgems, fedema; without a proxy: fd, fedproto; weights: fedavg, fedprox, "
        "fedavgm, mentor, scaffold, feddf, fedbe, fed-et; the ends of the scale: local, central.",
    )
    compare: Several = option(
        "", "Methods", "Further algorithms to play on the same data, students and seeds (several).", several=True
    )
    aggregator: str = option(
        "mean-probs",
        "Methods",
        "How the clients' logits become a teacher: mean-logits, mean-probs, era, beta-era, entropy, variance, median, "
        "trimmed-mean, geometric-median, spectral, vote.",
    )
    loss: str = option(
        "kl",
        "Methods",
        "What pulls a student to its teacher: kl, ce, mse, dkd, dist, standardized, multi-level; or kl and relations "
        "between images: rkd, similarity, correlation, pkt.",
    )
    weighting: Literal["uniform", "size"] = option(
        "uniform", "Methods", "Weights of the clients in the ensemble: uniform, or size, their numbers of samples."
    )
    temperature: Rate = option(1.0, "Methods", "Divides logits before the softmax, the teacher's and the student's.")

    # The federation
    clients: PositiveInt = option(20, "Federation", "Number of clients.")
    rounds: PositiveInt = option(5, "Federation", "Number of rounds.")
    participation: Fraction = option(1.0, "Federation", "Fraction of the clients that take part in a round.")
    partitioner: str = option(
        "dirichlet:alpha=0.5",
        "Federation",
        "How rows are dealt: iid, dirichlet:alpha=A, pathological:classes=N, shard:shards=N, ..., ./mine.py:Name.",
    )

    uplink_codec: str = option(
        "float32",
        "Federation",
        "How clients' answers are coded: float32, float16, bfloat16; soft labels also uint8, bits:bits=1, top:k=3; "
        "each with coder=zstd (labels: or range), delta=true.",
    )
    downlink_codec: str = option("float32", "Federation", "How what clients are sent is coded, as --uplink-codec.")

    # Data
    dataset: str = option(
        "auto",
        "Data",
        "auto (CIFAR-10, else digits), cifar10, cifar100, svhn, stl10, fashion-mnist, digits, noise, hf:NAME, "
        "folder:PATH.",
    )
    data_dir: str = option("", "Data", "Where data is looked for: torchvision's files or parquet; also FEDKD_DATA.")
    proxy: str = option(
        "holdout", "Data", "The public unlabeled images: holdout:size=N, cifar100:size=N, any dataset, noise:size=N."
    )
    proxy_samples: Annotated[int, Field(ge=0)] = option(
        0, "Data", "Proxy images used per round, drawn anew each round; 0 for all."
    )

    # Models
    model: str = option(
        "cnn", "Models", "The clients' model: cnn, resnet8, resnet20, torchvision:NAME; a comma list is dealt in turn."
    )
    student: str = option("", "Models", "The server's global student; by default the clients' (first) model.")
    norm: Literal["group", "batch"] = option("group", "Models", "Normalization layers of the built-in models.")

    # Training
    local_epochs: PositiveInt = option(2, "Training", "Epochs over its own rows that a client trains in a round.")
    batch_size: PositiveInt = option(32, "Training", "Batch size of local training.")
    learning_rate: Rate = option(0.01, "Training", "Learning rate of local training (SGD).")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "Training", "Momentum of local training.")
    weight_decay: Decay = option(0.0005, "Training", "Weight decay of local training.")
    augment: bool = option(True, "Training", "Random crops, and flips where the data allows them, in local training.")
    distill_epochs: Annotated[int, Field(ge=0)] = option(
        5, "Training", "Epochs over the proxy images in which the server distills its student in a round."
    )
    distill_batch_size: PositiveInt = option(
        64, "Training", "Batch size of distillation, on the server and on clients."
    )
    distill_learning_rate: Rate = option(0.001, "Training", "Learning rate of distillation (Adam).")

    # The run
    seed: Annotated[int, Field(ge=0)] = option(
        0, "Run", "Seed of the first repetition; everything random follows from it."
    )
    seeds: PositiveInt = option(1, "Run", "Repetitions, with seed, seed + 1, ...")
    device: str = option("auto", "Run", "auto, cpu, cuda, cuda:N.")
    engine: Literal["local", "ray"] = option(
        "local", "Run", "Who plays the clients: processes of fedkd's own, or Flower's simulation runtime on Ray."
    )
    threads: PositiveInt = option(1, "Run", "Threads of arithmetic; results depend on it, to the bit.")
    workers: Annotated[str, BeforeValidator(str), Field(pattern=r"^(auto|[1-9]\d*)$")] = option(
        "auto", "Run", "Processes that play clients side by side; auto: as many as the cores have room for."
    )
    client_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = option(
        0.0, "Run", "Seconds after which a client's turn is ended and tried once more; 0: no limit."
    )
    ray_address: str = option(
        "", "Run", "With --engine ray: a running cluster (auto, HOST:PORT); by default one is started."
    )
    client_cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = option(
        1.0, "Run", "With --engine ray: processors for each client's turn."
    )
    client_gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = option(
        0.0, "Run", "With --engine ray: GPUs, or a part of one, for each client's turn."
    )
    evaluate_every: PositiveInt = option(
        1, "Run", "Rounds between evaluations of clients and teacher on the test set; the last is always one."
    )
    out: str = option("", "Run", "Directory of the run; by default runs/NAME-TIME-HASH.")
    json: bool = option(False, "Run", "One JSON object on standard output, everything else on standard error.")

    def run(self, algorithm: str, seed: int, dataset: str) -> Self:
        """The config of one of the runs that this one compares; ``dataset`` is what auto came to."""
        return dataclasses.replace(self, algorithm=algorithm, seed=seed, dataset=dataset, compare="", seeds=1)

    def runs(self, dataset: str) -> list[Self]:
        """One config for each algorithm and seed, algorithms side by side within a seed."""
        algorithms = list(dict.fromkeys([self.algorithm, *self.compare.split()]))
        return [self.run(a, self.seed + r, dataset) for r in range(self.seeds) for a in algorithms]
