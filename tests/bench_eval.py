"""eval.py on 200 and on 2,000 made questions, each with a picture of its own inside a TSV.

It measures seconds, and peak memory, which must not grow with the number. The 2,000 are asked once more, and
killed twice on the way.

    python tests/bench_eval.py
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import table
from conftest import ROOT, TEXTS  # noqa: E402
from test_benchmarks import b64  # noqa: E402
from teachers import build_tiny_vlm  # noqa: E402


def silent(command):
    """A process that is started and prints nothing."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measured(command):
    """Seconds and peak GB of a process that runs to its end."""
    start = time.perf_counter()
    process = silent(command)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def command(folder, data, out):
    return [sys.executable, str(ROOT / "eval.py"), "--model", str(folder / "tiny"), "--data", str(data),
            "--max-new-tokens", "16", "--out", str(folder / out)]


def rows(folder):
    """A row of the table as soon as it is measured."""
    rng = random.Random(0)
    for count in (200, 2000):
        data = folder / f"made{count}.tsv"
        # row by row, as a child's peak begins at its parent's
        with open(data, "w") as file:
            file.write("index\timage\tquestion\tA\tB\tanswer\n")
            for i in range(count):
                file.write(f"{i}\t{b64(i, (96, 96))}\t{' yes' * rng.randint(1, 20)}\tyes\tno\tA\n")
        seconds, memory = measured(command(folder, data, f"out{count}"))
        yield f"{count:,} questions, {data.stat().st_size / 1e6:.0f} MB", f"{seconds:.1f}", f"{memory:.3f}"
    file, start = folder / "cut" / "tiny" / "made2000.jsonl", time.perf_counter()
    for share in (0.3, 0.7):
        process = silent(command(folder, data, "cut"))
        while not file.exists() or file.read_bytes().count(b"\n") < share * count:
            time.sleep(0.2)
        process.kill()
        process.wait()
    _, memory = measured(command(folder, data, "cut"))
    yield "the same, killed twice", f"{time.perf_counter() - start:.1f}", f"{memory:.3f}"


def scores(folder):
    results = json.loads((folder / "scores.json").read_text())["tiny"]
    return {score["task"]: (score["score"], score["rows"]) for score in results}


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build_tiny_vlm(str(folder / "tiny"), "qwen2_5_vl", TEXTS, 64, 2, 400, seed=0)
        table(("eval.py", "seconds", "peak GB"), rows(folder))
        same = scores(folder / "out2000") == scores(folder / "cut")
    print(f"responses and scores after two kills {'are' if same else 'ARE NOT'} those of the run without")


if __name__ == "__main__":
    main()
