"""Several processes, over gloo: the same results as one in every stage, and none that waits for ever.

But for one test, they are forked from this process, with the variables that torchrun sets: that saves the
seconds in which each imports torch.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ROOT, Forked, lamp_files
from model import load_vlm, save_vlm
from teachers import load_examples

# greedy: a sampled token may fall on the other side of a boundary when sums are added up in another order
OPTIONS = ["--data", "lamps.jsonl", "--eval-data", "lamps.jsonl", "--eval-every", "3", "--device", "cpu",
           "--batch-size", "6", "--discriminator-steps", "2", "--collect", "2", "--num-samples", "2",
           "--max-new-tokens", "24", "--rollout-batch", "4", "--log-every", "1", "--lr", "1e-5",
           "--temperature", "0"]


def launch(folder, ranks, script, *options):
    """Run a script in so many processes; what all of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks > 1 else {}
    processes = [Forked(script, *options, cwd=folder, RANK=str(rank), LOCAL_RANK=str(rank), **world)
                 for rank in range(ranks)]
    said = "".join([process.communicate()[0] for process in processes])
    assert [process.returncode for process in processes] == ranks * [0], said[-3000:]
    return said


def loop(checkpoint, out, *options):
    return ["--student", checkpoint, *OPTIONS, "--collection", "responses.jsonl", "--out", out, *options]


def distance(one, other):
    """Of the weights in two files, relative to their size."""
    a, b = (torch.cat([x.flatten().double() for name, x in sorted(load_file(path).items())
                       if not name.startswith("optimizer ")]) for path in (one, other))
    return (a - b).norm() / a.norm()


def rows(path):
    return [json.loads(line) for line in open(path)]


def close(one, other):
    """Metrics, responses and the student's weights of two runs are the same, up to the order of sums."""
    for a, b in zip(rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True)
    a, b = ([(r["source"], r["text"]) for r in rows(out / "rollouts.jsonl")] for out in (one, other))
    assert a == b
    assert distance(one / "student/model.safetensors", other / "student/model.safetensors") < 1e-5


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_one_goes_on_where_two_were_stopped(checkpoints, tmp_path):
    """A mean of means; a question asked by both or by none (also a held-out one); noise by rank; shards that
    a checkpoint does not put together; processes that torchrun starts again, and that look for those that
    have died."""
    lamp_files(tmp_path, 12)
    for ranks, out in ((1, "one"), (2, "two")):
        said = launch(tmp_path, ranks, "train.py", *loop(checkpoints["qwen2_5_vl"], out, "--steps", 6))
    assert said.count("The trained student is") == 1 and said.count("step     1") == 1   # rank 0 alone speaks
    close(tmp_path / "one", tmp_path / "two")
    # a finished run: nobody waits for nobody
    launch(tmp_path, 2, "train.py", *loop(checkpoints["qwen2_5_vl"], "two", "--steps", 6))

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                "--max-restarts", "1", ROOT / "train.py"]
    command = [*torchrun, *loop(checkpoints["qwen2_5_vl"], "cut", "--steps", 6, "--save-every", 2)]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for saved in (2, 4):                                           # torchrun starts both again, once
        until = time.time() + 60
        while time.time() < until and not (tmp_path / "cut" / f"checkpoint-{saved:06}").exists():
            time.sleep(0.01)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    begin = time.time()
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 45 and "Signal 9 (SIGKILL)" in said
    assert "resuming after step 2" in said
    said = launch(tmp_path, 1, "train.py", *loop(checkpoints["qwen2_5_vl"], "cut", "--steps", 6))
    assert "resuming after step" in said
    close(tmp_path / "one", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_processes_keep_step_whatever_their_questions_are(family, folders, tmp_path):
    """Ranks that differ in the number of micro-batches, in who runs the vision tower, or in the order of sums
    of gradients (with a frozen embedding and no image, layer 0 has no gradient to pass on)."""
    data, _ = lamp_files(tmp_path, 12)
    examples = rows(data)
    with open(data, "w") as file:
        for i, example in enumerate(examples):
            if i % 3:
                del example["image"]
            if i % 4 == 0:
                example["question"] += " yes no" * 20
            file.write(json.dumps(example) + "\n")
    options = ["--steps", 1, "--mu", 2, "--batch-size", 5, "--token-budget", 1, "--freeze", "embed_tokens",
               "--gradient-checkpointing"]
    for ranks, out in ((1, "one"), (2, "two")):
        launch(tmp_path, ranks, "train.py", *loop(folders[family], out, *options))
    close(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def speaker(checkpoints, tmp_path_factory):
    """A teacher that ends its responses."""
    folder = tmp_path_factory.mktemp("speaker")
    data, _ = lamp_files(folder)
    vlm = load_vlm(checkpoints["internvl"], "cpu")
    args = SimpleNamespace(sft_lr=2e-3, sft_batch_size=8, seed=0, token_budget=4096, offload=False)
    train.sft(vlm, load_examples(str(data)), 60, "speaker", args, train.World())
    save_vlm(vlm, str(folder / "speaker"))
    return folder / "speaker"


@pytest.mark.slow
def test_every_stage_is_shared_out_and_comes_out_the_same(checkpoints, speaker, tmp_path):
    """SFT, collection, D's pre-training or an evaluation by rank 0 alone, twice, or of one rank's part; the
    order of responses by who was first; a report of a part."""
    lamp_files(tmp_path, 12)
    options = ["--sft-data", "lamps.jsonl", "--sft-steps", 4, "--sft-batch-size", 5, "--sft-lr", 5e-3,
               "--pretrain-lr", 1e-3, "--teachers", speaker, "--steps", 2, "--token-budget", 300]
    student = checkpoints["qwen2_5_vl"]
    for ranks, out in ((1, "one"), (2, "two")):
        launch(tmp_path, ranks, "train.py", "--student", student, *OPTIONS, "--out", out, *options)
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "collection.jsonl").read_bytes() == (two / "collection.jsonl").read_bytes()
    assert not list(two.glob("*.rank*"))
    for name in ("sft/model.safetensors", "discriminator.safetensors", "student/model.safetensors"):
        assert distance(one / name, two / name) < 2e-5, name
    for name in ("evaluation-before.json", "evaluation-after.json"):
        a, b = (json.loads((out / name).read_text()) for out in (one, two))
        assert a["rows"] == b["rows"] and a["sampled"]["rows"] == b["sampled"]["rows"], name
        assert len(a["rows"]) == 12
    assert distance(tmp_path / student / "model.safetensors", one / "sft/model.safetensors") > 2e-3

    for ranks, out in ((1, "one"), (2, "two")):
        launch(tmp_path, ranks, "eval.py", "--model", speaker, "--data", "lamps.jsonl", "--out",
               f"eval-{out}", "--device", "cpu", "--max-new-tokens", 24)
        launch(tmp_path, ranks, "teachers.py", "--select", 5, "--student", student, "--data", "lamps.jsonl",
               "--out", f"chosen-{out}.jsonl", "--device", "cpu")
    assert rows(tmp_path / "chosen-one.jsonl") == rows(tmp_path / "chosen-two.jsonl")
    a, b = (json.loads((tmp_path / f"eval-{out}/scores.json").read_text()) for out in ("one", "two"))
    assert a == b and len(a["speaker"][0]["rows"]) == 12
    said = launch(tmp_path, 1, "eval.py", "--model", speaker, "--data", "lamps.jsonl", "--out",
                  "eval-two", "--device", "cpu", "--max-new-tokens", 24)       # has all that two have written
    assert "question/s" not in said and not list((tmp_path / "eval-two/speaker").glob("*.rank*"))


def test_one_process_needs_none_of_it(monkeypatch):
    """A process group, or weights in shards, where there is one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world, layer = train.World.from_torchrun(torch.device("cpu")), torch.nn.Linear(2, 2)
    world.shard(layer, layer)
    parts = [[0, 1], [2]]
    assert world.even(parts) == [(part, 1.0) for part in parts] and world.without_weights("vlm") == "vlm"
    assert world == train.World() and not torch.distributed.is_initialized()
    assert type(layer) is torch.nn.Linear
