"""Fail the file-system calls of a small job one by one: ``every_call.py JOB FOLDER INJECTIONS SEED``.

JOB is ``train``, ``cached`` (training through ``data.cache``) or ``pack``. The job runs once undisturbed, with a list
of its calls below FOLDER/work. After that, one call of each further run fails with one error. INJECTIONS pairs of a
call and an error are drawn; 0 tries each error at the first, the middle and the last of the calls with one name and
path. After each failure, the same command runs again undisturbed; the results must equal the first ones.

Each run is a fork of this process, which has imported everything, so that a run takes a second. Start this process with
``fs_shim.c`` preloaded. Prints one line of JSON per violation, and the counts at the end. Progress goes to stderr.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from drawn_images import draw_folder
from tiny_run import command

from shards.packing.pack import PackOptions, pack

JOB, FOLDER, INJECTIONS, SEED = sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3]), int(sys.argv[4])
WORK = FOLDER / "work"
STEPS = 3
LIMIT_SECONDS = 60
WRITES = ("create", "write", "fsync", "truncate", "mkdir", "link", "rename")
OPENS = ("open", "create", "list")
ERRORS = {"ENOSPC": WRITES, "EDQUOT": WRITES, "EMFILE": OPENS, "EIO": None, "ESTALE": None}
shim = ctypes.CDLL(None)


def arguments(job: str) -> list[str]:
    """Return the command line of a job, below WORK."""
    if job == "pack":
        return ["pack", "--src", f"{WORK}/images", "--out", f"{WORK}/out", "--workers", "1", "--shard-size", "30kB"]
    words = command(
        WORK / "set", WORK / "run", f"run.steps={STEPS}", "monitor.tensorboard=true", "monitor.panel_every=2",
        "evaluation.every=2", "evaluation.images=20", "evaluation.max_share=1", "run.snapshot_every=2",
        "data.max_unusable_share=1",
    )  # fmt: skip
    if job == "cached":
        words = [word for word in words if not word.startswith("data.shards=")]
        words += [f"data.shards=file://{WORK}/set", f"data.cache.dir={WORK}/cache", "data.cache.limit=10MB"]
    return words


def run_job(job: str) -> int:
    """Run a job in this process and return its exit status."""
    if job == "pack":
        from streamtrain.cli.main import main

        return main(arguments(job)) or 0
    from streamtrain.main import parse_arguments, run_process

    sys.argv = arguments(job)
    try:
        run_process(parse_arguments())
    except SystemExit as end:
        return int(end.code or 0)


def fork_job(job: str, first: int = -1, error: int = 0, log: Path | None = None) -> tuple[int | str, str]:
    """Run a job in a child with call number ``first`` failing; return its exit status and its output."""
    output = FOLDER / "output.txt"
    child = os.fork()
    if child == 0:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        calls = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if log else -1
        shim.shim_arm(os.fsencode(f"{WORK}/"), first, 1, error, calls)
        status = 99
        try:
            status = run_job(job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else signal.Signals(-code).name, output.read_text(errors="replace")
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hang", output.read_text(errors="replace")


def reset(job: str) -> None:
    """Remove the output of a job."""
    for name in ("run", "cache", "out"):
        shutil.rmtree(WORK / name, ignore_errors=True)


def result(job: str) -> Any:
    """Return the results that a fault must not change: the set, or the last checkpoint and the losses."""
    if job == "pack":
        # an empty lock file that could not be removed is harmless
        files = sorted(path for path in (WORK / "out").rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    checkpoint = json.loads((WORK / f"run/checkpoints/step-{STEPS:09d}/manifest.json").read_text())
    files = checkpoint["files"]
    return {name: value for name, value in files.items() if name.endswith(".safetensors")}, losses()


def losses() -> dict[int, Any]:
    """Return the losses by step in ``metrics.jsonl``; raises ValueError for a torn line."""
    records = [json.loads(line) for line in (WORK / "run/metrics.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("loss/")} for r in records}


def differs(job: str, expected: Any) -> str:
    """Return how the job's result differs from the undisturbed one, or an empty text."""
    quarantine = WORK / "run/quarantine.jsonl"
    if job != "pack" and quarantine.exists() and quarantine.stat().st_size:
        # images that could not be read are part of the stream now: compare with a run that knows them from the start
        mine, lines = result(job), quarantine.read_bytes()
        reset(job)
        (WORK / "run").mkdir()
        quarantine.write_bytes(lines)
        (WORK / "run/.streamtrain.lock").touch()
        status, text = fork_job(job)
        if status != 0:
            return f"the run with the same quarantine ended with {status}: {text[-500:]}"
        expected = result(job)
    else:
        mine = result(job)
    if job == "pack":
        return "" if mine == expected else f"files {sorted(set(mine.items()) ^ set(expected.items()))[:4]}"
    if mine[0] != expected[0]:
        return "the last checkpoint has other weights"
    wrong = [step for step, values in mine[1].items() if values != expected[1].get(step)]
    return f"other losses at steps {wrong}" if wrong else ""


def check(job: str, number: int, call: str, name: str, expected: Any) -> tuple[int | str, str]:
    """Fail one call, then run again; return the first run's exit status and a violation or an empty text."""
    reset(job)
    status, text = fork_job(job, number, getattr(errno, name))
    if status not in (0, 2, 75):
        return status, f"ended with {status}: {text[-1500:]}"
    if "Traceback" in text:
        return status, f"a traceback on the terminal: {text[-1500:]}"
    if status == 2 and not any(line.startswith(("error: ", "streamtrain", "pack")) for line in text.splitlines()[-1:]):
        return status, f"its last line is no error: {text[-500:]}"
    if status == 0 and job == "pack":
        return status, differs(job, expected)
    again, text = fork_job(job)
    if again != 0:
        return status, f"the run after it ended with {again}: {text[-1500:]}"
    return status, differs(job, expected)


def draw_pairs(calls: list[list[str]]) -> list[tuple[int, str]]:
    """Return the pairs of a call's number and an error's name to try; each call is a name and a path."""
    alike: dict[tuple[str, str], list[int]] = {}
    for number, (name, path) in enumerate(calls):
        if JOB == "cached" and not path.startswith(f"{WORK}/cache"):
            continue  # the same calls as of ``train``
        alike.setdefault((name, re.sub(r"[0-9]+", "0", path)), []).append(number)
    chosen = {number for same in alike.values() for number in (same[0], same[len(same) // 2], same[-1])}
    pairs = [(n, error) for error, kinds in ERRORS.items() for n in sorted(chosen) if not kinds or calls[n][0] in kinds]
    return random.Random(SEED).sample(pairs, min(INJECTIONS, len(pairs))) if INJECTIONS else pairs


def main() -> None:
    WORK.mkdir(parents=True)
    draw_folder(WORK / "images", 40)
    pack(WORK / "images", WORK / "set", PackOptions())
    # import everything before the first fork
    import streamtrain.cli.pack
    import streamtrain.main
    import streamtrain.training.loop  # noqa: F401

    log = FOLDER / "calls.txt"
    status, text = fork_job(JOB, log=log)
    if status != 0:
        sys.exit(f"the undisturbed job ended with {status}: {text}")
    expected = result(JOB)
    calls = [line.split(" ", 2)[1:] for line in log.read_text(errors="replace").splitlines()]
    pairs = draw_pairs(calls)
    statuses: Counter[str] = Counter()
    violations = 0
    for done, (number, name) in enumerate(pairs):
        print(f"{done} of {len(pairs)}", time.strftime("%H:%M:%S"), number, name, file=sys.stderr, flush=True)
        status, violation = check(JOB, number, " ".join(calls[number]), name, expected)
        statuses[str(status)] += 1
        if violation:
            violations += 1
            call = " ".join(calls[number]).replace(str(WORK), "")
            print(json.dumps({"call": f"{number} {call}", "error": name, "violation": violation}), flush=True)
    print(json.dumps({"job": JOB, "calls": len(calls), "injections": len(pairs), "violations": violations, **statuses}))


if __name__ == "__main__":
    main()
