"""``python -m headwise``: the command line."""

import sys

from .studies.cli.main import main

sys.exit(main())
