"""Kill one of several processes of a run at random moments, and compare its end with that of one process's run.

    python benchmarks/reliability/kill_processes.py --processes 3 --kills 10

A tiny Llama is tuned over a mesh of as many CPU devices, on loopback, saving after each step. At a random time after
all joined (before that JAX itself gives up, within 300 s) a process that is drawn gets SIGKILL, and every third time
SIGTERM. The others must end by themselves: with status 3 and a message that names it, or, where it was asked to stop,
all alike with everything saved. All are then started again with `--resume auto`. No step that was saved may be lost,
and the losses must be those of one process that nobody disturbed: of the first six steps within 1e-5; of all within
1e-4 where the optimizer is `adamw` (`--optim`), and within 1e-2 with 8-bit moments, which at this learning rate double
what rounding began with at every step or so. Prints what the kills hit; exit status 1 where anything is otherwise.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from kill_runs import command, moment, write_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from compared import computed  # noqa: E402
from several import logs_of, start_processes  # noqa: E402

from jaxtune.checkpoint import Checkpoints  # noqa: E402

# Within this time the others have to end.
ENDED_SECONDS = 60.0


def wait_all(processes: list[subprocess.Popen[bytes]], until: float) -> bool:
    """Whether all have ended by then; whoever has not is killed."""
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(0.02)
    ended = all(process.poll() is not None for process in processes)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    return ended


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill one of several processes at random moments.")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--optim", choices=["adamw_8bit", "adamw"], default="adamw_8bit")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds after the start to kill within")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options = parser.parse_args()
    rng, count = random.Random(options.seed), options.processes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = write_run(directory, options.steps)
        rows = ["--set", f"train.batch_size={2 * count}", "--set", f"train.optim={options.optim}"]
        one = [*command(config, directory / "one"), *rows]
        done = subprocess.run(one, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr)
            return 1
        several = ["--config", str(config), "--resume", "auto", "--set", f"mesh.data={count}", *rows]
        output, kills, starts, slowest = directory / "several", 0, 0, 0.0
        several += ["--set", f"output.dir={output}"]
        checkpoints, longest, saved = Checkpoints(output / "checkpoints"), options.longest, 0
        while True:
            starts += 1
            begun = time.monotonic()
            processes = start_processes(several, count, directory)
            while time.monotonic() < begun + 300 and "processes are here" not in logs_of(directory, count)[0]:
                time.sleep(0.05)
            here = time.monotonic()
            wait = here + (rng.uniform(0, longest) if kills < options.kills else 600)
            while time.monotonic() < wait and all(process.poll() is None for process in processes):
                time.sleep(0.02)
            if any(process.poll() is not None for process in processes):
                # Slower ones still leave.
                ended = wait_all(processes, time.monotonic() + ENDED_SECONDS)
                codes = [process.returncode for process in processes]
                longest = 1.0 + (time.monotonic() - here)
                if not ended or any(codes):
                    print(f"start {starts}: exit statuses {codes}\n" + "\n".join(logs_of(directory, count)))
                    return 1
                if kills >= options.kills:
                    break
                # It was over before the kill: from the beginning.
                shutil.rmtree(output)
                saved = 0
                continue
            drawn = rng.randrange(count)
            how = signal.SIGTERM if kills % 3 == 2 else signal.SIGKILL
            processes[drawn].send_signal(how)
            killed = time.monotonic()
            ended = wait_all(processes, killed + ENDED_SECONDS)
            took, codes = time.monotonic() - killed, [process.returncode for process in processes]
            slowest, kills = max(slowest, took), kills + 1
            logs, now = logs_of(directory, count), checkpoints.latest() or 0
            others = [code for number, code in enumerate(codes) if number != drawn]
            # A process that is not yet connected to process 0 is missed by JAX itself, which aborts.
            stopped = codes == [143] * count or codes == [0] * count
            if not ended or now < saved or not (stopped or set(others) <= {3, -signal.SIGABRT, 2}):
                print(f"start {starts}, {how.name} to {drawn}: {codes}, step {now} after {saved}\n" + "\n".join(logs))
                return 1
            saved = now
            print(
                f"{kills}: {how.name} to process {drawn} {killed - here:.1f} s after the start, {moment(output)}; exit "
                f"statuses {codes} within {took:.1f} s; step {saved} is saved",
                flush=True,
            )
        for step in checkpoints.steps():
            checkpoints.verify(step)
        runs = [computed(path) for path in (output, directory / "one")]
        losses = [{r["step"]: r["loss"] for r in run if "loss" in r} for run in runs]
        if losses[0].keys() != losses[1].keys():
            print(f"steps {sorted(losses[0])} are recorded")
            return 1
        apart = [float(np.abs(losses[0][step] / losses[1][step] - 1)) for step in sorted(losses[1])]
        first, worst = max(apart[:6]), max(apart)
        print(
            f"seed {options.seed}: {count} processes, {kills} kills, {starts} starts; the others ended within "
            f"{slowest:.1f} s; losses within {first:.1e} of one process's in the first six steps, "
            f"{worst:.1e} in {options.steps}"
        )
        return int(first > 1e-5 or worst > (1e-4 if options.optim == "adamw" else 1e-2))


if __name__ == "__main__":
    sys.exit(main())
