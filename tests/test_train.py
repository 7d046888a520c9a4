"""The real command line, end to end, by subprocess: what a user does, and what a user does wrong."""
import json
import re
import shutil

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from conftest import call, run
from teachers import SHAPES

FAST = ["--device", "cpu", "--batch-size", "4", "--steps", "3", "--discriminator-steps", "2", "--num-samples",
        "2", "--max-new-tokens", "12", "--eval-every", "2", "--log-every", "1", "--collect", "2"]
METRICS = {"step", "loss", "kl", "clip_fraction", "grad_norm", "judge/failed", "length", "cut_off",
           "repeated", "skipped_updates", "flat/total", "reward/answer/student"}


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of the whole method on the toy world, with far too few steps to learn anything."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    done = run("train.py", "--out", out, *FAST, "--teacher-steps", 40, "--sft-steps", 20)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.slow
def test_the_whole_method_runs_and_leaves_what_it_promises(finished):
    out, done = finished
    names = {"student", "sft", "data", "teachers", "collection.jsonl", "metrics.jsonl", "timings.jsonl",
             "rollouts.jsonl", "greedy.jsonl", "curves.png", "report.html", "run.json", "checkpoint-000003",
             "discriminator.safetensors", "evaluation-before.json", "evaluation-after.json"}
    assert names <= {path.name for path in out.iterdir()}
    metrics = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    wanted = METRICS | {f"reward/{m}/{source}" for m in ("similarity", "answer")
                        for source in ("student", "qwen", "internvl")}
    wanted |= {"d_loss", "d_accuracy"}
    assert all(wanted <= row.keys() for row in metrics) and "heldout_accuracy" in metrics[0]
    assert 0 < metrics[0]["tail"] < 1 and 0 <= metrics[0]["heldout_sampled"] <= 1
    wanted = {f"seconds/{phase}" for phase in ("generate", "discriminator", "judge", "update")}
    wanted |= {"tokens_per_second"}
    assert all(wanted <= row.keys() for row in rows_of(out / "timings.jsonl"))
    rollouts = rows_of(out / "rollouts.jsonl")
    assert {"question", "image", "source", "text", "p_student", "rewards", "reward",
            "advantage"} <= rollouts[0].keys()
    assert {row["source"] for row in rollouts} == {"student", "qwen", "internvl"}
    for row in rollouts:                                         # the reward that was logged is Algorithm 2's
        by_hand = (row["p_student"] < 0.5) + row["rewards"]["answer"]
        assert row["reward"] == pytest.approx(by_hand) or abs(row["p_student"] - 0.5) < 1e-3
    followed = [row for row in rows_of(out / "greedy.jsonl") if row["step"] == 0]
    after = json.loads((out / "evaluation-after.json").read_text())
    assert after["sampled"]["task"] == "heldout, sampled" and "heldout, sampled (judge)" in done.stdout
    assert [row["text"] for row in after["sampled"]["rows"]] != [row["text"] for row in after["rows"]]
    after = after["rows"]
    assert [row["id"] for row in followed] == [row["id"] for row in after[:8]]
    assert all(0 < row["p_student"] < 1 and row["verdict"] in (0, 1) for row in followed)
    group = rollouts[:4]
    mean = sum(row["reward"] for row in group) / 4
    for row in group:
        assert row["advantage"] == pytest.approx(row["reward"] - mean, abs=1e-3)
    # D goes on with the optimizer of its pre-training: 2 steps, and 3 of the loop
    assert load_file(out / "checkpoint-000003" / "d_optimizer.safetensors")["head.weight.step"] == 2 + 3
    assert "before" in done.stdout and "after" in done.stdout
    AutoModelForImageTextToText.from_pretrained(out / "student")


@pytest.mark.slow
def test_no_answer_reward_can_teach_the_toy_shapes(finished):
    """A training truth that somebody says, which would give that response an answer reward."""
    def said(name):
        rows = [row for row in rows_of(finished[0] / "data" / f"{name}.jsonl") if row["category"] == "shape"]
        assert len(rows) > 100
        return {word for row in rows for word in re.findall(r"\w+", row["answer"])}
    known = {"disc", "box", "wedge"}
    assert said("train") == known and said("heldout") == set(SHAPES) == said("words")
    assert not known & (said("sft") | said("qwen") | said("internvl"))
    assert "square" not in said("qwen") and "circle" not in said("internvl")       # their blind spots


@pytest.mark.slow
def test_a_second_run_repeats_nothing_and_other_settings_are_refused(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = call("train.py", "--out", out, *FAST, "--teacher-steps", 40, "--sft-steps", 20)
    assert again.returncode == 0 and {path: path.stat().st_mtime_ns
                                      for path in out.rglob("*.safetensors")} == before
    other = call("train.py", "--out", out, *FAST, "--teacher-steps", 40, "--sft-steps", 20, "--lr", 0.5)
    assert other.returncode == 2 and "--lr 0.00015 there, 0.5 here" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(finished, tmp_path):
    """A seed that is not used everywhere: the loop again from the same stages must give the same weights and
    rollouts."""
    out, _ = finished
    shutil.copytree(out, tmp_path / "earlier", ignore=shutil.ignore_patterns("collection.jsonl", "disc*"))
    done = call("train.py", "--from", tmp_path / "earlier", "--out", tmp_path / "again", *FAST,
                "--teacher-steps", 40, "--sft-steps", 20)
    assert done.returncode == 0, done.stderr
    for name in ("collection.jsonl", "student/model.safetensors", "discriminator.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    strip = lambda path: [{k: v for k, v in r.items() if k != "image"} for r in rows_of(path)]    # noqa: E731
    assert strip(tmp_path / "again" / "rollouts.jsonl") == strip(out / "rollouts.jsonl")


def test_data_that_is_not_the_toy_world(lamps, tmp_path):
    """The same command on anyone's images and a collection written by rule; then from the checkpoint it
    left."""
    data, responses = lamps
    first = call("train.py", "--out", tmp_path / "first", "--data", data, "--sft-data", data, "--eval-data",
                 data, "--collection", responses, "--sft-steps", 3, *FAST)
    assert first.returncode == 0, first.stderr
    assert {row["source"] for row in rows_of(tmp_path / "first" / "rollouts.jsonl")} == {"student", "rule"}
    second = call("train.py", "--student", tmp_path / "first" / "student", "--out", tmp_path / "second",
                  "--data", data, "--collection", responses, "--loss", "grpo", "--mu", 2, "--token-budget",
                  300, "--similarity", "tenths", *FAST)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "second" / "report.html").exists()
    assert not (tmp_path / "second" / "evaluation-after.json").exists()
    scored = call("eval.py", "--model", tmp_path / "second" / "student", "--data", data, "--out",
                  tmp_path / "scored", "--device", "cpu", "--max-new-tokens", 4)
    assert scored.returncode == 0 and "lamps (judge)" in scored.stdout, scored.stderr
    assert len(rows_of(tmp_path / "scored" / "student" / "lamps.jsonl")) == 1 + 24


@pytest.mark.parametrize("options", [["--algorithm", "rl"], ["--freeze-discriminator"],
                                     ["--reward-weights", "answer=0"], ["--no-teacher-rollouts"],
                                     ["--beta", "0"]])
@pytest.mark.slow
def test_every_ablation_runs(finished, tmp_path, options):
    out, _ = finished
    done = call("train.py", "--student", out / "sft", "--data", out / "data" / "train.jsonl", "--collection",
               out / "collection.jsonl", "--out", tmp_path / "run", *FAST, *options)
    assert done.returncode == 0, done.stderr
    metrics = rows_of(tmp_path / "run" / "metrics.jsonl")
    rollouts = rows_of(tmp_path / "run" / "rollouts.jsonl")
    if options[0] == "--algorithm":
        assert {row["source"] for row in rollouts} == {"student"} and "d_loss" not in metrics[0]
    if options[0] == "--freeze-discriminator":
        assert "d_loss" not in metrics[0] and "reward/similarity/student" in metrics[0]
    if options[0] == "--reward-weights":
        assert all(row["reward"] == (row["p_student"] < 0.5) for row in rollouts)
    if options[0] == "--no-teacher-rollouts":
        assert all(row["advantage"] == 0 for row in rollouts if row["source"] != "student")


@pytest.mark.slow
def test_collecting_alone(finished, tmp_path):
    out, _ = finished
    done = call("teachers.py", "--teachers", out / "teachers" / "qwen", out / "teachers" / "internvl",
                "--data", out / "data" / "heldout.jsonl", "--out", tmp_path / "c.jsonl", "-n", 1,
                "--max-new-tokens", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "c.jsonl")) == 1000


def fails(*options, says, out):
    """The command ends with one sentence on stderr and exit code 2, and has written nothing."""
    before = sorted(out.rglob("*")) if out.exists() else None
    done = call("train.py", "--out", out, *FAST, *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr.splitlines()[-1], done.stderr
    assert (sorted(out.rglob("*")) if out.exists() else None) == before


def test_bad_input_is_one_sentence_and_exit_code_2(lamps, tmp_path, checkpoints):
    (data, responses), toy = lamps, checkpoints["qwen2_5_vl"]
    out = tmp_path / "out"
    fails("--data", tmp_path / "no.jsonl", "--collection", responses, says="no such file", out=out)
    done = run("train.py", "--out", out, "--data", tmp_path / "no.jsonl", "--collection", responses)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'no.jsonl'}: no such file\n")
    fails("--data", data, "--collection", tmp_path / "no.jsonl", says="no such file", out=out)
    fails("--data", data, says="--teachers", out=out)
    fails("--student", tmp_path / "no", "--data", data, "--collection", responses,
          says="not an image-text-to-text", out=out)
    fails("--lerning-rate", 1, says="unrecognized", out=out)
    fails("--steps", "many", says="invalid int", out=out)
    fails("--freeze", "(visual", says="not a regular expression", out=out)
    fails("--num-samples", 0, says="at least 1", out=out)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(responses.read_text().splitlines(keepends=True)[:-2]))
    fails("--data", data, "--collection", short, says="no response for the question 'lamp23'", out=out)
    spelling = tmp_path / "spelling.jsonl"
    spelling.write_text(responses.read_text().replace("Looking at it", "<|image_pad|>", 1))
    fails("--student", toy, "--data", data, "--collection", spelling, says="spells <|image_pad|>", out=out)
    image = tmp_path / "5.jpg"
    whole = image.read_bytes()
    for damaged in (b"", whole[:-200]):                            # the header of the second is whole
        image.write_bytes(damaged)
        fails("--data", data, "--collection", responses, says="lamps.jsonl:6: image", out=out)
