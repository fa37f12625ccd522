"""Stock Flower: FedAvg of a small CNN on random images, in Flower's own simulation (Ray).

    python fedkd/bench/flower_stock.py --clients 20 --images 512 --rounds 5 --cpus-per-client 2

Written as Flower's quickstart would write it, and without fedkd, so that none of its settings leak in. Flower
starts one Ray actor for every ``cpus-per-client`` cores, inside round one. With ``--device cuda`` the clients share a
GPU: ``--gpus-per-client 0.25`` trains four of them at a time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from functools import cache
from typing import cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # nothing is sent, nothing waits for a network
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

client_app = ClientApp()


def network() -> nn.Sequential:
    """Three convolutions with GroupNorm (8 channels a group), one linear layer: 66,730 parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [nn.GroupNorm(outputs // 8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


@cache
def dataset(size: int) -> tuple[Tensor, Tensor]:
    """All clients' images (bytes) and labels, created once in every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch from the received weights; the reply has the new weights."""
    part, parts = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    config = message.content.config_records["config"]
    size, device = cast(int, config["images"]), cast(str, config["device"])
    images, labels = (tensor[part * size : (part + 1) * size] for tensor in dataset(parts * size))
    loader = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=32, shuffle=True)
    model = network().to(device)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    model.train()
    total = 0.0
    for batch, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(batch.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        total += loss.item()
    metrics = MetricRecord({"train_loss": total / len(loader), "num-examples": size})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round begins and ends (evaluation, which is off, included)."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=clients)
        self.begins: list[float] = []
        self.ends: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.begins.append(time.time())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        metrics = super().aggregate_evaluate(server_round, replies)
        self.ends.append(time.time())
        return metrics


def main() -> None:
    """Run the simulation and print the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("clients", 20), ("images", 512), ("rounds", 5), ("cpus-per-client", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus-per-client", type=float, default=0.0)
    args = parser.parse_args()
    strategy = TimedFedAvg(args.clients)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"images": args.images, "device": args.device})
        strategy.start(grid, ArrayRecord(network().state_dict()), num_rounds=args.rounds, train_config=config)

    resources = {"client_resources": {"num_cpus": args.cpus_per_client, "num_gpus": args.gpus_per_client}}
    run_simulation(server_app, client_app, num_supernodes=args.clients, backend_config=resources)
    print(json.dumps({"rounds": [end - begin for begin, end in zip(strategy.begins, strategy.ends, strict=True)]}))


if __name__ == "__main__":
    import flower_stock  # type: ignore[import-not-found]  # by its name, so that Ray pickles the ClientApp by reference

    flower_stock.main()
