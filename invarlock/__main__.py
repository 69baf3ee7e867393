"""``python -m invarlock``."""

import sys

from invarlock.cli.main import main

sys.exit(main())
