"""Several processes by torchrun, over gloo: the same results as one, and none that waits for ever for
another."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, lamp_files

# greedy: a sampled token may fall on the other side of a boundary when sums are added up in another order
OPTIONS = ["--data", "lamps.jsonl", "--eval-data", "lamps.jsonl", "--eval-every", "3", "--collection",
           "responses.jsonl", "--device", "cpu", "--batch-size", "6", "--discriminator-steps", "2",
           "--collect", "2", "--num-samples", "2", "--max-new-tokens", "24", "--rollout-batch", "4",
           "--log-every", "1", "--lr", "1e-5", "--temperature", "0"]


def start(folder, checkpoint, ranks, out, *options):
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run",
                                                    "--nproc-per-node", str(ranks), "--standalone"]
    return subprocess.Popen([*launcher, str(ROOT / "train.py"), "--student", checkpoint, *OPTIONS, "--out",
                             out, *map(str, options)], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def rows(path):
    return [json.loads(line) for line in open(path)]


def close(one, other):
    """Metrics, responses and the student's weights of two runs are the same, up to the order of sums."""
    for a, b in zip(rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)
    a, b = ([(r["source"], r["text"]) for r in rows(out / "rollouts.jsonl")] for out in (one, other))
    assert a == b
    a, b = (torch.cat([w.flatten()
                       for _, w in sorted(load_file(out / "student" / "model.safetensors").items())])
            for out in (one, other))
    assert (a - b).norm() / a.norm() < 1e-5


def test_two_processes_do_what_one_does_and_one_goes_on_where_two_were_stopped(checkpoints, tmp_path):
    """A mean of means; a question asked by both or by none (also a held-out one); noise by rank; shards that
    a checkpoint does not put together."""
    lamp_files(tmp_path)
    for ranks, out in ((1, "one"), (2, "two")):
        said, _ = (process := start(tmp_path, checkpoints["qwen2_5_vl"], ranks, out, "--steps",
                                    6)).communicate(timeout=120)
        assert process.returncode == 0, said[-2000:]
    assert said.count("The trained student is") == 1 and said.count("step     1") == 1   # rank 0 alone speaks
    close(tmp_path / "one", tmp_path / "two")
    again = start(tmp_path, checkpoints["qwen2_5_vl"], 2, "two", "--steps", 6)
    assert again.communicate(timeout=60) and again.returncode == 0   # a finished run: nobody waits for nobody

    process = start(tmp_path, checkpoints["qwen2_5_vl"], 2, "cut", "--steps", 6, "--save-every", 2)
    until = time.time() + 60
    while time.time() < until and not list((tmp_path / "cut").glob("checkpoint-*[0-9]")):
        time.sleep(0.01)
    # one rank dies: torchrun ends the other, and says which it was
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    begin = time.time()
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 45 and "Signal 9 (SIGKILL)" in said
    said, _ = (process := start(tmp_path, checkpoints["qwen2_5_vl"], 1, "cut", "--steps",
                                6)).communicate(timeout=120)
    assert process.returncode == 0 and "resuming after step" in said, said[-2000:]
    close(tmp_path / "one", tmp_path / "cut")


def test_processes_keep_step_whatever_their_questions_are(checkpoints, tmp_path):
    """Ranks that differ in the number of micro-batches, in who runs the vision tower, or in the order of sums
    of gradients (with a frozen embedding and no image, layer 0 has no gradient to pass on)."""
    data, _ = lamp_files(tmp_path)
    examples = rows(data)
    with open(data, "w") as file:
        for i, example in enumerate(examples):
            if i % 3:
                del example["image"]
            if i % 4 == 0:
                example["question"] += " yes no" * 20
            file.write(json.dumps(example) + "\n")
    options = ["--steps", 2, "--mu", 2, "--batch-size", 5, "--token-budget", 1, "--freeze", "embed_tokens",
               "--gradient-checkpointing"]
    for ranks, out in ((1, "one"), (2, "two")):
        process = start(tmp_path, checkpoints["qwen2_5_vl"], ranks, out, *options)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said[-2000:]
    close(tmp_path / "one", tmp_path / "two")


def test_one_process_needs_none_of_it(monkeypatch):
    """A process group, or weights in shards, where there is one process."""
    import train
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world, layer = train.World.join(torch.device("cpu")), torch.nn.Linear(2, 2)
    world.shard(layer, layer)
    parts = [[0, 1], [2]]
    assert world.even(parts) == [(part, 1.0) for part in parts] and world.without_weights("vlm") == "vlm"
    assert world == train.World() and not torch.distributed.is_initialized()
    assert type(layer) is torch.nn.Linear
