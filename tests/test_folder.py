"""Run folders: what is in one was made from what its command says, or the command is refused in one
sentence."""
import json
import random
import shutil

import pytest

import teachers
import train
from conftest import ROOT, call, lamp_files, noise_image
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
        refused("was made with other settings (--data ", *options, "--steps", 4, "--out", out)
    data.write_text("".join(rows))
    noise_image(40, 33).save(out.parent / "0.jpg")                 # another picture in its place
    refused("was made with other settings (--data ", *options, "--steps", 4, "--out", out)


def test_every_option_belongs_to_a_run(copied, checkpoints):
    """A result that is shown again though another option, teacher or judge is asked for."""
    out, options = copied
    command = [*options, "--steps", 4, "--out", out]
    refused("--skip-bad False there, True here", *command, "--skip-bad")
    for option, value, there in (("--temperature", 0.5, 1.0), ("--lr", 0.5, 1e-06),
                                 ("--dtype", "bfloat16", "float32"),
                                 ("--loss", "grpo", "dr_grpo"),
                                 ("--reward-weights", "answer=2", {"similarity": 1.0, "answer": 1.0})):
        refused(f"{option} {there} there, ", *command, option, value)
    other = [checkpoints["qwen2_5_vl"] if option == checkpoints["internvl"] else option for option in command]
    refused("--teachers ['internvl'] there, ['qwen2_5_vl'] here", *other)
    place = options.index("--eval-data")
    refused("there, None here", *options[:place], *options[place + 2:], "--steps", 4, "--out", out)
    assert call("train.py", *command, "--token-budget", 100, "--log-every", 2).returncode == 0


def test_files_that_nobody_knows_are_not_taken_for_results(copied, tmp_path):
    """A copied collection or discriminator; a finished folder whose record was deleted, which passed as a new
    run; a record that is none."""
    out, options = copied
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(out / "collection.jsonl", other)
    refused("no run.json that says what they were made from", *options, "--steps", 4, "--out", other)
    for broken in ("{}", "[1]", '{"options": {}}', "{"):
        (out / "run.json").write_text(broken)
        refused("run.json: not ", *options, "--steps", 4, "--out", out)
    (out / "run.json").unlink()
    refused("no run.json that says what they were made from", *options, "--steps", 4, "--out", out)


def test_an_option_that_an_old_record_lacks_had_its_default(copied):
    """A new option that locks out all folders of before."""
    out, options = copied
    record = json.loads((out / "run.json").read_text())
    del record["options"]["repetition_penalty"], record["options"]["reward_weights"]
    (out / "run.json").write_text(json.dumps(record))
    command = [*options, "--steps", 4, "--out", out]
    assert call("train.py", *command).returncode == 0
    refused("--repetition-penalty 1.05 there", *command, "--repetition-penalty", 1)


def test_a_finished_loop_can_be_extended(copied, tmp_path):
    """--steps that locks a finished folder; an extended run that differs from a longer one."""
    out, options = copied
    done = call("train.py", *options, "--steps", 6, "--out", out)
    assert done.returncode == 0 and "resuming after step 4" in done.stdout, done.stderr
    longer = call("train.py", *options, "--steps", 6, "--out", tmp_path / "longer", "--from", out)
    assert longer.returncode == 0, longer.stderr
    for name in ("student/model.safetensors", "metrics.jsonl", "evaluation-after.json"):
        assert (out / name).read_bytes() == (tmp_path / "longer" / name).read_bytes(), name
    refused("has come to step 6, beyond --steps 4", *options, "--steps", 4, "--out", out)
    shutil.rmtree(out / "checkpoint-000006")
    refused("its last checkpoint is gone", *options, "--steps", 8, "--out", out)


def test_what_comes_before_the_loop_is_taken_over_if_it_stays_the_same(copied, tmp_path):
    """--from that copies what would come out otherwise, or makes again what would not."""
    out, options = copied
    new = tmp_path / "new"
    marked = out / "discriminator.safetensors"
    before = marked.stat().st_size
    done = call("train.py", *options, "--steps", 4, "--out", new, "--from", out, "--lr", 1e-4)
    assert done.returncode == 0 and "responses of" not in done.stderr, done.stderr
    for name in ("collection.jsonl", "discriminator.safetensors"):
        assert (new / name).read_bytes() == (out / name).read_bytes()
    assert before == marked.stat().st_size and len(open(new / "metrics.jsonl").readlines()) == 4
    refused("--pretrain-lr 1e-05 there, 0.001 here", *options, "--out", tmp_path / "warm", "--from", out,
            "--pretrain-lr", 1e-3)
    refused("it has no run.json", *options, "--out", tmp_path / "none", "--from", tmp_path)
    assert not (tmp_path / "warm").exists() and not (tmp_path / "none").exists()


def test_a_collection_that_lacks_responses_is_asked_for_them_until_D_has_read_them(copied):
    """A server that failed once and is never asked again; or new responses for a D that was trained on
    others."""
    out, options = copied
    whole = (out / "collection.jsonl").read_text()
    (out / "collection.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    command = ["train.py", *options, "--steps", 4, "--out", out]
    assert call(*command).returncode == 0 and (out / "collection.jsonl").read_text() != whole
    (out / "discriminator.safetensors").unlink()
    assert call(*command).returncode == 0 and (out / "collection.jsonl").read_text() == whole


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


def edited(tmp_path, name, old, new):
    """A copy of the code with `old` replaced by `new` in the file of this name."""
    code = tmp_path / "code"
    code.mkdir()
    for file in train.CODE:
        source = (ROOT / file).read_text()
        assert file != name or old in source
        (code / file).write_text(source.replace(old, new) if file == name else source)
    return code


def test_a_result_that_other_code_made_is_said(copied, tmp_path, capsys):
    """An edited reward and the same --out: the old result without a word; or --from, a D of other code."""
    out, options = copied
    code = edited(tmp_path, "discriminator.py", "Eq. 1, negated", "Eq. 1, edited")
    new = ["--out", tmp_path / "new", "--from", out]
    for command in (["--out", out], new):
        run_code(code, ["train.py", *map(str, options), "--steps", "4", *map(str, command)])
        assert f"{out} was made by other versions of discriminator.py" in capsys.readouterr().out
    done = call("train.py", *options, "--steps", 4, "--out", out)
    assert "other versions" not in done.stdout
    done = call("train.py", *options, "--steps", 4, *new)          # its loop was the edited code's
    assert f"{tmp_path / 'new'} was made by other versions of discriminator.py" in done.stdout


def test_an_option_that_a_fork_adds_is_part_of_the_record(copied, tmp_path):
    """--eps-high 0.28, then 0.9 into the same folder: the first result again."""
    out, options = copied
    code = edited(tmp_path, "train.py", '        Option("--eps", 0.2,',
                  '        Option("--eps-high", 0.28, "?"),\n        Option("--eps", 0.2,')
    command = ["train.py", *map(str, options), "--steps", "4", "--out", str(out)]
    run_code(code, command)                                        # an older record had the default
    with pytest.raises(Exception, match="--eps-high 0.28 there, 0.9 here"):
        run_code(code, [*command, "--eps-high", "0.9"])


def test_a_reward_without_a_weight_is_said_before_any_work(lamps, checkpoints, tmp_path):
    """A bare KeyError, hours later."""
    code = edited(tmp_path, "train.py", "    return terms\n",
                  '    terms["brevity"] = -group.verdicts\n    return terms\n')
    with pytest.raises(Exception, match="'brevity' of reward_terms has no weight in REWARD_WEIGHTS"):
        run_code(code, ["train.py", "--student", checkpoints["qwen2_5_vl"], "--data", str(lamps[0]),
                        "--collection", str(lamps[1]), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
