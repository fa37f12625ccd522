"""The terms of a distillation loss by name: which layers of both sides are compared, by which loss, at what weight.

A term is a frozen dataclass of options, read before PyTorch is imported. ``build`` resolves its layers and
returns a `fedkd.training.terms.modules.TermModule`. The default weights are those of the papers' public code on CIFAR-100
(Tian et al., 2020), where there is one; but for hint's: its 100 drove small students out of all bounds here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from fedkd.core.config import Rate
from fedkd.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fedkd.training.terms.modules import TermModule

Weight = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LayerShapes:
    """What a term may know before training: the layers of both sides and their shapes, the labels [N].

    A shape is that of what a layer gives, without the batch, in the order of computation.
    """

    student: Mapping[str, tuple[int, ...]]
    teachers: tuple[Mapping[str, tuple[int, ...]], ...]
    labels: Tensor


@dataclass(frozen=True)
class Term:
    """What all terms have."""

    needs_teacher: ClassVar[bool] = True  # whether it needs a teacher

    def build(self, pair: LayerShapes) -> TermModule:
        """The term in force between these two.

        Raises:
            UsageError: a layer is not there, or layers do not fit.

        """
        raise NotImplementedError


@dataclass(frozen=True)
class Logits(Term):
    """weight * T^2 * loss(student logits / T, teacher probs at T) (Hinton et al., 2015).

    ``kind`` is a loss of the federation (kl, ce, mse, dkd, dist, ...), or ``logit-mse`` and ``logit-mae``, which
    compare the logits themselves. ``hard`` is what the labels weigh, by default what is left of one; ``soft`` is
    another name of the weight.
    """

    usual: ClassVar[float] = 0.9
    kind: str = "kl"
    temperature: Rate = 4.0
    weight: Weight | None = None
    soft: Weight | None = None
    hard: Weight | None = None

    def __post_init__(self) -> None:
        if self.soft is not None and self.weight is not None:
            raise ValueError("soft and weight are two names of one number")

    def teacher_weight(self) -> float:
        """The weight of the comparison with the teacher."""
        return next(value for value in (self.soft, self.weight, self.usual) if value is not None)

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.LogitsTerm(self)


@dataclass(frozen=True)
class Features(Term):
    """Weight * the mean over layers of a loss between feature maps: hint (FitNets), attention, nst or vid.

    ``layers`` are names of layers of the student, joined by +; where the teacher's are others, ``teacher``
    has as many. By default the last map of each.
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
    """Weight * the mean over layers of a loss between how images of a batch relate: rkd, similarity, correlation, pkt.

    Any two layers fit. By default the embeddings: what the last linear layer sees.
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
    """Weight * the loss between the instance relationship graphs of chosen layers (Liu et al., 2019).

    Vertices are the features of an image, averaged over the map; by default the last three maps of each side.
    """

    layers: str = ""
    teacher: str = ""
    weight: Weight = 1.0

    def build(self, pair: LayerShapes) -> TermModule:
        from fedkd.training.terms import modules

        return modules.GraphTerm(self, pair, *pairs(pair, self.layers, self.teacher, 3))


@dataclass(frozen=True)
class Contrastive(Term):
    """Weight * the contrastive loss of embeddings against images of other classes (CRD: Tian et al., 2020)."""

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
    """A classifier on each of some earlier layers, taught by the last one (Be Your Own Teacher: Zhang et al., 2019).

    The sum over them of (1 - alpha) CE(labels) + alpha T^2 KL(last || exit) + feature * |f - embedding|^2, where f
    is the exit's input mapped to the embedding's width. They are dropped after training. By default every map but
    the last.
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
            raise UsageError("This student has one map only, so there is nothing to exit from; name layers of it.")
        if layers.EMBEDDING not in pair.student:
            raise UsageError("This student has no linear layer at its end, so its exits have no embedding to follow.")
        return modules.ExitsTerm(self, pair, names)


@dataclass(frozen=True)
class BornAgain(Logits):
    """Born-again networks (Furlanello et al., 2018): each of some generations is taught by the one before it.

    The first one learns from labels alone, the last one is the student.
    """

    needs_teacher: ClassVar[bool] = False
    usual: ClassVar[float] = 0.5
    temperature: Rate = 1.0
    generations: Annotated[int, Field(ge=2, le=100)] = 3


def label_weight(terms: Sequence[Term]) -> float:
    """What the cross-entropy with the labels weighs: as those on logits say, else what they leave of one."""
    answers = [term for term in terms if isinstance(term, Logits)]
    said = [term.hard for term in answers if term.hard is not None]
    return sum(said) if said else max(0.0, 1 - sum(term.teacher_weight() for term in answers))


def pairs(pair: LayerShapes, ours: str, theirs: str, count: int) -> tuple[list[str], list[list[str]]]:
    """The layers to compare: names of the student's, and as many of each teacher's.

    Without names, the last ``count`` maps of each side, or as many as all have.

    Raises:
        UsageError: a name is not there, or the sides differ in number.

    """
    from fedkd.training import layers

    sides = [layers.maps(known) for known in (pair.student, *pair.teachers)]
    least = min(count, *map(len, sides))
    student, *teachers = (side[-least:] for side in sides)
    if ours:
        student = layers.chosen(ours, pair.student, "the student")
    if ours or theirs:
        teachers = [layers.chosen(theirs or ours, known, "the teacher") for known in pair.teachers]
    for names in teachers:
        if len(names) != len(student):
            raise UsageError(f"{len(student)} layers of the student cannot be compared with {len(names)} of a teacher.")
    return student, teachers
