#!/usr/bin/env python3
"""`streamtrain visualize` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["visualize", *sys.argv[1:]]))
