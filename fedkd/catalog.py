"""The components that can be named on the command line, and where each one lives.

Nothing is imported to look a name up. An installed package adds names by the entry-point groups
``fedkd.algorithm``, ``fedkd.aggregator``, ``fedkd.loss``, ``fedkd.model``, ``fedkd.dataset``,
``fedkd.proxy`` and ``fedkd.partitioner``.
"""

from __future__ import annotations

_PARTITIONERS = """
iid dirichlet inner-dirichlet pathological shard distribution size linear square exponential
id-to-size continuous natural-id grouped-natural-id
""".split()  # noqa: SIM905

CATALOG: dict[str, dict[str, str]] = {
    "algorithm": {
        "ensemble": "fedkd.algorithms.ensemble:Ensemble",
        "fedmd": "fedkd.algorithms.fedmd:FedMD",
        "dsfl": "fedkd.algorithms.dsfl:DSFL",
        "fedavg": "fedkd.algorithms.fedavg:FedAvg",
        "fedprox": "fedkd.algorithms.fedavg:FedProx",
        "local": "fedkd.algorithms.local:Local",
        "central": "fedkd.algorithms.local:Central",
    },
    "aggregator": {
        "mean-logits": "fedkd.ensembles:mean_logits",
        "mean-probs": "fedkd.ensembles:mean_probs",
        "era": "fedkd.ensembles:era",
        "entropy": "fedkd.ensembles:entropy",
        "variance": "fedkd.ensembles:variance",
    },
    "loss": {
        "kl": "fedkd.losses.logits:kl",
        "ce": "fedkd.losses.logits:cross_entropy",
        "mse": "fedkd.losses.logits:mse",
    },
    "model": {
        "cnn": "fedkd.models:cnn",
        "resnet8": "fedkd.models:resnet8",
        "resnet20": "fedkd.models:resnet20",
        "torchvision": "fedkd.models:torchvision",
    },
    "dataset": {
        "cifar10": "fedkd.data.sources:cifar10",
        "cifar100": "fedkd.data.sources:cifar100",
        "svhn": "fedkd.data.sources:svhn",
        "stl10": "fedkd.data.sources:stl10",
        "fashion-mnist": "fedkd.data.sources:fashion_mnist",
        "digits": "fedkd.data.sources:digits",
        "hf": "fedkd.data.sources:hf",
        "folder": "fedkd.data.sources:folder",
        "noise": "fedkd.data.sources:noise",
    },
    "partitioner": {name: f"fedkd.data.partitioners:{name.replace('-', '_')}" for name in _PARTITIONERS},
}
