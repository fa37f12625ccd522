"""The built-in components: their names on the command line, and where each one is defined.

Looking up a name imports nothing. An installed package adds names by the entry-point groups ``fedkd.algorithm``,
``fedkd.aggregator``, ``fedkd.codec``, ``fedkd.loss``, ``fedkd.model``, ``fedkd.dataset``, ``fedkd.distillation`` (loss
terms of fedkd.distill) and ``fedkd.partitioner``.
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
        "selective-fd": "fedkd.algorithms.selective_fd:SelectiveFD",
        "density": "fedkd.algorithms.density:Density",
        "scarlet": "fedkd.algorithms.scarlet:Scarlet",
        "comet": "fedkd.algorithms.comet:COMET",
        "kt-pfl": "fedkd.algorithms.kt_pfl:KTpFL",
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
        "fedbe": "fedkd.algorithms.fedbe:FedBE",
        "fed-et": "fedkd.algorithms.fed_et:FedET",
        "local": "fedkd.algorithms.local:Local",
        "central": "fedkd.algorithms.local:Central",
    },
    "aggregator": {
        "mean-logits": "fedkd.algorithms.aggregators:mean_logits",
        "mean-probs": "fedkd.algorithms.aggregators:mean_probs",
        "era": "fedkd.algorithms.aggregators:era",
        "entropy": "fedkd.algorithms.aggregators:entropy",
        "variance": "fedkd.algorithms.aggregators:variance",
        "beta-era": "fedkd.algorithms.aggregators:beta_era",
        "median": "fedkd.algorithms.aggregators:median",
        "trimmed-mean": "fedkd.algorithms.aggregators:trimmed_mean",
        "geometric-median": "fedkd.algorithms.aggregators:geometric_median",
        "spectral": "fedkd.algorithms.aggregators:spectral",
        "vote": "fedkd.algorithms.aggregators:vote",
    },
    "loss": {
        "kl": "fedkd.training.losses.logits:kl",
        "ce": "fedkd.training.losses.logits:cross_entropy",
        "mse": "fedkd.training.losses.logits:mse",
        "dkd": "fedkd.training.losses.logits:dkd",
        "dist": "fedkd.training.losses.logits:dist",
        "standardized": "fedkd.training.losses.logits:standardized",
        "multi-level": "fedkd.training.losses.logits:multi_level",
        "rkd": "fedkd.training.losses.output_relations:rkd",
        "similarity": "fedkd.training.losses.output_relations:similarity",
        "correlation": "fedkd.training.losses.output_relations:correlation",
        "pkt": "fedkd.training.losses.output_relations:pkt",
    },
    "codec": {
        "float32": "fedkd.communication.codecs:Float32",
        "float16": "fedkd.communication.codecs:Float16",
        "bfloat16": "fedkd.communication.codecs:BFloat16",
        "uint8": "fedkd.communication.codecs:UInt8",
        "bits": "fedkd.communication.codecs:Bits",
        "top": "fedkd.communication.codecs:Top",
    },
    "distillation": {
        "logits": "fedkd.training.terms:Logits",
        "features": "fedkd.training.terms:Features",
        "relations": "fedkd.training.terms:Relations",
        "graph": "fedkd.training.terms:Graph",
        "contrastive": "fedkd.training.terms:Contrastive",
        "exits": "fedkd.training.terms:Exits",
        "self": "fedkd.training.terms:BornAgain",
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
