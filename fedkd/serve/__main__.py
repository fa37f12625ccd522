"""``python -m fedkd.serve``."""

from fedkd.core import cli
from fedkd.serve import app

if __name__ == "__main__":
    cli.run(app)
