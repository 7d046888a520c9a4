"""What the README says of the repo must be so."""
import ast
import re
import shlex

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_path_that_the_readme_links_to_exists():
    for path in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / path).exists(), path


MOST_ABOVE = {"train.py": 353, "model.py": 314, "teachers.py": 174, "eval.py": 130, "discriminator.py": 172}


def above_banner(source):
    """How many lines of a file stand above its banner; all, where there is none."""
    lines = source.splitlines()
    return next((i for i, line in enumerate(lines, 1) if line.startswith("#   MACHINERY:")), len(lines))


def test_the_line_counts_in_the_file_map_are_right():
    """Line counts in a README rot, and a tutorial grows. Those of whole files may be off by a twentieth."""
    counts = re.findall(r"\[([a-z]+\.py)\]\([a-z.]+\) \| (\d+) \| (\d+) \|", README)
    assert {name for name, *_ in counts} == set(MOST_ABOVE) == {path.name for path in ROOT.glob("*.py")}
    for name, above, lines in counts:
        source = (ROOT / name).read_text(encoding="utf-8")
        assert above_banner(source) == int(above) <= MOST_ABOVE[name], name
        assert abs(source.count("\n") - int(lines)) <= 0.05 * int(lines), name
    said = int(re.search(r"above the banner in each file, ([\d,]+) lines", README)[1].replace(",", ""))
    assert said == sum(int(above) for _, above, _ in counts) <= 1200


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
                 "memory_gb", "heldout_accuracy", "heldout_sampled", "tail", "loss"):
        assert name in source and f"`{name}" in README, name
    import train
    for name in train.REWARD_WEIGHTS:
        assert f"`reward/{name}/" in README


def test_what_a_reader_needs_stands_above_the_banners():
    """A part of the algorithm that slips below a banner."""
    needed = {"train.py": ("reward_terms", "advantages", "policy_loss", "update_policy", "ask_judge",
                           "ril_step", "ril"),
              "model.py": ("encode", "sample", "generate", "stream", "score", "packed_states", "packed_mask"),
              "teachers.py": ("Example", "Teacher", "Collection"),
              "eval.py": ("parse_verdict", "rule_verdict")}
    for name, parts in needed.items():
        source = (ROOT / name).read_text(encoding="utf-8")
        tutorial = "\n".join(source.splitlines()[:above_banner(source)])
        for part in parts:
            assert re.search(rf"^(def|class) {part}\b", tutorial, re.MULTILINE), (name, part)


def test_no_function_is_longer_than_a_screen():
    """A function of 200 lines, which nobody reads."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (path.name, node.name)


def test_the_readme_can_be_read():
    """A README that grows; lines that a screen cuts off."""
    assert README.count("\n") <= 300 and max(map(len, README.splitlines())) <= 120
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"
