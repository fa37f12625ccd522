"""The arithmetic of a run and nothing else: the least that any framework can take.

The same batches, weights and order of sums as `fedkd.simulate`, written as one would write a script:
no messages, no memory on disk, no checks, no round loop. It serves two ends: its time is the floor
(`python -m fedkd.bench`), and its weights are an oracle (tests/test_bench.py).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fedkd import models
from fedkd.core import seeds
from fedkd.core.config import Config
from fedkd.core.runtime import settle
from fedkd.data.augment import crop_and_flip
from fedkd.simulate.experiment import Experiment, prepare

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Weights = dict[str, Tensor]
CHUNK = 64


class Script:
    """One process's share of a run: a module, an optimizer's settings, and the data."""

    def __init__(self, experiment: Experiment) -> None:
        self.run, self.config = experiment, experiment.config
        self.model = models.build(self.config.model, experiment.setup.classes, self.config.norm)
        self.model.to(memory_format=torch.channels_last)

    def train(self, client: int, number: int, weights: Weights) -> Weights:
        """A client's local epochs."""
        config, rows = self.config, torch.from_numpy(self.run.training_partition[client])
        pixels, labels = self.run.train.pixels[rows], self.run.train.labels[rows]
        self.model.load_state_dict(weights)
        sgd = torch.optim.SGD(
            self.model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay, fused=True
        )
        seed = seeds.derive(seeds.derive(config.seed, "client", number, client), "fit")
        loss, epochs, size = functional.cross_entropy, config.local_epochs, config.batch_size
        self._descend(sgd, pixels, labels, loss, epochs, size, seed, config.augment)
        return self._weights()

    def answer(self, weights: Weights) -> Tensor:
        """Logits on the proxy."""
        self.model.load_state_dict(weights)
        self.model.eval()
        with torch.inference_mode():
            parts = [
                self.model(self.run.setup.trainer.scaling(part))
                for part in torch.split(self.run.setup.proxy.images, CHUNK)
            ]
            return torch.cat(parts)

    def distill(self, weights: Weights, probs: Tensor, seed: int) -> Weights:
        """The server's epochs on the proxy."""
        self.model.load_state_dict(weights)
        adam = torch.optim.Adam(self.model.parameters(), self.config.distill_learning_rate, fused=True)

        def loss(logits: Tensor, wanted: Tensor) -> Tensor:
            return functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")

        epochs, size = self.config.distill_epochs, self.config.distill_batch_size
        self._descend(adam, self.run.setup.proxy.images, probs, loss, epochs, size, seed, False)
        return self._weights()

    def _descend(self, optimizer, pixels, targets, loss, epochs, size, seed, augment) -> None:  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(seed)
        self.model.train()
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(pixels), generator=generator), size):
                images = pixels[rows]
                if augment:
                    images = crop_and_flip(images, self.run.setup.trainer.flip, generator)
                optimizer.zero_grad()
                loss(self.model(self.run.setup.trainer.scaling(images)), targets[rows]).backward()
                optimizer.step()

    def _weights(self) -> Weights:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def turn(script: Script, client: int, number: int, weights: Weights) -> tuple[Weights, Tensor | None]:
    """What one client computes in a round."""
    trained = script.train(client, number, weights)
    return trained, script.answer(trained) if script.config.algorithm == "ensemble" else None


def run(experiment: Experiment, workers: int) -> tuple[Weights, list[float]]:
    """The global student after all rounds of FedAvg or of the ensemble, and the seconds of each round."""
    config, script = experiment.config, Script(experiment)
    student = experiment.setup.trainer.initial_weights(experiment.setup.student)
    own = dict.fromkeys(range(config.clients), student)
    helpers = [_Helper(experiment) for _ in range(workers - 1)]
    order = sorted(range(config.clients), key=lambda client: -len(experiment.training_partition[client]))
    seconds = []
    for number in range(1, config.rounds + 1):
        start = time.perf_counter()
        begin = own if config.algorithm == "ensemble" else dict.fromkeys(own, student)
        for place, helper in enumerate(helpers, 1):
            helper.pipe.send([(client, number, begin[client]) for client in order[place::workers]])
        done = {client: turn(script, client, number, begin[client]) for client in order[::workers]}
        for helper in helpers:
            done |= helper.pipe.recv()
        own = {client: done[client][0] for client in range(config.clients)}
        if config.algorithm == "ensemble":
            answers = [done[client][1] for client in own]
            probs = _mean([answer.double().softmax(-1) for answer in answers if answer is not None], [1] * len(own))
            student = script.distill(student, probs, seeds.derive(config.seed, "tell", number))
        else:
            sizes = experiment.training_partition.sizes.tolist()
            student = {name: _mean([own[client][name].double() for client in own], sizes) for name in student}
        seconds.append(time.perf_counter() - start)
    for helper in helpers:
        helper.pipe.send(None)
        helper.process.join()
    return student, seconds


def _mean(values: list[Tensor], weights: list[int]) -> Tensor:
    """In float64 and in the order of the clients."""
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * (weight / sum(weights))
    return total.float()


class _Helper:
    """Another process that takes its share of each round's clients."""

    def __init__(self, experiment: Experiment) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=_help, args=(theirs, experiment), daemon=True)
        self.process.start()


def _help(pipe: Connection, experiment: Experiment) -> None:
    script = Script(experiment)
    while (jobs := pipe.recv()) is not None:
        pipe.send({client: turn(script, client, number, weights) for client, number, weights in jobs})


def main() -> None:
    """``python -m fedkd.bench.bare CONFIG WORKERS``: the config as JSON; a JSON object with the seconds."""
    config, workers = Config.parse(json.loads(sys.argv[1])), int(sys.argv[2])
    settle(config.threads)
    _, seconds = run(prepare(config), workers)
    print(json.dumps({"rounds": seconds}))


if __name__ == "__main__":
    main()
