"""kill -9 at random moments over all stages of a small toy run; each time it is started again.

    python tests/bench_kills.py --kills 50             about ten minutes on 2 cores; each kill is printed

At the end, the student's weights, metrics.jsonl and rollouts.jsonl are compared, byte for byte, with those of
a run that was never interrupted.
"""
import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shapes import table
from conftest import ROOT  # noqa: E402

SMALL = ["--out", "run", "--device", "cpu", "--teacher-steps", "40", "--sft-steps", "60",
         "--discriminator-steps", "10", "--steps", "60", "--collect", "2", "--save-every", "3",
         "--eval-every", "10"]
FILES = ("student/model.safetensors", "metrics.jsonl", "rollouts.jsonl", "discriminator.safetensors",
         "collection.jsonl")
STAGES = (("data", "drawing the world"), ("teachers/qwen", "training the first teacher"),
          ("teachers/internvl", "training the second teacher"), ("sft", "SFT of the student"),
          ("discriminator.safetensors", "collecting, and training the discriminator"),
          ("student", "the loop"), ("evaluation-after.json", "evaluating"), ("", "after the end"))


def start(folder):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *SMALL], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    rng, killed, failures, hastes = random.Random(0), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        whole.mkdir()
        cut.mkdir()
        begin = time.time()
        said = start(whole).communicate()
        seconds = time.time() - begin
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        while sum(killed.values()) < args.kills:
            process = start(cut)
            try:                                                   # Python and torch take seconds to begin
                process.wait(rng.uniform(2, 2 + seconds / 6))
                hastes += 1                                        # it was done: begin anew, to kill more
                failures += process.returncode != 0
                if process.returncode:
                    print(process.stderr.read()[-2000:])
                if hastes and sum(killed.values()) < args.kills - 5:
                    subprocess.run(["rm", "-rf", str(cut / "run")], check=True)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                stage = next(name for mark, name in STAGES if not mark or not (cut / "run" / mark).exists())
                killed[stage] += 1
                print(f"kill {sum(killed.values())}: while {stage}", flush=True)
        said = start(cut).communicate()
        table(("killed while", "times"), killed.items())
        print(f"{failures} of the runs failed to go on; runs that came to their end: {hastes + 1}")
        for name in FILES:
            same = (whole / "run" / name).read_bytes() == (cut / "run" / name).read_bytes()
            print(f"{name}: {'the same bytes' if same else 'OTHER BYTES'}")
        if not (cut / "run" / "student").exists():
            print(said)


if __name__ == "__main__":
    main()
