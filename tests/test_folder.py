"""Run folders: what is in one was made from what its command says, or the command is refused in one
sentence."""
import json
import random
import shutil

import pytest

import teachers
import train
from conftest import ROOT, call, lamp_files
from test_forks import run_code

LOOP = ["--device", "cpu", "--batch-size", 4, "--num-samples", 2, "--discriminator-steps", 2, "--collect", 2,
        "--max-new-tokens", 12, "--rollout-batch", 4, "--log-every", 1, "--save-every", 2]


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    """A finished run of four steps on the lamps, with a teacher; and the options of its command."""
    folder = tmp_path_factory.mktemp("folder")
    data, _ = lamp_files(folder, 8)
    options = ["--student", checkpoints["qwen2_5_vl"], "--teachers", checkpoints["internvl"], "--data", data,
               "--eval-data", data, *LOOP]
    done = call("train.py", *options, "--steps", 4, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run", options


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, its data beside it, and its command."""
    run, options = finished
    shutil.copytree(run.parent, tmp_path / "copy")
    data = tmp_path / "copy" / "lamps.jsonl"
    options = [data if str(option).endswith("lamps.jsonl") else option for option in options]
    return tmp_path / "copy" / "run", options


def refused(says, *options):
    done = call("train.py", *options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr, done.stderr


def test_data_may_move_but_not_change(copied):
    """A row removed between two starts, which began the loop again; reordered data, which went on without a
    word."""
    out, options = copied
    assert call("train.py", *options, "--steps", 4, "--out", out).returncode == 0
    data = out.parent / "lamps.jsonl"
    rows = data.read_text().splitlines(keepends=True)
    for changed in (rows[:-1], rows[::-1]):
        data.write_text("".join(changed))
        refused("collection.jsonl was made with other settings (--data ", *options, "--steps", 4, "--out",
                out)


def test_teachers_and_sampling_belong_to_a_collection(copied, checkpoints):
    """A collection that is used again though other teachers are asked for, or another temperature."""
    out, options = copied
    refused("--temperature 1.0 there, 0.5 here", *options, "--steps", 4, "--out", out, "--temperature", 0.5)
    other = [checkpoints["qwen2_5_vl"] if option == checkpoints["internvl"] else option for option in options]
    refused("the teachers ['internvl'] there, ['qwen2_5_vl'] here", *other, "--steps", 4, "--out", out)


def test_a_collection_that_lacks_responses_is_asked_for_them_again(copied):
    """A server that failed once, recorded as a finished stage, and never asked again."""
    out, options = copied
    records = json.loads((out / "stages.json").read_text())
    assert records["collection.jsonl"]["finished"]
    lines = (out / "collection.jsonl").read_text().splitlines(keepends=True)
    (out / "collection.jsonl").write_text("".join(lines[:-1]))
    records["collection.jsonl"]["finished"] = 0
    (out / "stages.json").write_text(json.dumps(records))
    done = call("train.py", *options, "--steps", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    # and so all later stages are still valid
    assert (out / "collection.jsonl").read_text() == "".join(lines)


def test_files_that_nobody_knows_are_not_taken_for_results(copied, tmp_path):
    """A copied collection or discriminator; a finished folder whose record was deleted, which passed as a new
    run."""
    out, options = copied
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / "collection.jsonl", other)
    refused("no stages.json that says what they were made from", *options, "--steps", 4, "--out", other)
    records = json.loads((out / "stages.json").read_text())
    del records["discriminator.safetensors"]
    (out / "stages.json").write_text(json.dumps(records))
    refused("discriminator.safetensors is not from this run", *options, "--steps", 4, "--out", out)
    (out / "stages.json").unlink()
    refused("no stages.json that says what they were made from", *options, "--steps", 4, "--out", out)


def test_an_option_that_an_old_record_lacks_had_its_default(copied):
    """A new option that locks out all folders of before."""
    out, options = copied
    records = json.loads((out / "stages.json").read_text())
    for record in records.values():
        record["options"].pop("repetition_penalty", None)
        record["options"].pop("reward_weights", None)
    (out / "stages.json").write_text(json.dumps(records))
    assert call("train.py", *options, "--steps", 4, "--out", out).returncode == 0
    refused("--repetition-penalty 1.05 there", *options, "--steps", 4, "--out", out, "--repetition-penalty",
            1)


def test_a_finished_loop_can_be_extended(copied, tmp_path):
    """--steps that locks a finished folder; an extended run that differs from a longer one."""
    out, options = copied
    done = call("train.py", *options, "--steps", 6, "--out", out)
    assert done.returncode == 0 and "resuming after step 4" in done.stdout, done.stderr
    longer = call("train.py", *options, "--steps", 6, "--out", tmp_path / "longer", "--from", out)
    assert longer.returncode == 0, longer.stderr
    for name in ("student/model.safetensors", "metrics.jsonl", "evaluation-after.json"):
        assert (out / name).read_bytes() == (tmp_path / "longer" / name).read_bytes(), name
    refused("the result of 6 steps, more than 4", *options, "--steps", 4, "--out", out)


def test_stages_that_stay_the_same_are_taken_over(copied, tmp_path):
    """--from that copies what would come out otherwise, or makes again what would not."""
    out, options = copied
    done = call("train.py", *options, "--steps", 4, "--out", tmp_path / "new", "--from", out, "--lr", 1e-4)
    assert done.returncode == 0, done.stderr
    for name in ("collection.jsonl", "discriminator.safetensors", "evaluation-before.json"):
        assert f"new/{name} is taken over" in done.stdout
        assert (tmp_path / "new" / name).read_bytes() == (out / name).read_bytes()
    assert len(open(tmp_path / "new" / "metrics.jsonl").readlines()) == 4
    done = call("train.py", *options, "--steps", 4, "--out", tmp_path / "warm", "--from", out,
                "--pretrain-lr", 1e-3)
    assert done.returncode == 0 and "warm/collection.jsonl is taken over" in done.stdout, done.stderr
    assert "warm/discriminator.safetensors is taken over" not in done.stdout
    refused("it has no stages.json", *options, "--out", tmp_path / "none", "--from", tmp_path)


def test_batches_resume_where_they_stopped():
    """A resumed epoch that repeats an example; one that goes on though the data lack what it speaks of."""
    examples = [teachers.Example(name, (), "?", "?") for name in "abcdef"]
    batches = train.Batches(examples, 4, random.Random(0))
    first, state = next(batches), json.loads(json.dumps(batches.state()))
    again = train.Batches(examples, 4, random.Random(0))
    again.load(state)
    assert {e.id for e in first + again.pool} == set("abcdef") and len(again.pool) == 2
    with pytest.raises(KeyError):
        train.Batches(examples[:1], 1, random.Random(0)).load({"pool": ["b"]})


def edited(tmp_path, changes):
    """A copy of the code with {file: {old: new}} replaced in it."""
    code = tmp_path / "code"
    code.mkdir()
    for name in train.CODE:
        source = (ROOT / name).read_text()
        for old, new in changes.get(name, {}).items():
            assert old in source
            source = source.replace(old, new)
        (code / name).write_text(source)
    return code


def test_a_result_that_other_code_made_is_said(copied, tmp_path, capsys):
    """An edited reward and the same --out: the old result without a word; or --from, a D of other code."""
    out, options = copied
    code = edited(tmp_path, {"discriminator.py": {"Eq. 1, negated": "Eq. 1, edited"}})
    for command, says in ((["--out", out], f"{out / 'student'} was made when discriminator.py read otherwise"),
                          (["--out", tmp_path / "new", "--from", out],
                           "new/discriminator.safetensors was made when discriminator.py read otherwise")):
        run_code(code, ["train.py", *map(str, options), "--steps", "4", *map(str, command)])
        assert says in capsys.readouterr().out
    done = call("train.py", *options, "--steps", 4, "--out", out)
    assert "read otherwise" not in done.stdout


def test_an_option_that_a_fork_adds_is_part_of_the_record(copied, tmp_path):
    """--eps-high 0.28, then 0.9 into the same folder: the first result again."""
    out, options = copied
    code = edited(tmp_path, {"train.py": {'        ("--eps", 0.2,': '        ("--eps-high", 0.28, "?"),\n'
                                                                    '        ("--eps", 0.2,'}})
    command = ["train.py", *map(str, options), "--steps", "4", "--out", str(out)]
    run_code(code, command)                                        # an older record had the default
    with pytest.raises(Exception, match="--eps-high 0.28 there, 0.9 here"):
        run_code(code, [*command, "--eps-high", "0.9"])


def test_a_reward_without_a_weight_is_said_before_any_work(lamps, checkpoints, tmp_path):
    """A bare KeyError, hours later."""
    code = edited(tmp_path, {"train.py": {'    return terms\n': '    terms["brevity"] = -group.verdicts\n'
                                                                '    return terms\n'}})
    with pytest.raises(Exception, match="'brevity' of reward_terms has no weight in REWARD_WEIGHTS"):
        run_code(code, ["train.py", "--student", checkpoints["qwen2_5_vl"], "--data", str(lamps[0]),
                        "--collection", str(lamps[1]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
