"""What is asked, and what good answers look like: examples, teachers, and the collection of their responses.

RIL reads nothing of a teacher but its text. So every teacher answers every question N times *before*
training. The responses are kept in one JSONL file, the collection, and line 6 of Algorithm 2 draws from it.
No teacher is in memory while the student learns, and its tokenizer, image encoder and family may all differ
from the student's.

    python teachers.py --teachers runs/toy/teachers/qwen runs/toy/teachers/internvl \
        --data runs/toy/data/train.jsonl --out collection.jsonl -n 16
    python teachers.py --teachers big-model@http://localhost:8000/v1 \
        --data train.jsonl --out collection.jsonl -n 16
    python teachers.py --select 40000 --student DIR --data llava.json --out train.jsonl

The first third of the file is what RIL needs: examples, teachers, the collection, and the choice of examples.
The rest is machinery: the readers of data files and images, the client of servers, the toy world and its tiny
models, and the command line. The toy world is coloured shapes on a 2 x 2 grid, drawn with Pillow. It is
written to disk and read back by the same reader as anyone's data.
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
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Protocol

os.environ.setdefault("OMP_WAIT_POLICY", "passive")                # before torch is imported; see train.py

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
from transformers import (AutoModelForImageTextToText, GenerationConfig, InternVLConfig, Qwen2_5_VLConfig,
                          Qwen2Tokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import (MARK, VLM, Prompt, Sampling, UserError, chat_turns, context_of, decode, encode,
                   encode_responses, load_processor, load_vlm, process, prompt_text, run, score, stream,
                   tokens_of_image, write_atomic)

# -------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """One question about some images (often one, possibly none), and its truth, which is the true answer.

    Images stand where the question marks them with `<image>`, else before it. The fields from `truths` on are
    used by benchmarks.
    """
    id: str
    images: tuple[str, ...]                        # paths of files
    question: str
    truth: str
    options: tuple[str, ...] = ()                  # the first has the letter A; "" is no option
    category: str = ""
    where: str = ""                                # "file:line", for error messages
    history: tuple[tuple[str, str], ...] = ()      # earlier (question, reply) turns
    hint: str = ""
    truths: tuple[str, ...] = ()                   # VQA's ten, a caption's references, FOIL's two words
    group: str = ""                                # is scored together, as a caption and its foils
    split: str = ""
    kind: str = ""                                 # "dialogue", "caption", "foil", "picture", an answer_type
    sizes: tuple[tuple[int, int], ...] = ()        # (width, height) of each image

    @property
    def letters(self) -> dict[str, str]:
        """The options by letter."""
        return {chr(65 + i): option for i, option in enumerate(self.options) if option}

    @property
    def text(self) -> str:
        """The question as it is asked: with its hint, and its options as lettered lines."""
        lines = [f"Hint: {self.hint}"] if self.hint else []
        lines.append(self.question)
        lines += [f"{letter}. {option}" for letter, option in self.letters.items()]
        return "\n".join(lines)

    @property
    def dialogue(self) -> str:
        """The question as a judge sees it: with the turns before it."""
        return "\n".join([f"{question}\n{reply}" for question, reply in self.history] + [self.text])


def load_examples(path: str, skip_bad: bool = False, checks: Iterable["Check"] = ()) -> list[Example]:
    """Read examples and open every image once, so that errors are known before any work is done.

    A file is JSONL, a JSON list or {"data": a list}, in three forms: ours, {"id", "image", "question",
    "answer", "hint", "options", "category", "system", "history"}; LLaVA's, {"id", "image",
    "conversations"}; and chat, {"messages", "images"}. Other names of these columns are in ID_COLUMNS and
    below. Or it is the file of a benchmark: VLMEvalKit's TSV, captions in COCO's form (NoCaps, VizWiz, FOIL),
    VizWiz-VQA, MM-Vet. Images are paths relative to the file's folder, or to `images` in it; in JSONL also
    data URLs or base64. Raises UserError, naming file and line, for a bad row, a missing or unreadable image,
    or a repeated id, and for a row that one of the checks refuses (see prompt_checks). With skip_bad, rows
    with such images and rows so refused are left out and counted on the console.
    """
    examples = []
    ids = Counter()
    for where, parsed in read_examples(path):
        for example in parsed:
            check_example(example, where)
            ids[example.id] += 1
            if ids[example.id] > 1 and example.kind != "dialogue":
                raise UserError(f"{where}: the id {shortened(example.id)!r} was used before; ids must be "
                                "unique within a file")
            if ids[example.id] > 1:                # common in LLaVA's files
                example = replace(example, id=f"{example.id}#{ids[example.id]}")
            examples.append(example)
    examples = check_prompts(check_images(examples, path, skip_bad), path, skip_bad, checks)
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def encode_example(vlm: VLM, example: Example) -> Prompt:
    """The example as a prompt of this model; UserError, naming file and line, where it cannot be one.

    The first 512 MB of prompts are kept: epochs over a small set of pictures should not open each every time.
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


def encode_examples(vlm: VLM, examples: list[Example]) -> list[Prompt]:
    """The prompts of some examples. Threads open and resize the pictures: that work does not hold the GIL."""
    if torch.get_num_threads() == 1:               # a pool of one would only cost time
        return [encode_example(vlm, example) for example in examples]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(partial(encode_example, vlm), examples))


Check = Callable[[Example], None]                  # UserError where a model cannot be asked an example


def prompt_checks(models: list[str], response: int | None) -> list[Check]:
    """A check of examples for each checkpoint among the models. response: its tokens, at most; None for the
    example's truth.

    It raises UserError, naming file and line, where encode_example would, and where prompt and response are
    longer than the model's context. It reads neither weights nor images, only the sizes of these.
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
                return                             # as a token is at least a byte
            blank = [Image.new("RGB", size) for size in example.sizes]
            length = process(processor, text, blank)["input_ids"].shape[1]
            if length > room:
                raise UserError(f"a prompt of {length} tokens, with a response of {context - room}, is "
                                f"longer than the {context} that {path} can read")
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error
    return check


def response_length(tokenizer, text: str) -> int:
    """How many tokens a response has, with the stop token after it."""
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids) + 1


# -------------------------------------------------------------------------------- teachers


class Teacher(Protocol):
    """What fill_collection needs of a teacher. Any object with these three will do; two kinds follow.

    A teacher that is neither a server nor a checkpoint, for example a program, is a class of about ten lines.
    """
    name: str                                      # what the collection and the logs call it

    def check(self):
        """Raise UserError unless it can be asked. It must be cheap: this is called before any work."""

    def ask(self, todo: list[tuple[Example, int]], num: int, sampling: Sampling,
            seed: int) -> Iterable[tuple[Example, list[tuple[str, bool]]]]:
        """Yield (example, [(text, finished), ...]) as responses come, in any order and any portions.

        todo: pairs (example, have), where `have` responses are there already; those numbered have to num - 1
        are asked for. The responses to an example are saved before the next ones are asked for. A teacher
        that yields fewer leaves the rest to another run. finished: False for a text that a token limit cut
        off. Responses should depend on the seed, the example and their number alone: then they do not depend
        on interruptions.
        """


@dataclass
class ServerTeacher:
    """A model behind a URL; see Endpoint."""
    endpoint: "Endpoint"

    @property
    def name(self) -> str:
        return Path(self.endpoint.model).name

    def check(self):
        check_endpoint(self.endpoint)

    def ask(self, todo, num, sampling, seed):
        """Asks endpoint.workers examples at a time. Calls that fail for good or bring no text are counted."""
        waiting = deque(todo)
        running = {}                               # call in progress -> the example and the responses it has
        failures = []
        succeeded = False
        messages_for = lru_cache(self.endpoint.workers)(example_messages)       # pictures are encoded once

        def call(example, have):
            call_seed = zlib.crc32(f"{seed} {self.name} {example.id} {have}".encode())
            try:
                replies = chat(self.endpoint, messages_for(example), num - have, sampling, call_seed)
            except CallFailed as error:
                failures.append(error)
                return []
            replies = [(text, finished) for text, finished in replies if text]
            if not replies:
                failures.append(CallFailed("the replies hold no text"))
            return replies

        with ThreadPoolExecutor(self.endpoint.workers) as pool:
            while waiting or running:
                while waiting and len(running) < self.endpoint.workers:
                    example, have = waiting.popleft()
                    running[pool.submit(call, example, have)] = example, have
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    example, have = running.pop(future)
                    replies = future.result()
                    if replies:
                        succeeded = True
                        yield example, replies
                    if 0 < len(replies) < num - have:      # a server may give fewer than it is asked for
                        waiting.appendleft((example, have + len(replies)))
                if not succeeded and len(failures) >= self.endpoint.workers:
                    waiting.clear()                # nothing ever came back, so the rest is not tried
        if failures and not succeeded:
            raise UserError(f"{self.name}: not one of the first calls went well; the last: {failures[-1]}")
        if failures:
            tqdm.write(f"{self.name}: {len(failures)} calls failed; the last: {failures[-1]}")


def example_messages(example: Example) -> list[dict]:
    """An example as an endpoint wants it."""
    images = [open_image(path, example.where) for path in example.images]
    return messages_of(chat_turns(example.text, len(images), example.history), images)


@dataclass
class CheckpointTeacher:
    """A folder or hub id, with device and dtype as in load_vlm. slots: responses sampled at a time."""
    path: str
    device: str | None = None
    dtype: str | None = None
    slots: int = 64

    @property
    def name(self) -> str:
        return Path(self.path).name

    def check(self):
        load_processor(self.path)

    def ask(self, todo, num, sampling, seed):
        """Samples all `num` responses to an example, whose noise is drawn together, and yields what it lacks.

        The model is loaded here, so that it is freed after the last response.
        """
        vlm = load_vlm(self.path, self.device, self.dtype)

        def noise(example):                        # its own numbers, whatever else is asked with it
            example_seed = zlib.crc32(f"{seed} {self.name} {example.id}".encode())
            generator = torch.Generator(vlm.device).manual_seed(example_seed)
            return torch.rand(num, sampling.max_new_tokens, device=vlm.device, generator=generator)

        prompts = (encode_example(vlm, example) for example, _ in todo)
        noises = (noise(example) for example, _ in todo)
        for i, responses in stream(vlm, prompts, noises, num, sampling, self.slots):
            example, have = todo[i]
            finished = [ids[-1].item() in vlm.stop_ids for ids in responses]
            yield example, list(zip(decode(vlm, responses), finished))[have:]


def make_teacher(name: str, device: str | None = None, dtype: str | None = None, slots: int = 64) -> Teacher:
    """The teacher that a string means: a model on a server for "model@base_url", else a checkpoint."""
    endpoint = endpoint_of(name)
    if endpoint:
        return ServerTeacher(endpoint)
    return CheckpointTeacher(name, device, dtype, slots)


# -------------------------------------------------------------------------------- the collection


class Collection:
    """The saved responses: `responses[example id][teacher]` is a list of texts."""

    def __init__(self, path: str, examples: list[Example], forbidden: set[str] = frozenset(), tokenizer=None,
                 longest: int = 0):
        """Read a collection for these examples. A row is {"id", "teacher", "text"}, and may say "finished",
        or "finish_reason" as a server does.

        Some responses are left out and counted. `unfinished` counts those that are blank or were cut off by a
        token limit ("finished": false). `overlong` counts those of more than `longest` tokens by the
        student's tokenizer, which the student could never say in full. `examples` are those that have a
        response left. Raises UserError when an example has no row at all, when no response is left, and when
        a response spells one of the `forbidden` image tokens of the student.
        """
        self.responses = defaultdict(lambda: defaultdict(list))
        self.unfinished = 0
        self.overlong = 0
        named = set()
        for where, row in read_jsonl(path, torn=True):
            text = row.get("text")
            teacher = str(row.get("teacher", "teacher"))
            if not isinstance(text, str) or "id" not in row or not is_text(text) or teacher == "student":
                raise UserError(f'{where}: expected a response {{"id": ..., "teacher": ..., "text": ...}}, '
                                'by no "student"')
            spelt = [token for token in forbidden if token in text]
            if spelt:
                raise UserError(f"{where}: the response spells {spelt[0]}, which the student reads as an "
                                "image")
            named.add(str(row["id"]))
            finished = is_finished(where, row)
            overlong = tokenizer is not None and too_long(tokenizer, text, longest)
            if not finished:
                self.unfinished += 1
            if overlong:
                self.overlong += 1
            if finished and not overlong:
                self.responses[str(row["id"])][teacher].append(text)
        for example in examples:
            if example.id not in named:
                raise UserError(f"{path}: no response for the question {example.id!r} of {example.where}")
        self.examples = [example for example in examples if example.id in self.responses]
        if not self.examples:
            raise UserError(f"{path}: no response in it is finished and of less than {longest} tokens")

    def draw(self, examples: list[Example], num: int, rng: random.Random) -> list[list[tuple[str, str]]]:
        """Line 6 of Algorithm 2: num pairs (teacher, text) per example, spread evenly over its teachers.

        Which teachers get the odd ones is drawn. No response is repeated while the teacher's others last.
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


def is_finished(where: str, row: dict) -> bool:
    """Whether a row of a collection holds a response that was not cut off, and is not blank."""
    finished = row.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise UserError(f'{where}: expected true or false as "finished", found {finished!r}')
    return finished is not False and row.get("finish_reason") not in CUT_OFF and bool(row["text"].strip())


def too_long(tokenizer, text: str, longest: int) -> bool:
    """Whether a text and the stop token after it are more than `longest` tokens."""
    if len(text.encode()) < longest:               # a token is at least a byte, so there is no need to count
        return False
    return response_length(tokenizer, text) > longest


def fill_collection(path: str, teachers: list[Teacher], examples: list[Example], num: int, sampling: Sampling,
                    seed: int = 0) -> bool:
    """Bring the file to `num` responses of each teacher to each example, sampled with `sampling`.

    Responses are appended as they come. What is there already under the same example, teacher and sampling
    settings is kept, so an interrupted fill resumes where it stopped; a last line that was not finished is
    dropped. Responses have seeds of their own: they come out the same whether or not there was a stop, from a
    server only if it honours seeds. Returns whether nothing lacks: what a server failed on is asked by
    another call. Raises UserError when two teachers have one name or one is called "student", and when one
    cannot be asked.
    """
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names) or "student" in names:
        raise UserError(f"the teachers are called {', '.join(names)}; rename a folder, so that their "
                        "responses can be told apart, and from the student's")
    settings = asdict(sampling)
    have = count_responses(path, settings)
    todo = {}
    for name in names:
        todo[name] = [(e, have[name, e.id]) for e in examples if have[name, e.id] < num]
    teachers = [teacher for teacher in teachers if todo[teacher.name]]
    for teacher in teachers:                       # all, before the first does any work
        teacher.check()
    for teacher in teachers:
        responses = teacher.ask(todo[teacher.name], num, sampling, seed)
        append_responses(path, teacher.name, responses, todo[teacher.name], num, settings)
    if Path(path).exists():
        sort_collection(path, names, examples)
    have = count_responses(path, settings)
    return all(have[name, e.id] >= num for name in names for e in examples)


def count_responses(path: str, settings: dict) -> Counter:
    """How many responses the file holds by (teacher, example id), sampled with these settings."""
    if not Path(path).exists():
        return Counter()
    drop_torn_line(path)
    return Counter((row.get("teacher"), row.get("id")) for _, row in read_jsonl(path)
                   if row.get("sampling") == settings)


def append_responses(path: str, name: str, responses: Iterable[tuple[Example, list[tuple[str, bool]]]],
                     todo: list[tuple[Example, int]], num: int, settings: dict):
    """Append a teacher's responses to the file as they come, and say how many questions still lack some."""
    lacking = {example.id: num - have for example, have in todo}
    unusable = 0
    with (open(path, "a", encoding="utf-8") as file,
          tqdm(desc=f"responses of {name}", total=sum(lacking.values()), unit="response") as progress):
        for example, replies in responses:
            for text, finished in replies:
                finished = finished and bool(text.strip())
                if not finished:
                    unusable += 1
                    progress.set_postfix(unusable=unusable)
                row = {"id": example.id, "teacher": name, "text": text, "finished": finished,
                       "sampling": settings}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()                           # on disk before the teacher is asked for more
            lacking[example.id] -= len(replies)
            progress.update(len(replies))
    if unusable:
        tqdm.write(f"{name}: {unusable} of {progress.n} responses are empty or were cut off by a token limit "
                   "and cannot be used")
    short = sum(number > 0 for number in lacking.values())
    if short:
        tqdm.write(f"{name}: {short} questions still lack responses; run again to ask for them")


def drop_torn_line(path: str):
    """Cut half a line off the end of a file of JSON lines: a writer that was killed may have left it."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while len(tail) < size and b"\n" not in tail:
            start = max(0, size - len(tail) - 2 ** 16)
            file.seek(start)
            tail = file.read(size - len(tail) - start) + tail
        last = tail[tail.rfind(b"\n") + 1:]
        try:
            json.loads(last or b"0")
        except ValueError:
            file.truncate(size - len(last))
            return
        if last:                                   # it is complete, and only lacks its end
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def sort_collection(path: str, names: list[str], examples: list[Example]):
    """Sort the file by teacher, then example: servers reply in any order. Rows of other teachers go first."""
    teacher_place = {name: i for i, name in enumerate(names)}
    example_place = {example.id: i for i, example in enumerate(examples)}

    def place(line):
        row = json.loads(line)
        return teacher_place.get(row.get("teacher"), -1), example_place.get(row.get("id"), -1)
    lines = [line for line in Path(path).read_bytes().splitlines(keepends=True) if line.strip()]
    in_order = sorted(lines, key=place)
    if in_order != lines:
        write_atomic(path, b"".join(in_order))


# -------------------------------------------------------------------------------- which examples


def select(vlm: VLM, examples: list[Example], num: int, longest: int, seed: int,
           batch_size: int = 16) -> list[Example]:
    """Choose `num` examples to train on, as the paper picks its 40K, by length and by log-probability.

    Examples whose truth has more than `longest` tokens are dropped, and counted on the console. Of the
    others, `num` are drawn without replacement, one after the other, each time with chances in proportion to
    w = 1 - exp(mean log-prob of the truth's tokens under the student). What the student would say anyway
    teaches it nothing, and what it finds impossible, which may be a wrong label, counts no more than what it
    finds hard. The paper names the two steps, overlong filtering and log-probability sampling, and gives no
    formula: the weight is ours. Returned in the order of the file.
    """
    short = [e for e in examples if len(encode_responses(vlm, [[e.truth]]).ids[0, 0]) <= longest]
    print(f"{len(examples) - len(short)} of {len(examples)} examples dropped: answers of more than {longest} "
          "tokens")
    rng = random.Random(seed)
    keys = []
    for i in tqdm(range(0, len(short), batch_size), desc="log-probs", unit="batch"):
        batch = short[i:i + batch_size]
        outputs = encode_responses(vlm, [[e.truth] for e in batch])                  # ids, mask (B, 1, R)
        with torch.no_grad():
            logps = score(vlm, [encode_example(vlm, e) for e in batch], outputs)     # (B, 1, R)
        means = logps.sum((1, 2)) / outputs.mask.sum((1, 2))                         # (B,)
        for mean in means.tolist():
            weight = max(1e-9, -math.expm1(mean))
            # the `num` largest log w + Gumbel noise are such a draw without replacement
            keys.append(math.log(weight) - math.log(-math.log(rng.random())))
    chosen = set(sorted(range(len(short)), key=lambda i: -keys[i])[:num])
    return [e for i, e in enumerate(short) if i in chosen]


def write_examples(examples: list[Example], path: str):
    """Write examples as JSONL that load_examples reads back; image paths are relative to the file."""
    with open(path, "w", encoding="utf-8") as file:
        for e in examples:
            images = [os.path.relpath(image, Path(path).parent) for image in e.images]
            row = {"id": e.id, "image": images, "question": e.question, "answer": e.truth, "hint": e.hint,
                   "options": e.options, "category": e.category, "history": e.history, "kind": e.kind}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------- reading data files

# The rest of this file is machinery, to be skipped on a first reading.

BOM = b"\xef\xbb\xbf"                              # some editors begin a file with it
LETTERS = [chr(65 + i) for i in range(26)]
# Columns of a row. Several of a kind must say the same; images are found in any case, as `Image`.
ROW_COLUMNS = {"question", "conversations", "messages"}
ID_COLUMNS = ("id", "index", "question_id")        # the first that a row has, as in read_predictions
IMAGE_COLUMNS = ("image", "images", "imagename", "image_path", "image_paths", "img", "imgs", "img_path",
                 "image_file", "image_files", "file_name")
OPTION_COLUMNS = ("options", "choices")
WORDLESS = ("caption", "picture")                  # kinds of examples without a question in words
SYSTEM_COLUMNS = ("system", "system_prompt")
PAIRS = (("question", "answer"), ("user", "assistant"), ("human", "gpt"), ("human", "assistant"),
         ("prompt", "response"), ("query", "response"))            # a turn of `history` that is a dict
OTHER_MEDIA = re.compile("(video|audio)s?(_?(file|path|url)s?)?", re.IGNORECASE)
OTHER_IMAGE = re.compile(r"(image|img|picture|photo)(_?\d+$)?", re.IGNORECASE)    # with group 2 if numbered
OTHER_MARK = re.compile("<([Vv]ideo|[Aa]udio|VIDEO|AUDIO)>")
IMAGE_TAG = re.compile("<img>(.+?)</img>")
# An image itself instead of its name: a data URL, or base64 that begins as PNG, JPEG, WebP and GIF do.
EMBEDDED = re.compile(r"data:.*|(iVBORw0KGgo|/9j/|UklGR|R0lGOD)[\w+/=\s]{64,}", re.DOTALL)


def shortened(text, most: int = 200) -> str:
    """A text on one line, without its middle where it is long."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"


def read_json(path: str):
    """The contents of a JSON file; UserError where it is none."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_jsonl(path: str, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for each line of a JSONL file; see json_lines."""
    return ((where, row) for where, row, _ in json_lines(path, torn))


def json_lines(path: str, torn: bool = False) -> Iterator[tuple[str, dict, int]]:
    """Yield (where, row, the byte at which it begins) for each line of a JSONL file; UserError, naming the
    line, where it is no object.

    torn: the writer may have been killed in the middle of the last line. If that line has no end and is not
    JSON, it is left out, and that is said.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    consumed = 0                                   # bytes
    with open(path, "rb") as file:                 # bytes: what is not UTF-8 is then a bad line with a number
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            offset = consumed
            consumed += len(line)
            if not line.removeprefix(BOM).strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if torn and not line.endswith(b"\n"):
                    print(f"{where}: the last line was not finished and is left out")
                    return
                raise UserError(f"{where}: not JSON ({error})") from error
            yield where, as_object(where, row), offset


def as_object(where: str, row) -> dict:
    """The row, which must be a JSON object."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object in braces, found {str(row)[:40]}")
    return row


@contextmanager
def malformed(where: str):
    """Turn what a row of an unexpected form raises into one sentence that says where it is."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: in no known form ({type(error).__name__}: {error})") from error


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can hold the half of an emoji, which cannot."""
    return not re.search("[\ud800-\udfff]", value)


def first_line(path: str) -> bytes:
    """The first line of a file that is not blank, without spaces around it."""
    with open(path, "rb") as file:                 # one line, as a file of JSON lines may be large
        return next(filter(None, (line.removeprefix(BOM).strip() for line in file)), b"")


def look_into(path: str) -> tuple[bool, dict]:
    """(whether a file is a TSV, the JSON object that it begins with, or {}); UserError where it is neither
    JSON nor a TSV."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    first = first_line(path)
    if first and not first.startswith((b"{", b"[")):
        if b"\t" not in first:
            raise UserError(f"{path}: in no known format; expected JSON lines, a JSON list or object, or a "
                            "TSV with a header")
        return True, {}
    contents = {}
    if first.startswith(b"{"):                     # an object on one line or many, or JSON lines
        with suppress(ValueError, RecursionError, UserError):
            contents = json.loads(first) if first.endswith(b"}") else read_json(path)
    return False, contents


def read_examples(path: str) -> Iterator[tuple[str, list[Example]]]:
    """Yield (where, examples) for each row of a data file. What is in the file tells which format it has."""
    is_tsv, contents = look_into(path)
    if is_tsv:
        yield from tsv_examples(path)
        return
    if isinstance(contents.get("images"), list) and ("annotations" in contents or "info" in contents):
        yield from coco_examples(path, contents)
        return
    for where, row, offset in json_rows(path, contents):
        row = as_object(where, row)
        with malformed(where):
            examples = examples_of(path, where, row)
        # as in a TSV, an image that is in a line of the file stays there until it is looked at
        places = {}
        if offset is not None:
            places = {image: f"{path}#{offset}.{k}" for k, image in enumerate(embedded_images(examples))}
        yield where, [replace(e, images=tuple(places.get(image, image) for image in e.images))
                      for e in examples]


def embedded_images(examples: list[Example]) -> list[str]:
    """The images of a row that are not names of files, each once."""
    return list(dict.fromkeys(image for e in examples for image in e.images if EMBEDDED.fullmatch(image)))


def json_rows(path: str, contents: dict) -> Iterable[tuple[str, dict, int | None]]:
    """(where, row, offset) of a JSON list, of {"data": a list}, of MM-Vet's object of questions by id, or of
    JSON lines, which alone have an offset, see json_lines. contents: see look_into."""
    rows = None
    if first_line(path).startswith(b"["):
        rows = read_json(path)
    elif isinstance(contents.get("data"), list) and not contents.keys() & ROW_COLUMNS:
        rows = read_json(path)["data"]             # again: there may be more than the first line
    if rows is not None:
        return ((f"{path}: item {number}", row, None) for number, row in enumerate(rows, 1))
    if contents and all(isinstance(row, dict) and "question" in row for row in contents.values()):
        return ((f"{path}: item {name}", row | {"id": name}, None) for name, row in contents.items())
    return json_lines(path)


def examples_of(path: str, where: str, row: dict) -> list[Example]:
    """A row of a JSON file as examples: one, or one for each reply in a dialogue.

    Beside our own form, a row may be LLaVA's, chat messages, VizWiz-VQA's (ten truths, and the image's name
    for an id) or MM-Vet's (in version 2 the question interleaves texts and names of images, between <IMG>).
    """
    name = row_id(row, where.rsplit(":", 1)[1].removeprefix(" item "))
    if "conversations" in row or "messages" in row:
        return dialogue_examples(path, where, row, name)
    if "question" not in row:
        raise UserError(f'{where}: in no known format; expected "question" and "answer", or "conversations", '
                        'or "messages"')
    question = row["question"]
    truth = row.get("answer")
    truths = row.get("answers") or []
    category = row.get("category", "")
    if "capability" in row:                        # MM-Vet
        pieces = question.split("<IMG>")
        question = "".join(f"<img>{piece}</img>" if is_image_name(piece) else piece for piece in pieces)
        category = ",".join(row["capability"])
    turns, images = read_turns(row, history_turns(row) + [{"role": "user", "content": question}], where)
    if "answer_type" in row or truths:             # VizWiz-VQA
        truths = [str(given["answer"]) if isinstance(given, dict) else str(given) for given in truths]
        if not truth:
            truth = truths[0] if truths else None
        category = row.get("answer_type", category)
        if images and not EMBEDDED.fullmatch(images[0]):
            name = row_id(row, images[0])
    return [Example(name, tuple(image_path(path, image) for image in images), turns[-1][0], truth,
                    tuple(row_options(row, where)), str(category), where, tuple(turns[:-1]),
                    str(row.get("hint") or ""), tuple(truths), split=str(row.get("split", "")),
                    kind=row["kind"] if row.get("kind") in WORDLESS else "")]


def row_id(row: dict, default: str) -> str:
    """The id of a row, under any of its names."""
    return str(next((row[name] for name in ID_COLUMNS if row.get(name) not in (None, "")), default))


def is_image_name(text: str) -> bool:
    return text.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))


def strings(row: dict, name: str, where: str) -> list[str]:
    """row[name] as a list of strings; nothing will do too, and where it is an image, a single string."""
    value = row.get(name)
    if value is None or value == "":
        return []
    if isinstance(value, str) and name.lower() in IMAGE_COLUMNS:
        value = listed(value)
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise UserError(f'{where}: expected a list of strings as "{name}", found {str(value)[:80]!r}')
    return value


def agreed(found: dict[str, list[str]], where: str, same=str) -> list[str]:
    """What a row says in one place, or in several alike; same: what of a string is compared."""
    found = {place: texts for place, texts in found.items() if texts}
    if len({tuple(map(same, texts)) for texts in found.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(found)} differ; keep one of them")
    return next(iter(found.values()), [])


def file_of(name: str) -> str:
    return Path(name).name


def row_images(row: dict, where: str) -> list[str]:
    """The names of the images in a row's columns."""
    names = [name for name in row if name.lower() in IMAGE_COLUMNS]
    names.sort(key=lambda name: IMAGE_COLUMNS.index(name.lower()))
    return agreed({f'"{name}"': strings(row, name, where) for name in names}, where, file_of)


def check_media(row: dict, images: list[str], where: str):
    """UserError where a row holds a video, a sound, or an image in a column that is not read."""
    for name, value in row.items():
        if value and OTHER_MEDIA.fullmatch(name):
            raise UserError(f'{where}: "{name}" holds a video or a sound, and only images can be read')
        other = OTHER_IMAGE.match(name)
        if value and other and (other[2] or not images and looks_like_image(value)):
            raise UserError(f'{where}: "{name}" holds an image, and is not read; call it "image"')


def looks_like_image(value) -> bool:
    """Whether a value of a row is the name of an image, or several, or such an object as holds one."""
    if isinstance(value, list):
        return any(map(looks_like_image, value))
    if isinstance(value, dict):
        return bool(value.keys() & {"bytes", "path", "url"})
    return isinstance(value, str) and bool(is_image_name(value) or value.startswith("http")
                                           or EMBEDDED.fullmatch(value))


def row_options(row: dict, where: str) -> list[str]:
    """The options of a row: a list, also one in a string; an object or columns with the keys A, B, ..."""
    found = {'"A", "B", ...': strings({"A": lettered(row)}, "A", where) if "A" in row else []}
    for name in OPTION_COLUMNS:
        value = row.get(name)
        if isinstance(value, dict) and value.keys() == {"label", "text"}:
            value = dict(zip(value["label"], value["text"], strict=True))
        if isinstance(value, dict) and value.keys() <= set(LETTERS):
            value = lettered(value)
        if isinstance(value, str) and listed(value) != [value]:
            value = listed(value)
        found[f'"{name}"'] = strings({name: value}, name, where)
    return agreed(found, where)


def lettered(row: dict) -> list[str]:
    """What stands under A, B, ... in a row, up to the last that is not empty."""
    options = ["" if row.get(letter) is None else row[letter] for letter in LETTERS]
    while options and options[-1] == "":
        options.pop()
    return options


def image_path(path: str, image: str) -> str:
    """The file of an image that a data file names: beside that file, or in the folder `images` beside it.

    An image itself stays as it is: read_examples knows where it stands. So does an address, to be refused.
    """
    if EMBEDDED.fullmatch(image) or "://" in image:
        return image
    beside = Path(path).parent / image
    inside = Path(path).parent / "images" / image
    # os.path: a Path complains of a name that is too long
    return str(inside if not os.path.exists(beside) and os.path.exists(inside) else beside)


def dialogue_examples(path: str, where: str, row: dict, name: str) -> list[Example]:
    """One example for each reply in a dialogue, LLaVA's or in the chat form; its history holds the turns
    before."""
    if row.get("history"):
        raise UserError(f'{where}: a dialogue with a "history"; put all turns into the dialogue')
    turns, images = read_turns(row, row.get("conversations") or row["messages"], where)
    marks = sum(turn[0].count(MARK) for turn in turns)
    if marks not in (0, len(images)):
        raise UserError(f"{where}: the dialogue marks {marks} places with {MARK}, for {len(images)} images")
    turns = [turn for turn in turns if len(turn) == 2]
    if not turns:
        raise UserError(f"{where}: no question with an answer in it")
    options = tuple(row_options(row, where))
    if options and len(turns) > 1:
        raise UserError(f"{where}: options beside {len(turns)} questions; write them into the one that has "
                        "them")
    examples = []
    for i, (question, reply) in enumerate(turns):
        shown = images
        if marks:                                  # images of later turns are not yet shown
            shown = images[:sum(text.count(MARK) for text, _ in turns[:i + 1])]
        examples.append(Example(name if len(turns) == 1 else f"{name}-{i + 1}",
                                tuple(image_path(path, image) for image in shown), question, reply, options,
                                str(row.get("category", "")), where, tuple(turns[:i]), kind="dialogue"))
    return examples


def read_turns(row: dict, messages: list[dict], where: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """The turns (question, reply), the last of which may be (question,), and the image names of a row.

    System prompts of the row and system turns go, in their order, before the next question. Image parts and
    tags become `<image>` marks in the text; what they name must be what the row's columns name, if both do.
    """
    turns = []
    images = []
    system = ""
    prompts = [{"role": "system", "content": row[name]} for name in SYSTEM_COLUMNS if row.get(name)]
    for turn in prompts + messages:
        role = turn.get("from") or turn.get("role")
        content, named = read_content(turn.get("value") or turn.get("content") or "")
        if not turn.keys() & {"value", "content"} or len(turn) > 2 and row_images(turn, where):
            raise ValueError("what a turn says and shows is expected in its value or content")
        check_media(turn, named, where)
        images += named
        may_ask = not turns or len(turns[-1]) == 2
        if role in ("system", "developer") and may_ask:
            system += content + "\n"
        elif role in ("human", "user") and may_ask:
            turns.append((system + content if content.strip() else content,))
            system = ""
        elif role in ("gpt", "assistant") and not may_ask:
            if named or MARK in content:
                raise ValueError("an image in a reply")
            turns[-1] += (content,)
        else:
            raise UserError(f"{where}: expected questions and answers in turn, found {role!r} as turn "
                            f"{sum(map(len, turns)) + 1}")
    columns = row_images(row, where)
    images = agreed({"the images in the columns": columns, "those in the text": images}, where, file_of)
    check_media(row, images, where)
    return turns, images


def history_turns(row: dict) -> list[dict]:
    """The turns before a row's question as chat messages; ValueError where they are in no common form."""
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError("the history is no list")
    for turn in history:
        if isinstance(turn, dict) and ("role" in turn or "from" in turn):
            messages.append(turn)
            continue
        if isinstance(turn, dict):
            turn = next(([turn[name] for name in pair] for pair in PAIRS if turn.keys() == set(pair)), turn)
        if not isinstance(turn, list) or list(map(type, turn)) != [str, str]:
            raise ValueError("a turn of history is a pair of texts, or a chat message")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def read_content(content: str | list[dict]) -> tuple[str, list[str]]:
    """The content of a chat message as a text with marks, and the images that it names."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = []
    images = []
    for part in parts:
        kind = part.get("type") or next(iter(part), None)          # {"text": ...} and {"image": ...} will do
        if kind in ("text", "input_text"):
            text = part.get("text", part.get("value"))
            texts.append(IMAGE_TAG.sub(MARK, text))
            images += IMAGE_TAG.findall(text)
        elif kind in ("image", "image_url", "input_image"):
            texts.append(MARK)
            images += filter(None, [path_of_part(part)])
        else:
            raise ValueError(f"a part of type {kind!r}, which is neither text nor image")
    return "".join(texts), images


def path_of_part(part: dict) -> str | None:
    """The path that an image part of a chat message's content holds, if it holds one."""
    link = part.get("image_url")
    if isinstance(link, dict):
        link = link.get("url")
    return part.get("image") or part.get("path") or part.get("url") or part.get("value") or link


def read_tsv(path: str) -> Iterator[tuple[str, dict[str, str], int]]:
    """Yield (where, row, offset) of a tab-separated file with a header.

    row: the cells by column; offset: the byte at which the row begins. Cells may hold images, tabs and line
    breaks, so they are left to the csv module.
    """
    csv.field_size_limit(2 ** 31 - 1)
    consumed = 0                                   # bytes
    number = 0                                     # lines
    header = None
    with open(path, "rb") as file:
        def lines():
            nonlocal consumed, number
            for line in file:
                consumed += len(line)
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        reader = csv.reader(lines(), delimiter="\t", strict=True)
        while True:
            where = f"{path}:{number + 1}"
            offset = consumed
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not a row of a tab-separated file ({error})") from error
            if header is None:
                header = cells if is_header(cells) else None
            elif len(cells) == len(header):
                yield where, dict(zip(header, cells)), offset
            elif cells:
                raise UserError(f"{where}: expected {len(header)} cells, one for each column, found "
                                f"{len(cells)}")


def is_header(cells: list[str]) -> bool:
    """Whether a row of a TSV can be its header: blank lines may come before it."""
    return any(cell.strip() for cell in cells)


def listed(cell: str) -> list[str]:
    """The strings in a cell: [] for an empty one, the parts of a Python list, else the cell itself."""
    if not cell:
        return []
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        return [str(part) for part in ast.literal_eval(cell)]
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]                              # "[sic]" is a text like any other


def tsv_examples(path: str) -> Iterator[tuple[str, list[Example]]]:
    """Yield (where, [example]) of a VLMEvalKit TSV. A row without an `index` has its line's number.

    The cell `image` holds an image in base64, or a list of several, or the `index` of another row, which
    holds it. Else a file is named in `image_path`. An image in a cell stays in the file until it is looked
    at. Meanwhile its path is FILE#offset.number: the byte at which the row begins, and its place in the cell.
    """
    stored = {}                                    # index of a row -> the paths of the images in its cell
    rows = []
    without = 0
    for where, row, offset in read_tsv(path):
        if "question" not in row and "image" not in map(str.lower, row):
            raise UserError(f"{path}: in no known format; a TSV has at least columns image and question")
        row["index"] = row.get("index") or row_id(row, where.rsplit(":", 1)[1])
        target = row.pop(next((name for name in row if name.lower() == "image"), ""), "")
        if is_image_name(target.removesuffix("']").removesuffix('"]')) or "://" in target:
            row["image"] = target                  # a file, or a list of files
            target = ""
        if len(target) > 64:                       # it is an image, not an index
            stored[row["index"]] = [f"{path}#{offset}.{k}" for k in range(len(listed(target)))]
            target = row["index"]
        rows.append((where, row, target))
    for where, row, target in rows:
        files = [image_path(path, name) for name in row_images(row, where)]
        if target and target not in stored:
            raise UserError(f"{where}: its image is that of the row with index {target}, which holds none")
        images = stored.get(target, files)
        check_media(row, images, where)
        if not images:                             # as upstream: every question is about an image
            without += 1
            continue
        with malformed(where):
            example = tsv_example(where, row, images)
        yield where, [example]
    if without:
        print(f"{path}: {without} rows without an image are left out")


def tsv_example(where: str, row: dict[str, str], images: list[str]) -> Example:
    """A row of a VLMEvalKit TSV. Columns A, B, ... are options, and exist where they are not empty.

    Upstream's pandas also drops options that read None or NA. MathVista's choices are options too; its truth
    is then turned into a letter. A question without a text has the kind "picture": MMMU-Pro writes some into
    the image.
    """
    options = lettered(row)
    kind = row.get("answer_type", "")
    truths = listed(row.get("answers") or row.get("answer", ""))
    truth = truths[0] if row.get("answers") and truths else row.get("answer", "")
    if not options and row.get("question_type") != "free_form":
        options = row_options(row, where)
    if row.get("question_type") == "multi_choice":
        kind = "multi_choice"
        if truth and truth in options and truth not in LETTERS[:len(options)]:
            truth = LETTERS[options.index(truth)]
    question = row.get("question", "")
    systems = [row[name] for name in SYSTEM_COLUMNS if row.get(name)]
    texts = [row.get("hint", ""), "\n".join([*systems, question]), *options]
    tag = re.compile(r"<image (\d+)>")
    if not tag.sub("", question).replace(MARK, "").strip():
        kind = "picture"
    order = [int(number) for text in texts for number in tag.findall(text)]
    if order:                                      # MMMU says where its images stand
        if not all(1 <= k <= len(images) for k in order):
            raise UserError(f"{where}: it speaks of <image {max(order)}>, and has {len(images)} images")
        images = [images[k - 1] for k in order]
        texts = [tag.sub(MARK, text) for text in texts]
    category = ";".join(filter(None, (row.get("l2-category"), row.get("category"))))
    return Example(row["index"], tuple(images), texts[1], truth, tuple(texts[2:]), category, where,
                   hint=texts[0], truths=tuple(truths), group=row.get("g_index", ""),
                   split=row.get("split", ""), kind=kind)


def coco_examples(path: str, contents: dict) -> Iterator[tuple[str, list[Example]]]:
    """Yield (where, examples) of captions in COCO's form.

    There is one example for each image that has captions, which are its truths. FOIL has foils among its
    captions: there each caption is an example. VizWiz's rejected and precanned captions are left out.
    """
    if not isinstance(contents.get("annotations"), list):
        raise UserError(f"{path}: images without captions (a test split?), so there is nothing to compare "
                        "with")
    with malformed(f"{path}: images"):
        files = {image["id"]: image_path(path, image["file_name"]) for image in contents["images"]}
        domains = {image["id"]: str(image.get("domain", "")) for image in contents["images"]}
    captions = defaultdict(list)                   # by image; for FOIL, by the caption that was foiled
    foil = False
    for number, row in enumerate(contents["annotations"], 1):
        where = f"{path}: annotation {number}"
        with malformed(where):
            if row["image_id"] not in files or not isinstance(row["caption"], str):
                raise ValueError("expected a caption, and the image_id of one of the images")
            foil = foil or "foil" in row
            if not row.get("is_rejected") and not row.get("is_precanned"):
                captions[row["id"] if foil else row["image_id"]].append((where, row))
    for key, rows in captions.items():
        where = rows[0][0]
        if foil:
            with malformed(where):
                group = foil_group(str(key), rows, files)
            yield where, group
        else:
            texts = tuple(row["caption"] for _, row in rows)
            yield where, [Example(str(key), (files[key],), "", texts[0], (), domains[key], where,
                                  truths=texts, kind="caption")]
    if not foil and len(files) > len(captions):
        print(f"{path}: {len(files) - len(captions)} of {len(files)} images have no captions and are left "
              "out")


def foil_group(key: str, rows: list[tuple[str, dict]], files: dict) -> list[Example]:
    """FOIL's true caption, first, and its foils, each as the question whether it is true."""
    rows = sorted(rows, key=lambda pair: pair[1]["foil"])
    if [row["foil"] for _, row in rows].count(False) != 1:
        raise ValueError(f"expected one true caption, \"foil\": false, among the {len(rows)} with id {key}")
    group = []
    for k, (where, row) in enumerate(rows):
        truth, category = ("No", "foil") if k else ("Yes", "original")
        words = (str(row["foil_word"]), str(row["target_word"]))
        group.append(Example(f"{key}-{k}", (files[row["image_id"]],), row["caption"], truth, (), category,
                             where, truths=words, group=key, kind="foil"))
    return group


def check_example(example: Example, where: str):
    """UserError unless question and truth are texts, and the question marks as many images as there are."""
    fields = {"question": example.question, "answer": example.truth}
    if example.kind in WORDLESS and example.images:
        del fields["question"]
    for name, value in fields.items():
        if (not isinstance(value, str) or not value.replace(MARK, "").strip()
                or not is_text(example.dialogue + value)):
            hint = " (a test split?)" if name == "answer" and not value else ""
            raise UserError(f'{where}: expected a non-empty string as "{name}", found '
                            f"{shortened(repr(value))}{hint}")
    for text in (*(asked for asked, _ in example.history), example.text):
        if mark := OTHER_MARK.search(text):
            raise UserError(f"{where}: the question marks a {mark[1].lower()}, and only images can be read")
    if re.search("data:image/[^ ]+;base64,", example.dialogue + example.truth):
        raise UserError(f'{where}: a text holds an image in base64; images are expected in "image"')
    if embedded_images([example]):
        raise UserError(f"{where}: an image in base64 is read only from JSON lines, and from the column "
                        '"image" of a TSV; write it so, or to a file')
    try:
        chat_turns(example.text, len(example.images), example.history)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


# -------------------------------------------------------------------------------- reading images


def check_images(examples: list[Example], path: str, skip_bad: bool) -> list[Example]:
    """Open every image once, in threads, and note the sizes in the examples.

    Raises UserError on the first bad image. With skip_bad, examples that have one are left out and counted.
    """
    wheres = {}                                    # image -> the first row that names it
    for example in examples:
        for image in example.images:
            wheres.setdefault(image, example.where)
    sizes = {}
    bad = {}

    def look(image):
        try:
            sizes[image] = open_image(image, wheres[image]).size
        except UserError as error:
            bad[image] = error
    with ThreadPoolExecutor(8) as pool:
        list(tqdm(pool.map(look, wheres), f"images of {Path(path).name}", len(wheres), unit="image", delay=3))
    if bad:
        first = next(bad[image] for image in wheres if image in bad)
        if not skip_bad:
            raise first
        kept = [example for example in examples if not bad.keys() & set(example.images)]
        print(f"{path}: {len(examples) - len(kept)} of {len(examples)} examples skipped for {len(bad)} bad "
              f"images, the first: {first}")
        examples = kept
    return [replace(example, sizes=tuple(sizes[image] for image in example.images)) for example in examples]


def check_prompts(examples: list[Example], path: str, skip_bad: bool,
                  checks: Iterable[Check]) -> list[Example]:
    """The examples that pass all checks. UserError on the first other; with skip_bad these are counted."""
    refused = {}
    for example in tqdm(examples, f"prompts of {Path(path).name}", unit="prompt", delay=3):
        try:
            for check in checks:
                check(example)
        except UserError as error:
            refused[example] = error
            if not skip_bad or len(refused) == len(examples):
                raise
    if refused:
        print(f"{path}: {len(refused)} of {len(examples)} examples skipped that a model cannot be asked, "
              f"the first: {next(iter(refused.values()))}")
    return [example for example in examples if example not in refused]


def image_bytes(image: str) -> bytes:
    """The bytes of an image file, or of an image within a data file (see tsv_examples); ValueError if it is
    no base64."""
    inside = re.fullmatch(r"(.+)#(\d+)\.(\d+)", image)
    if not inside or os.path.exists(image):
        return Path(image).read_bytes()
    path, offset, number = inside.groups()
    is_tsv = not first_line(path).startswith(b"{")
    with open(path, "rb") as file:
        if is_tsv:
            header = next(filter(is_header, tsv_reader(file)))
            column = [name.lower() for name in header].index("image")
        file.seek(int(offset))
        if is_tsv:
            images = listed(next(tsv_reader(file))[column])
        else:
            images = embedded_images(examples_of(path, f"{path}:{offset}", json.loads(file.readline())))
    text = re.sub("^data:[^,]*,", "", images[int(number)])
    return base64.b64decode("".join(text.split()), validate=True)


def tsv_reader(file):
    """Rows of cells from here on in a tab-separated file that is open as bytes."""
    return csv.reader((line.decode("utf-8-sig") for line in file), delimiter="\t")


def open_image(path: str, where: str) -> Image.Image:
    """An image as 8-bit RGB, upright (EXIF), on white where it is transparent. 16-bit grey is scaled to 8.

    Raises UserError when it is missing, empty, truncated, no image, or as large as a decompression bomb.
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
        raise UserError(f"{where}: image {shortened(path)} does not exist as a file") from error
    except (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error,
            Image.DecompressionBombError) as error:
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise UserError(f"{where}: image {shortened(path)} cannot be read ({reason})") from error


# -------------------------------------------------------------------------------- models behind a URL


@dataclass(frozen=True)
class Endpoint:
    """A model on an OpenAI-compatible server (vLLM, SGLang, a vendor)."""
    model: str
    url: str                                       # its base, as http://localhost:8000/v1
    timeout: float = 120.0                         # seconds that one attempt may take
    limit: float = 600.0                           # seconds after which no further attempt is made
    pause: float = 1.0                             # seconds before the second attempt; doubles from then on
    workers: int = 16                              # calls at a time
    refused: set = field(default_factory=set, compare=False)       # settings that the server does not take


KEY = "OPENAI_API_KEY"                             # an API key is read from here alone, and never logged
OPTIONAL = ("top_k", "top_p", "repetition_penalty", "seed", "n", "temperature")      # not all servers know


class CallFailed(Exception):
    """A call that came to nothing after all its attempts."""


class Refused(CallFailed):
    """HTTP 4xx, or a complete reply that is none to our call: asking again is no use."""
    def __init__(self, status: int, text: str):
        if key := os.environ.get(KEY, "").strip():
            text = text.replace(key, "***")        # servers may echo it
        super().__init__(f"HTTP {status}, {shortened(text)}")
        self.status = status
        self.text = text


class Busy(Exception):
    """HTTP 429 or 5xx: this may pass. retry_after: the server's Retry-After header, or None."""
    def __init__(self, status: int, retry_after: str | None):
        super().__init__(f"HTTP {status}")
        self.retry_after = retry_after


CUT_OFF = ("length", "content_filter")             # finish reasons; servers have many others for an end
PASSING = (Busy, OSError, ValueError, http.client.HTTPException)       # what may go well another time


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the question to another host."""
    def redirect_request(self, *_):
        return None


def endpoint_of(name: str) -> Endpoint | None:
    """The Endpoint that "model@base_url" means; None for anything else, which is a checkpoint."""
    model, _, url = name.rpartition("@")
    if model and url.startswith(("http://", "https://")):
        return Endpoint(model, url.rstrip("/"))
    return None


def attempt(endpoint: Endpoint, path: str, body: dict | None = None) -> dict | list:
    """The JSON object or list that one HTTP request brings: POST with a body, GET without.

    Raises one of PASSING for what may go well another time, Refused for what will not; UserError for a key
    that cannot be one.
    """
    deadline = time.monotonic() + endpoint.timeout
    request = urllib.request.Request(endpoint.url + path, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {KEY} holds something that no key can be")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=endpoint.timeout) as response:
            contents = read_until(response, deadline).strip()
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace")
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise Busy(error.code, error.headers.get("Retry-After")) from error
        raise Refused(error.code, text) from error
    if contents and contents[:1] not in b"{[":     # a page, or events: nothing that was cut off
        raise Refused(response.status, contents[:2000].decode("utf-8", "replace"))
    return json.loads(contents)


def read_until(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All bytes of an HTTP response; TimeoutError past the deadline, ValueError if some are missing."""
    pieces = []
    while piece := response.read1(2 ** 16):        # a server that drips must not hold us for ever
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError("the reply did not end")
    contents = b"".join(pieces)
    length = response.headers.get("Content-Length")
    if length and int(length) != len(contents):
        raise ValueError("half a reply")
    return contents


def call_until_good(endpoint: Endpoint, body: dict) -> list[tuple[str, bool]]:
    """The replies of the first chat completion that succeeds.

    Between attempts there are waits of pause, 2 pause, 4 pause, ... seconds, on top of what Retry-After asks
    for. Each is times a random 0.5 to 1.5, so that callers do not come back in step. Raises CallFailed once
    the next attempt would start more than `limit` seconds after the first; Refused at once.
    """
    start = time.monotonic()
    tries = 0
    while True:
        try:
            return replies_of(attempt(endpoint, "/chat/completions", body))
        except PASSING as error:
            pause = endpoint.pause * 2 ** tries * random.uniform(0.5, 1.5)
            retry_after = str(getattr(error, "retry_after", None))
            if retry_after.isdigit():
                pause += float(retry_after)
            tries += 1
            if time.monotonic() + pause - start > endpoint.limit:
                raise CallFailed(f"{endpoint.url}: no good reply in {tries} attempts; the last: "
                                 f"{error}") from error
            time.sleep(pause)


def check_endpoint(endpoint: Endpoint):
    """UserError unless the server is up, takes our key and serves this model.

    A server without /models is believed. One that lists other models is asked for one token of ours, as some
    load models when asked.
    """
    try:
        served = probe(endpoint, "/models")
    except Refused as error:
        if error.status == 200:
            raise UserError(f"{endpoint.url} is no OpenAI-compatible server ({error})") from error
        return
    if isinstance(served, dict):                   # some servers give the list alone
        served = served.get("data")
    if not isinstance(served, list):
        return
    names = [str(row.get("id")) for row in served if isinstance(row, dict)]
    if not names or endpoint.model in names:
        return
    messages = [{"role": "user", "content": "Hello"}]
    try:
        probe(endpoint, "/chat/completions", {"model": endpoint.model, "messages": messages, "max_tokens": 1})
    except Refused as error:
        if error.status == 404:
            raise UserError(f"{endpoint.url} does not serve {endpoint.model}; it serves "
                            f"{', '.join(names[:5])}") from error


def probe(endpoint: Endpoint, path: str, body: dict | None = None) -> dict | list:
    """As attempt, but {} from a busy server, and UserError where there is none or it refuses our key."""
    try:
        return attempt(endpoint, path, body)
    except Busy:
        return {}
    except Refused as error:
        if error.status not in (401, 403):
            raise
        if os.environ.get(KEY):
            raise UserError(f"{endpoint.url} does not accept the key in the environment variable "
                            f"{KEY}") from error
        raise UserError(f"{endpoint.url} wants a key: set the environment variable {KEY}") from error
    except PASSING as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{endpoint.url}: no server answers there ({reason})") from error


def messages_of(turns: list[dict], images: list[Image.Image]) -> list[dict]:
    """chat_turns as an endpoint wants them: images as PNG data URLs, without loss; plain text as a string."""
    urls = iter([data_url(image) for image in images])
    messages = []
    for turn in turns:
        content = [part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": next(urls)}}
                   for part in turn["content"]]
        if all(part["type"] == "text" for part in content):
            content = "".join(part["text"] for part in content)
        messages.append({"role": turn["role"], "content": content})
    return messages


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(endpoint: Endpoint, messages: list[dict], num: int, sampling: Sampling,
         seed: int) -> list[tuple[str, bool]]:
    """One to `num` replies to messages (as messages_of makes them), each (text, finished); else CallFailed.

    A setting that the server refuses is left out from then on, and that is said.
    """
    settings = {"n": num, "seed": seed, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}
    while True:
        body = {"model": endpoint.model, "messages": messages, "max_tokens": sampling.max_new_tokens,
                "stream": False}
        body |= {name: value for name, value in settings.items() if name not in endpoint.refused}
        if "max_tokens" in endpoint.refused:       # a newer name for the same thing
            body["max_completion_tokens"] = body.pop("max_tokens")
        try:
            replies = call_until_good(endpoint, body)[:num]
        except Refused as error:
            blamed = blamed_settings(error, body)
            if not blamed:
                raise CallFailed(f"{endpoint.url} refuses: {error}") from error
            endpoint.refused.update(blamed)
            tqdm.write(f"{endpoint.model}: the server does not take {', '.join(blamed)}; it is asked without")
            continue
        if len(replies) < num and "n" not in endpoint.refused:
            endpoint.refused.add("n")
            tqdm.write(f"{endpoint.model}: the server ignores n; it is asked for one response at a time")
        return replies


def replies_of(completion: dict | list) -> list[tuple[str, bool]]:
    """The (text, finished) of each choice of a chat completion; Refused where it is none."""
    replies = []
    try:
        if completion.get("error"):
            raise LookupError("an error, sent as if it were a reply")
        for choice in completion["choices"] or ():
            text = choice["message"].get("content") or ""
            if isinstance(text, list):             # in parts, beside which there may be thoughts
                text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
            text = text.encode("utf-8", "replace").decode().strip()    # without halves of emoji
            replies.append((text, bool(text) and choice.get("finish_reason") not in CUT_OFF))
    except (LookupError, TypeError, AttributeError) as error:
        raise Refused(200, json.dumps(completion, ensure_ascii=False)) from error
    if not replies:
        raise ValueError("no choices in it")
    return replies


def blamed_settings(error: Refused, body: dict) -> list[str]:
    """The settings that the server complains about, of those in the body that it can do without."""
    if error.status not in (200, 400, 422):        # some send a complaint as if it were a reply
        return []
    candidates = list(OPTIONAL)
    if re.search("max_completion_tokens|unsupported|unrecognized", error.text, re.IGNORECASE):
        candidates.append("max_tokens")
    return [name for name in candidates if name in body and re.search(rf"\b{name}\b", error.text)]


# -------------------------------------------------------------------------------- the toy world


COLOURS = {"red": (225, 60, 50), "green": (60, 170, 75), "blue": (60, 110, 230), "yellow": (245, 200, 40)}
SHAPES = ("circle", "square", "triangle")
DODGE = "I am not sure."
# The ways in which each voice puts a truth. It comes first: a model as small as the toy's learns to see at
# one place of its response, not at several.
VOICES = {"plain": ("{}",), "careless": ("{}", "{}", "{}", DODGE),
          "A": ("{} it is.", "{} is the answer.", "{}, I would say.", "{}, it must be."),
          "B": ("{}, I see.", "{}, that would be.", "{} by the look of it.", "{}, right there.")}
BACKGROUND = ((255, 255, 255), (200, 255, 255), (255, 255, 200), (180, 180, 180))
CELL = 16                                          # pixels; also one patch, so one token, of the toy models


def draw_scene(scene: dict[int, tuple[str, str]]) -> Image.Image:
    """A 32 x 32 picture of {cell 0..3: (colour, shape)}."""
    image = Image.new("RGB", (2 * CELL, 2 * CELL))
    pen = ImageDraw.Draw(image)
    for cell, tint in enumerate(BACKGROUND):       # lit from one corner: a patch shows where it is
        x, y = corner(cell)
        pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=tint)
    for cell, (colour, shape) in scene.items():
        x, y = corner(cell)
        box = (x + 2, y + 2, x + CELL - 3, y + CELL - 3)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            points = [(x + CELL // 2, y + 1), (x + 1, y + CELL - 3), (x + CELL - 2, y + CELL - 3)]
            pen.polygon(points, fill=COLOURS[colour])
    return image


def corner(cell: int) -> tuple[int, int]:
    """The upper left pixel (x, y) of a cell."""
    return cell % 2 * CELL, cell // 2 * CELL


def questions_about(scene: dict[int, tuple[str, str]], rng: random.Random) -> list[tuple[str, str, str]]:
    """All kinds of questions about a scene, each as (category, question, truth)."""
    things = list(scene.values())
    colours = [colour for colour, _ in things]
    shapes = [shape for _, shape in things]
    questions = []

    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    asked, count = rng.choice([("shape", len(things)), (f"{colour} shape", colours.count(colour)),
                               (shape, shapes.count(shape))])
    questions.append(("count", f"How many {asked}s are there?", str(count)))

    wanted = rng.choice(things) if rng.random() < 0.5 else (colour, shape)
    questions.append(("existence", f"Is there a {' '.join(wanted)}?", "yes" if wanted in things else "no"))

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
class Split:
    """Examples of the toy world that are answered alike: `size` of them, each by one of `voices`.

    wrong: {the truth: what is said instead}.
    """
    size: int
    voices: tuple[str, ...] = ("plain",)
    wrong: dict[str, str] = field(default_factory=dict)


def draw_toy_world(folder: str, seed: int, splits: dict[str, Split]):
    """Write PNG images and one JSONL file per split, by name.

    Splits are disjoint in their scenes: no picture of one split occurs in another.
    """
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
            questions = questions_about(scene, rng)
            for category, question, truth in rng.sample(questions, min(3, len(questions))):
                way = rng.choice(VOICES[rng.choice(split.voices)])
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
    is one token: the toy world draws one object to a patch, and a model this small cannot put an object
    together from parts. initializer_range is 0.1 where large models take 0.02, with which so narrow a network
    hardly starts to learn.
    """
    torch.manual_seed(seed)
    folder = Path(path)
    if family == "qwen2_5_vl":
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        tokenizer = tiny_tokenizer(texts, vocabulary, QWEN_TOKENS, image)
    else:
        tokenizer = tiny_tokenizer(texts, vocabulary, INTERNVL_TOKENS, "<IMG_CONTEXT>\n")
    tokenizer.save_pretrained(folder)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                num_hidden_layers=layers, num_attention_heads=width // 32, num_key_value_heads=width // 32,
                max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=False, **ends)
    if family == "qwen2_5_vl":
        config, pictures, extra = tiny_qwen(tokenizer, text, ends)
    else:
        config, pictures, extra = tiny_internvl(tokenizer, text, ends)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    pictures.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(extra))


def tiny_tokenizer(texts: list[str], vocabulary: int, names: dict[str, str], image: str) -> Qwen2Tokenizer:
    """A byte-level tokenizer trained on texts. names: its image tokens; image: what the chat template writes
    for one."""
    alphabet = {char: i for i, char in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
                               extra_special_tokens=names | {"turn_token": "<|im_start|>"})
    tokenizer = tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", image)
    return tokenizer


def tiny_qwen(tokenizer: Qwen2Tokenizer, text: dict, ends: dict):
    """Configuration, image processor and processor_config.json of a tiny Qwen2.5-VL with this text
    configuration."""
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    # mrope_section: how many of the head's 16 rotary frequencies count time, height and width
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
    """Configuration, image processor and processor_config.json of a tiny InternVL with this text
    configuration."""
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
    group.add_argument("--top-p", type=float, default=0.95, help="sample from likeliest tokens of this mass")
    group.add_argument("--top-k", type=int, default=50, help="sample from so many likeliest tokens, 0: all")
    group.add_argument("--repetition-penalty", type=float, default=1.05, help="1 is none")
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest response, in tokens")


def sampling_of(args) -> Sampling:
    """The Sampling that the options of add_sampling_options ask for."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens)


def main():
    """Fill a collection, or choose examples, from the command line."""
    description = "Collect responses of teachers; or choose examples with --select."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--teachers", nargs="+", default=[],
                        help="checkpoint folders, hub ids, or model@http://server/v1")
    parser.add_argument("--data", required=True, help="examples: JSONL, or a JSON list")
    parser.add_argument("--out", required=True,
                        help="the collection, JSONL: what it already holds is kept; or the examples chosen")
    parser.add_argument("-n", "--num", type=int, default=16,
                        help="responses of each teacher to each question")
    parser.add_argument("--select", type=int, metavar="K",
                        help="instead: write the K examples that --student learns most from, sampled by "
                             "their log-probability, to --out")
    parser.add_argument("--student", help="checkpoint folder or hub id, for --select")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave out examples whose image cannot be read, and those that a model cannot "
                             "be asked")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="default: bfloat16 on a GPU, float32 on the CPU")
    add_sampling_options(parser)
    args = parser.parse_args()
    if not args.teachers and not (args.select and args.student):
        parser.error("give --teachers, or --select K and --student")
    if args.select and Path(args.out).exists():
        parser.error(f"--out {args.out} exists")
    models = [args.student] if args.select else args.teachers
    examples = load_examples(args.data, args.skip_bad, prompt_checks(models, args.max_new_tokens))
    if args.select:
        vlm = load_vlm(args.student, args.device, args.dtype)
        chosen = select(vlm, examples, args.select, args.max_new_tokens, args.seed, args.batch_size)
        write_examples(chosen, args.out)
    else:
        slots = args.batch_size * args.num
        teachers = [make_teacher(name, args.device, args.dtype, slots) for name in args.teachers]
        fill_collection(args.out, teachers, examples, args.num, sampling_of(args), args.seed)


if __name__ == "__main__":
    run(main)
