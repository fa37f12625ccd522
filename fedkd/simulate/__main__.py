"""``python -m fedkd.simulate``."""

from fedkd.core.cli import main
from fedkd.core.config import Config
from fedkd.simulate import simulate

main(simulate, Config)
