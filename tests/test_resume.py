"""Runs that are killed, stopped, starved of disk or fed with what is not a number: what they lose, which is
nothing."""
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT, Forked, call, lamp_files

LOOP = ["--device", "cpu", "--batch-size", "4", "--discriminator-steps", "2", "--num-samples", "2",
        "--max-new-tokens", "24", "--eval-every", "4", "--log-every", "2", "--collect", "2",
        "--rollout-batch", "4"]
COMPARED = ("metrics.jsonl", "rollouts.jsonl", "greedy.jsonl", "student/model.safetensors",
            "discriminator.safetensors")


def command(checkpoint, *options):
    return ["--student", checkpoint, "--data", "lamps.jsonl", "--eval-data", "lamps.jsonl", "--collection",
            "responses.jsonl", "--out", "run", *LOOP, "--steps", "12", *map(str, options)]


def run_in(folder, checkpoint, *options):
    """The command in this process, begun in a folder."""
    with contextlib.chdir(folder):
        return call("train.py", *command(checkpoint, *options))


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):
    """A run of 12 steps that nothing happened to. Paths are relative, so that runs in other folders say the
    same."""
    folder = tmp_path_factory.mktemp("whole")
    lamp_files(folder, 8)
    assert run_in(folder, checkpoints["qwen2_5_vl"]).returncode == 0
    return folder


def same(folder, other):
    for name in COMPARED:
        assert (folder / "run" / name).read_bytes() == (other / "run" / name).read_bytes(), name


def started(checkpoints, folder, *options):
    return Forked("train.py", *command(checkpoints["qwen2_5_vl"], "--save-every", 2, *options), cwd=folder)


def wait_for(condition, seconds=60):
    until = time.time() + seconds
    while not condition() and time.time() < until:
        time.sleep(0.005)
    assert condition()


def lines(folder, name="metrics.jsonl"):
    path = folder / "run" / name
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(checkpoints, whole, tmp_path):
    """A step repeated or left out, a draw or a moment of Adam forgotten: then the bytes differ from the
    uninterrupted run's."""
    lamp_files(tmp_path, 8)
    for steps in (1, 5, 8):                                     # before the first checkpoint, and between two
        process = started(checkpoints, tmp_path)
        wait_for(lambda: lines(tmp_path) >= steps)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "run" / "student").exists()
    last = run_in(tmp_path, checkpoints["qwen2_5_vl"], "--save-every", "1m")
    assert last.returncode == 0 and "resuming after step" in last.stdout
    same(tmp_path, whole)
    assert lines(tmp_path, "timings.jsonl") == 12
    assert [path.name for path in train.checkpoints(tmp_path / "run")] == ["checkpoint-000012"]


@pytest.mark.slow
def test_a_killed_toy_run_leaves_nobody_training(tmp_path):
    """Processes that train the toy's models go on after kill -9, beside those of the run that resumes."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--teacher-steps", "100000"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def children():
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True)
        return found.stdout.split()
    wait_for(lambda: (tmp_path / "runs/toy/teachers/qwen.random").exists())
    trained = children()
    process.kill()
    process.communicate()
    assert trained
    wait_for(lambda: not any(Path(f"/proc/{number.decode()}").exists() for number in trained), seconds=10)


@pytest.mark.slow
def test_a_signal_saves_first(checkpoints, whole, tmp_path):
    """Ctrl-C that loses the last minutes, or ends in a traceback."""
    lamp_files(tmp_path, 8)
    for number, steps in ((signal.SIGINT, 2), (signal.SIGTERM, 6)):
        process = started(checkpoints, tmp_path, "--save-every", "60m")
        wait_for(lambda: lines(tmp_path) >= steps)
        process.send_signal(number)
        said, _ = process.communicate()
        assert process.returncode == 128 + number
        assert "Traceback" not in said and "finishing this step" in said
        assert train.checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{lines(tmp_path):06}"
    assert run_in(tmp_path, checkpoints["qwen2_5_vl"]).returncode == 0
    same(tmp_path, whole)


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_refused_and_nothing_lost(checkpoints, whole, tmp_path):
    """Half a file taken for a whole one; a run that begins again at step 1 and cuts its logs to nothing."""
    lamp_files(tmp_path, 8)
    stopped = run_in(tmp_path, checkpoints["qwen2_5_vl"], "--steps", 7, "--save-every", 2)
    assert stopped.returncode == 0
    newest, before = train.checkpoints(tmp_path / "run")[-1], lines(tmp_path)
    older = newest.with_name("checkpoint-000004")
    shutil.copytree(newest, older)                                 # stands for the one before it
    for name, size in (("optimizer.safetensors", -100), ("state.json", 20)):
        kept = (newest / name).read_bytes()
        (newest / name).write_bytes(kept[:size])
        done = run_in(tmp_path, checkpoints["qwen2_5_vl"])
        assert done.returncode == 2 and f"{newest.name} cannot be read" in done.stderr, done.stderr
        assert lines(tmp_path) == before
        (newest / name).write_bytes(kept)
    shutil.rmtree(newest)                                          # as the sentence says
    done = run_in(tmp_path, checkpoints["qwen2_5_vl"])
    assert done.returncode == 0 and f"from run/{older.name}" in done.stdout
    same(tmp_path, whole)


def broken_losses(monkeypatch, bad):
    """policy_loss that is not a number on the calls numbered in `bad`."""
    real, calls = train.policy_loss, []

    def loss(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) - 1 in bad else 1)
    monkeypatch.setattr(train, "policy_loss", loss)


@pytest.mark.slow
def test_a_log_that_lacks_bytes_costs_one_checkpoint(checkpoints, whole, tmp_path, monkeypatch):
    """A power cut: logs that were only flushed are behind the checkpoint; and the advice is to remove all. Or
    a run that is given fewer steps than it has done, and passes its student off as one of so many."""
    lamp_files(tmp_path, 8)
    process = started(checkpoints, tmp_path)
    wait_for(lambda: lines(tmp_path) >= 6)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    older, newest = train.checkpoints(tmp_path / "run")
    fewer = run_in(tmp_path, checkpoints["qwen2_5_vl"], "--steps", 3)
    assert fewer.returncode == 2 and "beyond --steps 3" in fewer.stderr
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    done = run_in(tmp_path, checkpoints["qwen2_5_vl"])
    assert done.returncode == 2 and f"run/{newest.name} cannot be read" in done.stderr, done.stderr
    assert "metrics.jsonl had" in done.stderr and older.name not in done.stderr
    shutil.rmtree(newest)                                          # as the sentence says
    synced, fsync = [], train.os.fsync

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        return fsync(descriptor)
    monkeypatch.setattr(train.os, "fsync", noted)
    done = run_in(tmp_path, checkpoints["qwen2_5_vl"])
    assert done.returncode == 0 and f"from run/{older.name}" in done.stdout
    same(tmp_path, whole)
    for name in train.LOGS:
        assert synced.index(f"{name}.jsonl") < synced.index("state.json")


def trained(steps, kept=None, copies=True, frozen=False):
    """Two weights after so many steps with a gradient of 1 or, from a state (weights, moments), after one
    more; whose masters share no memory with them, as on a GPU with --offload, or do."""
    module = torch.nn.ParameterDict({"a": torch.zeros(2), "b": torch.ones(2)})
    module["a"].requires_grad_(not frozen)
    with pytest.MonkeyPatch.context() as patch:
        if copies:
            patch.setattr(train, "local", lambda weight: weight.detach().clone())
        optimizer = train.AdamW(module, 0.1)
    if kept:
        module.load_state_dict(kept[0])
        optimizer.load(kept[1].items())
    for _ in range(steps):
        for i, weight in enumerate(optimizer.weights.values()):
            weight.grad = torch.full((2,), 1.0 + i)
        optimizer.step()
    state = ({name: weight.detach().clone() for name, weight in module.items()},
             {name: x.clone() for name, x in optimizer.tensors().items()})
    return state


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_master_that_is_a_copy_begins_where_its_weight_is(before, after):
    """Of float32 weights no copies were kept: the first step after a resume put back those of the beginning.
    Nor must a state without copies, of a run without --offload, be read as one that has them."""
    kept = trained(10, copies=before)
    for name, weight in trained(11, copies=before)[0].items():
        torch.testing.assert_close(trained(1, kept, copies=after)[0][name], weight)


def test_a_state_of_other_weights_is_refused():
    """Moments of weight 0 taken for those of weight 1, where a fork freezes a part; or a bare IndexError."""
    with pytest.raises(train.UserError, match="weight a of shape .*not trained here"):
        trained(1, trained(2), frozen=True)
    free = trained(2)
    moments = {name: x for name, x in free[1].items() if name.startswith("b")}
    resumed = trained(1, (free[0], moments), frozen=True)
    assert torch.equal(resumed[0]["a"], free[0]["a"]) and not torch.equal(resumed[0]["b"], free[0]["b"])


def test_a_zero_gradient_moves_nothing():
    """Momentum that moves the vision tower in steps without images, where several processes have a gradient
    of zero and one process has none."""
    weight = torch.nn.Parameter(torch.zeros(3))
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer, seen = train.AdamW(torch.nn.ParameterList([weight, other]), 0.1), []
    for grad in (torch.ones(3), torch.zeros(3), None, torch.zeros(3)):
        weight.grad, other.grad = grad, torch.ones(3)
        optimizer.step()
        seen.append(weight[0].item())
    assert seen[0] != 0 and len(set(seen)) == 1 and optimizer.skipped == 0


def test_a_judge_that_fails_on_everything_ends_the_run(checkpoints, lamps, tmp_path, monkeypatch):
    """55 steps in which the student learns nothing, D goes on, and the exit code is 0."""
    data, responses = lamps
    monkeypatch.setattr(train, "make_judge", lambda *_: lambda triples: [None] * len(triples))
    options = ["--student", checkpoints["qwen2_5_vl"], "--data", data, "--collection", responses, "--out",
               tmp_path / "run", *LOOP, "--steps", 20]
    done = call("train.py", *options)
    assert done.returncode == 2 and "nothing could be learned in 5 steps" in done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(rows) == 5 and all(row["judge/failed"] == 1 for row in rows)
    assert ["d_loss" in row for row in rows] == [True] + 4 * [False]
    # without a weight, nobody waits for its verdicts
    done = call("train.py", *options, "--reward-weights", "answer=0", "--steps", 7, "--out", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    assert all("d_loss" in json.loads(line) for line in open(tmp_path / "all" / "metrics.jsonl"))


def test_a_gradient_that_is_no_number_is_not_followed(checkpoints, lamps, tmp_path, monkeypatch):
    """One NaN and every weight is NaN for ever after."""
    data, responses = lamps
    broken_losses(monkeypatch, {2, 3})
    done = call("train.py", "--student", checkpoints["qwen2_5_vl"], "--data", data, "--collection", responses,
                "--out", tmp_path / "run", *LOOP, "--steps", 6, "--token-budget", 100000)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1, 1, 0, 0]
    assert all(torch.isfinite(w).all() for w in train.load_vlm(str(tmp_path / "run" / "student"),
                                                               "cpu").model.parameters())


def test_five_bad_gradients_in_a_row_end_the_run(checkpoints, lamps, tmp_path, monkeypatch):
    """A run of days that learns nothing any more; or one that saves what went wrong over what was right."""
    data, responses = lamps
    broken_losses(monkeypatch, set(range(3, 100)))
    done = call("train.py", "--student", checkpoints["qwen2_5_vl"], "--data", data, "--collection", responses,
                "--out", tmp_path / "run", *LOOP, "--steps", 20, "--token-budget", 100000, "--save-every",
                "2")
    assert done.returncode == 2 and "nothing could be learned in 5 steps in a row" in done.stderr
    assert done.stderr.strip().count("\n") < 3
    assert train.checkpoints(tmp_path / "run")[-1].name == "checkpoint-000006"


def test_signs_of_trouble_are_named():
    """A run that is going wrong for hours in silence; or a warning on a healthy one."""
    def signs(steps=train.WINDOW, **values):
        healthy = {"d_accuracy": 0.7, "kl": 0.5, "skipped_updates": 0}
        return train.warnings([{name: value(i) if callable(value) else value
                                for name, value in (healthy | values).items()} for i in range(steps)])
    assert signs() == [] == signs(d_accuracy=0.5) == signs(d_accuracy=None) == train.warnings([])
    assert "`d_accuracy` is near 1" in signs(d_accuracy=1.0)[0] and signs(20, d_accuracy=1.0) == []
    assert "`skipped_updates`" in signs(3, skipped_updates=1)[0]
    said = [steps for steps in range(60) if signs(min(steps, 50), kl=lambda i: 20 if i >= 15 else 0.5)]
    assert 15 < said[0] <= 20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder],
                      capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_and_loses_nothing(checkpoints, lamps, tmp_path, small_disk):
    """A traceback; a checkpoint that cannot be written and takes the older one with it."""
    data, responses = lamps
    (small_disk / "filler").write_bytes(b"x" * (3 * 2 ** 20 + 900_000))
    options = ["--student", checkpoints["qwen2_5_vl"], "--data", data, "--collection", responses, "--out",
               small_disk / "run", *LOOP, "--steps", 4]
    full = call("train.py", *options)
    assert full.returncode == 2, full.stderr[-500:]
    assert "Traceback" not in full.stderr and "cannot be written" in full.stderr, full.stderr[-500:]
    (small_disk / "filler").unlink()
    shutil.rmtree(small_disk / "run", ignore_errors=True)
    # the discriminator fits, a checkpoint of 4 MB does not
    room = call("train.py", *options, "--save-every", "1")
    assert "no checkpoint at step 1" in room.stderr + room.stdout and "Traceback" not in room.stderr


def test_a_read_only_disk_is_said(checkpoints, lamps, small_disk):
    """A traceback after the data was read and the models were loaded."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = call("train.py", "--student", checkpoints["qwen2_5_vl"], "--data", lamps[0], "--collection",
                lamps[1], "--out", small_disk / "run", *LOOP)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1
