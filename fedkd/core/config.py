"""Config: everything that a run depends on, flat, frozen and validated.

Scalars only, since Flower's run config holds nothing else; several values are one string, separated by spaces.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from fedkd.core import quotes
from fedkd.core.options import MAX_PIXELS_TEXT, PRECISION_TEXT, RESIZE_TEXT, SKIP_TEXT, Options, in_sentences, option
from fedkd.core.values import (
    MAX_PIXELS,
    Fraction,
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
    Workers,
)


@in_sentences
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Config(Options):
    """The options of ``fedkd.simulate``, the keys of a scenario file and of Flower's run config."""

    #: Options of the machine and of the output, on which no result depends but by rounding.
    MACHINE = frozenset(
        {"workers", "engine", "device", "client_timeout", "ray_address", "client_cpus", "client_gpus"}
        | {"precision"}  # what it is on the device may not differ in a resumed run (`environment.keep`)
        | {"data_dir", "checkpoint_every", "save", "resume", "out", "json", "tracker"}
    )
    RESUMABLE = MACHINE | {"rounds", "patience", "stop_when", "min_clients", "round_retries"}
    REASONS = dict.fromkeys(("rounds",), "the learning rate of each round depends on it")

    algorithm: str = option(
        "ensemble",
        "Methods",
        "The algorithm. Soft labels on a proxy set: ensemble, fedmd, nfdp, dsfl, cronus, cfd, selective-fd, density, "
        "scarlet, comet, kt-pfl, fedgems, fedema; no proxy set: fd, fedproto, fedtgp, fedgkt; weights: fedavg, "
        "fedprox, fedavgm, moon, fedntd, fedlmd, fedvls, feddistill-plus, fedgen, fedhkd, mentor, fml, fedkd-wu, "
        "scaffold, feddf, fedbe, fed-et; one-shot: dense, co-boosting; baselines: local, central (options of each: "
        "python -m fedkd.list algorithm).",
    )
    compare: Several = option(
        "", "Methods", "Further algorithms to compare on the same data, initial models and seeds.", several=True
    )
    aggregator: str = option(
        "mean-probs",
        "Methods",
        "How client logits are aggregated into the teacher: mean-logits, mean-probs, era, beta-era, entropy, variance, "
        "median, trimmed-mean, geometric-median, spectral, vote.",
    )
    loss: str = option(
        "kl",
        "Methods",
        "The distillation loss: kl, ce, mse, dkd, dist, standardized, multi-level; or kl plus relations between "
        "samples: rkd, similarity, correlation, pkt.",
    )
    weighting: Literal["uniform", "size"] = option(
        "uniform", "Methods", "Weights of the clients in the ensemble: uniform, or size, their numbers of samples."
    )
    temperature: Rate = option(1.0, "Methods", "The temperature of distillation, for teacher and student.")

    # The federation
    clients: PositiveInt = option(20, "Federation", "Number of clients.")
    rounds: PositiveInt = option(5, "Federation", "Number of rounds.")
    participation: Fraction = option(1.0, "Federation", "Fraction of the clients that are sampled in a round.")
    partitioner: str = option(
        "dirichlet:alpha=0.5",
        "Federation",
        "How samples are assigned to clients: iid, dirichlet:alpha=A, pathological:classes=N, shard:shards=N, or "
        "./mine.py:Name (all: python -m fedkd.list partitioner).",
    )

    uplink_codec: str = option(
        "float32",
        "Federation",
        "How updates are encoded: float32, float16, bfloat16; soft labels also uint8, bits:bits=1, top:k=3; each "
        "optionally with coder=zstd (soft labels also coder=range) and delta=true.",
    )
    downlink_codec: str = option("float32", "Federation", "How messages to clients are encoded, as --uplink-codec.")

    # Data
    dataset: str = option(
        "auto",
        "Data",
        "auto (CIFAR-10, else digits), cifar10, cifar100, svhn, stl10, fashion-mnist, mnist, emnist:part=letters, "
        "digits, noise, folder:PATH, hf:NAME (a table), ./mine.py:Name.",
    )
    data_dir: str = option("", "Data", "Folder with torchvision's files, their archive, or parquet; also FEDKD_DATA.")
    proxy: str = option(
        "holdout",
        "Data",
        "The public unlabeled proxy set: holdout:size=N, cifar100:size=N, any data set, noise:size=N.",
    )
    proxy_samples: NonNegativeInt = option(0, "Data", "Proxy samples per round, drawn anew in each round; 0 for all.")
    validation: NonNegativeInt = option(
        0, "Data", "Samples held out of the private training data, to evaluate the student in each round; 0: none."
    )
    local_test: Momentum = option(
        0.0,
        "Data",
        "Share of each client's samples that is held out of its training, to evaluate its model on; 0: none.",
    )

    resize: Resize = option("crop", "Data", RESIZE_TEXT)
    max_pixels: PositiveInt = option(MAX_PIXELS, "Data", MAX_PIXELS_TEXT)
    skip_damaged: bool = option(False, "Data", SKIP_TEXT)

    # Models
    model: str = option(
        "cnn",
        "Models",
        "The clients' model: cnn, resnet8, resnet20, lenet, vit-tiny and others of fedkd.list, torchvision:NAME, "
        "or ./mine.py:Name; each optionally with pretrained=FILE; a comma-separated list is assigned round-robin.",
    )
    student: str = option("", "Models", "The server's global student; by default the clients' (first) model.")
    norm: Literal["group", "batch"] = option("group", "Models", "Normalization layers of the built-in models.")

    # Training
    local_epochs: PositiveInt = option(2, "Training", "Epochs of local training in a round.")
    local_steps: NonNegativeInt = option(
        0, "Training", "Batches of local training in a round, whatever --local-epochs is; 0: whole epochs."
    )
    batch_size: PositiveInt = option(32, "Training", "Batch size of local training.")
    optimizer: str = option(
        "sgd",
        "Training",
        "The optimizer of local training: sgd, sgd:nesterov=true, adam, adam:beta1=0.9,beta2=0.999, adamw.",
    )
    learning_rate: Rate = option(0.005, "Training", "Learning rate of local training.")
    schedule: str = option(
        "constant",
        "Training",
        "How it changes over rounds: constant, cosine, exponential:gamma=0.99, step:milestones=50+75,gamma=0.1.",
    )
    momentum: Momentum = option(0.9, "Training", "Momentum of local training (SGD).")
    weight_decay: NonNegativeFloat = option(0.0005, "Training", "Weight decay of local training.")
    clip_norm: NonNegativeFloat = option(
        0.0, "Training", "The largest norm of a client's gradient in local training; larger ones are scaled; 0: any."
    )
    label_smoothing: Momentum = option(
        0.0, "Training", "The share of a label that is spread over all classes in local training."
    )
    augment: bool = option(True, "Training", "Random crops, and flips where the data allows them, in local training.")
    distill_epochs: NonNegativeInt = option(5, "Training", "Epochs of distillation on the server in a round.")
    distill_steps: NonNegativeInt = option(
        0, "Training", "Batches of distillation on the server, whatever --distill-epochs is; 0: whole epochs."
    )
    distill_batch_size: PositiveInt = option(64, "Training", "Batch size of distillation, on server and clients.")
    distill_learning_rate: Rate = option(0.001, "Training", "Learning rate of distillation (Adam).")
    distill_schedule: str = option(
        "constant", "Training", "How it changes over the steps of a distillation on the server: as --schedule."
    )

    distill_patience: NonNegativeInt = option(
        0,
        "Training",
        "End a distillation on the server when its validation accuracy, measured every 100 steps, has not risen for N "
        "steps, and keep the best student; 0: never. Needs --validation.",
    )

    # The run
    seed: Seed = option(0, "Run", "Seed of the first repetition; all random numbers are derived from it.")
    seeds: Repetitions = option(1, "Run", "Number of repetitions, with seed, seed + 1, ...")
    device: str = option("auto", "Run", "auto, cpu, cuda, cuda:N.")
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = option("auto", "Run", PRECISION_TEXT)
    engine: Literal["local", "ray"] = option(
        "local", "Run", "The simulation backend: local processes, or Flower's simulation runtime on Ray."
    )
    threads: Processes = option(
        1, "Run", "Threads of PyTorch in each process; changing it can change the last bits of results."
    )
    workers: Workers = option("auto", "Run", "Processes that run clients in parallel; auto: as many as fit the cores.")
    client_timeout: NonNegativeFloat = option(
        0.0, "Run", "Time limit of a local update in seconds; it is retried once, then the client fails; 0: no limit."
    )
    ray_address: str = option(
        "", "Run", "With --engine ray: a running cluster (auto, HOST:PORT); by default one is started."
    )
    client_cpus: Rate = option(1.0, "Run", "With --engine ray: CPUs for each client.")
    client_gpus: NonNegativeFloat = option(
        0.0, "Run", "With --engine ray: GPUs, or a fraction of one, for each client."
    )
    faults: str = option(
        "",
        "Faults",
        "Simulated faults, as probabilities for a client in a round: dropout=0.3,straggler=0.2:slowdown=10,crash=0.05,"
        "corrupt=0.05; late=use: late updates count in the next round.",
    )
    round_timeout: NonNegativeFloat = option(
        0.0,
        "Faults",
        "Simulated time after which replies are late (1: a client with the mean number of samples); 0: no limit.",
    )
    min_clients: PositiveInt = option(1, "Faults", "The fewest updates with which a round continues.")
    round_retries: NonNegativeInt = option(
        0, "Faults", "How often a round with fewer updates is repeated with newly sampled clients; then the run ends."
    )
    exclude_after: NonNegativeInt = option(
        3, "Faults", "Exclude a client after so many refused replies in a row; 0: never."
    )
    evaluate_every: PositiveInt = option(
        1, "Run", "Evaluate clients and teacher on the test set every N rounds, and in the last one."
    )
    client_test_samples: NonNegativeInt = option(
        1000, "Run", "Test samples for the accuracy of clients and teacher, the same in every run; 0: all."
    )
    patience: NonNegativeInt = option(
        0, "Run", "End a run when its validation accuracy has not improved for N rounds; 0: never. Needs --validation."
    )
    stop_when: Several = option(
        "",
        "Run",
        "End a run after a round that meets one of these conditions on keys of rounds.jsonl: 'test_accuracy>=0.6'.",
        several=True,
    )
    checkpoint_every: NonNegativeInt = option(
        1, "Run", "Write a checkpoint every N rounds, and after the last one; 0: never."
    )
    save: Literal["student", "clients"] = option(
        "student", "Run", "Models that are written at the end: student (the global one), or clients: theirs as well."
    )
    resume: str = option("", "Run", "Continue the run in this directory, with its options; --rounds may be larger.")
    out: str = option("", "Run", "Run directory; by default runs/NAME-TIME-HASH.")
    tracker: Several = option(
        "",
        "Run",
        "Where rows of rounds.jsonl go besides: tensorboard, wandb, wandb:project=NAME, mlflow, ./mine.py:Name.",
        several=True,
    )
    json: bool = option(False, "Run", "Print result.json on standard output, and everything else on standard error.")

    @property
    def resumable(self) -> frozenset[str]:
        return self.RESUMABLE - ({"rounds"} if self.schedule == "cosine" else set())

    def run(self, algorithm: str, seed: int, dataset: str) -> Self:
        """The config of one run (one algorithm, one seed); ``dataset`` replaces auto."""
        return dataclasses.replace(self, algorithm=algorithm, seed=seed, dataset=dataset, compare="", seeds=1)

    def runs(self, dataset: str) -> list[Self]:
        """The config of each run: all algorithms for the first seed, then for the next."""
        algorithms = list(dict.fromkeys([self.algorithm, *quotes.split(self.compare)]))
        return [self.run(a, self.seed + r, dataset) for r in range(self.seeds) for a in algorithms]
