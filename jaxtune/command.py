"""The command line of the main job. Arguments and configuration are read before anything slow is imported."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxtune.config_io import check_files, load_config
from jaxtune.errors import Abandoned, Interrupted, UserError
from jaxtune.launch import Launch, find_launch

_EXIT_CODES = """\
exit status:
  0          the run is complete
  1          a defect of this program, with a traceback
  2          something you can fix, said in one message (--debug adds the traceback)
  3          of several processes another one has ended; start all of them again with --resume auto
  130, 143   stopped by Ctrl-C (SIGINT) or SIGTERM; what was done is saved, and --resume continues it
"""


def make_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m jaxtune.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.train",
        description="Fine-tune a model with (Q)LoRA.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override: train.max_steps=5")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="always",
        choices=["always", "auto"],
        help="continue from the newest checkpoint in output.dir; auto: or start, where there is none yet",
    )
    several = parser.add_argument_group(
        "several processes", "one on each host, or for each GPU; under srun and mpirun they are found (docs/scale.md)"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0, and a free port there")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and why an op's implementation is used")
    return parser


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """As Python shows them, but for what comes too late: a write that ends after Orbax has given up the save."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def process() -> int:
    """`main` for a process of its own, which then ends at once: to take apart all that was imported takes a second.

    What others have registered for the end of the process (`atexit`) is done before.
    """
    ended: list[int] = []
    # The first to be registered is the last to be called.
    atexit.register(_end, ended)
    ended.append(main())
    # All is done: what is left has nothing to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return ended[0]


def _end(ended: Sequence[int]) -> None:
    if ended:
        _leave(ended[0])


def _leave(status: int) -> NoReturn:
    for stream in sys.stdout, sys.stderr:
        # It may be closed, and who reads it gone.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the main job and return the exit status (`--help` lists them)."""
    options = make_parser().parse_args(arguments)
    try:
        launch = find_launch(options.coordinator, options.processes, options.process_id, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if launch is None:
        return _run(options, None)
    try:
        status = _run(options, launch)
    except BaseException:  # noqa: BLE001 - shown, and then this process ends
        traceback.print_exc()
        status = 1
    # What JAX does at an ordinary exit waits for the other processes, which may be gone.
    _leave(status)


def _run(options: argparse.Namespace, launch: Launch | None) -> int:
    # By force, since an imported library may have set up logging already.
    where = f"process {launch.process}: " if launch is not None and launch.process > 0 else ""
    logging.basicConfig(format=f"{where}%(name)s: %(message)s", force=True)
    for package in ("jaxtune", "pallas_kernels"):
        logging.getLogger(package).setLevel(logging.INFO if options.debug else logging.WARNING)
    if not options.debug:
        # Where a save fails, Orbax's threads log their tracebacks, and it raises what is said in one message here.
        for library in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        sys.unraisablehook = _unraisable
    # Read when the GPU client starts: memory is taken as it is needed instead of three quarters of the card at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        config = load_config(options.config, options.set)
        check_files(config)
        # Both take seconds: by name, so that help and the mistakes above are answered at once.
        if launch is None:
            importlib.import_module("jaxtune.device_memory").start_devices(config.train.memory_limit)
        importlib.import_module("jaxtune.train").run(
            config, resume={"always": True, "auto": "auto"}.get(options.resume), launch=launch
        )
    except (Interrupted, Abandoned) as stopped:
        print(f"\n{where}{stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        # Before the loop, or behind it.
        print("\nstopped; the same command with --resume auto goes on from what is saved", file=sys.stderr)
        return 130
    except (UserError, NotImplementedError) as error:
        if options.debug:
            raise
        print(f"{where}error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if options.debug:
            raise
        hint = "check the path, its permissions and the disk"
        print(f"{where}error: the system refuses: {error}; {hint}", file=sys.stderr)
        return 2
    return 0
