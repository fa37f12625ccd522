"""What leaves a client, in words: the column "uplink" of docs/algorithms.md."""

from __future__ import annotations

_LOGITS = "logits on the proxy samples"
_PROBS = "probabilities on the proxy samples"
_WEIGHTS = "the weights of its model"
_STUDENT = "the weights of its copy of the student"

#: By the name of the method.
UPLOADS = {
    **dict.fromkeys(("ensemble", "fedmd", "nfdp", "fedgems", "fedema"), _LOGITS),
    **dict.fromkeys(("dsfl", "cronus", "comet", "kt-pfl"), _PROBS),
    "cfd": "1-bit soft labels of the proxy samples, delta and entropy encoded",
    "selective-fd": "one bit for each proxy sample, and probabilities on the samples that it selects",
    "density": "logits on the proxy samples, and client weights for them",
    "scarlet": "probabilities on the proxy samples whose soft label is missing or old",
    "fd": "its mean output for each label",
    "fedproto": "class means of its embeddings, and class counts",
    "fedtgp": "class means of its embeddings, and which classes it has",
    "fedgkt": "feature maps, logits and labels of its private samples",
    **dict.fromkeys(("fedavg", "fedprox", "fedavgm", "moon", "fedntd", "fedlmd", "fedvls"), _WEIGHTS),
    **dict.fromkeys(("feddf", "fedbe", "fed-et", "dense", "co-boosting"), _WEIGHTS),
    **dict.fromkeys(("mentor", "fml", "fedkd-wu"), _STUDENT),
    "feddistill-plus": "the weights of its model, and its mean output for each label",
    "fedgen": "the weights of its model, and class counts",
    "fedhkd": "the weights of its model, class means of its embeddings, its mean prediction for each label, and class "
    "counts",
    "scaffold": "the weights of its model, and the change of a control variate",
    "local": "nothing",
    "central": "nothing: one client holds the samples of all",
}


def upload(algorithm: str) -> str:
    """What a client of a method uploads; of a user-defined one, where that is declared."""
    return UPLOADS.get(algorithm.partition(":")[0], "what its upload_spec declares (a user-defined method)")
