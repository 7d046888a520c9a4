"""The rule judge against strings made to fool it, the interval, the report."""
import json
import math
import re

import pytest

from PIL import Image

from eval import (bootstrap_interval, draw_curves, rule_judge, rule_verdict, value_ticks, without_thoughts,
                  write_report)
from conftest import noise_image

COLOUR = "What colour is the circle?"
COUNT = "How many circles are there?"
YES = "Is there a red circle?"
WHERE = "Where is it?"
BESIDE = "What colour is the circle beside the blue square?"


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
    (BESIDE, "red", "The circle beside the blue square is red.", 1),
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
    """Right by containment, by listing every value, by a clause on something else, or by negation."""
    assert rule_verdict(question, truth, response) == verdict
    assert rule_judge([(question, truth, response), (COUNT, "2", "two")]) == [verdict, 1]


@pytest.mark.parametrize("truth, right, wrong", [
    ("+", ["+", "The sign is +.", 'It is "+".'], ["It is a minus.", "-", "++", "The answer is -."]),
    (">", [">", "5 > 3", "5>3", "The answer is: >"], ["Smaller.", ">=", "<", "It is not >."]),
    ("?", ["?", 'The mark is "?".'], ["It is red.", 'He said "so?".', "!"]),
    (".", ["."], ["It is red.", 'It is "red".']),
    ("...", ["..."], ["It is red...", "red."]),
    ("", [], ["", "red", "."]),
    ("C++", ["C++", "It is C++, surely.", "**C++**"], ["C", "C#", "not C++", "C++ or Java", "C+"]),
    ("C", ["C", "It is C."], ["C++", "C#"]),
    ("A+", ["A+", "The grade is A+."], ["A", "A-", "A++"]),
    ("A", ["A", "A.", "# A"], ["A+", "A-", "The grade is A-."]),
    ("A-", ["A-", "The grade is A-."], ["A", "A+"]),
    ("AT&T", ["at&t"], ["ATT", "AT T"]),
    ("K>0", ["K > 0", "Then K>0."], ["K<0", "K = 0", "K 0"]),
    ("-5", ["-5", "−5", "It is –5."], ["5", "+5"]),
    ("−5", ["-5", "−5", "minus? It is -5.0"], ["5", "−15"]),
    ("5", ["5", "５", "+5"], ["−5", "-5", "–5"]),
    ("$7", ["$7", "It costs $7.00.", "7 dollars", "No, it is $7.", "seven dollars"],
     ["€7", "$17", "$7.50", "$7 or $8", "$7, $8", "not $7", "7 apples"]),
    ("€1,000.50", ["€1000.5", "1,000.50 euros"], ["$1000.50", "€100.50"]),
    ("50%", ["50%", "50 %.", "fifty percent", "50％", "It is half, 50%, of all."],
     ["50 apples", "150%", "5%", "50% or 60%", "not 50%", "0.50"]),
    ("12°", ["12°"], ["12", "12%"]),
    ("3/4", ["3/4", "It is 3/4."], ["3-4", "3, 4", "13/4", "3/4/2020"]),
    ("10:30", ["At 10:30."], ["10/30", "10, 30", "10:30 or 11:30"]),
    ("2-3", ["2-3", "2–3"], ["2 or 3", "2/3"]),
    ("t-shirt", ["A t-shirt."], ["a shirt"]),
])
def test_the_rule_judge_reads_signs(truth, right, wrong):
    """A truth that loses its sign, so that C is C++, euros are dollars, and a full stop is any mark."""
    assert [text for text in right if not rule_verdict("?", truth, text)] == []
    assert [text for text in wrong if rule_verdict("?", truth, text)] == []


@pytest.mark.parametrize("truth, right, wrong", [
    ("1000", ["1,000", "1000", "one thousand", "a thousand"], ["1,0000", "1", "1,000 or 2,000", "1,000,000"]),
    ("1,234,567", ["1234567", "1,234,567."], ["1,234", "234,567"]),
    ("1", ["one"], ["1,000", "twenty-one"]),
    ("20", ["twenty", "Twenty."], ["twelve", "twenty-two", "twenty or thirty"]),
    ("twenty", ["20", "twenty"], ["2"]),
    ("21", ["twenty-one", "twenty one dogs"], ["twenty", "one"]),
    ("forty-two", ["42", "There are forty two."], ["40", "2"]),
    ("305", ["three hundred and five", "three hundred five"], ["300", "three hundred"]),
    ("2500000", ["2.5 million", "two million five hundred thousand"], ["2.5", "2500"]),
    ("13", ["thirteen"], ["3", "thirty"]),
    ("red", ["ｒｅｄ", "Ｒｅｄ。"], ["ｂｌｕｅ"]),
    ("红色", ["红色", "答案是红色。", "这是红色的球", "深红色", "大红色的球", "粉红色的球旁边是红色的", "可能是红色吧",
            "红红的，红色", "金色的盘子，红色的球"],
     ["蓝色", "不是红色。", "红色或蓝色", "红", "红色，所以答案是蓝色", "粉红色", "紫红色的花", "橘红色", "红色吗？", "是红色的球吗",
      "红色还是蓝色？"]),
    ("绿", ["浅绿色", "绿色", "墨绿"], ["黄绿色", "蓝绿", "红绿灯"]), ("白色", ["米白色", "雪白色"], ["灰白色", "黑白色"]),
    ("緑", ["深緑"], ["黄緑", "青か緑です"]), ("金色", ["黄金色"], ["银色"]), ("茶", ["绿茶"], ["水"]),
    ("3", ["有3个苹果", "有３个苹果。", "3個です", "사과가 3개 있습니다"], ["有13个苹果", "有3个或4个苹果"]),
    ("3", ["三个", "有三个苹果。", "三", "答案是三。", "三つです", "一个盘子里有三个苹果", "一张图里有3只猫", "一些苹果，三个", "三個リンゴ"],
     ["三角形", "三明治", "第三个", "十三个", "三十个", "三四个", "星期三", "三百个", "两三个", "三个或四个", "一个", "三ですか？",
      "三个吗"]),
    ("1", ["一个", "答案是一。", "有一只狗", "一つ"], ["一样", "一些", "唯一", "十一个", "第一个", "两个", "二十一个"]),
    ("21", ["二十一个", "21个"], ["二十个", "一个", "二一个"]), ("99", ["九十九只羊"], ["九十只羊"]),
    ("10", ["十个", "有十只"], ["十几个", "几十个", "十分", "二十个"]), ("2", ["两个", "两只猫，一只狗"], ["两只猫和三只狗"]),
    ("三个", ["三个", "有3个苹果"], ["十三个", "四个"]), ("三角形", ["三角形", "三角形です"], ["3角形", "角形"]),
    ("3个", ["有3个苹果", "有三个苹果"], ["有13个苹果", "有3只"]),
    ("是", ["是", "是的。"], ["不是", "答案是否"]),
    ("赤", ["答えは赤です。", "赤い車", "赤かもしれません", "何か赤い物", "確か赤です", "何色ですか。赤です。", "赤から青まで"],
     ["赤ではない", "青です", "赤または青", "赤ですか？", "赤い車ですか", "赤でしょうかね。", "赤か青です", "青か赤です", "赤いか青い"]),
    ("カメラ", ["ｶﾒﾗです"], ["カメ"]),
    ("빨간색", ["정답은 빨간색입니다.", "빨간색이니까."],
     ["파란색입니다.", "빨간색이 아니다", "빨간색 또는 파란색", "빨간색입니까?", "빨간색인가요?", "빨간색일까", "빨간색이거나 파란색"]),
])
def test_the_rule_judge_reads_numbers_and_scripts(truth, right, wrong):
    """Numbers in words, separators, full-width forms, and languages without spaces between words."""
    assert [text for text in right if not rule_verdict("?", truth, text)] == []
    assert [text for text in wrong if rule_verdict("?", truth, text)] == []


@pytest.mark.parametrize("question, truth, response, verdict", [
    ("?", "A", "The answer is B, a blue ball.", 0),
    ("?", "A", "A blue ball.", 0),
    ("?", "A", "(A)", 1),
    ("?", "(A)", "A.", 1),
    ("?", "B", "B. It is blue or bluish.", 1),
    ("?", "B", "A or B", 0),
    ("?", "B", "b", 1),
    ("?", "Ｂ", "选B", 1),
    ("?", "I", "I don't know", 0),
    ("Which letter?", "Q", "It says Q.", 1),
    ("Which?\nA. red\nB. blue", "A", "It is red.", 1),
    ("Which?\nA. red\nB. blue", "A", "It is blue.", 0),
    ("Which?\nA. red\nB. blue", "blue", "B", 1),
    ("Which?\nA. red\nB. blue", "Blue", "(B)", 1),
    ("Which?\nA. red\nB. blue", "B. blue", "The answer is B.", 1),
    ("Which?\n(A) red\n(B) blue", "(B) blue", "blue", 1),
    ("Which?\nA. red\nB. blue", "blue", "It is blue.", 1),
    ("Which?\nA. red\nB. blue", "blue", "A", 0),
    ("Which?\nA. red\nB. blue", "blue", "A. red", 0),
    ("Which?\nA. red\nB. blue", "blue", "A or B", 0),
    ("How many?\nA. 1\nB. 3", "3", "There are three of them.", 1),
    ("How many?\nA. 1\nB. 3", "3", "B", 1),
    ("How many?\nA. 1\nB. 3", "3", "A", 0),
    ("Price?\nA. $5\nB. $7", "$7", "B", 1),
    ("Price?\nA. $5\nB. $7", "$7", "$7.00", 1),
    ("Price?\nA. $5\nB. $7", "$7", "A", 0),
    ("Language?\nA. C\nB. C++", "C++", "B", 1),
    ("Language?\nA. C\nB. C++", "C++", "A", 0),
    ("Grade?\nA. B\nB. A", "A", "A", 1),
])
def test_the_rule_judge_reads_letters(question, truth, response, verdict):
    """An article taken for the letter A, or a letter refused because of words beside it."""
    assert rule_verdict(question, truth, response) == verdict


@pytest.mark.parametrize("response, rest", [
    ("<think>A or B?</think>B", "B"), ("<think>red", ""), ("I see.\n<think>red", "I see."), ("red", "red"),
    ("<THINK>\n1\n</THINK>\n\n2", "2"), ("<think>1</think>x <think>2</think>y", "x y"),
    ("red</think>blue", "blue"),
    ("I think it is red", "I think it is red"),
])
def test_thoughts_are_no_part_of_a_response(response, rest):
    """A verdict on what a model only considered."""
    assert without_thoughts(response) == rest


def test_bootstrap_interval_covers_as_it_should():
    """An interval of the wrong width: for 0/1 data it is near the normal p +- 1.96 sqrt(p (1 - p) / n)."""
    low, high = bootstrap_interval([1.0] * 300 + [0.0] * 200)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 500)
    assert low == pytest.approx(0.6 - half, abs=0.005) and high == pytest.approx(0.6 + half, abs=0.005)
    assert bootstrap_interval([1.0] * 50) == (1.0, 1.0)


def test_the_report_cannot_run_what_a_model_wrote(tmp_path):
    """Model text, questions and truths must be escaped: a response can hold any HTML."""
    noise_image(8, 8).save(tmp_path / "i.png")
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{"step": 0, "id": "a", "image": [str(tmp_path / "i.png")], "question": evil, "truth": evil,
             "source": evil, "text": evil, "p_student": 0.5, "rewards": {evil: None}, "reward": 1.0,
             "advantage": 0.5}]
    draw_curves([], str(tmp_path / "curves.png"))
    write_report(tmp_path, {"data": evil}, {}, rows)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") >= 6
    assert "http://" not in page and "https://" not in page        # one file, no request to anywhere


def test_the_report_has_a_column_for_each_reward_term(tmp_path):
    """A report that knows two terms, or shows a judge that could not tell as a 0."""
    common = {"step": 4, "id": "a", "image": [], "question": "?", "truth": "2", "reward": -2.5}
    rows = [common | {"source": "student", "text": "two", "p_student": 0.25, "advantage": -0.5,
                      "rewards": {"similarity": 1.0, "answer": 1.0, "length": -3.5}},
            common | {"source": "qwen", "text": "2!", "p_student": None, "advantage": 0.5,
                      "rewards": {"similarity": 1.0, "answer": None, "length": -3.5}}]
    draw_curves([], str(tmp_path / "curves.png"))
    write_report(tmp_path, {}, {}, rows)
    page = (tmp_path / "report.html").read_text()
    table = re.findall(r"<tr.*?</tr>", page)
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in table]
    assert cells == [
        ["source", "response", "p student", "similarity", "answer", "length", "reward", "advantage"],
        ["student", "two", "0.25", "1.00", "1.00", "-3.50", "-2.50", "-0.50"],
        ["qwen", "2!", "", "1.00", "?", "-3.50", "-2.50", "+0.50"]]
    assert 'class="down"' in table[1] and 'class="up"' in table[2] and "step 5" in page


BLUE, GREEN, PURPLE, ORANGE = (40, 110, 200), (30, 140, 80), (140, 70, 160), (200, 80, 40)


def rows_with(path, colour, panel, panels):
    """The y of all pixels of a colour in one of the panels of a curve."""
    image = Image.open(path)
    width = image.width // panels
    image = image.crop((panel * width, 0, (panel + 1) * width, image.height))
    return [y for y in range(image.height) for x in range(image.width) if image.getpixel((x, y)) == colour]


def draw(path, metrics):
    """Draw metrics that were on the disk meanwhile."""
    draw_curves(json.loads(json.dumps(metrics)), str(path))
    return path


def test_curves_are_drawn_where_the_numbers_are(tmp_path):
    """A curve upside down or off its panel: similarity 1 must colour the top line and nothing lower."""
    row = {"reward/similarity/student": 1.0, "reward/answer/student": 0.0, "reward/answer/qwen": 0.5,
           "heldout_accuracy": 0.5}
    path = draw(tmp_path / "c.png", [{"step": i} | row for i in range(20)])
    top, bottom, middle = (rows_with(path, colour, i, 3) for i, colour in enumerate((BLUE, GREEN, ORANGE)))
    assert max(top) < min(middle) < max(middle) < min(bottom)
    assert abs((max(top) + min(bottom)) / 2 - (min(middle) + max(middle)) / 2) < 4


def test_curves_of_any_reward(tmp_path):
    """Curves that know two terms, leave the panel outside of [0, 1], or stop at a null."""
    metrics = [{"step": i, "reward/similarity/student": 0.5, "reward/answer/student": None if i % 3 else 1.0,
                "reward/length/student": (-7.0, 3.0)[i % 2], "reward/length/qwen": 99.0} for i in range(20)]
    metrics[5]["reward/answer/student"] = float("nan")             # a step in which the judge was down
    path = draw(tmp_path / "c.png", metrics)
    assert Image.open(path).width == 4 * 560                       # no panel for a teacher
    y = {}
    for panel, (name, colour) in enumerate((("half", BLUE), ("one", GREEN), ("length", PURPLE))):
        y[name] = rows_with(path, colour, panel, 4)
    assert max(y["one"]) < min(y["half"])
    assert y["length"] and rows_with(path, ORANGE, 3, 4) == []     # nothing was held out
    pale = tuple((channel + 2 * 255) // 3 for channel in PURPLE)
    jumps = rows_with(path, pale, 2, 4)                            # every step, from -7 to 3
    top, bottom = 46, 380 - 50
    assert top < min(jumps) < max(jumps) < bottom                  # the axis is from -8 to 4
    assert max(jumps) - min(jumps) == pytest.approx((bottom - top) * 10 / 12, abs=3)


@pytest.mark.parametrize("values, first, last", [
    ([], 0, 1), ([0.0], 0, 1), ([0.2, 1.0], 0, 1), ([1.2], 0, 1.5), ([2.0], 0, 2), ([-0.5], -0.5, 0),
    ([-7, 3], -8, 4), ([0.1, -0.001], -0.05, 0.1), ([730.0], 0, 800),
])
def test_the_axis_holds_all_values_and_zero(values, first, last):
    """An axis from 0 to 1 whatever the rewards are."""
    ticks = value_ticks(values)
    assert (ticks[0], ticks[-1]) == (pytest.approx(first), pytest.approx(last)) and 4 <= len(ticks) <= 8
    assert any(abs(tick) < 1e-12 for tick in ticks)
