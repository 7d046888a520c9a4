"""Readers, the toy world and the collection."""
import json
import random

import pytest

from conftest import noise_image
from model import Sampling, UserError, image_tokens
from teachers import Collection, Example, draw_scene, draw_toy_world, fill_collection, load_examples, questions_about


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
    (["[1, 2]"], 1, "object"),
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
    splits = {"train": (200, (1, 0, 0), ""), "heldout": (200, (1, 0, 0), ""), "sft": (200, (0.5, 0.3, 0.2), "shape")}
    for name in ("a", "b"):
        draw_toy_world(str(tmp_path / name), 3, splits)
    pictures = {}
    for split in splits:
        assert (tmp_path / "a" / f"{split}.jsonl").read_text() == (tmp_path / "b" / f"{split}.jsonl").read_text()
        examples = load_examples(str(tmp_path / "a" / f"{split}.jsonl"))
        assert len(examples) == 200 and {e.category for e in examples} == {"count", "colour", "shape", "existence", "position"}
        pictures[split] = {open(e.images[0], "rb").read() for e in examples}
        if split == "sft":
            assert {e.answer for e in examples if e.category == "shape"} == {"I am not sure."}
    assert not (pictures["train"] & pictures["heldout"] or pictures["sft"] & pictures["heldout"])


def test_toy_answers_are_true():
    """A generator that marks a wrong answer as the truth; checked on a scene written by hand."""
    scene = {0: ("red", "circle"), 3: ("blue", "square")}
    truth = {"How many shapes are there?": "2", "How many circles are there?": "1", "How many red shapes are there?": "1",
             "How many blue shapes are there?": "1", "How many squares are there?": "1", "How many triangles are there?": "0",
             "Is there a red circle?": "yes", "Is there a blue square?": "yes", "What colour is the circle?": "red",
             "What colour is the square?": "blue", "Where is the circle?": "top left", "Where is the square?": "bottom right",
             "What shape is red?": "circle", "What shape is blue?": "square"}
    asked = {q: a for seed in range(200) for _, q, a in questions_about(scene, random.Random(seed))}
    assert truth.items() <= asked.items()
    assert {a for q, a in asked.items() if q not in truth} == {"0", "no"}
    assert draw_scene(scene).getpixel((8, 8)) == (225, 60, 50)     # and the picture shows it


def collection_of(tmp_path, counts):
    rows = [{"id": "a", "teacher": t, "text": f"{t}{i}"} for t, n in counts.items() for i in range(n)]
    return Collection(write(tmp_path / "c.jsonl", *rows), [Example("a", (), "q", "a")])


def test_draw_is_even_over_teachers_without_repeats_and_reproducible(tmp_path):
    """One teacher that gets all places, the same response twice while others were left, a draw that ignores its seed."""
    collection, example = collection_of(tmp_path, {"S": 3, "T": 3}), Example("a", (), "q", "a")
    for seed in range(20):
        pairs, = collection.draw([example], 4, random.Random(seed))
        assert sorted(t for t, _ in pairs) == ["S", "S", "T", "T"] and len({text for _, text in pairs}) == 4
        assert [pairs] == collection.draw([example], 4, random.Random(seed))
    odd = [collection.draw([example], 3, random.Random(seed))[0] for seed in range(60)]
    assert 15 < sum([t for t, _ in pairs].count("S") == 2 for pairs in odd) < 45
    assert len(collection.draw([example], 16, random.Random(0))[0]) == 16    # more than there are: they come again


def test_a_question_without_responses_is_named(tmp_path):
    with pytest.raises(UserError, match="'b'"):
        Collection(write(tmp_path / "c.jsonl", {"id": "a", "teacher": "T", "text": "x"},
                         {"id": "b", "teacher": "T", "text": "cut o", "finished": False}),
                   [Example("a", (), "q", "a"), Example("b", (), "q", "a", where="d.jsonl:2")])


def test_a_collection_that_spells_an_image_token_is_refused(tmp_path, qwen):
    path = write(tmp_path / "c.jsonl", {"id": "a", "text": "fine"}, {"id": "a", "text": "a <|image_pad|> here"})
    with pytest.raises(UserError, match="c.jsonl:2.*image_pad"):
        Collection(path, [Example("a", (), "q", "a")], image_tokens(qwen.processor))


def test_an_interrupted_fill_goes_on_to_the_same_file(tmp_path, checkpoints):
    """A resume that repeats, loses or reorders responses. The fill is cut in the middle of a batch."""
    examples = [Example(str(i), (), f"How many {i}?", "1") for i in range(6)]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sampling = Sampling(max_new_tokens=5)

    def fill(path):
        fill_collection(str(path), [checkpoints["qwen2_5_vl"]], examples, 3, sampling, seed=1, batch_size=2, device="cpu")
    fill(whole)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 18
    cut.write_text("".join(lines[:8]))
    fill(cut)
    assert cut.read_text() == whole.read_text()
    fill(cut)
    assert cut.read_text() == whole.read_text()                    # a full collection is left alone
    rows = [json.loads(line) for line in lines]
    assert all(row["sampling"]["max_new_tokens"] == 5 and row["teacher"] == "qwen2_5_vl" for row in rows)
