"""The arguments of `python -m jaxtune.generate` and `python -m jaxtune.chat`, read before anything slow is imported."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxtune.errors import UserError

CHAT_HELP = "/clear forgets the conversation, /undo its last turn; /exit or Ctrl-D ends; Ctrl-C cuts an answer short"


def make_generate_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m jaxtune.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune.generate",
        description="Continue prompts. One prompt is answered as a stream of text, several together as a batch.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable; - reads stdin")
    parser.add_argument("--raw", action="store_true", help="continue the text itself: no chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt, on one line")
    _add_sampling_arguments(parser)
    return parser


def make_chat_parser() -> argparse.ArgumentParser:
    """The arguments of `python -m jaxtune.chat`."""
    parser = argparse.ArgumentParser(prog="python -m jaxtune.chat", description="Talk with a model.", epilog=CHAT_HELP)
    _add_model_arguments(parser)
    _add_sampling_arguments(parser)
    return parser


def generate(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m jaxtune.generate`; returns the exit status: 0, or 2 for an error that the user can fix."""
    options = make_generate_parser().parse_args(arguments)
    if not options.prompt:
        return _fail("name a prompt with --prompt")
    return _run("jaxtune.generate", options)


def chat(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m jaxtune.chat`; returns the exit status: 0, or 2 for an error that the user can fix."""
    return _run("jaxtune.chat", make_chat_parser().parse_args(arguments))


def _run(module: str, options: argparse.Namespace) -> int:
    if options.model is None and options.adapter is None:
        return _fail("name a model with --model, or an adapter with --adapter")
    if options.adapter is not None and not (options.adapter.expanduser() / "adapter_config.json").is_file():
        inside = options.adapter / "adapter"
        is_run = (inside.expanduser() / "adapter_config.json").is_file()
        remedy = f"name the run's adapter, {inside}" if is_run else "name an adapter's directory"
        return _fail(f"--adapter {options.adapter}: there is no adapter_config.json in it; {remedy}")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        # Takes seconds: by name, so that help and the mistakes above are answered at once.
        return int(importlib.import_module(module).run(options))
    except (UserError, NotImplementedError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what answers."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="as in model.name_or_path; left out, the adapter's base model")
    group.add_argument("--adapter", type=Path, help="directory of a PEFT adapter, such as runs/mine/adapter")
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="compute dtype")
    group.add_argument("--no-4bit", action="store_true", help="hold the weights in the compute dtype instead of NF4")
    group.add_argument("--head", default="dtype", choices=["dtype", "int8", "nf4"], help="how the output head is held")
    group.add_argument(
        "--embedding-on-host",
        action=argparse.BooleanOptionalAction,
        help="the embedding table stays in host memory (on a GPU with memory of its own, unless it is the head, too)",
    )
    group.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    group.add_argument("--memory-limit", metavar="SIZE", help="of the GPU in all, such as 6GiB")


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how it answers."""
    group = parser.add_argument_group("answer")
    group.add_argument("--max-new-tokens", type=int, default=256, help="at most this many a prompt (256)")
    group.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most likely token")
    group.add_argument("--top-k", type=int, help="draw among the k most likely tokens")
    group.add_argument("--top-p", type=float, help="draw among the fewest tokens whose probabilities add up to p")
    group.add_argument(
        "--min-p", type=float, help="draw among tokens at least p times as likely as the most likely one"
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    group.add_argument("--system", metavar="TEXT", help="system message before the prompt")
