#!/usr/bin/env python3
"""`streamtrain evaluate` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    sys.exit(main())
