"""kill -9 in all stages of a small toy run; each time it resumes.

    python tests/bench_kills.py --kills 50             about ten minutes on 2 cores; each kill is printed
    python tests/bench_kills.py --processes 2          one of several processes is killed, five minutes

Alone, a process is killed at random moments and started again. Of several, each dies once in each stage, and
torchrun --max-restarts starts all of them again. At the end, the student's weights, metrics.jsonl and more
are compared, byte for byte, with those of a run that was never interrupted.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shapes import table
from conftest import ROOT  # noqa: E402
import eval as evaluation  # noqa: E402
import teachers  # noqa: E402
import train  # noqa: E402

SMALL = ["--out", "run", "--device", "cpu", "--teacher-steps", "40", "--sft-steps", "60",
         "--discriminator-steps", "10", "--steps", "60", "--collect", "2", "--save-every", "3",
         "--eval-every", "10"]
FILES = ("student/model.safetensors", "metrics.jsonl", "rollouts.jsonl", "discriminator.safetensors",
         "collection.jsonl", "evaluation-after.json")
STAGES = (("data", "drawing the world"), ("teachers/qwen", "training the first teacher"),
          ("teachers/internvl", "training the second teacher"), ("sft", "SFT of the student"),
          ("discriminator.safetensors", "collecting, and training the discriminator"),
          ("student", "the loop"), ("evaluation-after.json", "evaluating"), ("", "after the end"))


def stage_of(run: Path) -> str:
    return next(name for mark, name in STAGES if not mark or not (run / mark).exists())


def start(folder, *launcher, options=()):
    return subprocess.Popen([sys.executable, *launcher, *options, *SMALL], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def compare(whole: Path, cut: Path):
    for name in FILES:
        same = (whole / "run" / name).read_bytes() == (cut / "run" / name).read_bytes()
        print(f"{name}: {'the same bytes' if same else 'OTHER BYTES'}")


# What is called again and again in each stage: there a process may die.
PLACES = ((train, "toy_world", 1), (train.AdamW, "step", 5), (teachers, "decode", 5),
          (evaluation, "decode", 5))


def worker(options: list[str]):
    """train.py, in which each process dies once at each of PLACES in each stage."""
    def mortal(place, work, after):
        calls, rank = [], int(os.environ["RANK"])

        def wrapped(*args, **kwargs):
            calls.append(1)
            stage = stage_of(Path("run"))
            own, first = (Path(f"died-{place}-{stage}-{number}") for number in (rank, 1))
            # rank 1 first, so that no two die together
            if len(calls) >= after and not own.exists() and (rank == 1 or first.exists()):
                own.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)
        return wrapped
    for where, name, after in PLACES:
        setattr(where, name, mortal(name, getattr(where, name), after))
    sys.argv = ["train.py", *options]
    train.main()


def several(folder: Path, processes: int):
    """Each of two processes dies in each stage; a run that was not interrupted beside it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.environ["OMP_NUM_THREADS"] = "1"
    whole, cut = folder / "whole", folder / "cut"
    for place, launcher in ((whole, [*torchrun, str(ROOT / "train.py")]),
                            (cut, [*torchrun, "--max-restarts", "100", __file__, "--worker"])):
        place.mkdir()
        begin = time.time()
        process = start(place, *launcher)
        said = process.communicate()[1]
        print(f"exit code {process.returncode} after {time.time() - begin:.0f} s", flush=True)
        if process.returncode:
            print(said[-3000:])
    deaths = [path.name.split("-") for path in sorted(cut.glob("died-*"))]
    table(("rank", "killed while", "in"), ((rank, stage, place) for _, place, stage, rank in deaths))
    compare(whole, cut)


def alone(folder: Path, kills: int):
    """A process that is killed so often at random, over all stages."""
    rng, killed, failures, hastes = random.Random(0), Counter(), 0, 0
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    cut.mkdir()
    begin = time.time()
    start(whole, str(ROOT / "train.py")).communicate()
    seconds = time.time() - begin
    print(f"uninterrupted: {seconds:.0f} s", flush=True)
    while sum(killed.values()) < kills:
        process = start(cut, str(ROOT / "train.py"))
        try:                                   # long enough for the first stage, which trains three models
            process.wait(rng.uniform(2, 2 + seconds / 3))
            hastes += 1                                        # it was done: begin anew, to kill more
            failures += process.returncode != 0
            if process.returncode:
                print(process.stderr.read()[-2000:])
            if hastes and sum(killed.values()) < kills - 5:
                subprocess.run(["rm", "-rf", str(cut / "run")], check=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stage = stage_of(cut / "run")
            killed[stage] += 1
            print(f"kill {sum(killed.values())}: while {stage}", flush=True)
    said = start(cut, str(ROOT / "train.py")).communicate()
    table(("killed while", "times"), killed.items())
    print(f"{failures} of the runs failed to go on; runs that came to their end: {hastes + 1}")
    if not (cut / "run" / "student").exists():
        print(said)
    compare(whole, cut)


def main():
    if "--worker" in sys.argv:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.processes > 1:
            several(Path(folder), args.processes)
        else:
            alone(Path(folder), args.kills)


if __name__ == "__main__":
    main()
