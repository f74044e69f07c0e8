"""``python -m headwise``: the command line."""

import sys

from .studies.cli import main

sys.exit(main())
