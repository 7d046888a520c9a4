"""Peak memory of a process while the policy is updated: one process alone, and one of several that share the
weights.

    python tests/bench_ranks.py                        60M Qwen2.5-VL, random weights, 152K words, float32, 1
                                                       and 4 processes: four minutes on two cores
    python tests/bench_ranks.py --shape 0.3B --steps 2               0.25B weights: a quarter of an hour

The real command line over gloo on the CPU: one question per process and micro-batch, so that all hold as many
activations at a time. The largest of all processes and steps counts, less what a process holds that has only
imported torch and transformers. Weights, gradients and optimizer states are all there (bytes held: policy,
reference, D and the AdamW states of policy and D). The seconds are of processes that share the cores of one
machine, and say nothing of GPUs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import build, data, table
import train

PHASES = ("generate", "discriminator", "update")


def worker(folder: Path, options: list[str]):
    """train.py with these options; each step's peaks and seconds are added to a file of this process in
    `folder`."""
    held = train.peak_memory_gb(train.torch.device("cpu"), reset=True)
    of_step = train.Meter.row

    def noted(meter, *row):
        with open(folder / f"{os.environ.get('RANK', 0)}.jsonl", "a") as file:
            file.write(json.dumps({"held": held, "memory_gb": meter.memory_gb, "seconds": meter.seconds})
                       + "\n")
        return of_step(meter, *row)
    train.Meter.row = noted
    sys.argv = ["train.py", *options]
    train.main()


def measure(folder: Path, processes: int, steps: int, options: list[str]) -> tuple[dict[str, float],
                                                                                   dict[str, float], float]:
    """(peak GB by phase, seconds by phase, GB of the interpreter) of a run of so many processes; the most of
    any process."""
    notes, G, R = folder / f"notes{processes}", 2, 8
    notes.mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                "--standalone"] * (processes > 1)
    command = [sys.executable, *launcher, __file__, "--worker", notes, "--student", folder / "student",
               "--data", folder / "data.jsonl", "--collection", folder / "responses.jsonl", "--out",
               folder / f"out{processes}", "--device", "cpu", "--dtype", "float32", "--batch-size", 4,
               "--token-budget", 1, "--rollout-batch", 1, "--num-samples", G, "--collect", 2,
               "--max-new-tokens", R, "--steps", steps, "--discriminator-steps", 1, *options]
    # glibc keeps freed blocks of up to 32 MB for later; without that, what is resident is what is in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=env)
    rows = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
    phases = [phase for phase in PHASES if phase in rows[0]["seconds"]]
    return ({phase: max(row["memory_gb"][phase] for row in rows) for phase in phases},
            {phase: max(row["seconds"][phase] for row in rows) for phase in phases},
            max(row["held"] for row in rows))


def rows_of(folder, counts, steps, options):
    """Rows of the table, as soon as the run of so many processes is over."""
    first = {}
    for processes in counts:
        peak, seconds, base = measure(folder, processes, steps, options)
        for phase in peak:
            beyond = peak[phase] - base
            yield (processes, phase, f"{peak[phase]:.2f}", f"{base:.2f}", f"{beyond:.2f}",
                   f"{beyond / first.setdefault(phase, beyond):.0%}", f"{seconds[phase]:.1f}")


def main():
    if "--worker" in sys.argv:
        return worker(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--shape", default="60M")
    parser.add_argument("--options", nargs="*", default=[], help="more options for train.py: NAME or "
                        "NAME=VALUE")
    args = parser.parse_args()
    options = [f"--{option}" for option in args.options]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder / "student", args.shape)                # apart from --out: its digest must stay the same
        data(folder, 4, 8)
        table(("processes", "phase", "peak of a process, GB", "interpreter, GB", "beyond it, GB",
               "of the first", "seconds"), rows_of(folder, args.processes, args.steps, options))


if __name__ == "__main__":
    main()
