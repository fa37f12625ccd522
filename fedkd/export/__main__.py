"""``python -m fedkd.export``."""

from fedkd.core import cli
from fedkd.export import app

cli.run(app)
