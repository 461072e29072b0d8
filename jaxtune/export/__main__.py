"""`python -m jaxtune.export --run DIR --to merged`: see `jaxtune.export.run`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.gguf.mixture import FILE_TYPES
from convert.merge import DTYPES
from jaxtune import hub
from jaxtune.config import ModelConfig
from jaxtune.errors import UserError
from jaxtune.export.run import TARGETS, ExportConfig, export_model, export_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m jaxtune.export", description="Write a run for other programs.")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, metavar="DIR", help="output.dir of a finished run")
    subject.add_argument("--model", metavar="NAME", help="a base model alone, named as model.name_or_path")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--out", type=Path, help="directory to make; by default RUN/TARGET")
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="what the adapter is added to: the 4-bit weights it was trained with (default), or the stored ones",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of merged weights")
    parser.add_argument("--type", nargs="+", choices=tuple(FILE_TYPES), default=["Q4_K_M"], help="of GGUF files")
    parser.add_argument("--text", type=Path, metavar="FILE", help="compare logits on this text")
    parser.add_argument("--no-verify", action="store_true", help="do not read back and compare logits")
    parser.add_argument("--max-difference", type=float, metavar="X", help="largest relative difference of logits")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload the directory; asks for a login before")
    parser.add_argument("--public", action="store_true", help="make a repository that is new public, not private")
    options = parser.parse_args(arguments)
    if options.out is None and options.run is None:
        parser.error("--model needs --out DIR")
    logging.basicConfig(format="%(name)s: %(message)s", force=True)
    # Read when the GPU client starts: memory is taken as it is needed instead of three quarters of the card at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = ExportConfig(
        target=options.to,
        out=options.out or options.run / options.to,
        base=options.base,
        dtype=options.dtype,
        file_types=tuple(options.type),
        text=options.text,
        verify=not options.no_verify,
        max_difference=options.max_difference,
        overwrite=options.overwrite,
    )
    try:
        if options.push_to_hub is not None:
            hub.check_login(options.push_to_hub)
        if options.run is not None:
            directory = export_run(options.run, config)
        else:
            directory = export_model(ModelConfig(options.model), config)
        print(directory)
        if options.push_to_hub is not None:
            print(hub.push(directory, options.push_to_hub, private=not options.public))
    except (UserError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
