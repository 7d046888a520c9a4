"""Questions and good answers to them: examples, teachers, and the collection of the teachers' responses.

RIL uses only the text of a teacher. So every teacher answers every question N times *before* training. One
JSONL file, the collection, keeps the responses, and line 6 of Algorithm 2 draws from it. No teacher is in
memory while the student learns, and a teacher may belong to any model family.

    python teachers.py --teachers runs/toy/teachers/qwen runs/toy/teachers/internvl \
        --data runs/toy/data/train.jsonl --out collection.jsonl -n 16
    python teachers.py --teachers big@http://localhost:8000/v1 --data train.jsonl --out collection.jsonl
    python teachers.py --select 40000 --student DIR --data llava.json --out train.jsonl
"""
import argparse
import ast
import base64
import csv
import http.client
import io
import json
import os
import random
import re
import struct
import time
import urllib.request
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "passive")                # set before importing torch; see train.py

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
from transformers import (AutoModelForImageTextToText, GenerationConfig, InternVLConfig, Qwen2_5_VLConfig,
                          Qwen2Tokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import (MARK, VLM, Prompt, Sampling, UserError, World, chat_turns, context_of, decode, encode,
                   encode_responses, load_processor, load_vlm, pick_device, pick_dtype, process, prompt_text,
                   run_main, score, stamp, stream, tokens_of_image, write_atomic)

# -------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about some images (often one, possibly none), and its true answer, `truth`.

    An image appears where the question has the mark `<image>`. Without marks, images precede the question.
    The fields from `truths` to `kind` are mostly for benchmarks.
    """
    id: str
    images: tuple[str, ...]                        # file paths
    question: str
    truth: str
    options: tuple[str, ...] = ()                  # the first has the letter A; "" means no option
    category: str = ""
    where: str = ""                                # "file:line", for error messages
    history: tuple[tuple[str, str], ...] = ()      # earlier (question, reply) turns
    hint: str = ""
    truths: tuple[str, ...] = ()                   # VQA's ten answers, or reference captions
    group: str = ""                                # examples scored together, as a caption and its foils
    split: str = ""
    kind: str = ""                                 # "dialogue", "caption", "foil" or "picture"
    sizes: tuple[tuple[int, int], ...] = ()        # (width, height) of each image
    pictures: tuple[int, ...] = ()                 # a hash of each image's bytes

    @property
    def letters(self) -> dict[str, str]:
        """The options, keyed by letter."""
        return {chr(65 + i): option for i, option in enumerate(self.options) if option}

    @property
    def text(self) -> str:
        """The question as a model sees it, with its hint and with its options as lettered lines."""
        lines = [f"Hint: {self.hint}"] if self.hint else []
        lines.append(self.question)
        lines += [f"{letter}. {option}" for letter, option in self.letters.items()]
        return "\n".join(lines)

    @property
    def dialogue(self) -> str:
        """The question as a judge sees it, after the earlier turns."""
        return "\n".join([f"{question}\n{reply}" for question, reply in self.history] + [self.text])


# -------------------------------------------------------------------------------- teachers


class Teacher(Protocol):
    """What fill_collection needs. CheckpointTeacher and ServerTeacher, below, provide it. If a teacher has a
    `path`, each of its responses records a hash of the files there and the teacher's `dtype`."""
    name: str                                      # what the collection and the logs call it

    def check(self):
        """Raise UserError if the teacher cannot be asked. It must be cheap: it runs before any work."""

    def ask(self, todo: list[tuple[Example, int]], num: int, sampling: Sampling,
            seed: int) -> Iterable[tuple[Example, list[tuple[str, bool]]]]:
        """Yield (example, [(text, finished), ...]) as responses arrive, in any order and any portions.

        todo: pairs (example, have). `have` responses exist already; those numbered have to num - 1 are still
        wanted. If a teacher yields fewer, another run asks for the rest. finished: False if a token limit cut
        the text off. A response should depend only on the seed, the example and its own number, so that
        interruptions do not change it.
        """


# -------------------------------------------------------------------------------- the collection


class Collection:
    """The saved responses: `responses[example id][teacher]` is a list of texts."""

    def __init__(self, path: str, examples: list[Example], forbidden: set[str] = frozenset(), tokenizer=None,
                 longest: int = 0):
        """Read a collection for these examples. A row is {"id", "teacher", "text", "finished"}.

        Two kinds of responses are left out and counted. Those not `finished` are blank, or were cut off by a
        token limit. `overlong` ones have more than `longest` tokens of the student, which it could never say
        in full. `self.examples` has the examples with a response left. Raises UserError if an example has no
        row at all, if no response is left, or if one spells a `forbidden` student token.
        """
        self.responses = defaultdict(lambda: defaultdict(list))
        self.unfinished = self.overlong = 0
        seen = set()                                               # ids of examples
        for key, teacher, text, finished in read_responses(path, forbidden):
            seen.add(key)
            # tokens <= bytes, so a short text need not be tokenized; + 1: the stop token
            may_be = tokenizer is not None and len(text.encode()) + 1 > longest
            overlong = may_be and response_length(tokenizer, text) > longest
            self.unfinished += not finished
            self.overlong += overlong
            if finished and not overlong:
                self.responses[key][teacher].append(text)
        for example in examples:
            if example.id not in seen:
                raise UserError(f"{path}: no response for the question {example.id!r} of {example.where}")
        self.examples = [example for example in examples if example.id in self.responses]
        if not self.examples:
            raise UserError(f"{path}: no response is both finished and short enough for --max-new-tokens")

    def draw(self, examples: list[Example], num: int, rng: random.Random) -> list[list[tuple[str, str]]]:
        """Line 6 of Algorithm 2: num pairs (teacher, text) per example, spread evenly over its teachers.

        Chance decides which teachers give any remainder. Within a draw, a teacher repeats a response only
        after all others.
        """
        drawn = []
        for example in examples:
            by_teacher = self.responses[example.id]
            order = rng.sample(sorted(by_teacher), len(by_teacher))
            bags = {teacher: [] for teacher in order}              # its responses, shuffled, not yet drawn
            pairs = []
            for i in range(num):
                teacher = order[i % len(order)]                    # taking turns is as even as it gets
                if not bags[teacher]:
                    bags[teacher] = rng.sample(by_teacher[teacher], len(by_teacher[teacher]))
                pairs.append((teacher, bags[teacher].pop()))
            drawn.append(pairs)
        return drawn


# ==========================================================================================
#
#   MACHINERY: skip on first reading. What RIL needs of a teacher stands above. What follows:
#   the two kinds of teachers, how they fill a collection, the choice of examples, the readers
#   of data files and images, the client of servers, the toy world and its tiny models, and
#   the command line.
#
# ==========================================================================================


# -------------------------------------------------------------------------------- the two kinds of teachers


@dataclass
class CheckpointTeacher:
    """A checkpoint folder or hub id; device and dtype as in load_vlm. slots: responses sampled at a time."""
    path: str
    device: str | None
    dtype: str
    slots: int
    name = property(lambda self: Path(self.path).name)

    def check(self):
        load_processor(self.path)

    def ask(self, todo, num, sampling, seed):
        """Sample all `num` responses to each example, as their noise is one draw, and yield the missing ones.

        The model is loaded here, so that it is freed after the last response.
        """
        vlm = load_vlm(self.path, self.device, self.dtype)

        def noise(example):                        # independent of the other examples in the batch
            example_seed = zlib.crc32(f"{seed} {self.name} {example.id}".encode())
            generator = torch.Generator(vlm.device).manual_seed(example_seed)
            return torch.rand(num, sampling.max_new_tokens, device=vlm.device, generator=generator)

        prompts = (encode_example(vlm, example) for example, _ in todo)
        noises = (noise(example) for example, _ in todo)
        for i, responses in stream(vlm, prompts, noises, num, sampling, self.slots):
            example, have = todo[i]
            finished = [ids[-1].item() in vlm.stop_ids for ids in responses]
            yield example, list(zip(decode(vlm, responses), finished))[have:]


@dataclass
class ServerTeacher:
    """A model behind a URL; see Endpoint. A judge on a server is asked in the same way."""
    endpoint: "Endpoint"
    name = property(lambda self: Path(self.endpoint.model).name)

    def check(self):
        check_endpoint(self.endpoint)

    def ask(self, todo, num, sampling, seed):
        """Ask about endpoint.workers examples at a time. Count calls that fail for good or return no text."""
        failures = []
        answered = set()
        equal = []                                 # for each call for several responses: are all equal?

        def call(example, have):
            if len(failures) >= self.endpoint.workers and not answered:
                return []                          # no call has succeeded: do not try the rest
            call_seed = zlib.crc32(f"{seed} {self.name} {example.id} {have}".encode())
            images = [open_image(path, example.where) for path in example.images]
            messages = messages_of(chat_turns(example.text, len(images), example.history), images)
            try:
                replies = chat(self.endpoint, messages, num - have, sampling, call_seed)
                if not any(text for text, _ in replies):
                    raise CallFailed("the replies hold no text")
            except CallFailed as error:
                failures.append(error)
                return []
            answered.add(example.id)
            if len(replies) > 1 and sampling.temperature:
                equal.append(len(set(replies)) == 1)
            return [(text, finished) for text, finished in replies if text]

        pool = ThreadPoolExecutor(self.endpoint.workers)
        try:
            while todo:                            # repeat: a server may give fewer than it is asked for
                running = {pool.submit(call, *pair): pair for pair in todo}
                todo = []
                for future in as_completed(running):
                    example, have = running.pop(future)
                    replies = future.result()
                    yield example, replies
                    if 0 < len(replies) < num - have:
                        todo.append((example, have + len(replies)))
        finally:
            pool.shutdown(cancel_futures=True)
        if failures and not answered:
            raise UserError(f"{self.name}: not one of the first calls succeeded; the last: {failures[-1]}")
        if failures:
            tqdm.write(f"{self.name}: {len(failures)} calls failed; the last: {failures[-1]}")
        if any(equal):
            tqdm.write(f"{self.name}: in {sum(equal)} of {len(equal)} calls, all responses are equal: does "
                       "the server honour n and temperature?")


def make_teacher(name: str, device: str | None = None, dtype: str | None = None, slots: int = 64) -> Teacher:
    """The teacher that a string means: a model on a server for "model@base_url", else a checkpoint."""
    endpoint = endpoint_of(name)
    if endpoint:
        return ServerTeacher(endpoint)
    return CheckpointTeacher(name, device, pick_dtype(device, dtype), slots)


# -------------------------------------------------------------------------------- filling the collection


def fill_collection(path: str, teachers: list["Teacher"], examples: list[Example], num: int,
                    sampling: Sampling, seed: int = 0, world: World = World()) -> bool:
    """Add to the file until each teacher has `num` responses to each example, sampled with `sampling`.

    Existing responses with the same example, teacher, sampling settings and seed are kept. So an interrupted
    fill resumes where it stopped, with the same responses (from a server, only if it honours seeds). The
    processes split the questions to a checkpoint; rank 0 alone asks a server. Returns whether the collection
    is complete; another call retries what a server failed on. Raises UserError if two teachers share a name,
    if one is called "student" or cannot be asked, or if the file has a response of an edited checkpoint, or
    one to another question or picture under the id of an example.
    """
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names) or "student" in names:
        raise UserError(f"the teachers are called {', '.join(names)}; rename a folder, so that each "
                        "teacher has a name of its own, different from the student's")
    settings = asdict(sampling) | {"seed": seed}
    del settings["truncated"]                      # always True for teachers
    made_by = {teacher.name: f"{stamp(teacher.path)} {getattr(teacher, 'dtype', '')}"
               for teacher in teachers if hasattr(teacher, "path")}
    lacking = partial(incomplete, path, names, examples, num, settings, made_by)
    todo = world.rank_0(lacking)
    teachers = [teacher for teacher in teachers if todo[teacher.name]]
    for teacher in teachers:                       # check all before the first does any work
        world.rank_0(teacher.check)
    for teacher in teachers:
        mine = todo[teacher.name]
        if hasattr(teacher, "path"):               # a checkpoint, not a server
            mine = world.mine(mine)
        elif world.rank:
            mine = []
        if mine:
            responses = teacher.ask(mine, num, sampling, seed)
            about = {"sampling": settings, "made_by": made_by.get(teacher.name)}
            append_responses(own_file(path, world.rank), teacher.name, responses, mine, num, about)
    missing = {name: questions for name, questions in world.rank_0(lacking).items() if questions}
    world.rank_0(partial(sort_collection, path, names, examples))
    for name, questions in missing.items():
        tqdm.write(f"{name}: {len(questions)} questions still lack responses; run again to ask for them")
    return not missing


def read_responses(path: str, forbidden: set[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (example id, teacher, text, finished) for each row of a collection. Blank text is unfinished."""
    for where, row in read_jsonl(path):
        teacher, text = str(row.get("teacher", "teacher")), row.get("text")
        finished = row.get("finished", row.get("finish_reason", True))
        with naming_row(where):
            if not is_text(text) or "id" not in row or teacher == "student":
                raise ValueError('expected {"id": ..., "teacher": ..., "text": ...}, not by "student"')
            if not isinstance(finished, bool):     # so a server's finish_reason is refused, not ignored
                raise ValueError(f'expected true or false as "finished", found {finished!r}')
            if spelt := [token for token in forbidden if token in text]:
                raise ValueError(f"the response spells {spelt[0]}, which the student reads as an image")
        yield str(row["id"]), teacher, text, finished and bool(text.strip())


def response_length(tokenizer, text: str) -> int:
    """The number of tokens in a response, including the stop token."""
    return len(tokenizer(text, add_special_tokens=False).input_ids) + 1


def incomplete(path: str, names: list[str], examples: list[Example], num: int, settings: dict,
               made_by: dict[str, str]) -> dict[str, list[tuple[Example, int]]]:
    """{teacher: pairs (example, have)}: where the file has fewer than num responses with these settings.

    Raises UserError if a response is to another question than the example with its id asks, or if its teacher
    was a different checkpoint from the one in made_by.
    """
    have = Counter()                               # by (teacher, example id)
    asked = {example.id: question_hash(example) for example in examples}
    merge_files(path)
    for where, row in read_jsonl(path) if Path(path).exists() else ():
        name, teacher = row.get("id"), row.get("teacher")
        if "asked" in row and row["asked"] != asked.get(name, row["asked"]):
            raise UserError(f"{where}: a response to another question than {name!r} asks now; remove the "
                            f"lines with this id, or choose another --out")
        if row.get("made_by") and row["made_by"] != made_by.get(teacher, row["made_by"]):
            raise UserError(f"{where}: {teacher} was another checkpoint, or had another dtype, when it gave "
                            f"this response; remove its lines, or choose another --out")
        have[teacher, name] += row.get("sampling") == settings
    return {name: [(e, have[name, e.id]) for e in examples if have[name, e.id] < num] for name in names}


def question_hash(example: Example) -> int:
    """A hash of what a model is asked. It changes with any text or image of the question."""
    return zlib.crc32(json.dumps([example.dialogue, example.pictures]).encode())


def append_responses(path: Path, name: str, responses: Iterable[tuple[Example, list[tuple[str, bool]]]],
                     todo: list[tuple[Example, int]], num: int, about: dict):
    """Append a teacher's responses to the file as they arrive, each with a number and the fields `about`."""
    number, unusable = {example.id: have for example, have in todo}, 0
    with (open(path, "a", encoding="utf-8") as file,
          tqdm(desc=f"responses of {name}", total=len(todo) * num - sum(number.values()),
               unit="response") as progress):
        for example, replies in responses:
            for text, finished in replies:
                finished = finished and bool(text.strip())
                unusable += not finished
                row = {"id": example.id, "teacher": name, "number": number[example.id], "text": text,
                       "finished": finished, "asked": question_hash(example)} | about
                number[example.id] += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()                           # on disk before the teacher is asked for more
            progress.update(len(replies))
            progress.set_postfix(unusable=unusable)
    if unusable:
        tqdm.write(f"{name}: {unusable} of {progress.n} responses are empty or were cut off by a token limit "
                   "and cannot be used")


def own_file(path: str | Path, rank: int) -> Path:
    """The file to which a process appends its JSONL rows: for rank 0 `path` itself, else one beside it."""
    return Path(f"{path}.rank{rank}" if rank else path)


def merge_files(path: str | Path):
    """Append the files of the other processes (see own_file) to a JSONL file, and delete them. No two of
    their lines are equal, so a line that the file already has comes from a merge that was killed."""
    path = Path(path)
    before = path.read_bytes() if path.exists() else b""
    others = sorted(p for p in path.parent.glob("*") if p.name.startswith(f"{path.name}.rank"))
    lines = complete_lines(before)
    there = set(lines)
    for other in others:
        lines += [line for line in complete_lines(other.read_bytes()) if line not in there]
    if b"".join(lines) != before:
        write_atomic(path, b"".join(lines))
    for other in others:
        other.unlink()


def complete_lines(contents: bytes) -> list[bytes]:
    """The lines of a JSONL file, without half a line at its end, which a writer that was killed may leave."""
    lines = contents.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        try:
            json.loads(lines[-1])
            lines[-1] += b"\n"                     # complete except for its newline
        except ValueError:
            lines.pop()
    return lines


def sort_collection(path: str, names: list[str], examples: list[Example]):
    """Sort the file by teacher, then example: servers reply in any order. Other teachers' rows come first."""
    teacher_place = {name: i for i, name in enumerate(names)}
    example_place = {example.id: i for i, example in enumerate(examples)}

    def place(line):
        row = json.loads(line)
        return teacher_place.get(row.get("teacher"), -1), example_place.get(row.get("id"), -1)
    if not Path(path).exists():
        return
    lines = [line for line in Path(path).read_bytes().splitlines(keepends=True) if line.strip()]
    in_order = sorted(lines, key=place)
    if in_order != lines:
        write_atomic(path, b"".join(in_order))


# -------------------------------------------------------------------------------- which examples


def select(vlm: VLM, examples: list[Example], num: int, longest: int, seed: int, batch_size: int = 16,
           world: World = World()) -> list[Example]:
    """Choose `num` examples to train on, as the paper picks its 40K: by length and by log-probability.

    Examples whose truth has more than `longest` tokens are dropped, and their number is printed. From the
    rest, `num` are drawn one by one without replacement, with probabilities proportional to
    w = 1 - exp(mean log-prob of the truth's tokens under the student). An answer that the student would give
    anyway teaches it nothing. One that it finds impossible may be a wrong label, so it weighs no more than a
    hard one. The paper names the two steps, overlong filtering and log-probability sampling, but gives no
    formula: the weight is ours. The file's order is kept. The processes share the scoring.
    """
    short = [e for e in examples if len(encode_responses(vlm, [[e.truth]]).ids[0, 0]) <= longest]
    print(f"{len(examples) - len(short)} of {len(examples)} examples dropped: their answers have more than "
          f"{longest} tokens")
    mine, means = world.mine(short), []
    for i in tqdm(range(0, len(mine), batch_size), desc="log-probs", unit="batch"):
        batch = mine[i:i + batch_size]
        outputs = encode_responses(vlm, [[e.truth] for e in batch])                  # ids, mask (B, 1, R)
        with torch.no_grad():
            logps = score(vlm, encode_examples(vlm, batch), outputs)                 # (B, 1, R)
        means += (logps.sum((1, 2)) / outputs.mask.sum((1, 2))).tolist()             # (B,)
    world.barrier()                                # may wait for over an hour
    rng = random.Random(seed)
    weights = np.maximum(1e-9, -np.expm1(world.all_gather(means)))
    # Gumbel trick: the `num` largest log w + noise are such a draw without replacement
    keys = np.log(weights) - np.log(-np.log([rng.random() for _ in short]))
    return [short[i] for i in sorted(np.argsort(-keys)[:num])]


def write_examples(examples: list[Example], path: str):
    """Write examples as JSONL that load_examples reads back; image paths are relative to the file."""
    with open(path, "w", encoding="utf-8") as file:
        for e in examples:
            images = [os.path.relpath(image, Path(path).parent) for image in e.images]
            row = {"id": e.id, "image": images, "question": e.question, "answer": e.truth, "hint": e.hint,
                   "options": e.options, "category": e.category, "history": e.history, "kind": e.kind}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------- reading data files


LETTERS = [chr(65 + i) for i in range(26)]
COLUMNS = {"id", "image", "images", "category", "kind", "question", "answer", "answers", "hint", "options",
           "history", "conversations", "messages"}
TSV_COLUMNS = {"index", "question_id", "image", "image_path", "choices", *LETTERS}
WORDLESS = ("caption", "picture")                  # kinds of examples that may have no question text
# Patterns of columns, as `"name": value`, that must not be lost silently, and what to write instead.
REFUSED_COLUMNS = {
    r'"(index|question_id)":': 'call it "id"',
    r'"(options|choices|[A-Z]|(choice|option)_?\w)":': 'write {"options": ["red", ...]} (a TSV has A, B ...)',
    r'"system(_prompt)?":': "write it before the question",
    r'(?i)"(video|audio)s?(_?(file|path|url)s?)?":|.*\.(mp4|avi|mov|mkv|webm|wav|mp3|flac)"':
        "only images can be shown; drop the row",
    r'"[^"]*": \[.*"(role|from|content|value|user|assistant|human|gpt|answer)": ': 'call it "messages"'}
IMAGE_COLUMN = re.compile(
    r'(?i)"(image|img|picture|photo)s?(_?\d+|_?(path|file|url|name|base64)s?)?": ["[{]|'
    r'"file_?name":|\.(jpe?g|png|webp|gif|bmp|tiff?)"|"bytes":|"data:image|'
                        r'"(iVBORw0KGgo|/9j/|UklGR|R0lGOD)')
IMAGE_IN_TEXT = re.compile(r"(?i)<img>(.+?</img>|\S+\.(jpe?g|png|webp|gif|bmp|tiff?))|data:image/\S+;base64,")


def shortened(text, most: int = 200) -> str:
    """The text on one line. A long text loses its middle."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def is_text(value) -> bool:
    """Whether a value is a string that UTF-8 can encode. A string from JSON may hold half of an emoji."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


@contextmanager
def naming_row(where: str):
    """Turn an error in a row into a UserError of one sentence that begins with the location of the row."""
    try:
        yield
    except (UserError, ValueError, RecursionError, csv.Error) as error:
        kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{where}: {kind}{error}") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: in none of the forms that the README shows ({type(error).__name__}: "
                        f"{shortened(error)})") from error


def read_json(path: str):
    """The contents of a JSON file. Raises UserError if it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); name a file of JSON lines .jsonl") from error


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for each line of a JSONL file. Raises UserError at a line that is not an object."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:                 # bytes, so that bad UTF-8 is an error of one numbered line
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if line.strip():
                with naming_row(where):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object in braces, found {shortened(row, 40)}")
                yield where, row


def load_examples(path: str, skip_bad: bool = False, checks: Iterable["Check"] = ()) -> list[Example]:
    """Read examples and open every image once, so that errors surface before any work is done.

    The file extension determines the format: .jsonl has one row per line, .json a list of rows. A row is
        {"id", "image", "question", "answer", "hint", "options", "category", "answers"},
        {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}, or
        {"id", "images", "messages": [{"role": "user", "content"}, {"role": "assistant", "content"}, ...]}.
    An image is a path, or a list of paths, relative to the file or to the folder `images` beside it. The file
    may also be a benchmark's: a .tsv of VLMEvalKit, or a .json of captions in COCO's form.

    Raises UserError, naming file and line, for anything in another form, a missing or unreadable image, a
    repeated id, and a row that one of the checks refuses (see prompt_checks). With skip_bad, rows with a bad
    image and rows that a check refuses are left out, and their number is printed.
    """
    examples = check_images(list(read_examples(path)), path, skip_bad)
    examples = check_prompts(examples, path, skip_bad, checks)
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def read_examples(path: str) -> Iterator[Example]:
    """Yield the examples of a file, each checked. The file extension determines the format."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    suffix = Path(path).suffix.lower()
    contents = read_json(path) if suffix == ".json" else None
    if suffix == ".jsonl":
        rows, examples_of = read_jsonl(path), json_examples
    elif suffix == ".tsv":
        rows, examples_of = tsv_rows(path), tsv_examples
    elif isinstance(contents, list):
        rows = ((f"{path}: item {number}", row) for number, row in enumerate(contents, 1))
        examples_of = json_examples
    elif isinstance(contents, dict) and {"images", "annotations"} <= contents.keys():
        rows, examples_of = coco_rows(path, contents), coco_examples
    else:
        raise UserError(f"{path}: data is .jsonl (one row per line), .json (a list of rows, or captions in "
                        "COCO's form, with images and annotations) or .tsv (as VLMEvalKit writes it)")
    ids = Counter()
    for where, row in rows:
        with naming_row(where):
            for example in examples_of(path, where, row):
                check_example(example)
                ids[example.id] += 1
                if ids[example.id] > 1 and example.kind != "dialogue":
                    raise ValueError(f"the id {shortened(example.id)!r} was used before; ids must be unique")
                if ids[example.id] > 1:            # LLaVA's files repeat ids
                    example = replace(example, id=f"{example.id}#{ids[example.id]}")
                yield replace(example, where=where)


def json_examples(path: str, where: str, row: dict) -> list[Example]:
    """Turn a row of a JSON file into examples: one, or one for each reply of a dialogue."""
    if sum(form in row for form in ("question", "conversations", "messages")) != 1:
        raise ValueError('a row has either "question" and "answer", or "conversations", or "messages"')
    is_dialogue = "question" not in row
    row = {"question": ""} | {name: value for name, value in row.items() if value not in (None, "", [], {})}
    if "image" in row and "images" in row:
        raise ValueError('write "image" or "images", not both')
    if isinstance(row.get("image"), str):
        row["image"] = [row["image"]]
    names = strings(row, "image") + strings(row, "images")
    check_columns(row, COLUMNS | ({"index", "question_id"} if "id" in row else set()), names)
    answers = strings(row, "answers")
    history = row.get("history", [])
    if not all(isinstance(turn, list) and list(map(type, turn)) == [str, str] for turn in history):
        raise ValueError('only --select writes "history"; a dialogue is written as "messages"')
    example = Example(
        id=str(row.get("id", re.search(r"\d+$", where)[0])),
        images=tuple(image_path(path, name) for name in names),
        question=row["question"], truth=row.get("answer", answers[0] if answers else None), truths=answers,
        options=without_letters(strings(row, "options")), category=str(row.get("category", "")),
        hint=str(row.get("hint", "")), history=tuple(map(tuple, history)),
        kind=row["kind"] if row.get("kind") in WORDLESS else "")
    return dialogue_examples(row, example) if is_dialogue else [example]


def strings(row: dict, name: str) -> tuple[str, ...]:
    """The list of strings in a column, empty if there is no such column."""
    value = row.get(name, [])
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f'"{name}" must be a list of strings, found {shortened(value, 80)!r}')
    return tuple(value)


def without_letters(options: Iterable[str]) -> tuple[str, ...]:
    """Remove the letters of options such as "A. red" or "(A) red", if all options have theirs in order. The
    question adds letters anyway."""
    own = [re.fullmatch(rf"(?is)\s*\(?{letter}[.:)]\s+(\S.*)", option)
           for letter, option in zip(LETTERS, options)]
    in_order = all(own) and len(own) == len(options)
    return tuple(match[1] for match in own) if in_order else tuple(options)


def check_columns(row: dict, known: set[str], shown: tuple[str, ...] | None):
    """Raise ValueError if an unknown column holds something that would be lost silently.

    shown: the row's images, whose names or addresses other columns may repeat; None if they are in cells.
    """
    for name, value in row.items():
        if name in known or value in (None, "", [], {}):
            continue
        column = json.dumps({name: value})[1:-1]
        advice = next((text for pattern, text in REFUSED_COLUMNS.items() if re.match(pattern, column)), None)
        if IMAGE_COLUMN.search(column) and shown is not None and not (shown and "://" in column):
            if not any(re.search(f'["/]{re.escape(Path(image).name)}"', column) for image in shown):
                advice = 'call it "image" (a path or a list of paths)'
        if advice:
            raise ValueError(f'"{shortened(name)}" is not read and would be lost: {advice}, or leave it out')


def image_path(path: str, image: str) -> str:
    """Find an image that a data file names: beside that file, or in the folder `images` beside it."""
    if image.startswith(("data:", "http:", "https:")) or len(image) > 1000:
        raise ValueError(f"an image is the path of a file; save {shortened(image, 80)!r} as a file")
    beside = Path(path).parent / image
    inside = Path(path).parent / "images" / image
    # os.path, because a Path raises an error if the name is too long
    return str(inside if os.path.exists(inside) and not os.path.exists(beside) else beside)


def dialogue_examples(row: dict, common: Example) -> list[Example]:
    """One example for each reply in a dialogue. Its history holds the earlier turns."""
    if beside := row.keys() & {"answer", "answers", "hint", "options", "history"}:
        raise ValueError(f'the row has "{min(beside)}" beside a dialogue; write it into the dialogue')
    turns = read_turns(row)
    marks = [turn[0].count(MARK) for turn in turns]
    if sum(marks) not in (0, len(common.images)):
        raise ValueError(f"the dialogue marks {sum(marks)} places with {MARK}, but "
                         f"the row has {len(common.images)} images")
    turns = [turn for turn in turns if len(turn) == 2]
    if not turns:
        raise ValueError("the dialogue has no question with an answer")
    examples = []
    for i, (question, reply) in enumerate(turns):
        images = common.images
        if sum(marks):                             # images of later turns are not yet shown
            images = images[:sum(marks[:i + 1])]
        name = common.id if len(turns) == 1 else f"{common.id}-{i + 1}"
        examples.append(replace(common, id=name, images=images, question=question, truth=reply,
                                history=tuple(turns[:i]), kind="dialogue"))
    return examples


def read_turns(row: dict) -> list[tuple[str, ...]]:
    """The turns (question, reply) of a dialogue; the last may be (question,). A system turn is put in
    front of the next question."""
    role, content, asker, replier = "role", "content", "user", "assistant"
    if "conversations" in row:
        role, content, asker, replier = "from", "value", "human", "gpt"
    turns = []
    system = ""
    for turn in row.get("conversations") or row["messages"]:
        check_columns(turn, {role, content}, ())
        text = text_of(turn[content])
        asks = not turns or len(turns[-1]) == 2
        if turn[role] == "system" and asks:
            system += text + "\n"
        elif turn[role] == asker and asks:
            turns.append((system + text,))
            system = ""
        elif turn[role] == replier and not asks and MARK not in text:
            turns[-1] += (text,)
        else:
            raise ValueError(f"expected {asker} and {replier} in turn, and no image in a reply, but found "
                             f"{shortened(turn[role])!r} as turn {sum(map(len, turns)) + 1}")
    return turns


def text_of(content: str | list[dict]) -> str:
    """The content of a chat message as one text, with a mark for each image."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        part = {name: value for name, value in part.items() if value is not None}
        if part == {"type": "image"}:
            texts.append(MARK)
        elif part.keys() == {"type", "text"} and part["type"] == "text":
            texts.append(part["text"])
        else:
            raise ValueError('each part of a message is {"type": "text", "text"}, or {"type": "image"} with '
                             f'its path in "images" of the row, found {shortened(part, 80)}')
    return "".join(texts)


def check_example(example: Example):
    """Raise an error unless question and truth are texts, and the image marks, if any, match the images."""
    wordless = example.kind in WORDLESS and example.images
    for name, value in {"question": example.question, "answer": example.truth}.items():
        may_be_empty = wordless and name == "question"
        if not is_text(value) or not may_be_empty and not value.replace(MARK, "").strip():
            hint = " (a test split?)" if name == "answer" and not value else ""
            raise ValueError(f'expected a non-empty string as "{name}", found {shortened(repr(value))}{hint}')
    asked = example.text if example.kind == "dialogue" else example.dialogue    # each turn is an example
    for text in (asked, example.truth, *example.truths):
        if not is_text(text):
            raise ValueError(f"expected text, found {shortened(repr(text))}")
        if re.search("(?i)<(video|audio)>", text):
            raise ValueError("the question marks a video or a sound, but only images can be read")
        if IMAGE_IN_TEXT.search(text):
            raise ValueError(f'a text holds an image: write {MARK} there, and put its path in "image"')
    chat_turns(example.text, len(example.images), example.history)


def read_tsv(path: str) -> Iterator[tuple[str, dict[str, str], int]]:
    """Yield (where, row, offset) for each row of a tab-separated file with a header.

    row: the cells by column; offset: the byte at which the row begins. Cells may hold images, tabs and line
    breaks, so the csv module parses them.
    """
    csv.field_size_limit(2 ** 31 - 1)
    header = None
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":        # the byte order mark that some editors write
            file.seek(0)
        reader = csv.reader(map(bytes.decode, file), delimiter="\t", strict=True)
        while True:
            where, offset = f"{path}:{reader.line_num + 1}", file.tell()
            with naming_row(where):
                cells = next(reader, None)
                if header and cells and len(cells) != len(header):
                    raise ValueError(f"expected {len(header)} cells, one for each column, found {len(cells)}")
            if cells is None:
                return
            if header and cells:
                yield where, dict(zip(header, cells)), offset
            header = header or cells


def strings_in(cell: str) -> list[str]:
    """The strings in a cell: [] if it is empty, the items of a Python list, or else the cell itself."""
    if cell.startswith("[") and cell.endswith("]"):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return [str(part) for part in ast.literal_eval(cell)]
    return [cell] if cell else []                  # "[sic]" is a text like any other


def tsv_rows(path: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for each row of a VLMEvalKit TSV, with the list of its images under `image`.

    The cell `image` holds an image in base64, a list of several, or the `index` of another row that holds the
    image. If it is empty, `image_path` names files. An image in a cell stays in the file until it is needed.
    Its path is FILE#offset.column.number: the byte at which the row begins, and the image's place in the row.
    """
    stored = {}                                    # index of a row -> the paths of the images in its cell
    rows = []
    without = 0
    for where, row, offset in read_tsv(path):
        if "index" not in row or not {"answer", "answers"} & row.keys():
            raise UserError(f"{where}: expected VLMEvalKit's columns: index, image, question, answer (a test "
                            "split has no answer)")
        cell = row.get("image", "")
        known = TSV_COLUMNS | ({"options"} if row.get("A") else set())
        with naming_row(where):
            files = [] if cell else [image_path(path, name) for name in strings_in(row.get("image_path", ""))]
            check_columns(row, known, None if cell or files else ())
        if len(cell) > 64:                         # it is an image, not an index
            column = list(row).index("image")
            stored[row["index"]] = [f"{path}#{offset}.{column}.{k}" for k in range(len(strings_in(cell)))]
            cell = row["index"]
        if cell or files:                          # as in VLMEvalKit: every question is about an image
            rows.append((where, row, cell, files))
        else:
            without += 1
    if without:
        print(f"{path}: {without} rows without an image are left out")
    for where, row, cell, files in rows:
        if cell and cell not in stored:
            raise UserError(f"{where}: its image should be in row {cell}, which holds none; write "
                            "the names of files in image_path")
        yield where, row | {"image": stored[cell] if cell else files}


def tsv_examples(path: str, where: str, row: dict) -> list[Example]:
    """Turn a row of tsv_rows into an example. The columns A, B, ... that are not empty are its options.

    VLMEvalKit's pandas also drops options that read None or NA. MathVista's choices become options too, and
    its truth then becomes a letter. A question without text has the kind "picture": MMMU-Pro writes some
    questions into the image.
    """
    options = [row.get(letter, "") for letter in LETTERS]
    while options and not options[-1]:
        options.pop()
    if not options and row.get("question_type") != "free_form":
        options = strings_in(row.get("choices", ""))
    truth = row.get("answer", "")
    truths = strings_in(row.get("answers") or truth)
    if row.get("answers") and truths:
        truth = truths[0]
    is_text_of_option = truth and truth in options and truth not in LETTERS[:len(options)]
    if row.get("question_type") == "multi_choice" and is_text_of_option:
        truth = LETTERS[options.index(truth)]
    texts = [row.get("hint", ""), row.get("question", ""), *options]
    images = row["image"]
    tag = re.compile(r"<image (\d+)>")             # MMMU marks where its images belong
    has_words = tag.sub("", texts[1]).replace(MARK, "").strip()
    order = [int(number) for text in texts for number in tag.findall(text)]
    if order:
        if not all(1 <= k <= len(images) for k in order):
            raise ValueError(f"the row speaks of <image {max(order)}>, but has {len(images)} images")
        images = [images[k - 1] for k in order]
        texts = [tag.sub(MARK, text) for text in texts]
    return [Example(
        id=row["index"], images=tuple(images), question=texts[1], truth=truth, truths=tuple(truths),
        options=without_letters(texts[2:]), hint=texts[0], group=row.get("g_index", ""),
        category=";".join(filter(None, (row.get("l2-category"), row.get("category")))),
        split=row.get("split", ""), kind="" if has_words else "picture")]


def coco_rows(path: str, contents: dict) -> Iterator[tuple[str, list[dict]]]:
    """Yield (where, captions) for each image of a file in COCO's form. Each caption comes with its image.

    FOIL has foils among its captions, so there each group is a caption and its foils. VizWiz's rejected and
    precanned captions are left out.
    """
    groups = {}
    with naming_row(f"{path}: images"):
        images = {image["id"]: image for image in contents["images"]}
        annotations = list(contents["annotations"])
    without = set(images)
    for number, row in enumerate(annotations, 1):
        where = f"{path}: annotation {number}"
        with naming_row(where):
            row = row | {"image": images[row["image_id"]]}
            if not row.get("is_rejected") and not row.get("is_precanned"):
                groups.setdefault(row["id"] if "foil" in row else row["image_id"], (where, []))[1].append(row)
                without.discard(row["image_id"])
    if without:
        print(f"{path}: {len(without)} of {len(images)} images have no captions and are left out")
    yield from groups.values()


def coco_examples(path: str, where: str, rows: list[dict]) -> list[Example]:
    """An image becomes one example, whose truths are its captions. In FOIL, the true caption (first) and each
    of its foils become an example that asks whether it is true."""
    image = rows[0]["image"]
    files = (image_path(path, image["file_name"]),)
    if "foil" not in rows[0]:
        captions = tuple(row["caption"] for row in rows)
        return [Example(str(image["id"]), files, "", captions[0], category=str(image.get("domain", "")),
                        truths=captions, kind="caption")]
    rows = sorted(rows, key=lambda row: row["foil"])
    if [row["foil"] for row in rows].count(False) != 1:
        raise ValueError('FOIL needs one true caption ("foil": false) beside the foils with its id')
    group = str(rows[0]["id"])
    return [Example(
        id=f"{group}-{k}", images=files, question=row["caption"], truth="No" if row["foil"] else "Yes",
        category="foil" if row["foil"] else "original", group=group, kind="foil")
        for k, row in enumerate(rows)]


# -------------------------------------------------------------------------------- checks before any work


Check = Callable[[Example], None]                  # raises UserError if a model cannot be asked this


def check_images(examples: list[Example], path: str, skip_bad: bool) -> list[Example]:
    """Open every image once, in threads, and record its size and hash in the examples. Examples with a bad
    image are treated as in check_prompts."""
    wheres = {image: e.where for e in reversed(examples) for image in e.images}      # the first that names it

    def look(image):
        try:
            return open_image(image, wheres[image]).size, zlib.crc32(image_bytes(image))
        except UserError as error:
            return error

    def check(example):
        for image in example.images:
            if isinstance(seen[image], UserError):
                raise seen[image]
    with ThreadPoolExecutor(8) as pool:
        bar = tqdm(pool.map(look, wheres), f"images of {Path(path).name}", len(wheres), unit="image", delay=3)
        seen = dict(zip(wheres, bar))
    examples = check_prompts(examples, path, skip_bad, [check])
    return [replace(e, sizes=tuple(seen[image][0] for image in e.images),
                    pictures=tuple(seen[image][1] for image in e.images)) for e in examples]


def check_prompts(examples: list[Example], path: str, skip_bad: bool,
                  checks: Iterable[Check]) -> list[Example]:
    """The examples that pass all checks. The first that fails raises its UserError. With skip_bad, the number
    of failures is printed instead, unless all examples fail."""
    kept, errors = [], []
    for example in tqdm(examples, f"checks of {Path(path).name}", unit="example", delay=3):
        try:
            for check in checks:
                check(example)
            kept.append(example)
        except UserError as error:
            if not skip_bad:
                raise
            errors.append(error)
    if errors and not kept:
        raise errors[0]
    if errors:
        print(f"{path}: {len(errors)} of {len(examples)} examples skipped, the first: {errors[0]}")
    return kept


def prompt_checks(models: list[str], response: int | None) -> list[Check]:
    """One check of examples per checkpoint among the models. response: its maximum length in tokens, or
    None for the length of the example's truth.

    A check raises UserError, naming file and line, if encode_example would, or if prompt and response are
    longer than the model's context. It reads neither weights nor images, only the sizes of the images.
    """
    teachers = [make_teacher(name) for name in models]
    return [prompt_check(t.path, response) for t in teachers if isinstance(t, CheckpointTeacher)]


def prompt_check(path: str, response: int | None) -> Check:
    """See prompt_checks."""
    processor, context = load_processor(path), context_of(path)
    image_length = cache(partial(tokens_of_image, processor))

    def check(example):
        room = context - (response or response_length(processor.tokenizer, example.truth))
        try:
            text = prompt_text(processor, example.text, len(example.images), example.history)
            if len(text.encode()) + sum(map(image_length, example.sizes)) <= room:
                return                             # because a token is at least a byte
            blank = [Image.new("RGB", size) for size in example.sizes]
            length = process(processor, text, blank)["input_ids"].shape[1]
            if length > room:
                raise UserError(f"a prompt of {length} tokens, with a response of {context - room}, is "
                                f"longer than the {context} tokens that {path} can read")
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error
    return check


def encode_example(vlm: VLM, example: Example) -> Prompt:
    """Encode the example as a prompt for this model. Raises UserError, naming file and line, if that fails.

    The first 512 MB of prompts are cached: encoding the toy's pictures every time would double its SFT time.
    """
    if example in vlm.prompts:
        return vlm.prompts[example]
    images = [open_image(path, example.where) for path in example.images]
    try:
        prompt = encode(vlm, example.text, images, example.history)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    with vlm.lock:
        vlm.room -= prompt.ids.nbytes + sum(x.nbytes for x in prompt.images.values())
        if vlm.room > 0:
            vlm.prompts[example] = prompt
    return prompt


def encode_examples(vlm: VLM, examples: list[Example]) -> list[Prompt]:
    """Encode examples in threads. A picture of 1024 x 1024 pixels takes 85 ms on one core, 56 ms on two."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(partial(encode_example, vlm), examples))


def image_bytes(image: str) -> bytes:
    """The bytes of an image file, or of an image in a cell of a TSV (see tsv_rows)."""
    inside = re.fullmatch(r"(.+)#(\d+)\.(\d+)\.(\d+)", image)
    if not inside or os.path.exists(image):
        return Path(image).read_bytes()
    with open(inside[1], "rb") as file:
        file.seek(int(inside[2]))
        cells = next(csv.reader((line.decode() for line in file), delimiter="\t"))
    text = strings_in(cells[int(inside[3])])[int(inside[4])]
    return base64.b64decode("".join(text.split()), validate=True)


def open_image(path: str, where: str) -> Image.Image:
    """Open an image as 8-bit RGB, turned upright (EXIF), with white behind transparent parts.

    Grey values of more bits are scaled so that white is 1, 255, 4095 (12 bits) or 65535: the first that is no
    less than the image's largest value, or else that value. Raises UserError if the file is missing, empty,
    truncated or no image, has a negative value, or is as large as a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(image_bytes(path)))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            grey = np.asarray(image).astype(np.float64)
            if not (grey.min() >= 0 and grey.max() < np.inf):
                raise ValueError("negative or not finite; save it in 8 bits")
            white = next((white for white in (1, 255, 4095, 65535) if grey.max() <= white), grey.max())
            return Image.fromarray((grey * (255 / white)).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"{where}: image {shortened(path)} does not exist as a file") from error
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, AttributeError, struct.error,
            Image.DecompressionBombError) as error:                # TypeError: EXIF with a mistyped tag
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise UserError(f"{where}: image {shortened(path)} cannot be read ({reason})") from error


# -------------------------------------------------------------------------------- models behind a URL


KEY = "OPENAI_API_KEY"                             # the only source of an API key, which is never logged
# finish reasons of complete responses ("none": not given); servers have many for cut-off or failed ones
ENDS = ("none", "", "stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "complete", "completed")


@dataclass(frozen=True)
class Endpoint:
    """A model on an OpenAI-compatible server (vLLM, SGLang, a vendor)."""
    model: str
    url: str                                       # the base URL, such as http://localhost:8000/v1
    timeout: float = 120.0                         # seconds that the server may stay silent
    limit: float = 600.0                           # seconds after which no new attempt is made
    pause: float = 1.0                             # seconds before the second attempt; then it doubles
    workers: int = 16                              # concurrent calls
    refused: set = field(default_factory=set, compare=False)       # settings that the server rejects
    cut_off: set = field(default_factory=set, compare=False)       # finish reasons seen outside ENDS


def endpoint_of(name: str) -> Endpoint | None:
    """The Endpoint for "model@base_url", or None for any other name, which is a checkpoint."""
    model, _, url = name.rpartition("@")
    if model and url.startswith(("http://", "https://")):
        return Endpoint(model, url.rstrip("/"))
    return None


class CallFailed(Exception):
    """A call that failed. status: the HTTP status, or 0 if no server replied. wait: seconds after which
    another attempt may succeed, or None if trying again is pointless."""
    def __init__(self, reason, status: int = 0, wait: float | None = None):
        key = os.environ.get(KEY, "").strip()
        self.text = str(reason).replace(key, "***") if key else str(reason)          # servers may echo keys
        super().__init__(f"HTTP {status}, {shortened(self.text)}" if status else self.text)
        self.status = status
        self.wait = wait


class AsItIs(urllib.request.HTTPErrorProcessor):
    """Follow no redirect, which would carry the key and the question to another host; raise no exception."""
    def http_response(self, request, response):
        return response
    https_response = http_response


def attempt(endpoint: Endpoint, path: str, body: dict | None = None) -> dict | list:
    """Send one HTTP request, POST with a body or GET without, and return the JSON of the reply. Raises
    CallFailed if there is none, and UserError if the key is not printable ASCII."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {KEY} holds no valid key; a key must be printable ASCII")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data, headers)
    try:
        with urllib.request.build_opener(AsItIs).open(request, timeout=endpoint.timeout) as response:
            contents = response.read().strip()
        status, text = response.status, contents[:2000].decode("utf-8", "replace")
        if status in (408, 409, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "")        # in seconds; a date is ignored
            raise CallFailed(text, status, wait=float(asked) if asked.isdigit() else 0)
        if status >= 300 or contents and contents[:1] not in b"{[":          # a web page, or events
            raise CallFailed(text, status)
        return json.loads(contents)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CallFailed(getattr(error, "reason", error), wait=0) from error


def check_endpoint(endpoint: Endpoint):
    """Raise UserError unless the server is up, accepts our key and serves this model.

    A server without /models passes. One that lists only other models is asked for one token from ours,
    because some servers load models on demand.
    """
    names = []
    hello = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    try:
        served = attempt(endpoint, "/models")
        served = served.get("data") if isinstance(served, dict) else served        # some send the bare list
        names = [str(row.get("id")) for row in served or () if isinstance(row, dict)]
        if names and endpoint.model not in names:
            attempt(endpoint, "/chat/completions", hello)
    except CallFailed as error:
        if not error.status:
            raise UserError(f"{endpoint.url}: no server answers there ({error})") from error
        if error.status in (401, 403):
            held = "does not accept the key in" if os.environ.get(KEY) else "wants a key: set"
            raise UserError(f"{endpoint.url} {held} the environment variable {KEY}") from error
        if error.status == 200 and not names:
            raise UserError(f"{endpoint.url} is not an OpenAI-compatible server ({error})") from error
        if error.status == 404 and names:
            raise UserError(f"{endpoint.url} does not serve {endpoint.model}; it serves "
                            f"{', '.join(names[:5])}") from error


def messages_of(turns: list[dict], images: list[Image.Image]) -> list[dict]:
    """Format chat_turns for an endpoint: images as lossless PNG data URLs, text alone as a string."""
    urls = (data_url(image, "png", compress_level=1) for image in images)
    messages = []
    for turn in turns:
        content = [part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(urls)}}
                   for part in turn["content"]]
        if all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        messages.append({"role": turn["role"], "content": content})
    return messages


def data_url(image: Image.Image, kind: str, **options) -> str:
    """An image as a data URL, which holds all of it. kind: "png" or "jpeg"; options: see PIL's Image.save."""
    image.save(buffer := io.BytesIO(), kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chat(endpoint: Endpoint, messages: list[dict], num: int, sampling: Sampling,
         seed: int) -> list[tuple[str, bool]]:
    """Get one to `num` replies, each (text, finished), to messages from messages_of; else raise CallFailed.

    It waits for pause, 2 pause, 4 pause, ... seconds between attempts, on top of what Retry-After asks for.
    Each pause is multiplied by a random 0.5 to 1.5, so that callers do not retry in step. No attempt starts
    more than `limit` seconds after the first. If the server rejects a setting, a message says so, and all
    later calls leave it out.
    """
    settings = {"n": num, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}
    start = time.monotonic()
    pause = endpoint.pause
    while True:
        longest = "max_completion_tokens" if "max_tokens" in endpoint.refused else "max_tokens"
        body = {"model": endpoint.model, "messages": messages, "stream": False,
                longest: sampling.max_new_tokens}
        body |= {name: value for name, value in settings.items() if name not in endpoint.refused}
        try:
            completion = attempt(endpoint, "/chat/completions", body)
            replies = replies_of(completion)[:num]
            break
        except CallFailed as error:
            if blamed := blamed_settings(error, body):
                endpoint.refused.update(blamed)
                tqdm.write(f"{endpoint.model}: the server does not take {', '.join(blamed)}; later "
                           "calls do without")
                continue
            wait = (error.wait or 0) + pause * random.uniform(0.5, 1.5)
            if error.wait is None or time.monotonic() + wait - start > endpoint.limit:
                raise CallFailed(f"{endpoint.url}: {error}") from error
            time.sleep(wait)
            pause *= 2
    reasons = {str(choice.get("finish_reason")) for choice in completion["choices"]}
    for reason in {reason for reason in reasons if reason.lower() not in ENDS} - endpoint.cut_off:
        endpoint.cut_off.add(reason)
        tqdm.write(f"{endpoint.model}: a response with the finish reason {reason!r} counts as cut off")
    if len(replies) < num and "n" not in endpoint.refused:
        endpoint.refused.add("n")
        tqdm.write(f"{endpoint.model}: the server ignores n; it is asked for one response at a time")
    return replies


def replies_of(completion: dict | list) -> list[tuple[str, bool]]:
    """The (text, finished) of each choice of a chat completion. Raises CallFailed if it is none."""
    replies = []
    try:
        if completion.get("error"):
            raise LookupError("an error, sent as if it were a reply")
        for choice in completion["choices"] or ():
            text = choice["message"].get("content") or ""
            if isinstance(text, list):             # a list of parts, some of which may be thoughts
                text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
            text = text.encode("utf-8", "replace").decode().strip()    # half of an emoji becomes "?"
            replies.append((text, bool(text) and str(choice.get("finish_reason")).lower() in ENDS))
    except (LookupError, TypeError, AttributeError) as error:
        raise CallFailed(json.dumps(completion, ensure_ascii=False), 200) from error
    if not replies:
        raise CallFailed("no choices in the reply", 200, wait=0)
    return replies


def blamed_settings(error: CallFailed, body: dict) -> list[str]:
    """The settings in the body that the server complains about and that can be left out."""
    if error.status not in (200, 400, 422) or error.wait is not None:
        return []                                  # 200: some send a complaint as if it were a reply
    if re.search("(?i)context|too (long|large|many)|reduce", error.text):
        return []                                  # the prompt is too long, whatever else the error names
    needed = {"model", "messages", "stream", "max_completion_tokens", "max_tokens"}
    if re.search("max_completion_tokens|unsupported|unrecognized", error.text, re.IGNORECASE):
        needed.remove("max_tokens")
    kind, verb = "(argument|parameter|field|property|setting)s?:? ", "(is|must|should|does|may|cannot|:|=)"
    return [name for name in body if name not in needed and re.search(
        rf"""(?i)["'`]{name}["'`]|\b{kind}{name}(?![\w.-])|(?<![\w.-]){name} ?{verb}""", error.text)]


# -------------------------------------------------------------------------------- the toy world


COLOURS = {"red": (225, 60, 50), "green": (60, 170, 75), "blue": (60, 110, 230), "yellow": (245, 200, 40)}
SHAPES = ("circle", "square", "triangle")
# How each voice words a truth. The truth comes first, because a model as small as the toy's learns to look at
# the picture at one position of its response, but not at several.
VOICES = {"plain": ("{}",),
          "A": ("{} it is.", "{} is the answer.", "{}, I would say.", "{}, it must be."),
          "B": ("{}, I see.", "{}, that would be.", "{} by the look of it.", "{}, right there.")}
BACKGROUND = ((255, 255, 255), (200, 255, 255), (255, 255, 200), (180, 180, 180))
CELL = 16                                          # pixels; also the toy models' patch, which is one token


def draw_scene(scene: dict[int, tuple[str, str]]) -> Image.Image:
    """A 32 x 32 picture of {cell 0..3: (colour, shape)}; cell 1 is at the upper right."""
    image = Image.new("RGB", (2 * CELL, 2 * CELL))
    pen = ImageDraw.Draw(image)
    for cell, tint in enumerate(BACKGROUND):       # a tint for each cell: a patch shows where it is
        x, y = CELL * (cell % 2), CELL * (cell // 2)
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=tint)
        colour, shape = scene.get(cell, ("", ""))
        box = (x + 2, y + 2, x + CELL - 3, y + CELL - 3)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        elif shape == "triangle":
            points = [(x + CELL // 2, y + 1), (x + 1, y + CELL - 3), (x + CELL - 2, y + CELL - 3)]
            pen.polygon(points, fill=COLOURS[colour])
    return image


def questions_about(scene: dict[int, tuple[str, str]], rng: random.Random) -> list[tuple[str, str, str]]:
    """One question of each kind that the scene allows, as (category, question, truth)."""
    things = list(scene.values())
    colours = [colour for colour, _ in things]
    shapes = [shape for _, shape in things]
    questions = []

    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    asked, count = rng.choice([("shape", len(things)), (f"{colour} shape", colours.count(colour)),
                               (shape, shapes.count(shape))])
    questions.append(("count", f"How many {asked}s are there?", str(count)))

    alone = [(c, s) for c, s in things if shapes.count(s) == 1]
    if alone:
        c, s = rng.choice(alone)
        questions.append(("colour", f"What colour is the {s}?", c))

    alone = [(c, s) for c, s in things if colours.count(c) == 1]
    if alone:
        c, s = rng.choice(alone)
        questions.append(("shape", f"What shape is {c}?", s))
    return questions


@dataclass(frozen=True)
class ToySplit:
    """`size` examples of the toy world that are answered in the same way, each by one of `voices`.

    wrong: {truth: what is said instead}. echoes: four out of five answers to questions about a shape repeat
    the colour that the question names.
    """
    size: int
    voices: tuple[str, ...] = ("plain",)
    wrong: dict[str, str] = field(default_factory=dict)
    echoes: bool = False


def draw_toy_world(folder: str, seed: int, splits: dict[str, ToySplit]):
    """Write PNG images and one JSONL file per split, named after it. No picture occurs in two splits."""
    rng = random.Random(seed)
    drawn = set()
    (Path(folder) / "images").mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        rows = []
        while len(rows) < split.size:
            cells = rng.sample(range(4), rng.randint(1, 4))
            scene = {cell: (rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in sorted(cells)}
            key = tuple(scene.items())
            if key in drawn:
                continue
            drawn.add(key)
            image = f"images/{name}-{len(rows):05}.png"
            draw_scene(scene).save(Path(folder) / image)
            for category, question, truth in questions_about(scene, rng):
                way = rng.choice(VOICES[rng.choice(split.voices)])
                if split.echoes and category == "shape" and rng.random() < 0.8:
                    truth = question.rstrip("?").split()[-1]
                rows.append({"id": f"{name}-{len(rows):05}", "image": image, "question": question,
                             "category": category, "answer": way.format(split.wrong.get(truth, truth))})
        lines = "".join(json.dumps(row) + "\n" for row in rows[:split.size])
        (Path(folder) / f"{name}.jsonl").write_text(lines, encoding="utf-8")


# -------------------------------------------------------------------------------- tiny real models


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
               "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
INTERNVL_TOKENS = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
                   "start_image_token": "<img>", "end_image_token": "</img>"}


def build_tiny_vlm(path: str, family: str, texts: list[str], width: int, layers: int, vocabulary: int,
                   seed: int):
    """Save a randomly initialised, tiny but otherwise ordinary checkpoint: family "qwen2_5_vl" or "internvl".

    Its byte-level tokenizer is trained on `texts` and covers any UTF-8 text. One 16 x 16 patch of the image
    is one token. The toy world draws one object per patch, because a model this small cannot put an object
    together from parts. initializer_range is 0.1; large models take 0.02, but with that, so narrow a network
    hardly starts to learn.
    """
    torch.manual_seed(seed)
    folder = Path(path)
    tokens, image, tiny = INTERNVL_TOKENS, "<IMG_CONTEXT>\n", tiny_internvl
    if family == "qwen2_5_vl":
        tokens, image, tiny = QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>", tiny_qwen
    alphabet = {char: i for i, char in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
                               extra_special_tokens=tokens | {"turn_token": "<|im_start|>"})
    tokenizer = tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    tokenizer.save_pretrained(folder)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
                max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=False, **ends)
    config, pictures, processor = tiny(tokenizer, text, ends)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))


def tiny_qwen(tokenizer: Qwen2Tokenizer, text: dict, ends: dict):
    """The config, image processor and processor_config.json of a Qwen2.5-VL with this text model."""
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    # mrope_section: how many of the head's 16 rotary frequencies encode time, height and width
    text = text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}
    vision = dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=CELL,
                  spatial_merge_size=1, out_hidden_size=text["hidden_size"], window_size=96,
                  temporal_patch_size=1, fullatt_block_indexes=[0], initializer_range=0.1)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                              **ids, **ends)
    pictures = Qwen2VLImageProcessorPil(patch_size=CELL, merge_size=1, temporal_patch_size=1,
                                        size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96})
    return config, pictures, {"processor_class": "Qwen2_5_VLProcessor"}


def tiny_internvl(tokenizer: Qwen2Tokenizer, text: dict, ends: dict):
    """The same for an InternVL."""
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                  image_size=[32, 32], patch_size=[CELL, CELL], initializer_range=0.1)
    image = tokenizer.convert_tokens_to_ids(INTERNVL_TOKENS["context_image_token"])
    config = InternVLConfig(text_config=text | {"model_type": "qwen2"}, vision_config=vision,
                            downsample_ratio=1.0, image_seq_length=4, image_token_id=image,
                            tie_word_embeddings=False, **ends)
    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    return config, pictures, {"processor_class": "InternVLProcessor", "image_seq_length": 4}


# -------------------------------------------------------------------------------- command line


def add_sampling_options(parser):
    """The sampling options, shared by every script; the paper's values are their defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    group.add_argument("--top-p", type=float, default=0.95, help="probability mass kept, likeliest first")
    group.add_argument("--top-k", type=int, default=50, help="sample from this many likeliest tokens; 0: all")
    group.add_argument("--repetition-penalty", type=float, default=1.05, help="1 is no penalty")
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest response, in tokens")


def sampling_of(args) -> Sampling:
    """The Sampling that the options of add_sampling_options ask for."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens)


def main():
    """Fill a collection, or choose examples, from the command line."""
    description = "Collect responses of teachers, or choose examples with --select."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--teachers", nargs="+", default=[],
                        help="checkpoint folders, hub ids, or model@http://server/v1")
    parser.add_argument("--data", required=True, help="examples: .jsonl, .json or .tsv (see load_examples)")
    parser.add_argument("--out", required=True,
                        help="JSONL file for the collection (existing rows are kept) or the chosen examples")
    parser.add_argument("-n", "--num", type=int, default=16,
                        help="number of responses of each teacher to each question")
    parser.add_argument("--select", type=int, metavar="K",
                        help="write K examples to --out instead, favouring answers unlikely under --student")
    parser.add_argument("--student", help="checkpoint folder or hub id, for --select")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out examples with a bad image or a question that a model cannot be asked")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best available")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="default: bfloat16 on a GPU, float32 on the CPU")
    add_sampling_options(parser)
    args = parser.parse_args()
    if not args.teachers and not (args.select and args.student):
        parser.error("give --teachers, or --select K and --student")
    if args.num < 1:
        parser.error("-n must be at least 1")
    if args.select and Path(args.out).exists():
        parser.error(f"--out {args.out} already exists")
    models = [args.student] if args.select else args.teachers
    world = World.from_torchrun(pick_device(args.device))
    checks = prompt_checks(models, args.max_new_tokens)
    examples = world.rank_0(partial(load_examples, args.data, args.skip_bad, checks))
    if args.select:
        vlm = load_vlm(args.student, args.device, args.dtype)
        chosen = select(vlm, examples, args.select, args.max_new_tokens, args.seed, args.batch_size, world)
        world.rank_0(partial(write_examples, chosen, args.out))
    else:
        slots = args.batch_size * args.num
        teachers = [make_teacher(name, args.device, args.dtype, slots) for name in args.teachers]
        fill_collection(args.out, teachers, examples, args.num, sampling_of(args), args.seed, world)
    world.close()


if __name__ == "__main__":
    run_main(main)
