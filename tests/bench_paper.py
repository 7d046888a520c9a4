"""The paper's tables 1, 2 and 5 in small, on the toy world: every arm on several seeds, with intervals.

    python tests/bench_paper.py --out runs/paper --arms main --jobs 2   the README's table, an hour on 2 cores
    python tests/bench_paper.py --out runs/paper --jobs 2               every arm, hours

Every arm of a seed starts from the same student after SFT, and is judged on the same held-out questions.
Differences are paired by seed; an interval is Student's t, 95%. What is finished is not done again, so the
command may be stopped and given once more. It prints a table of arms and one of the paper's directions, and
draws paper.png into --out.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import rule_verdict  # noqa: E402
from shapes import table  # noqa: E402
from teachers import VOICES  # noqa: E402
from train import OPTIONS  # noqa: E402

# Student's t of a 95% interval, by degrees of freedom
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}

# What the toy has in place of the paper's settings, for a student that has had its SFT.
TOY_LOOP = [part for group, options in OPTIONS.items() if group != "SFT" for option in options
            if option.toy is not None for part in
            ([option.name.replace("--", "--no-", 1)] if option.toy is False else (option.name, option.toy))]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    data: instead of RIL, SFT on responses of "teachers", or on their "right" ones. teacher: use only this one
    of the two. start: begin with the student of another arm. fork: apply tests/forks/FORK.diff to the code.
    """
    name: str
    group: str
    options: str = ""
    data: str = ""
    teacher: str = ""
    start: str = ""
    fork: str = ""


RIL = Arm("RIL, both teachers", "main")
ARMS = [
    RIL,
    Arm("no similarity reward", "main", "--reward-weights similarity=0"),
    Arm("Dr.GRPO (Algorithm 1)", "main", "--algorithm rl"),
    Arm("SFT on teachers", "main", data="teachers"),
    Arm("rollouts truncated", "main", "--truncate-rollouts"),
    Arm("D frozen", "main", "--freeze-discriminator"),
    Arm("no answer reward", "main", "--reward-weights answer=0"),
    Arm("no teachers in the group", "main", "--no-teacher-rollouts"),
    Arm("the same, D frozen", "main", "--no-teacher-rollouts --freeze-discriminator"),
    Arm("SFT on right teacher responses", "main", data="right"),
    Arm("RIL, teacher A", "main", teacher="qwen"),
    Arm("RIL, teacher B", "main", teacher="internvl"),
    Arm("GRPO (Algorithm 1)", "paper", "--algorithm rl --loss grpo"),
    Arm("RIL, GRPO", "paper", "--loss grpo"),
    Arm("similarity ternary", "more", "--similarity ternary"),
    Arm("similarity in tenths", "more", "--similarity tenths"),
    Arm("similarity continuous", "more", "--similarity continuous"),
    Arm("beta 0", "more", "--beta 0"),
    Arm("beta 0.1", "more", "--beta 0.1"),
    Arm("mu 2", "more", "--mu 2"),
    Arm("mu 4", "more", "--mu 4"),
    Arm("N 2", "more", "--collect 2"),
    Arm("N 16", "more", "--collect 16"),
    Arm("G 2", "more", "--num-samples 2"),
    Arm("G 8", "more", "--num-samples 8"),
    Arm("D not pre-trained", "more", "--discriminator-steps 0"),
    Arm("D with a replay buffer", "more", fork="replay"),
    Arm("RIL after SFT on teachers", "more", start="SFT on teachers"),
    Arm("vocabulary head frozen", "more", "--freeze lm_head"),
    Arm("self-attention frozen", "more", "--freeze language_model.*self_attn"),
    Arm("word embedding frozen", "more", "--freeze embed_tokens"),
    Arm("FFN frozen", "more", "--freeze language_model.*mlp"),
    Arm("vision tower frozen", "more", "--freeze visual"),
]

# What the paper found (tables 1, 2 and 5 of arXiv 2510.19307, Qwen2.5-VL-7B on MathVista): the first arm is
# better than the second, by these numbers; "" if it gives none, (ours) if it says nothing about that.
DIRECTIONS = [
    ("RIL helps", RIL.name, "SFT", "79.7 - 67.8"),
    ("RIL is better than Dr.GRPO alone", RIL.name, "Dr.GRPO (Algorithm 1)", "79.7 - 69.5"),
    ("Dr.GRPO helps", "Dr.GRPO (Algorithm 1)", "SFT", "69.5 - 67.8"),
    ("Dr.GRPO is better than GRPO", "Dr.GRPO (Algorithm 1)", "GRPO (Algorithm 1)", "69.5 - 69.0"),
    ("one teacher (A) is better than none", "RIL, teacher A", "Dr.GRPO (Algorithm 1)", "74.5 - 69.5"),
    ("one teacher (B) is better than none", "RIL, teacher B", "Dr.GRPO (Algorithm 1)", "74.6 - 69.5"),
    ("two teachers are better than A", RIL.name, "RIL, teacher A", "79.7 - 74.5"),
    ("two teachers are better than B", RIL.name, "RIL, teacher B", "79.7 - 74.6"),
    ("D that is updated is better than frozen", RIL.name, "D frozen", "79.7 - 75.3"),
    ("the answer reward is needed", RIL.name, "no answer reward", "79.7 - 65.2"),
    ("binary similarity is better than ternary", RIL.name, "similarity ternary", ""),
    ("binary similarity is better than tenths", RIL.name, "similarity in tenths", ""),
    ("binary similarity is better than continuous", RIL.name, "similarity continuous", ""),
    ("beta 0.01 is better than 0", RIL.name, "beta 0", "79.7 - 59.9"),
    ("beta 0.01 is better than 0.1", RIL.name, "beta 0.1", "79.7 - 74.9"),
    ("mu 1 is better than 2", RIL.name, "mu 2", "79.7 - 79.0"),
    ("mu 1 is better than 4", RIL.name, "mu 4", "79.7 - 78.8"),
    ("8 cached responses are better than 2", RIL.name, "N 2", ""),
    ("16 cached responses are better than 8", "N 16", RIL.name, ""),
    ("freezing the vocabulary head costs", RIL.name, "vocabulary head frozen", "79.7 - 74.9"),
    ("freezing self-attention costs", RIL.name, "self-attention frozen", "79.7 - 73.7"),
    ("freezing word embeddings costs", RIL.name, "word embedding frozen", "79.7 - 75.4"),
    ("freezing FFNs costs", RIL.name, "FFN frozen", "79.7 - 76.5"),
    ("RIL improves a student distilled otherwise", "RIL after SFT on teachers", "SFT on teachers", ""),
    ("RIL is better than SFT on teachers", RIL.name, "SFT on teachers", "(ours)"),
    ("RIL is better than SFT on right responses", RIL.name, "SFT on right teacher responses", "(ours)"),
    ("Dr.GRPO's loss is better than GRPO's in RIL", RIL.name, "RIL, GRPO", "(ours)"),
    ("teachers' responses in the group help", RIL.name, "no teachers in the group", "(ours)"),
    ("D alone: updated is better than frozen", "no teachers in the group", "the same, D frozen", "(ours)"),
    ("the similarity reward helps", RIL.name, "no similarity reward", "(ours)"),
    ("rollouts from the full distribution help", RIL.name, "rollouts truncated", "(ours)"),
    ("G 4 is better than 2", RIL.name, "G 2", "(ours)"),
    ("G 8 is better than 4", "G 8", RIL.name, "(ours)"),
    ("pre-training D helps", RIL.name, "D not pre-trained", "(ours)"),
    ("a replay buffer for D helps", "D with a replay buffer", RIL.name, "(ours)"),
    ("freezing the vision tower costs", RIL.name, "vision tower frozen", "(ours)"),
]


def slug(name):
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-").replace("--", "-")


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def train(out, *options, code=ROOT):
    """Run train.py of the folder `code` into the folder `out`, unless that has been done; the console's lines
    go into out.log."""
    if (out / "evaluation-after.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "a", encoding="utf-8") as log:
        subprocess.run([sys.executable, code / "train.py", "--out", out, *map(str, options)], check=True,
                       stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def distilled(ril, right):
    """The collection as data for SFT: every response, or those that are right. The path of the file."""
    path = ril.parent / ("right.jsonl" if right else "teachers.jsonl")
    questions = {row["id"]: row for row in rows_of(ril / "data" / "train.jsonl")}
    lines = []
    for i, row in enumerate(rows_of(ril / "collection.jsonl")):
        asked = questions[row["id"]]
        if not right or rule_verdict(asked["question"], asked["answer"], row["text"]):
            image = str((ril / "data" / asked["image"]).resolve())
            lines.append(json.dumps(asked | {"id": str(i), "answer": row["text"], "image": image}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def responses_of(teacher, ril):
    """What one teacher said in RIL's collection, as a collection. The path of the file."""
    path = ril.parent / f"{teacher}.jsonl"
    rows = [row for row in rows_of(ril / "collection.jsonl") if row["teacher"] == teacher]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def same_student(ril):
    """Options for the student that RIL began with, and RIL's questions."""
    return ("--student", ril / "sft", "--data", ril / "data" / "train.jsonl",
            "--eval-data", ril / "data" / "heldout.jsonl", "--max-new-tokens", 24)


def forked(fork):
    """The code with a fork applied, in a folder of its own (outside of this repository, for git apply)."""
    folder = Path(tempfile.mkdtemp())
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    subprocess.run(["git", "apply", ROOT / "tests" / "forks" / f"{fork}.diff"], cwd=folder, check=True)
    return folder


NOT_OF_THE_LOOP = ("--collect", "--num-samples", "--discriminator-steps")


def run_arm(arm, seed, out):
    """Train one arm on one seed, from the folder of RIL on that seed."""
    ril, folder = out / f"seed{seed}" / slug(RIL.name), out / f"seed{seed}" / slug(arm.name)
    try:
        if arm is RIL:
            train(ril, "--seed", seed)
        elif arm.data:
            train(folder, "--seed", seed, *same_student(ril), "--algorithm", "rl", "--steps", 0, "--sft-data",
                  distilled(ril, arm.data == "right"), "--sft-steps", len(rows_of(ril / "metrics.jsonl")),
                  "--sft-lr", 1e-3)
        elif arm.teacher:
            train(folder, "--seed", seed, *same_student(ril), *TOY_LOOP, "--collection",
                  responses_of(arm.teacher, ril))
        elif arm.start:
            begin = ("--student", out / f"seed{seed}" / slug(arm.start) / "student", *same_student(ril)[2:])
            train(folder, "--seed", seed, *begin, *TOY_LOOP, "--collection", ril / "collection.jsonl")
        elif arm.options.startswith(NOT_OF_THE_LOOP):              # teachers are asked and D is trained again
            teachers = [ril / "teachers" / name for name in ("qwen", "internvl")]
            train(folder, "--seed", seed, *same_student(ril), *TOY_LOOP, "--teachers", *teachers,
                  *arm.options.split())
        else:
            code = forked(arm.fork) if arm.fork else ROOT
            train(folder, "--seed", seed, *arm.options.split(), "--from", ril, code=code)
    except subprocess.CalledProcessError as error:
        print(f"{folder}: exit code {error.returncode}, see {folder}.log; it is left out", file=sys.stderr)
        return
    print(f"done: {folder}", file=sys.stderr, flush=True)


def greedy(score):
    """Held-out accuracy in percent, of greedy responses."""
    return score["score"]


def sampled(score):
    """The same of responses that are sampled by the paper's settings."""
    return score["sampled"]["score"]


def well_formed(score):
    """The percentage of these sampled responses that are one word, or in a way of a teacher."""
    ways = [re.escape(way).replace(re.escape("{}"), r"\w+") for voice in VOICES.values() for way in voice]
    texts = [row["text"] for row in score["sampled"]["rows"]]
    return 100 * statistics.mean(bool(re.fullmatch("|".join(ways), text)) for text in texts)


def measured(out, seeds, measure):
    """{arm: {seed: measure}} of what has been run; "SFT" is where all begin."""
    found = {name: {} for name in ("SFT", *(arm.name for arm in ARMS))}
    for seed in seeds:
        paths = {arm.name: out / f"seed{seed}" / slug(arm.name) / "evaluation-after.json" for arm in ARMS}
        for name, path in {"SFT": paths[RIL.name].with_name("evaluation-before.json"), **paths}.items():
            if path.exists():
                found[name][seed] = measure(json.loads(path.read_text()))
    return {name: values for name, values in found.items() if values}


def interval(values):
    """(mean, half of its 95% interval by Student's t); one value has none."""
    if len(values) < 2:
        return values[0], float("nan")
    half = T95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def paired(found, better, worse):
    """The interval of better - worse over the seeds that both have, or None."""
    if better not in found or worse not in found:
        return None
    seeds = found[better].keys() & found[worse].keys()
    return interval([found[better][s] - found[worse][s] for s in sorted(seeds)]) if seeds else None


def shown(mean, half, sign=""):
    """A mean with its interval, if there is one."""
    return f"{mean:{sign}.1f}" + (f" +-{half:.1f}" if half == half else "")


def verdict(mean, half):
    if half != half:
        return "one seed"
    if half >= abs(mean):
        return "within noise"
    return "yes" if mean > 0 else "no"


STEADINESS = ("arm", "seed", "similarity, first -> last 20", "largest fall of its mean of 10",
              "answer, first -> last 20", "tail, the same", "length, the same", "teachers' length",
              "largest KL of last 100", "largest |g| after 20")


def steadiness(out, seeds, arm):
    """How steady an arm was, a row a seed, as STEADINESS says."""
    for seed in seeds:
        folder = out / f"seed{seed}" / slug(arm)
        if not (folder / "evaluation-after.json").exists():
            continue
        rows = rows_of(folder / "metrics.jsonl")
        similarity = [row["reward/similarity/student"] for row in rows]
        means = [statistics.mean(similarity[i:i + 10]) for i in range(len(similarity) - 9)]
        fall = max(max(means[:i + 1]) - mean for i, mean in enumerate(means))
        taught = [row["length"] for row in rows_of(folder / "rollouts.jsonl") if row["source"] != "student"]

        def change(name, digits):
            first, last = (statistics.mean(row[name] for row in part) for part in (rows[:20], rows[-20:]))
            return f"{first:.{digits}f} -> {last:.{digits}f}"
        yield (arm, seed, change("reward/similarity/student", 2), f"{fall:.2f}",
               change("reward/answer/student", 2), change("tail", 2), change("length", 1),
               f"{statistics.mean(taught):.1f}", f"{max(row['kl'] for row in rows[-100:]):.2f}",
               f"{max(row['grad_norm'] for row in rows[20:]):.1f}")


def draw(found, path):
    """Each arm as a dot (mean over seeds) on its line (95% interval), with the seeds as small dots."""
    width, line, left = 1100, 30, 330
    lows = min(min(values.values()) for values in found.values())
    highs = max(max(values.values()) for values in found.values())
    low, high = 5 * int(lows / 5), 5 * (int(highs / 5) + 1)
    image = Image.new("RGB", (width, line * (len(found) + 2)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)

    def x(value):
        return left + (value - low) / (high - low) * (width - left - 30)
    for tick in range(low, high + 1, 5):
        pen.line((x(tick), 0, x(tick), line * len(found)), fill=(230, 230, 230))
        pen.text((x(tick), line * (len(found) + 0.3)), str(tick), font=font, fill="black", anchor="ma")
    pen.text((x((low + high) / 2), line * (len(found) + 1)), "held-out accuracy in percent", font=font,
             fill="black", anchor="ma")
    for i, (name, values) in enumerate(found.items()):
        y, (mean, half) = line * (i + 0.5), interval(list(values.values()))
        colour = (190, 60, 40) if name == RIL.name else (40, 80, 160)
        pen.text((left - 12, y), name, font=font, fill="black", anchor="rm")
        if half == half:
            pen.line((max(left, x(mean - half)), y, min(width, x(mean + half)), y), fill=colour, width=3)
        for value in values.values():
            pen.ellipse((x(value) - 2, y - 2, x(value) + 2, y + 2), fill=(120, 120, 120))
        pen.ellipse((x(mean) - 5, y - 5, x(mean) + 5, y + 5), fill=colour)
    image.save(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64, 65])
    groups = ["main", "paper", "more"]
    parser.add_argument("--arms", nargs="+", default=groups, help="main, paper, more, or names of arms")
    parser.add_argument("--jobs", type=int, default=1, help="arms that are trained at a time, a core each")
    args = parser.parse_args()
    arms = [arm for arm in ARMS if {arm.group, arm.name} & {*args.arms}]
    if unknown := {*args.arms} - {*groups} - {arm.name for arm in ARMS}:
        parser.error(f"--arms {', '.join(unknown)}: choose from {', '.join(arm.name for arm in ARMS)}")
    with ThreadPoolExecutor(args.jobs) as jobs:
        list(jobs.map(lambda seed: run_arm(RIL, seed, args.out), args.seeds))
        rest = [(arm, seed) for arm in arms if arm is not RIL for seed in args.seeds]
        list(jobs.map(lambda job: run_arm(*job, args.out), rest))

    measures = {measure: measured(args.out, args.seeds, measure)
                for measure in (well_formed, sampled, greedy)}
    for measure, found in measures.items():
        lines = [(name, " ".join(f"{v:.1f}" for v in values.values()),
                  shown(*interval(list(values.values()))),
                  "" if name == RIL.name else shown(*paired(found, name, RIL.name), sign="+"))
                 for name, values in found.items()]
        table((f"{measure.__name__}, %", f"seeds {args.seeds}", "mean", "minus RIL, paired"), lines)
        print()
    directions = [(claim, numbers,
                   *(paired(measures[measure], better, worse) for measure in (greedy, sampled)))
                  for claim, better, worse, numbers in DIRECTIONS]
    table(("claim", "in the paper", "difference here, greedy", "reproduces", "sampled", "reproduces"),
          [(claim, numbers, shown(*one, sign="+"), verdict(*one), shown(*other, sign="+"), verdict(*other))
           for claim, numbers, one, other in directions if one])
    print()
    table(STEADINESS, [row for arm in (RIL.name, "D with a replay buffer")
                       for row in steadiness(args.out, args.seeds, arm)])
    draw(found, args.out / "paper.png")


if __name__ == "__main__":
    main()
