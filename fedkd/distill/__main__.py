"""``python -m fedkd.distill``."""

from fedkd.core import cli
from fedkd.distill import check, distill
from fedkd.distill.config import DistillConfig

app = cli.command(distill, DistillConfig, check)

if __name__ == "__main__":
    cli.run(app)
