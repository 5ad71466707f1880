"""`python -m seqkern` is the command `seqkern`."""

import sys

from seqkern.cli import main

sys.exit(main())
