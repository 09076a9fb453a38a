#!/usr/bin/env python3
"""`streamtrain index` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))
