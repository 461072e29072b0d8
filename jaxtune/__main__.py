"""`python -m jaxtune`: the health check of this machine, or the judgement of another from its data sheet."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

from jaxtune import health
from jaxtune.config import OutputConfig
from jaxtune.device_memory import limit_memory
from jaxtune.devices import SHEETS, Device, sheet, this_device
from jaxtune.errors import UserError
from jaxtune.metrics import format_bytes
from jaxtune.planning import make_plan


def check_here(*, large: bool) -> list[health.Check]:
    """Every check of this machine. large: also the Llama-3-8B step."""
    device = this_device()
    cache = str(OutputConfig("nowhere").compile_cache)
    checks: dict[str, Callable[[], health.Check]] = {
        "versions": health.check_versions,
        "devices": health.check_devices,
        "mesh": partial(health.check_mesh, device),
        "compile cache": partial(health.check_cache, cache),
        "implementations": partial(health.check_implementations, device),
        "a QLoRA step": partial(health.check_step, device),
    }
    if large:
        checks["a Llama-3-8B step"] = partial(health.check_large_step, device)
    return [health.attempt(name, check) for name, check in checks.items()]


def check_sheet(device: Device) -> list[health.Check]:
    """What a data sheet says, what would run, and what would fit; nothing is run."""
    lines = (
        f"{device.kind}: {format_bytes(device.memory)}{' shared with the host' if device.shared else ''}, "
        f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s in {device.compute_dtype}, compute "
        f"capability {device.capability}",
    )
    sheet_values = {"kind": device.kind, "memory_bytes": device.memory, "bandwidth": device.bandwidth}
    plan = make_plan(health.qlora_run(4, 2048), health.LLAMA_3_8B, device)
    return [
        health.Check("data sheet", True, lines, sheet_values),
        health.attempt("implementations", partial(health.check_implementations, device)),
        health.planned_step(plan),
        health.planned_generation(device),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxtune",
        description="Check this machine: versions, devices, implementations, a QLoRA step, memory of an 8B step.",
        epilog="exit status: 0 all passed, 1 something failed, 2 something to correct in the arguments",
    )
    parser.add_argument("--device", help=f"judge another device from its data sheet: {', '.join(SHEETS)}")
    parser.add_argument("--quick", action="store_true", help="leave out the Llama-3-8B step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        limit_memory(None)
        checks = check_sheet(sheet(options.device)) if options.device else check_here(large=not options.quick)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    passed = all(check.ok for check in checks)
    if options.json:
        print(json.dumps({"ok": passed} | {check.name: {"ok": check.ok, **check.values} for check in checks}))
        return 0 if passed else 1
    for check in checks:
        print(f"[{' ok ' if check.ok else 'FAIL'}] {check.name}")
        for line in check.lines:
            print(f"       {line}")
    print("All passed." if passed else "Failed: " + ", ".join(check.name for check in checks if not check.ok))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
