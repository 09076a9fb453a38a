#!/usr/bin/env python3
"""`streamtrain plan` from a checkout."""

import sys

from streamtrain.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "plan")
    sys.exit(main())
