"""The confusion matrix of a classifier, as a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def matrix(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """The number of images [classes, classes] of each class (rows) for which each class is predicted (columns)."""
    import torch

    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def as_csv(counts: Tensor, names: Sequence[str]) -> str:
    """The matrix with the names of the classes; classes without a name have their number."""
    titles = [*names, *map(str, range(len(names), len(counts)))]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class / predicted", *titles])
    writer.writerows([title, *row] for title, row in zip(titles, counts.tolist(), strict=True))
    return text.getvalue()
