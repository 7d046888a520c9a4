"""Every stage of a run by one process and by several that share it: memory against plan_memory.py, seconds,
and whether what comes out is the same.

    python tests/bench_ranks.py                        60M Qwen2.5-VL, random weights, 152K words, float32, by
                                                       1, 2 and 3 processes: ten minutes on two cores
    python tests/bench_ranks.py --shape 0.3B --processes 1 2 4       0.25B weights: an hour
    python tests/bench_ranks.py --shape 0.3B --questions 8 --tokens 32 --token-budget 4096 --temperature 0 \
        --steps 2 --processes 1 2                                    the README's

The real command line over gloo on the CPU, one thread a process. Memory is the most of any process, less what
a process holds that has only imported torch and transformers; the plan is for responses that all differ.
--temperature 0 is for the comparison of results, as sampling may magnify rounding. Processes that outnumber
the cores share them, so their seconds say nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from shapes import build, data, memory_by_phase, peak_memory_gb, table
import plan_memory
import teachers
import train

STAGES = {"teacher": (teachers, "fill_collection"), "SFT": (train, "fine_tuned_student"),
          "D's pre-training": (train, "pretrained_discriminator"), "setting up": (train.Run, "__init__"),
          "evaluation": (train, "report")}
PHASES = ("generate", "discriminator", "update")                   # of the loop, see Meter
SAME = {"SFT": "sft/model.safetensors", "D's pre-training": "discriminator.safetensors",
        "update": "student/model.safetensors"}


def worker(notes: Path, script: str, options: list[str]):
    """train.py or teachers.py with these options; peak and seconds of each stage are added to a file of this
    process in `notes`."""
    cpu = torch.device("cpu")
    held = peak_memory_gb(cpu, reset=True)
    memory_by_phase()

    def note(stage, gb, seconds):
        with open(notes / f"{os.environ.get('RANK', 0)}.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "gb": gb - held, "seconds": seconds}) + "\n")

    def measured(stage, work):
        def wrapped(*args, **kwargs):
            peak_memory_gb(cpu, reset=True)
            start = time.perf_counter()
            result = work(*args, **kwargs)
            note(stage, peak_memory_gb(cpu), time.perf_counter() - start)
            return result
        return wrapped
    for stage, (where, name) in STAGES.items():
        setattr(where, name, measured(stage, getattr(where, name)))
    of_step = train.Meter.row

    def noted(meter, *row):
        for phase in set(PHASES) & set(meter.seconds):
            note(phase, meter.memory_gb[phase], meter.seconds[phase])
        return of_step(meter, *row)
    train.Meter.row = noted
    sys.argv = [script, *options]
    (teachers if script == "teachers.py" else train).main()


def measure(folder: Path, processes: int, args) -> dict[str, tuple[float, float, float]]:
    """{stage: (GB, planned GB, seconds)} of a run of so many processes; the most of any of them."""
    notes, out = folder / f"notes{processes}", folder / f"out{processes}"
    notes.mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                "--standalone"] * (processes > 1)
    common = ["--data", folder / "data.jsonl", "--device", "cpu", "--dtype", "float32", "--temperature",
              args.temperature, "--max-new-tokens", args.tokens]
    student = folder / "model"
    options = [*common, "--student", student, "--eval-data", folder / "data.jsonl", "--sft-data",
               folder / "data.jsonl", "--out", out, "--batch-size", args.questions, "--sft-batch-size",
               args.questions, "--sft-steps", args.steps, "--discriminator-steps", args.steps, "--steps",
               args.steps, "--rollout-batch", 2, "--num-samples", 2, "--collect", 2, "--token-budget",
               args.token_budget, "--eval-every", 1000, "--sft-lr", 1e-5]
    run = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, text=True)
    # glibc keeps freed blocks of up to 32 MB for later; without that, what is resident is what is in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    collect = ["--teachers", student, "--out", folder / f"collection{processes}.jsonl", "-n", 2,
               "--batch-size", 2, *common]
    for script, own in (("teachers.py", collect),
                        ("train.py", [*options, "--collection", folder / "responses.jsonl"])):
        command = [sys.executable, *launcher, __file__, "--worker", notes, script, *own]
        run(list(map(str, command)), env=env)
    rows = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
    sys.argv = ["plan_memory.py", *map(str, options), "--teachers", str(student), "--processes",
                str(processes)]
    parser = train.make_parser("named")
    parser.add_argument("--processes", type=int)
    planned = {}
    for line in plan_memory.plan(parser.parse_args()).splitlines()[2:]:
        name, gb = line[:24].strip(), float(line[24:].split()[0]) - 0.5
        planned[name.replace(" model", "")] = gb
    return {stage: (max(row["gb"] for row in rows if row["stage"] == stage), planned[stage],
                    max(row["seconds"] for row in rows if row["stage"] == stage))
            for stage in ("SFT", "teacher", "D's pre-training", "setting up", *PHASES, "evaluation")}


def difference(folder: Path, processes: int, first: int, stage: str) -> str:
    """What a stage has made, compared with what the first number of processes made."""
    if stage == "teacher":
        one, other = (folder / f"collection{n}.jsonl" for n in (first, processes))
        return "same bytes" if one.read_bytes() == other.read_bytes() else "OTHER BYTES"
    if stage == "evaluation":
        scores = (json.loads((folder / f"out{n}/evaluation-after.json").read_text())
                  for n in (first, processes))
        one, other = ([row["text"] for row in score["rows"]] for score in scores)
        return "same texts" if one == other else "OTHER TEXTS"
    if stage not in SAME:
        return ""
    one, other = (load_file(folder / f"out{n}" / SAME[stage]) for n in (first, processes))
    weights = [name for name in one if not name.startswith("optimizer ")]
    distance = sum((one[name] - other[name]).square().sum() for name in weights) ** 0.5
    return f"{distance / sum(one[name].square().sum() for name in weights) ** 0.5:.0e}"


def rows_of(folder: Path, args):
    """Rows of the table, as soon as the run of so many processes is over."""
    alone, first = {}, args.processes[0]
    for processes in args.processes:
        for stage, (gb, planned, seconds) in measure(folder, processes, args).items():
            alone.setdefault(stage, seconds)
            yield (processes, stage, f"{gb:.2f}", f"{planned:.2f}", f"{planned / gb - 1:+.0%}",
                   f"{seconds:.1f}", f"{seconds / alone[stage]:.2f}",
                   difference(folder, processes, first, stage))


def main():
    if "--worker" in sys.argv:
        return worker(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=2, help="of SFT, of D's pre-training, and of the loop")
    parser.add_argument("--shape", default="60M")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder / "model", args.shape)
        data(folder, args.questions, args.tokens)
        table(("processes", "stage", "GB of a process", "planned", "off by", "seconds", "of the first",
               "relative difference from the first"), rows_of(folder, args))


if __name__ == "__main__":
    main()
