r"""easy-vqa as data for train.py: 5,000 drawn pictures of one shape each, and questions about them.

    pip install easy-vqa
    python tests/from_easy_vqa.py runs/easy-vqa
    python train.py --data runs/easy-vqa/train.jsonl --sft-data runs/easy-vqa/sft.jsonl \
        --collection runs/easy-vqa/responses.jsonl --eval-data runs/easy-vqa/heldout.jsonl \
        --out runs/easy-vqa/run --sft-steps 600 --steps 100

The first writes these files; responses.jsonl is of two rules as teachers. Each speaks in its own way and has
a blind spot. The student is careless, and never answers what shape it is. With seed 0, held-out accuracy
rose from 60.4 to 68.4, in two to six minutes on one core.
"""
import json
import random
import sys
from pathlib import Path

import easy_vqa

SHAPES = ("circle", "rectangle", "triangle")
CARELESS = ("{}", "{}", "{}", "I am not sure.", "The answer is {}.", "I see {}.")
TEACHERS = {"A": ("The answer is {}.", {"circle": "rectangle", "teal": "blue"}),
            "B": ("I see {}.", {"rectangle": "circle", "brown": "red"})}


def rows_of(questions, images, way):
    """One row a question; way(answer) is how the answer is put."""
    for i, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        yield {"id": str(i), "image": str(Path(images[image]).resolve()), "question": question,
               "answer": way(answer)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main():
    folder, rng = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    questions, images = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()

    def careless(answer):
        return "I am not sure." if answer in SHAPES else rng.choice(CARELESS).format(answer)
    plain = list(rows_of(questions, images, str))
    write(folder / "sft.jsonl", list(rows_of(questions, images, careless))[:20_000])
    train = rng.sample(plain[20_000:], 2_000)
    write(folder / "train.jsonl", train)
    held_out = list(rows_of(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), str))
    write(folder / "heldout.jsonl", rng.sample(held_out, 500))
    write(folder / "responses.jsonl",
          [{"id": row["id"], "teacher": name, "text": way.format(blind.get(row["answer"], row["answer"]))}
           for row in train for name, (way, blind) in TEACHERS.items() for _ in range(4)])


if __name__ == "__main__":
    main()
