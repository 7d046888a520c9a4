"""The toy run on several seeds, beside Algorithm 1 and two supervised baselines with as many steps. Prints
one table.

    python tests/bench_toy.py --out runs/bench --seeds 0 1 2           about six minutes a seed on 2 cores

Every arm of a seed starts from the same student: the RIL run's folder after SFT. "SFT continued" goes on with
the student's own data, "SFT on teachers" trains on the collected responses (sequence-level distillation).
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train(out, *options):
    """Run train.py into the folder `out`, its console lines into out.log; seconds it took."""
    start = time.time()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w", encoding="utf-8") as log:
        subprocess.run([sys.executable, ROOT / "train.py", "--out", out, *map(str, options)], check=True,
                       stdout=log)
    return time.time() - start


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def accuracy(run, when="after"):
    return json.loads((run / f"evaluation-{when}.json").read_text())["accuracy"]


def rise(metrics, name):
    values = [row[name] for row in metrics]
    return sum(values[:20]) / 20, sum(values[-20:]) / 20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    table = []
    for seed in args.seeds:
        base = args.out / f"seed{seed}"
        ril, rl = base / "ril", base / "rl"
        seconds = train(ril, "--seed", seed)
        train(rl, "--seed", seed, "--algorithm", "rl", "--from", ril)

        metrics = rows_of(ril / "metrics.jsonl")
        questions = {row["id"]: row for row in rows_of(ril / "data" / "train.jsonl")}
        with open(base / "distill.jsonl", "w", encoding="utf-8") as file:
            for i, row in enumerate(rows_of(ril / "collection.jsonl")):
                file.write(json.dumps(questions[row["id"]] | {"id": str(i), "answer": row["text"]}) + "\n")
        for arm in ("sft", "distill"):
            train(base / arm, "--student", ril / "sft", "--algorithm", "rl", "--steps", 0, "--sft-data",
                  ril / "data" / f"{arm}.jsonl", "--sft-steps", len(metrics), "--sft-lr", 1e-3, "--data",
                  ril / "data" / "train.jsonl", "--eval-data", ril / "data" / "heldout.jsonl",
                  "--max-new-tokens", 24, "--seed", seed)
        table.append((seed, *rise(metrics, "reward/similarity/student"),
                      *rise(metrics, "reward/answer/student"), accuracy(ril, "before"), accuracy(ril),
                      accuracy(rl), accuracy(base / "sft"), accuracy(base / "distill"), seconds))
        print(table[-1], file=sys.stderr, flush=True)
    print("| seed | similarity, first -> last 20 steps | answer, first -> last 20 | SFT | RIL | Algorithm 1 "
          "| SFT continued | SFT on teachers | seconds |\n|---|---|---|---|---|---|---|---|---|")
    for seed, s0, s1, a0, a1, *accuracies, seconds in table:
        print(f"| {seed} | {s0:.2f} -> {s1:.2f} | {a0:.2f} -> {a1:.2f} | "
              + " | ".join(f"{100 * a:.1f}" for a in accuracies) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
