"""``python -m fedkd.serve``."""

from fedkd.core import cli
from fedkd.serve import app

cli.run(app)
