"""`python -m seqmill`: the same as the command `seqmill`."""

import sys

from seqmill.cli.main import main

sys.exit(main())
