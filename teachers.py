"""What is asked, and what good answers look like: examples, teachers, the collection of their responses, the toy world.

RIL reads nothing of a teacher but its text. So every teacher answers every question N times *before* training, the
responses are kept in one JSONL file (the collection, line 6 of Algorithm 2 draws from it), and no teacher is in memory
while the student learns. Their tokenizers, image encoders and families may all differ from the student's.

    python teachers.py --teachers runs/toy/teachers/qwen runs/toy/teachers/internvl \
        --data runs/toy/data/train.jsonl --out collection.jsonl -n 16
    python teachers.py --teachers big-model@http://localhost:8000/v1 --data train.jsonl --out collection.jsonl -n 16
    python teachers.py --select 40000 --student DIR --data llava.json --out train.jsonl

In order: the data formats, models behind a URL, the collection, the choice of examples, and the toy world: coloured shapes
on a 2 x 2 grid, drawn with Pillow, written to disk and read back by the same reader as anyone's data.
"""
import argparse
import ast
import base64
import csv
import http.client
import io
import json
import math
import os
import random
import re
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig, InternVLConfig, Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import (MARK, VLM, Prompt, Sampling, UserError, chat_turns, decode, encode, encode_responses, load_vlm, run, score,
                   stream, write_atomic)

# ---------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about some images (often one, possibly none) and its truth, the true answer. `where` is "file:line".

    Images stand where the question marks them with `<image>`, else before it. options have letters by their place; "" is
    none. history: earlier (question, answer) turns. The rest is of benchmarks: truths, where several are right (VQA's ten,
    the references of a caption, FOIL's wrong and right word); group, what is scored together (a caption and its foils);
    kind, of answer; pixels, of all its images.
    """
    id: str
    images: tuple[str, ...]
    question: str
    truth: str
    options: tuple[str, ...] = ()
    category: str = ""
    where: str = ""
    history: tuple[tuple[str, str], ...] = ()
    hint: str = ""
    truths: tuple[str, ...] = ()
    group: str = ""
    split: str = ""
    kind: str = ""
    pixels: int = 0

    @property
    def letters(self) -> dict[str, str]:
        """The options by letter."""
        return {chr(65 + i): option for i, option in enumerate(self.options) if option}

    @property
    def text(self) -> str:
        """The question as it is asked, with its hint and its options, if any, as lettered lines."""
        return "\n".join([f"Hint: {self.hint}"] * bool(self.hint) + [self.question]
                         + [f"{letter}. {option}" for letter, option in self.letters.items()])

    @property
    def dialogue(self) -> str:
        """The question as a judge should see it: with the turns before it."""
        return "\n".join([f"{question}\n{answer}" for question, answer in self.history] + [self.text])


def read_jsonl(path: str, torn: bool = False):
    """Yield (where, row) for each line of a JSONL file; UserError naming file and line for one that is not an object.

    torn: a last line that is none, and has no end, was never finished by its writer; it is left out, and that is said.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:                                 # bytes: what is not UTF-8 is then a bad line, named
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                if torn and not line.endswith(b"\n"):
                    print(f"{where}: the last line was not finished and is left out")
                    return
                raise UserError(f"{where}: not JSON ({error})") from error
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object in braces, found {str(row)[:40]}")
            yield where, row


@contextmanager
def malformed(where: str):
    """Turn what a row of an unexpected form raises into one sentence that says where it is."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: in no known form ({type(error).__name__}: {error})") from error


def read_json(path: str):
    """The contents of a JSON file."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_examples(path: str):
    """Yield (where, examples) of a data file, row by row, in whichever of the formats it is: told by what is in it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:                                 # a file of JSON lines is not read whole
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
    whole, rows = {}, None
    if first and first[:1] not in b"{[":
        if b"\t" not in first:
            raise UserError(f"{path}: in no known format; expected JSON lines, a JSON list or object, or a TSV with a header")
        yield from tsv_examples(path)
        return
    if first.startswith(b"["):
        rows = ((f"{path}: item {number}", row) for number, row in enumerate(read_json(path), 1))
    elif first:
        with suppress(ValueError, RecursionError, UserError):                    # an object on one line or on many; else lines of JSON
            whole = json.loads(first) if first.endswith(b"}") else read_json(path)
    if isinstance(whole.get("images"), list) and ("annotations" in whole or "info" in whole):
        yield from coco_examples(path, whole)
        return
    if whole and all(isinstance(row, dict) and "question" in row for row in whole.values()):
        rows = ((f"{path}: item {name}", row | {"id": name}) for name, row in whole.items())
    rows = rows or read_jsonl(path)
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object in braces, found {str(row)[:40]}")
        with malformed(where):
            examples = examples_of(path, where, row)
        yield where, examples


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can hold the half of an emoji, which cannot."""
    return not re.search("[\ud800-\udfff]", value)


def strings(row: dict, name: str, where: str) -> list[str]:
    """row[name] as a list of strings; nothing, or where it is an image a single string, will do too."""
    value = row.get(name) or []
    value = [value] if isinstance(value, str) and name.startswith("image") else value
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise UserError(f'{where}: expected a list of strings as "{name}", found {value!r}')
    return value


def dialogue(row: dict, where: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(user, assistant) texts and image paths of a row in LLaVA's form ("conversations") or the chat form ("messages").

    A system turn goes before the first question. Image parts become `<image>` marks in the text.
    """
    turns, images, system = [], strings(row, "image", where) + strings(row, "images", where), ""
    for turn in row.get("conversations") or row["messages"]:
        role, content = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        if isinstance(content, list):
            for part in content:
                if part.get("type") != "text":
                    link = part.get("image_url")
                    path = part.get("image") or part.get("path") or part.get("url") or (
                        link.get("url") if isinstance(link, dict) else link)
                    images += [path] if path else []
            content = "".join(part["text"] if part.get("type") == "text" else MARK for part in content)
        if role == "system":
            system = content + "\n"
        elif role in ("human", "user") and (not turns or len(turns[-1]) == 2):
            turns.append((system + content,))
            system = ""
        elif role in ("gpt", "assistant") and turns and len(turns[-1]) == 1:
            turns[-1] += (content,)
        else:
            raise UserError(f"{where}: expected questions and answers in turn, found {role!r} as turn {2 * len(turns) + 1}")
    turns = [turn for turn in turns if len(turn) == 2]
    if not turns:
        raise UserError(f"{where}: no question with an answer in it")
    return turns, images


def found(path: str, image: str) -> str:
    """An image that a data file names: beside the file, or in the folder `images` beside it."""
    folder = Path(path).parent
    inside = folder / "images" / image
    return str(inside if not (folder / image).exists() and inside.exists() else folder / image)


def examples_of(path: str, where: str, row: dict) -> list[Example]:
    """A row of a JSON file as examples: one, or one for each answer of a dialogue.

    Beside our own form, that is LLaVA's, chat messages, VizWiz-VQA's (ten answers, and the image's name for an id) and
    MM-Vet's (in version 2 the question interleaves texts and names of images, between <IMG>).
    """
    name = str(row.get("id", where.rsplit(":", 1)[1].removeprefix(" item ")))
    if "conversations" in row or "messages" in row:
        (turns, images), examples = dialogue(row, where), []
        for i, (question, answer) in enumerate(turns):
            marks = sum(text.count(MARK) for text, _ in turns[:i + 1])      # images of later turns are not yet shown
            shown = images[:marks] if any(MARK in text for text, _ in turns) else images
            examples.append(Example(name if len(turns) == 1 else f"{name}-{i + 1}", tuple(found(path, x) for x in shown),
                                    question, answer, (), str(row.get("category", "")), where, tuple(turns[:i]), kind="dialogue"))
        return examples
    if "question" not in row:
        raise UserError(f'{where}: in no known format; expected "question" and "answer", or "conversations", or "messages"')
    question, images = row["question"], strings(row, "image", where) + strings(row, "imagename", where)
    answers, answer, category = row.get("answers") or [], row.get("answer"), row.get("category", "")
    if "capability" in row:                                        # MM-Vet
        pieces = question.split("<IMG>")
        images += [piece for piece in pieces if piece.endswith((".jpg", ".jpeg", ".png"))]
        question = "".join(MARK if piece.endswith((".jpg", ".jpeg", ".png")) else piece for piece in pieces)
        category = ",".join(row["capability"])
    if "answer_type" in row or answers:                            # VizWiz-VQA
        answers = [str(given.get("answer")) if isinstance(given, dict) else str(given) for given in answers]
        answer, category = answer or (answers or [None])[0], row.get("answer_type", category)
        name = str(row.get("id", images[0] if images else name))
    return [Example(name, tuple(found(path, image) for image in images), question, answer, tuple(strings(row, "options", where)),
                    str(category), where, tuple((str(asked), str(said)) for asked, said in row.get("history") or ()),
                    truths=tuple(answers), split=str(row.get("split", "")))]


def read_tsv(path: str):
    """Yield (where, row, offset) of a tab-separated file with a header: cells as strings by column, and the byte at which
    the row begins. Cells may hold images, tabs and line breaks, so this is the csv module's work."""
    csv.field_size_limit(2 ** 31 - 1)
    consumed, number = 0, 0
    with open(path, "rb") as file:
        def lines():
            nonlocal consumed, number
            for line in file:
                consumed, number = consumed + len(line), number + 1
                yield line.decode("utf-8")
        reader, header = csv.reader(lines(), delimiter="\t", strict=True), None
        while True:
            where, offset = f"{path}:{number + 1}", consumed
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not a row of a tab-separated file ({error})") from error
            if header is None:
                header = [cell.removeprefix("\ufeff") for cell in cells]
            elif len(cells) == len(header):
                yield where, dict(zip(header, cells)), offset
            elif cells:
                raise UserError(f"{where}: expected {len(header)} cells, one for each column, found {len(cells)}")


def listed(cell: str) -> list[str]:
    """A cell that may be a Python list of strings, as one: [a] is a, and anything else is itself."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] * bool(cell)
    try:
        return [str(part) for part in ast.literal_eval(cell)]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]                                              # "[sic]" is a text like any other


def tsv_examples(path: str):
    """Yield (where, [example]) of a VLMEvalKit TSV. An image is base64 in the cell `image`, or a list of several; or the
    `index` of another row, which holds it; or a file, in `image_path`. It stays in the file until it is looked at, and is
    called FILE#offset.column.number meanwhile."""
    own, rows, without = {}, [], 0
    for where, row, offset in read_tsv(path):
        if "index" not in row or "question" not in row and "image" not in row:
            raise UserError(f"{path}: in no known format; a TSV has at least the columns index, image and question")
        cell, name = row.pop("image", ""), row["index"]
        if len(cell) > 64:
            own[name] = [f"{path}#{offset}.{k}" for k in range(len(listed(cell)))]
        rows.append((where, row, cell if len(cell) <= 64 else name))
    for where, row, target in rows:
        files = [found(path, name) for name in listed(row.get("image_path", ""))]
        if target and target not in own:
            raise UserError(f"{where}: its image is that of the row with index {target}, which holds none")
        if not (images := own.get(target, files)):
            without += 1                                           # as upstream: every question is about an image
            continue
        with malformed(where):
            example = tsv_example(where, row, images)
        yield where, [example]
    if without:
        print(f"{path}: {without} rows without an image are left out")


def tsv_example(where: str, row: dict[str, str], images: list[str]) -> Example:
    """A row of a VLMEvalKit TSV. Columns A, B, ... are options, and exist where they are not empty (pandas, upstream, also
    drops options that read None or NA). MathVista's choices are options too, its answer then a letter."""
    options = [row.get(chr(65 + i), "") for i in range(26)]
    answers, kind = listed(row.get("answers") or row.get("answer", "")), row.get("answer_type", "")
    answer = answers[0] if row.get("answers") and answers else row.get("answer", "")
    if row.get("question_type") == "multi_choice":
        options, kind = options if any(options) else listed(row.get("choices", "")), "multi_choice"
        if answer not in (given := {chr(65 + i): option for i, option in enumerate(options)}) and answer in given.values():
            answer = next(letter for letter, option in given.items() if option == answer)
    options = options[:max((i + 1 for i, option in enumerate(options) if option), default=0)]
    texts, tags = [row.get("hint", ""), row.get("question", ""), *options], re.compile(r"<image (\d)>")
    if order := [int(tag) for text in texts for tag in tags.findall(text)]:                  # MMMU says where images stand
        if not all(1 <= k <= len(images) for k in order):
            raise UserError(f"{where}: it speaks of <image {max(order)}>, and has {len(images)} images")
        images, texts = [images[k - 1] for k in order], [tags.sub(MARK, text) for text in texts]
    category = ";".join(filter(None, (row.get("l2-category"), row.get("category"))))
    return Example(row["index"], tuple(images), texts[1], answer, tuple(texts[2:]), category, where, hint=texts[0],
                   truths=tuple(answers), group=row.get("g_index", ""), split=row.get("split", ""), kind=kind)


def coco_examples(path: str, whole: dict):
    """Yield (where, [example]) of captions in COCO's form: of each image that has any, with its captions as answers; for
    FOIL, which has foils among them, of each caption. VizWiz's rejected and precanned captions are left out."""
    images, captions, foil = {}, defaultdict(list), False
    if not isinstance(whole.get("annotations"), list):
        raise UserError(f"{path}: images without captions (a test split?), so there is nothing to compare with")
    with malformed(f"{path}: images"):
        files = {image["id"]: found(path, image["file_name"]) for image in whole["images"]}
        images = {image["id"]: image for image in whole["images"]}
    for number, row in enumerate(whole["annotations"], 1):
        with malformed(where := f"{path}: annotation {number}"):
            if row["image_id"] not in images or not isinstance(row["caption"], str):
                raise ValueError("expected a caption, and the image_id of one of the images")
            foil |= "foil" in row
            if not row.get("is_rejected") and not row.get("is_precanned"):
                captions[row["id"] if foil else row["image_id"]].append((where, row))
    for key, rows in captions.items():
        where, row = rows[0]
        if not foil:
            texts = tuple(row["caption"] for _, row in rows)
            yield where, [Example(str(key), (files[key],), "", texts[0], (), str(images[key].get("domain", "")), where,
                                  truths=texts, kind="caption")]
            continue
        with malformed(where):
            rows.sort(key=lambda pair: pair[1]["foil"])
            if [row["foil"] for _, row in rows].count(False) != 1:
                raise ValueError(f"expected one true caption, \"foil\": false, among the {len(rows)} with id {key}")
            group = [Example(f"{key}-{k}", (files[row["image_id"]],), row["caption"], "No" if k else "Yes", (),
                             "foil" if k else "original", where, truths=(str(row["foil_word"]), str(row["target_word"])),
                             group=str(key), kind="foil") for k, (where, row) in enumerate(rows)]
        yield where, group
    if not foil and len(images) > len(captions):
        print(f"{path}: {len(images) - len(captions)} of {len(images)} images have no captions and are left out")


def load_examples(path: str, skip_bad: bool = False) -> list[Example]:
    """Read examples, and look at every image once, so that what is wrong is known before any work is done.

    JSONL or a JSON list in three forms: ours, {"id", "image", "question", "answer", "options", "category"}; LLaVA's,
    {"id", "image", "conversations"}; and chat, {"messages", "images"}. And the files of benchmarks: VLMEvalKit's TSV,
    captions in COCO's form (NoCaps, VizWiz, FOIL), VizWiz-VQA, MM-Vet. Images are paths relative to the file's folder or
    to `images` in it. UserError naming file and line for a bad row, a missing or unreadable image, or a repeated id;
    with skip_bad, rows with such images are left out, and counted on the console.
    """
    examples, ids = [], defaultdict(int)
    for where, parsed in read_examples(path):
        for example in parsed:
            for name, value in (("question", example.question), ("answer", example.truth)):
                if name == "question" and example.kind == "caption":
                    continue
                if not isinstance(value, str) or not value.replace(MARK, "").strip() or not is_text(example.dialogue + value):
                    raise UserError(f'{where}: expected a non-empty string as "{name}", found {value!r}'
                                    + " (a test split?)" * (name == "answer" and not value))
            try:
                chat_turns(example.text, len(example.images), example.history)        # do marks and images agree?
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            ids[example.id] += 1
            if ids[example.id] > 1 and example.kind != "dialogue":
                raise UserError(f"{where}: the id {example.id!r} was used before; ids must be unique within a file")
            if ids[example.id] > 1:                                # common in LLaVA's files
                example = Example(**vars(example) | {"id": f"{example.id}#{ids[example.id]}"})
            examples.append(example)
    examples = with_whole_images(examples, path, skip_bad)
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def with_whole_images(examples: list[Example], path: str, skip_bad: bool) -> list[Example]:
    """Open every image once, in threads; UserError on the first bad one, or with skip_bad the examples without any."""
    wheres, bad, pixels = {}, {}, {}
    for e in examples:
        for image in e.images:
            wheres.setdefault(image, e.where)

    def look(image):
        try:
            size = open_image(image, wheres[image]).size
            pixels[image] = size[0] * size[1]
        except UserError as error:
            bad[image] = error
    with ThreadPoolExecutor(8) as pool:
        list(tqdm(pool.map(look, wheres), f"images of {Path(path).name}", len(wheres), unit="image", delay=3))
    if bad:
        first = next(bad[image] for image in wheres if image in bad)
        if not skip_bad:
            raise first
        whole = [e for e in examples if not bad.keys() & set(e.images)]
        print(f"{path}: {len(examples) - len(whole)} of {len(examples)} examples skipped for {len(bad)} bad images, "
              f"the first: {first}")
        examples = whole
    return [replace(e, pixels=sum(pixels[image] for image in e.images)) for e in examples]


def image_bytes(image: str) -> bytes:
    """The bytes of an image file; or of an image inside a TSV, as tsv_examples names it. ValueError if that is no base64."""
    inside = re.fullmatch(r"(.+)#(\d+)\.(\d+)", image)
    if not inside or Path(image).exists():
        return Path(image).read_bytes()
    path, offset, number = inside.groups()
    with open(path, "rb") as file:
        lines = (line.decode("utf-8") for line in file)
        column = next(csv.reader(lines, delimiter="\t")).index("image")
    with open(path, "rb") as file:
        file.seek(int(offset))
        cell = next(csv.reader((line.decode("utf-8") for line in file), delimiter="\t"))[column]
    return base64.b64decode("".join(listed(cell)[int(number)].split()), validate=True)


def open_image(path: str, where: str) -> Image.Image:
    """An image as 8-bit RGB, upright (EXIF), on white where it is transparent; 16-bit grey is scaled, not clipped.

    UserError when it is missing, empty, truncated, no image, or so large that it must be a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(image_bytes(path)))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.float32)
            return Image.fromarray((grey / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{where}: image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: image {path} cannot be read ({type(error).__name__}: {error})") from error


def encode_example(vlm: VLM, example: Example) -> Prompt:
    """The example as a prompt of this model; UserError naming file and line where it cannot be one.

    The first 512 MB of prompts are kept: epochs over a small set of small pictures should not open each every time.
    """
    if example in vlm.prompts:
        return vlm.prompts[example]
    images = [open_image(path, example.where) for path in example.images]
    try:
        prompt = encode(vlm, example.text, images, example.history)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    vlm.room -= prompt.ids.nbytes + sum(x.nbytes for x in prompt.images.values())
    if vlm.room > 0:
        vlm.prompts[example] = prompt
    return prompt


# ---------------------------------------------------------------------------------------------- models behind a URL


@dataclass(frozen=True)
class Endpoint:
    """A model on an OpenAI-compatible server (vLLM, SGLang, a vendor). url: its base, as http://localhost:8000/v1.

    timeout: seconds that one attempt may take; limit: seconds after which no further attempt is made; pause: seconds
    before the second attempt, twice that before the third, ...; workers: calls at a time.
    refused collects the sampling settings that the server turned out not to take.
    """
    model: str
    url: str
    timeout: float = 120.0
    limit: float = 600.0
    pause: float = 1.0
    workers: int = 16
    refused: set = field(default_factory=set, compare=False)


KEY = "OPENAI_API_KEY"                                             # the only place an API key is read from; never logged
OPTIONAL = ("top_k", "top_p", "repetition_penalty", "seed", "n", "temperature")      # what servers may not know


class CallFailed(Exception):
    """A call that came to nothing after all its attempts."""


class Refused(CallFailed):
    """The server understood the call and will not do it (HTTP 4xx): asking again is no use. args: status, text."""


class Busy(Exception):
    """HTTP 429 or 5xx: may pass. `after`: the server's Retry-After, or None."""
    def __init__(self, status: int, after: str | None):
        super().__init__(f"HTTP {status}")
        self.after = after


PASSING = (Busy, OSError, ValueError, http.client.HTTPException)    # what may go well another time


class StayHere(urllib.request.HTTPRedirectHandler):
    """No redirects: they would carry the key to another host."""
    def redirect_request(self, *_):
        return None


def endpoint_of(name: str) -> Endpoint | None:
    """The Endpoint that "model@base_url" means; None for anything else, which is a checkpoint."""
    model, _, url = name.rpartition("@")
    return Endpoint(model, url.rstrip("/")) if model and url.startswith(("http://", "https://")) else None


def attempt(endpoint: Endpoint, path: str, body: dict | None, deadline: float) -> dict:
    """One HTTP request, POST with a body and GET without; the JSON object that came back. Raises one of PASSING for what
    may go well another time, Refused for what will not."""
    request = urllib.request.Request(endpoint.url + path, None if body is None else json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if key := os.environ.get(KEY, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {KEY} holds something that no key can be")
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(StayHere).open(request, timeout=endpoint.timeout) as response:
            pieces = []
            while piece := response.read1(2 ** 16):                # a server that drips must not hold us for ever
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer did not end")
            if (length := response.headers.get("Content-Length")) and int(length) != sum(map(len, pieces)):
                raise ValueError("half an answer")
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace").replace(key or "\0", "***")       # servers may echo it
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise Busy(error.code, error.headers.get("Retry-After")) from error
        raise Refused(error.code, text) from error
    answer = json.loads(b"".join(pieces))
    if not isinstance(answer, dict):
        raise ValueError("not a JSON object")
    return answer


def call(endpoint: Endpoint, path: str, body: dict | None, read):
    """read(answer) of the first attempt that succeeds: `read` raises ValueError for an answer that will not do.

    Between attempts, waits pause, 2 pause, 4 pause, ... seconds, each times a random 0.5 to 1.5 so that callers do not
    come back in step, on top of what Retry-After asks for. Raises CallFailed once `limit` seconds are over, Refused at once.
    """
    start, tries = time.monotonic(), 0
    while True:
        try:
            return read(attempt(endpoint, path, body, time.monotonic() + endpoint.timeout))
        except (*PASSING, LookupError, TypeError, AttributeError) as error:
            after = str(getattr(error, "after", None))
            wait = endpoint.pause * 2 ** tries * random.uniform(0.5, 1.5) + (float(after) if after.isdigit() else 0)
            tries += 1
            if time.monotonic() + wait - start > endpoint.limit:
                raise CallFailed(f"{endpoint.url}: no good answer in {tries} attempts; the last: {error}") from error
            time.sleep(wait)


def check_endpoint(endpoint: Endpoint):
    """UserError unless the server is up, takes our key and serves this model. A server without /models is believed; one
    that lists other models is asked for one token of ours, as some load models when asked."""
    def ask(path, body=None):                                      # the answer, or {} where the server gives none
        try:
            return attempt(endpoint, path, body, time.monotonic() + endpoint.timeout)
        except Busy:
            return {}
        except Refused as error:
            if error.args[0] == 404 and body:
                raise UserError(f"{endpoint.url} does not serve {endpoint.model}; it serves {', '.join(names[:5])}") from error
            if error.args[0] in (401, 403):
                raise UserError(f"{endpoint.url} " + (f"does not accept the key in the environment variable {KEY}" if
                                os.environ.get(KEY) else f"wants a key: set the environment variable {KEY}")) from error
            return {}
        except PASSING as error:
            raise UserError(f"{endpoint.url}: no server answers there ({getattr(error, 'reason', error)})") from error
    served = ask("/models").get("data")
    names = [str(row.get("id")) for row in served or [] if isinstance(row, dict)]
    hello = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    if names and endpoint.model not in names:
        ask("/chat/completions", hello)


def messages_of(turns: list[dict], images: list[Image.Image]) -> list[dict]:
    """chat_turns as an endpoint wants them: images as PNG data URLs, without loss; plain text as a string."""
    urls = []
    for image in images:
        image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    urls = iter(urls)

    def content(parts):
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return [part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(urls)}} for part in parts]
    return [{"role": turn["role"], "content": content(turn["content"])} for turn in turns]


def chat(endpoint: Endpoint, messages: list[dict], num: int, sampling: Sampling, seed: int) -> list[tuple[str, bool]]:
    """Up to `num` replies to messages (as messages_of makes them), each (text, finished). At least one, or CallFailed.

    A setting that the server refuses is left out from then on, and that is said.
    """
    settings = {"n": num, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}

    def read(answer):
        choices = [(c["message"].get("content") or "", c.get("finish_reason", "stop") == "stop") for c in answer["choices"]]
        if not choices or not all(isinstance(text, str) for text, _ in choices):
            raise ValueError("no choices in it")
        choices = [(text.encode("utf-8", "replace").decode().strip(), stopped) for text, stopped in choices]
        return [(text, stopped and bool(text)) for text, stopped in choices][:num]
    while True:
        body = {"model": endpoint.model, "messages": messages, "max_tokens": sampling.max_new_tokens, "stream": False}
        body |= {name: value for name, value in settings.items() if name not in endpoint.refused}
        if "max_tokens" in endpoint.refused:                       # a newer name for the same thing
            body["max_completion_tokens"] = body.pop("max_tokens")
        try:
            replies = call(endpoint, "/chat/completions", body, read)
        except Refused as error:
            renamed = ("max_tokens",) if re.search("max_completion_tokens|unsupported|unrecognized", error.args[1], re.I) else ()
            blamed = [name for name in (*OPTIONAL, *renamed) if name in body and re.search(rf"\b{name}\b", error.args[1])]
            if error.args[0] not in (400, 422) or not blamed:
                raise CallFailed(f"{endpoint.url} refuses: HTTP {error.args[0]}, {error.args[1][:200]}") from error
            endpoint.refused.update(blamed)
            tqdm.write(f"{endpoint.model}: the server does not take {', '.join(blamed)}; it is asked without")
            continue
        if len(replies) < num and "n" not in endpoint.refused:
            endpoint.refused.add("n")
            tqdm.write(f"{endpoint.model}: the server ignores n; it is asked for one response at a time")
        return replies


# ---------------------------------------------------------------------------------------------- the collection


class Collection:
    """The saved responses: `responses[example id][teacher]` is a list of texts."""

    def __init__(self, path: str, examples: list[Example], forbidden: set[str] = frozenset(), tokenizer=None,
                 longest: int = 0):
        """Read a collection for these examples. A row is {"id", "teacher", "text"}, and may say "finished".

        Left out, and counted: in `unfinished`, responses that are empty or were cut off by a token limit ("finished":
        false); in `overlong`, those of more than `longest` tokens by the student's tokenizer, which it could never say in
        full. `examples` are those that have a response left. UserError when an example has no row at all, or none has a
        response left, and when a response spells one of the `forbidden` image tokens of the student.
        """
        self.responses, self.unfinished, self.overlong = defaultdict(lambda: defaultdict(list)), 0, 0
        named = set()
        for where, row in read_jsonl(path, torn=True):
            text, teacher = row.get("text"), str(row.get("teacher", "teacher"))
            if not isinstance(text, str) or "id" not in row or not is_text(text) or teacher == "student":
                raise UserError(f'{where}: expected a response {{"id": ..., "teacher": ..., "text": ...}}, by no "student"')
            if spelt := [token for token in forbidden if token in text]:
                raise UserError(f"{where}: the response spells {spelt[0]}, which the student reads as an image")
            # a token is at least a byte, so short texts need no counting; one more token ends the turn
            overlong = tokenizer is not None and len(text.encode()) >= longest <= len(tokenizer(
                text, add_special_tokens=False, split_special_tokens=True).input_ids)
            self.unfinished += not row.get("finished", True)
            self.overlong += overlong
            named.add(str(row["id"]))
            if row.get("finished", True) and not overlong:
                self.responses[str(row["id"])][teacher].append(text)
        for example in examples:
            if example.id not in named:
                raise UserError(f"{path}: no response for the question {example.id!r} of {example.where}")
        self.examples = [example for example in examples if example.id in self.responses]
        if not self.examples:
            raise UserError(f"{path}: no response in it is finished and of less than {longest} tokens")

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
    endpoint = endpoint_of(teacher)
    return Path(endpoint.model if endpoint else teacher).name


def fill_collection(path: str, teachers: list[str | Endpoint], examples: list[Example], num: int, sampling: Sampling,
                    seed: int = 0, batch_size: int = 64, device: str | None = None, dtype: str | None = None):
    """Bring the file to `num` responses of each teacher to each example, sampled with `sampling`; append as they come.

    What is already there under the same example, teacher and sampling settings is kept, so an interrupted fill goes
    on where it stopped; a last line that was not finished is dropped. Every example, and every call of a server, has a
    seed of its own: it comes out the same whether or not there was a stop, from a server that honours seeds.
    """
    names = [teacher_name(t.model if isinstance(t, Endpoint) else t) for t in teachers]
    if len(set(names)) < len(names) or "student" in names:
        raise UserError(f"the teachers are called {', '.join(names)}; rename a folder, so that their responses can be told "
                        "apart, and from the student's")
    settings, have = asdict(sampling), defaultdict(int)            # responses by example, teacher and sampling settings
    if Path(path).exists():
        drop_torn_line(path)
        for _, row in read_jsonl(path):
            have[row.get("id"), row.get("teacher"), json.dumps(row.get("sampling"))] += 1
    lock = threading.Lock()

    def keep(name, example, replies):
        rows = [{"id": example.id, "teacher": name, "text": text, "finished": end, "sampling": settings}
                for text, end in replies]
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    for name, teacher in zip(names, teachers):
        missing = {e.id: num - have[e.id, name, json.dumps(settings)] for e in examples}
        endpoint = teacher if isinstance(teacher, Endpoint) else endpoint_of(teacher)
        fill = fill_from_server if endpoint else fill_from_checkpoint
        if max(missing.values()) > 0:
            fill(endpoint or load_vlm(teacher, device, dtype), name, examples, num, missing, sampling, seed, batch_size,
                 partial(keep, name))
    put_in_order(path, names, examples)


def drop_torn_line(path: str):
    """Cut a file of lines back to its last whole one: a writer that was killed may have left half of one."""
    with open(path, "rb+") as file:
        tail = b""
        end = size = file.seek(0, os.SEEK_END)
        while end and b"\n" not in tail:
            start = max(0, end - 2 ** 16)
            file.seek(start)
            tail, end = file.read(end - start) + tail, start
        last = tail[tail.rfind(b"\n") + 1:]
        try:
            json.loads(last or b"0")
            file.seek(0, os.SEEK_END)
            file.write(b"\n" * bool(last))                         # whole, and only lacks its end
        except ValueError:
            file.truncate(size - len(last))


def fill_from_checkpoint(vlm: VLM, name: str, examples: list[Example], num: int, missing: dict[str, int],
                         sampling: Sampling, seed: int, batch_size: int, keep):
    """Sample `num` responses to every example that misses any, batch_size * num in progress at a time, and
    keep(example, those missing)."""
    todo = [e for e in examples if missing[e.id] > 0]

    def noise(example):                                            # an example's own, whatever else is asked with it
        generator = torch.Generator(vlm.device).manual_seed(zlib.crc32(f"{seed} {name} {example.id}".encode()))
        return torch.rand(num, sampling.max_new_tokens, device=vlm.device, generator=generator)
    done = stream(vlm, (encode_example(vlm, e) for e in todo), map(noise, todo), num, sampling, batch_size * num)
    for i, responses in tqdm(done, f"responses of {name}", len(todo), unit="question"):
        # a response is finished when its last token is a stop token; one that was cut off never is drawn
        ends = [ids[-1].item() in vlm.stop_ids for ids in responses]
        keep(todo[i], list(zip(decode(vlm, responses), ends))[num - missing[todo[i].id]:])


def fill_from_server(endpoint: Endpoint, name: str, examples: list[Example], num: int, missing: dict[str, int],
                     sampling: Sampling, seed: int, batch_size: int, keep):
    """Ask the server for what each example misses, endpoint.workers examples at a time; every answer is on disk before
    the same example is asked again. A call that fails for good is counted and left out: another run asks it again."""
    check_endpoint(endpoint)
    failures, successes = [], 0

    def work(example):                                             # one question, until it has all its responses
        nonlocal successes
        have, images = num - missing[example.id], [open_image(path, example.where) for path in example.images]
        messages = messages_of(chat_turns(example.text, len(images), example.history), images)
        while have < num:
            if not successes and len(failures) >= endpoint.workers:
                return                                             # nothing ever came back: give up, do not try them all
            try:
                replies = chat(endpoint, messages, num - have, sampling,
                               zlib.crc32(f"{seed} {name} {example.id} {have}".encode()))
            except CallFailed as error:
                failures.append(error)
                return
            keep(example, replies)
            have, successes = have + len(replies), successes + 1

    todo = [e for e in examples if missing[e.id] > 0]
    with ThreadPoolExecutor(endpoint.workers) as pool:
        list(tqdm(pool.map(work, todo), f"responses of {name}", len(todo), unit="question"))
    if failures:
        if not successes:
            raise UserError(f"{name}: not one of the first calls went well; the last: {failures[-1]}")
        tqdm.write(f"{name}: {len(failures)} questions still lack responses, run again to ask for them; the last failure: "
                   f"{failures[-1]}")


def put_in_order(path: str, names: list[str], examples: list[Example]):
    """Sort the file by teacher, then example: responses in parallel end in any order. Other rows go first."""
    teacher, example = {n: i for i, n in enumerate(names)}, {e.id: i for i, e in enumerate(examples)}
    lines = [line for line in Path(path).read_bytes().splitlines(keepends=True) if line.strip()]
    rows = [json.loads(line) for line in lines]
    keys = [(teacher.get(r.get("teacher"), -1), example.get(r.get("id"), -1)) for r in rows]
    order = sorted(range(len(lines)), key=lambda i: keys[i])
    if order != list(range(len(lines))):
        write_atomic(path, b"".join(lines[i] for i in order))


# ---------------------------------------------------------------------------------------------- which examples


def select(vlm: VLM, examples: list[Example], num: int, longest: int, seed: int, batch_size: int = 16) -> list[Example]:
    """Choose `num` examples to train on, as the paper picks its 40K: overlong filtering and log-probability sampling.

    Examples whose answer has more than `longest` tokens are dropped, and counted on the console. Of the others, `num`
    are drawn without replacement, one after the other, each time with chances in proportion to
    w = 1 - exp(mean log-prob of the answer's tokens under the student): what it would say anyway teaches it nothing, and
    what it finds impossible, which may be a wrong label, counts no more than what it finds hard. Drawing so is the same
    as taking the `num` largest log w + Gumbel noise, which is what is done. The paper names the two steps and gives no
    formula: the weight is ours. Returned in the order of the file.
    """
    short = [e for e in examples if len(encode_responses(vlm, [[e.truth]]).ids[0, 0]) <= longest]
    print(f"{len(examples) - len(short)} of {len(examples)} examples dropped: answers of more than {longest} tokens")
    rng, keys = random.Random(seed), []
    for i in tqdm(range(0, len(short), batch_size), desc="log-probs", unit="batch"):
        batch = short[i:i + batch_size]
        outputs = encode_responses(vlm, [[e.truth] for e in batch])
        with torch.no_grad():
            logps = score(vlm, [encode_example(vlm, e) for e in batch], outputs).sum((1, 2)) / outputs.mask.sum((1, 2))
        keys += [math.log(max(1e-9, -math.expm1(logp))) - math.log(-math.log(rng.random())) for logp in logps.tolist()]
    chosen = set(sorted(range(len(short)), key=lambda i: -keys[i])[:num])
    return [e for i, e in enumerate(short) if i in chosen]


def write_examples(examples: list[Example], path: str):
    """Write examples as JSONL that load_examples reads back; image paths relative to the file."""
    with open(path, "w", encoding="utf-8") as file:
        for e in examples:
            row = {"id": e.id, "image": [os.path.relpath(image, Path(path).parent) for image in e.images],
                   "question": e.question, "answer": e.truth, "options": e.options, "category": e.category,
                   "history": e.history}
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


# ---------------------------------------------------------------------------------------------- tiny real models


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tiny_vlm(path: str, family: str, texts: list[str], width: int, layers: int, vocabulary: int, seed: int):
    """Save a randomly initialised, tiny but otherwise ordinary checkpoint: family "qwen2_5_vl" or "internvl".

    Its byte-level tokenizer is trained on `texts` and covers any UTF-8 text. One 16 x 16 patch of the image is one
    token: the toy world draws one object to a patch, and a model this small cannot put an object together from parts.
    initializer_range is 0.1 where large models take 0.02, with which so narrow a network hardly starts to learn.
    """
    torch.manual_seed(seed)
    folder, qwen = Path(path), family == "qwen2_5_vl"
    names = ({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
              "vision_end_token": "<|vision_end|>"} if qwen else
             {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>", "start_image_token": "<img>",
              "end_image_token": "</img>"})
    image = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<IMG_CONTEXT>\n"
    alphabet = {char: i for i, char in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
                               extra_special_tokens=names | {"turn_token": "<|im_start|>"})
    tokenizer = tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    tokenizer.save_pretrained(folder)

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=4096,
                initializer_range=0.1, tie_word_embeddings=False, **ends)
    if qwen:
        # mrope_section: how many of the head's 16 rotary frequencies count time, height and width
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
        vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=16, spatial_merge_size=1,
                      out_hidden_size=width, window_size=96, temporal_patch_size=1, fullatt_block_indexes=[0],
                      initializer_range=0.1)
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                                  **{f"{name}_id": i for name, i in ids.items()}, **ends)
        pictures = Qwen2VLImageProcessorPil(patch_size=16, merge_size=1, temporal_patch_size=1,
                                            size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96})
        extra = {"processor_class": "Qwen2_5_VLProcessor"}
    else:
        vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                      image_size=[32, 32], patch_size=[16, 16], initializer_range=0.1)
        config = InternVLConfig(text_config=text | {"model_type": "qwen2"}, vision_config=vision, downsample_ratio=1.0,
                                image_seq_length=4, image_token_id=ids["context_image_token"],
                                tie_word_embeddings=False, **ends)
        pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
        extra = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(extra))


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
    """Fill a collection, or choose examples, from the command line."""
    parser = argparse.ArgumentParser(description="Collect responses of teachers; or choose examples with --select.",
                                     allow_abbrev=False)
    parser.add_argument("--teachers", nargs="+", default=[], help="checkpoint folders, hub ids, or model@http://server/v1")
    parser.add_argument("--data", required=True, help="examples: JSONL, or a JSON list")
    parser.add_argument("--out", required=True, help="the collection, JSONL: what it already holds is kept; or the examples "
                        "chosen")
    parser.add_argument("-n", "--num", type=int, default=16, help="responses of each teacher to each question")
    parser.add_argument("--select", type=int, metavar="K", help="instead: write the K examples that --student learns most "
                        "from, sampled by their log-probability, to --out")
    parser.add_argument("--student", help="checkpoint folder or hub id, for --select")
    parser.add_argument("--skip-bad", action="store_true", help="leave out examples whose image cannot be read")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU")
    add_sampling_options(parser)
    args = parser.parse_args()
    if not args.teachers and not (args.select and args.student):
        parser.error("give --teachers, or --select K and --student")
    if args.select and Path(args.out).exists():
        parser.error(f"--out {args.out} exists")
    examples = load_examples(args.data, args.skip_bad)
    if args.select:
        vlm = load_vlm(args.student, args.device, args.dtype)
        write_examples(select(vlm, examples, args.select, args.max_new_tokens, args.seed, args.batch_size), args.out)
    else:
        fill_collection(args.out, args.teachers, examples, args.num, sampling_of(args), args.seed, args.batch_size,
                        args.device, args.dtype)


if __name__ == "__main__":
    run(main)
