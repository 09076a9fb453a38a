#!/usr/bin/env python3
"""`streamtrain report` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
