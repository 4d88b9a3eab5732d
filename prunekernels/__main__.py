"""Runs the command line: python -m prunekernels."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a rank has left its group, whose threads may abort it as it ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
