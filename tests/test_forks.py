"""The forks of tests/forks/: they apply to the files that they name, run, and change what comes out, which is
a plain checkpoint."""
import importlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load

from conftest import ROOT, lamp_files, quick
from model import World, load_vlm, save_vlm
from teachers import load_examples
from train import sft

FORKS = sorted((ROOT / "tests" / "forks").glob("*.diff"))
# What the command says to use a fork; and what it would say without, where a default would differ anyway.
OPTIONS = {"gspo": ["--loss", "gspo"], "rloo": ["--loss", "rloo"], "gad": ["--similarity", "gad"],
           "overlong": ["--similarity", "continuous"], "replay": ["--similarity", "continuous"],
           "lora": ["--rank", "4"], "curriculum": ["--batch-size", "3"],
           "clip_higher": ["--mu", "2", "--eps", "0.01", "--eps-high", "0.5"],
           "program_teacher": ["--teachers", "program:teacher.py"]}
INSTEAD = {"gad": ["--similarity", "continuous"], "clip_higher": ["--mu", "2", "--eps", "0.01"],
           **{name: OPTIONS[name] for name in ("overlong", "replay", "curriculum")}}
# these want a student that is right now and then
RIGHT = ("curriculum", "teachers_up", "resample")
MODULES = ("model", "discriminator", "teachers", "eval", "train")
PROGRAM = "import sys\nprint('Looking at it,', sys.argv[1][:11])\n"


def wrong_half(path):
    """The two responses to every other question say the opposite of what is right."""
    lines = path.read_text().splitlines(keepends=True)
    opposite = {"yes": "no", "no": "yes"}
    for i in [i for i in range(len(lines)) if i % 4 < 2]:
        lines[i] = re.sub(r"\b(yes|no)\b", lambda match: opposite[match[1]], lines[i])
    path.write_text("".join(lines))


def run_code(code, argv):
    """train.py of another folder, in this process: that saves the seconds in which torch is imported."""
    ours = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(code)
            patch.syspath_prepend(str(code))
            patch.setattr(sys, "argv", argv)
            importlib.import_module("train").main()
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(ours)


def test_forks_are_short_and_in_the_readme():
    """A fork that is more than one file and few lines, or that nobody hears of."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(FORKS) >= 10
    for fork in FORKS:
        lines = fork.read_text(encoding="utf-8").splitlines()
        assert len([line for line in lines if line.startswith("+++")]) == 1, fork.name
        assert len([line for line in lines if line[:1] == "+" and line.strip("+ ")]) - 1 <= 17, fork.name
        assert f"`{fork.stem}`" in readme, fork.name


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    """The student that comes out without a fork, by options."""
    found = {}

    def weights(student, options):
        if (student, *options) not in found:
            folder = tmp_path_factory.mktemp("plain") / "code"
            found[student, *options] = trained(folder, student, options)
        return found[student, *options]
    return weights


@pytest.fixture(scope="module")
def right_student(checkpoints, tmp_path_factory):
    """A student that has learned to answer, and is right now and then."""
    folder = tmp_path_factory.mktemp("right")
    data, _ = lamp_files(folder, 8)
    vlm = load_vlm(checkpoints["qwen2_5_vl"], "cpu")
    args = SimpleNamespace(sft_lr=3e-3, sft_batch_size=8, seed=0, token_budget=4096, offload=False)
    sft(vlm, load_examples(str(data)), 80, "right", args, World())
    save_vlm(vlm, str(folder / "student"))
    return str(folder / "student")


def trained(folder, checkpoint, options, fork=None):
    """The weights of the student that a copy of the code trains, with a fork applied."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    _, responses = lamp_files(folder, 8)
    wrong_half(responses)
    (folder / "teacher.py").write_text(PROGRAM)
    if fork:
        subprocess.run(["git", "apply", fork], cwd=folder, check=True)
    source = [] if "--teachers" in options else ["--collection", "responses.jsonl"]
    run_code(folder, ["train.py", "--student", checkpoint, "--data", "lamps.jsonl", *source, "--out", "out",
                      "--device", "cpu", "--batch-size", "4", "--steps", "3", "--discriminator-steps", "2",
                      "--num-samples", "2", "--collect", "2", "--max-new-tokens", "24", "--lr", "1e-3",
                      *options])
    return (folder / "out" / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fork", quick(FORKS, [path for path in FORKS if path.stem == "gspo"]),
                         ids=lambda path: path.stem)
def test_a_fork_runs_and_changes_something(fork, checkpoints, plain_weights, tmp_path, request):
    """A fork of a function which has gone; or whose change no run would show."""
    student = checkpoints["qwen2_5_vl"]
    if fork.stem in RIGHT:
        student = request.getfixturevalue("right_student")
    weights = trained(tmp_path / "code", student, OPTIONS.get(fork.stem, []), fork)
    plain = plain_weights(student, INSTEAD.get(fork.stem, []))
    assert weights != plain and load(weights).keys() == load(plain).keys()
