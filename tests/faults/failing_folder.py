"""Train like ``main.py`` while the run directory's disk fails: ``failing_folder.py ERROR FIRST LAST ARGUMENTS``.

From before step FIRST (0: from the start) until after step LAST, every call that modifies the run directory fails with
the error ``ERROR``, and a write does half of its work first. EIO from a step on is for calls that read, too.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import streamtrain.main as rank

number, first, last = getattr(errno, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
reads_fail = number == errno.EIO and first > 0
(run_dir,) = (os.path.realpath(word.partition("=")[2]) for word in sys.argv if word.startswith("run.dir="))
is_failing = False
real_write = os.write


def fails(target: Any) -> bool:
    if not is_failing or target is None:
        return False
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.path.abspath(os.fspath(target))
    return path.startswith(run_dir)


def wrap(module: Any, name: str, modifies: Callable[..., bool] = lambda *_, **__: True) -> None:
    real = getattr(module, name)

    def call(target: Any = None, *arguments: Any, **named: Any) -> Any:
        if (reads_fail or modifies(*arguments, **named)) and fails(target):
            if name == "write":
                real_write(target, bytes(arguments[0])[: len(arguments[0]) // 2])
            raise OSError(number, os.strerror(number), None if isinstance(target, int) else os.fspath(target))
        return real(target, *arguments, **named)

    setattr(module, name, call)


def is_write_mode(mode: str = "r", *_: Any, **__: Any) -> bool:
    return bool(set(mode) & set("wax+"))


for name in ("write", "fsync", "mkdir", "replace", "rename"):
    wrap(os, name)
for name in ("listdir", "stat", "scandir", "unlink", "truncate", "ftruncate", "pread", "fstat"):
    wrap(os, name, lambda *_, **__: False)
wrap(os, "open", lambda flags, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
for module in (builtins, io):
    wrap(module, "open", is_write_mode)


def patch_train_step(*arguments: Any) -> None:
    """Called between the checks and the training."""
    global is_failing
    choose_accelerator(*arguments)
    from streamtrain.training import loop

    train_step = loop.train_step

    def call(step: int, *arguments: Any, **named: Any) -> Any:
        global is_failing
        is_failing = first <= step <= last
        return train_step(step, *arguments, **named)

    loop.train_step = call
    is_failing = first == 0


choose_accelerator, rank.choose_accelerator = rank.choose_accelerator, patch_train_step
rank.run_process(rank.parse_arguments())
