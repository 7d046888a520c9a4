"""The rule judge against strings made to fool it; thoughts, curves and the report."""
import copy
import doctest
import json
import re
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

import eval
from conftest import call, noise_image
from eval import (draw_curves, greedy_sampling, most_changed, opened_thought, parse_verdict, rule_check,
                  rule_judge, rule_verdict, stream_texts, task_of, without_thoughts, write_report)
from model import UserError, encode
from teachers import Example, load_examples

COLOUR = "What colour is the circle?"
COUNT = "How many circles are there?"
YES = "Is there a red circle?"
WHERE = "Where is it?"
BESIDE = "What colour is the circle beside the blue square?"
WHAT = "What dog is it?"
LIGHT = "Is the light red or green?"
STATE = "Which state?\nOptions: (A) Ohio (B) New Mexico"


def test_the_examples_of_the_rule_judge_are_right():
    """A docstring that shows another verdict than the function gives."""
    assert doctest.testmod(eval).attempted >= 5 and doctest.testmod(eval).failed == 0


@pytest.mark.parametrize("question, truth, right, wrong", [
    (COLOUR, "red", ["red", "Red.", "The circle is red.", "The answer is red.", "The answer is: red",
                     "Answer: red", "red is the answer:", "<answer>red</answer>", r"Blue? \boxed{red}", "ｒｅｄ",
                     "The circle in the picture is red.", "It's red, as the light is red.", "I'd say red."],
     ["I cannot tell if it is red.", "It is hardly red.", "anything but red", "It might be red.", "Red?",
      "I doubt that the answer is red.", "Nobody says red.", "red/blue", "far from red", "either red",
      "It is not blue, it is red.", "red, or maybe blue", "green, right must be.", "red, that would say.",
      "not red", "It isn't red.", "red or blue or green", "red blue green", "I see red and blue.",
      "The square is red. The answer is blue.", "A red square is there, so it is blue",
      "The answer is red or blue.", "It was hired.", "I am not sure.", "", r"red \boxed{blue}"]),
    (BESIDE, "red", ["The circle beside the blue square is red."], ["red or blue"]),
    (LIGHT, "red", ["It is red.", "Red, I think."], ["It is red or green.", "red green", "not green, red"]),
    (COUNT, "2", ["2", "There are two circles.", "2.0"], ["12", "-2", "2 or 3", "1 2 3 4", "two hundred"]),
    (COUNT, "12", ["12"], ["1", "2"]),
    (COUNT, "0", ["none", "zero"], ["10"]),
    (COUNT, "1000", ["1,000", "1000"], ["1,0000", "1", "1,000 or 2,000", "1,000,000"]),
    (COUNT, "21", ["twenty-one", "twenty one circles"], ["twenty", "one", "21st", "21%", "at least 21"]),
    (COUNT, "3", ["There are 3 circles.", "3 of them", "I count three.", "x = 3"],
     ["I can't determine whether there are 3 circles.", "up to 3", "3k", "3%", "3rd", "3e3", "3+", "~3",
      "3-4", "3/4", "3 million", "minus 3", "more than 3", "about 3", "3udeneac# would be.",
      ">= 3", "!= 3", "at least = 3", "3, as well as 4", "3*3", "3:3", "3,#.",
      "3,louhe, right."]),
    (COUNT, "52", ["52"], ["5²"]),
    (COUNT, "4", ["4"], ["minus 4", "- 4", "x = - 4", r"\boxed{- 4}"]),
    (COUNT, "-4", ["minus 4", "- 4", "x = - 4", r"\boxed{- 4}", "negative four"], ["4"]),
    (COUNT, "25", ["25."], [".25"]),
    (COUNT, "0.25", [".25"], ["25"]),
    (COUNT, "0", ["There are no circles."], ["I have no idea.", "There is no answer."]),
    (COUNT, "twenty", ["20", "Twenty."], ["2", "twenty-two", "twenty or thirty"]),
    (COUNT, "-5", ["-5", "−5", "It is –5."], ["5"]),
    (YES, "yes", ["Yes, there is a red circle.", "Yes. A small one.", "I think yes."],
     ["yes and no", "yesterday", "I cannot say yes.", "Yes? No.", "yes/no"]),
    (YES, "no", ["No, there is no red circle.", "There is no red circle."],
     ["There is not.", "I have no idea.", "There's no way to tell.", "No idea.", "No answer.",
      '"No" would be wrong.']),
    (STATE, "B", ["B", "New Mexico", "(B) New Mexico", "It is New Mexico.", "The answer is option B", "(b)",
                  "b) New Mexico", "Answer: b"],
     ["Ohio", "A or B", "Ohio or New Mexico", "I cannot tell if it is B.", "anything but B", "B, A"]),
    ("Q?\nA. 21\nB. 20\nC. 21", "C", ["C", "A", "21", "A. 21"], ["B", "20", "A or B"]),
    ("Which part is marked (A)?\nA. stem\nB. leaf", "B", ["leaf", "The part marked is the leaf."], ["A"]),
    ("Which?\nA. vitamin A\nB. vitamin B", "B", ["B. vitamin B", "vitamin B"], ["vitamin A"]),
    (WHERE, "top left", ["At the top left."], ["top"]),
    (WHERE, "left", [], ["top left"]),
    (WHERE, "centre", ["In the center."], []),
    ("Shape?", "circle", ["There are circles."], []),
])
def test_the_rule_judge(question, truth, right, wrong):
    """Right by containment, by listing every value, by a clause on something else, or by negation."""
    assert [text for text in right if not rule_verdict(question, truth, text)] == []
    assert [text for text in wrong if rule_verdict(question, truth, text)] == []
    assert rule_judge([(question, truth, "?"), (COUNT, "2", "two")]) == [0, 1]


@pytest.mark.parametrize("truth, right, wrong", [
    ("Beagle", ["Beagle", "a beagle.", "It is a Beagle.", "It's probably a beagle", "Beagle, I think.",
                "The dog in the picture is a Beagle.", "I think that it is a Beagle.", "Sure! A beagle.",
                "The answer is Beagle.", "Beagle is the answer.", "Beagles.", "**Beagle**",
                "I see a beagle."],
     ["Beagle, Pug, Boxer", "Beagle Pug Boxer", "1. Beagle\n2. Pug\n3. Boxer", "Is it a Beagle? No, a Pug.",
      "There is no sign of a Beagle", "It is not a Beagle.", "A Beagle or a Pug", "a pug", "beagleish",
      "I doubt it is a Beagle", "It is a Pug, not a Beagle", "Is it a Beagle"]),
    ("a grey cat", ["It is a grey cat.", "gray cat"], ["cat", "a grey cat or a dog"]),
    ("cat", ["cats"], ["concatenate", "a cat or a dog"]),
    ("t-shirt", ["A t-shirt.", "a t shirt"], ["a shirt"]),
    ("on the table", ["It is on the table.", "On the table."], ["under the table"]),
])
def test_a_phrase_is_the_whole_answer(truth, right, wrong):
    """A list of all breeds, a question or a denial that mentions the truth: a policy soon finds them."""
    assert [text for text in right if not rule_verdict(WHAT, truth, text)] == []
    assert [text for text in wrong if rule_verdict(WHAT, truth, text)] == []


@pytest.mark.parametrize("question, truth, right, wrong", [
    ("?", "A", ["(A)", "A", "# A", "The option is A"],
     ["The answer is B, a blue ball.", "A blue ball.", "A+", "The grade is A-."]),
    ("?", "(A)", ["A."], ["B"]),
    ("?", "B", ["B. It is blue or bluish.", "b", r"\boxed{B}"], ["A or B"]),
    ("?", "Ｂ", ["选B"], []),
    ("?", "I", ["I"], ["I don't know"]),
    ("Which letter?", "Q", ["It says Q."], []),
    ("Which?\nA. red\nB. blue", "A", ["It is red."], ["It is blue."]),
    ("Which?\nA. red\nB. blue", "blue", ["B", "It is blue."], ["A", "A. red", "A or B"]),
    ("Which?\nA. red\nB. blue", "B. blue", ["The answer is B."], []),
    ("Which?\n(A) red\n(B) blue", "(B) blue", ["blue"], []),
    ("How many?\nA. 1\nB. 3", "3", ["There are three of them.", "B"], ["A"]),
    ("Price?\nA. $5\nB. $7", "$7", ["B", "$7"], ["A", "$5"]),
    ("Language?\nA. C\nB. C++", "C++", ["B"], ["A"]),
    ("哪个？\nA. 红色\nB. 蓝色", "蓝色", ["B", "选B", "蓝色", "答案是B"], ["A", "红色"]),
])
def test_the_rule_judge_reads_letters(question, truth, right, wrong):
    """An article taken for the letter A, or a letter refused because of words beside it."""
    assert [text for text in right if not rule_verdict(question, truth, text)] == []
    assert [text for text in wrong if rule_verdict(question, truth, text)] == []


REFUSED = ["C++", "$7", "50%", "€1,000", "3/4", "10:30", "?", "K>0", r"\frac{63}{400}", "$6$", "红色", "三个",
           "赤", "빨간색", "Ελλάδα", "red, blue", "cat<AND>dog", "There is a man on the left of it", "AT&T",
           "AC", "A, C", "A C", "B and D"]


@pytest.mark.parametrize("truth", REFUSED)
def test_a_truth_that_a_rule_cannot_judge_is_refused(truth):
    """A judge that is silently wrong about signs, scripts, LaTeX and sentences; an option's text is fine."""
    with pytest.raises(UserError, match="f.jsonl:3: a rule cannot judge the answer .* give --judge MODEL"):
        rule_check(Example("0", (), "?", truth, where="f.jsonl:3"))
    if not re.fullmatch("[A-D ,and]+", truth):
        rule_check(Example("0", (), "?", truth, ("x", truth)))     # the text of an option


@pytest.mark.parametrize("question, truth", [
    ("Grade?\nA. B\nB. A", "A"), ("Options: a) Ohio b) Utah", "b"), ("Q?\nA. x\nB. y\nC. z", "ABC"),
    ("图里有几只猫？", "4")])
def test_a_question_that_a_rule_cannot_judge_is_refused(question, truth):
    """Options that read as letters of one another, or that cannot be found; characters that are not words."""
    with pytest.raises(UserError, match="a rule cannot judge the answer"):
        rule_check(Example("0", (), question, truth))


@pytest.mark.parametrize("question, truths, responses", [
    ("Is he sitting or standing?", ["sitting", "standing"], ["sitting standing", "sitting. He is standing."]),
    ("Is the cat in or on the box?", ["in", "on"], ["in on", "in, on"]),
    ("Is it a dog or a cat?", ["dog", "cat", "dogs", "cats"], ["dog cat", "dogs cats"]),
    ("Is the ball red or blue?", ["red ball", "blue ball"], ["red ball blue ball"]),
    ("On the wall or the table?", ["on wall", "on table"], ["on wall, on table"]),
    ("Where?\nA. in the box\nB. on the box", ["A", "B"], ["in the box on the box"]),
    ("Which?\nA. cat\nB. cats", ["A", "B"], ["cats"]),
    ("Who?\nA. man\nB. man in red", ["A", "B"], ["man in red"]),
    ("Is it?\nA. Yes\nB. No", ["A", "B"], ["Yes. No.", "yes it is no", "B. Yes"]),
    ("Which?\nA. Vitamin C\nB. Vitamin D\nC. Vitamin E", ["A", "C"], ["Vitamin C"]),
    ("Which?\nA. 7\nB. 5", ["A", "B"], ["A. x = 5"]),
    ("Which?\nA. red\nB. blue", ["A", "B"], ["B. red", "B, D"]),
    ("What number?", ["12345678901234567", "12345678901234568"], ["12345678901234567"])])
def test_no_response_is_paid_for_two_truths(question, truths, responses):
    """One string that is right whatever the truth is: the first thing that a policy finds."""
    for response in responses:
        assert sum(rule_verdict(question, truth, response) for truth in truths) <= 1, response


def test_no_response_keeps_the_judge_busy():
    """A policy's 100,000 characters that make a pattern try all ways: seconds for each verdict."""
    start = time.monotonic()
    for text in ("red ", "it is ", "1,", "- ", ". ", "the answer is ", "(A) ", "**", "so, ", "'", "minus ",
                 "=", "\n", "!", "a=", "b) ", "the red ", "**a**\n"):
        rule_verdict("Which?\nA. red\nB. blue", "B", 10 ** 5 // len(text) * text)
        rule_verdict(10 ** 5 // len(text) * text, "3", "3 of them")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("truth", ["12", "-5", "1,000", "2.5", "Yes", "no.", "B", "(b)", "red", "Grey cat",
                                   "on the left", "t-shirt", "dog's bowl", "café", "top left", "3.5 cm"])
def test_a_truth_that_a_rule_can_judge(truth):
    rule_check(Example("0", (), "?", truth))
    assert rule_verdict("?", truth, truth) == 1


def test_truths_are_checked_before_any_work(checkpoints, tmp_path):
    """Zeros for a whole run. A metric of its own needs no judge, so there every truth is fine."""
    def data(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps({"question": "?"} | row) + "\n" for row in rows))
        return tmp_path / name
    mine = data("mine.jsonl", {"id": "0", "answer": "2"}, {"id": "1", "answer": "$7"})
    options = ["--model", checkpoints["qwen2_5_vl"], "--data", mine, "--max-new-tokens", 2]
    done = call("eval.py", *options, "--out", tmp_path / "out")
    assert done.returncode == 2 and "mine.jsonl:2: a rule cannot judge" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert call("eval.py", *options, "--skip-bad", "--out", tmp_path / "out").returncode == 0
    [score] = json.loads((tmp_path / "out" / "scores.json").read_text())["qwen2_5_vl"]
    assert [row["id"] for row in score["rows"]] == ["0"]
    assert len(load_examples(str(mine), checks=[rule_check], skip_bad=True)) == 1
    answers = data("vqa.jsonl", {"id": "0", "answers": ["$7"] * 4})
    assert task_of(str(answers), checks=[rule_check]).metric == "vqa"


@pytest.mark.parametrize("response, rest", [
    ("<think>A or B?</think>B", "B"), ("<think>red", ""), ("I see.\n<think>red", "I see."), ("red", "red"),
    ("<THINK>\n1\n</THINK>\n\n2", "2"), ("<think>1</think>x <think>2</think>y", "x y"),
    ("red</think>blue", "blue"),
    ("I think it is red", "I think it is red"),
    ("<thinking>A?\n</thinking>\nB", "B"), ("◁think▷The answer is C.◁/think▷B", "B"), ("◁think▷So B", ""),
    ("The answer is A.</thinking>B", "B"), ("<Thinking>\\boxed{A}", ""),
    ("[THINK]A?[/THINK]B", "B"), ("<thought>A", ""), ("<reason>A</reason>B", "B"), ("A</reasoning>B", "B"),
    ("<seed:think>A</seed:think>B", "B"), ("<mm:think>A</mm:think>B", "B"),
    ("<|channel>thought\nA<channel|>B", "B"),
    ("<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B", "B"),
])
def test_thoughts_are_no_part_of_a_response(response, rest):
    """A verdict on what a model only considered."""
    assert without_thoughts(response) == rest


@pytest.mark.parametrize("end, opened", [
    ("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", ""), ("", ""), ("◁think▷", "◁think▷"),
    ("Say <think> first.\n", "")])
def test_a_thought_that_the_template_opened_hides_what_never_left_it(end, opened, qwen):
    """A letter out of a thought that was cut off, because its first mark stands in the prompt."""
    tokenizer = copy.deepcopy(qwen.tokenizer)
    end = end.replace("\n", "{{ '\\n' }}")
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }}{% endfor %}"
                               f"{{% if add_generation_prompt %}}{end}{{% endif %}}")
    assert opened_thought(tokenizer) == opened
    assert opened_thought(qwen.processor) == ""
    vlm = replace(qwen, processor=tokenizer)
    rest = [encode(vlm, "How many?", [])], [torch.zeros(1, 2)], greedy_sampling(2), 1
    [(_, text, finished)] = stream_texts(vlm, *rest)
    assert text.startswith(opened) and not finished
    [(_, _, finished)] = stream_texts(replace(vlm, stop_ids=list(range(len(tokenizer)))), *rest)
    assert finished
    assert (without_thoughts(text) == "") == bool(opened)
    assert rule_verdict(COUNT, "2", opened + "It is 2") == int(not opened)


@pytest.mark.parametrize("truth, text", [
    ("12", r"We have 3 rows of 4. \boxed{12}"), ("12", "3 x 4 = 12"),
    ("12", "The answer is 12, as 3 x 4 = 12"),
    ("12", "<answer>12</answer> since 3 rows of 4"), ("12", "There are 3 rows of 4.\n\n**12**"),
    ("12", "3 rows.\n4 in each.\n**Answer: 12**"), ("12", "It is 12 because there are 3 rows of 4."),
    ("12", r"\(\boxed{12\text{ apples}}\)"), ("12", "<|begin_of_box|>12<|end_of_box|>, from 3 rows of 4"),
    ("red", "It is red, since the blue one is a square."), ("7", "2 + 5 = 7 apples"),
    ("beagle", "The ears are long.\n**Beagle**"), ("beagle", "I'd go with a Beagle because of its ears."),
])
def test_a_right_answer_after_a_calculation_or_before_its_reason(truth, text):
    """Numbers of the way there, counted as if they were answers too."""
    assert rule_verdict("How many apples?", truth, text) == 1
    assert rule_verdict("How many apples?", "5" if truth != "5" else "6", text) == 0


@pytest.mark.parametrize("reply, graded, verdict", [
    ("Yes. <answer>1.0</answer>", False, 1), ("<Answer>1</Answer>", False, 1),
    ("<ANSWER>0.0</ANSWER>.", False, 0),
    ("<answer>1</answer><|im_end|>", False, 1), ("<answer>0</answer>\n</s>", False, 0),
    ("<answer>0.25</answer><end_of_turn>\n", True, 0.25), ("<answer>0.5</answer>", False, None),
    ("<answer>1</answer> <answer>", False, None), ("<Answer>1</Answer> No: <answer>0</answer>", False, None),
    ("<answer>1</answer><b>not really</b>", False, None), ("<answer>1.5</answer>", True, None)])
def test_verdicts_in_other_spellings(reply, graded, verdict):
    """A judge that says 1.0, or whose stop token was decoded, without a verdict in a whole run."""
    assert parse_verdict(reply, graded) == verdict


def test_the_report_cannot_run_what_a_model_wrote(tmp_path):
    """Model text, questions and truths can hold any HTML, in rollouts as in scores; no request is made."""
    noise_image(8, 8).save(tmp_path / "i.png")
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    row = {"id": evil, "image": [str(tmp_path / "i.png")], "question": evil, "truth": evil, "text": evil}
    rollout = row | {"step": 0, "source": evil, "p_student": 0.5, "rewards": {evil: None}, "reward": 1.0,
                     "advantage": 0.5}

    def score(value):
        return {"task": evil, "metric": "mcq", "questions": 2, "extracted": 1.0, "failed": 0, "score": value,
                "interval": [0, 100], "by": {evil: 1.0}, "units": {"a": [value, 1], "b": [1.0, 1]},
                "rows": [row | {"text": "same", "verdict": 1.0}, row | {"text": "changed", "verdict": value}]}
    draw_curves([], [], str(tmp_path / "curves.png"))
    write_report(tmp_path, {"data": evil}, {"base": [score(0.0)], "new" + evil: [score(1.0)]}, [rollout])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") >= 12
    assert "http://" not in page and "https://" not in page and page.count("<img") == 1 + 3
    assert page.index("changed") < page.index("same")              # what differs comes first


def test_the_report_has_a_column_for_each_reward_term(tmp_path):
    """A report that knows two terms, or shows a judge that could not tell as a 0."""
    common = {"step": 4, "id": "a", "image": [], "question": "?", "truth": "2", "reward": -2.5}
    rows = [common | {"source": "student", "text": "two", "p_student": 0.25, "advantage": -0.5,
                      "rewards": {"similarity": 1.0, "answer": 1.0, "length": -3.5}},
            common | {"source": "qwen", "text": "2!", "p_student": None, "advantage": 0.5,
                      "rewards": {"similarity": 1.0, "answer": None, "length": -3.5}}]
    write_report(tmp_path, {}, {}, rows)
    page = (tmp_path / "report.html").read_text()
    table = re.findall(r"<tr.*?</tr>", page)
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in table]
    assert cells == [
        ["source", "response", "p student", "similarity", "answer", "length", "reward", "advantage"],
        ["student", "two", "0.25", "1.00", "1.00", "-3.50", "-2.50", "-0.50"],
        ["qwen", "2!", "?", "1.00", "?", "-3.50", "-2.50", "0.50"]]
    assert 'class="down"' in table[1] and 'class="up"' in table[2] and "step 5" in page


BLUE, GREEN, PURPLE, ORANGE = (40, 110, 200), (30, 140, 80), (140, 70, 160), (200, 80, 40)


def rows_with(metrics, path, colour, panel, panels):
    """The y of all pixels of a colour in one of the panels of the curves of metrics, which were on disk."""
    draw_curves(json.loads(json.dumps(metrics)), [], str(path))
    image = Image.open(path)
    assert image.width == 560 * panels
    image = image.crop((panel * 560, 0, (panel + 1) * 560, image.height))
    return [y for y in range(image.height) for x in range(image.width) if image.getpixel((x, y)) == colour]


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    """A curve upside down or off its panel: similarity 1 must colour the top line and nothing lower."""
    row = {"reward/similarity/student": 1.0, "reward/answer/student": 0.0, "reward/answer/qwen": 0.5,
           "heldout_accuracy": 0.5}
    metrics = [{"step": i} | row for i in range(20)]
    top, bottom, middle = (rows_with(metrics, tmp_path / "c.png", colour, i, 3)
                           for i, colour in enumerate((BLUE, GREEN, ORANGE)))
    assert max(top) < min(middle) < max(middle) < min(bottom)
    assert abs((max(top) + min(bottom)) / 2 - (min(middle) + max(middle)) / 2) < 4


def test_a_question_that_became_right_is_shown_over_the_run(tmp_path):
    """A picture of a question that was right all along; a verdict that failed, drawn as wrong."""
    noise_image(1, 400).save(tmp_path / "i.png")                    # and one that is a line when scaled
    greedy = [{"id": name, "step": step, "verdict": verdict, "text": "two", "p_student": 0.5, "truth": "2",
               "question": "How many?", "image": [str(tmp_path / "i.png")]}
              for step, verdicts in ((0, (1.0, 0.0, 0.0)), (24, (1.0, None, 0.0)), (49, (1.0, 1.0, 1.0)))
              for name, verdict in zip("abc", verdicts)]
    assert [(row["id"], row["step"]) for row in most_changed(greedy)] == [("b", 0), ("b", 24), ("b", 49)]
    assert most_changed(greedy[:3])[0]["id"] == "a" and most_changed([]) == []
    draw_curves([], greedy, str(tmp_path / "curves.png"))
    image = Image.open(tmp_path / "curves.png").crop((560, 0, 1120, 380))
    rows = [image.crop((490, y, 540, y + 20)).getcolors() for y in (186, 214, 242)]
    has = [{colour for _, colour in colours} for colours in rows]
    assert ORANGE in has[0] and has[1] == {(255, 255, 255)} and GREEN in has[2]


def test_curves_of_any_reward(tmp_path):
    """Curves that know two terms, leave the panel outside of [0, 1], or stop at a null."""
    metrics = [{"step": i, "reward/similarity/student": 0.5, "reward/answer/student": None if i % 3 else 1.0,
                "reward/length/student": (-7.0, 3.0)[i % 2], "reward/length/qwen": 99.0} for i in range(20)]
    metrics[5]["reward/answer/student"] = float("nan")             # a step in which the judge was down
    pale = tuple((channel + 2 * 255) // 3 for channel in PURPLE)
    half, one, jumps, nothing = (rows_with(metrics, tmp_path / "c.png", colour, i, 4)     # none for a teacher
                                 for i, colour in enumerate((BLUE, GREEN, pale, ORANGE)))
    assert max(one) < min(half) and nothing == []                  # nothing was held out
    assert min(jumps) == pytest.approx(46, abs=2) and max(jumps) == pytest.approx(330, abs=2)      # -7 to 3
