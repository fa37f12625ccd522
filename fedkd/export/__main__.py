"""``python -m fedkd.export``."""

from fedkd.core import cli
from fedkd.export import app

if __name__ == "__main__":
    cli.run(app)
