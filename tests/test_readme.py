"""What the README says of the repo must be so."""
import re
import shlex

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_that_the_readme_links_to_exists():
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_line_counts_in_the_file_map_are_right():
    """Line counts in a README rot. Each may be off by no more than a tenth."""
    counts = re.findall(r"\[([a-z]+\.py)\]\([a-z.]+\) \| (\d+)", README)
    assert {name for name, _ in counts} == {path.name for path in ROOT.glob("*.py")}
    for name, said in counts:
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(said)) <= 0.1 * lines, (name, lines)


def test_every_option_in_the_readmes_commands_exists():
    """A command that fails when it is pasted: unknown scripts or options."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()
                if "python " in line]
    commands += re.findall(r"`(python [^`\n]+)`", README)
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command[command.index("python "):].split("#")[0].split("&&")[0])
        script = "".join((ROOT / name).read_text(encoding="utf-8")
                         for name in (words[1], "teachers.py", "train.py", "tests/bench_generate.py"))
        for word in words[2:]:
            if word.startswith("-"):
                assert f'"{word}"' in script, (command, word)


def test_every_logged_metric_is_explained():
    source = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "discriminator.py"))
    for name in ("d_accuracy", "d_loss", "kl", "clip_fraction", "repeated", "skipped_updates", "flat/",
                 "length",
                 "cut_off", "grad_norm", "judge/failed", "tokens_per_second", "seconds/",
                 "memory_gb/", "heldout_accuracy", "loss"):
        assert name in source and f"`{name}" in README, name
    import train
    for name in train.REWARD_WEIGHTS:
        assert f"`reward/{name}/" in README


def test_ril_is_what_stands_before_the_banner():
    """A banner that moves down; a part of the algorithm that slips below it."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    algorithm = source[:source.index("MACHINERY")]
    said = int(re.search(r"RIL is the first (\d+)", README)[1])
    assert abs(algorithm.count("\n") - said) <= 10
    for name in ("reward_terms", "advantages", "policy_loss", "update_policy", "ril_step", "ril", "main"):
        assert f"\ndef {name}(" in algorithm


def test_the_readme_can_be_read():
    """A README that grows; lines of code that a screen cuts off."""
    assert README.count("\n") <= 300
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"
