"""Readers, the toy world and the collection."""
import base64
import io
import json
import math
import random
import shutil
import struct
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import call, lamp_files, noise_image
from eval import rule_verdict, task_of
from model import Sampling, UserError, chat_turns, encode_responses, image_tokens
from teachers import (SHAPES, VOICES, CallFailed, Collection, Example, ToySplit, blamed_settings, draw_scene,
                      draw_toy_world, fill_collection, load_examples, make_teacher, merge_files,
                      open_image, prompt_checks, questions_about, replies_of, select, write_examples)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"id": "a", "image": "a.png", "question": "How many?", "answer": "2"}


def test_bad_data_names_the_file_and_the_line(tmp_path):
    noise_image(32, 32).save(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    for rows, line, says in (
            ([GOOD, "{oops"], 2, "not JSON"), ([GOOD, "[1]"], 2, "object"), ([GOOD, GOOD], 2, "used before"),
            ([GOOD | {"answer": 2}], 1, "answer"), ([GOOD | {"image": "empty.png"}], 1, "cannot be read"),
            ([GOOD, GOOD | {"id": "b", "image": "gone.png"}], 2, "does not exist"),
            ([GOOD | {"image": "text.png"}], 1, "cannot be read"), ([GOOD | {"image": 7}], 1, "image")):
        path = write(tmp_path / "data.jsonl", *rows)
        with pytest.raises(UserError, match=says) as error:
            load_examples(path)
        assert f"{path}:{line}" in str(error.value) and "\n" not in str(error.value)


def test_toy_splits_share_no_picture_and_come_out_the_same_again(tmp_path):
    """A held-out split that was seen in training, or a world that differs from run to run."""
    splits = {"train": ToySplit(200), "heldout": ToySplit(200), "sft": ToySplit(200, ("plain", "A"))}
    for name in ("a", "b"):
        draw_toy_world(str(tmp_path / name), 3, splits)
    pictures = {}
    for split in splits:
        path = tmp_path / "a" / f"{split}.jsonl"
        assert path.read_text() == (tmp_path / "b" / f"{split}.jsonl").read_text()
        examples = load_examples(str(path))
        assert len(examples) == 200
        assert {e.category for e in examples} == {"count", "colour", "shape"}
        pictures[split] = {open(e.images[0], "rb").read() for e in examples}
    assert not (pictures["train"] & pictures["heldout"] or pictures["sft"] & pictures["heldout"])


def test_toy_teachers_err_in_their_blind_spots_and_nowhere_else(tmp_path):
    """A blind spot that is in the truth too, and so is none; a teacher that errs elsewhere; a swap of two
    words that is made twice, and so is none."""
    for name, wrong in (("a", {"square": "circle", "1": "2", "2": "1"}), ("b", {})):
        draw_toy_world(str(tmp_path / name), 3, {"x": ToySplit(300, wrong=wrong)})
    blind, sighted = (load_examples(str(tmp_path / name / "x.jsonl")) for name in "ab")
    said = {(right.truth, e.truth) for e, right in zip(blind, sighted, strict=True) if e.truth != right.truth}
    assert said == {("square", "circle"), ("1", "2"), ("2", "1")}


def test_a_toy_student_echoes_the_colour_when_asked_for_a_shape(tmp_path):
    """An echo in another kind of question, or always: then the student would never say the word."""
    draw_toy_world(str(tmp_path), 3, {"x": ToySplit(2000, echoes=True)})
    examples = load_examples(str(tmp_path / "x.jsonl"))
    assert all(e.truth in SHAPES or e.truth in e.question for e in examples if e.category == "shape")
    echoed = [e.truth in e.question for e in examples if e.category == "shape"]
    assert 0.7 < sum(echoed) / len(echoed) < 0.9
    assert not any(e.truth in e.question for e in examples if e.category != "shape")


@pytest.mark.parametrize("voice", ["plain", "A", "B"])
def test_the_judge_reads_every_way_in_which_the_toy_speaks(voice):
    """A voice that the rule judge cannot read, or one in which a wrong answer passes for right."""
    for question, truth, wrong in (("What shape is red?", "circle", "ball"),
                                   ("What shape is red?", "square", "circle"),
                                   ("How many circles are there?", "3", "2"),
                                   ("Is there a red circle?", "yes", "no"),
                                   ("What colour is the square?", "red", "blue")):
        for way in VOICES[voice]:
            assert rule_verdict(question, truth, way.format(truth))
            assert not rule_verdict(question, truth, way.format(wrong))


def test_toy_answers_are_true():
    """A generator that marks a wrong answer as the truth; checked on a scene written by hand."""
    scene = {0: ("red", "circle"), 3: ("blue", "square")}
    truth = {"How many shapes are there?": "2", "How many circles are there?": "1",
             "How many red shapes are there?": "1", "How many blue shapes are there?": "1",
             "How many squares are there?": "1", "How many triangles are there?": "0",
             "What colour is the circle?": "red", "What colour is the square?": "blue",
             "What shape is red?": "circle", "What shape is blue?": "square"}
    asked = {q: a for seed in range(200) for _, q, a in questions_about(scene, random.Random(seed))}
    assert truth.items() <= asked.items()
    assert {a for q, a in asked.items() if q not in truth} == {"0"}
    assert draw_scene(scene).getpixel((8, 8)) == (225, 60, 50)     # and the picture shows it


def collection_of(tmp_path, counts):
    rows = [{"id": "a", "teacher": t, "text": f"{t}{i}"} for t, n in counts.items() for i in range(n)]
    return Collection(write(tmp_path / "c.jsonl", *rows), [Example("a", (), "q", "a")])


def test_draw_is_even_over_teachers_without_repeats_and_reproducible(tmp_path):
    """One teacher that gets all places, a response twice while others were left, a draw without its seed."""
    collection, example = collection_of(tmp_path, {"S": 3, "T": 3}), Example("a", (), "q", "a")
    for seed in range(20):
        pairs, = collection.draw([example], 4, random.Random(seed))
        assert sorted(t for t, _ in pairs) == ["S", "S", "T", "T"] and len({text for _, text in pairs}) == 4
        assert [pairs] == collection.draw([example], 4, random.Random(seed))
    odd = [collection.draw([example], 3, random.Random(seed))[0] for seed in range(60)]
    assert 15 < sum([t for t, _ in pairs].count("S") == 2 for pairs in odd) < 45
    assert len(collection.draw([example], 16, random.Random(0))[0]) == 16      # more than there are


def test_a_collection_that_cannot_be_used_is_refused(tmp_path, qwen):
    """A question without a response; an image token spelt; responses that D would take for the student's."""
    examples = [Example("a", (), "q", "a"), Example("b", (), "q", "b", where="d.jsonl:2")]
    for row, says in (({}, "no response for the question 'b' of d.jsonl:2"),
                      ({"teacher": "student"}, "c.jsonl:2"),
                      ({"text": "a <|image_pad|> here"}, "c.jsonl:2.*image_pad"),
                      ({"text": 7}, "c.jsonl:2: expected"),
                      ({"finished": "false"}, 'c.jsonl:2: expected true or false as "finished"'),
                      ({"finished": None}, '"finished"'), ({"finish_reason": "length"}, "found 'length'")):
        path = write(tmp_path / "c.jsonl", {"id": "a", "text": "fine"}, {"id": "a", "text": "x"} | row)
        with pytest.raises(UserError, match=says):
            Collection(path, examples, image_tokens(qwen.processor))


def test_an_interrupted_fill_resumes_to_the_same_file(tmp_path, checkpoints):
    """A resume that repeats, loses or reorders responses. The fill is cut in the middle of a batch."""
    examples = [Example(str(i), (), f"How many {i}?", "1") for i in range(6)]
    complete = tmp_path / "complete.jsonl"
    cut = tmp_path / "cut.jsonl"

    def fill(path):
        teacher = make_teacher(checkpoints["qwen2_5_vl"], "cpu", slots=2 * 3)
        fill_collection(str(path), [teacher], examples, 3, Sampling(max_new_tokens=5), seed=1)
    fill(complete)
    lines = complete.read_text().splitlines(keepends=True)
    assert len(lines) == 18
    cut.write_text("".join(lines[:8]))
    fill(cut)
    assert cut.read_text() == complete.read_text()
    fill(cut)
    assert cut.read_text() == complete.read_text()                 # a full collection is left alone
    cut.write_text("".join(lines[::-1]))
    fill(cut)
    assert [json.loads(line)["id"] for line in open(cut)] == [e.id for e in examples for _ in range(3)]
    rows = [json.loads(line) for line in lines]
    assert all(row["sampling"]["max_new_tokens"] == 5 and row["teacher"] == "qwen2_5_vl" for row in rows)
    examples[2] = replace(examples[2], question="How few?")
    with pytest.raises(UserError, match=r"cut.jsonl:7: a response to another question than '2' asks now"):
        fill(cut)


# -------------------------------------------------------------------------------- a teacher of one's own


class Program:
    """A teacher that is a program: it shouts, and fails with every seed of 7."""
    name = "program"

    def check(self):
        """It runs."""

    def ask(self, todo, num, sampling, seed):
        for example, have in todo:
            for number in range(have, num):
                if seed + number != 7:
                    yield example, [(f"{example.text.upper()} {seed + number}", True)]


class Never(Program):
    def check(self):
        raise UserError("there is no such program")


def test_what_several_processes_have_collected_is_merged_once(tmp_path, checkpoints):
    """A kill in the middle of a collection by three processes, or of the merge: a line lost, torn or doubled;
    an order that tells who was first."""
    data, _ = lamp_files(tmp_path, 6)
    examples, sampling = load_examples(str(data)), Sampling(max_new_tokens=5)
    teacher = make_teacher(checkpoints["qwen2_5_vl"], "cpu")
    whole, path = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    fill_collection(str(whole), [teacher], examples, 2, sampling)
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[8])
    Path(f"{path}.rank1").write_bytes(lines[4] + lines[5] + lines[2][:40])     # was killed as it wrote
    Path(f"{path}.rank2").write_bytes(lines[8] + lines[9] + lines[0])          # one was merged before
    fill_collection(str(path), [teacher], examples, 2, sampling)
    assert path.read_bytes() == whole.read_bytes()
    assert [file.name for file in tmp_path.glob("c.jsonl*")] == ["c.jsonl"]


def test_a_program_is_a_teacher_in_ten_lines(tmp_path, capsys):
    """An interface that only servers and checkpoints fit; failures that are not counted or never mended."""
    examples = [Example("a", (), "What?", "1"), Example("b", (), "Who?", "2")]
    path = tmp_path / "c.jsonl"
    assert fill_collection(str(path), [Program()], examples, 1, Sampling(), seed=5)
    assert not fill_collection(str(path), [Program()], examples, 3, Sampling(), seed=5)
    texts = [(row["id"], row["text"]) for row in map(json.loads, open(path))]
    assert texts == [("a", "WHAT? 5"), ("a", "WHAT? 6"), ("b", "WHO? 5"), ("b", "WHO? 6")]
    assert "program: 2 questions still lack responses" in capsys.readouterr().out
    assert Collection(str(path), examples).responses["b"]["program"] == ["WHO? 5", "WHO? 6"]


def test_all_teachers_are_checked_before_the_first_is_asked(tmp_path):
    """Hours of one teacher, and then the sentence that the other was never there."""
    examples, path, never = [Example("a", (), "What?", "1")], tmp_path / "c.jsonl", Never()
    never.name = "never"
    for other, says in ((never, "no such program"), (Program(), "rename a folder"),
                        (make_teacher("runs/big/student"), "from the student's"),
                        (make_teacher(str(tmp_path / "gone")), "gone: not an image-text-to-text checkpoint")):
        with pytest.raises(UserError, match=says):
            fill_collection(str(path), [Program(), other], examples, 1, Sampling())
        assert not path.exists()
    fill_collection(str(path), [Program()], examples, 1, Sampling())
    assert fill_collection(str(path), [Never()], examples, 1, Sampling())      # a full one needs no teachers


# -------------------------------------------------------------------------------- other people's formats


def test_llava_conversations_become_one_example_per_answer(tmp_path):
    """A turn without the turns before it, an image lost or doubled, replies paired with the next question."""
    (tmp_path / "images" / "coco").mkdir(parents=True)
    noise_image(32, 32).save(tmp_path / "images" / "coco" / "a.jpg")
    rows = [{"id": "x", "image": "coco/a.jpg", "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A lamp."},
                {"from": "human", "value": "Is it on?"}, {"from": "gpt", "value": "Yes."}]},
            {"id": "x", "conversations": [
                {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            {"id": "x", "conversations": [
                {"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    first, second, text, same = load_examples(str(tmp_path / "llava.json"))
    assert (first.id, first.truth, first.history, second.truth) == ("x-1", "A lamp.", (), "Yes.")
    assert second.history == (("<image>\nWhat is it?", "A lamp."),) and second.question == "Is it on?"
    assert first.images == second.images == (str(tmp_path / "images/coco/a.jpg"),) and text.images == ()
    assert (text.id, same.id) == ("x", "x#2")                      # ids repeat in LLaVA's own files


def test_chat_messages_place_images_where_they_stand(tmp_path):
    """An image of a later turn shown too early; a system turn dropped; parts in the wrong order."""
    for name in "ab":
        noise_image(32, 32).save(tmp_path / f"{name}.png")
    def text(words):
        return {"type": "text", "text": words}
    red = [text("Is "), {"type": "image", "text": None}, text(" red?")]
    rows = [{"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": red},
                          {"role": "assistant", "content": [text("No.")]},
                          {"role": "system", "content": "Be kind."},
                          {"role": "user", "content": [{"type": "image"}, text("And this?")]},
                          {"role": "assistant", "content": "Yes."},
                          {"role": "user", "content": "Thanks."}],
             "images": ["a.png", "b.png"]},
            {"messages": [{"role": "user", "content": "<image> or <image>?"},
                          {"role": "assistant", "content": "The first."}],
             "image": ["a.png", "b.png"], "category": "c"}]
    first, second, third = load_examples(write(tmp_path / "chat.jsonl", *rows))
    assert first.question == "Be brief.\nIs <image> red?" and second.question == "Be kind.\n<image>And this?"
    assert second.history == ((first.question, "No."),)
    assert [Path(x).name for x in first.images] == ["a.png"]
    assert [Path(x).name for x in second.images] == ["a.png", "b.png"]
    turns = chat_turns(second.question, 2, second.history)
    kinds = [part["type"] for turn in turns for part in turn["content"]]
    assert kinds == ["text", "image", "text", "text", "text", "image", "text"]
    assert third.truth == "The first." and len(third.images) == 2 and third.category == "c"


def test_the_truth_of_a_choice_becomes_a_letter(tmp_path):
    noise_image(8, 8).save(tmp_path / "a.png")
    header = "index\timage_path\tquestion\tA\tB\tquestion_type\tanswer\n"
    for truth, letter in (("dog", "B"), ("A", "A")):
        (tmp_path / "d.tsv").write_text(f"{header}1\ta.png\tWhich?\tcat\tdog\tmulti_choice\t{truth}\n")
        assert load_examples(str(tmp_path / "d.tsv"))[0].truth == letter


def test_images_of_every_kind_come_out_upright_and_in_8_bit_rgb(tmp_path):
    """A sideways photograph, black for transparent, white where 16 bits were cut to 8, CMYK read as RGB."""
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.paste((0, 0, 255), (0, 0, 20, 20))                         # left half blue
    exif = Image.Exif()
    exif[0x0112] = 6                                               # the camera was turned by 90 degrees
    red.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.quantize(4).save(tmp_path / "palette.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (8, 8), (0, 128)).save(tmp_path / "half.png")
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    red.convert("1").save(tmp_path / "bits.png")

    def pixel(name, at=(2, 2)):
        image = open_image(str(tmp_path / name), "here")
        assert image.mode == "RGB"
        return image.getpixel(at)
    turned = open_image(str(tmp_path / "turned.jpg"), "here")
    assert turned.size == (20, 40) and np.allclose(turned.getpixel((10, 5)), (0, 0, 255), atol=12)
    assert np.allclose(pixel("cmyk.jpg"), (0, 0, 255), atol=25) and pixel("palette.png") == (0, 0, 255)
    assert pixel("clear.png") == (255, 255, 255) and np.allclose(pixel("half.png"), 127, atol=2)
    assert np.allclose(pixel("deep.png"), 128, atol=1)
    pixel("bits.png")


def test_grey_of_many_bits_is_scaled_by_what_it_holds(tmp_path):
    """Float, int32 and 12-in-16-bit pictures, all read as black."""
    ramp = np.linspace(0, 1, 9).reshape(3, 3)
    for top, white, kind in (
            (1, 1, np.float32), (0.5, 1, np.float32), (255, 255, np.float32), (3000, 4095, np.uint16),
            (65535, 65535, np.uint16), (1, 1, np.int32), (65535, 65535, np.int32), (2e6, 2e6, np.int32)):
        held = (ramp * top).astype(kind)
        Image.fromarray(held).save(tmp_path / "a.tiff")
        got = np.asarray(open_image(str(tmp_path / "a.tiff"), "here"))[..., 1]
        assert np.allclose(got, held / white * 255, atol=1), (top, kind)
    assert got[0, 0] == 0 and got[2, 2] == 255
    for bad in (-1, np.nan, np.inf):
        Image.fromarray(np.array([[0.5, bad]], np.float32)).save(tmp_path / "bad.tiff")
        with pytest.raises(UserError, match="here: image .*negative or not finite; save it in 8 bits"):
            open_image(str(tmp_path / "bad.tiff"), "here")


def bomb(path):
    """A PNG whose header promises 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    contents = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        contents += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(contents)


@pytest.mark.parametrize("name", ["truncated.jpg", "truncated.png", "bomb.png"])
def test_bad_images_are_refused_by_name_or_skipped_and_counted(tmp_path, name, capsys):
    """An image that fails in the middle of a run of days."""
    noise_image(64, 64).save(tmp_path / "good.jpg")
    for kind in ("jpg", "png"):
        noise_image(64, 64).save(tmp_path / f"intact.{kind}")
        (tmp_path / f"truncated.{kind}").write_bytes((tmp_path / f"intact.{kind}").read_bytes()[:3000])
    bomb(tmp_path / "bomb.png")
    path = write(tmp_path / "data.jsonl", GOOD | {"id": "a", "image": "good.jpg"},
                 GOOD | {"id": "b", "image": name})
    with pytest.raises(UserError, match=f"data.jsonl:2: image .*{name} cannot be read"):
        load_examples(path)
    assert [e.id for e in load_examples(path, skip_bad=True)] == ["a"]
    assert "1 of 2 examples skipped" in capsys.readouterr().out


def thin_long_and_spelt(tmp_path):
    """Rows that Qwen's processor refuses, or that are longer than its context; one that is neither."""
    noise_image(32, 32).save(tmp_path / "a.png")
    noise_image(3, 630).save(tmp_path / "thin.png")
    return {"thin": GOOD | {"image": "thin.png"}, "spelt": GOOD | {"question": "what is <|image_pad|>?"},
            "long": GOOD | {"question": "how many? " * 900}, "good": GOOD}


REFUSED = {"thin": "aspect ratio must be smaller than 200", "spelt": "spells <|image_pad|>",
           "long": "longer than the 4096 tokens that"}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("command", ["train", "collect", "select", "eval", "sft", "held out"])
def test_what_a_model_cannot_be_asked_is_refused_before_any_work(tmp_path, checkpoints, command, kind):
    """A processor's error in the middle of a run of days, as a traceback; a context that is silently
    exceeded."""
    row, qwen, out = thin_long_and_spelt(tmp_path)[kind], checkpoints["qwen2_5_vl"], tmp_path / "out"
    bad = write(tmp_path / "bad.jsonl", GOOD | {"id": "first"}, row)
    good = write(tmp_path / "good.jsonl", GOOD)
    train = ["train.py", "--student", qwen, "--teachers", checkpoints["internvl"], "--out", out]
    done = call(*{
        "train": [*train, "--data", bad], "eval": ["eval.py", "--model", qwen, "--data", bad, "--out", out],
        "held out": [*train, "--data", good, "--eval-data", bad],
        "sft": [*train, "--data", good, "--sft-data", bad, "--sft-steps", 1],
        "collect": ["teachers.py", "--teachers", qwen, "--data", bad, "--out", out],
        "select": ["teachers.py", "--select", 1, "--student", qwen, "--data", bad, "--out", out]}[command])
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {bad}:2: ") and REFUSED[kind] in done.stderr
    assert not out.exists()


def test_what_a_model_cannot_be_asked_is_skipped_and_counted(tmp_path, checkpoints, capsys, monkeypatch):
    rows = [row | {"id": kind} for kind, row in thin_long_and_spelt(tmp_path).items()]
    path, checks = write(tmp_path / "d.jsonl", *rows), prompt_checks([checkpoints["qwen2_5_vl"]], 24)
    assert [e.id for e in load_examples(path, True, checks)] == ["good"]
    assert f"3 of 4 examples skipped, the first: {path}:1" in capsys.readouterr().out
    assert [e.id for e in task_of(path, skip_bad=True, checks=checks).examples] == ["good"]
    pair = [replace(e, group="g", options=("2", "3"), truth="A") for e in load_examples(path)[2:]]
    monkeypatch.setattr("eval.load_examples", lambda *_: pair)
    with pytest.raises(UserError, match="of every group"):         # half a group is no group
        task_of(path, "mcq", True, checks=checks)
    path = write(tmp_path / "none.jsonl", *rows[:3])
    with pytest.raises(UserError, match="none.jsonl:[1-3]"):       # none is left
        load_examples(path, True, checks)


@pytest.mark.parametrize("response, kept", [(24, ["a"]), (4096, []), (None, ["a"])])
def test_room_is_kept_for_the_response(tmp_path, checkpoints, response, kept):
    """A prompt that fits without the response to it; a server needs no check."""
    noise_image(32, 32).save(tmp_path / "a.png")
    path = write(tmp_path / "d.jsonl", GOOD)
    checks = prompt_checks([checkpoints["internvl"], "big@http://localhost:1/v1"], response)
    assert len(checks) == 1
    with nullcontext() if kept else pytest.raises(UserError, match="with a response of 4096"):
        assert [e.id for e in load_examples(path, False, checks)] == kept
    check, = prompt_checks([checkpoints["internvl"]], None)        # its own truth
    example, = load_examples(path)
    with pytest.raises(UserError, match="longer than the 4096"):
        check(replace(example, truth="no " * 5000))


# -------------------------------------------------------------------------------- nothing is lost silently


def one(tmp_path, row, name="rows.jsonl"):
    """The only example of a row, whose images x.png and y.png are there."""
    for image in ("x.png", "y.png"):
        noise_image(16, 16).save(tmp_path / image)
    example, = load_examples(write(tmp_path / name, row))
    return example


def in_base64(kind, seed=0):
    noise_image(64, 48, seed).save(buffer := io.BytesIO(), kind)
    return base64.b64encode(buffer.getvalue()).decode()


BARE = in_base64("PNG")
URL = "data:image/png;base64," + BARE
PLAIN = {"question": "Which animal?", "answer": "B"}
CHAT = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]}
LLAVA = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]}


# Columns that other people's files have, and that were once read, by what is said of them.
IMAGE_COLUMNS = ("image_path", "image_paths", "img", "imgs", "img_path", "image_file", "Image", "file_name",
                 "image_url", "image_1", "picture", "imagename")
LOST = {
    'call it "image"': [
        *({name: value} for name in IMAGE_COLUMNS for value in ("x", ["x", "y"])),
        {"image_base64": BARE}, {"image_1": {"bytes": "AAAA"}}, {"pic": {"path": "x.png"}}, {"scan": [URL]},
        {"jpg": in_base64("JPEG")}, {"url": "http://a.b/c.JPG"}, {"image": "x.png", "image_2": "y.png"},
        {"image": "x.png", "mask": "m.png"}, {"image": "x.png", "after": "xx.png"}],
    "only images can be shown": [{"video": "a"}, {"videos": ["a"]}, {"Audio_Path": "a"}, {"clip": "a b.mp4"},
                                 {"sound": ["a.wav"]}],
    "options": [{"choices": ["hen", "cow"]}, {"choices": "['hen', 'cow']"}, {"A": "hen", "B": "cow"},
                {"choices": {"label": ["A", "B"], "text": ["hen", "cow"]}}, {"choice_a": "hen"}],
    "before the question": [{"system": "Be brief."}, {"system_prompt": "Be brief."}],
    'call it "id"': [{"index": 3}, {"question_id": "q7"}],
    'call it "messages"': [{"talk": CHAT["messages"]}, {"qa": [{"question": "a", "answer": "b"}]},
                           {"texts": [{"user": "a", "assistant": "b"}]}]}


@pytest.mark.parametrize("form", [PLAIN, CHAT, LLAVA])
@pytest.mark.parametrize("says", LOST)
def test_columns_that_would_be_lost_are_refused_with_what_to_write(tmp_path, form, says):
    """A row that became text alone, or lost a picture, its options, its instruction, or the turns before."""
    for more in LOST[says]:
        with pytest.raises(UserError, match=says) as error:
            one(tmp_path, form | more)
        assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and len(str(error.value)) < 500
        assert one(tmp_path, form | {name: None for name in more if name != "image"}).images == ()


@pytest.mark.parametrize("more", [
    {"source": "coco", "tags": ["a", "b"], "score": 0.5, "image_id": 7, "boxes": [{"x": 1}], "license": None},
    {"image": "x.png", "file_name": "train/x.png", "coco_url": "http://a.b/c.jpg", "image_path": "x.png"},
    {"id": "a", "index": 0, "question_id": 1}])
def test_other_columns_are_passed_over(tmp_path, more):
    """A file refused for a column that holds nothing of the question."""
    for form in (PLAIN, CHAT, LLAVA):
        assert len(one(tmp_path, form | more).images) == ("image" in more)


def chat_of(*parts, reply="It.", **more):
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": reply}]
    return {"messages": turns} | more


IMAGE = {"type": "image"}
ASK = {"type": "text", "text": "?"}
# Rows in forms that were once read, or never, by what is said of them.
REFUSED_ROWS = {
    '"question" and "answer"': [{"prompt": "?"}, PLAIN | CHAT, {"problem": "?", "solution": "!"}],
    'as "question"': [PLAIN | {"question": " "}, PLAIN | {"question": ["?"]},
                      {"question": "", "answer": "yes", "kind": "picture"}],
    'as "answer"': [{"question": "?"}, PLAIN | {"answer": ["a"]}, PLAIN | {"answer": 2}],
    "beside a dialogue; write it into": [CHAT | {"options": ["a", "b"]}, LLAVA | {"hint": "a"},
                                         CHAT | {"history": [["a", "b"]]}, LLAVA | {"answer": "a"}],
    "is the path of a file; save": [PLAIN | {"image": URL}, PLAIN | {"image": BARE}, CHAT | {"images": [URL]},
                                    PLAIN | {"image": "https://a.b/c?d=1"}],
    "does not exist|too long": [PLAIN | {"image": "['y.png', 'x.png']"}, PLAIN | {"images": [BARE[:90]]},
                                PLAIN | {"image": "x" * 900}],
    "be a list of strings": [PLAIN | {"image": {"bytes": BARE}}, CHAT | {"images": [{"path": "x.png"}]},
                             PLAIN | {"image": False}, PLAIN | {"options": "hen, cow"},
                             PLAIN | {"options": ["hen", 2]}, PLAIN | {"options": {"A": "hen", "B": "cow"}},
                             PLAIN | {"answers": [{"answer": "B", "answer_confidence": "yes"}]}],
    "not both": [PLAIN | {"image": "x.png", "images": ["y.png"]}],
    "a text holds an image: write <image>": [
        PLAIN | {"question": "Is <img>y.png</img> old?"}, PLAIN | {"question": f"![]({URL})\nWhat?"},
        PLAIN | {"question": "Which?<IMG>v2_0_0.jpg<IMG>or this<IMG>v2_0_1.png"}, PLAIN | {"options": [URL]},
        chat_of({"type": "text", "text": "<img>x.png</img>?"})],
    "marks 1 ": [PLAIN | {"question": "<image> or not?"}, chat_of(IMAGE, ASK, images=["x.png", "y.png"])],
    "marks a video": [PLAIN | {"question": "<video>\nWhat?"}, PLAIN | {"history": [["<audio>", "!"]]}],
    'a dialogue is written as "messages"': [PLAIN | {"history": history} for history in (
        [{"question": "a", "answer": "b"}], [{"role": "user", "content": "a"}], [["a"]], [1], "a")],
    "expected text": [PLAIN | {"history": [["\ud83d", "half an emoji"]]}],
    "in turn": [{"conversations": [{"from": "gpt", "value": "Hello"}]}, chat_of(ASK, reply="<image> Here."),
                {"messages": [{"role": "developer", "content": "Hm."}, *CHAT["messages"]]}],
    "no question with an answer": [{"messages": CHAT["messages"][:1]}],
    "in none of the forms": [{"messages": ["hello"]}, {"conversations": CHAT["messages"]},
                             {"messages": LLAVA["conversations"]}, chat_of({"type": "text", "text": 3}),
                             {"messages": [{"role": "system", "text": "Hm."}, *CHAT["messages"]]}],
    '"images" is not read': [{"messages": [CHAT["messages"][0] | {"images": ["x"]}, CHAT["messages"][1]]}],
    'with its path in "images"': [chat_of(part, ASK) for part in (
        {"type": "image_url", "image_url": {"url": URL}}, {"type": "image", "image": "x.png"}, {"text": "?"},
        {"type": "input_image", "image_url": URL}, {"image": "x.png"}, {"type": "video", "video": "a.mp4"},
        {"type": "text", "value": "?"}, {"type": "input_text", "text": "?"})]}


@pytest.mark.parametrize("says", REFUSED_ROWS)
def test_rows_in_other_forms_are_refused_in_one_short_sentence(tmp_path, says):
    """Forms that were read once, or that were never: each in a sentence that names file and line."""
    for row in REFUSED_ROWS[says]:
        with pytest.raises(UserError, match=says) as error:
            one(tmp_path, row)
        said = str(error.value)
        assert said.startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and "\n" not in said and len(said) < 700


INDEXED = "index\timage_path\tquestion\tanswer\n1\tx.png\t"
REFUSED_FILES = [
    ("d.json", '{"a": 1}\n{"a": 2}\n', "a file of JSON lines .jsonl"), ("d.json", '{"data": []}', "a list"),
    ("d.json", '{"v2_0": {"question": "?", "answer": "!", "capability": ["rec"]}}', "a list of rows"),
    ("d.json", '{"images": [], "info": {}}', "with images and annotations"), ("d.json", "[]", "no examples"),
    ("d.json", "[1]", "d.json: item 1: in none"), ("d.txt", '{"question": "?"}', "data is .jsonl"),
    ("d", "", "data is .jsonl"), ("d.jsonl", '[{"question": "?"}]', "d.jsonl:1: expected an object"),
    ("d.jsonl", '{\n"question": "?"}', "d.jsonl:1: not JSON"), ("d.jsonl", '{"data": [1]}', "jsonl:1: a row"),
    ("d.tsv", "image\tquestion\tanswer\nx.png\tWho?\tcow\n", "d.tsv:2: .*VLMEvalKit's columns"),
    ("d.tsv", "index\tquestion\tA\n1\tWho?\tcow\n", "VLMEvalKit's columns"),
    ("d.tsv", INDEXED.replace("_path", "") + "Who?\tcow\n", "row x.png, which holds none"),
    ("d.tsv", INDEXED.replace("_path", "").replace("x.png", URL) + "Who?\tcow\n", "image .*cannot be read"),
    ("d.tsv", INDEXED.replace("image_path", "Image") + "Who?\tcow\n", 'd.tsv:2: "Image" is not read'),
    ("d.tsv", INDEXED.replace("image_path", "img") + "Who?\tcow\n", 'call it "image"'),
    ("d.tsv", INDEXED.replace("question", "video") + "a.mp4\tcow\n", '"video" is not read'),
    ("d.tsv", INDEXED.replace("question", "system_prompt") + "Hm.\tcow\n", "before the question"),
    ("d.tsv", INDEXED.replace("question", "options") + "['a', 'b']\tA\n", "a TSV has A, B"),
    ("d.tsv", INDEXED + "Who?\n", "d.tsv:2: expected 4 cells"),
    ("d.tsv", INDEXED + "<image 2>?\tcow\n", "of <image 2>"), ("d.tsv", INDEXED + "?\t\n", "test split")]


@pytest.mark.parametrize("name, text, says", REFUSED_FILES)
def test_files_in_other_forms_are_refused(tmp_path, name, text, says):
    noise_image(16, 16).save(tmp_path / "x.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_examples(str(tmp_path / name))
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


def test_a_row_of_the_first_form_is_read_in_full(tmp_path):
    got = one(tmp_path, {"id": 7, "image": ["x.png", "y.png"], "question": "<image> Which?", "answer": "B",
                         "options": ["hen", "cow"], "category": "c", "hint": "Look.", "answers": ["B", "cow"],
                         "history": [["<image>?", "A cow."]]})
    assert (got.id, got.truth, got.truths, got.category) == ("7", "B", ("B", "cow"), "c")
    assert got.text == "Hint: Look.\n<image> Which?\nA. hen\nB. cow"
    assert got.history == (("<image>?", "A cow."),)
    assert [Path(image).name for image in got.images] == ["x.png", "y.png"] and got.sizes == ((16, 16),) * 2
    ten = one(tmp_path, {"image": "x.png", "question": "What?", "answers": ["dog"] * 9 + ["cat"]})
    assert (ten.id, ten.truth, ten.truths.count("dog")) == ("1", "dog", 9)


@pytest.mark.parametrize("options, asked", [
    (["A. red", "B. blue"], "A. red\nB. blue"), (["(A) red", "(B) blue"], "A. red\nB. blue"),
    (["a) red", "b) blue"], "A. red\nB. blue"), (["A: 1", " B: 2", "C: 3"], "A. 1\nB. 2\nC. 3"),
    (["B. blue", "A. red"], "A. B. blue\nB. A. red"), (["A. red", "blue"], "A. A. red\nB. blue"),
    (["A.", "B."], "A. A.\nB. B."), (["a red one", "b"], "A. a red one\nB. b"),
    (["A. 1", "B. 2", "D. 4"], "A. A. 1\nB. B. 2\nC. D. 4"), (["A.I.", "B.C."], "A. A.I.\nB. B.C.")])
def test_options_that_carry_their_letters_are_asked_with_one(tmp_path, options, asked):
    """"A. A. red", and an answer of "red" or "A" that is neither. Letters in another order are text."""
    assert one(tmp_path, PLAIN | {"options": options}).text == "Which animal?\n" + asked
    cells = "\t".join(options)
    letters = "\t".join("ABC"[:len(options)])
    (tmp_path / "d.tsv").write_text(
        f"index\timage_path\tquestion\t{letters}\tanswer\n1\tx.png\tWhich animal?\t{cells}\tB\n")
    assert load_examples(str(tmp_path / "d.tsv"))[0].text == "Which animal?\n" + asked


def test_examples_without_words_and_with_hints_are_read_as_they_were_written(tmp_path):
    """--select over MMMU: hours of log-probabilities, and then a file that is refused or lacks hints."""
    cells = [in_base64("PNG", seed) for seed in range(3)]
    (tmp_path / "MMMU.tsv").write_text(
        "index\timage\thint\tquestion\tA\tB\tanswer\n"
        f'1\t"{cells}"\tSee <image 3>.\t<image 1>\t<image 2>\tno\tA\n2\t{cells[0]}\t\t\tyes\tno\tB\n')
    asked = load_examples(str(tmp_path / "MMMU.tsv"))
    assert [e.kind for e in asked] == ["picture"] * 2 and asked[1].question == ""
    for e in asked:
        write_examples([e], str(tmp_path / "chosen.jsonl"))
        got, = load_examples(str(tmp_path / "chosen.jsonl"))
        assert (got.text, got.truth, got.options, got.id) == (e.text, e.truth, e.options, e.id)
        pictures = [open_image(image, "").tobytes() for image in e.images]
        assert [open_image(image, "").tobytes() for image in got.images] == pictures
    write_examples([replace(asked[1], kind="caption")], str(tmp_path / "chosen.jsonl"))
    assert load_examples(str(tmp_path / "chosen.jsonl"))[0].kind == "caption"


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("start", [b"", BOM, b"\n", b" \r\n\n"])
def test_a_bom_or_blank_first_lines_change_nothing(tmp_path, start):
    noise_image(16, 16).save(tmp_path / "x.png")
    cell = base64.b64encode((tmp_path / "x.png").read_bytes())
    listing = json.dumps([PLAIN | {"id": "7", "image": "x.png"}]).encode()
    for name, text in (("a.jsonl", listing[1:-1] + b"\n"), ("a.json", listing),
                       ("b.TSV", b'"image"\tindex\tquestion\tanswer\n' + cell + b"\t7\tWhich animal?\tB\n"),
                       ("c.tsv", b"index\timage_path\tquestion\tanswer\n7\tx.png\tWhich animal?\tB\n")):
        if name.lower().endswith(".tsv") and b" " in start:
            continue                                               # this is a header of one column
        (tmp_path / name).write_bytes(start + text)
        got, = load_examples(str(tmp_path / name))
        assert (got.id, got.question, got.truth, got.sizes) == ("7", "Which animal?", "B", ((16, 16),)), name
    (tmp_path / "c").write_bytes(start + b'{"id": "7", "text": "B"}\n')
    assert Collection(str(tmp_path / "c"), [got]).examples == [got]


def test_blank_and_cut_off_responses_are_not_used(tmp_path):
    """A blank response as a model of what to say."""
    rows = [{"id": "0", "teacher": "t", "text": "one"} | more
            for more in ({}, {"text": ""}, {"text": " \n"}, {"finished": False},
                         {"text": "two", "finished": True})]
    collection = Collection(write(tmp_path / "c.jsonl", *rows), [Example("0", (), "q", "a")])
    assert collection.unfinished == 3 and collection.responses["0"]["t"] == ["one", "two"]


def test_unusable_responses_are_counted_when_they_come(tmp_path, capsys):
    """Hours of a teacher that is always cut off, and nothing said until training."""
    class Short(Program):
        def ask(self, todo, num, sampling, seed):
            for example, _ in todo:
                yield example, [(" ", True), ("The an", False), ("The end.", True)]
    examples = [Example("a", (), "What?", "1"), Example("b", (), "Who?", "2")]
    fill_collection(str(tmp_path / "c"), [Short()], examples, 3, Sampling())
    assert "program: 4 of 6 responses are empty or were cut off" in capsys.readouterr().out
    assert [json.loads(line)["finished"] for line in open(tmp_path / "c")] == [False, False, True] * 2


def test_only_some_finish_reasons_mean_unfinished():
    """Complete replies of other servers, all left out of training."""
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Ye"}, {"text": "s."}]
    for choice, reply in (
            *(({"finish_reason": end}, ("Yes.", True)) for end in (
                None, "stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence")),
            *(({"finish_reason": end}, ("Yes.", False)) for end in (
                "length", "content_filter", "abort", "repetition", "error", "timeout", "cancelled", "SAFETY",
                "model_length", "MAX_TOKENS", "sensitive", "tool_calls", "something new")),
            ({}, ("Yes.", True)), ({"message": {"content": None}}, ("", False)),
            ({"message": {"content": parts}}, ("Yes.", True))):
        assert replies_of({"choices": [{"message": {"content": "Yes."}} | choice]}) == [reply]


@pytest.mark.parametrize("complaint, blamed", [
    ("Unrecognized request argument: top_k", ["top_k"]), ("top_k is not supported", ["top_k"]),
    ('{"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"]}]}', ["top_p"]),
    ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", ["max_tokens"]),
    ("n must be 1", ["n"]), ("'temperature' does not support 0.7", ["temperature"]),
    ("The model `seed-vl-1.5` does not exist", []), ("no such model: seed", []), ("model n-7 is down", []),
    ("This model's maximum context length is 4096 tokens. However, you requested 5000 (n = 1, 'max_tokens' = "
     "256). Please reduce the length of the messages.", []),
    ("'max_tokens' is too large: 256 > 4096 - 4000", [])])
def test_only_a_complaint_about_a_setting_counts(complaint, blamed):
    """A model called seed-vl-1.5 for which the seed is dropped for good; a long prompt that costs n."""
    names = ("n", "seed", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")
    body = dict.fromkeys(names, 1)
    assert blamed_settings(CallFailed(complaint, 400), body) == blamed


@pytest.mark.parametrize("tag", [0x0112, 0x011A, 0x8769, 0x9286])
@pytest.mark.parametrize("kind", [1, 2, 3, 5, 7, 10, 12, 13])
def test_exif_with_a_mistyped_tag_ends_in_a_sentence_at_most(tag, kind, tmp_path):
    """TypeError and a traceback, also with --skip-bad, for one picture among thousands."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) * (tag != 0x0112) + struct.pack("<HHII", tag, kind, 1, 26)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + bytes(4)
    noise_image(32, 32).save(tmp_path / "i.jpg", exif=exif + b"\1\0\0\0" * 4)
    (tmp_path / "d.jsonl").write_text('{"question": "?", "answer": "2", "image": "i.jpg"}\n'
                                      '{"question": "?", "answer": "2"}\n')
    assert 1 <= len(load_examples(str(tmp_path / "d.jsonl"), skip_bad=True)) <= 2


def test_an_edited_picture_or_checkpoint_is_asked_again(checkpoints, tmp_path):
    """Responses about the picture that was there before, or of a teacher with another dtype or template."""
    noise_image(32, 32).save(tmp_path / "i.png")
    data, out = tmp_path / "d.jsonl", str(tmp_path / "c.jsonl")
    data.write_text('{"id": "a", "question": "?", "answer": "2", "image": "i.png"}\n')
    shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "big")

    def fill(dtype="float32"):
        teacher = make_teacher(str(tmp_path / "big"), "cpu", dtype)
        return fill_collection(out, [teacher], load_examples(str(data)), 1, Sampling(max_new_tokens=2))
    assert fill() and fill() and len(open(out).readlines()) == 1
    with pytest.raises(UserError, match="c.jsonl:1: big was another checkpoint"):
        fill("bfloat16")
    template = tmp_path / "big" / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("assistant", "model"))
    with pytest.raises(UserError, match="c.jsonl:1: big was another checkpoint"):
        fill()
    template.write_text(text)
    assert fill()
    noise_image(32, 32, 1).save(tmp_path / "i.png")
    with pytest.raises(UserError, match="c.jsonl:1: a response to another question"):
        fill()


def test_equal_responses_to_one_call_are_said(capsys, monkeypatch):
    """A server that does not heed n or temperature: G teachers' responses that are one."""
    monkeypatch.setattr("teachers.chat", lambda endpoint, messages, num, *_: [("Yes.", True)] * num)
    teacher, example = make_teacher("m@http://nowhere/v1"), Example("a", (), "?", "2")
    for sampling, said in ((Sampling(), True), (Sampling(temperature=0), False)):
        assert len(list(teacher.ask([(example, 0)], 8, sampling, 0))) == 1
        assert ("all responses are equal" in capsys.readouterr().out) == said


def test_a_reply_without_text_is_asked_for_again(tmp_path, monkeypatch, capsys):
    """Empty rows that count as responses: the run succeeds, and no later run asks again."""
    replies = {"a": [("Yes.", True), ("", False)], "b": [("", False)]}
    monkeypatch.setattr("teachers.check_endpoint", lambda endpoint: None)
    monkeypatch.setattr("teachers.chat_turns", lambda question, *_: question)
    monkeypatch.setattr("teachers.messages_of", lambda turns, images: turns)
    monkeypatch.setattr("teachers.chat", lambda endpoint, name, num, *_: replies[name][:num])
    teacher = make_teacher("m@http://nowhere/v1")
    examples = [Example("a", (), "a", "?"), Example("b", (), "b", "?")]
    path = tmp_path / "c"
    fill_collection(str(path), [teacher], examples, 2, Sampling())
    said = capsys.readouterr().out
    assert "calls failed; the last: the replies hold no text" in said
    assert "1 questions still lack responses" in said
    assert [json.loads(line)["id"] for line in open(path)] == ["a", "a"]
    replies["b"] = [("No.", True)] * 2
    fill_collection(str(path), [teacher], examples, 2, Sampling())
    assert [json.loads(line)["text"] for line in open(path)] == ["Yes.", "Yes.", "No.", "No."]
    replies["b"] = [("", False)]
    with pytest.raises(UserError, match="the replies hold no text"):
        fill_collection(str(tmp_path / "d"), [teacher], examples[1:], 2, Sampling())


# -------------------------------------------------------------------------------- choosing examples


def test_select_draws_hard_answers_more_often_and_drops_long_ones(tmp_path, qwen, monkeypatch, capsys):
    """The weights the wrong way round; sampling with replacement; another choice on the second call."""
    examples = [Example(str(i), (), "How many?", "yes" if i < 150 else "no") for i in range(300)]
    examples.append(Example("long", (), "How many?", "There are 3 red circles. " * 20))
    logps = {}                                     # of a token, by the first token of the text
    for text, chance in (("yes", 0.9), ("no", 0.4)):
        logps[encode_responses(qwen, [[text]]).ids[0, 0, 0].item()] = math.log(chance)

    def score(vlm, prompts, outputs):
        values = torch.tensor([[[logps[i.item()]] for i in row[:, 0]] for row in outputs.ids])
        return values.expand_as(outputs.mask.float()) * outputs.mask
    monkeypatch.setattr("teachers.score", score)
    chosen = select(qwen, examples, 60, longest=10, seed=0)
    assert chosen == select(qwen, examples, 60, longest=10, seed=0)
    assert chosen != select(qwen, examples, 60, longest=10, seed=1)
    ids = [int(e.id) for e in chosen]
    assert len(set(ids)) == 60 and ids == sorted(ids)
    hard = np.mean([sum(e.truth == "no" for e in select(qwen, examples, 60, 10, seed)) for seed in range(20)])
    assert 45 < hard < 56                                          # of 60, with weights 0.6 to 0.1
    assert "1 of 301 examples dropped" in capsys.readouterr().out


def test_select_from_the_command_line_writes_what_the_reader_reads(tmp_path, checkpoints):
    data, _ = lamp_files(tmp_path, 12)
    out = tmp_path / "elsewhere" / "chosen.jsonl"
    out.parent.mkdir()
    done = call("teachers.py", "--select", 5, "--student", checkpoints["qwen2_5_vl"], "--data", data,
                "--out", out, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    chosen, everything = load_examples(str(out)), {e.id: e for e in load_examples(str(data))}
    assert len(chosen) == 5
    assert all(everything[e.id].truth == e.truth and open_image(e.images[0], "").size for e in chosen)


def test_overlong_responses_are_left_out_and_counted(tmp_path, qwen):
    """A teacher that says more than the student may: only the beginning could ever be rewarded."""
    examples = [Example("0", (), "q", "a")]
    path = write(tmp_path / "c.jsonl", {"id": "0", "teacher": "t", "text": "yes"},
                 {"id": "0", "teacher": "t", "text": "yes " * 50},
                 {"id": "0", "teacher": "t", "text": "no", "finished": False},
                 {"id": "1", "teacher": "t", "text": "yes " * 50})
    collection = Collection(path, examples + [Example("1", (), "q", "a")], frozenset(), qwen.tokenizer, 20)
    assert [e.id for e in collection.examples] == ["0"]            # the other is left out
    assert collection.responses["0"]["t"] == ["yes"]
    assert (collection.overlong, collection.unfinished) == (2, 1)


def test_a_complete_last_line_without_its_end_is_kept(tmp_path):
    """A collection that another tool wrote; only what is torn may go."""
    for text, kept in ((b'{"id": 1}\n{"id": 2}', b'{"id": 1}\n{"id": 2}\n'),
                       (b'{"id": 1}\n{"id', b'{"id": 1}\n'),
                       (b"", b""),
                       (b'{"id": 1}', b'{"id": 1}\n'),
                       (b'{"id": 1}\n', b'{"id": 1}\n'),
                       (b'{"id": 1}\n{"id": "' + b"x" * 200_000, b'{"id": 1}\n')):
        (tmp_path / "c").write_bytes(text)
        merge_files(str(tmp_path / "c"))
        assert (tmp_path / "c").read_bytes() == kept
