"""A whole RIL step, by phase; beside a GRPO step of trl, where that is installed; and how its cost grows.

    python tests/bench_step.py                         60M Qwen2.5-VL, 4 questions of 221 tokens, 2G = 8, R =
                                                       24: three minutes on two cores; with trl, twenty
    python tests/bench_step.py --growth cost.png       the same against G, prompt length, R and B: a table and
                                                       a picture, in half an hour
    python tests/bench_step.py --full                  the shape of Qwen2.5-VL-3B, bfloat16, for a GPU

Ours is train.py's own loop: 4 responses of each question sampled, 4 from a collection, D updated and asked,
the rule judge, the reference and the policy scored, the policy updated. trl's step (GRPOTrainer 1.16,
dr_grpo, beta 0.01) samples 8 responses to each of the 4 questions and has neither D nor a judge; once as it
is, and once with its vocabulary head on response positions only, as it does on CUDA. Every measurement is a
process of its own, the codes take turns, the first step of each is not counted.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from shapes import build, data, peak_memory_gb, table
from conftest import ROOT  # noqa: E402

PHASES = ("generate", "discriminator", "judge", "update")


def ril_step(folder, out, device, dtype, steps=2, G=4, R=24, B=4, budget=12288):
    """Median seconds of the steps after the first, by phase, and the peak of their memory in GB, of
    train.py."""
    command = ["tests/shapes.py", "--student", folder, "--collection", folder / "responses.jsonl", "--data",
               folder / "data.jsonl", "--out", out, "--batch-size", B, "--rollout-batch", B, "--num-samples",
               G, "--collect", 1, "--max-new-tokens", R, "--steps", steps + 1, "--discriminator-steps", 0,
               "--device", device, "--dtype", dtype, "--token-budget", budget, "--lr", 1e-5]
    subprocess.run([sys.executable, *map(str, [ROOT / command[0], *command[1:]])], check=True,
                   capture_output=True)
    rows = [json.loads(line) for line in open(out / "timings.jsonl")][1:]
    seconds = {phase: statistics.median(row[f"seconds/{phase}"] for row in rows) for phase in PHASES}
    return seconds, max(row[f"memory_gb/{phase}"] for row in rows for phase in PHASES)


def trl_step(folder, device, response_head, steps=1):
    """Seconds of a GRPOTrainer step after the first, and peak GB; run in a process of its own."""
    import trl.trainer.utils as utils
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from model import load_vlm
    if response_head:                                         # what the fused head does where there is Triton
        real = utils._use_triton
        utils._use_triton = lambda device: sys._getframe(1).f_code.co_name == "_fused_forward" or real(device)
    vlm = load_vlm(folder, device)
    rows = [json.loads(line) for line in open(folder / "data.jsonl")][:4]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": [{"type": "image"},
                                                                          {"type": "text",
                                                                           "text": row["question"]}]}],
                                  "number": i} for i, row in enumerate(rows)] * 8)
    images = [Image.open(folder / row["image"]) for row in rows]
    dataset = dataset.map(lambda row: row).with_transform(lambda batch: batch
                                                          | {"image": [images[i] for i in batch["number"]]})
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            peak_memory_gb(vlm.device, reset=True)
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append((time.perf_counter() - self.start, peak_memory_gb(vlm.device)))
    config = GRPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=32, num_generations=8,
                        max_completion_length=24, beta=0.01, use_cpu=device == "cpu", max_steps=steps + 1,
                        report_to=[], loss_type="dr_grpo", scale_rewards=False, bf16=device != "cpu",
                        top_k=50, top_p=0.95, repetition_penalty=1.05, gradient_checkpointing=False,
                        save_strategy="no", disable_tqdm=True)
    trainer = GRPOTrainer(model=vlm.model, reward_funcs=lambda completions,
                          **_: [float(i % 2) for i in range(len(completions))], args=config,
                          train_dataset=dataset, processing_class=vlm.processor, callbacks=[Clock()])
    trainer.train()
    print("RESULT", statistics.median(t for t, _ in times[1:]), max(m for _, m in times[1:]))


def has_trl():
    return subprocess.run([sys.executable, "-c", "import trl"], capture_output=True).returncode == 0


def compare(shape, rounds, device, dtype):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, shape, getattr(torch, dtype), device)
        data(folder, 4, 24)
        arms, phases = {"RIL, this code": []}, []
        if has_trl():
            arms |= {"trl GRPOTrainer": [], "trl, head on responses only": []}
        else:
            print("trl is not installed: pip install trl==1.16 to compare")
        for r in range(rounds):
            for name, measured in arms.items():
                if name.startswith("RIL"):
                    seconds, memory = ril_step(folder, folder / f"out{r}", device, dtype)
                    phases.append(seconds)
                    measured.append((sum(seconds.values()), memory))
                else:
                    done = subprocess.run([sys.executable, __file__, "--trl", folder,
                                           *(["--response-head"] if "only" in name else [])],
                                          capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(done.stderr[-3000:])
                    measured.append(tuple(map(float, re.search(r"RESULT (\S+) (\S+)", done.stdout).groups())))
                print(f"round {r + 1}: {name} {measured[-1][0]:.2f} s, {measured[-1][1]:.2f} GB", flush=True)
    base = [statistics.median(x) for x in zip(*arms["RIL, this code"])]
    rows = [(name, *(f"{statistics.median(x):.2f}" for x in zip(*measured)),
             *(f"{statistics.median(x) / b:.1f}" for x, b in zip(zip(*measured), base)))
            for name, measured in arms.items()]
    print("by phase: " + ", ".join(f"{phase} {statistics.median(p[phase] for p in phases):.2f} s"
                                   for phase in PHASES))
    table(("a step", "seconds", "peak GB", "seconds, of ours", "GB, of ours"), rows)


def growth(shape, picture, device, dtype):
    """Seconds of a step against each size, the others fixed: G = 4, 221 tokens of prompt, R = 24, B = 4."""
    sweeps = {"G": (2, 4, 8, 16, 32), "prompt": (128, 512, 1024, 2048), "R": (16, 64, 128, 256),
              "B": (1, 2, 4, 8, 16)}
    lines = {}

    def rows(folder):
        for name, values in sweeps.items():
            for value in values:
                data(folder, value if name == "B" else 4, value if name == "R" else 24,
                     words=value - 221 if name == "prompt" else 0, image=name != "prompt" or value > 221)
                seconds, memory = ril_step(folder, folder / f"{name}{value}", device, dtype, 1,
                                           **({name: value} if name != "prompt" else {}))
                lines.setdefault(name, []).append((value, seconds))
                shown = [seconds[phase] for phase in PHASES if phase != "judge"]
                yield (f"{name} = {value}", *(f"{x:.2f}" for x in (*shown, sum(seconds.values()), memory)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, shape, getattr(torch, dtype), device)
        table(("size", "generate", "discriminator", "update", "step, seconds", "peak GB"), rows(folder))
    draw(lines, picture)


def draw(lines, path, width=330, height=300):
    """Stacked phases against each size: {size: [(value, seconds by phase)]} as one PNG."""
    image = Image.new("RGB", (width * len(lines), height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    colours = {"generate": (40, 110, 200), "discriminator": (200, 80, 40), "judge": (150, 150, 150),
               "update": (30, 140, 80)}
    for panel, (name, points) in enumerate(lines.items()):
        x0, bottom, h = panel * width + 44, height - 46, height - 96
        top = max(sum(seconds.values()) for _, seconds in points)
        pen.text((x0, 10), f"seconds of a step against {'prompt tokens' if name == 'prompt' else name}",
                 fill="black", font=font)
        bar = (width - 64) / len(points)
        for i, (value, seconds) in enumerate(points):
            y = bottom
            for phase, took in seconds.items():
                pen.rectangle((x0 + i * bar, y - h * took / top, x0 + (i + 0.8) * bar, y),
                              fill=colours[phase])
                y -= h * took / top
            pen.text((x0 + (i + 0.4) * bar, y - 3), f"{sum(seconds.values()):.1f}", fill="black", font=font,
                     anchor="mb")
            pen.text((x0 + (i + 0.4) * bar, bottom + 4), str(value), fill="black", font=font, anchor="mt")
    x = 44
    for phase, colour in colours.items():
        pen.rectangle((x, height - 20, x + 10, height - 10), fill=colour)
        pen.text((x + 16, height - 15), phase, fill="black", font=font, anchor="lm")
        x += 40 + 8 * len(phase)
    image.save(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", metavar="PNG")
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--response-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, shape = "bfloat16" if device == "cuda" else "float32", "3B" if args.full else "60M"
    if args.trl:
        trl_step(args.trl, device, args.response_head)
    elif args.growth:
        growth(shape, args.growth, device, dtype)
    else:
        compare(shape, args.rounds, device, dtype)


if __name__ == "__main__":
    main()
