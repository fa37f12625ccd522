"""Stock pfl-research: FedAvg of a small CNN on random images, on one or several processes.

    python fedkd/bench/pfl_stock.py --clients 20 --images 512 --rounds 5 --cpus-per-client 1

By default cores / cpus-per-client processes run, each with cpus-per-client threads. Several processes are started by
torchrun, which replaces this process. On a GPU (``--device cuda``) one process runs, and the images are there. The last
line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("clients", 20), ("images", 512), ("rounds", 5), ("cpus-per-client", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=0, help="0: cores / cpus-per-client")
    args = parser.parse_args()
    args.processes = args.processes or max(1, (os.cpu_count() or 1) // args.cpus_per_client)
    return args


def run(args: argparse.Namespace) -> None:
    """Train in this process, which is one of ``args.processes``; the first one prints the times."""
    os.environ["PFL_PYTORCH_DEVICE"] = args.device
    import numpy as np
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from torch import Tensor, nn

    class Network(nn.Module):
        """Three convolutions with GroupNorm (8 channels a group), one linear layer: 66,730 parameters."""

        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
                layers += [nn.GroupNorm(outputs // 8, outputs), nn.ReLU(), nn.MaxPool2d(2)]
            self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))

        def loss(self, images: Tensor, labels: Tensor) -> Tensor:
            """The training loss of pfl."""
            self.train()
            return nn.functional.cross_entropy(self.layers(images), labels)

        def metrics(self, images: Tensor, labels: Tensor) -> dict[str, object]:
            """No metrics and no forward pass: pfl always evaluates before round 1."""
            return {}

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        """The time at the start and at the end of each round."""

        def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
            self.stamps = [time.time()]
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            self.stamps.append(time.time())
            return False, Metrics()

    torch.set_num_threads(args.cpus_per_client)
    torch.manual_seed(0)
    np.random.seed(0)  # every process must sample the same cohorts
    size = args.images
    images = torch.randint(256, (args.clients * size, 3, 32, 32), dtype=torch.uint8).to(args.device)
    labels = torch.randint(10, (args.clients * size,)).to(args.device)

    def user(number: int) -> Dataset:
        part = slice(number * size, (number + 1) * size)
        return Dataset([images[part].float() / 255, labels[part]], user_id=str(number))

    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(args.clients))))
    network = Network()
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)  # with rate 1 the server adopts the mean
    model = PyTorchModel(network, partial(torch.optim.SGD, momentum=0.9), sgd)
    backend = SimulatedBackend(training_data=users, val_data=None, postprocessors=[WeightByDatapoints()])
    plan = NNAlgorithmParams(
        central_num_iterations=args.rounds,
        evaluation_frequency=args.rounds,
        train_cohort_size=args.clients,
        val_cohort_size=None,
    )
    local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.01, local_batch_size=32)
    clock = Clock()
    FederatedAveraging().run(plan, backend, model, local, NNEvalHyperParams(local_batch_size=None), [clock])
    if int(os.environ.get("RANK", "0")) == 0:
        rounds = [end - begin for begin, end in zip(clock.stamps, clock.stamps[1:], strict=False)]
        print(json.dumps({"rounds": rounds}), flush=True)


if __name__ == "__main__":
    args, launched = arguments(), "TORCHELASTIC_RUN_ID" in os.environ
    if args.processes > 1 and not launched:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    run(args)
