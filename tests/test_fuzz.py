"""Mutated files of every kind: each is read, or refused in one sentence. FUZZ=2000 for more of them than the
default."""
import json
import os
import random
import signal

import pytest

import eval as e
import test_benchmarks as made
import train
from conftest import lamp_files
from model import UserError
from teachers import Collection, load_examples

COUNT = int(os.environ.get("FUZZ", 150))
ATOMS = [None, True, 0, -1, 1e999, "", "x", "\ud83d", [], {}, [[]], {"a": None}, ["x"], 10 ** 30, "<image>",
         "../..", "\0", "[" * 50]


def shaken(value, rng):
    """A JSON value with one part replaced, removed or doubled."""
    way = rng.randrange(8)
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if way == 0:
            return {k: v for k, v in value.items() if k != key}
        if way == 1:
            key = rng.choice(["id", "image", "images", "question", "answers", "foil"])
            return value | {key: rng.choice(ATOMS)}
        return value | {key: shaken(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return value[:i] + [[], 2 * [value[i]]][way] + value[i + 1:] if way < 2 else (
            value[:i] + [shaken(value[i], rng)] + value[i + 1:])
    return rng.choice(ATOMS)


def mutated(data, rng):
    """Bytes of a file, changed in one of many ways."""
    way = rng.randrange(6)
    i, j = sorted(rng.randrange(len(data)) for _ in range(2))
    if way == 0:
        return data[:i]
    if way == 1:
        return data[:i] + rng.randbytes(rng.randint(1, 8)) + data[i + rng.randint(0, 8):]
    if way == 2:
        return data[:j] + data[i:]
    if way == 3:
        return data.replace(*rng.choice([(b'"', b"'"), (b"\n", b"\r"), (b"\t", b" "), (b":", b""),
                                         (b"e", b"\x00"),
                                         (b"{", b"[" * 3000)]))
    for lines in ([data], data.splitlines()):                      # a JSON value, or one on each line
        try:
            rows = shaken([json.loads(line) for line in lines], rng)
            return "\n".join(map(json.dumps, rows)).encode()
        except (ValueError, TypeError):
            pass
    cells = data.split(b"\t")                                      # a TSV
    cells[rng.randrange(len(cells))] = rng.choice([b"", b'"', b"['x'", b"[1, 2]", b"-1", b'"0"', b"\n",
                                                   b"<image 9>"])
    return b"\t".join(cells)


def survives(work):
    """work() succeeds or raises a UserError of one sentence, within ten seconds."""
    def late(*_):
        raise AssertionError("it hangs")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        work()
        return True
    except UserError as error:
        assert "\n" not in str(error).strip()
        return False
    finally:
        signal.alarm(0)


def fuzz(path, work, rng, count):
    """Mutate a file `count` times."""
    whole = path.read_bytes()
    assert survives(work)                                          # as it is, it can be read
    for i in range(count):
        state = rng.getstate()
        path.write_bytes(mutated(whole, rng))
        try:
            survives(work)
        except Exception as error:
            rng.setstate(state)
            pytest.fail(f"{path.name}, mutation {i}: {type(error).__name__}: {error}; "
                        f"{path.read_bytes()[:600]}")
    path.write_bytes(whole)


@pytest.mark.parametrize("name", made.CASES)
def test_mutated_benchmark_files(name, tmp_path):
    """A traceback from a file that is not quite what it should be; asked, scored and reported as far as it
    can be read."""
    path = made.CASES[name][0](tmp_path)

    def work():
        task = e.task_of(str(path))
        for x in task.examples:
            task.asked(x)
        e.results_table({"a": [e.score_responses(task, ["A, because 3.5 dogs"] * len(task.examples),
                                                 e.rule_judge)]})
    fuzz(path, work, random.Random(name), COUNT // 15)


ROWS = {
    "ours": {"id": "7", "image": ["a.jpg"], "question": "How <image> many?", "answer": "2",
             "options": ["1", "2"],
             "history": [["Hello", "there"]], "hint": "Look.", "category": "c"},
    "llava": {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nHow?"},
                                                             {"from": "gpt", "value": "2"}]},
    "chat": {"images": ["b.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "2"}]}}


@pytest.mark.parametrize("form", ROWS)
def test_mutated_data_files(form, tmp_path):
    made.jpg(tmp_path, "a.jpg", "b.jpg")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(ROWS[form] | {"id": str(i)}) + "\n" for i in range(3)))
    fuzz(path, lambda: load_examples(str(path)), random.Random(form), COUNT // 6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_mutated_images(kind, tmp_path):
    """What Pillow raises on a broken file is of many kinds."""
    made.noise_image(40, 30).save(tmp_path / "i.img", kind)
    (tmp_path / "data.jsonl").write_text('{"image": "i.img", "question": "?", "answer": "!"}\n')
    fuzz(tmp_path / "i.img", lambda: load_examples(str(tmp_path / "data.jsonl")), random.Random(kind),
         COUNT // 6)


def test_mutated_collections(tmp_path):
    data, responses = lamp_files(tmp_path, 4)
    examples = load_examples(str(data))
    fuzz(responses, lambda: Collection(str(responses), examples), random.Random(0), COUNT)


def test_mutated_predictions(tmp_path):
    task = e.task_of(str(made.choices("AI2D_TEST", tmp_path)))
    lines = "".join(json.dumps({"id": i, "text": "A"}) + "\n" for i in range(3))
    for name, contents in (("p.jsonl", lines), ("p.tsv", "index\tprediction\n0\tA\n1\tA\n2\tA\n")):
        (tmp_path / name).write_text(contents)
        fuzz(tmp_path / name, lambda: e.read_predictions(str(tmp_path / name), task), random.Random(name),
             COUNT // 6)


def test_cut_checkpoints(checkpoints, tmp_path):
    """Half of a checkpoint's JSON: passed over or refused, and the weights stay as they are."""
    data, responses = lamp_files(tmp_path, 4)
    out = tmp_path / "run"
    out.mkdir()
    args = train.parse_args(["--student", checkpoints["qwen2_5_vl"], "--data", str(data), "--collection",
                             str(responses), "--out", str(out), "--device", "cpu"])
    policy = train.load_vlm(checkpoints["qwen2_5_vl"], "cpu")
    run = train.Run(args, train.World(), out, policy, load_examples(str(data)), None)
    train.load_checkpoint(run)
    run.step = 3
    train.save_checkpoint(run)
    before = [w.clone() for w in policy.model.parameters()]
    path = out / "checkpoint-000003" / "state.json"
    whole = path.read_bytes()

    def work():
        train.load_checkpoint(run)
        for log in run.logs.values():
            log.close()
    for length in range(0, len(whole) - 1, len(whole) // 20):
        path.write_bytes(whole[:length])
        survives(work)
    path.write_bytes(whole)
    assert survives(work) and run.step == 3
    assert all((a == b).all() for a, b in zip(before, policy.model.parameters()))
