"""``python -m fedkd.simulate``."""

from fedkd.core import cli
from fedkd.core.config import Config
from fedkd.simulate import checks, estimate, simulate

app = cli.command(simulate, Config, checks.check, estimate)

if __name__ == "__main__":
    cli.run(app)
