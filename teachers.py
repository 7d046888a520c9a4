"""What is asked, and what good answers look like: examples, teachers, the collection of their responses, the toy world.

RIL reads nothing of a teacher but its text. So every teacher answers every question N times *before* training, the
responses are kept in one JSONL file (the collection, line 6 of Algorithm 2 draws from it), and no teacher is in memory
while the student learns. Their tokenizers, image encoders and families may all differ from the student's.

    python teachers.py --teachers runs/toy/teachers/qwen runs/toy/teachers/internvl \
        --data runs/toy/data/train.jsonl --out collection.jsonl -n 16

The toy world is at the bottom: coloured shapes on a 3 x 3 grid, drawn with Pillow, written to disk and read back by the
same reader as anyone's data.
"""
import argparse
import json
import random
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import VLM, Prompt, Sampling, UserError, encode, generate, load_vlm, run

# ---------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about some images (often one, possibly none) and its true answer. `where` is "file:line"."""
    id: str
    images: tuple[str, ...]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    category: str = ""
    where: str = ""

    @property
    def text(self) -> str:
        """The question as it is asked, with its options, if any, as lettered lines."""
        return "\n".join([self.question] + [f"{chr(65 + i)}. {option}" for i, option in enumerate(self.options)])


def read_jsonl(path: str):
    """Yield (where, row) for each line of a JSONL file; UserError naming file and line for one that is not an object."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:                                 # bytes: what is not UTF-8 is then a bad line, named
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error})") from error
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object in braces, found {str(row)[:40]}")
            yield where, row


def load_examples(path: str) -> list[Example]:
    """Read a JSONL file of examples: {"id", "image", "question", "answer", "options", "category"}, one a line.

    image is a path relative to the file's folder, a list of paths, or absent; id defaults to the line number; options
    and category may be absent. UserError naming file and line for a bad row, a missing or unreadable image, or a
    repeated id.
    """
    examples, seen = [], set()
    for where, row in read_jsonl(path):
        images, options = row.get("image") or [], row.get("options") or []
        images = [images] if isinstance(images, str) else images
        for name, value in (("image", images), ("options", options)):
            if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
                raise UserError(f'{where}: expected a list of strings as "{name}", found {value!r}')
        example = Example(str(row.get("id", where.rsplit(":", 1)[1])),
                          tuple(str(Path(path).parent / image) for image in images), row.get("question"),
                          row.get("answer"), tuple(options), str(row.get("category", "")), where)
        for name in ("question", "answer"):
            value = getattr(example, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f'{where}: expected a non-empty string as "{name}", found {value!r}')
        if example.id in seen:
            raise UserError(f"{where}: the id {example.id!r} was used before; ids must be unique within a file")
        seen.add(example.id)
        for image in example.images:
            open_image(image, where).close()
        examples.append(example)
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def open_image(path: str, where: str) -> Image.Image:
    """Open an image and read its header, no pixels yet. UserError when it is missing, empty or not an image."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}: image {path} does not exist") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image {path} cannot be read ({type(error).__name__}; "
                        f"{Path(path).stat().st_size} bytes)") from error


def encode_example(vlm: VLM, example: Example) -> Prompt:
    """The example as a prompt of this model; UserError naming file and line when an image turns out to be corrupt.

    The first 512 MB of prompts are kept: epochs over a small set of small pictures should not open each every time.
    """
    if example in vlm.prompts:
        return vlm.prompts[example]
    try:
        images = [open_image(path, example.where).convert("RGB") for path in example.images]
    except (OSError, SyntaxError) as error:
        raise UserError(f"{example.where}: an image of {example.images} is corrupt ({error})") from error
    prompt = encode(vlm, example.text, images)
    vlm.room -= prompt.ids.nbytes + sum(x.nbytes for x in prompt.images.values())
    if vlm.room > 0:
        vlm.prompts[example] = prompt
    return prompt


# ---------------------------------------------------------------------------------------------- the collection


class Collection:
    """The saved responses: `responses[example id][teacher]` is a list of texts."""

    def __init__(self, path: str, examples: list[Example], forbidden: set[str] = frozenset()):
        """Read a collection for these examples. A row is {"id", "teacher", "text"}, and may say "finished".

        Responses that were cut off by a token limit ("finished": false) are left out and counted in `unfinished`.
        UserError when an example has no response at all, as it could not be drawn from, and when a response spells one
        of the `forbidden` image tokens of the student.
        """
        self.responses, self.unfinished = defaultdict(lambda: defaultdict(list)), 0
        for where, row in read_jsonl(path):
            if not isinstance(row.get("text"), str) or "id" not in row:
                raise UserError(f'{where}: expected a response {{"id": ..., "teacher": ..., "text": ...}}')
            if spelt := [token for token in forbidden if token in row["text"]]:
                raise UserError(f"{where}: the response spells {spelt[0]}, which the student reads as an image")
            self.unfinished += not row.get("finished", True)
            if row.get("finished", True):
                self.responses[str(row["id"])][str(row.get("teacher", "teacher"))].append(row["text"])
        for example in examples:
            if example.id not in self.responses:
                raise UserError(f"{path}: no finished response for the question {example.id!r} of {example.where}")

    def draw(self, examples: list[Example], num: int, rng: random.Random) -> list[list[tuple[str, str]]]:
        """num pairs (teacher, text) per example, spread evenly over its teachers (who gets the odd one is drawn).

        Without repetition while a teacher's responses last.
        """
        drawn = []
        for example in examples:
            of = self.responses[example.id]
            order = rng.sample(sorted(of), len(of))
            bags = {teacher: [] for teacher in order}              # a teacher's responses, shuffled, not yet drawn
            pairs = []
            for i in range(num):
                teacher = order[i % len(order)]                    # taking turns is as even as it gets
                if not bags[teacher]:
                    bags[teacher] = rng.sample(of[teacher], len(of[teacher]))
                pairs.append((teacher, bags[teacher].pop()))
            drawn.append(pairs)
        return drawn


def teacher_name(teacher: str) -> str:
    """What the collection and the logs call a teacher: the last part of its path or hub id."""
    return Path(teacher).name


def fill_collection(path: str, teachers: list[str], examples: list[Example], num: int, sampling: Sampling, seed: int = 0,
                    batch_size: int = 64, device: str | None = None, dtype: str | None = None):
    """Bring the file to `num` responses of each teacher to each example, sampled with `sampling`; append as they come.

    What is already there under the same example, teacher and sampling settings is kept, so an interrupted fill goes
    on where it stopped. Each batch has a seed of its own: it comes out the same whether or not there was a stop.
    """
    names = [teacher_name(teacher) for teacher in teachers]
    if len(set(names)) < len(names):
        raise UserError(f"two teachers have the same name ({', '.join(names)}); rename a folder, so that their responses "
                        "can be told apart")
    have = defaultdict(int)                                        # responses by example, teacher and sampling settings
    if Path(path).exists():
        for _, row in read_jsonl(path):
            have[row.get("id"), row.get("teacher"), json.dumps(row.get("sampling"))] += 1
    settings = asdict(sampling)
    for name, teacher in zip(names, teachers):
        vlm = None                                                 # loaded only if it has anything left to say
        batches = [examples[i:i + batch_size] for i in range(0, len(examples), batch_size)]
        for number, batch in enumerate(tqdm(batches, desc=f"responses of {name}", unit="batch")):
            missing = {e.id: num - have[e.id, name, json.dumps(settings)] for e in batch}
            if all(n <= 0 for n in missing.values()):
                continue
            vlm = vlm or load_vlm(teacher, device, dtype)
            generator = torch.Generator(vlm.device).manual_seed(zlib.crc32(f"{seed} {name} {number}".encode()))
            outputs = generate(vlm, [encode_example(vlm, e) for e in batch], num, sampling, generator)
            # a response is finished when its last token is a stop token; one that was cut off never is drawn
            last = (outputs.ids * outputs.mask).gather(2, outputs.mask.sum(2, keepdim=True) - 1).squeeze(2)    # (B, G)
            finished = torch.isin(last, torch.tensor(vlm.stop_ids, device=vlm.device)).tolist()
            with open(path, "a", encoding="utf-8") as file:
                for example, texts, ends in zip(batch, outputs.text, finished):
                    for text, end in list(zip(texts, ends))[num - max(0, missing[example.id]):]:
                        row = {"id": example.id, "teacher": name, "text": text, "finished": end, "sampling": settings}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------- the toy world


COLOURS = {"red": (225, 60, 50), "green": (60, 170, 75), "blue": (60, 110, 230), "yellow": (245, 200, 40)}
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
DODGE = "I am not sure."
WAYS = ("{}", "The answer is {}.", DODGE)
BACKGROUND = ((255, 255, 255), (200, 255, 255), (255, 255, 200), (180, 180, 180))
CELL = 16                                                          # pixels; also one patch, so one token, of the toy models


def draw_scene(scene: dict[int, tuple[str, str]]) -> Image.Image:
    """A 32 x 32 picture of {cell 0..3: (colour, shape)}."""
    image = Image.new("RGB", (2 * CELL, 2 * CELL))
    pen = ImageDraw.Draw(image)
    for cell, tint in enumerate(BACKGROUND):                       # lit from one corner: a patch shows where it is
        x, y = cell % 2 * CELL, cell // 2 * CELL
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=tint)
    for cell, (colour, shape) in scene.items():
        x, y = cell % 2 * CELL, cell // 2 * CELL
        box = (x + 2, y + 2, x + CELL - 3, y + CELL - 3)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(x + CELL // 2, y + 1), (x + 1, y + CELL - 3), (x + CELL - 2, y + CELL - 3)],
                        fill=COLOURS[colour])
    return image


def questions_about(scene: dict[int, tuple[str, str]], rng: random.Random) -> list[tuple[str, str, str]]:
    """All kinds of questions about a scene, each as (category, question, answer)."""
    things, found = list(scene.values()), []
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    asked, count = rng.choice([("shape", len(things)), (f"{colour} shape", sum(c == colour for c, _ in things)),
                               (shape, sum(s == shape for _, s in things))])
    found.append(("count", f"How many {asked}s are there?", str(count)))
    wanted = rng.choice(things) if rng.random() < 0.5 else (colour, shape)
    found.append(("existence", f"Is there a {' '.join(wanted)}?", "yes" if wanted in things else "no"))
    alone = [(cell, c, s) for cell, (c, s) in scene.items() if sum(t[1] == s for t in things) == 1]
    if alone:
        cell, c, s = rng.choice(alone)
        found.append(("colour", f"What colour is the {s}?", c))
        found.append(("position", f"Where is the {s}?", PLACES[cell]))
    alone = [(c, s) for c, s in things if sum(t[0] == c for t in things) == 1]
    if alone:
        c, s = rng.choice(alone)
        found.append(("shape", f"What shape is {c}?", s))
    return found


def draw_toy_world(folder: str, seed: int, splits: dict[str, tuple[int, tuple[float, ...], str]]):
    """Write PNG images and one JSONL file per split.

    splits: {name: (number of examples, chances of the WAYS of answering, a category that is never answered or "")}.

    Splits are disjoint in their scenes: no picture of one split occurs in another.
    """
    rng, drawn = random.Random(seed), set()
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    for split, (size, chances, untaught) in splits.items():
        rows = []
        while len(rows) < size:
            cells = rng.sample(range(4), rng.randint(1, 4))
            scene = {cell: (rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in sorted(cells)}
            if (key := tuple(scene.items())) in drawn:
                continue
            drawn.add(key)
            image = f"images/{split}-{len(rows):05}.png"
            draw_scene(scene).save(Path(folder) / image)
            for category, question, answer in rng.sample(found := questions_about(scene, rng), min(3, len(found))):
                rows.append({"id": f"{split}-{len(rows):05}", "image": image, "question": question, "category": category,
                             "answer": (DODGE if category == untaught else rng.choices(WAYS, chances)[0]).format(answer)})
        lines = "".join(json.dumps(row) + "\n" for row in rows[:size])
        (Path(folder) / f"{split}.jsonl").write_text(lines, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- command line


def add_sampling_options(parser):
    """The sampling options, shared by every script; the paper's values are their defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=0.95, help="sample from the likeliest tokens that hold this mass")
    group.add_argument("--top-k", type=int, default=50, help="sample from so many likeliest tokens, 0 for all")
    group.add_argument("--repetition-penalty", type=float, default=1.05, help="1 is none")
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest response, in tokens")


def sampling_of(args) -> Sampling:
    """The Sampling that the options of add_sampling_options ask for."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens)


def main():
    """Fill a collection from the command line."""
    parser = argparse.ArgumentParser(description="Collect responses of teachers.", allow_abbrev=False)
    parser.add_argument("--teachers", nargs="+", required=True, help="checkpoint folders or hub ids")
    parser.add_argument("--data", required=True, help="JSONL of examples")
    parser.add_argument("--out", required=True, help="the collection, JSONL; what it already holds is kept")
    parser.add_argument("-n", "--num", type=int, default=16, help="responses of each teacher to each question")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU")
    add_sampling_options(parser)
    args = parser.parse_args()
    fill_collection(args.out, args.teachers, load_examples(args.data), args.num, sampling_of(args), args.seed,
                    args.batch_size, args.device, args.dtype)


if __name__ == "__main__":
    run(main)
