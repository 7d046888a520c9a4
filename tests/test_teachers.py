"""Readers, the toy world and the collection."""
import json
import math
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import call, lamp_files, noise_image
from model import Sampling, UserError, chat_turns, encode_responses, image_tokens
from teachers import (Collection, Example, draw_scene, draw_toy_world, drop_torn_line, fill_collection,
                      load_examples, make_teacher, open_image, questions_about, select)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"id": "a", "image": "a.png", "question": "How many?", "answer": "2"}


@pytest.mark.parametrize("rows, line, says", [
    ([GOOD, "{oops"], 2, "not JSON"),
    ([GOOD, GOOD], 2, "used before"),
    ([GOOD | {"question": " "}], 1, "question"),
    ([GOOD | {"answer": 2}], 1, "answer"),
    ([GOOD, GOOD | {"id": "b", "image": "gone.png"}], 2, "does not exist"),
    ([GOOD | {"image": "empty.png"}], 1, "cannot be read"),
    ([GOOD | {"image": "text.png"}], 1, "cannot be read"),
    ([GOOD | {"image": 7}], 1, "image"),
    ([GOOD | {"options": "yes"}], 1, "options"),
    ([GOOD, "[1, 2]"], 2, "object"),
])
def test_bad_data_names_the_file_and_the_line(tmp_path, rows, line, says):
    noise_image(32, 32).save(tmp_path / "a.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    path = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(UserError, match=says) as error:
        load_examples(path)
    assert f"{path}:{line}" in str(error.value) and "\n" not in str(error.value)


def test_options_are_asked_as_lettered_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", {"question": "Which?", "answer": "B", "options": ["cat", "dog"]})
    assert load_examples(path)[0].text == "Which?\nA. cat\nB. dog"


def test_toy_splits_share_no_picture_and_come_out_the_same_again(tmp_path):
    """A held-out split that was seen in training, or a world that differs from run to run."""
    splits = {"train": (200, (1, 0, 0), ""), "heldout": (200, (1, 0, 0), ""),
              "sft": (200, (0.5, 0.3, 0.2), "shape")}
    for name in ("a", "b"):
        draw_toy_world(str(tmp_path / name), 3, splits)
    pictures = {}
    for split in splits:
        path = tmp_path / "a" / f"{split}.jsonl"
        assert path.read_text() == (tmp_path / "b" / f"{split}.jsonl").read_text()
        examples = load_examples(str(path))
        assert len(examples) == 200
        assert {e.category for e in examples} == {"count", "colour", "shape", "existence", "position"}
        pictures[split] = {open(e.images[0], "rb").read() for e in examples}
        if split == "sft":
            assert {e.truth for e in examples if e.category == "shape"} == {"I am not sure."}
    assert not (pictures["train"] & pictures["heldout"] or pictures["sft"] & pictures["heldout"])


def test_toy_answers_are_true():
    """A generator that marks a wrong answer as the truth; checked on a scene written by hand."""
    scene = {0: ("red", "circle"), 3: ("blue", "square")}
    truth = {"How many shapes are there?": "2", "How many circles are there?": "1",
             "How many red shapes are there?": "1", "How many blue shapes are there?": "1",
             "How many squares are there?": "1", "How many triangles are there?": "0",
             "Is there a red circle?": "yes", "Is there a blue square?": "yes",
             "What colour is the circle?": "red", "What colour is the square?": "blue",
             "Where is the circle?": "top left", "Where is the square?": "bottom right",
             "What shape is red?": "circle", "What shape is blue?": "square"}
    asked = {q: a for seed in range(200) for _, q, a in questions_about(scene, random.Random(seed))}
    assert truth.items() <= asked.items()
    assert {a for q, a in asked.items() if q not in truth} == {"0", "no"}
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


def test_a_question_without_responses_is_named(tmp_path):
    with pytest.raises(UserError, match="'b'"):
        Collection(write(tmp_path / "c.jsonl", {"id": "a", "teacher": "T", "text": "x"},
                         {"id": "c", "teacher": "T", "text": "x"}),
                   [Example("a", (), "q", "a"), Example("b", (), "q", "a", where="d.jsonl:2")])


def test_a_collection_that_spells_an_image_token_is_refused(tmp_path, qwen):
    path = write(tmp_path / "c.jsonl", {"id": "a", "text": "fine"},
                 {"id": "a", "text": "a <|image_pad|> here"})
    with pytest.raises(UserError, match="c.jsonl:2.*image_pad"):
        Collection(path, [Example("a", (), "q", "a")], image_tokens(qwen.processor))


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


# -------------------------------------------------------------------------------- a teacher of one's own


PROGRAM = "import sys; print(sys.argv[1].upper(), sys.argv[2]); sys.exit(sys.argv[2] == '7')"


class Program:
    """A teacher that is a program. It is given a question and a seed, and prints a response."""
    name = "program"

    def check(self):
        if subprocess.run([sys.executable, "--version"], capture_output=True).returncode:
            raise UserError("the program does not run")

    def ask(self, todo, num, sampling, seed):
        for example, have in todo:
            for number in range(have, num):
                command = [sys.executable, "-c", PROGRAM, example.text, str(seed + number)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    yield example, [(done.stdout.strip(), True)]


def test_a_program_is_a_teacher_in_ten_lines(tmp_path, capsys):
    """An interface that only servers and checkpoints fit; failures that are not counted or never mended."""
    examples = [Example("a", (), "What?", "1"), Example("b", (), "Who?", "2")]
    path = tmp_path / "c.jsonl"
    fill_collection(str(path), [Program()], examples, 1, Sampling(), seed=5)
    fill_collection(str(path), [Program()], examples, 3, Sampling(), seed=5)
    texts = [(row["id"], row["text"]) for row in map(json.loads, open(path))]
    assert texts == [("a", "WHAT? 5"), ("a", "WHAT? 6"), ("b", "WHO? 5"), ("b", "WHO? 6")]
    assert "program: 2 questions still lack responses" in capsys.readouterr().out
    assert Collection(str(path), examples).responses["b"]["program"] == ["WHO? 5", "WHO? 6"]


def test_all_teachers_are_checked_before_the_first_is_asked(tmp_path):
    """Hours of one teacher, and then the sentence that the other was never there."""
    class Never(Program):
        name = "never"

        def check(self):
            raise UserError("there is no such program")
    examples = [Example("a", (), "What?", "1")]
    path = tmp_path / "c.jsonl"
    with pytest.raises(UserError, match="no such program"):
        fill_collection(str(path), [Program(), Never()], examples, 1, Sampling())
    assert not path.exists()
    with pytest.raises(UserError, match="gone: not an image-text-to-text checkpoint"):
        fill_collection(str(path), [Program(), make_teacher(str(tmp_path / "gone"))], examples, 1, Sampling())
    with pytest.raises(UserError, match="rename a folder"):
        fill_collection(str(path), [Program(), Program()], examples, 1, Sampling())
    assert not path.exists()
    fill_collection(str(path), [Program()], examples, 1, Sampling())
    gone = Never()
    gone.name = Program.name
    fill_collection(str(path), [gone], examples, 1, Sampling())    # a full collection needs no teachers


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
    red = [{"type": "text", "text": "Is "}, {"type": "image", "image": "a.png"},
           {"type": "text", "text": " red?"}]
    this = [{"type": "image_url", "image_url": {"url": "b.png"}}, {"type": "text", "text": "And this?"}]
    rows = [{"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": red},
                          {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
                          {"role": "user", "content": this},
                          {"role": "assistant", "content": "Yes."}]},
            {"messages": [{"role": "user", "content": "<image> or <image>?"},
                          {"role": "assistant", "content": "The first."}],
             "images": ["a.png", "b.png"]}]
    first, second, third = load_examples(write(tmp_path / "chat.jsonl", *rows))
    assert first.question == "Be brief.\nIs <image> red?" and second.question == "<image>And this?"
    assert [Path(x).name for x in first.images] == ["a.png"]
    assert [Path(x).name for x in second.images] == ["a.png", "b.png"]
    turns = chat_turns(second.question, 2, second.history)
    kinds = [part["type"] for turn in turns for part in turn["content"]]
    assert kinds == ["text", "image", "text", "text", "image", "text"]
    assert third.truth == "The first." and len(third.images) == 2


@pytest.mark.parametrize("row, says", [
    ({"id": 1, "prompt": "?"}, "no known format"),
    ({"conversations": [{"from": "gpt", "value": "Hello"}]}, "in turn"),
    ({"image": "a.png", "conversations": [
        {"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]}, "marks 2"),
    ({"messages": [{"role": "user", "content": "?"}]}, "no question with an answer"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "no known form"),
    ({"messages": ["hello"]}, "no known form"),
    ({"question": "?", "answer": "!", "history": [1]}, "no known form"),
    ({"question": "?", "answer": "!", "history": [["\ud83d", "half an emoji"]]}, "non-empty string"),
    ({"question": "<image> or not?", "answer": "yes"}, "marks 1"),
])
def test_rows_in_no_known_form_are_named(tmp_path, row, says):
    noise_image(32, 32).save(tmp_path / "a.png")
    path = write(tmp_path / "data.jsonl", row)
    with pytest.raises(UserError, match=says) as error:
        load_examples(path)
    assert str(error.value).startswith(f"{path}:1")


def test_a_choice_without_a_truth_is_refused(tmp_path):
    """The empty truth of a test split, read as the letter of an option that does not exist."""
    noise_image(8, 8).save(tmp_path / "a.png")
    header = "index\timage_path\tquestion\tA\tB\tquestion_type\tanswer\n"
    for truth, letter in (("dog", "B"), ("A", "A")):
        (tmp_path / "d.tsv").write_text(f"{header}1\ta.png\tWhich?\tcat\tdog\tmulti_choice\t{truth}\n")
        assert load_examples(str(tmp_path / "d.tsv"))[0].truth == letter
    (tmp_path / "d.tsv").write_text(f"{header}1\ta.png\tWhich?\tcat\tdog\tmulti_choice\t\n")
    with pytest.raises(UserError, match="a test split"):
        load_examples(str(tmp_path / "d.tsv"))


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


def test_a_teacher_may_not_be_called_student(tmp_path):
    """Its responses would be taken for the student's: D would learn nothing, or the wrong thing."""
    examples = [Example("0", (), "q", "a")]
    with pytest.raises(UserError, match="student"):
        fill_collection(str(tmp_path / "c"), [make_teacher("runs/big/student")], examples, 1, Sampling())
    with pytest.raises(UserError, match="c2:1"):
        Collection(write(tmp_path / "c2", {"id": "0", "teacher": "student", "text": "a"}), examples)


def test_a_complete_last_line_without_its_end_is_kept(tmp_path):
    """A collection that another tool wrote; only what is torn may go."""
    for text, kept in ((b'{"id": 1}\n{"id": 2}', b'{"id": 1}\n{"id": 2}\n'),
                       (b'{"id": 1}\n{"id', b'{"id": 1}\n'),
                       (b"", b""),
                       (b'{"id": 1}', b'{"id": 1}\n'),
                       (b'{"id": 1}\n', b'{"id": 1}\n'),
                       (b'{"id": 1}\n{"id": "' + b"x" * 200_000, b'{"id": 1}\n')):
        (tmp_path / "c").write_bytes(text)
        drop_torn_line(str(tmp_path / "c"))
        assert (tmp_path / "c").read_bytes() == kept
