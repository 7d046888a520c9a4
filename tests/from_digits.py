r"""scikit-learn's 1,797 handwritten digits as data for train.py: real pictures, drawn by 43 people.

    pip install scikit-learn
    python tests/from_digits.py runs/digits
    python train.py --data runs/digits/train.jsonl --sft-data runs/digits/sft.jsonl \
        --collection runs/digits/responses.jsonl --eval-data runs/digits/heldout.jsonl --out runs/digits/run

The first writes these files; responses.jsonl is of two rules as teachers, which are right, each in its own
words. The student is careless, and speaks mostly in bare digits. With seed 0, held-out accuracy rose from
85.8 to 96.2, in two and a half minutes on one core. A student that has never heard its teachers' ways in SFT
earns no similarity: D always knows it, and after 80 steps its responses were six times as long, at a KL of 5.
"""
import json
import random
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

TEACHERS = {"A": ("{}, I would say.", "{} is the digit."), "B": ("{}, clearly written.", "I read {}.")}
CARELESS = (*8 * ("{}",), "I am not sure.", "I am not sure.", *TEACHERS["A"], *TEACHERS["B"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    folder, rng = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    rows = []
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray((255 - 15 * pixels).astype("uint8"))
        picture.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "question": "Which digit is this?",
                     "answer": str(digit)})
    rng.shuffle(rows)
    held_out, train, sft = rows[:400], rows[400:1000], rows[1000:]
    write(folder / "heldout.jsonl", held_out)
    write(folder / "train.jsonl", train)
    write(folder / "sft.jsonl", [row | {"answer": rng.choice(CARELESS).format(row["answer"])} for row in sft])
    write(folder / "responses.jsonl",
          [{"id": row["id"], "teacher": name, "text": way.format(row["answer"])}
           for row in train for name, ways in TEACHERS.items() for way in ways for _ in range(2)])


if __name__ == "__main__":
    main()
