"""Many steps of the toy's loop: does it grow slower or larger? Step time and memory around step 150 and at
the end.

    python tests/bench_long.py --steps 2000            about a quarter of an hour on 2 cores
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import table
from conftest import ROOT  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", f"{folder}/run", "--teacher-steps",
                        "60", "--sft-steps", "300", "--collect", "4", "--steps", str(steps), "--batch-size",
                        "16", "--save-every", "100", "--eval-every", "500"], check=True, capture_output=True)
        rows = [json.loads(line) for line in open(Path(folder) / "run" / "timings.jsonl")]
        tokens = [json.loads(line)["length"] for line in open(Path(folder) / "run" / "metrics.jsonl")]

    def summary(part):
        seconds = [sum(value for name, value in row.items() if name.startswith("seconds/"))
                   for row in rows[part]]
        memory = [max(value for name, value in row.items() if name.startswith("memory_gb/"))
                  for row in rows[part]]
        return [f"{1000 * statistics.median(seconds):.0f}", f"{statistics.median(tokens[part]):.1f}",
                f"{statistics.median(memory):.3f}"]
    table(("steps", "ms a step, median", "tokens a response", "resident GB"), [
        ("100 to 199", *summary(slice(100, 200))), (f"{steps - 100} to {steps - 1}",
                                                    *summary(slice(steps - 100, steps)))])


if __name__ == "__main__":
    main()
