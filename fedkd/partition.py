"""``python -m fedkd.partition``: which client gets which samples, without training."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fedkd.core import cli
from fedkd.core.config import Config
from fedkd.core.errors import UsageError
from fedkd.core.notes import plain, say
from fedkd.core.report import figure, shares
from fedkd.core.report.grid import Format
from fedkd.data import partitioners
from fedkd.simulate import assignment, checks, header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedkd.data.skew import Skew

#: The options of fedkd.simulate that a partition depends on, and the batch size, to which shares are compared.
OPTIONS = (
    *("clients", "partitioner", "dataset", "data_dir", "proxy", "proxy_samples", "validation", "local_test"),
    *("resize", "max_pixels", "skip_damaged", "batch_size", "seed"),
)


def partition(
    scenario: Path | None = None,
    /,
    *,
    form: Annotated[
        Literal[Format, "csv", "json"],
        Parameter(name="--format", help="terminal; with all clients: markdown, latex, csv, json."),
    ] = "terminal",
    out: Annotated[Path | None, Parameter(help="Write a picture clients x classes: FILE.png, .svg or .pdf.")] = None,
    columns: Annotated[Literal[1, 2], Parameter(help="Width of the picture in columns of a paper.")] = 1,
    **flags: Any,
) -> None:
    """Show which client gets what, without training.

    A run of fedkd.simulate with these options, whatever its other options are, has exactly this partition.
    """
    if out is not None and (out.suffix[1:] not in figure.FORMATS or not out.parent.is_dir()):
        raise UsageError(f"--out {out} is not usable: name a file .png, .svg or .pdf in a folder that exists.")
    config, _ = cli.configured(Config, scenario, flags)
    if config.partitioner == partitioners.OWN:
        raise UsageError("--partitioner own: deployed nodes bring their own data, so there is nothing to assign.")
    checks.check_data(config)
    with assignment.attributing(config):
        assigned = assignment.assign(config)
    view = Partitioned(config, assigned)
    if form == "terminal":
        view.show(cli.Console(highlight=False, width=None if sys.stdout.isatty() else 100))
    elif form == "json":
        print(json.dumps(view.as_dict(), indent=2))
    else:
        grid = view.shares.grid(f"{view.title}: samples of each class.")
        print({"markdown": grid.markdown, "latex": grid.latex, "csv": view.shares.csv}[form]().rstrip("\n"))
    if out is not None:
        view.shares.draw(out, view.title, columns)
        say(f"{out} is written.")


@dataclasses.dataclass(frozen=True, eq=False)
class Partitioned:
    """What is shown of a partition."""

    config: Config
    assigned: assignment.Assignment

    @property
    def title(self) -> str:
        """The options in one line."""
        config, dataset = self.config, self.assigned.dataset
        return f"{dataset}, {plain(config.clients, 'client')}, {config.partitioner}, seed {config.seed}"

    @property
    def shares(self) -> shares.Shares:
        """The number of samples of each client and class."""
        from fedkd.data import skew

        partition, train, classes = self.assigned.partition, self.assigned.train, self.assigned.classes
        counts = skew.counts(train.labels.numpy(), partition, classes)
        return shares.Shares(counts, train.names or [str(each) for each in range(classes)], partition.ids)

    @property
    def skew(self) -> Skew:
        """How much the clients' shares differ."""
        from fedkd.data import skew

        assigned = self.assigned
        return skew.measure(assigned.train.labels.numpy(), assigned.partition, assigned.classes, assigned.private)

    @property
    def small(self) -> int:
        """The number of clients with fewer samples than a batch."""
        return int((self.assigned.partition.sizes < self.config.batch_size).sum())

    @property
    def proxy_counts(self) -> NDArray[np.int64] | None:
        """The samples of each class in the proxy set, if it is held out of the data set."""
        import numpy as np

        rows = self.assigned.proxy_rows
        labels = self.assigned.train.labels.numpy()
        return None if rows is None else np.bincount(labels[rows], minlength=self.assigned.classes)

    def show(self, console: cli.Console) -> None:
        """Print a table of the first clients, quantiles of all if they are more, and what there is to know."""
        from fedkd.data import skew

        found = self.shares
        console.print(found.short(console.width).rich(), markup=False)
        if len(found.counts) > shares.ROWS:
            console.print(found.quantiles(skew.distances(found.counts)).rich(), markup=False)
        for name, text in self._lines():
            console.print(f"{name:>13}  {text}", markup=False)

    def _lines(self) -> list[tuple[str, str]]:
        config, assigned, counts = self.config, self.assigned, self.proxy_counts
        text = "from another data set; its labels are not read"
        if counts is not None:
            text = f"held out of the training set, {counts.min():,} to {counts.max():,} samples of each class"
        held_out = {"validation": len(assigned.validation_rows), "local test": len(assigned.local_tests.rows)}
        others = [f"{count:,} {name}" for name, count in held_out.items() if count]
        none = int((assigned.local_tests.sizes == 0).sum())
        lines = [
            ("partition", f"{config.partitioner}, {plain(config.clients, 'client')} {header.skew_text(self.skew)}"),
            ("small", f"{plain(self.small, 'client')} with fewer samples than a batch of {config.batch_size}"),
            ("proxy", f"{len(assigned.proxy.images):,} samples ({config.proxy}), {text}"),
            ("other samples", ", ".join([*others, f"{len(assigned.test):,} test"])),
            ("sha256", assigned.partition.digest()),
        ]
        if config.local_test and none:
            lines.insert(2, ("local test", f"{plain(none, 'client')} without local test samples"))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values, with the samples of all clients counted."""
        config, assigned, found, counts = self.config, self.assigned, self.shares, self.proxy_counts
        return {
            "dataset": assigned.dataset,
            "partitioner": config.partitioner,
            "clients": config.clients,
            "seed": config.seed,
            "partition_sha256": assigned.partition.digest(),
            "skew": dataclasses.asdict(self.skew),
            "classes": list(found.classes),
            "samples": found.sizes.tolist(),
            "counts": found.counts.tolist(),
            "ids": list(found.ids),
            "fewer_than_a_batch": self.small,
            "local_test_samples": assigned.local_tests.sizes.tolist() if config.local_test else [],
            "validation_samples": len(assigned.validation_rows),
            "test_samples": len(assigned.test),
            "proxy_samples": len(assigned.proxy.images),
            "proxy_counts": None if counts is None else counts.tolist(),
        }


app = cli.new("partition")
app.default(cli.with_flags(partition, Config, OPTIONS))

if __name__ == "__main__":
    cli.run(app)
