"""A vision-language model as a policy: load it, show it a picture and a question, sample from it, score text under it.

Everything RIL asks of a model is here, written out rather than called:

    encode    example -> prompt        the chat template and the processor, one example at a time
    generate  prompts -> outputs       line 5 of Algorithm 2: G samples of each prompt, batched, with a KV cache
    score     prompts, outputs -> log-probs      what the ratio, the KL and the supervised loss are made of

Two ideas make it cheap. Both come from the same fact: the K responses of a question share one image and one prompt.
`generate` prefills each prompt once and only then repeats its KV cache for the G samples. `score` does the mirror image
in training: one row holds [prompt | o_1 | o_2 | ... | o_K] under a mask that lets every response see the prompt and
itself but not its siblings, so the image and the prompt are computed once per question and not K times.

Notation, here and in every file: B questions, G samples of each side, K responses per question (K = 2G in RIL: students
first, then teachers), P prompt tokens, R response tokens, V vocabulary, d width.
"""
import inspect
import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
                          DynamicCache, GenerationConfig, InternVLConfig, PreTrainedModel, ProcessorMixin, Qwen2_5_VLConfig, Qwen2Tokenizer)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available


class UserError(Exception):
    """Something the user can mend: one sentence that names the file, the line and what was expected. Exit code 2."""


def run(main):
    """Call `main`; end with one sentence on stderr and exit code 2 on a UserError, never with a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


@dataclass
class VLM:
    """A model and the processor that speaks for it.

    stop_ids end a response. banned_ids are never sampled: a policy that emits an image placeholder would crash its own
    next forward pass, because the model then counts more placeholders than image features.
    """
    model: PreTrainedModel
    processor: ProcessorMixin
    stop_ids: list[int]
    banned_ids: list[int]
    prompts: dict = field(default_factory=dict)                    # prompts encoded before, while there is room (bytes)
    room: int = 2 ** 29

    @property
    def device(self):
        return self.model.device

    @property
    def tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def trunk(self):
        """The model without its vocabulary head."""
        return self.model.base_model


@dataclass
class Prompt:
    """One question, ready for the model: token ids (P,), what the image processor made of its images (may be {}), and the
    places of the tokens: (P,), or (3, P) in the Qwen-VL families, whose rotary embedding counts time, height and width."""
    ids: Tensor
    images: dict[str, Tensor]
    positions: Tensor


@dataclass
class Outputs:
    """K responses to each of B questions. The mask is made where the tokens are made, and includes the stop token.

    text: B lists of K strings; ids: (B, K, R) long, zero where padded; mask: (B, K, R) bool, True on response tokens.
    """
    text: list[list[str]]
    ids: Tensor
    mask: Tensor

    def __getitem__(self, questions: slice):
        return Outputs(self.text[questions], self.ids[questions], self.mask[questions])


def join(parts: list[Outputs], dim: int) -> Outputs:
    """Outputs as one, padded to the longest R: dim 0 puts questions after questions, dim 1 responses after responses."""
    text = [row for part in parts for row in part.text]
    if dim == 1:
        text = [sum(rows, []) for rows in zip(*(part.text for part in parts))]
    return Outputs(text, stack([part.ids.transpose(0, dim) for part in parts]).transpose(0, dim),
                   stack([part.mask.transpose(0, dim) for part in parts]).transpose(0, dim))


def stack(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension; the others are zero-padded to the largest. Families that cut an image into
    tiles give (images, tiles, ...), with tiles that differ from prompt to prompt, and skip the empty ones."""
    largest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors))]
    padding = [[n for have, want in zip(x.shape[:0:-1], largest[::-1]) for n in (0, want - have)] for x in tensors]
    return torch.cat([torch.nn.functional.pad(x, p) if any(p) else x for x, p in zip(tensors, padding)])


# ---------------------------------------------------------------------------------------------- load and save


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device)


def load_vlm(path: str, device: str | None = None, dtype: str | None = None, text_only: bool = False) -> VLM:
    """Load any image-text-to-text checkpoint, a folder or a hub id. dtype: bfloat16 on a GPU, float32 on the CPU.

    text_only also takes a language model without eyes (a judge needs none). Raises UserError when there is no such
    checkpoint, or it is not a chat model of that kind.
    """
    processor, device = load_processor(path, text_only), pick_device(device)
    dtype = getattr(torch, dtype) if dtype else torch.float32 if device.type == "cpu" else torch.bfloat16
    kind = AutoModelForImageTextToText if hasattr(processor, "image_processor") else AutoModelForCausalLM
    with naming(path):
        model = kind.from_pretrained(path, dtype=dtype).to(device).eval()
    return VLM(model, processor, *special_ids(model, processor))


@contextmanager
def naming(path: str):
    """Turn what transformers raises over a missing or foreign checkpoint into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not an image-text-to-text checkpoint that can be loaded "
                        f"({str(error).strip().splitlines()[0]})") from error


def load_processor(path: str, text_only: bool = False) -> ProcessorMixin:
    """AutoProcessor, also where torchvision is missing. Raises UserError like load_vlm, without reading any weights.

    Families that can watch videos want a video processor, and that one wants torchvision. We only show still images, so
    without torchvision the family's processor is told that it has no such part. SmolVLM's wants one more package, to
    spell out the times in a video: it never gets to.
    """
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    with naming(path):
        config = AutoConfig.from_pretrained(path)
        family = PROCESSOR_MAPPING.get(type(config), None)
        if text_only and not hasattr(config, "vision_config"):
            processor = AutoTokenizer.from_pretrained(path)
        elif is_torchvision_available() or family is None:
            processor = AutoProcessor.from_pretrained(path)
        else:
            class ImagesOnly(family):
                @classmethod
                def get_attributes(cls):
                    return [part for part in super().get_attributes() if part != "video_processor"]

                @classmethod
                def from_args_and_dict(cls, args, settings, **kwargs):
                    none = {"video_processor": None} if "video_processor" in super().get_attributes() else {}
                    return super().from_args_and_dict(args, settings | none, **kwargs)

            ImagesOnly.__name__ = family.__name__                  # the name that a saved processor_config.json carries
            processor = ImagesOnly.from_pretrained(path)
    if not text_only and not hasattr(processor, "image_processor"):
        raise UserError(f"{path}: a language model without eyes; an image-text-to-text model is needed here")
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{path}: its processor has no chat template, so it cannot be asked questions")
    return processor


def image_tokens(processor: ProcessorMixin) -> set[str]:
    """The placeholders that stand for images and videos in this family's text, and the marks around them."""
    names = [f"{part}_token" for part in ("image", "video", "boi", "eoi", "fake_image", "global_image", "start_image",
                                          "context_image", "vision_start")]
    return {token for owner in (processor, getattr(processor, "tokenizer", None)) for name in names
            if (token := getattr(owner, name, None))}


def checkpoint_layers(model: PreTrainedModel):
    """From now on, packed_states keeps the input of each layer only, and computes its inside again to go backward."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def save_vlm(vlm: VLM, path: str):
    """Write an ordinary checkpoint folder. It appears under its name only when it is whole."""
    unfinished = Path(f"{path}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    vlm.model.save_pretrained(unfinished)
    vlm.processor.save_pretrained(unfinished)
    if not hasattr(vlm.processor, "video_processor"):              # so that AutoProcessor, with torchvision, loads it too
        (unfinished / "video_preprocessor_config.json").write_text(json.dumps(vlm.processor.image_processor.to_dict()))
    unfinished.rename(path)


def special_ids(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[list[int], list[int]]:
    """(stop_ids, banned_ids). The first stop id is the one that ends an assistant turn of the chat template.

    Banned is every special token that does not end a response (image, video and turn markers, padding), and every row
    of the embedding that the tokenizer has no text for (vocabularies are padded to round sizes).
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    stops = model.generation_config.eos_token_id or tokenizer.eos_token_id
    stops = list(dict.fromkeys([tokenizer.eos_token_id] + (stops if isinstance(stops, list) else [stops])))
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    end = tokenizer(render(processor, turns).rsplit("assistant", 1)[1]).input_ids            # what follows a reply
    stops.sort(key=lambda i: end.index(i) if i in end else len(end))           # Gemma: <end_of_turn> before <eos>
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {i for name in ("image_token_id", "video_token_id") if (i := getattr(model.config, name, None)) is not None}
    unused = range(len(tokenizer), model.get_output_embeddings().out_features)
    return stops, sorted((special | named | set(unused)) - set(stops))


def render(processor: ProcessorMixin, turns: list[dict], add_generation_prompt: bool = False) -> str:
    """Chat turns, whose content is a list of image and text parts, as the text that the model's chat template makes."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:                                          # a language model: its template wants strings
        tokenizer, turns = processor, [{**t, "content": "".join(part["text"] for part in t["content"])} for t in turns]
    return tokenizer.apply_chat_template(turns, chat_template=processor.chat_template, tokenize=False,
                                         add_generation_prompt=add_generation_prompt)


# ---------------------------------------------------------------------------------------------- prompts


MARK = "<image>"                                                   # where in a question an image stands


def chat_turns(question: str, images: int, history: tuple[tuple[str, str], ...] = ()) -> list[dict]:
    """Chat messages of earlier (question, answer) pairs and a question; {"type": "image"} stands for each image.

    An image stands where MARK says so; without marks all stand first. UserError when there are too many or too few.
    """
    texts = [asked for asked, _ in history] + [question]
    marks = sum(text.count(MARK) for text in texts)
    if marks not in (0, images):
        raise UserError(f"the question {question[:80]!r} marks {marks} places with {MARK}, for {images} images")
    turns = []
    for i, text in enumerate(texts):
        pieces = ([""] * images if i == 0 and not marks else []) + text.split(MARK)
        content = [part for j, piece in enumerate(pieces) for part in
                   [{"type": "image"}] * (j > 0) + [{"type": "text", "text": piece.strip("\n")}] * bool(piece.strip())]
        turns.append({"role": "user", "content": content})
        if i < len(history):
            turns.append({"role": "assistant", "content": [{"type": "text", "text": history[i][1]}]})
    return turns


def encode(vlm: VLM, question: str, images: list[Image.Image], history: tuple[tuple[str, str], ...] = ()) -> Prompt:
    """Chat prompt that ends in a user's question, after the earlier turns of `history`. Images of any sizes, or none.

    Raises UserError when a text spells one of the model's image tokens: it would be counted as one more image.
    """
    turns = chat_turns(question, len(images), history)
    for token in image_tokens(vlm.processor):
        if any(token in part.get("text", "") for turn in turns for part in turn["content"]):
            raise UserError(f"the question {question[:80]!r} spells {token}, which this model reads as an image")
    text = render(vlm.processor, turns, add_generation_prompt=True)
    inputs = vlm.processor(text=[text], **({"images": images} if images else {}), return_tensors="pt",
                           add_special_tokens=needs_bos(vlm.tokenizer, text))
    ids = inputs.pop("input_ids")                                  # (1, P)
    images = {name: x for name, x in inputs.items() if name not in ("attention_mask", "mm_token_type_ids", "token_type_ids")}
    positions = torch.arange(ids.shape[1])
    if hasattr(vlm.trunk, "get_rope_index"):
        is_image = (ids == vlm.model.config.image_token_id).int()
        positions = vlm.trunk.get_rope_index(ids, mm_token_type_ids=is_image, attention_mask=torch.ones_like(ids),
                                             image_grid_thw=images.get("image_grid_thw"))[0][:, 0]
    return Prompt(ids[0], images, positions)


def needs_bos(tokenizer, text: str) -> bool:
    """Whether the tokenizer should still put its beginning-of-text token first: some chat templates have written it."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def encode_responses(vlm: VLM, texts: list[list[str]]) -> Outputs:
    """Responses that came as text (a teacher's, a ground truth) as tokens of this model: text, then the stop token.

    `split_special_tokens` reads everything as plain text, so no response can spell an image token or end its own turn.
    """
    rows = vlm.tokenizer(sum(texts, []), add_special_tokens=False, split_special_tokens=True).input_ids
    ids = [torch.tensor(row + vlm.stop_ids[:1], device=vlm.device) for row in rows]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)    # (B * K, R)
    return Outputs(texts, pad_sequence(ids, batch_first=True).unflatten(0, (len(texts), -1)),
                   mask.unflatten(0, (len(texts), -1)))


def collate(vlm: VLM, prompts: list[Prompt]) -> dict:
    """Prompts as one left-padded batch: input_ids, mask bool and is_image bool (B, P), position_ids ([3,] B, P), images.

    Left-padded, so that the last column is every prompt's last token.
    """
    def pad(rows):
        return pad_sequence(rows, batch_first=True, padding_side="left").to(vlm.device)
    ids, mask = pad([p.ids for p in prompts]), pad([torch.ones_like(p.ids, dtype=torch.bool) for p in prompts])
    positions = pad([p.positions.movedim(-1, 0) for p in prompts])                           # (B, P[, 3])
    names = {name for p in prompts for name in p.images}
    images = {name: stack([p.images[name] for p in prompts if name in p.images]).to(vlm.device) for name in names}
    images = {name: x.to(vlm.model.dtype) if x.is_floating_point() else x for name, x in images.items()}
    return {"input_ids": ids, "mask": mask, "images": images, "position_ids": positions.movedim(-1, 0) if positions.dim() == 3
            else positions, "is_image": mask & (ids == getattr(vlm.model.config, "image_token_id", -1))}


# ---------------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Sampling:
    """How to sample (the paper's values). temperature 0 is greedy; top_k 0, top_p 1, repetition_penalty 1 are off."""
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.05
    max_new_tokens: int = 256


def sample(logits: Tensor, seen: Tensor, sampling: Sampling, generator=None) -> Tensor:
    """One token per row: logits (N, V), seen (N, V) bool marks tokens of the prompt and the response so far -> (N,).

    In the order of transformers' generate: repetition penalty, temperature, top-k, top-p.
    """
    if sampling.repetition_penalty != 1:                           # towards less likely, whatever the sign
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    probs, tokens = (logits / sampling.temperature).topk(k)        # (N, k), likeliest first
    probs = probs.softmax(-1)
    before = probs.cumsum(-1) - probs                              # mass of the likelier tokens: < top_p keeps the first
    choice = torch.multinomial(probs * (before < sampling.top_p), 1, generator=generator)
    return tokens.gather(-1, choice).squeeze(-1)


@torch.no_grad()
def generate(vlm: VLM, prompts: list[Prompt], num_samples: int, sampling: Sampling, generator=None) -> Outputs:
    """Sample num_samples = G responses to each prompt: text, ids (B, G, R), mask (B, G, R) with the stop token in it.

    A response that reaches max_new_tokens ends there, without a stop token. `generator`: a torch.Generator on the
    device of the model, or None for the global one.
    """
    B, G = len(prompts), num_samples

    def spread(x):                                                 # (B, ...) -> (B * G, ...), each row G times
        return x.repeat_interleave(G, dim=0)

    trunk, head = vlm.trunk, vlm.model.get_output_embeddings()
    batch, cache = collate(vlm, prompts), DynamicCache(config=vlm.model.config)
    types = {"token_type_ids": batch["is_image"].long()} if sees_images_whole(trunk) else {}
    states = trunk(input_ids=batch["input_ids"], attention_mask=batch["mask"].long(), use_cache=True,
                   position_ids=batch["position_ids"], past_key_values=cache, **batch["images"], **types).last_hidden_state
    cache.batch_repeat_interleave(G)                               # B prompts were read once; now one row per sample
    logits = spread(head(states[:, -1]).float())                   # (B * G, V)
    attention = spread(batch["mask"])                              # (B * G, P), grows by one column a step
    position = batch["position_ids"][..., -1:].repeat_interleave(G, dim=-2)                  # ([3,] B * G, 1)
    read = torch.where(batch["mask"], batch["input_ids"], batch["input_ids"][:, -1:])       # padding is no token: a real
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, spread(read), True)        # one stands in for it
    banned = torch.tensor(vlm.banned_ids, device=vlm.device, dtype=torch.long)
    stops = torch.tensor(vlm.stop_ids, device=vlm.device)
    ids = torch.zeros(B * G, sampling.max_new_tokens, dtype=torch.long, device=vlm.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    rows = torch.arange(B * G, device=vlm.device)                  # which response each row still in the batch writes

    for step in range(sampling.max_new_tokens):
        token = sample(logits.index_fill(1, banned, -torch.inf), seen, sampling, generator)  # (rows,)
        ids[rows, step], mask[rows, step] = token, True
        alive = ~torch.isin(token, stops)
        if step + 1 == sampling.max_new_tokens or not alive.any():
            break
        if not alive.all():                                        # finished rows leave the batch, and the cache with it
            keep = alive.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, token, seen, attention = rows[keep], token[keep], seen[keep], attention[keep]
            position = position.index_select(-2, keep)
        seen.scatter_(1, token[:, None], True)
        attention = torch.nn.functional.pad(attention, (0, 1), value=True)
        position = position + 1
        states = trunk(input_ids=token[:, None], attention_mask=attention.long(), use_cache=True, position_ids=position,
                       past_key_values=cache).last_hidden_state
        logits = head(states[:, -1]).float()

    ids, mask = ids[:, :step + 1].unflatten(0, (B, G)), mask[:, :step + 1].unflatten(0, (B, G))
    text = [[vlm.tokenizer.decode(i[m], skip_special_tokens=True).strip() for i, m in zip(*pair)]
            for pair in zip(ids, mask)]
    return Outputs(text, ids, mask)


# ---------------------------------------------------------------------------------------------- score


ATTENTION = ("full_attention", "sliding_attention")                # kinds of layers that packing knows


def sees_images_whole(trunk) -> bool:
    """Whether a token of an image sees the later tokens of the same image, as in Gemma 3 (told by its argument)."""
    return "token_type_ids" in inspect.signature(trunk.forward).parameters


def packed_mask(owner: Tensor, place: Tensor, dtype: torch.dtype, is_image: Tensor | None = None,
                window: int | None = None) -> Tensor:
    """Additive attention mask of rows [prompt | o_1 | ... | o_K]: owner, place (B, L) -> (B, 1, L, L).

    owner is 0 for tokens of the prompt, k for tokens of o_k, -1 for padding; place is where a token stands in the text
    [prompt | o_k]. A token sees the prompt and its own response, as far as it has come. Every token sees itself, so that
    padding has something to attend to (its states are never used). is_image (B, L): tokens in one run of it also see
    each other. window: nothing further back than so many places is seen.
    """
    asks, seen = owner[:, :, None], owner[:, None]                 # (B, L, 1) queries, (B, 1, L) keys
    back = place[:, :, None] - place[:, None]                      # how far the key lies behind the query
    visible = ((asks == seen) | (seen == 0)) & (back >= 0)
    if is_image is not None:
        starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
        run = starts.cumsum(1) * is_image
        visible |= (run[:, :, None] == run[:, None]) & (run[:, None] > 0)
    if window:
        visible &= back < window
    visible = visible & (seen >= 0) | torch.eye(owner.shape[1], dtype=torch.bool, device=owner.device)
    mask = torch.zeros(visible.shape, dtype=dtype, device=owner.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def packed_states(trunk, batch: dict, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Last-layer states of one packed row per question, from a collated batch of prompts and responses (B, K, R).

    Returns the state of each prompt's last token (B, d) and of every response token (B, K, R, d). A row holds the real
    tokens of its responses, one after the other. Positions restart after the prompt for each response, so each is
    computed as if it were alone.
    """
    (B, K, R), P = ids.shape, batch["mask"].shape[1]
    real = mask.flatten(1)                                         # (B, K * R)
    where = real.int().argsort(dim=1, descending=True, stable=True)[:, :real.sum(1).max()]   # (B, S) real tokens first
    real, offset = real.gather(1, where), where % R
    config, last = trunk.config.get_text_config(), batch["position_ids"][..., -1:]           # ([3,] B, 1)
    owner = torch.cat([batch["mask"].long() - 1, torch.where(real, where // R + 1, -1)], dim=1)              # (B, L)
    place = torch.cat([torch.arange(P, device=ids.device).expand(B, P), P + offset], dim=1)
    whole = torch.nn.functional.pad(batch["is_image"], (0, where.shape[1])) if sees_images_whole(trunk) else None
    dtype = next(trunk.parameters()).dtype
    attention = packed_mask(owner, place, dtype, whole)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):    # such models take a mask per kind of layer
        attention = dict(zip(ATTENTION, (attention, packed_mask(owner, place, dtype, whole, config.sliding_window))))
    for layer in trunk.modules():                                  # layers checkpoint in training mode only; what is
        layer.training = torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)   # in them stays out
    states = trunk(input_ids=torch.cat([batch["input_ids"], ids.flatten(1).gather(1, where)], dim=1),
                   position_ids=torch.cat([batch["position_ids"], last + 1 + offset], dim=-1), attention_mask=attention,
                   use_cache=False, **batch["images"]).last_hidden_state                     # (B, L, d)
    trunk.eval()
    responses = states.new_zeros(B, K * R, states.shape[-1])
    responses = responses.scatter(1, where[..., None].expand(-1, -1, states.shape[-1]), states[:, P:])
    return states[:, P - 1], responses.unflatten(1, (K, R))


def score(vlm: VLM, prompts: list[Prompt], outputs: Outputs, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token, (B, K, R) float32, zero where padded. Differentiable.

    temperature is the one the policy samples with: the ratio must compare the distributions that were sampled from.
    (Top-k, top-p and the penalty are left out of it, as is usual: teachers' tokens may lie outside of them.)
    """
    batch = collate(vlm, prompts)
    last, states = packed_states(vlm.trunk, batch, outputs.ids, outputs.mask)
    first = last[:, None, None].expand(-1, states.shape[1], -1, -1)                          # (B, K, 1, d)
    states = torch.cat([first, states[:, :, :-1]], dim=2)          # the state *before* a token predicts it
    picked, targets = states[outputs.mask], outputs.ids[outputs.mask]                        # (N, d), (N,)
    logps = torch.zeros(outputs.mask.shape, device=picked.device)
    logps[outputs.mask] = token_logps(vlm.model.get_output_embeddings(), picked, targets, temperature)
    return logps


@torch.no_grad()
def check_packing(vlm: VLM, prompt: Prompt):
    """Score two responses packed and as the model's own forward pass has them; UserError where the two differ.

    What packing assumes of a family (what sees what, how positions count, that logits are head(states)) is checked on
    the model at hand rather than believed: seven families are tested, and transformers has many more.
    """
    if unknown := set(getattr(vlm.model.config.get_text_config(), "layer_types", None) or ()) - set(ATTENTION):
        raise UserError(f"{type(vlm.model).__name__} has layers of {', '.join(sorted(unknown))}; only {' and '.join(ATTENTION)} "
                        "can be packed, so this code cannot train it")
    outputs = encode_responses(vlm, [["Yes.", "It is not."]])
    packed = score(vlm, [prompt], outputs)
    for k, mask in enumerate(outputs.mask[0]):
        ids = torch.cat([prompt.ids.to(vlm.device), outputs.ids[0, k][mask]])[None]
        is_image = (ids == getattr(vlm.model.config, "image_token_id", -1)).long()
        accepted = inspect.signature(vlm.model.forward).parameters
        types = {name: is_image for name in ("token_type_ids", "mm_token_type_ids") if name in accepted}
        images = {name: x.to(vlm.device, vlm.model.dtype if x.is_floating_point() else x.dtype)
                  for name, x in prompt.images.items()}
        logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **types).logits.float()
        plain = logits[0, len(prompt.ids) - 1:-1].log_softmax(-1).gather(1, outputs.ids[0, k][mask][:, None]).squeeze(1)
        error = (plain - packed[0, k][mask]).abs().mean().item()
        if not error < (1e-3 if vlm.model.dtype == torch.float32 else 0.3):                  # bfloat16: 8 bits of a logit
            raise UserError(f"{type(vlm.model).__name__} reads packed responses differently from single ones (log-probs "
                            f"differ by {error:.3g}), so this code cannot train it")


def token_logps(head, states: Tensor, targets: Tensor, temperature: float, budget: int = 2 ** 26) -> Tensor:
    """log softmax(head(states) / temperature)[targets]: (N, d), (N,) -> (N,), `budget` logits at a time.

    N x V logits are the largest tensor of the whole step (2,000 tokens x 152,000 words x 4 bytes = 1.2 GB, and twice
    that backward); in chunks, recomputed in the backward pass, they never exist at once.
    """
    def chunk(states, targets):
        return -torch.nn.functional.cross_entropy(head(states).float() / temperature, targets, reduction="none")
    size = max(1, budget // head.out_features)
    if len(states) <= size:
        return chunk(states, targets)
    return torch.cat([checkpoint(chunk, s, t, use_reentrant=False)
                      for s, t in zip(states.split(size), targets.split(size))])


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
