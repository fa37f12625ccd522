"""``python -m fedkd.distill``."""

from fedkd.core.cli import main
from fedkd.distill import distill
from fedkd.distill.config import DistillConfig

main(distill, DistillConfig)
