"""The rule judge against strings made to fool it, the interval, the report."""
import json
import math

import pytest

from eval import bootstrap_interval, draw_curves, rule_judge, write_report
from conftest import noise_image

COLOUR, COUNT, YES, WHERE = "What colour is the circle?", "How many circles are there?", "Is there a red circle?", "Where is it?"


@pytest.mark.parametrize("question, truth, response, verdict", [
    (COLOUR, "red", "red", 1),
    (COLOUR, "red", "Red.", 1),
    (COLOUR, "red", "The circle is red.", 1),
    (COLOUR, "red", "The answer is red.", 1),
    (COLOUR, "red", "The answer is: red", 1),
    (COLOUR, "red", "Answer: red", 1),
    (COLOUR, "red", "It is not blue, it is red.", 1),
    (COLOUR, "red", "red, not blue", 1),
    (COLOUR, "red", "It is red rather than blue.", 1),
    (COLOUR, "red", "not red", 0),
    (COLOUR, "red", "It isn't red.", 0),
    (COLOUR, "red", "red or blue or green", 0),
    (COLOUR, "red", "red blue green", 0),
    (COLOUR, "red", "I see red and blue.", 0),
    (COLOUR, "red", "The square is red. The answer is blue.", 0),
    (COLOUR, "red", "A red square is there, so it is blue", 0),
    (COLOUR, "red", "The answer is red or blue.", 0),
    (COLOUR, "red", "It was hired.", 0),
    (COLOUR, "red", "I am not sure.", 0),
    (COLOUR, "red", "", 0),
    ("What colour is the circle beside the blue square?", "red", "The circle beside the blue square is red.", 1),
    ("Is it red or blue?", "red", "It is red or blue.", 0),
    ("Is it red or blue?", "red", "It is red.", 1),
    (COUNT, "2", "2", 1),
    (COUNT, "2", "There are two circles.", 1),
    (COUNT, "2", "2.0", 1),
    (COUNT, "2", "12", 0),
    (COUNT, "2", "-2", 0),
    (COUNT, "2", "2 or 3", 0),
    (COUNT, "2", "1 2 3 4", 0),
    (COUNT, "12", "12", 1),
    (COUNT, "0", "none", 1),
    (YES, "yes", "Yes, there is a red circle.", 1),
    (YES, "no", "No, there is no red circle.", 1),
    (YES, "yes", "yes and no", 0),
    (YES, "yes", "yesterday", 0),
    (YES, "no", "There is not.", 0),
    (WHERE, "top left", "At the top left.", 1),
    (WHERE, "top left", "top", 0),
    (WHERE, "left", "top left", 0),
    (WHERE, "centre", "In the center.", 1),
    ("What is it?", "a grey cat", "It is a grey cat.", 1),
    ("What is it?", "cat", "concatenate", 0),
    ("What is it?", "cat", "a cat or a dog", 0),
    ("What is it?", "C++", "Surely C++!", 1),
    ("Shape?", "circle", "There are circles.", 1),
])
def test_the_rule_judge(question, truth, response, verdict):
    """Right by containment, by listing every answer, by the answer in a clause about something else, or by negation."""
    assert rule_judge(question, truth, response) == verdict


def test_bootstrap_interval_covers_as_it_should():
    """An interval of the wrong width: for 0/1 data it must be close to the normal one, p +- 1.96 sqrt(p (1 - p) / n)."""
    low, high = bootstrap_interval([1.0] * 300 + [0.0] * 200)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert low == pytest.approx(0.6 - half, abs=0.005) and high == pytest.approx(0.6 + half, abs=0.005)
    assert bootstrap_interval([1.0] * 50) == (1.0, 1.0)


def test_the_report_cannot_run_what_a_model_wrote(tmp_path):
    """Model text, questions and truths must be escaped: a response can hold any HTML."""
    noise_image(8, 8).save(tmp_path / "i.png")
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{"step": 0, "id": "a", "image": [str(tmp_path / "i.png")], "question": evil, "truth": evil, "source": evil, "text": evil,
             "p_student": 0.5, "verdict": None, "reward": 1.0, "advantage": 0.5}]
    draw_curves([], str(tmp_path / "curves.png"))
    write_report(tmp_path, {"data": evil}, {}, rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") >= 5
    assert "http://" not in page and "https://" not in page        # one file, no request to anywhere


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    """A curve upside down or off its panel: similarity 1 throughout must colour the top line and nothing lower."""
    from PIL import Image
    metrics = [{"step": i, "similarity/student": 1.0, "answer/student": 0.0, "heldout_accuracy": 0.5} for i in range(20)]
    draw_curves(json.loads(json.dumps(metrics)), str(tmp_path / "c.png"))
    image = Image.open(tmp_path / "c.png")
    width = image.width // 3

    def rows_with(colour, panel):
        return [y for y in range(image.height) if any(image.getpixel((x, y)) == colour for x in range(panel * width, (panel + 1) * width))]
    top, bottom, middle = rows_with((40, 110, 200), 0), rows_with((30, 140, 80), 1), rows_with((200, 80, 40), 2)
    assert max(top) < min(middle) < max(middle) < min(bottom)
    assert abs((max(top) + min(bottom)) / 2 - (min(middle) + max(middle)) / 2) < 4
