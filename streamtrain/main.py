"""One rank of a training run: ``deepspeed streamtrain/main.py --config vits16.yaml data.shards=SET run.dir=RUN``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    if not __package__:
        # run as a script: replace streamtrain/ on sys.path by its parent folder
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    # before the slow imports, so that Ctrl-C during them prints no traceback
    from streamtrain.run.interrupts import exit_on_interrupt

    exit_on_interrupt()

import argparse
import logging
import signal
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from shards.errors import ShardError
from shards.reading.mixture import AnySet
from streamtrain.checkpoint.retention import remove_leftovers
from streamtrain.config.ineffective import ineffective_settings
from streamtrain.config.load import describe_shape, load_config, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.config.user_code import AUGMENTATION_ARGUMENTS, load_user_code
from streamtrain.data.stream import build_stream_order, check_cache, check_cache_folder, check_state, stream_identity
from streamtrain.engine.meeting import TELL_SECONDS, FailedStart, meet
from streamtrain.engine.rendezvous import AddressError, Launch, MeetingError, check_master, lost_rank_message
from streamtrain.engine.runtime import BUILDER_WARNING, choose_accelerator, uses_gpu
from streamtrain.errors import ConfigError, StreamtrainError, UserCodeError
from streamtrain.evaluation.held_out import check_stop_has_labels, held_out, reference_images
from streamtrain.interop.feature_teacher import with_teacher_model
from streamtrain.planning.images import stored_images
from streamtrain.planning.shapes import backbone_shapes
from streamtrain.reporting.trackers import check_trackers
from streamtrain.run.command_line import CommandParser, local_path, raise_descriptor_limit
from streamtrain.run.directory import (
    MESSAGES_NAME,
    check_weights,
    completion_message,
    make_run_dir,
    saved_state,
    starting_checkpoint,
)
from streamtrain.run.gpu_allocator import set_allocator_defaults
from streamtrain.run.lock import run_lock
from streamtrain.run.logs import (
    configure_logging,
    hide_library_messages,
    keep_messages,
    log_printed_lines,
    save_traceback,
)
from streamtrain.run.messages import configuration_line
from streamtrain.run.resume_policy import (
    DISK_KEY,
    MEMORY_KEY,
    accepted_keys,
    add_accept_options,
    check_resume,
    has_same_shards,
    recorded_constants,
    separate_overrides,
    version_changes,
    with_recorded_teacher,
)
from streamtrain.run.signals import EXIT_FAILED, EXIT_USAGE, STOP_STATUSES, has_stop_file, remove_old_stop_file
from streamtrain.training.start_checks import check_folders, check_resources

OTHER_RANKS_WAIT_SECONDS = 10.0

# the module's name is __main__ when it runs as a script
logger = logging.getLogger("streamtrain.main")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training run."""
    parser.add_argument("--config", required=True, help="path of a YAML file, or the name of a recipe in configs/")
    parser.add_argument(
        "--resume", type=local_path, metavar="RUN", help="start from the latest checkpoint of another run"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check the configuration and the data, write a picture of crops to the run directory, and exit",
    )  # fmt: skip
    add_accept_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings that override the YAML file")
    # DeepSpeed's launcher adds this option; the rank is read from the environment
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def check(
    config: Config, launch: Launch, source: Path | None, accepted: Collection[str], reshaped: Collection[str] = ()
) -> AnySet:
    """Check everything that needs no other rank, and return the shard set; torch is loaded only to find a GPU.

    The run directory is created last, so that a failed check leaves none behind.
    """
    config.batch_split(launch.world_size)
    config.objective.koleo.samples(config.data.micro_batch, launch.world_size)
    check_weights(config, source)
    check_trackers(config.monitor)
    shard_set = open_shard_set(config)
    check_folders(config)
    if config.evaluation.every:
        check_stop_has_labels(config, held_out(config, shard_set)[1])
    reference_images(config)
    saved = saved_state(source) if source is not None else None
    order = build_stream_order(config, shard_set, launch.world_size, saved["data"]["lane_block"] if saved else None)
    check_cache(config, shard_set, order, launch.rank, launch.world_size, launch.local_world_size)
    changes, versions = [], []
    if source is not None and saved is not None:
        changes = check_resume(config, source, saved, launch.world_size, accepted)
        changes += check_state(saved["data"], stream_identity(shard_set, order), accepted)
        versions = version_changes(config, source, saved)
    load_user_functions(config)
    images = stored_images(shard_set, config.crops.window)
    notes = check_resources(config, launch, accepted, on_gpu=uses_gpu(config.engine, launch), images=images)
    make_run_dir(Path(config.run.dir), launch.rank)
    check_cache_folder(config)
    if changes:
        logger.info("resuming with accepted changes: %s", "; ".join(changes))
    if launch.rank == 0:
        if versions:
            logger.warning("resuming with other versions: %s; results may differ", "; ".join(versions))
        for line in filter(None, (describe_shape(key, config) for key in sorted(reshaped))):
            logger.info(line)
        for line in (*notes, *ineffective_settings(config, launch.world_size, shard_set.num_samples)):
            logger.warning(line)
    return shard_set


def load_user_functions(config: Config) -> None:
    """Import the code of the user that settings name, if any; most of it loads torch.

    Raises:
        UserCodeError: it cannot be imported, called or trained.
    """
    if config.data.augmentations is not None:
        load_user_code("data.augmentations", config.data.augmentations, AUGMENTATION_ARGUMENTS)
    if config.model.factory is not None:
        backbone_shapes(config.model)


def describe_teacher(config: Config, complete: Mapping[str, Any] | None) -> Config:
    """Return ``config`` with the recorded or the current shape of a feature teacher.

    Args:
        complete: ``state.json`` of the checkpoint that completes the run, whose teacher may have been deleted.

    Raises:
        StreamtrainError: as in ``with_teacher_model``, if the run is not complete.
    """
    try:
        return with_teacher_model(config)
    except StreamtrainError:
        if complete is None:
            raise
        # differences to the recorded settings are reported by the comparison with them
        return with_recorded_teacher(config, complete)


def check_complete(
    config: Config, launch: Launch, source: Path, saved: Mapping[str, Any], accepted: Collection[str]
) -> None:
    """Compare the settings and the images of a start with the checkpoint that completes the run, as for a resume.

    Raises:
        StreamtrainError, ShardError: they differ in a way that is not accepted.
    """
    check_resume(config, source, saved, launch.world_size, accepted)
    try:
        shard_set = open_shard_set(config)
    except ShardError:
        # the images of a complete run may have been deleted
        if has_same_shards(config, saved):
            return
        raise
    order = build_stream_order(config, shard_set, launch.world_size, saved["data"]["lane_block"])
    check_state(saved["data"], stream_identity(shard_set, order), accepted)


def train_rank(arguments: argparse.Namespace) -> int:
    """Run this process's rank and return its exit status.

    0: completed; 75 or 130: stopped early after a checkpoint; 2: an error that the user can fix;
    3: stopped after a checkpoint by ``evaluation.stop_if_below``; 1: another failure.
    """
    configure_logging()
    try:
        launch = Launch.from_environment()
    except StreamtrainError as error:
        let_rank_0_report()
        logger.error(error)
        return EXIT_USAGE
    configure_logging(launch.rank, launch.world_size)
    try:
        reshaped: set[str] = set()
        config = load_config(arguments.config, arguments.overrides, launch.world_size, reshaped)
        run_dir = Path(config.run.dir)
        is_stop_file_old = launch.rank == 0 and has_stop_file(run_dir)
        source = starting_checkpoint(run_dir, arguments.resume)
        accepted = accepted_keys(arguments, launch.rank)
        if arguments.dry_run:
            # a run may be checked on a smaller machine than the one that trains
            accepted |= {MEMORY_KEY, DISK_KEY}
        saved = saved_state(source) if source is not None else None
        is_own = source is not None and source.parent.parent == run_dir
        if is_own and saved is not None and (constants := recorded_constants(config, saved, reshaped)):
            config = load_config(arguments.config, [*arguments.overrides, *constants], launch.world_size)
        complete = None if arguments.dry_run else completion_message(config, source)
        config = describe_teacher(config, saved if complete else None)
        if complete and source is not None and saved is not None:
            check_complete(config, launch, source, saved, accepted)
            if source.parent.parent == run_dir and launch.rank == 0:
                # the last save may have been killed; a complete run may be read-only, or still be ending
                with suppress(StreamtrainError), run_lock(run_dir, launch.rank):
                    remove_leftovers(run_dir)
            logger.info(complete)
            return 0
        if launch.world_size > 1:
            check_master(launch)
        shard_set = check(config, launch, source, accepted, reshaped)
        with run_lock(run_dir, launch.rank) as has_moved:
            keep_messages(run_dir / MESSAGES_NAME, launch.rank, launch.world_size)
            device = choose_accelerator(config.engine, launch)
            num_images = shard_set.num_samples
            if "dir" not in config.run.model_fields_set:
                logger.info("run.dir is not given, so the run is in %s", run_dir)
            logger.info(configuration_line(config, arguments.config, num_images, launch.world_size, device))
            with log_printed_lines(BUILDER_WARNING, "deepspeed"):
                from streamtrain.training.loop import dry_run, train  # torch and DeepSpeed take seconds to load

            if arguments.dry_run:
                return dry_run(config, shard_set) if launch.rank == 0 else 0
            if is_stop_file_old:
                remove_old_stop_file(run_dir)
            return train(config, launch, shard_set, arguments.resume, accepted, has_moved)
    except (StreamtrainError, ShardError) as error:
        if isinstance(error, UserCodeError) and error.__cause__ is not None:
            save_traceback(error)
        report_error(error, launch)
        is_temporary = isinstance(error, MeetingError) or (isinstance(error, FailedStart) and error.is_temporary)
        return EXIT_FAILED if is_temporary else EXIT_USAGE
    except RuntimeError as error:
        message = lost_rank_message(error, launch.rank)
        if message is None:
            raise
        save_traceback(error)
        logger.error(message)
        return EXIT_FAILED
    except OSError as error:
        # the run needs this file; errors of other files are only warnings
        save_traceback(error)
        reason = error.strerror or str(error) or type(error).__name__
        path = f"{error.filename}: " if error.filename is not None else ""
        report_error(StreamtrainError(f"{path}{reason}; correct that and run the same command again"), launch)
        return EXIT_USAGE


def report_error(error: Exception, launch: Launch) -> None:
    """Log why the run ends: once on each machine, as every rank knows it; otherwise by rank 0 if it has the same error.

    A launcher ends the other ranks on its own machine. Ranks on other machines receive the error if they are reachable.
    """
    if isinstance(error, FailedStart) or (launch.spans_machines and isinstance(error, AddressError)):
        if launch.local_rank == 0:
            logger.error(error)
        return
    if launch.spans_machines and not has_met():
        if launch.rank == 0:
            # at once: this may also be a mistake that all ranks see
            logger.error(error)
        try:
            meet(launch, timedelta(seconds=TELL_SECONDS), error=str(error))
        except FailedStart as told:
            if launch.rank != 0 and launch.local_rank == 0:
                logger.error(told)
        except ConfigError:
            if launch.rank != 0:
                logger.error(error)
        return
    let_rank_0_report()
    logger.error(error)


def has_met() -> bool:
    """Return whether this process is in a process group."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized())


def let_rank_0_report() -> None:
    """Wait on a rank other than 0 before it reports an error.

    Most errors occur on all ranks: rank 0 reports them, and the launcher ends the others while they wait. A rank that
    is still running after the wait has an error of its own to report.
    """
    if os.environ.get("RANK", "0").strip() not in ("", "0"):
        time.sleep(OTHER_RANKS_WAIT_SECONDS)


class RankParser(CommandParser):
    """A parser whose errors are reported once, not by every rank."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        let_rank_0_report()
        super().error(message)


def run_process(arguments: argparse.Namespace, command: str | None = None) -> NoReturn:
    """Run this process's rank and end the process; a run that was stopped logs the ``command`` that resumes it.

    A failed rank exits at once, because its threads and the process group would wait for the other ranks.
    """
    raise_descriptor_limit()
    set_allocator_defaults()
    hide_library_messages()
    try:
        status = train_rank(arguments)
        if status in STOP_STATUSES and command is not None:
            logger.info("  %s", command)
    except Exception:
        traceback.print_exc()
        status = EXIT_FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)
    # the run is complete: a signal that arrives while the process ends changes nothing
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of one rank."""
    parser = RankParser(
        prog="main.py",
        description="Run one rank of a training run. A launcher (deepspeed, torchrun, srun) starts this script once "
        "per rank; without a launcher it is the only rank. `streamtrain train` starts the ranks itself.",
        epilog="Example: deepspeed --num_gpus 8 streamtrain/main.py --config vits16.yaml data.shards=sets/photos "
        "run.dir=runs/photos run.steps=20000",
    )
    add_arguments(parser)
    # overrides may come before, between and after the options
    arguments = parser.parse_intermixed_args()
    separate_overrides(arguments)
    return arguments


def main() -> int:
    """Run the rank of this command line and return its exit status."""
    return train_rank(parse_arguments())


if __name__ == "__main__":
    run_process(parse_arguments())
