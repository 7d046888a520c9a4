"""A vision-language model as a policy: ask it about a picture, sample from it, score text.

    encode    question, pictures -> prompt     the chat template and the family's own processor
    generate  prompts -> outputs               line 5 of Algorithm 2: G samples of each, with a KV cache
    score     prompts, outputs -> log-probs    what the ratio, the KL and the supervised loss are made of

Two ideas make it cheap. Both come from the same fact: the K responses to a question share one picture and one
prompt. `generate` reads each prompt once, and its samples go on from there, in slots that are handed on as
responses end. `score` does the same in training: one row holds [prompt | o_1 | o_2 | ... | o_K] under a mask
that lets every response see the prompt and itself but not its siblings, so picture and prompt are computed
once per question and not K times.

Notation, here and in every file: B questions, G samples of each side, K responses per question (K = 2G in
RIL: students first, then teachers), P prompt tokens, R response tokens, V vocabulary, d width.
"""
import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial, partialmethod
from itertools import islice, product
from pathlib import Path
from threading import Lock
from typing import Callable, Iterable, Iterator

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed as dist
from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor,
                          AutoTokenizer, DynamicCache, PreTrainedModel, ProcessorMixin)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import chat_template_utils, is_torchvision_available, logging


class UserError(Exception):
    """What the user can mend: one sentence that names file, line and what was expected. Exit code 2."""


@dataclass
class VLM:
    """A model and the processor that speaks for it.

    stop_ids end a response; banned_ids, such as placeholders of images, are never in one (see special_ids).
    packs: whether K responses can share a row, and samples decode in slots (see can_pack). logits are
    cap tanh(scale head(states) / cap), in most families without cap and scale (see find_head).
    """
    model: PreTrainedModel
    processor: ProcessorMixin
    stop_ids: list[int]
    banned_ids: list[int]
    packs: bool = True
    scale: float = 1.0
    cap: float | None = None
    prompts: dict = field(default_factory=dict)                  # prompts encoded before, while there is room
    room: int = 2 ** 29                                            # bytes
    lock: Lock = field(default_factory=Lock)                     # prompts are encoded in threads
    capture: bool = True                                         # decoding as a CUDA graph has not failed yet

    @property
    def device(self):
        return self.model.device

    @property
    def tokenizer(self):
        return tokenizer_of(self.processor)

    @property
    def trunk(self):
        """The model without its vocabulary head."""
        return self.model.base_model


@dataclass
class Prompt:
    """One question, ready for the model: token ids (P,), what the processor made of its images (may be {}),
    and the places of the tokens (A, P): A = 1, or 3 in the Qwen-VL families, whose rotary embedding counts
    time, height and width."""
    ids: Tensor
    images: dict[str, Tensor]
    positions: Tensor


@dataclass
class Outputs:
    """K responses to each of B questions. The mask is made with the tokens, and has the stop token.

    text: B lists of K strings; ids: (B, K, R) long, zero where padded; mask: (B, K, R) bool, True on response
    tokens. tail: of sampled ones, the probability of what top-k and top-p leave out, summed over all tokens.
    """
    text: list[list[str]]
    ids: Tensor
    mask: Tensor
    tail: float = 0.0

    def __getitem__(self, questions: list[int]):
        return Outputs([self.text[b] for b in questions], self.ids[questions], self.mask[questions])


# ---------------------------------------------------------------------------------------------- encode


def encode(vlm: VLM, question: str, images: list[Image.Image],
           history: tuple[tuple[str, str], ...] = ()) -> Prompt:
    """Chat prompt that ends in a question, after the turns of `history`. Images of any sizes, or none.

    Raises UserError where the model cannot be asked that, see prompt_text and process.
    """
    text = prompt_text(vlm.processor, question, len(images), history)
    inputs = process(vlm.processor, text, images)
    ids = inputs.pop("input_ids")                                  # (1, P)
    of_text = ("attention_mask", "mm_token_type_ids", "token_type_ids")
    images = {name: x for name, x in inputs.items() if name not in of_text}
    positions = torch.arange(ids.shape[1])[None]
    if hasattr(vlm.trunk, "get_rope_index"):                       # Qwen-VL: (3, 1, P) and how far it reaches
        is_image = (ids == vlm.model.config.image_token_id).int()
        found, _ = vlm.trunk.get_rope_index(ids, mm_token_type_ids=is_image,
                                            attention_mask=torch.ones_like(ids),
                                            image_grid_thw=images.get("image_grid_thw"))
        positions = found[:, 0]
    return Prompt(ids[0], images, positions)


def encode_responses(vlm: VLM, texts: list[list[str]]) -> Outputs:
    """Responses that came as text (a teacher's, a truth) as tokens, with the stop token. A thought that the
    chat template opens is closed before. Where a text spells a stop or a banned token, it is read as plain
    letters: no response can place an image or end its own turn."""
    every, forbidden = sum(texts, []), {*vlm.stop_ids, *vlm.banned_ids}
    before = vlm.tokenizer(end_of_thought(vlm.processor), add_special_tokens=False).input_ids
    rows = vlm.tokenizer(every, add_special_tokens=False).input_ids
    plain = vlm.tokenizer(every, add_special_tokens=False, split_special_tokens=True).input_ids
    rows = [row if forbidden.isdisjoint(row) else letters for row, letters in zip(rows, plain)]
    rows = [torch.tensor(before + row + vlm.stop_ids[:1], device=vlm.device) for row in rows]
    return as_outputs(texts, rows)


def decode(vlm: VLM, responses: list[Tensor]) -> list[str]:
    """Token ids of responses as text, without stop (and banned) tokens and white space around it."""
    forbidden = {*vlm.stop_ids, *vlm.banned_ids}
    rows = [[i for i in ids.tolist() if i not in forbidden] for ids in responses]
    return [text.strip() for text in vlm.tokenizer.batch_decode(rows)]


# ---------------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Sampling:
    """How to sample, as the paper does. Greedy is temperature 0; top_k 0, top_p 1, penalty 1 are off. Not
    truncated: from all of the distribution; then top_k and top_p say only what is counted as its tail."""
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256
    truncated: bool = True


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """One token per row, (N,), from logits (N, V). seen (N, V) bool: tokens of prompt and response.

    noise (N,) in [0, 1) says which: the token at that place of the cumulative distribution. So a response is
    a function of its own noise, whatever else is in the batch. Filters in the order of transformers'
    generate: repetition penalty, temperature, top-k, top-p.
    """
    if not sampling.truncated and sampling.temperature:
        probs = (logits / sampling.temperature).softmax(-1)                                  # (N, V)
        mass, noise = probs.cumsum(-1), noise.clamp(max=1 - 1e-6)  # or rounding takes it past the last
        beyond = (mass > noise[:, None] * mass[:, -1:]) & (probs > 0)
        return beyond.int().argmax(-1)                             # the first of them
    if sampling.repetition_penalty != 1:                           # towards less likely, whatever the sign
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty,
                                logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    probs, tokens = (logits / sampling.temperature).topk(k)        # (N, k), likeliest first
    probs = probs.softmax(-1)
    kept = probs.cumsum(-1) - probs < sampling.top_p     # mass of the likelier tokens: the first always stays
    mass = (probs * kept).cumsum(-1)
    place = (mass <= noise[:, None] * mass[:, -1:]).sum(-1)
    place = place.minimum(kept.sum(-1) - 1)                        # rounding may overshoot
    return tokens.gather(-1, place[:, None]).squeeze(-1)


def generate(vlm: VLM, prompts: list[Prompt], num_samples: int, sampling: Sampling, generator=None,
             slots: int | None = None, noise: Iterable[Tensor] | None = None) -> Outputs:
    """Sample num_samples = G responses to each prompt: text, ids (B, G, R), mask (B, G, R).

    A response that reaches max_new_tokens ends there, without a stop token. The mark of a thought that the
    prompt opened is a part of the text, but none of its tokens. `noise`: as `stream` takes it; or drawn here,
    by a torch.Generator on the device of the model, or the global one. `slots`: responses in progress at a
    time, None for all at once; what comes out does not depend on it.
    """
    if noise is None:
        shape = (num_samples, sampling.max_new_tokens)
        noise = (torch.rand(shape, device=vlm.device, generator=generator) for _ in prompts)
    slots = slots or len(prompts) * num_samples
    tails = []
    done = dict(stream(vlm, prompts, noise, num_samples, sampling, slots, tails))
    rows, opened = [done[b] for b in range(len(prompts))], opened_thought(vlm.processor)
    texts = [[opened + text for text in decode(vlm, row)] for row in rows]
    return replace(as_outputs(texts, [ids for row in rows for ids in row]), tail=float(sum(tails)))


@torch.no_grad()
def stream(vlm: VLM, prompts: Iterable[Prompt], noise: Iterable[Tensor], num_samples: int, sampling: Sampling,
           slots: int, tails: list | None = None) -> Iterator[tuple[int, list[Tensor]]]:
    """Sample G responses to any number of prompts; yields (prompt's number, G tensors of ids). The list
    `tails`, if any, gets the tail of each response, summed over its tokens.

    noise: for each prompt uniform numbers (G, max_new_tokens), one a token. Continuous batching: where a
    response ends (.), the last running one takes its slot, and the next in line begins behind it. Here,
    prompts a b c, G = 2, three slots:

        step      1    2    3    4    5    6    7
        slot 0    a1   a1   a1.  b2   b2   b2.  c2
        slot 1    a2   a2   a2   a2   a2.  c1   c1.
        slot 2    b1   b1.  b2   c1   c1   c2           the line is empty: fewer slots from here on

    Prompts are read only when it is their turn, each once for its G responses (`prefill`), so memory does not
    grow with their number. A step is one token in every slot (`advance`). Against batches that pad and repeat
    (responses have r tokens on average): prefill of B P tokens, not B G P; decoding of B G r, not B G R.
    """
    line, G = enumerate(zip(prompts, noise)), num_samples
    if not vlm.packs:
        yield from stream_in_step(vlm, line, G, sampling, slots, tails)
        return
    table, ready = Slots(vlm, sampling, slots, measures_tail=tails is not None), deque()
    owners, done = [], defaultdict(dict)
    while True:
        while len(owners) < slots:                                 # owners[s]: whose response slot s holds
            if not ready:                                          # (prompt, sample, its row in the block)
                block = None                                       # frees the last ones' cache
                ahead = list(islice(line, max(1, slots // G)))     # prefill the next prompts, once each
                if not ahead:
                    break
                block = prefill(vlm, [prompt for _, (prompt, _) in ahead])     # their caches, a row a prompt
                block_noise = torch.cat([own for _, (_, own) in ahead])                      # (prompts G, R)
                ready.extend((b, g, i * G + g) for i, (b, _) in enumerate(ahead) for g in range(G))
            starting = [ready.popleft() for _ in range(min(slots - len(owners), len(ready)))]
            which = torch.tensor([i for _, _, i in starting], device=vlm.device)
            table.start(len(owners), *block, which // G, block_noise[which])   # G samples go on from a row
            owners += [(b, g) for b, g, _ in starting]
        if not owners:
            return
        ends = table.advance(len(owners))                          # lengths of those that have ended, else 0
        for s, (b, g) in enumerate(owners):
            if ends[s]:
                done[b][g] = table.rows["ids"][s, :ends[s]].clone()
                if tails is not None:
                    tails.append(table.rows["tail"][s, 0].clone())
                if len(done[b]) == G:
                    rows = done.pop(b)
                    yield b, [rows[g] for g in range(G)]
        for source, target in table.close_gaps(ends):              # the running ones stand first
            owners[target] = owners[source]
        owners = owners[:ends.count(0)]


# ---------------------------------------------------------------------------------------------- score


def score(vlm: VLM, prompts: list[Prompt], outputs: Outputs, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token, (B, K, R) float32, zero where padded. Differentiable.

    temperature is the one the policy samples with: the ratio must compare the distributions that were sampled
    from. (Top-k, top-p and penalty are left out, as teachers' tokens may lie outside of them. So what they
    cut off is neither sampled nor pushed down, and grows: see Sampling.truncated.)
    """
    states_of = packed_states if vlm.packs else row_states
    states, _, before = states_of(vlm.trunk, prompts, outputs.ids, outputs.mask)
    head, targets = vlm.model.get_output_embeddings(), outputs.ids[outputs.mask]             # (N,)
    logps = torch.zeros(outputs.mask.shape, device=states.device)
    # log softmax(logits / temperature)[targets], in chunks: the logits (N, V) never exist at once
    logps[outputs.mask] = TokenLogps.apply(states[before], head.weight, head.bias, targets, temperature,
                                           vlm.scale, vlm.cap)
    return logps


@dataclass
class Rows:
    """Prompts and responses laid out in rows of L tokens by `pack`; see packed_states."""
    order: list[int]                   # the questions as they lie there, several short ones to a row
    tokens: Tensor                     # (rows, L)
    question: Tensor                   # (rows, L), -1 for padding
    owner: Tensor                      # (rows, L)
    place: Tensor                      # (rows, L)
    positions: Tensor                  # (rows, L, A)
    at: Tensor                         # (N,): where the response tokens are, rows laid end to end
    before: Tensor                     # (N,): where the tokens are that predict them


def packed_states(trunk, prompts: list[Prompt], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last-layer states of prompts and responses (B, K, R), in rows [prompt | o_1 | ... | o_K].

    A prompt of tokens a b c, with responses d e and f, is the row

        token             a  b  c  d  e  f
        owner             0  0  0  1  1  2       0 the prompt, k the response o_k
        place, position   0  1  2  3  4  3       every response begins right after the prompt
        is seen by        a to f, b to f, c to f, d e, e, f
        is predicted by   -  a  b  c  d  c       the prompt's last state predicts each first token

    so each response is computed as if it were alone behind the prompt. Returns the states of all tokens
    (T, d); and, for the N response tokens in the order of mask.nonzero(), their indices in it (N,), and those
    of the tokens that predict them (N,).
    """
    rows = pack(prompts, ids, mask)
    states = states_of_rows(trunk, rows.tokens, rows.positions, packed_mask(trunk, rows),
                            [prompts[b] for b in rows.order])                                # (rows, L, d)
    return states.flatten(0, 1), rows.at, rows.before


def packed_mask(trunk, rows: Rows):
    """Who sees whom, (rows, L, L): a token sees the prompt of its question and its own response, as far as it
    has come. (Padding sees padding: attention over nothing is not a number.) In families whose images are
    seen both ways, the tokens of one image also see each other. Returned as attention_masks has it."""
    back = rows.place[:, :, None] - rows.place[:, None]            # how far a key lies behind
    same_question = rows.question[:, :, None] == rows.question[:, None]
    same_response = rows.owner[:, :, None] == rows.owner[:, None]
    of_prompt = rows.owner[:, None] == 0
    visible = same_question & (same_response | of_prompt) & (back >= 0)
    if sees_image_both_ways(trunk):
        is_image = rows.tokens == trunk.config.image_token_id
        starts = is_image & ~pad(is_image, (1, 0))[:, :-1]
        image = starts.cumsum(1) * is_image                        # 1, 2, ... by image, else 0
        visible |= (image[:, :, None] == image[:, None]) & (image[:, None] > 0)
    return attention_masks(trunk, visible, back)


# ==========================================================================================
#
#   MACHINERY: skip on first reading. All that RIL asks of a model stands above. What follows
#   loads checkpoints, talks to processors, and decodes on a GPU.
#
# ==========================================================================================


def run(main):
    """Call `main`; exit with one sentence and code 2 on a UserError or a full disk, with 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, SafetensorError) as error:
        if not re.search("No space left|Read-only|Disk quota|Permission", str(error)):
            raise
        name = getattr(error, "filename", None) or "a checkpoint"
        done = "opened" if isinstance(error, PermissionError) else "written"
        print(f"error: {name} cannot be {done} ({error}); nothing that was there is lost", file=sys.stderr)
        sys.exit(2)


@contextmanager
def all_or_nothing(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to. It is renamed to `path`, where nothing may be but a file that it
    replaces, only when all of it is on the disk."""
    unfinished = Path(f"{path}.unfinished")
    remove(unfinished)                             # a kill has left it
    yield unfinished
    parts = list(unfinished.iterdir()) if unfinished.is_dir() else []
    for part in (*parts, unfinished):
        sync(part)
    unfinished.replace(path)
    sync(Path(path).parent)


def sync(path: Path):
    """Wait until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: Path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stamp(path: str | Path) -> str:
    """A hash of what a file or the files of a folder hold; of a checkpoint on the hub, its commit. By it an
    edited checkpoint, template or data file is told from what it was, here and in copies.

    Of files above 64 MB, 64 pieces are read and not all: a checkpoint of 15 GB takes a moment.
    """
    path = Path(path)
    if not path.exists():
        with naming(str(path)):
            return str(getattr(AutoConfig.from_pretrained(str(path)), "_commit_hash", path))
    hashed, piece = hashlib.blake2b(digest_size=8), 2 ** 20
    for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        hashed.update(f"{file.name if path.is_dir() else '.'} {size}".encode())
        step = piece if size <= 64 * piece else (size - piece) // 63
        with open(file, "rb") as contents:
            for start in range(0, size, step):
                contents.seek(start)
                hashed.update(contents.read(piece))
    return hashed.hexdigest()


def write_atomic(path: str | Path, contents: str | bytes):
    """Write a file, all of it or nothing."""
    with all_or_nothing(path) as unfinished:
        unfinished.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device or best)


def pick_dtype(device: str | None, dtype: str | None) -> str:
    """The dtype asked for, else bfloat16, and float32 on the CPU, which is slow with the other."""
    return dtype or ("float32" if pick_device(device).type == "cpu" else "bfloat16")


def load_vlm(path: str, device: str | None = None, dtype: str | None = None, text_only: bool = False) -> VLM:
    """Load any image-text-to-text checkpoint, a folder or a hub id; in bfloat16 on a GPU, else float32.

    text_only: or a language model without a vision tower (for a judge). Raises UserError where it is neither,
    or where it cannot be decoded, which is tried on prompts without a picture and with one.
    """
    vlm = read_vlm(path, device, dtype, text_only)
    with naming(path):
        picture = Image.linear_gradient("L").convert("RGB")
        shown = [[picture], [picture.resize((200, 80))]] if hasattr(vlm.processor, "image_processor") else []
        prompts = [encode(vlm, "?", images) for images in ([], *shown)]
        vlm.scale, vlm.cap = find_head(vlm, prompts[0])
    try:
        check_decoding(vlm, prompts)
    except UserError as error:
        if not vlm.packs:
            raise
        print(f"{error}; so its responses are scored in rows, and decoded in step")
        vlm.packs = False
        check_decoding(vlm, prompts)
    return vlm


def read_vlm(path: str, device: str | None, dtype: str | None, text_only: bool = False) -> VLM:
    """See load_vlm, which also finds out how the model is asked."""
    processor, device = load_processor(path, text_only), pick_device(device)
    dtype = pick_dtype(device, dtype)
    kind = AutoModelForImageTextToText if hasattr(processor, "image_processor") else AutoModelForCausalLM
    with naming(path):
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = None         # sdpa, or eager in parts that lack it: both heed our masks
        model, found = kind.from_pretrained(path, config=config, dtype=getattr(torch, dtype),
                                            output_loading_info=True)
    if wrong := sorted(found["missing_keys"] | found["unexpected_keys"]):      # or it ran on random weights
        raise UserError(f"{path}: its weights are not those of the model in its config.json: "
                        f"{len(found['missing_keys'])} missing, {len(found['unexpected_keys'])} unexpected "
                        f"({', '.join(wrong[:3])})")
    # Under a mask, cuDNN's attention gives NaN gradients at some lengths (torch 2.11 and later on an H100,
    # github.com/pytorch/pytorch/issues/196678), and is compiled anew for each length (.../pull/155958).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return VLM(model.to(device).eval(), processor, *special_ids(model, processor), can_pack(model))


def load_processor(path: str, text_only: bool = False) -> ProcessorMixin:
    """AutoProcessor, also without torchvision. Raises UserError like load_vlm, and reads no weights."""
    check_files(path)
    with naming(path):
        processor = read_processor(path, text_only)
    tokenizer = tokenizer_of(processor)
    if not text_only and not hasattr(processor, "image_processor"):
        raise UserError(f"{path}: a language model without a vision tower, where one with it is needed")
    if getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template          # `render` asks the tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its processor has no chat template, so it cannot be asked questions")
    if not tokenizer("?", add_special_tokens=False).input_ids:
        raise UserError(f"{path}: its tokenizer knows no text; is a file missing, as tokenizer.json?")
    plain, shown = (render(processor, chat_turns("?", images)) for images in (0, int(not text_only)))
    if tokenizer(plain, add_special_tokens=needs_bos(tokenizer, plain)).input_ids[-1] != tokenizer(
            plain, add_special_tokens=False).input_ids[-1]:
        raise UserError(f"{path}: its tokenizer appends a token to each prompt, behind which no response "
                        f'begins; write "add_eos_token": false in its tokenizer_config.json')
    if not text_only and (shown == plain or "'type'" in shown):    # the second is how a list is printed
        raise UserError(f"{path}: its chat template has no place for images")
    return processor


def read_processor(path: str, text_only: bool) -> ProcessorMixin:
    """A processor for still images; of a language model its tokenizer. Families that can watch videos want a
    part for these that wants torchvision: without that package they are told that they have no such part.
    (SmolVLM's wants a package that spells out the times in a video, too.)"""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    config = AutoConfig.from_pretrained(path)
    if text_only and not hasattr(config, "vision_config"):
        return AutoTokenizer.from_pretrained(path)
    family = PROCESSOR_MAPPING.get(type(config), ProcessorMixin)
    if is_torchvision_available() or "video_processor" not in family.get_attributes():
        return AutoProcessor.from_pretrained(path)

    class Parts(ProcessorMixin):                                   # which Gemma 4 hands a part for videos
        def __init__(self, *args, video_processor=None, **kwargs):
            super().__init__(*args, **kwargs)

    class ImagesOnly(family, Parts):
        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args, settings, **kwargs):
            return super().from_args_and_dict(args, settings | {"video_processor": None}, **kwargs)

    ImagesOnly.__name__ = family.__name__                # the name that a saved processor_config.json carries
    return ImagesOnly.from_pretrained(path)


@contextmanager
def naming(path: str):
    """Turn what is raised over a missing, foreign or damaged checkpoint into one sentence; log no more."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (UserError, torch.OutOfMemoryError):                    # which say themselves what is wrong
        raise
    except Exception as error:                                     # tokenizers raises no other kind
        raise UserError(f"{path}: not an image-text-to-text checkpoint that can be loaded "
                        f"({reason(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


def reason(error: Exception) -> str:
    """An error of another package in one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 250)


def check_files(path: str):
    """UserError over a damaged file, or a LoRA adapter. transformers passes over some, and reads weights at
    their turn only."""
    if list(Path(path).glob("adapter_*")):
        raise UserError(f"{path} holds a LoRA adapter, which is not read: merge it into its base model "
                        f"(peft's merge_and_unload), and name the folder of that, without adapter files")
    for file in sorted(Path(path).glob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass                                           # its header fits its size
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: cut off, or a git-lfs pointer? ({error})") from error


def context_of(path: str) -> float:
    """How many tokens a checkpoint can read, by its config: infinite where that does not say."""
    with naming(path):
        config = AutoConfig.from_pretrained(path).get_text_config()
    return getattr(config, "max_position_embeddings", None) or float("inf")


def checkpoint_layers(model: PreTrainedModel):
    """From now on, backward passes compute the inside of each layer again; only its input is kept."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def save_vlm(vlm: VLM, path: str):
    """Write an ordinary checkpoint folder, all of it or nothing."""
    with all_or_nothing(path) as folder:
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        if not hasattr(vlm.processor, "video_processor"):  # so that AutoProcessor, with torchvision, loads it
            settings = json.dumps(vlm.processor.image_processor.to_dict())
            (folder / "video_preprocessor_config.json").write_text(settings)


# ---------------------------------------------------------------------------------------------- text


# special tokens that stand for images (row_1_col_1: a tile of Idefics3 and SmolVLM), and for turns
IMAGE, TURN = r"image|img|video|vision|row_\d+_col_\d+", "im_start|im_end|_of_turn|_of_utterance"


def tokenizer_of(processor: ProcessorMixin):
    """The tokenizer of a processor; of a language model the processor is one."""
    return getattr(processor, "tokenizer", processor)


def image_tokens(processor: ProcessorMixin) -> set[str]:
    """The placeholders that stand for images and videos in this family's text, and the marks around them."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    named = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")} - {None}
    return named | {t.content for t in added if t.special and re.search(IMAGE, t.content.lower())}


def special_ids(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[list[int], list[int]]:
    """(stop_ids, banned_ids). The first stop id is the one that ends an assistant turn of the chat template.

    Banned are the special tokens that no response may hold: of images, of turns, padding and its like; and
    every row of the embedding that the tokenizer has no text for (vocabularies are padded to round sizes).
    Other special tokens, as <think> and <|box_start|>, are words.
    """
    tokenizer = tokenizer_of(processor)
    added, reply = tokenizer.added_tokens_decoder, "[the reply]"
    turns = chat_turns("?", 0, (("?", reply),))[:2]
    before, after = (tokenizer(text, add_special_tokens=False).input_ids
                     for text in render(processor, turns).split(reply))
    # the first token after a reply that is no text. Gemma: <end_of_turn>, before <eos>; and it may be one
    # that neither tokenizer nor generation config names
    ends = [i for i in after if i in added and added[i].content.strip()][:1]
    stops = model.generation_config.eos_token_id
    stops = [*ends, tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
    stops = list(dict.fromkeys(i for i in stops if i is not None))                           # each once
    if not stops:
        raise UserError(f"{model.name_or_path}: nothing says which token ends a response")

    kinds = ("bos", "pad", "unk", "sep", "cls", "mask")
    structure = {getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    structure |= {i for i in before + after if i in added and "think" not in added[i].content}
    banned = set(range(len(tokenizer), model.get_output_embeddings().out_features))
    banned |= set(tokenizer.convert_tokens_to_ids(sorted(image_tokens(processor))))
    for i, token in added.items():
        if token.special and (i in structure or re.search(TURN, token.content)):
            banned.add(i)
    return stops, sorted(banned - set(stops))


def needs_bos(tokenizer, text: str) -> bool:
    """Whether the tokenizer should put its beginning-of-text token first: some templates have."""
    return not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


def render(processor: ProcessorMixin, turns: list[dict], add_generation_prompt: bool = False) -> str:
    """Chat turns, their content a list of image and text parts, as text by the model's chat template.
    UserError where the template raises one, as over a system turn."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is processor:                                  # a language model: its template wants strings
        turns = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in turns]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except (chat_template_utils.jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses such turns "
                        f"({reason(error)})") from error


# The marks at the beginning and the end of what a model thinks before it answers, by family.
THOUGHTS = {"<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>",
            "<reason>": "</reason>", "<reasoning>": "</reasoning>", "[THINK]": "[/THINK]",
            "<seed:think>": "</seed:think>", "<mm:think>": "</mm:think>", "◁think▷": "◁/think▷",
            "<|channel>thought": "<channel|>",
            "<|channel|>analysis<|message|>": "<|channel|>final<|message|>"}
OPENED, CLOSED = ("|".join(map(re.escape, marks)) for marks in (THOUGHTS, THOUGHTS.values()))


def without_thoughts(response: str) -> str:
    """A response without its thoughts. One that never ends hides all that follows; the end of one without its
    beginning ends one that the prompt opened. Whoever calls a judge passes its responses through this."""
    response = re.sub(rf"(?is)(?:{OPENED}).*?(?:{CLOSED}|\Z)", "", response)
    return re.split(rf"(?i){CLOSED}", response)[-1].strip()


def opened_thought(processor: ProcessorMixin) -> str:
    """The mark of a thought that the chat template opens before a response, or "". Put before a response, it
    hides a thought that was cut off."""
    prompt = render(processor, chat_turns("?", 0), add_generation_prompt=True).rstrip()
    return next((mark for mark in THOUGHTS if prompt.endswith(mark)), "")


def end_of_thought(processor: ProcessorMixin) -> str:
    """What closes the thought that the chat template opens, or ""."""
    return f"\n{THOUGHTS[opened]}\n\n" if (opened := opened_thought(processor)) else ""


MARK = "<image>"                                                   # where in a question an image stands


def chat_turns(question: str, images: int, history: tuple[tuple[str, str], ...] = ()) -> list[dict]:
    """Chat messages of earlier turns and a question. An image stands where MARK says so; without marks all
    stand first. UserError when there are too many or too few."""
    asked, replies, turns = [*(text for text, _ in history), question], [reply for _, reply in history], []
    marks = sum(text.count(MARK) for text in asked)
    if marks not in (0, images):
        raise UserError(f"the question {question[:80]!r} marks {marks} places with {MARK}, for {images} "
                        f"images")
    if marks == 0:
        asked[0] = MARK * images + asked[0]
    for i, text in enumerate(asked):
        pieces = [piece for piece in re.split(f"({MARK})", text) if piece.strip()]
        turns.append({"role": "user", "content": [
            {"type": "image"} if piece == MARK else {"type": "text", "text": piece.strip("\n")}
            for piece in pieces]})
        if i < len(replies):
            turns.append({"role": "assistant", "content": [{"type": "text", "text": replies[i]}]})
    return turns


def prompt_text(processor: ProcessorMixin, question: str, images: int,
                history: tuple[tuple[str, str], ...] = ()) -> str:
    """The chat prompt of a question as text, with one placeholder for each image. UserError when a text
    spells one of the model's image tokens: it would be counted as one more image."""
    turns = chat_turns(question, images, history)
    for token in image_tokens(processor):
        if any(token in part.get("text", "") for turn in turns for part in turn["content"]):
            raise UserError(f"the question {question[:80]!r} spells {token}, which this model reads as an "
                            f"image")
    return render(processor, turns, add_generation_prompt=True)


# What the code of a family raises over what it was not made for.
FAMILY_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)


def process(processor: ProcessorMixin, text: str, images: list[Image.Image]):
    """The tensors that a processor makes of a prompt; UserError where it refuses, as over an odd image."""
    tokenizer = tokenizer_of(processor)
    shown = {"images": images} if images else {}
    try:
        return processor(text=[text], **shown, return_tensors="pt",
                         add_special_tokens=needs_bos(tokenizer, text))
    except FAMILY_ERRORS as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise UserError(f"{type(processor).__name__} refuses a prompt with images of {sizes or 'no'} "
                        f"pixels ({reason(error)})") from error


def tokens_of_image(processor: ProcessorMixin, size: tuple[int, int]) -> int:
    """At most how many tokens a processor makes of an image of this (width, height), with marks around it.
    Most families compute that. Of others, and of odd shapes, which some refuse, a blank image tells."""
    odd = min(size) < 28 or max(size) > 10 * min(size)
    if odd or not hasattr(processor, "_get_num_multimodal_tokens"):
        blank = process(processor, prompt_text(processor, "?", 1), [Image.new("RGB", size)])
        return blank["input_ids"].shape[1]
    return 8 + processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens[0]


def as_outputs(texts: list[list[str]], rows: list[Tensor]) -> Outputs:
    """B lists of K texts, and the ids of each, as Outputs."""
    ids = pad_sequence(rows, batch_first=True)                                               # (B K, R)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return Outputs(texts, ids.unflatten(0, (len(texts), -1)), mask.unflatten(0, (len(texts), -1)))


def concat(parts: list[Outputs]) -> Outputs:
    """Responses to the same questions, put side by side, padded to the longest."""
    texts = [sum(rows, []) for rows in zip(*(part.text for part in parts))]
    rows = [ids[mask] for b in range(len(texts)) for part in parts
            for ids, mask in zip(part.ids[b], part.mask[b])]
    return as_outputs(texts, rows)


def images_of(trunk, prompts: list[Prompt]) -> dict[str, Tensor]:
    """The images of some prompts as one batch, in the order of the prompts, on the device of the model."""
    images = {}
    for name in {name for p in prompts for name in p.images}:
        x = stack([p.images[name] for p in prompts if name in p.images]).to(trunk.device)
        images[name] = x.to(trunk.dtype) if x.is_floating_point() else x
    return images


def stack(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension; the others are zero-padded to the largest: families that cut an
    image into tiles give (images, tiles, ...), each prompt its own number, and skip the empty ones."""
    largest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors))]
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *largest)
    for x, rows in zip(tensors, whole.split([len(x) for x in tensors])):
        rows[(slice(None), *map(slice, x.shape[1:]))] = x
    return whole


def position_ids(positions: Tensor) -> Tensor:
    """Positions (B, L, A) as a model wants them: (B, L), or (3, B, L) where there are three axes."""
    return positions.movedim(-1, 0) if positions.shape[-1] > 1 else positions[..., 0]


ATTENTION = ("full_attention", "sliding_attention")                # kinds of layers that packing knows


def sees_image_both_ways(trunk) -> bool:
    """Whether tokens of an image see the later ones of it, as in Gemma 3 (told by an argument)."""
    return "token_type_ids" in inspect.signature(trunk.forward).parameters


def attention_masks(trunk, visible: Tensor, back: Tensor) -> Tensor | dict[str, Tensor]:
    """What is visible, (B, Q, L) bool, as the additive mask (B, 1, Q, L) that attention wants; one per kind
    of layer, where some layers see only so many places `back` (B, Q, L)."""
    def additive(visible):
        mask = torch.zeros(visible.shape, dtype=trunk.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(trunk.dtype).min)[:, None]
    config = trunk.config.get_text_config()
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return additive(visible)
    near = back < config.sliding_window
    return dict(zip(ATTENTION, (additive(visible), additive(visible & near))))


# ---------------------------------------------------------------------------------------------- slots


def prefill(vlm: VLM, prompts: list[Prompt]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Read prompts once, padded on the right, where no real token sees it. Returns what slots go on from, a
    row a prompt: keys and values of each layer in turn (B, heads, P, w), and the first four rows of Slots."""
    cache = DynamicCache()
    _, ids, mask, positions = read_prompts(vlm, prompts, cache, "right")
    last = mask.sum(1, keepdim=True) - 1                                                     # (B, 1)
    rows = {"token": ids.gather(1, last), "column": last, "position": positions[range(len(ids)), last[:, 0]],
            "seen": seen_in(vlm, ids, mask)}
    return [x for layer in cache.layers for x in (layer.keys, layer.values)], rows


def read_prompts(vlm: VLM, prompts: list[Prompt], cache: DynamicCache, side: str) -> tuple[Tensor, ...]:
    """The forward pass of prompts, padded on this side, which fills the cache: states (B, P, d), ids and mask
    (B, P), positions (B, P, A)."""
    def batch(rows):
        return pad_sequence(rows, batch_first=True, padding_side=side).to(vlm.device)
    ids, positions = batch([p.ids for p in prompts]), batch([p.positions.T for p in prompts])
    mask = batch([torch.ones_like(p.ids) for p in prompts])
    out = vlm.trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids(positions), use_cache=True,
                    past_key_values=cache, **token_types(vlm.trunk, ids), **images_of(vlm.trunk, prompts))
    return out.last_hidden_state, ids, mask, positions


def seen_in(vlm: VLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Which tokens are in the prompts, (B, V) bool."""
    seen = torch.zeros(len(ids), vlm.model.get_output_embeddings().out_features, device=vlm.device)
    return seen.scatter_add_(1, ids, mask.float()) > 0


class Slots:
    """Responses in progress, one in each slot.

    rows, each with a row a slot: token, the last one; its position (A) and column (1) in the cache; seen (V),
    the tokens that there were; count, of tokens sampled; ids (R + 1), these tokens; noise (R); end, the
    length once it has ended. cache: keys and values of each layer in turn, (slots, heads, room, w); a slot
    has those of [prompt | response so far] in its first columns, without padding:

        column    0   1   2   3   4   5   6   7
        slot 0    p   p   p   p   r   r   *   .        * is written in this step
        slot 1    p   p   r   *   .   .   .   .        . is hidden by the mask

    A decode step is the same work on the same memory however far each response has got. On CUDA it is
    recorded once for each number of slots (halves of all) and replayed as a graph: a small step is otherwise
    spent on launching its kernels.
    """

    stride = None                                                  # tokens between two looks of the host

    def __init__(self, vlm: VLM, sampling: Sampling, size: int, measures_tail: bool = False):
        self.vlm, self.sampling, self.size = vlm, sampling, size
        self.measures_tail = measures_tail and sampling.temperature > 0
        self.rows, self.cache, self.graphs = {}, [], {}
        self.room = self.columns = 0                               # columns that there are, and that are used
        self.stride = self.stride or (1 if vlm.device.type == "cpu" else 8)
        self.capturing = vlm.device.type == "cuda" and vlm.capture and not reads_length(vlm.trunk)
        self.stops, self.banned = (torch.tensor(ids, device=vlm.device, dtype=torch.long)
                                   for ids in (vlm.stop_ids, vlm.banned_ids))

    def start(self, first: int, cache: list[Tensor], rows: dict[str, Tensor], which: Tensor, noise: Tensor):
        """Fill the slots from `first` on, each from row which[i] of what prefill gave; noise (N, R)."""
        (N, R), P = noise.shape, cache[0].shape[2]
        self.make_room(P + R, cache)
        for mine, x in zip(self.cache, cache):
            mine[first:first + N, :, :P] = x[which]
        starts = {name: x[which] for name, x in rows.items()}
        zero = torch.zeros_like(starts["token"])                   # (N, 1)
        starts |= {"noise": noise, "ids": zero.expand(-1, R + 1), "count": zero, "end": zero,
                   "tail": torch.zeros_like(zero, dtype=torch.float32)}
        for name, x in starts.items():
            if name not in self.rows:
                self.rows[name] = x.new_zeros(self.size, *x.shape[1:])
            self.rows[name][first:first + N] = x

    def make_room(self, columns: int, like: list[Tensor]):
        """Give every slot so many columns, rounded up to 64s: the memory moves less often."""
        if not self.cache:
            self.cache = [x.new_zeros(self.size, x.shape[1], 0, x.shape[3]) for x in like]
        more = -(-columns // 64) * 64 - self.room
        if more > 0:
            self.room += more
            self.graphs.clear()                                    # they write to the old memory
            for i, x in enumerate(self.cache):
                self.cache[i] = pad(x, (0, 0, 0, more))

    def close_gaps(self, ends: list[int]) -> list[tuple[int, int]]:
        """Move the last running responses to where others have ended; (from, to) of each."""
        live = ends.count(0)
        sources = [s for s in range(live, len(ends)) if not ends[s]]
        targets = [s for s in range(live) if ends[s]]
        if sources:
            source, target = torch.tensor([sources, targets], device=self.vlm.device)
            for x in (*self.rows.values(), *self.cache):
                x[target] = x[source]
        return list(zip(sources, targets))

    def advance(self, live: int) -> list[int]:
        """Decode `stride` tokens in the first `live` slots; the lengths of responses that ended, else 0.
        (What these add after their end is not read; each look of the host makes it wait for a GPU.)"""
        if self.stride == 1:                                       # looking is free: take just what is in use
            n, self.columns = live, int(self.rows["column"][:live].max()) + 1
        else:                                                      # as few sizes as possible, for graphs
            n, self.columns = self.size, self.room
            while n // 2 >= live:
                n //= 2
        for _ in range(self.stride):
            if n in self.graphs:
                self.graphs[n].replay()
                continue
            self.step(n)                                           # also the warm-up that a recording needs
            if self.capturing:
                self.capture(n)
        return self.rows["end"][:live, 0].tolist()

    def capture(self, n: int):
        """Record a decode step of n slots; one that cannot be runs as on the CPU, and a notice says so.
        Graphs are replayed one at a time, so all share the memory of the first for what a step makes."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        shared = next(iter(self.graphs.values())).pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=shared):
                self.step(n)
            self.graphs[n] = graph
        except RuntimeError as error:
            torch.cuda.set_stream(before)                          # torch leaves the one that it captured on
            self.capturing = self.vlm.capture = False
            cause = error.__context__ or error                     # torch raises a second error over it
            print(f"{type(self.vlm.model).__name__} is decoded without CUDA graphs: "
                  f"{str(cause).splitlines()[0]}")

    def step(self, n: int):
        """One token in each of the first n slots, all in place and without waiting for the device."""
        r, R = {name: x[:n] for name, x in self.rows.items()}, self.sampling.max_new_tokens
        back = r["column"] - torch.arange(self.columns, device=self.vlm.device)              # (n, columns)
        attention = attention_masks(self.vlm.trunk, (back >= 0)[:, None], back[:, None])
        states = self.vlm.trunk(input_ids=r["token"], position_ids=position_ids(r["position"][:, None]),
                                use_cache=True, past_key_values=self,
                                attention_mask=attention).last_hidden_state                  # (n, 1, d)
        logits = next_logits(self.vlm, states, self.banned)                                  # (n, V)
        if self.measures_tail:                                     # not of what comes after the end
            r["tail"].add_(tail(logits, self.sampling)[:, None] * (r["end"] == 0))
        noise = r["noise"].gather(1, r["count"].clamp(max=R - 1))
        token = sample(logits, r["seen"], self.sampling, noise[:, 0])[:, None]               # (n, 1)

        r["ids"].scatter_(1, r["count"], token)
        r["seen"].scatter_(1, token, True)
        r["token"].copy_(token)
        r["position"].add_(1)
        r["column"].add_(1).clamp_(max=self.room - 1)
        r["count"].add_(1)
        ended = (token == self.stops).any(1, keepdim=True) | (r["count"] == R)
        r["end"].copy_(torch.where(ended & (r["end"] == 0), r["count"], r["end"]))
        r["count"].clamp_(max=R)

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """What transformers asks of a cache: keep (n, heads, 1, w), return (n, heads, columns, w)."""
        n = len(key)
        at = self.rows["column"][:n, :, None, None]
        keys = self.cache[2 * layer][:n].scatter_(2, at.expand_as(key), key)
        values = self.cache[2 * layer + 1][:n].scatter_(2, at.expand_as(value), value)
        return keys[:, :, :self.columns], values[:, :, :self.columns]

    def get_seq_length(self, *_) -> int:
        """Not zero: this is no prefill. (Where tokens stand is told by position_ids and the mask.)"""
        return 1


def stream_in_step(vlm: VLM, line: Iterator, G: int, sampling: Sampling, slots: int,
                   tails: list | None) -> Iterator[tuple[int, list[Tensor]]]:
    """What `stream` does, for families whose cache has more than keys and values, as the state of linear
    attention: as many prompts as have room are read, padded on the left, and their samples go on in step, in
    the model's own cache. Those that have ended are left out."""
    R, device = sampling.max_new_tokens, vlm.device
    stops = torch.tensor(vlm.stop_ids, device=device)
    banned = torch.tensor(vlm.banned_ids, device=device, dtype=torch.long)
    while ahead := list(islice(line, max(1, slots // G))):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        states, ids, mask, positions = read_prompts(vlm, [p for _, (p, _) in ahead], cache, "left")
        live = torch.arange(len(ahead) * G, device=device)         # the rows that still run
        which = live // G                                          # G samples go on from each prompt
        cache.reorder_cache(which)
        states, mask, position, seen = (x[which] for x in (states[:, -1:], mask, positions[:, -1:],
                                                           seen_in(vlm, ids, mask)))
        noise, tail_sums = torch.cat([own for _, (_, own) in ahead]), torch.zeros(len(live), device=device)
        chosen, lengths = torch.zeros(len(live), R, dtype=torch.long, device=device), [R] * len(live)
        for step in range(R):
            logits = next_logits(vlm, states, banned)                                        # (N, V)
            if tails is not None and sampling.temperature:
                tail_sums[live] += tail(logits, sampling)
            token = sample(logits, seen, sampling, noise[live, step])                        # (N,)
            chosen[live, step] = token
            ended = (token[:, None] == stops).any(1)
            for row in live[ended].tolist():
                lengths[row] = step + 1
            keep = (~ended).nonzero()[:, 0]
            if not len(keep) or step + 1 == R:
                break
            cache.reorder_cache(keep)
            live, token, mask, position = live[keep], token[keep, None], mask[keep], position[keep] + 1
            seen = seen[keep].scatter(1, token, True)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            states = vlm.trunk(input_ids=token, attention_mask=mask, position_ids=position_ids(position),
                               use_cache=True, past_key_values=cache).last_hidden_state      # (N, 1, d)
        if tails is not None:
            tails.extend(tail_sums)
        for i, (b, _) in enumerate(ahead):
            yield b, [chosen[row, :lengths[row]].clone() for row in range(i * G, (i + 1) * G)]


def next_logits(vlm: VLM, states: Tensor, banned: Tensor) -> Tensor:
    """Those of the tokens that may come after the last state of (N, P, d), (N, V) float32."""
    logits = squash(vlm.model.get_output_embeddings()(states[:, -1]).float(), vlm.scale, vlm.cap)
    return logits.index_fill_(1, banned, -torch.inf)


def tail(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probability of the tokens that top-k and top-p leave out, (N,), from logits (N, V)."""
    probs = (logits / sampling.temperature).softmax(-1)
    probs = probs.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1])).values
    kept = probs.cumsum(-1) - probs < sampling.top_p * probs.sum(-1, keepdim=True)
    return (1 - (probs * kept).sum(-1)).clamp(min=0)


def reads_length(trunk) -> bool:
    """Whether its rotary embedding looks how long a text is, which a CUDA graph cannot hold."""
    kinds = [str(getattr(module, "rope_type", "")) for module in trunk.modules()]      # Gemma has several
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


# ---------------------------------------------------------------------------------------------- packing


ROW = 128                                                         # tokens of a row that short questions share


def row_sizes(packs: bool, prompts: list[Prompt], mask: Tensor) -> list[int]:
    """How many tokens each question has: its responses (B, K, R), without padding, and its prompt, once or,
    where responses cannot be packed, K times."""
    times = 1 if packs else mask.shape[1]
    return [times * len(p.ids) + n for p, n in zip(prompts, mask.sum((1, 2)).tolist())]


def micro_batches(sizes: list[int], budget: int) -> list[list[int]]:
    """Questions of these sizes in groups of at most `budget` tokens, or of one question. Those of similar
    size stand together, as a row is padded to the longest of its group: of 144 questions with pictures of
    many sizes 2% is padding then, and 27% in the order in which they come."""
    groups, total = [], budget
    for b in sorted(range(len(sizes)), key=sizes.__getitem__):
        if total + sizes[b] > budget:
            groups.append([])
            total = 0
        groups[-1].append(b)
        total += sizes[b]
    return groups


def pack(prompts: list[Prompt], ids: Tensor, mask: Tensor) -> Rows:
    """Prompts and responses (B, K, R) in rows, as packed_states draws it.

    Short questions share a row, of up to ROW tokens: a longer row pads less, but every token of it is
    compared with every other.
    """
    lengths, sizes = mask.sum(2).tolist(), row_sizes(True, prompts, mask)      # of responses, of questions
    rows = micro_batches(sizes, max(ROW, *sizes))
    L = max(sum(sizes[b] for b in row) for row in rows)
    responses = ids[mask].split([sum(n) for n in lengths])
    tokens, owner, place, positions = [], [], [], []               # of each question, (tokens,)
    for prompt, response, n in zip(prompts, responses, lengths):
        P = len(prompt.ids)
        tokens.append(torch.cat([prompt.ids.to(ids.device), response]))
        owner.append(torch.arange(len(n) + 1).repeat_interleave(torch.tensor([P, *n])))
        place.append(torch.cat([torch.arange(P), *(torch.arange(P, P + r) for r in n)]))
        after = prompt.positions[:, -1:] + 1 + place[-1][P:] - P   # responses go on from the prompt's last
        positions.append(torch.cat([prompt.positions, after], dim=1).T)

    at, before = [None] * len(sizes), [None] * len(sizes)
    for number, row in enumerate(rows):
        start = number * L                                         # of the question, rows laid end to end
        for b in row:
            P = len(prompts[b].ids)
            at[b] = torch.arange(start + P, start + sizes[b])
            before[b] = torch.where(place[b][P:] == P, start + P - 1, at[b] - 1)
            start += sizes[b]

    def lay(parts, empty=0):                                       # -> (rows, L, ...)
        laid = [torch.cat([parts[b] for b in row]) for row in rows]
        return pad_sequence(laid, batch_first=True, padding_value=empty).to(ids.device)
    question = [torch.full_like(x, b) for b, x in enumerate(owner)]
    return Rows(sum(rows, []), lay(tokens), lay(question, -1), lay(owner), lay(place), lay(positions),
                torch.cat(at).to(ids.device), torch.cat(before).to(ids.device))


def row_states(trunk, prompts: list[Prompt], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What packed_states returns, for families that cannot be packed: each of the B K responses has a row
    [prompt | o_k] of its own, padded on the right, which the model masks itself."""
    lengths = mask.sum(2).flatten().tolist()
    prompts = [prompt for prompt in prompts for _ in range(mask.shape[1])]
    pairs = list(zip(prompts, ids[mask].split(lengths)))

    def lay(rows):
        return pad_sequence(rows, batch_first=True).to(ids.device)
    tokens = lay([torch.cat([p.ids.to(ids.device), r]) for p, r in pairs])                   # (B K, L)
    visible = lay([torch.ones(len(p.ids) + len(r), dtype=torch.long) for p, r in pairs])
    positions = lay([torch.cat([p.positions, p.positions[:, -1:] + 1 + torch.arange(len(r))], dim=1).T
                     for p, r in pairs])                                                     # (B K, L, A)
    states = states_of_rows(trunk, tokens, positions, visible, prompts, **token_types(trunk, tokens))
    L = tokens.shape[1]
    at = torch.cat([i * L + len(p.ids) + torch.arange(len(r)) for i, (p, r) in enumerate(pairs)])
    at = at.to(ids.device)
    return states.flatten(0, 1), at, at - 1


def states_of_rows(trunk, tokens: Tensor, positions: Tensor, mask, prompts: list[Prompt], **types) -> Tensor:
    """Last-layer states (rows, L, d) of tokens (rows, L) with the images of these prompts."""
    # layers checkpoint in training mode only; what is inside of them (dropout) stays out of it
    for layer in trunk.modules():
        layer.training = torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)
    states = trunk(input_ids=tokens, position_ids=position_ids(positions), attention_mask=mask,
                   use_cache=False, **types, **images_of(trunk, prompts)).last_hidden_state
    trunk.eval()
    return states


def squash(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """What a family makes of its head's logits: cap tanh(scale logits / cap), in place."""
    logits = logits if scale == 1 else logits.mul_(scale)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def head_chunk(weight: Tensor) -> int:
    """Rows to a chunk of logits: few stay in a CPU's cache, many save a GPU's reading of weights."""
    return max(1, (2 ** 26 if weight.is_cuda else 2 ** 23) // len(weight))


class TokenLogps(torch.autograd.Function):
    """The head and the softmax, a chunk of rows at a time. Backward computes each chunk again, and turns it
    in place into d log p[t] / d logits = (1[t] - p) / temperature, times the slope of `squash`. (A loop of
    torch.utils.checkpoint has a gradient of the weight, V x d, per chunk: with V = 152,000 and N = 768 a
    whole update took 10% longer, and 28% to 55% more memory.)"""

    @staticmethod
    def forward(ctx, states, weight, bias, targets, temperature, scale, cap):
        """states (N, d), weight (V, d), bias (V,) or None, targets (N,) -> log-probs (N,) float32."""
        total, chosen = [], []
        for s, t in zip(states.split(head_chunk(weight)), targets.split(head_chunk(weight))):
            logits = squash(linear(s, weight, bias).float(), scale, cap) / temperature
            total.append(logits.logsumexp(1))
            chosen.append(logits.gather(1, t[:, None])[:, 0])
        total = torch.cat(total)                                   # (N,)
        ctx.save_for_backward(states, weight, bias, targets, total)
        ctx.temperature, ctx.scale, ctx.cap = temperature, scale, cap
        return torch.cat(chosen) - total

    @staticmethod
    def backward(ctx, grad):
        """grad (N,) -> the gradients of states, weight and bias."""
        states, weight, bias, targets, total = ctx.saved_tensors
        to_states = torch.empty_like(states)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = None if bias is None else torch.zeros_like(bias)
        grad, size = grad * ctx.scale / ctx.temperature, head_chunk(weight)
        for first in range(0, len(states), size):
            i = slice(first, first + size)
            d = squash(linear(states[i], weight, bias).float(), ctx.scale, ctx.cap)          # logits
            slope = None if ctx.cap is None else 1 - (d / ctx.cap).square()                  # of the cap
            d.div_(ctx.temperature).sub_(total[i, None]).exp_()                              # p
            d.mul_(-grad[i, None]).scatter_add_(1, targets[i, None], grad[i, None])          # grad (1[t] - p)
            d = (d if slope is None else d.mul_(slope)).to(states.dtype)
            torch.mm(d, weight, out=to_states[i])
            if to_weight is not None:
                to_weight.addmm_(d.T, states[i])
            if bias is not None:
                to_bias += d.sum(0)
        return to_states, to_weight, to_bias, None, None, None, None


# Of log-probs and probabilities. In float32 rounding is below 1e-6 (0.3B), and an image that is read one way
# only makes 5e-4; rounding to bfloat16 hides that.
MOST_ERROR = {torch.float32: 5e-5, torch.bfloat16: 0.05}


@torch.no_grad()
def check_scoring(vlm: VLM, prompts: list[Prompt]):
    """Score two responses to prompts, and decode, as training does, and by the model's own forward pass;
    UserError where these differ.

    What rows and slots assume of a family (what sees what, how positions count, that logits are those of
    find_head) is checked on the model at hand. In float32, as rounding to bfloat16 hides a response that sees
    its sibling.
    """
    outputs = encode_responses(vlm, [["Yes.", "It is not."]] * len(prompts))
    with in_float32(vlm.model):
        scored = score(vlm, prompts, outputs)
        for b, k in product(range(len(prompts)), range(2)):
            mask = outputs.mask[b, k]
            response = outputs.ids[b, k][mask]
            plain = plain_logits(vlm, prompts[b], response).log_softmax(-1).gather(1, response[:, None])[:, 0]
            refuse(vlm, "it reads responses in rows", (plain - scored[b, k][mask]).abs().mean())
        check_decoding(vlm, prompts)


@torch.no_grad()
def check_decoding(vlm: VLM, prompts: list[Prompt]):
    """Decode a few tokens as `stream` does; UserError where that fails, or where their probabilities are not
    those of the model's own forward pass."""
    sampling, rest = Sampling(top_p=1, top_k=1, repetition_penalty=1, max_new_tokens=6), 0.0
    noise = [torch.zeros(1, sampling.max_new_tokens, device=vlm.device)] * len(prompts)
    try:
        outputs = generate(vlm, prompts, 1, sampling, noise=noise)             # the likeliest: tail is 1 - p
        for b, prompt in enumerate(prompts):
            response = outputs.ids[b, 0][outputs.mask[b, 0]]
            logits = plain_logits(vlm, prompt, response)
            logits[:, vlm.banned_ids] = -torch.inf
            rest += (1 - logits.softmax(-1).gather(1, response[:, None])).sum()
    except torch.OutOfMemoryError:
        raise
    except FAMILY_ERRORS as error:
        raise UserError(f"{vlm.model.name_or_path} cannot be decoded ({reason(error)})") from error
    refuse(vlm, "it decodes", (outputs.tail - rest).abs() / outputs.mask.sum())


def refuse(vlm: VLM, what: str, error: Tensor):
    """UserError where an error is above what rounding explains."""
    if not error < MOST_ERROR[vlm.model.dtype]:
        raise UserError(f"{vlm.model.name_or_path} ({type(vlm.model).__name__}) cannot be used: {what} "
                        f"differently (off by {error:.3g} from its own forward pass)")


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a family's layers see by a mask alone, all of them tokens of the past (those of an image, where
    `sees_image_both_ways`), so that responses can share a row, and a slot."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    unsaid = not kinds and getattr(text, "sliding_window", None)   # a window of which layers?
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return kinds <= set(ATTENTION) and not unsaid and not both_ways


@torch.no_grad()
def find_head(vlm: VLM, prompt: Prompt) -> tuple[float, float | None]:
    """(scale, cap) of a family's logits: those in its config, as far as it heeds them."""
    text = vlm.model.config.get_text_config()
    cap, scales = getattr(text, "final_logit_softcapping", None), [1.0]
    for name in ("logits_scaling", "logit_scale", "output_multiplier"):
        if value := getattr(text, name, None):
            scales = [1 / value, value, 1.0]
    response = prompt.ids[-1:].to(vlm.device)
    logits, states = plain_logits(vlm, prompt, response, states=True)
    for scale, limit in [(scale, limit) for limit in (cap, None) for scale in scales]:
        ours = squash(vlm.model.get_output_embeddings()(states).float(), scale, limit)
        if (ours - logits).abs().mean() < 1e-3 + 0.01 * logits.abs().mean():
            return scale, limit
    return 1.0, None                                               # check_decoding will refuse it


@contextmanager
def in_float32(model: PreTrainedModel):
    """Its tensors in float32 for a while. Nothing is lost: a bfloat16 is a float32 that ends in zeros."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    dtypes = [x.dtype for x in tensors]
    for x in tensors:
        x.data = x.data.float()
    try:
        yield
    finally:
        for x, dtype in zip(tensors, dtypes):
            x.data = x.data.to(dtype)


def plain_logits(vlm: VLM, prompt: Prompt, response: Tensor, states: bool = False):
    """The logits (R, V) that predict the tokens (R,) of a response, by the model's own forward pass; and its
    last layer's states (R, d), if they are wanted."""
    ids = torch.cat([prompt.ids.to(vlm.device), response])[None]                             # (1, P + R)
    out = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=states,
                    **token_types(vlm.model, ids), **images_of(vlm.trunk, [prompt]))
    logits = out.logits[0, len(prompt.ids) - 1:-1].float()
    return (logits, out.hidden_states[-1][0, len(prompt.ids) - 1:-1]) if states else logits


def token_types(module, tokens: Tensor) -> dict[str, Tensor]:
    """Which tokens (rows, L) are those of images, as a forward pass that asks for it wants to be told."""
    accepted = inspect.signature(module.forward).parameters
    is_image = (tokens == getattr(module.config, "image_token_id", -1)).long()
    return {name: is_image for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}


# ---------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """The processes that torchrun has started; this is number `rank`. One alone needs none of this.

    Every stage of a run is done by all of them. Each draws the same batch of questions and the same noise,
    and works on its own part of them, rank::size. Gradients are sums over questions, so what comes out does
    not depend on how many processes there are. What is trained lies in shards (`shard`, FSDP2): each process
    holds a part of each weight, and with it that part's gradient and optimizer state. All weights are in
    every process only where it samples (in the loop: `unsharded`). Nothing is exchanged while one of them
    samples or asks a judge. What all must agree on, rank 0 finds out (`rank_0`). Finished files and the
    console are rank 0's.
    """
    rank: int = 0
    size: int = 1
    mesh: object = None

    @classmethod
    def from_torchrun(cls, device: torch.device):
        """The world that torchrun's environment describes; a process alone, where there is none."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from torch.distributed.device_mesh import DeviceMesh
        backend, on_device = "gloo", {}
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            backend, on_device = "nccl", {"device_id": device}
        # when torchrun starts all again, its store still has the addresses of those that have died
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(hours=1)))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # they may wait for days, as while rank 0 asks a server; in training nobody keeps the others an hour
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=30),
                                **on_device)
        group = dist.new_group(timeout=timedelta(hours=1))
        if rank:                                                   # of the others nothing is shown but errors
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        return cls(rank, size, DeviceMesh.from_group(group, device.type))

    def barrier(self):
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def rank_0(self, work: Callable):
        """What work() returns in rank 0, which calls it when all processes have come here."""
        self.barrier()
        result = [None if self.rank else work()]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def close(self):
        """The end of the process group, when rank 0 has written its report."""
        self.barrier()
        if self.size > 1:
            dist.destroy_process_group()

    def mine(self, items: list) -> list:
        """The part of the batch that is this process's."""
        return items[self.rank::self.size]

    def all_gather(self, items: list) -> list:
        """What each process has made of its part, in the order of the batch."""
        if self.size == 1:
            return items
        parts = [None] * self.size
        dist.all_gather_object(parts, items, group=self.mesh.get_group())
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size > 1:
            dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def even(self, parts: list[list[int]]) -> list[tuple[list[int], float]]:
        """Micro-batches with their weights, equally many in each process: FSDP wants all processes in every
        forward and backward pass. A process that has fewer takes its first question again, with weight 0."""
        most = max(self.all_gather([len(parts)]))
        return [(part, 1.0) for part in parts] + [([0], 0.0)] * (most - len(parts))

    def shard(self, module: torch.nn.Module, decoder: torch.nn.Module, *others: torch.nn.Module,
              method: str = "gathered"):
        """Leave a part of each weight to each process. They are gathered where they are used: each decoder
        layer and each of `others` in its forward and backward pass, the rest of `module` in those of
        `method`. Gradients are sums over the processes.

        The vision tower belongs to the rest: a process whose micro-batch has no image does not run it, and
        would leave the others waiting for it where they gather its layers.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        layers = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for part in (*layers, *others, module):
            fully_shard(part, mesh=self.mesh, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)                   # sums, not means
            part.set_force_sum_reduction_for_comms(True)           # gloo knows no other
        module.set_reduce_scatter_unused_params(True)              # zero, where no image was seen
        # or, if the embedding is frozen, layer 0 would have its backward pass only where there are images
        decoder.get_input_embeddings().register_forward_hook(lambda _, __, states: states.requires_grad_())
        module.gathered = lambda work: work()                      # see `gathered`
        register_fsdp_forward_method(module, method)

    def without_weights(self, vlm: VLM) -> VLM:
        """A copy of `vlm` with empty weights, for `unsharded` to fill; made before `vlm` is sharded."""
        if self.size == 1:
            return vlm
        empty = {id(w): torch.nn.Parameter(w.new_empty(0), requires_grad=False)
                 for w in vlm.model.parameters()}
        return replace(vlm, model=copy.deepcopy(vlm.model, empty))

    @contextmanager
    def unsharded(self, vlm: VLM, empty: VLM):
        """`empty` has all weights of `vlm` for a while. (FSDP's hooks would gather them at every token.)"""
        if self.size == 1:
            yield vlm
            return
        for name, weight in vlm.model.named_parameters():
            empty.model.get_parameter(name).data = weight.detach().full_tensor()
        yield empty
        for weight in empty.model.parameters():
            weight.data = weight.new_empty(0)

    def shard_of(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """This process's part of a tensor like the weight. FSDP cuts along the first dimension."""
        if not hasattr(weight, "to_local"):
            return tensor
        parts = list(tensor.chunk(self.size))
        parts += [tensor[:0]] * (self.size - len(parts))
        return parts[self.rank].clone()

    def full_tensor(self, part: Tensor, weight: Tensor) -> Tensor:
        """The reverse of `shard_of`, for rank 0, on the CPU: a device may not have the room."""
        if not hasattr(weight, "to_local"):
            return part
        from torch.distributed.tensor import DTensor
        shards = DTensor.from_local(part, self.mesh, weight.placements, run_check=False, shape=weight.shape,
                                    stride=weight.stride())
        tensor = shards.full_tensor()
        return tensor[:0] if self.rank else tensor.cpu()

    @torch.no_grad()
    def full_weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """All weights of a module by name, as `full_tensor` has them. (Those that are tied are one.)"""
        return {name: self.full_tensor(local(weight), weight) for name, weight in module.named_parameters()}


def local(weight: Tensor) -> Tensor:
    """What this process has of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def gathered(module: torch.nn.Module, work):
    """work(), which uses weights of the module also where no forward pass of it is called."""
    return module.gathered(work) if hasattr(module, "gathered") else work()
