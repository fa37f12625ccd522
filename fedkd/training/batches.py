"""What clients train on, and in which batches, drawn before the first step so that no step waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fedkd.data import augment
from fedkd.training import loop
from fedkd.training.early_stopping import EarlyStopping
from fedkd.training.loop import Augmentation, Objective, Penalty


@dataclass(frozen=True)
class Job:
    """What one client trains on, as for `loop.train`."""

    pixels: Tensor
    targets: Tensor
    objective: Objective
    augmentation: Augmentation
    seed: int
    penalty: Penalty | None = None
    stopping: EarlyStopping | None = None


@dataclass(frozen=True)
class Plan:
    """The batches of S steps of K clients: their sizes [S, K], their samples [S, K, B] and `augment.draw` [3, S, K, B].

    Samples are counted through the clients. A client that is done has a size of zero. Padding is the first of all
    samples, not augmented.
    """

    sizes: Tensor
    samples: Tensor
    draws: Tensor

    @staticmethod
    def of(jobs: Sequence[Job], sizes: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> Plan:
        """The batches that `loop.train` makes of each job; ``sizes`` and ``lengths`` are those of its epochs."""
        steps, longest = max(map(sum, lengths)), max(map(max, filter(None, sizes)), default=0)
        counts = torch.zeros(len(jobs), steps, dtype=torch.int64)
        samples, draws, first = [torch.zeros(0, dtype=torch.int64)], [augment.unchanged(0)], 0
        for k, job in enumerate(jobs):
            generator = torch.Generator().manual_seed(job.seed)
            used = [size for length in lengths[k] for size in sizes[k][:length]]
            counts[k, : len(used)] = torch.tensor(used)
            for length in lengths[k]:
                batches = loop.batches(list(sizes[k]), generator)[:length]
                samples += [first + batch for batch in batches]
                draws.append(job.augmentation.draw(batches, generator))
            first += len(job.pixels)
        is_real = torch.arange(longest) < counts[..., None]  # [K, S, B], in the order in which all was drawn
        padded = torch.cat([torch.zeros(1, 1, dtype=torch.int64), augment.unchanged(1)]).repeat(1, is_real.numel())
        padded[:, is_real.flatten()] = torch.cat([torch.cat(samples)[None], torch.cat(draws, 1)])
        planned = padded.view(4, *is_real.shape).transpose(1, 2)
        return Plan(counts.T, planned[0], planned[1:])

    def segments(self) -> list[tuple[list[int], list[int]]]:
        """Runs of steps with the same clients: these clients, and the numbers of the steps."""
        runs = groupby(range(len(self.sizes)), lambda number: self.sizes[number].nonzero().flatten().tolist())
        return [(clients, list(steps)) for clients, steps in runs]

    def part(self, first: int, clients: Sequence[int]) -> Plan:
        """The plan of these clients from a step on."""
        return Plan(self.sizes[first:, clients], self.samples[first:, clients], self.draws[:, first:, clients])

    def shares(self) -> Tensor:
        """The weight of each sample in the mean of its client [S, K, B]; of padding zero."""
        longest = self.samples.shape[-1]
        sizes = self.sizes[..., None]
        return (torch.arange(longest) < sizes) / sizes.clamp_min(1).double()

    def is_real(self) -> Tensor:
        """Which samples are no padding [S, K, B]. For a client that is done, all of them: it needs some statistics."""
        longest = self.samples.shape[-1]
        return torch.arange(longest) < torch.where(self.sizes > 0, self.sizes, longest)[..., None]
