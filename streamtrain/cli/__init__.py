"""The ``streamtrain`` command: each subcommand is a module with ``add_parser``, which adds its options, and ``run``."""
