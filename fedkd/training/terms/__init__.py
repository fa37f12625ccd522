"""The terms of a distillation loss: the layers of student and teacher, the loss between them, and its weight.

A term is a frozen dataclass of options that can be read before PyTorch is imported. ``build`` resolves its layers and
returns a `fedkd.training.terms.modules.TermModule`. The default weights are those of public code on CIFAR-100 (Tian et
al., 2020) where it has one, except for hint: with its weight of 100, small students diverged here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.core.errors import UsageError
from fedkd.core.values import Rate

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.training.terms.modules import TermModule

Weight = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LayerShapes:
    """What a term is built from: the layers of student and teachers with their shapes, and the labels [N].

    Shapes are those of the layers' outputs, without the batch dimension, in the order of computation.
    """

    student: Mapping[str, tuple[int, ...]]
    teachers: tuple[Mapping[str, tuple[int, ...]], ...]
    labels: Tensor


@dataclass(frozen=True)
class Term:
    """The base class of all terms."""

    needs_teacher: ClassVar[bool] = True

    def build(self, pair: LayerShapes) -> TermModule:
        """The module of the term for this student and these teachers.

        Raises:
            UsageError: a layer does not exist, or layers do not fit.

        """
        raise NotImplementedError


@dataclass(frozen=True)
class Logits(Term):
    """weight * T^2 * loss(student logits / T, teacher probs at T) (Hinton et al., 2015).

    ``kind`` is a value of ``--loss`` (kl, ce, mse, dkd, dist, ...), or ``logit-mse`` or ``logit-mae``, which compare
    logits. ``hard`` is the weight of the labels, by default 1 - ``weight``; ``soft`` is another name of ``weight``.
    """

    usual: ClassVar[float] = 0.9
    kind: str = "kl"
    temperature: Rate = 4.0
    weight: Weight | None = None
    soft: Weight | None = None
    hard: Weight | None = None

    def __post_init__(self) -> None:
        if self.soft is not None and self.weight is not None:
            raise ValueError("soft and weight are names of the same option; give one of them")

    def teacher_weight(self) -> float:
        """The weight of the loss between student and teacher."""
        return next(value for value in (self.soft, self.weight, self.usual) if value is not None)

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.LogitsTerm(self)


@dataclass(frozen=True)
class Features(Term):
    """Weight * the mean over layers of a loss between feature maps: hint (FitNets), attention, nst or vid.

    ``layers`` are names of layers of the student, joined by +. ``teacher`` are as many layers of the teacher, if their
    names differ. By default the last map of each.
    """

    kind: Literal["hint", "attention", "nst", "vid"] = "hint"
    layers: str = ""
    teacher: str = ""
    weight: Weight | None = None

    usual: ClassVar[Mapping[str, float]] = {"hint": 1.0, "attention": 1000.0, "nst": 50.0, "vid": 1.0}

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.FeaturesTerm(self, pair, *pairs(pair, self.layers, self.teacher, 1))


@dataclass(frozen=True)
class Relations(Term):
    """Weight * the mean over layers of a loss between relations of samples: rkd, similarity, correlation or pkt.

    Any two layers fit. By default the embeddings: the inputs of the last linear layer.
    """

    kind: Literal["rkd", "similarity", "correlation", "pkt"] = "rkd"
    layers: str = "embedding"
    teacher: str = ""
    weight: Weight | None = None

    usual: ClassVar[Mapping[str, float]] = {"rkd": 1.0, "similarity": 3000.0, "correlation": 100.0, "pkt": 30000.0}

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.RelationsTerm(self, *pairs(pair, self.layers, self.teacher, 1))


@dataclass(frozen=True)
class Graph(Term):
    """Weight * the loss between the instance relationship graphs of several layers (Liu et al., 2019).

    Vertices are the features of a sample, averaged over the map. By default the last three maps of student and teacher.
    """

    layers: str = ""
    teacher: str = ""
    weight: Weight = 1.0

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.GraphTerm(self, pair, *pairs(pair, self.layers, self.teacher, 3))


@dataclass(frozen=True)
class Contrastive(Term):
    """Weight * the contrastive loss of embeddings against samples of other classes (CRD: Tian et al., 2020)."""

    layers: str = "embedding"
    teacher: str = ""
    width: PositiveInt = 128
    negatives: PositiveInt = 1024
    temperature: Rate = 0.07
    weight: Weight = 0.8

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.ContrastiveTerm(self, pair, *pairs(pair, self.layers, self.teacher, 1))


@dataclass(frozen=True)
class Exits(Term):
    """Classifiers on earlier layers, distilled from the last layer (Be Your Own Teacher: Zhang et al., 2019).

    The sum over them of (1 - alpha) CE(labels) + alpha T^2 KL(last || exit) + feature * |f - embedding|^2, where f
    is the exit's input mapped to the embedding's width. The classifiers are dropped after training. By default there
    is one on every map but the last.
    """

    needs_teacher: ClassVar[bool] = False
    layers: str = ""
    alpha: Share = 0.3
    feature: Weight = 0.03
    temperature: Rate = 3.0
    weight: Weight = 1.0

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training import layers
        from fedkd.training.terms import modules

        names = layers.maps(pair.student)[:-1]
        if self.layers:
            names = layers.chosen(self.layers, pair.student, "the student")
        if not names:
            raise UsageError("This student has only one map, so there is no earlier layer for an exit; set layers.")
        if layers.EMBEDDING not in pair.student:
            raise UsageError("This student has no linear layer, so it has no embedding for its exits to match.")
        return modules.ExitsTerm(self, pair, names)


@dataclass(frozen=True)
class BornAgain(Logits):
    """Born-again networks (Furlanello et al., 2018): each generation is distilled from the one before it.

    The first generation is trained on labels only; the last one is the student.
    """

    needs_teacher: ClassVar[bool] = False
    usual: ClassVar[float] = 0.5
    temperature: Rate = 1.0
    generations: Annotated[int, Field(ge=2, le=100)] = 3


def label_weight(terms: Sequence[Term]) -> float:
    """The weight of the cross-entropy with the labels: the sum of ``hard``, else 1 - the weights of terms on logits."""
    on_logits = [term for term in terms if isinstance(term, Logits)]
    weights = [term.hard for term in on_logits if term.hard is not None]
    return sum(weights) if weights else max(0.0, 1 - sum(term.teacher_weight() for term in on_logits))


def pairs(pair: LayerShapes, ours: str, theirs: str, count: int) -> tuple[list[str], list[list[str]]]:
    """The names of the layers to compare: those of the student, and as many of each teacher.

    By default the last ``count`` maps of each model, or fewer if a model has fewer.

    Raises:
        UsageError: a layer does not exist, or the numbers of layers differ.

    """
    from fedkd.training import layers

    maps = [layers.maps(shapes) for shapes in (pair.student, *pair.teachers)]
    fewest = min(count, *map(len, maps))
    student, *teachers = (names[-fewest:] for names in maps)
    if ours:
        student = layers.chosen(ours, pair.student, "the student")
    if ours or theirs:
        teachers = [layers.chosen(theirs or ours, shapes, "the teacher") for shapes in pair.teachers]
    for names in teachers:
        if len(names) != len(student):
            raise UsageError(f"{len(student)} layers of the student cannot be compared with {len(names)} of a teacher.")
    return student, teachers
