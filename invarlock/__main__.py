"""``python -m invarlock``."""

from invarlock.cli.main import console

console()
