"""A vision-language model as a policy: ask it about a picture, sample from it, score text.

    encode    question, pictures -> prompt     uses the chat template and the family's own processor
    generate  prompts -> outputs               line 5 of Algorithm 2: G samples per prompt, with a KV cache
    score     prompts, outputs -> log-probs    the input to the ratio, the KL and the supervised loss

Two ideas make it cheap. Both use the same fact: the K responses to a question share one picture and one
prompt. `generate` reads each prompt once and starts all its samples from there, in slots that are reused as
responses end. `score` does the same in training: one row holds [prompt | o_1 | o_2 | ... | o_K] under a mask
that lets every response see the prompt and itself but not its siblings. So the model computes picture and
prompt once per question instead of K times.

The notation (B, G, K, P, R, L, T, V, d, X, N) is explained at the top of train.py.
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


@dataclass
class VLM:
    """A model and its processor.

    stop_ids end a response; banned_ids, such as image placeholders, never appear in one (see special_ids).
    packs: whether K responses can share a row and samples can decode in slots (see can_pack). What follows it
    is machinery.
    """
    model: PreTrainedModel
    processor: ProcessorMixin
    stop_ids: list[int]
    banned_ids: list[int]
    packs: bool = True
    scale: float = 1.0                                             # of the logits, see find_head
    cap: float | None = None
    prompts: dict = field(default_factory=dict)                    # cache of encoded prompts
    room: int = 2 ** 29                                            # bytes that the cache may still take
    lock: Lock = field(default_factory=Lock)                       # several threads encode prompts
    capture: bool = True                                           # until recording a CUDA graph fails

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
    """One question, ready for the model: token ids (P,), the processor's image tensors (may be {}), and the
    positions of the tokens (X, P). X is 1, or 3 in the Qwen-VL families, whose rotary embedding counts time,
    height and width."""
    ids: Tensor
    images: dict[str, Tensor]
    positions: Tensor


@dataclass
class Outputs:
    """K responses to each of B questions, as B lists of K strings (text) and as tokens.

    ids: (B, K, R) long, zero where padded; mask: (B, K, R) bool, True on response tokens and the stop token.
    tail: for sampled responses, the probability that top-k and top-p leave out, summed over all tokens.
    """
    text: list[list[str]]
    ids: Tensor
    mask: Tensor
    tail: float = 0.0

    def __getitem__(self, part: list[int]):
        return Outputs([self.text[b] for b in part], self.ids[part], self.mask[part])


# ---------------------------------------------------------------------------------------------- encode


def encode(vlm: VLM, question: str, images: list[Image.Image],
           history: tuple[tuple[str, str], ...] = ()) -> Prompt:
    """Build a chat prompt: the turns of `history`, then the question. Images may have any size, or be absent.

    Raises UserError if the model cannot be asked this; see prompt_text and process.
    """
    text = prompt_text(vlm.processor, question, len(images), history)
    inputs = process(vlm.processor, text, images)
    ids = inputs.pop("input_ids")                                  # (1, P)
    of_text = ("attention_mask", "mm_token_type_ids", "token_type_ids")
    images = {name: x for name, x in inputs.items() if name not in of_text}
    return Prompt(ids[0], images, positions_of(vlm, ids, images))


def encode_responses(vlm: VLM, texts: list[list[str]]) -> Outputs:
    """Tokenize responses that came as text (a teacher's, or a true answer), and append the stop token. If the
    chat template opens a thought, close it first. A text that spells a stop or a banned token is tokenized
    as plain letters, so no response can place an image or end its own turn."""
    every, forbidden = sum(texts, []), {*vlm.stop_ids, *vlm.banned_ids}
    before = vlm.tokenizer(end_of_thought(vlm.processor), add_special_tokens=False).input_ids
    rows = vlm.tokenizer(every, add_special_tokens=False).input_ids
    plain = vlm.tokenizer(every, add_special_tokens=False, split_special_tokens=True).input_ids
    rows = [row if forbidden.isdisjoint(row) else letters for row, letters in zip(rows, plain)]
    rows = [torch.tensor(before + row + vlm.stop_ids[:1], device=vlm.device) for row in rows]
    return as_outputs(texts, rows)


# ---------------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the paper's. Temperature 0 is greedy; top_k 0, top_p 1, penalty 1 mean
    off. If not `truncated`, all of these are off, and top_k and top_p only define what counts as the tail."""
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256
    truncated: bool = True


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, noise: Tensor) -> Tensor:
    """Pick one token per row, (N,), from logits (N, V). seen (N, V) bool: tokens of the prompt and response.

    noise (N,) in [0, 1) picks the token at that point of the cumulative distribution. So a response depends
    on its own noise, but not on the rest of the batch. The filters apply in the order of transformers'
    generate: repetition penalty, temperature, top-k, top-p.
    """
    if not sampling.truncated and sampling.temperature:
        return pick((logits / sampling.temperature).softmax(-1), noise)
    if sampling.repetition_penalty != 1:                           # lowers seen logits, whatever their sign
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty,
                                logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    probs, tokens = (logits / sampling.temperature).topk(k)        # (N, k), likeliest first
    probs = probs.softmax(-1)
    kept = probs.cumsum(-1) - probs < sampling.top_p     # mass of likelier tokens, so the first always stays
    return tokens.gather(-1, pick(probs * kept, noise)[:, None])[:, 0]


def pick(probs: Tensor, noise: Tensor) -> Tensor:
    """The first token, (N,), at which the cumulative sum of probs (N, V) exceeds this share of its total."""
    mass = probs.cumsum(-1)
    noise = noise.clamp(max=1 - 1e-6)                              # or rounding might pass the last token
    beyond = (mass > noise[:, None] * mass[:, -1:]) & (probs > 0)
    return beyond.int().argmax(-1)


def generate(vlm: VLM, prompts: list[Prompt], num_samples: int, sampling: Sampling, generator=None,
             slots: int | None = None, noise: Iterable[Tensor] | None = None) -> Outputs:
    """Sample num_samples = G responses to each prompt: text, ids (B, G, R), mask (B, G, R).

    A response that reaches max_new_tokens ends there, without a stop token. If the prompt opens a thought,
    the opening mark is in the text but not in the tokens. `noise`: see `stream`; if None, it is drawn from
    `generator` (a torch.Generator on the model's device) or the global one. `slots`: how many responses are
    in progress at a time (None: all); the result does not depend on it.
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
    """Sample G responses to any number of prompts; yield (prompt's index, G tensors of ids). If `tails` is a
    list, append each response's tail to it, summed over its tokens.

    noise: for each prompt, uniform numbers (G, max_new_tokens), one per token. Continuous batching: when a
    response ends (.), the last running response takes its slot, and the next in line starts in the slot that
    this frees. Example: prompts a b c, G = 2, three slots:

        step      1    2    3    4    5    6    7
        slot 0    a1   a1   a1.  b2   b2   b2.  c2
        slot 1    a2   a2   a2   a2   a2.  c1   c1.
        slot 2    b1   b1.  b2   c1   c1   c2           the line is empty: fewer slots from here on

    A prompt is read when its turn comes, once for its G responses (`prefill`), so memory does not grow with
    their number. `advance` decodes a token in each slot. Batches that pad and repeat would prefill B G P
    tokens and decode B G R. This prefills B P and decodes B G r (r: the mean length).
    """
    line, G = enumerate(zip(prompts, noise)), num_samples
    if not vlm.packs:
        yield from stream_in_step(vlm, line, G, sampling, slots, tails)
        return
    table, ready = Slots(vlm, sampling, slots, measures_tail=tails is not None), deque()
    owners, done = [], defaultdict(dict)
    while True:
        while len(owners) < slots:                                 # owners[s]: whose response slot s holds
            if not ready:                                          # (prompt, sample, row of block, its noise)
                block = None                                       # free the previous prompts' cache
                ahead = list(islice(line, max(1, slots // G)))     # prefill the next prompts, once each
                if not ahead:
                    break
                block = prefill(vlm, [prompt for _, (prompt, _) in ahead])     # keys, values, last token, ...
                ready.extend((b, g, i, own[g]) for i, (b, (_, own)) in enumerate(ahead) for g in range(G))
            starting = [ready.popleft() for _ in range(min(slots - len(owners), len(ready)))]
            which = torch.tensor([i for *_, i, _ in starting], device=vlm.device)
            table.start(len(owners), *block, which, torch.stack([own for *_, own in starting]))
            owners += [(b, g) for b, g, *_ in starting]
        if not owners:
            return
        ends = table.advance(len(owners))                          # lengths of ended responses, 0 for others
        for s, (b, g) in enumerate(owners):
            if ends[s]:
                done[b][g] = table.rows["ids"][s, :ends[s]].clone()
                if tails is not None:
                    tails.append(table.rows["tail"][s, 0].clone())
                if len(done[b]) == G:
                    yield b, [ids for _, ids in sorted(done.pop(b).items())]
        for source, target in table.close_gaps(ends):              # running responses fill the freed slots
            owners[target] = owners[source]
        owners = owners[:ends.count(0)]


# ---------------------------------------------------------------------------------------------- score


def score(vlm: VLM, prompts: list[Prompt], outputs: Outputs, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token, (B, K, R) float32, zero where padded. Differentiable.

    temperature is the one the policy samples with. Top-k, top-p and penalty are not applied, because some of
    the teachers' tokens would get probability 0. So with truncated rollouts, these are not the log-probs of
    the sampler: see "Sampled, not only greedy" in the README.
    """
    states_of = packed_states if vlm.packs else row_states
    states, _, before = states_of(vlm.trunk, prompts, outputs.ids, outputs.mask)
    head, targets = vlm.model.get_output_embeddings(), outputs.ids[outputs.mask]
    logps = torch.zeros(outputs.mask.shape, device=states.device)
    # log softmax(logits / temperature)[targets], in chunks: the logits (N, V) never exist at once
    logps[outputs.mask] = TokenLogps.apply(states[before], head.weight, head.bias, targets, temperature,
                                           vlm.scale, vlm.cap)                               # (N,)
    return logps


def packed_states(trunk, prompts: list[Prompt], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Last-layer states of prompts and responses (B, K, R), in rows [prompt | o_1 | ... | o_K].

    A prompt of tokens a b c, with responses d e and f, is the row

        token             a  b  c  d  e  f
        owner             0  0  0  1  1  2       0 the prompt, k the response o_k
        place             0  1  2  3  4  3       every response begins right after the prompt (for the mask)
        sees              a, ab, abc, abcd, abcde, abcf      f sees neither d nor e
        is predicted by   -  a  b  c  d  c       the prompt's last state predicts each first token

    so each response is computed as if it alone followed the prompt. Its position ids continue those of the
    prompt's last token, on all three axes of a Qwen-VL. Several short questions may share a row; they do not
    see each other. Returns the states of all tokens (T, d), and two index tensors (N,) into them: the N
    response tokens, in the order of mask.nonzero(), and the tokens that predict them.
    """
    rows = pack(prompts, ids, mask)
    return states_of_rows(trunk, rows, packed_mask(trunk, rows), prompts)


def packed_mask(trunk, rows: "Rows"):
    """Which token sees which, (rows, L, L): each sees the prompt of its question and its own response, up to
    itself. (Padding sees padding, because attention over nothing gives NaN.) In families that read images in
    both directions, tokens of one image also see each other. Returns what attention_masks makes of this."""
    back = rows.place[:, :, None] - rows.place[:, None]            # how far a key lies behind the query
    same_question = rows.question[:, :, None] == rows.question[:, None]
    same_response = rows.owner[:, :, None] == rows.owner[:, None]
    of_prompt = rows.owner[:, None] == 0
    visible = same_question & (same_response | of_prompt) & (back >= 0)
    if sees_image_both_ways(trunk):
        visible |= of_same_image(trunk, rows.tokens)
    return attention_masks(trunk, visible, back)


# ==========================================================================================
#
#   MACHINERY: skip on first reading. All that RIL asks of a model stands above. What follows
#   loads checkpoints, talks to processors, and decodes on a GPU.
#
# ==========================================================================================


class UserError(Exception):
    """An error that the user can fix: one sentence that names file, line and what to write. Exit code 2."""


def run_main(main):
    """Call `main`; exit with a sentence and code 2 on a UserError or a disk's refusal, with 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, SafetensorError) as error:
        if not re.search("No space|Read-only|Disk quota|Permission|Not a directory|too long", str(error)):
            raise
        name = getattr(error, "filename", None) or "a checkpoint"
        done = "opened" if isinstance(error, PermissionError) else "written"
        print(f"error: {name} cannot be {done} ({error}); no existing file was lost", file=sys.stderr)
        sys.exit(2)


@contextmanager
def all_or_nothing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to. Once it is on the disk (its subfolders may not be), rename
    it to `path`, where nothing may exist except a file to be replaced."""
    unfinished = Path(f"{path}.unfinished")
    remove(unfinished)                             # left by a killed run
    yield unfinished
    for part in (*unfinished.glob("*"), unfinished):
        sync(part)
    unfinished.replace(path)
    sync(Path(path).parent)


def sync(path: Path):
    """Wait until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: Path):
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def stamp(path: str | Path) -> str:
    """A hash of the contents of a file or of a folder's files; for a checkpoint on the hub, its commit. It
    changes when a checkpoint, template or data file is edited, and stays the same in copies.

    From files above 64 MB it reads only 64 pieces, so a checkpoint of 15 GB takes a moment.
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
    """Write a file completely or not at all."""
    with all_or_nothing(path) as unfinished:
        unfinished.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device or best)


def pick_dtype(device: str | None, dtype: str | None) -> str:
    """The dtype asked for, else bfloat16, or float32 on the CPU, which is slow in bfloat16."""
    return dtype or ("float32" if pick_device(device).type == "cpu" else "bfloat16")


def load_vlm(path: str, device: str | None = None, dtype: str | None = None, text_only: bool = False) -> VLM:
    """Load any image-text-to-text checkpoint (a folder or a hub id), in bfloat16 on a GPU, else in float32.

    text_only: also accept a language model without a vision tower (for a judge). Raises UserError if it is
    neither, or if a trial on prompts with and without a picture shows that it cannot be decoded.
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
        print(f"{error}; as a fallback, each response is scored in its own row and decoded in step")
        vlm.packs = False
        check_decoding(vlm, prompts)
    return vlm


def read_vlm(path: str, device: str | None, dtype: str | None, text_only: bool = False) -> VLM:
    """load_vlm without its last part, which finds the scale and cap of the head and tries decoding."""
    processor, device = load_processor(path, text_only), pick_device(device)
    dtype = pick_dtype(device, dtype)
    kind = AutoModelForImageTextToText if hasattr(processor, "image_processor") else AutoModelForCausalLM
    with naming(path):
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = None         # sdpa, or eager in parts that lack it: both obey our masks
        model, found = kind.from_pretrained(path, config=config, dtype=getattr(torch, dtype),
                                            output_loading_info=True)
    if wrong := sorted(found["missing_keys"] | found["unexpected_keys"]):      # missing ones would be random
        raise UserError(f"{path}: its weights do not fit the model in its config.json: "
                        f"{len(found['missing_keys'])} missing, {len(found['unexpected_keys'])} unexpected "
                        f"({', '.join(wrong[:3])})")
    # Under a mask, cuDNN's attention gives NaN gradients at some lengths (torch 2.11 and later on an H100,
    # github.com/pytorch/pytorch/issues/196678), and is recompiled for each length (.../pull/155958).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return VLM(model.to(device).eval(), processor, *special_ids(model, processor), can_pack(model))


def load_processor(path: str, text_only: bool = False) -> ProcessorMixin:
    """AutoProcessor, even without torchvision. Raises UserError like load_vlm, but reads no weights."""
    check_files(path)
    with naming(path):
        processor = read_processor(path, text_only)
    tokenizer = tokenizer_of(processor)
    if not text_only and not hasattr(processor, "image_processor"):
        raise UserError(f"{path}: a language model without a vision tower; give a vision-language model")
    if getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template          # `render` uses the tokenizer's
    if not tokenizer.chat_template:
        raise UserError(f"{path}: its processor has no chat template, so it cannot be asked questions")
    if not tokenizer("?", add_special_tokens=False).input_ids:
        raise UserError(f"{path}: its tokenizer knows no text; is a file such as tokenizer.json missing?")
    plain, shown = (render(processor, chat_turns("?", images)) for images in (0, int(not text_only)))
    if tokenizer(plain, add_special_tokens=needs_bos(tokenizer, plain)).input_ids[-1] != tokenizer(
            plain, add_special_tokens=False).input_ids[-1]:
        raise UserError(f"{path}: its tokenizer appends a token to each prompt, so no response can "
                        f'follow; write "add_eos_token": false in its tokenizer_config.json')
    if not text_only and (shown == plain or "'type'" in shown):    # the latter: it prints the list
        raise UserError(f"{path}: its chat template has no place for images")
    return processor


def read_processor(path: str, text_only: bool) -> ProcessorMixin:
    """A processor for still images; for a language model, its tokenizer. In families that can watch videos,
    the video processor needs torchvision. Without that package, we leave out the video processor.
    (SmolVLM's processor also needs a package that spells out times in videos; `str` stands in for it.)"""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    config = AutoConfig.from_pretrained(path)
    if text_only and not hasattr(config, "vision_config"):
        return AutoTokenizer.from_pretrained(path)
    family = PROCESSOR_MAPPING.get(type(config), ProcessorMixin)
    if is_torchvision_available() or "video_processor" not in family.get_attributes():
        return AutoProcessor.from_pretrained(path)

    class Parts(ProcessorMixin):                                   # Gemma 4 passes it a video_processor
        def __init__(self, *args, video_processor=None, **kwargs):
            super().__init__(*args, **kwargs)

    class ImagesOnly(family, Parts):
        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args, settings, **kwargs):
            return super().from_args_and_dict(args, settings | {"video_processor": None}, **kwargs)

    ImagesOnly.__name__ = family.__name__                # the name in a saved processor_config.json
    return ImagesOnly.from_pretrained(path)


@contextmanager
def naming(path: str):
    """Turn any error over a missing, foreign or damaged checkpoint into one sentence; mute warnings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):       # these already say what is wrong
        raise
    except Exception as error:                                     # tokenizers raises nothing more specific
        raise UserError(f"{path}: not an image-text-to-text checkpoint that can be loaded "
                        f"({reason(error)})") from error
    finally:
        logging.set_verbosity(verbosity)


def reason(error: Exception) -> str:
    """Another package's error in one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 250)


def check_files(path: str):
    """Raise UserError over a damaged file or a LoRA adapter. transformers ignores some of them, and would not
    look at the weights until later."""
    if list(Path(path).glob("adapter_*")):
        raise UserError(f"{path} holds a LoRA adapter, which cannot be used: merge it into its base model "
                        f"(peft's merge_and_unload), and give the merged folder, without adapter files")
    for file in sorted(Path(path).glob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if file.suffix == ".safetensors":
                safe_open(file, "pt")                              # checks its header against its size
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: cut off or a git-lfs pointer? ({error})") from error


def context_of(path: str) -> float:
    """How many tokens a checkpoint can read, according to its config; infinite if the config does not say."""
    with naming(path):
        config = AutoConfig.from_pretrained(path).get_text_config()
    return getattr(config, "max_position_embeddings", None) or float("inf")


def checkpoint_layers(model: PreTrainedModel):
    """From now on, keep only the input of each layer, and recompute the layer in the backward pass."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def save_vlm(vlm: VLM, path: str):
    """Write an ordinary checkpoint folder, completely or not at all."""
    with all_or_nothing(path) as folder:
        vlm.model.save_pretrained(folder)
        vlm.processor.save_pretrained(folder)
        if not hasattr(vlm.processor, "video_processor"):  # AutoProcessor with torchvision wants one
            settings = json.dumps(vlm.processor.image_processor.to_dict())
            (folder / "video_preprocessor_config.json").write_text(settings)


# ---------------------------------------------------------------------------------------------- text


# special tokens that mark images (row_1_col_1 is a tile in Idefics3 and SmolVLM), and those that mark turns
IMAGE, TURN = r"image|img|video|vision|row_\d+_col_\d+", "im_start|im_end|_of_turn|_of_utterance"


def tokenizer_of(processor: ProcessorMixin):
    """The tokenizer of a processor; the processor of a language model is itself a tokenizer."""
    return getattr(processor, "tokenizer", processor)


def image_tokens(processor: ProcessorMixin) -> set[str]:
    """The placeholders for images and videos in this family's text, and the marks around them."""
    added = tokenizer_of(processor).added_tokens_decoder.values()
    named = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video")} - {None}
    return named | {t.content for t in added if t.special and re.search(IMAGE, t.content.lower())}


def special_ids(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[list[int], list[int]]:
    """(stop_ids, banned_ids). The first stop id is the one that ends an assistant turn in the chat template.

    Banned are special tokens that no response may contain (image marks, turn marks, padding and the like) and
    every row of the embedding that the tokenizer has no text for (vocabularies are padded to round sizes).
    Other special tokens, such as <think> and <|box_start|>, count as words.
    """
    tokenizer = tokenizer_of(processor)
    added, reply = tokenizer.added_tokens_decoder, "[the reply]"
    turns = chat_turns("?", 0, (("?", reply),))[:2]
    before, after = (tokenizer(text, add_special_tokens=False).input_ids
                     for text in render(processor, turns).split(reply))
    # The first special token after a reply. In Gemma it is <end_of_turn>, which takes precedence over <eos>.
    # Some models name it neither in the tokenizer nor in the generation config.
    ends = [i for i in after if i in added and added[i].content.strip()][:1]
    stops = model.generation_config.eos_token_id
    stops = [*ends, tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
    stops = list(dict.fromkeys(i for i in stops if i is not None))                           # each once
    if not stops:
        raise UserError(f"{model.name_or_path}: its files do not say which token ends a response")

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
    """Whether the tokenizer should add its beginning-of-text token; some templates already contain it."""
    return not (tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token))


def render(processor: ProcessorMixin, turns: list[dict], add_generation_prompt: bool = False) -> str:
    """Render chat turns, whose content is a list of image and text parts, with the model's chat template.
    Raises UserError if the template refuses them, for example a system turn."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is processor:                                  # a language model: its template wants strings
        turns = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in turns]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except (chat_template_utils.jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses such turns "
                        f"({reason(error)})") from error


# The marks that open and close a model's thoughts before its answer, by family.
THOUGHTS = {"<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>",
            "<reason>": "</reason>", "<reasoning>": "</reasoning>", "[THINK]": "[/THINK]",
            "<seed:think>": "</seed:think>", "<mm:think>": "</mm:think>", "◁think▷": "◁/think▷",
            "<|channel>thought": "<channel|>",
            "<|channel|>analysis<|message|>": "<|channel|>final<|message|>"}
OPENED, CLOSED = ("|".join(map(re.escape, marks)) for marks in (THOUGHTS, THOUGHTS.values()))


def without_thoughts(response: str) -> str:
    """A response without its thoughts. A thought that never ends hides everything after it. A closing mark on
    its own ends a thought that the prompt opened. Responses go through this before any judge sees them."""
    response = re.sub(rf"(?is)(?:{OPENED}).*?(?:{CLOSED}|\Z)", "", response)
    return re.split(rf"(?i){CLOSED}", response)[-1].strip()


def opened_thought(processor: ProcessorMixin) -> str:
    """The mark with which the chat template opens a thought before a response, or "". If the mark is put in
    front of the response, without_thoughts also hides a thought that was cut off."""
    prompt = render(processor, chat_turns("?", 0), add_generation_prompt=True).rstrip()
    return next((mark for mark in THOUGHTS if prompt.endswith(mark)), "")


def end_of_thought(processor: ProcessorMixin) -> str:
    """The text that closes the thought that the chat template opens, or ""."""
    return f"\n{THOUGHTS[opened]}\n\n" if (opened := opened_thought(processor)) else ""


MARK = "<image>"                                                   # the place of an image in a question


def chat_turns(question: str, images: int, history: tuple[tuple[str, str], ...] = ()) -> list[dict]:
    """Chat messages for earlier turns and a question. Images go where MARK stands; if there are no marks, all
    go first. Raises UserError if marks and images differ in number."""
    asked, replies, turns = [*(text for text, _ in history), question], [reply for _, reply in history], []
    marks = sum(text.count(MARK) for text in asked)
    if marks not in (0, images):
        raise UserError(f"the question {question[:80]!r} marks {marks} places with {MARK}, but the number "
                        f"of images is {images}")
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
    """The chat prompt of a question as text, with one placeholder for each image. Raises UserError if a
    text spells one of the model's image tokens, which would count as one more image."""
    turns = chat_turns(question, images, history)
    for token in image_tokens(processor):
        if any(token in part.get("text", "") for turn in turns for part in turn["content"]):
            raise UserError(f"the question {question[:80]!r} spells {token}, which this model reads as an "
                            f"image")
    return render(processor, turns, add_generation_prompt=True)


# What a family's code raises when it gets input that it was not made for.
FAMILY_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError)


def process(processor: ProcessorMixin, text: str, images: list[Image.Image]):
    """The tensors that a processor makes from a prompt. Raises UserError if it refuses an odd image."""
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
    """An upper bound on the tokens for an image of this (width, height), including the marks around it. Most
    families can compute it. For others, and for odd shapes (which some refuse), we try a blank image."""
    odd = min(size) < 28 or max(size) > 10 * min(size)
    if odd or not hasattr(processor, "_get_num_multimodal_tokens"):
        blank = process(processor, prompt_text(processor, "?", 1), [Image.new("RGB", size)])
        return blank["input_ids"].shape[1]
    return 8 + processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens[0]


def as_outputs(texts: list[list[str]], rows: list[Tensor]) -> Outputs:
    """Build Outputs from B lists of K texts and the token ids of each text."""
    ids = pad_sequence(rows, batch_first=True)                                               # (B K, R)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return Outputs(texts, ids.unflatten(0, (len(texts), -1)), mask.unflatten(0, (len(texts), -1)))


def decode(vlm: VLM, responses: list[Tensor]) -> list[str]:
    """Convert the token ids of responses to text, without stop and banned tokens or surrounding space."""
    forbidden = {*vlm.stop_ids, *vlm.banned_ids}
    rows = [[i for i in ids.tolist() if i not in forbidden] for ids in responses]
    return [text.strip() for text in vlm.tokenizer.batch_decode(rows)]


def concat(parts: list[Outputs]) -> Outputs:
    """Put responses to the same questions side by side, padded to the longest."""
    texts = [sum(rows, []) for rows in zip(*(part.text for part in parts))]
    rows = [ids[mask] for b in range(len(texts)) for part in parts
            for ids, mask in zip(part.ids[b], part.mask[b])]
    return as_outputs(texts, rows)


def images_of(trunk, prompts: list[Prompt]) -> dict[str, Tensor]:
    """The images of some prompts as one batch, in the order of the prompts, on the model's device."""
    images = {}
    for name in {name for p in prompts for name in p.images}:
        x = stack([p.images[name] for p in prompts if name in p.images]).to(trunk.device)
        images[name] = x.to(trunk.dtype) if x.is_floating_point() else x
    return images


def stack(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension, and zero-pad the others to the largest. Families that cut images
    into tiles give (images, tiles, ...). Prompts differ in their number of tiles; models skip empty ones."""
    largest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors))]
    whole = tensors[0].new_zeros(sum(map(len, tensors)), *largest)
    for x, rows in zip(tensors, whole.split([len(x) for x in tensors])):
        rows[(slice(None), *map(slice, x.shape[1:]))] = x
    return whole


def positions_of(vlm: VLM, ids: Tensor, images: dict[str, Tensor]) -> Tensor:
    """The positions (X, P) of a prompt's tokens (1, P). The Qwen-VL families compute theirs."""
    if not hasattr(vlm.trunk, "get_rope_index"):
        return torch.arange(ids.shape[1])[None]
    is_image = (ids == vlm.model.config.image_token_id).int()
    positions, _ = vlm.trunk.get_rope_index(ids, mm_token_type_ids=is_image,
                                            attention_mask=torch.ones_like(ids),
                                            image_grid_thw=images.get("image_grid_thw"))
    return positions[:, 0]                                         # of (3, 1, P)


def position_ids(positions: Tensor) -> Tensor:
    """Positions (B, L, X) as a model wants them: (B, L), or (3, B, L) if there are three axes."""
    return positions.movedim(-1, 0) if positions.shape[-1] > 1 else positions[..., 0]


ATTENTION = ("full_attention", "sliding_attention")                # layer types that packing supports


def sees_image_both_ways(trunk) -> bool:
    """Whether image tokens see later tokens of their image, as in Gemma 3 (forward's arguments show it)."""
    return "token_type_ids" in inspect.signature(trunk.forward).parameters


def of_same_image(trunk, tokens: Tensor) -> Tensor:
    """Which tokens (rows, L) belong to the same image, (rows, L, L) bool."""
    is_image = tokens == trunk.config.image_token_id
    starts = is_image & ~pad(is_image, (1, 0))[:, :-1]
    image = starts.cumsum(1) * is_image                            # 1, 2, ... per image, else 0
    return (image[:, :, None] == image[:, None]) & (image[:, None] > 0)


def attention_masks(trunk, visible: Tensor, back: Tensor) -> Tensor | dict[str, Tensor]:
    """Turn `visible`, (B, Q, L) bool, into the additive mask (B, 1, Q, L) that attention expects. If some
    layers have a sliding window, which limits `back` (B, Q, L), return one mask per layer type."""
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
    """Read prompts once, padded on the right, where no real token sees the padding. Returns what Slots.start
    needs, a row per prompt: each layer's keys and values (B, heads, P, w), and the first four Slots.rows."""
    cache = DynamicCache()
    _, ids, mask, positions = read_prompts(vlm, prompts, cache, "right")
    last = mask.sum(1, keepdim=True) - 1                                                     # (B, 1)
    rows = {"token": ids.gather(1, last), "column": last, "position": positions[range(len(ids)), last[:, 0]],
            "seen": seen_in(vlm, ids, mask)}
    return [x for layer in cache.layers for x in (layer.keys, layer.values)], rows


def read_prompts(vlm: VLM, prompts: list[Prompt], cache: DynamicCache, side: str) -> tuple[Tensor, ...]:
    """Fill the cache by a forward pass over prompts, padded on this side. Returns states (B, P, d), ids and
    mask (B, P), and positions (B, P, X)."""
    def batch(rows):
        return pad_sequence(rows, batch_first=True, padding_side=side).to(vlm.device)
    ids, positions = batch([p.ids for p in prompts]), batch([p.positions.T for p in prompts])
    mask = batch([torch.ones_like(p.ids) for p in prompts])
    out = vlm.trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids(positions), use_cache=True,
                    past_key_values=cache, **token_types(vlm.trunk, ids), **images_of(vlm.trunk, prompts))
    return out.last_hidden_state, ids, mask, positions


def seen_in(vlm: VLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Which tokens occur in each prompt, (B, V) bool."""
    seen = torch.zeros(len(ids), vlm.model.get_output_embeddings().out_features, device=vlm.device)
    return seen.scatter_add_(1, ids, mask.float()) > 0


class Slots:
    """Responses in progress, one in each slot.

    rows holds tensors with one row per slot: token, the last one; its position (X) and its column (1) in the
    cache; seen (V), the tokens so far; count, the number of sampled tokens; ids (R + 1), those tokens;
    noise (R); end, the response's length once it has ended. cache holds each layer's keys and values in turn,
    (slots, heads, room, w). The first columns of a slot are [prompt | response so far], without padding:

        column    0   1   2   3   4   5   6   7
        slot 0    p   p   p   p   r   r   *   .        * is written in this step
        slot 1    p   p   r   *   .   .   .   .        . is hidden by the mask

    A decode step does the same work on the same memory, no matter how long each response is. On CUDA it is
    recorded once for each number of slots (all, half, a quarter, ...) and replayed as a graph. Otherwise,
    launching the kernels of a small step would take most of its time.
    """

    stride = None                                                  # tokens between two checks by the host

    def __init__(self, vlm: VLM, sampling: Sampling, size: int, measures_tail: bool = False):
        self.vlm, self.sampling, self.size = vlm, sampling, size
        self.measures_tail = measures_tail and sampling.temperature > 0
        self.rows, self.cache, self.graphs = {}, [], {}
        self.room = self.columns = 0                               # columns allocated, and columns in use
        self.stride = self.stride or (1 if vlm.device.type == "cpu" else 8)
        self.capturing = vlm.device.type == "cuda" and vlm.capture and not reads_length(vlm.trunk)
        self.stops, self.banned = (torch.tensor(ids, device=vlm.device, dtype=torch.long)
                                   for ids in (vlm.stop_ids, vlm.banned_ids))

    def start(self, first: int, cache: list[Tensor], rows: dict[str, Tensor], which: Tensor, noise: Tensor):
        """Fill N slots: slot first + i starts from row which[i] of what prefill returned. noise: (N, R)."""
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
        """Give every slot at least this many columns; steps of 64 make the memory move less often."""
        if not self.cache:
            self.cache = [x.new_zeros(self.size, x.shape[1], 0, x.shape[3]) for x in like]
        more = -(-columns // 64) * 64 - self.room
        if more > 0:
            self.room += more
            self.graphs.clear()                                    # they write to the old memory
            for i, x in enumerate(self.cache):
                self.cache[i] = pad(x, (0, 0, 0, more))

    def close_gaps(self, ends: list[int]) -> list[tuple[int, int]]:
        """Move the last running responses into the slots of those that ended; return each (from, to)."""
        live = ends.count(0)
        sources = [s for s in range(live, len(ends)) if not ends[s]]
        targets = [s for s in range(live) if ends[s]]
        if sources:
            source, target = torch.tensor([sources, targets], device=self.vlm.device)
            for x in (*self.rows.values(), *self.cache):
                x[target] = x[source]
        return list(zip(sources, targets))

    def advance(self, live: int) -> list[int]:
        """Decode `stride` tokens in the first `live` slots; return lengths of ended responses, 0 for others.
        (Tokens after an end are never read. Each check for ends makes the host wait for the GPU.)"""
        if self.stride == 1:                                       # checks are free: take only what is in use
            n, self.columns = live, int(self.rows["column"][:live].max()) + 1
        else:                                                      # few different sizes mean few graphs
            n, self.columns = self.size, self.room
            while n // 2 >= live:
                n //= 2
        for _ in range(self.stride):
            if n in self.graphs:
                self.graphs[n].replay()
                continue
            self.step(n)                                           # also warms up, which recording needs
            if self.capturing:
                self.capture(n)
        return self.rows["end"][:live, 0].tolist()

    def capture(self, n: int):
        """Record a decode step of n slots. If that fails, steps run as on the CPU, and a notice says so.
        Graphs are replayed one at a time, so all can keep temporary tensors in the first graph's memory."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        shared = next(iter(self.graphs.values())).pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=shared):
                self.step(n)
            self.graphs[n] = graph
        except RuntimeError as error:
            torch.cuda.set_stream(before)                          # torch leaves the capture stream current
            self.capturing = self.vlm.capture = False
            cause = error.__context__ or error                     # torch's second error hides the first
            print(f"{type(self.vlm.model).__name__} is decoded without CUDA graphs: "
                  f"{str(cause).splitlines()[0]}")

    def step(self, n: int):
        """Decode one token in each of the first n slots, in place and without waiting for the device."""
        r, R = {name: x[:n] for name, x in self.rows.items()}, self.sampling.max_new_tokens
        back = r["column"] - torch.arange(self.columns, device=self.vlm.device)              # (n, columns)
        attention = attention_masks(self.vlm.trunk, (back >= 0)[:, None], back[:, None])
        states = self.vlm.trunk(input_ids=r["token"], position_ids=position_ids(r["position"][:, None]),
                                use_cache=True, past_key_values=self,
                                attention_mask=attention).last_hidden_state                  # (n, 1, d)
        logits = next_logits(self.vlm, states, self.banned)                                  # (n, V)
        if self.measures_tail:                                     # not for tokens after the end
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
        """transformers calls this on a cache: store (n, heads, 1, w), return (n, heads, columns, w)."""
        n = len(key)
        at = self.rows["column"][:n, :, None, None]
        keys = self.cache[2 * layer][:n].scatter_(2, at.expand_as(key), key)
        values = self.cache[2 * layer + 1][:n].scatter_(2, at.expand_as(value), value)
        return keys[:, :, :self.columns], values[:, :, :self.columns]

    def get_seq_length(self, *_) -> int:
        """Not zero, because this is not prefill. (position_ids and the mask say where the tokens are.)"""
        return 1


def stream_in_step(vlm: VLM, line: Iterator, G: int, sampling: Sampling, slots: int,
                   tails: list | None) -> Iterator[tuple[int, list[Tensor]]]:
    """`stream` for families whose cache holds more than keys and values, such as linear attention's state. It
    reads as many prompts as there are slots for, padded on the left. Their samples then advance in step, in
    the model's own cache; samples that have ended leave the batch."""
    R, device = sampling.max_new_tokens, vlm.device
    stops = torch.tensor(vlm.stop_ids, device=device)
    banned = torch.tensor(vlm.banned_ids, device=device, dtype=torch.long)
    while ahead := list(islice(line, max(1, slots // G))):
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        states, ids, mask, positions = read_prompts(vlm, [p for _, (p, _) in ahead], cache, "left")
        live = torch.arange(len(ahead) * G, device=device)         # the rows still running
        which = live // G                                          # G samples start from each prompt
        cache.reorder_cache(which)
        states, mask, position, seen = (x[which] for x in (states[:, -1:], mask, positions[:, -1:],
                                                           seen_in(vlm, ids, mask)))
        noise, tail_sums = torch.cat([own for _, (_, own) in ahead]), torch.zeros(len(live), device=device)
        chosen, lengths = torch.zeros(len(live), R, dtype=torch.long, device=device), torch.full_like(live, R)
        for step in range(R):
            logits = next_logits(vlm, states, banned)                                        # (N, V)
            if tails is not None and sampling.temperature:
                tail_sums[live] += tail(logits, sampling)
            token = sample(logits, seen, sampling, noise[live, step])                        # (N,)
            chosen[live, step] = token
            ended = (token[:, None] == stops).any(1)
            lengths[live[ended]] = step + 1
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
    """Logits (N, V) float32 of the token after the last of the states (N, P, d); -inf for banned tokens."""
    logits = squash(vlm.model.get_output_embeddings()(states[:, -1]).float(), vlm.scale, vlm.cap)
    return logits.index_fill_(1, banned, -torch.inf)


def tail(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probability of the tokens that top-k and top-p leave out, (N,), from logits (N, V)."""
    probs = (logits / sampling.temperature).softmax(-1)
    probs = probs.topk(min(sampling.top_k or logits.shape[-1], logits.shape[-1])).values
    kept = probs.cumsum(-1) - probs < sampling.top_p * probs.sum(-1, keepdim=True)
    return (1 - (probs * kept).sum(-1)).clamp(min=0)


def reads_length(trunk) -> bool:
    """Whether the rotary embedding reads the length of the text, which a CUDA graph cannot do."""
    kinds = [str(getattr(module, "rope_type", "")) for module in trunk.modules()]      # Gemma has several
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


# ---------------------------------------------------------------------------------------------- packing


ROW = 128                                                         # tokens in a row that short questions share


def row_sizes(packs: bool, prompts: list[Prompt], mask: Tensor) -> list[int]:
    """How many tokens each question takes: its responses (B, K, R) without padding, plus its prompt, which
    counts K times unless responses can be packed."""
    times = 1 if packs else mask.shape[1]
    return [times * len(p.ids) + n for p, n in zip(prompts, mask.sum((1, 2)).tolist())]


def micro_batches(sizes: list[int], budget: int) -> list[list[int]]:
    """Split questions of these sizes into groups of at most `budget` tokens, or of one question. Similar
    sizes go together, because each row is padded to the longest of its group. With 144 questions whose
    pictures vary in size, 2% of the tokens are padding, instead of 27% in the original order."""
    groups, total = [], budget
    for b in sorted(range(len(sizes)), key=sizes.__getitem__):
        if total + sizes[b] > budget:
            groups.append([])
            total = 0
        groups[-1].append(b)
        total += sizes[b]
    return groups


@dataclass
class Rows:
    """Prompts and responses laid out in rows of L tokens by `pack`; see packed_states."""
    order: list[int]                   # indices of the questions as they lie; several short ones fit in a row
    tokens: Tensor                     # (rows, L)
    question: Tensor                   # (rows, L), -1 for padding
    owner: Tensor                      # (rows, L)
    place: Tensor                      # (rows, L): 0, 1, ... along the prompt and on into each response
    positions: Tensor                  # (rows, L, X): for the rotary embedding; equal to place unless X = 3
    at: Tensor                         # (N,): indices of the response tokens, with the rows laid end to end
    before: Tensor                     # (N,): indices of the tokens that predict them


def pack(prompts: list[Prompt], ids: Tensor, mask: Tensor, shared: bool = True) -> Rows:
    """Lay out prompts and responses (B, K, R) in rows, as packed_states shows.

    If `shared`, short questions share a row of up to ROW tokens. Longer rows would need less padding, but
    attention compares every token of a row with every other.
    """
    lengths, sizes = mask.sum(2).tolist(), row_sizes(True, prompts, mask)      # of responses, of questions
    rows = micro_batches(sizes, max(ROW, *sizes)) if shared else [[b] for b in range(len(sizes))]
    L = max(sum(sizes[b] for b in row) for row in rows)
    responses = ids[mask].split([sum(n) for n in lengths])
    tokens, owner, place, positions = [], [], [], []               # of each question, (tokens,)
    for prompt, response, n in zip(prompts, responses, lengths):
        P = len(prompt.ids)
        tokens.append(torch.cat([prompt.ids.to(ids.device), response]))
        owner.append(torch.arange(len(n) + 1).repeat_interleave(torch.tensor([P, *n])))
        place.append(torch.cat([torch.arange(P), *(torch.arange(P, P + r) for r in n)]))
        after = prompt.positions[:, -1:] + 1 + place[-1][P:] - P   # responses continue the prompt's count
        positions.append(torch.cat([prompt.positions, after], dim=1).T)

    at, before = [None] * len(sizes), [None] * len(sizes)
    for number, row in enumerate(rows):
        start = number * L                                         # where the question starts in flat rows
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
    """What packed_states returns, for families that cannot be packed. Each of the B K responses has its own
    row [prompt | o_k], padded on the right; the model makes its own mask."""
    each = [prompt for prompt in prompts for _ in range(mask.shape[1])]
    rows = pack(each, ids.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None], shared=False)
    visible, types = (rows.question >= 0).long(), token_types(trunk, rows.tokens)            # (B K, L)
    return states_of_rows(trunk, rows, visible, each, **types)


def states_of_rows(trunk, rows: Rows, mask, prompts: list[Prompt], **types) -> tuple[Tensor, Tensor, Tensor]:
    """What packed_states returns, by a forward pass over rows of these prompts under a mask."""
    # Layers checkpoint only in training mode. The modules inside them (dropout) stay in evaluation mode.
    for layer in trunk.modules():
        layer.training = torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)
    states = trunk(input_ids=rows.tokens, position_ids=position_ids(rows.positions), attention_mask=mask,
                   use_cache=False, **types,
                   **images_of(trunk, [prompts[b] for b in rows.order])).last_hidden_state   # (rows, L, d)
    trunk.eval()
    return states.flatten(0, 1), rows.at, rows.before


def squash(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """What a family does to its head's logits: cap tanh(scale logits / cap), in place."""
    logits = logits if scale == 1 else logits.mul_(scale)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def head_chunk(weight: Tensor) -> int:
    """Rows per chunk of logits. Few fit a CPU's cache; on a GPU, many mean fewer reads of the weights."""
    return max(1, (2 ** 26 if weight.is_cuda else 2 ** 23) // len(weight))


class TokenLogps(torch.autograd.Function):
    """The head and the softmax, one chunk of rows at a time. Backward recomputes each chunk, and turns it in
    place into d log p[t] / d logits = (1[t] - p) / temperature, times the slope of `squash`. (A loop of
    torch.utils.checkpoint makes a V x d gradient of the weight for each chunk. With V = 152,000 and N = 768,
    a whole update then took 10% longer and 28% to 55% more memory.)"""

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


# The largest error allowed in log-probs and probabilities. In float32, rounding stays below 1e-6 (at 0.3B),
# while reading an image in one direction only makes 5e-4. Rounding to bfloat16 hides such an error.
MOST_ERROR = {torch.float32: 5e-5, torch.bfloat16: 0.05}


@torch.no_grad()
def check_scoring(vlm: VLM, prompts: list[Prompt]):
    """Score two responses to each prompt, and decode, both as training does and by the model's own forward
    pass. Raises UserError if the two differ.

    This checks, on the model at hand, what rows and slots assume of a family: what sees what, how positions
    count, and that find_head describes the logits. It turns the model into float32 for good, because rounding
    to bfloat16 would hide a response that sees its sibling.
    """
    outputs = encode_responses(vlm, [["Yes.", "It is not."]] * len(prompts))
    vlm.model.float()
    scored = score(vlm, prompts, outputs)
    for b, k in product(range(len(prompts)), range(2)):
        mask = outputs.mask[b, k]
        response = outputs.ids[b, k][mask]
        plain = plain_logits(vlm, prompts[b], response).log_softmax(-1).gather(1, response[:, None])[:, 0]
        refuse(vlm, "it reads responses in rows", (plain - scored[b, k][mask]).abs().mean())
    check_decoding(vlm, prompts)


@torch.no_grad()
def check_decoding(vlm: VLM, prompts: list[Prompt]):
    """Decode a few tokens as `stream` does. Raises UserError if that fails, or if their probabilities differ
    from those of the model's own forward pass."""
    sampling, rest = Sampling(top_p=1, top_k=1, repetition_penalty=1, max_new_tokens=6), 0.0
    noise = [torch.zeros(1, sampling.max_new_tokens, device=vlm.device)] * len(prompts)
    try:
        outputs = generate(vlm, prompts, 1, sampling, noise=noise)             # greedy: the tail is 1 - p
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
    """Raise UserError if an error is larger than rounding explains."""
    if not error < MOST_ERROR[vlm.model.dtype]:
        raise UserError(f"{vlm.model.name_or_path} ({type(vlm.model).__name__}): with this code {what} "
                        f"differently from its own forward pass (off by {error:.3g})")


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the mask alone decides what a family's layers see, and they see only the past (or all of an
    image, if `sees_image_both_ways`). Then responses can share a row, and samples can decode in slots."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    unsaid = not kinds and getattr(text, "sliding_window", None)   # a window, but in which layers?
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return kinds <= set(ATTENTION) and not unsaid and not both_ways


@torch.no_grad()
def find_head(vlm: VLM, prompt: Prompt) -> tuple[float, float | None]:
    """(scale, cap) of a family's logits, cap tanh(scale head(states) / cap): the values in its config, if the
    model really applies them. Most families use neither."""
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


def plain_logits(vlm: VLM, prompt: Prompt, response: Tensor, states: bool = False):
    """The logits (R, V) that predict the tokens (R,) of a response, from the model's own forward pass. With
    `states`, also its last layer's states (R, d)."""
    ids = torch.cat([prompt.ids.to(vlm.device), response])[None]                             # (1, P + R)
    out = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=states,
                    **token_types(vlm.model, ids), **images_of(vlm.trunk, [prompt]))
    logits = out.logits[0, len(prompt.ids) - 1:-1].float()
    return (logits, out.hidden_states[-1][0, len(prompt.ids) - 1:-1]) if states else logits


def token_types(module, tokens: Tensor) -> dict[str, Tensor]:
    """Which tokens (rows, L) belong to images, under whichever argument names the forward pass accepts."""
    accepted = inspect.signature(module.forward).parameters
    is_image = (tokens == getattr(module.config, "image_token_id", -1)).long()
    return {name: is_image for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}


# ---------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """The processes that torchrun started; this one is number `rank`. A single process needs none of this.

    All processes work on every stage of a run. Each draws the same batch of questions and the same noise, and
    works on its own part of them, rank::size. Trained models are sharded (`shard`, FSDP2). A process has all
    weights only while it samples (in the loop: `unsharded`). The processes exchange nothing while one of them
    samples or asks a judge. Only rank 0 writes finished files and prints to the console.
    """
    rank: int = 0
    size: int = 1
    mesh: object = None

    @classmethod
    def from_torchrun(cls, device: torch.device):
        """The world that torchrun's environment describes, or a single process if there is none."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from torch.distributed.device_mesh import DeviceMesh
        backend, on_device = "gloo", {}
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            backend, on_device = "nccl", {"device_id": device}
        # When torchrun restarts all processes, its store still holds the addresses of the dead ones.
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(hours=1)))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # Processes may wait for days, say while rank 0 asks a server; in training, never as long as an hour.
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(days=30),
                                **on_device)
        group = dist.new_group(timeout=timedelta(hours=1))
        if rank:                                                   # the other ranks show only errors
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        return cls(rank, size, DeviceMesh.from_group(group, device.type))

    def barrier(self):
        """Wait until all processes have arrived here."""
        if self.size > 1:
            dist.barrier()

    def rank_0(self, work: Callable):
        """Wait for all processes, call work() in rank 0 only, and return its result in all of them."""
        self.barrier()
        result = [None if self.rank else work()]
        if self.size > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def close(self):
        """End the process group, once rank 0 has written its report."""
        self.barrier()
        if self.size > 1:
            dist.destroy_process_group()

    def mine(self, items: list) -> list:
        """This process's part of the batch."""
        return items[self.rank::self.size]

    def all_gather(self, items: list) -> list:
        """Collect the results of all processes for their parts, in the order of the batch."""
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
        """Micro-batches with their weights, equally many in each process, because FSDP needs all processes in
        every forward and backward pass. A process with fewer repeats its first question, with weight 0."""
        most = max(self.all_gather([len(parts)]))
        return [(part, 1.0) for part in parts] + [([0], 0.0)] * (most - len(parts))

    def shard(self, module: torch.nn.Module, decoder: torch.nn.Module, *others: torch.nn.Module,
              method: str = "gathered"):
        """Leave each process a part of each weight. FSDP gathers the weights when they are used: each decoder
        layer and each of `others` in its own forward and backward pass, the rest of `module` in those of
        `method`. Gradients are sums over the processes, whose number so does not change the result.

        The vision tower belongs to the rest. A process whose micro-batch has no image does not run it; if the
        tower's layers were gathered one by one, the other processes would wait for this one.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        layers = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for part in (*layers, *others, module):
            fully_shard(part, mesh=self.mesh, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)                   # sums, not means
            part.set_force_sum_reduction_for_comms(True)           # gloo supports no other kind
        module.set_reduce_scatter_unused_params(True)              # zero if no image was seen
        # Otherwise, with a frozen embedding, layer 0 would have a backward pass only if there are images.
        decoder.get_input_embeddings().register_forward_hook(lambda _, __, states: states.requires_grad_())
        module.gathered = lambda work: work()                      # see `gathered`
        register_fsdp_forward_method(module, method)

    def without_weights(self, vlm: VLM) -> VLM:
        """A copy of `vlm` with empty weights, which `unsharded` fills. Make it before `vlm` is sharded."""
        if self.size == 1:
            return vlm
        empty = {id(w): torch.nn.Parameter(w.new_empty(0), requires_grad=False)
                 for w in vlm.model.parameters()}
        return replace(vlm, model=copy.deepcopy(vlm.model, empty))

    @contextmanager
    def unsharded(self, vlm: VLM, empty: VLM):
        """Fill `empty` with all weights of `vlm` for a while. (FSDP's hooks would gather them per token.)"""
        if self.size == 1:
            yield vlm
            return
        for name, weight in vlm.model.named_parameters():
            empty.model.get_parameter(name).data = weight.detach().full_tensor()
        yield empty
        for weight in empty.model.parameters():
            weight.data = weight.new_empty(0)

    def shard_of(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """This process's part of a tensor shaped like the weight. FSDP cuts along the first dimension."""
        if not hasattr(weight, "to_local"):
            return tensor
        parts = list(tensor.chunk(self.size))
        parts += [tensor[:0]] * (self.size - len(parts))
        return parts[self.rank].clone()

    def full_tensor(self, part: Tensor, weight: Tensor) -> Tensor:
        """The reverse of `shard_of`, for rank 0 only. It goes to the CPU, as a device may lack the memory."""
        if not hasattr(weight, "to_local"):
            return part
        from torch.distributed.tensor import DTensor
        shards = DTensor.from_local(part, self.mesh, weight.placements, run_check=False, shape=weight.shape,
                                    stride=weight.stride())
        tensor = shards.full_tensor()
        return tensor[:0] if self.rank else tensor.cpu()

    @torch.no_grad()
    def full_weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """All weights of a module by name, as `full_tensor` returns them. (Tied weights appear once.)"""
        return {name: self.full_tensor(local(weight), weight) for name, weight in module.named_parameters()}


def local(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def gathered(module: torch.nn.Module, work):
    """Run work(), which may use the module's weights outside its forward pass, with the weights gathered."""
    return module.gathered(work) if hasattr(module, "gathered") else work()
