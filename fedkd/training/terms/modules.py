"""Loss terms as modules, since they may have adapters that are trained with the student.

A term computes a scalar from a `Batch`. Teachers' outputs have no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import soft_labels, specs
from fedkd.training import layers
from fedkd.training.layers import EMBEDDING, Outputs
from fedkd.training.losses import contrastive, features, graph, logits, relations
from fedkd.training.losses.contrastive import Memory
from fedkd.training.losses.vectors import unit
from fedkd.training.objectives import of_samples

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors
    from fedkd.training import terms
    from fedkd.training.terms import LayerShapes


@dataclass(frozen=True)
class Batch:
    """Outputs of student and teachers for a batch, weights [K, B] of the teachers, labels [B] and indices [B]."""

    student: Outputs
    teachers: Sequence[Outputs]
    weights: Tensor
    labels: Tensor
    indices: Tensor


class TermModule(nn.Module):
    """A loss term between the outputs of the named layers of the student and of each teacher.

    ``is_always_the_same``: it does the same in Python for every batch, so that a training step can be recorded.
    """

    is_always_the_same = False
    student_layers: Sequence[str] = ()
    teacher_layers: Sequence[Sequence[str]] = ()
    #: Whether it is the mean of its values for single samples, and depends on nothing but its parameters and the batch.
    is_mean_over_samples: bool = False

    def forward(self, batch: Batch) -> Tensor:
        """A scalar."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Tensor]:
        """What its next losses depend on besides its parameters and buffers, for checkpoints."""
        return {}

    def load_extra_state(self, state: Tensors) -> None:
        """Restore what `extra_state` returned."""

    def compared(self, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Each layer of the student, the teacher's layer for it, and the mean weight of that teacher in the batch."""
        return [
            (batch.student.layers[ours], seen.layers[theirs], weight)
            for seen, names, weight in zip(batch.teachers, self.teacher_layers, batch.weights.mean(1), strict=True)
            for ours, theirs in zip(self.student_layers, names, strict=True)
        ]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


class LogitsTerm(TermModule):
    """Compares logits with the teachers' mean probabilities at T, or with their mean logits."""

    def __init__(self, term: terms.Logits) -> None:
        super().__init__()
        self.term = term
        self.on_logits = {"logit-mse": logits.logit_mse, "logit-mae": logits.logit_mae}.get(term.kind)
        self.on_probs = None if self.on_logits else specs.bind("loss", term.kind)
        loss = self.on_logits or self.on_probs
        self.is_mean_over_samples = loss is not None and of_samples(loss) is not None
        self.is_always_the_same = not specs.is_user_defined(term.kind)

    def forward(self, batch: Batch) -> Tensor:
        temperature, weight = self.term.temperature, self.term.teacher_weight()
        teachers = torch.stack([seen.logits for seen in batch.teachers])
        if self.on_logits is not None:
            return weight * self.on_logits(batch.student.logits, (teachers * batch.weights[..., None]).sum(0))
        assert self.on_probs is not None
        probs = soft_labels.mean_probs(teachers / temperature, batch.weights)
        labels = (batch.labels,) if self.on_probs.func is logits.dkd else ()
        loss: Tensor = self.on_probs(batch.student.logits / temperature, probs, *labels)
        return weight * temperature**2 * loss


class FeaturesTerm(TermModule):
    """Compares feature maps, each pair at the coarser resolution of the two."""

    is_mean_over_samples = True
    is_always_the_same = True

    def __init__(
        self, term: terms.Features, pair: LayerShapes, student: Sequence[str], teachers: Sequence[Sequence[str]]
    ) -> None:
        super().__init__()
        self.student_layers, self.teacher_layers = student, teachers
        self.weight = term.usual[term.kind] if term.weight is None else term.weight
        self.adapters = nn.ModuleList(
            Adapter(term.kind, layers.channels(pair.student[ours]), layers.channels(known[theirs]))
            for known, names in zip(pair.teachers, teachers, strict=True)
            for ours, theirs in zip(student, names, strict=True)
        )

    def forward(self, batch: Batch) -> Tensor:
        losses = [
            weight * adapter(*_fitted(layers.as_map(ours), layers.as_map(theirs)))
            for (ours, theirs, weight), adapter in zip(self.compared(batch), self.adapters, strict=True)
        ]
        return self.weight * _sum(losses) / len(self.student_layers)


class Adapter(nn.Module):
    """The loss of a kind with its parameters: a 1x1 convolution to the teacher's channels, VID's variances."""

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        if kind in ("hint", "vid"):
            self.regressor = nn.Conv2d(inputs, outputs, 1)
        if kind == "vid":
            self.raw_variance = nn.Parameter(torch.full((outputs,), features.RAW_VARIANCE))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "vid":
            return features.vid(self.regressor(student), self.raw_variance, teacher)
        if self.kind == "hint":
            return features.hint(self.regressor(student), teacher)
        return {"attention": features.attention, "nst": features.nst}[self.kind](student, teacher)


class RelationsTerm(TermModule):
    """Compares the relations between the samples of a batch."""

    is_always_the_same = True

    def __init__(self, term: terms.Relations, student: Sequence[str], teachers: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.student_layers, self.teacher_layers = student, teachers
        self.weight = term.usual[term.kind] if term.weight is None else term.weight
        self.loss = getattr(relations, term.kind)

    def forward(self, batch: Batch) -> Tensor:
        losses = [
            weight * self.loss(ours.flatten(1), theirs.flatten(1)) for ours, theirs, weight in self.compared(batch)
        ]
        return self.weight * _sum(losses) / len(self.student_layers)


class GraphTerm(TermModule):
    """Compares instance relationship graphs; a learned map gives the student's last vertices the teacher's width."""

    is_always_the_same = True

    def __init__(
        self, term: terms.Graph, pair: LayerShapes, student: Sequence[str], teachers: Sequence[Sequence[str]]
    ) -> None:
        super().__init__()
        self.student_layers, self.teacher_layers, self.weight = student, teachers, term.weight
        ours = layers.channels(pair.student[student[-1]])
        theirs = [layers.channels(known[names[-1]]) for known, names in zip(pair.teachers, teachers, strict=True)]
        self.adapters = nn.ModuleList(nn.Linear(ours, width) for width in theirs)

    def forward(self, batch: Batch) -> Tensor:
        ours = _vertices(batch.student, self.student_layers)
        losses = []
        for seen, names, weight, adapter in zip(
            batch.teachers, self.teacher_layers, batch.weights.mean(1), self.adapters, strict=True
        ):
            sides = [*ours[:-1], adapter(ours[-1])], _vertices(seen, names)
            # The distance that a vertex moves is defined only between layers of one width.
            is_even = all(len({vertices.shape[1] for vertices in side}) == 1 for side in sides)
            losses.append(weight * graph.graph(*sides, vertex_move=float(is_even), edge_move=1.0))
        return self.weight * _sum(losses)


def _vertices(seen: Outputs, names: Sequence[str]) -> list[Tensor]:
    return [layers.as_map(seen.layers[name]).mean((2, 3)) for name in names]


class ExitsTerm(TermModule):
    """Classifiers on earlier layers, distilled from the last layer."""

    is_always_the_same = True

    def __init__(self, term: terms.Exits, pair: LayerShapes, names: Sequence[str]) -> None:
        super().__init__()
        self.term, self.names = term, tuple(names)
        self.student_layers = [*names, EMBEDDING]
        (width,) = pair.student[EMBEDDING]
        (classes,) = list(pair.student.values())[-1]
        self.necks = nn.ModuleList(nn.Linear(layers.channels(pair.student[name]), width) for name in names)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in names)

    def forward(self, batch: Batch) -> Tensor:
        term, seen = self.term, batch.student
        deep = seen.layers[EMBEDDING].detach()
        probs = (seen.logits.detach() / term.temperature).softmax(-1)
        losses = []
        for vertices, neck, head in zip(_vertices(seen, self.names), self.necks, self.heads, strict=True):
            feature = neck(vertices).relu()
            exit_logits = head(feature)
            hard = nn.functional.cross_entropy(exit_logits, batch.labels)
            soft = term.temperature**2 * logits.kl(exit_logits / term.temperature, probs)
            near = (feature - deep).square().sum(-1).mean()
            losses.append((1 - term.alpha) * hard + term.alpha * soft + term.feature * near)
        return term.weight * _sum(losses)


class ContrastiveTerm(TermModule):
    """Compares embeddings, projected to a common space, with a memory of samples of other classes.

    The projections are learned; the memory is initialized with random directions. If all samples have the same class
    (as a client's may), the term is zero.
    """

    def __init__(
        self, term: terms.Contrastive, pair: LayerShapes, student: Sequence[str], teachers: Sequence[Sequence[str]]
    ) -> None:
        super().__init__()
        self.term, self.student_layers, self.teacher_layers = term, student, teachers
        self.has_one_class = bool(pair.labels.min() == pair.labels.max())
        count, device = len(teachers) * len(student), pair.labels.device
        inputs = [math.prod(pair.student[name]) for name in student]
        self.ours = nn.ModuleList(nn.Linear(width, term.width) for _ in teachers for width in inputs)
        self.theirs = nn.ModuleList(
            nn.Linear(math.prod(known[name]), term.width)
            for known, names in zip(pair.teachers, teachers, strict=True)
            for name in names
        )
        self.generator = torch.Generator(device).manual_seed(torch.initial_seed())
        self.memories = [Memory.random(pair.labels, term.width, self.generator) for _ in range(count)]
        self.constants: list[tuple[float, float] | None] = [None] * count

    def forward(self, batch: Batch) -> Tensor:
        if self.has_one_class:
            return 0 * batch.student.logits.sum()
        losses = []
        for place, (ours, theirs, weight) in enumerate(self.compared(batch)):
            memory = self.memories[place]
            sides = (unit(self.ours[place](ours.flatten(1))), unit(self.theirs[place](theirs.flatten(1))))
            known = (*sides, *memory.candidates(batch.indices, self.term.negatives, self.generator), len(memory.labels))
            if self.constants[place] is None:
                self.constants[place] = contrastive.normalizers(*known, temperature=self.term.temperature)
            constants = self.constants[place]
            assert constants is not None
            losses.append(weight * contrastive.crd(*known, constants=constants, temperature=self.term.temperature))
            memory.update(batch.indices, *sides)
        return self.term.weight * _sum(losses) / len(self.student_layers)

    def extra_state(self) -> dict[str, Tensor]:
        known = [constants or (math.nan, math.nan) for constants in self.constants]
        state = {"generator": self.generator.get_state(), "constants": torch.tensor(known, dtype=torch.float64)}
        for place, memory in enumerate(self.memories):
            state |= {f"student{place}": memory.student, f"teacher{place}": memory.teacher}
        return state

    def load_extra_state(self, state: Tensors) -> None:
        self.generator.set_state(state["generator"].clone())
        self.constants = [None if math.isnan(ours) else (ours, theirs) for ours, theirs in state["constants"].tolist()]
        for place, memory in enumerate(self.memories):
            memory.student.copy_(state[f"student{place}"])
            memory.teacher.copy_(state[f"teacher{place}"])


def _fitted(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at the coarser resolution of both."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pool = nn.functional.adaptive_avg_pool2d
    ours, theirs = (m if m.shape[2:] == size else pool(m, size) for m in (student, teacher))
    return ours, theirs
