"""Peak memory of one RIL step by phase: measured, against what plan_memory.py says, and against plain
row-per-response code.

    python tests/bench_memory.py                       0.3B Qwen2.5-VL, random weights, 152K words, on the CPU
    python tests/bench_memory.py --full                the shape of Qwen2.5-VL-3B, for a GPU with 80 GB

All three in one run, on the same questions and lengths. The plain code is what most repositories do: every
response is a row of its own with its own copy of the prompt, all logits at once.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from shapes import build, data, memory_by_phase, table
from conftest import ROOT  # noqa: E402
from model import encode_responses, load_vlm  # noqa: E402
from teachers import encode_example, load_examples  # noqa: E402
from train import LOSSES, Meter, policy_loss  # noqa: E402

def plain_update(folder, batch_size, K, R, device, dtype):
    """Forward and backward of Eq. 2 with one row per response and all logits; the same state in memory as in
    a run."""
    policy, reference = load_vlm(str(folder), device, dtype), load_vlm(str(folder), device, dtype)
    held = [torch.zeros_like(p, dtype=torch.float32) for p in policy.model.parameters()
            for _ in range(2 if dtype == "float32" else 3)]
    held += [torch.zeros_like(p) for p in policy.model.get_decoder().parameters()]           # D
    held += [torch.zeros_like(p, dtype=torch.float32) for p in policy.model.get_decoder().parameters()
             for _ in range(2 if dtype == "float32" else 3)]
    examples = load_examples(str(folder / "data.jsonl"))[:batch_size]
    memory_by_phase()
    meter = Meter(policy.device)
    with meter.phase("update"):
        prompts = [encode_example(policy, e) for e in examples for _ in range(K)]
        responses = encode_responses(policy, [[" yes" * (R - 2)]] * len(prompts))

        def logps(vlm):
            ids = torch.stack([torch.cat([p.ids.to(vlm.device), r[0]])
                               for p, r in zip(prompts, responses.ids)])
            images = {name: torch.cat([p.images[name] for p in prompts]).to(vlm.device)
                      for name in prompts[0].images}
            types = (ids == vlm.model.config.image_token_id).int()
            images["pixel_values"] = images["pixel_values"].to(vlm.model.dtype)
            logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                               **images).logits
            length = responses.ids.shape[-1]
            logps = logits[:, -length - 1:-1].float().log_softmax(-1)
            chosen = logps.gather(2, responses.ids[:, 0, :, None]).squeeze(2)
            return chosen.view(batch_size, K, length)
        with torch.no_grad():
            ref = logps(reference)
        logp, ones = logps(policy), torch.ones(batch_size, K, device=policy.device)
        policy_loss(logp, logp.detach(), ref, ones, torch.ones_like(logp, dtype=torch.bool), ones.bool(),
                    ones.bool(), 0.2, 0.01, LOSSES["dr_grpo"]).backward()
    return meter.memory_gb["update"]


def measure(folder, said, command, plain):
    """Rows of the table: each phase, and then the plain code."""
    # glibc keeps freed blocks of up to 32 MB for later; without that, what is resident is what is in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
    metrics = [json.loads(line) for line in open(folder / "out" / "timings.jsonl")][-1]
    for phase in ("generate", "discriminator", "update"):
        planned = float(re.search(rf"^{phase}\s+([\d.]+)", said, re.M).group(1))
        measured = metrics[f"memory_gb/{phase}"]
        yield phase, f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}"
    done = subprocess.run(plain, check=True, capture_output=True, text=True, env=env)
    yield "update, one row per response, all logits", "-", f"{float(done.stdout):.2f}", ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="*", default=[], help="more options for train.py")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, batch_size, G, R = ("bfloat16" if device == "cuda" else "float32"), 2, 4, 32
    if args.plain:
        return print(plain_update(Path(args.plain), batch_size, 2 * G, R, device, dtype))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, "3B" if args.full else "0.3B", getattr(torch, dtype), device)
        data(folder, 4, R)
        options = {"student": folder, "collection": folder / "responses.jsonl", "data": folder / "data.jsonl",
                   "out": folder / "out", "batch-size": 4, "token-budget": batch_size * (221 + 2 * G * R),
                   "rollout-batch": 2, "num-samples": G, "collect": 4, "max-new-tokens": R, "steps": 2,
                   "discriminator-steps": 1, "device": device, "dtype": dtype}
        options = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        options += [f"--{option}" for option in args.options]
        plan = [sys.executable, ROOT / "tests" / "plan_memory.py", *options]
        said = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
        print(said, flush=True)
        table(("phase", "plan, GB", "measured, GB", "plan / measured"),
              measure(folder, said, [sys.executable, ROOT / "tests" / "shapes.py", *options],
                      [sys.executable, __file__, "--plain", folder]))


if __name__ == "__main__":
    main()
