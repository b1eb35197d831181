"""`python -m tunewright` is the command line."""

import sys

from tunewright.cli import main

sys.exit(main())
