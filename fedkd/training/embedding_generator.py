"""A generator of embeddings of given classes, which a server trains (FedGen: Zhu et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.core import seeds
from fedkd.training import loop, optimizers
from fedkd.training.objectives import Bound

if TYPE_CHECKING:
    from fedkd.core.tensors import Tensors

NOISE, HIDDEN = 32, 256  # the authors' values for MNIST
WEIGHT_DECAY = 0.01  # the authors'


class Generator(nn.Module):
    """A perceptron from noise beside one-hot labels [B, 32 + C] to embeddings [B, D]; returns the noise and these."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        hidden = nn.Linear(NOISE + classes, HIDDEN)
        self.layers = nn.Sequential(hidden, nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return x[:, :NOISE], self.layers(x)


def initial_weights(classes: int, width: int, seed: int) -> dict[str, Tensor]:
    """The weights of a new `Generator`."""
    with seeds.seeded(seed):
        return loop.weights_of(Generator(classes, width))


def generated(weights: Tensors, known: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many embeddings [N, D] and their labels [N], drawn uniformly from the classes where ``known`` [C] is true."""
    inputs, labels = _drawn(known, count, seed)
    network = _with(weights, len(known)).eval()
    with torch.no_grad():
        return network(inputs)[1], labels


def trained(
    weights: Tensors,
    heads: Sequence[tuple[Tensor, Tensor]],
    counts: Tensor,
    *,
    learning_rate: float,
    batch_size: int,
    steps: int,
    device: str,
    seed: int,
) -> dict[str, Tensor]:
    """The weights after so many steps of Adam.

    ``heads`` are the weights [C, D] and biases [C] of the clients' last layers; they predict the label of a generated
    embedding, and count by the clients' shares of the samples of its class, by ``counts`` [K, C].
    """
    known = counts.sum(0) > 0
    network = _with(weights, len(known)).to(device)
    inputs, labels = _drawn(known, steps * batch_size, seed)
    shares = counts / counts.sum(0).clamp_min(1)
    matrices, biases = map(torch.stack, zip(*heads, strict=True))
    loop.train(
        network,
        optimizers.adam(list(network.parameters()), WEIGHT_DECAY),
        inputs,
        labels,
        Bound(loss, {"weights": matrices, "biases": biases, "shares": shares}),
        lambda rows: rows,
        rates=[learning_rate],
        epochs=1,
        batch_size=batch_size,
        augmentation=loop.Augmentation(),
        seed=seed,
    )
    return loop.weights_of(network)


def loss(output: tuple[Tensor, Tensor], labels: Tensor, tensors: Tensors) -> Tensor:
    """The sum over clients of share * CE(head(embedding), label), plus exp(-mean of |noise - noise'|^2 |z - z'|)."""
    noise, embeddings = output
    logits = embeddings @ tensors["weights"].mT + tensors["biases"][:, None]  # [K, B, C]
    costs = -logits.log_softmax(-1)[:, torch.arange(len(labels), device=labels.device), labels]
    apart = [rows[:, None] - rows for rows in (noise, embeddings)]
    diversity = (-apart[0].square().mean(-1) * apart[1].abs().mean(-1)).mean().exp()
    return (tensors["shares"][:, labels] * costs).sum(0).mean() + diversity


def _drawn(known: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """So many inputs of a `Generator`, with uniform noise in [0, 1), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    classes = known.nonzero().flatten()
    labels = classes[torch.randint(len(classes), (count,), generator=generator)]
    noise = torch.rand(count, NOISE, generator=generator)
    return torch.cat([noise, nn.functional.one_hot(labels, len(known))], 1), labels


def _with(weights: Tensors, classes: int) -> Generator:
    """The network with these weights."""
    with seeds.restored():
        network = Generator(classes, len(weights["layers.3.bias"]))
    network.load_state_dict(weights)
    return network
