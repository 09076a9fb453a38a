#!/usr/bin/env python3
"""`streamtrain visualize` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "visualize")
    sys.exit(main())
