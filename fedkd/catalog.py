"""The components that can be named on the command line, and where each one lives.

Nothing is imported to look a name up. An installed package adds names by the entry-point groups
``fedkd.algorithm``, ``fedkd.aggregator``, ``fedkd.codec``, ``fedkd.loss``, ``fedkd.model``, ``fedkd.dataset``,
``fedkd.distillation`` and ``fedkd.partitioner``.
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
        "nfdp": "fedkd.algorithms.fedmd:NFDP",
        "dsfl": "fedkd.algorithms.dsfl:DSFL",
        "cronus": "fedkd.algorithms.cronus:Cronus",
        "cfd": "fedkd.algorithms.cfd:CFD",
        "selective-fd": "fedkd.algorithms.selective:SelectiveFD",
        "density": "fedkd.algorithms.density:Density",
        "scarlet": "fedkd.algorithms.scarlet:Scarlet",
        "comet": "fedkd.algorithms.comet:COMET",
        "kt-pfl": "fedkd.algorithms.ktpfl:KTpFL",
        "fedgems": "fedkd.algorithms.fedgems:FedGEMS",
        "fedema": "fedkd.algorithms.fedema:FedEMA",
        "fd": "fedkd.algorithms.fd:FD",
        "fedproto": "fedkd.algorithms.fedproto:FedProto",
        "fedavg": "fedkd.algorithms.fedavg:FedAvg",
        "fedprox": "fedkd.algorithms.fedavg:FedProx",
        "fedavgm": "fedkd.algorithms.fedavg:FedAvgM",
        "mentor": "fedkd.algorithms.mentor:Mentor",
        "scaffold": "fedkd.algorithms.scaffold:Scaffold",
        "feddf": "fedkd.algorithms.feddf:FedDF",
        "fedbe": "fedkd.algorithms.feddf:FedBE",
        "fed-et": "fedkd.algorithms.feddf:FedET",
        "local": "fedkd.algorithms.local:Local",
        "central": "fedkd.algorithms.local:Central",
    },
    "aggregator": {
        "mean-logits": "fedkd.ensembles:mean_logits",
        "mean-probs": "fedkd.ensembles:mean_probs",
        "era": "fedkd.ensembles:era",
        "entropy": "fedkd.ensembles:entropy",
        "variance": "fedkd.ensembles:variance",
        "beta-era": "fedkd.ensembles:beta_era",
        "median": "fedkd.ensembles:median",
        "trimmed-mean": "fedkd.ensembles:trimmed_mean",
        "geometric-median": "fedkd.ensembles:geometric_median",
        "spectral": "fedkd.ensembles:spectral",
        "vote": "fedkd.ensembles:vote",
    },
    "loss": {
        "kl": "fedkd.losses.logits:kl",
        "ce": "fedkd.losses.logits:cross_entropy",
        "mse": "fedkd.losses.logits:mse",
        "dkd": "fedkd.losses.logits:dkd",
        "dist": "fedkd.losses.logits:dist",
        "standardized": "fedkd.losses.logits:standardized",
        "multi-level": "fedkd.losses.logits:multi_level",
        "rkd": "fedkd.losses.answers:rkd",
        "similarity": "fedkd.losses.answers:similarity",
        "correlation": "fedkd.losses.answers:correlation",
        "pkt": "fedkd.losses.answers:pkt",
    },
    "codec": {
        "float32": "fedkd.codecs:Float32",
        "float16": "fedkd.codecs:Float16",
        "bfloat16": "fedkd.codecs:BFloat16",
        "uint8": "fedkd.codecs:UInt8",
        "bits": "fedkd.codecs:Bits",
        "top": "fedkd.codecs:Top",
    },
    "distillation": {
        "logits": "fedkd.terms:Logits",
        "features": "fedkd.terms:Features",
        "relations": "fedkd.terms:Relations",
        "graph": "fedkd.terms:Graph",
        "contrastive": "fedkd.terms:Contrastive",
        "exits": "fedkd.terms:Exits",
        "self": "fedkd.terms:Itself",
    },
    "model": {
        "cnn": "fedkd.models:cnn",
        "resnet8": "fedkd.models:resnet8",
        "resnet20": "fedkd.models:resnet20",
        "resnet32": "fedkd.models:resnet32",
        "resnet56": "fedkd.models:resnet56",
        "vit-tiny": "fedkd.models:vit_tiny",
        "row-gru": "fedkd.models:row_gru",
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
