"""Many steps of the toy's loop: does it grow slower or larger? Step time and memory of every hundred steps.

    python tests/bench_long.py                         400 steps: four minutes on 2 cores
    python tests/bench_long.py --steps 2000            about a quarter of an hour
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import table
from conftest import ROOT  # noqa: E402


def read(path):
    """The rows that a log has so far; its last line may be in the making."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(first, timings, metrics):
    def most(row, kind, of):
        return of(value for name, value in row.items() if name.startswith(kind))
    return (f"{first} to {first + len(timings) - 1}",
            f"{1000 * statistics.median(most(row, 'seconds/', sum) for row in timings):.0f}",
            f"{statistics.median(row['length'] for row in metrics):.1f}",
            f"{statistics.median(most(row, 'memory_gb/', max) for row in timings):.3f}")


def follow(process, run, steps):
    """A row for every hundred steps, while they are made."""
    for first in range(0, steps, 100):
        while len(read(run / "timings.jsonl")) < min(first + 100, steps):
            if process.poll():
                sys.exit(process.stderr.read()[-2000:])
            time.sleep(1)
        part = slice(first, first + 100)
        yield summary(first, read(run / "timings.jsonl")[part], read(run / "metrics.jsonl")[part])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/shapes.py"), "--out", str(run), "--teacher-steps", "60",
             "--sft-steps", "100", "--collect", "4", "--steps", str(steps), "--batch-size", "16",
             "--save-every", "100", "--eval-every", "500"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        table(("steps", "ms a step, median", "tokens a response", "resident GB"), follow(process, run, steps))
        process.communicate()


if __name__ == "__main__":
    main()
