"""Only the arithmetic of a run: a lower bound on the time of any framework.

A plain script with the same batches, weights and order of sums as `fedkd.simulate`, without messages, client
memory, checks and protocol. Its time is the reference of `python -m fedkd.bench`, and its weights are an oracle
(tests/bench/test_bench.py).
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

from fedkd.core import seeds
from fedkd.core.config import Config
from fedkd.core.runtime import settle
from fedkd.data.augment import crop_and_flip
from fedkd.simulate.experiment import Experiment, prepare
from fedkd.training import loop, models

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Weights = dict[str, Tensor]
CHUNK = 64


class Script:
    """The state of one process: a module, the config and the data."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.config = experiment, experiment.config
        self.model = models.build(self.config.model, experiment.setup.classes, self.config.norm)
        self.model.to(memory_format=torch.channels_last)

    def train(self, client: int, number: int, weights: Weights) -> Weights:
        """A client's local epochs."""
        config, indices = self.config, torch.from_numpy(self.experiment.training_partition[client])
        pixels, labels = self.experiment.train.pixels[indices], self.experiment.train.labels[indices]
        self.model.load_state_dict(weights)
        sgd = torch.optim.SGD(
            self.model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay, fused=True
        )
        seed = seeds.derive(seeds.derive(config.seed, "client", number, client), "fit")
        loss, epochs, size = functional.cross_entropy, config.local_epochs, config.batch_size
        self._train(sgd, pixels, labels, loss, epochs, size, seed, config.augment)
        return self._weights()

    def proxy_logits(self, weights: Weights) -> Tensor:
        """Logits on the proxy set [P, C]."""
        self.model.load_state_dict(weights)
        self.model.eval()
        with torch.inference_mode():
            chunks = [
                self.model(self.experiment.setup.trainer.scaling(chunk))
                for chunk in torch.split(self.experiment.setup.proxy.images, CHUNK)
            ]
            return torch.cat(chunks)

    def distill(self, weights: Weights, probs: Tensor, seed: int) -> Weights:
        """The server's distillation epochs on the proxy set."""
        self.model.load_state_dict(weights)
        adam = torch.optim.Adam(self.model.parameters(), self.config.distill_learning_rate, fused=True)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return functional.kl_div(logits.log_softmax(-1), targets, reduction="batchmean")

        epochs, size = self.config.distill_epochs, self.config.distill_batch_size
        self._train(adam, self.experiment.setup.proxy.images, probs, loss, epochs, size, seed, False)
        return self._weights()

    def _train(self, optimizer, pixels, targets, loss, epochs, size, seed, augment) -> None:  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(seed)
        sizes = loop.batch_sizes(self.model, len(pixels), size)
        self.model.train()
        for _ in range(epochs):
            for rows in loop.batches(sizes, generator):
                images = pixels[rows]
                if augment:
                    images = crop_and_flip(images, self.experiment.setup.trainer.flip, generator)
                optimizer.zero_grad()
                loss(self.model(self.experiment.setup.trainer.scaling(images)), targets[rows]).backward()
                optimizer.step()

    def _weights(self) -> Weights:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def local_update(script: Script, client: int, number: int, weights: Weights) -> tuple[Weights, Tensor | None]:
    """A client's weights and proxy logits after its local update."""
    trained = script.train(client, number, weights)
    return trained, script.proxy_logits(trained) if script.config.algorithm == "ensemble" else None


def run(experiment: Experiment, workers: int) -> tuple[Weights, list[float]]:
    """The global student after all rounds of FedAvg or of the ensemble, and the seconds of each round."""
    config, script = experiment.config, Script(experiment)
    student = experiment.setup.trainer.initial_weights(experiment.setup.student)
    client_weights = dict.fromkeys(range(config.clients), student)
    processes = [_Process(experiment) for _ in range(workers - 1)]
    order = sorted(range(config.clients), key=lambda client: -len(experiment.training_partition[client]))
    seconds = []
    for number in range(1, config.rounds + 1):
        start = time.perf_counter()
        begin = client_weights if config.algorithm == "ensemble" else dict.fromkeys(client_weights, student)
        for offset, process in enumerate(processes, 1):
            process.pipe.send([(client, number, begin[client]) for client in order[offset::workers]])
        done = {client: local_update(script, client, number, begin[client]) for client in order[::workers]}
        for process in processes:
            done |= process.pipe.recv()
        client_weights = {client: done[client][0] for client in range(config.clients)}
        if config.algorithm == "ensemble":
            logits = [done[client][1] for client in client_weights]
            probs = _mean([each.double().softmax(-1) for each in logits if each is not None], [1] * len(client_weights))
            student = script.distill(student, probs, seeds.derive(config.seed, "tell", number))
        else:
            sizes = experiment.training_partition.sizes.tolist()
            student = {
                name: _mean([client_weights[client][name].double() for client in client_weights], sizes)
                for name in student
            }
        seconds.append(time.perf_counter() - start)
    for process in processes:
        process.pipe.send(None)
        process.process.join()
    return student, seconds


def _mean(values: list[Tensor], weights: list[int]) -> Tensor:
    """The weighted mean, summed in float64 in the order of the clients."""
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * (weight / sum(weights))
    return total.float()


class _Process:
    """Another process, which trains a part of the clients of each round."""

    def __init__(self, experiment: Experiment) -> None:
        self.pipe, remote = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=_loop, args=(remote, experiment), daemon=True)
        self.process.start()


def _loop(pipe: Connection, experiment: Experiment) -> None:
    script = Script(experiment)
    while (jobs := pipe.recv()) is not None:
        pipe.send({client: local_update(script, client, number, weights) for client, number, weights in jobs})


def main() -> None:
    """``python -m fedkd.bench.bare CONFIG WORKERS``: the config is JSON; print a JSON object with the seconds."""
    config, workers = Config.parse(json.loads(sys.argv[1])), int(sys.argv[2])
    settle(config.threads)
    _, seconds = run(prepare(config), workers)
    print(json.dumps({"rounds": seconds}))


if __name__ == "__main__":
    main()
