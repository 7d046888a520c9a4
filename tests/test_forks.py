"""The README's forks: they apply to the files that they name, run, and change what comes out at default settings."""
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, lamp_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
FORKS = {match[1]: (match[2], match[3]) for match in re.finditer(
    r"^\*\*([^*]+?)[.:*][^`]*?(?:`[^`\n]*`[^`]*?)*?```diff\n# (\w+\.py)\n(.*?)```", README, re.M | re.S)}
# what the command says to use the fork; and what it would say without, where that is not the same
OPTIONS = {"Another loss": ["--loss", "gspo"], "Another discriminator": ["--similarity", "gad"],
           "Another teacher": ["--teachers", "program:teacher.py"]}
INSTEAD = {"Another discriminator": ["--similarity", "continuous"]}
PROGRAM = "import sys\nprint('Looking at it,', sys.argv[1][:11])\n"


def applied(source: str, diff: str) -> str:
    """The source after a diff: hunks between "..." lines, each of which must be found once."""
    for hunk in re.split(r"^\.\.\.\n", diff, flags=re.M):
        lines = hunk.splitlines()
        before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        assert source.count(before) == 1, f"found {source.count(before)} times:\n{before}"
        source = source.replace(before, after)
    return source


def wrong_half(path):
    """Every other response of the collection says the opposite."""
    lines = path.read_text().splitlines(keepends=True)
    opposite = {"yes": "no", "no": "yes"}
    for i in range(0, len(lines), 2):
        lines[i] = re.sub(r"\b(yes|no)\b", lambda match: opposite[match[1]], lines[i])
    path.write_text("".join(lines))


def command(code, checkpoint, name, options):
    source = [] if "--teachers" in options else ["--collection", "responses.jsonl"]
    return subprocess.Popen(
        [sys.executable, str(code / "train.py"), "--student", checkpoint, "--data", "lamps.jsonl", *source, "--out", name,
         "--device", "cpu", "--batch-size", "4", "--steps", "3", "--discriminator-steps", "2", "--num-samples", "2",
         "--collect", "2", "--max-new-tokens", "24", "--lr", "1e-3", *options], cwd=code, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)


def test_forks_are_there_and_short():
    """A fork that is not one file and few lines."""
    assert len(FORKS) >= 7 and {"Another loss", "Another discriminator"} <= FORKS.keys()
    for name, (_, diff) in FORKS.items():
        assert len([line for line in diff.splitlines() if line.startswith("+")]) <= 15, name


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_runs_and_changes_something(name, checkpoints, tmp_path):
    """A fork that names a function which has gone; or whose change no default setting would show."""
    script, diff = FORKS[name]
    for folder in ("plain", "fork"):
        (tmp_path / folder).mkdir()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, tmp_path / folder)
        _, responses = lamp_files(tmp_path / folder, 8)
        wrong_half(responses)
        (tmp_path / folder / "teacher.py").write_text(PROGRAM)
    fork = tmp_path / "fork" / script
    fork.write_text(applied(fork.read_text(encoding="utf-8"), diff), encoding="utf-8")
    options = OPTIONS.get(name, [])
    runs = [command(tmp_path / "fork", checkpoints["qwen2_5_vl"], "out", options),
            command(tmp_path / "plain", checkpoints["qwen2_5_vl"], "out", INSTEAD.get(name, []))]
    for run in runs:
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0, said[-3000:]
    weights = [(tmp_path / folder / "out" / "student" / "model.safetensors").read_bytes() for folder in ("fork", "plain")]
    assert weights[0] != weights[1]
