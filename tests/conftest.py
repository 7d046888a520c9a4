"""Shared by all tests: off line, and one tiny random checkpoint of each toy family, built once."""
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tqdm import tqdm  # noqa: E402


def pytest_configure(config):
    """Tests, and not the benchmarks that import this file, run on one thread: their models are too small."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


FAMILIES = ("qwen2_5_vl", "internvl")
TEXTS = 20 * ["How many red circles are there? "
              "There are 3 red circles. The answer is yes, no, blue or green."]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    from teachers import build_tiny_vlm
    folder = tmp_path_factory.mktemp("checkpoints")
    for family, words in zip(FAMILIES, (400, 300)):
        build_tiny_vlm(str(folder / family), family, TEXTS, 64, 2, words, seed=0)
    return {family: str(folder / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny checkpoint of each family that is supported."""
    import families
    folder = tmp_path_factory.mktemp("families")
    for i, family in enumerate(families.FAMILIES):
        families.build(folder / family, family, TEXTS, 380 + 10 * i)
    return {family: str(folder / family) for family in families.FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def vlm(request, checkpoints):
    from model import load_vlm
    return load_vlm(checkpoints[request.param], "cpu")


@pytest.fixture(scope="session")
def qwen(checkpoints):
    from model import load_vlm
    return load_vlm(checkpoints["qwen2_5_vl"], "cpu")


def quick(values, chosen):
    """Parameters of a test of which only the chosen run by default."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def noise_image(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


@pytest.fixture(scope="session")
def prompts(vlm):
    """Four prompts in one batch: three sizes of image, two images, and none."""
    from model import encode
    a, b, c = noise_image(32, 32), noise_image(80, 48, 1), noise_image(48, 64, 2)
    return [encode(vlm, "How many?", [a]), encode(vlm, "Is there a red circle?", [b]),
            encode(vlm, "yes or no?", []), encode(vlm, "two", [c, a])]


def lamp_files(tmp_path, count=24):
    """Data that is not the toy world: lamps that are on or off, and responses made by rule. Returns (data,
    collection)."""
    rng = random.Random(0)
    with open(tmp_path / "lamps.jsonl", "w") as data, open(tmp_path / "responses.jsonl", "w") as responses:
        for i in range(count):
            on = rng.random() < 0.5
            image = Image.new("RGB", (rng.choice([40, 64, 90]), rng.choice([33, 64])), "black")
            ImageDraw.Draw(image).ellipse((5, 5, 28, 28), fill="yellow" if on else "grey")
            image.save(tmp_path / f"{i}.jpg")
            answer = "yes" if on else "no"
            data.write(json.dumps({"id": f"lamp{i}", "image": f"{i}.jpg", "question": "Is the lamp on?",
                                   "answer": answer}) + "\n")
            for text in (f"Looking at it, {answer}.", f"{answer}, plainly."):
                responses.write(json.dumps({"id": f"lamp{i}", "teacher": "rule", "text": text}) + "\n")
    return tmp_path / "lamps.jsonl", tmp_path / "responses.jsonl"


@pytest.fixture
def lamps(tmp_path):
    return lamp_files(tmp_path)


def run(script, *options, cwd=ROOT):
    """The real command line; returns the finished process with stdout and stderr as text."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, options)], cwd=cwd,
                          capture_output=True, text=True)


def call(script, *options):
    """As `run`, in this process: it saves the seconds that a new one takes to import torch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(script, options)
    return subprocess.CompletedProcess(options, code, out.getvalue(), err.getvalue())


def exit_code(script, options):
    """The exit code of a script's main, called in this process."""
    import importlib
    from model import run_main
    main = importlib.import_module(script.removesuffix(".py")).main
    argv, sys.argv = sys.argv, [script, *map(str, options)]
    try:
        run_main(main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
    return 0


class Forked:
    """A script in a process that is forked from this one, and so need not import torch. It can be killed, and
    has the methods of subprocess.Popen that the tests use."""

    def __init__(self, script, *options, cwd=ROOT, **environment):
        self.log, self.returncode = tempfile.TemporaryFile("w+"), None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(self.log.fileno(), 1)
                os.dup2(self.log.fileno(), 2)
                sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
                tqdm.set_lock(threading.RLock())                   # or one that is killed keeps everybody's
                os.chdir(cwd)
                os.environ.update(environment)
                code = exit_code(script, options)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self):
        """The exit code; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=240):
        """Everything it printed, when it has ended; and None, for stderr."""
        until = time.time() + timeout
        while self.poll() is None and time.time() < until:
            time.sleep(0.01)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} seconds")
        self.log.seek(0)
        return self.log.read(), None
