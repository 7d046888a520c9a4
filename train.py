"""RIL: reinforcement and imitation learning in one loop, for small vision-language models (arXiv 2510.19307).

A student answers a question G times; G more answers come from large teachers. An answer earns one point for reading like
a teacher's (the discriminator cannot tell, discriminator.py) and one for being right (the judge, eval.py), and Dr.GRPO
pushes the student towards whatever did better than the average of all 2G, the teachers' answers included. So the
student learns to speak like its teachers where that is right, and a question on which all its own answers are wrong
still has a way up. What comes out is a plain checkpoint of the same model, as fast as before.

Algorithm 2 of the paper; its line numbers stand in the loop below, in `ril`:

     1  ref <- init    2  policy <- init    3  for each batch of questions
     4    old <- policy                     5    sample G student outputs per question from old
     6    take G teacher outputs per question from the saved collection
     7-9  mu times: update D by Eq. 1 on these 2G
    10    rewards and advantages for all 2G outputs, by the just-updated D and the judge
    11-13 mu times: update policy by Eq. 2

How this differs from the paper: with mu = 1 (its setting) the policy has not moved when its old log-probs are wanted, so
`old` is the detached current policy and no third network exists; the ratio and the KL are per token, summed over a
response, as Dr.GRPO has them.

    python train.py                                          the whole method on a toy world, minutes on a laptop
    python train.py --algorithm rl --out runs/rl             Algorithm 1: the judge's reward alone, no teachers
    python train.py --student DIR --data train.jsonl --eval-data val.jsonl --teachers DIR DIR --out runs/mine
    torchrun --nproc-per-node 8 train.py --student DIR ...   the same on eight GPUs

A run that was interrupted, whatever by, goes on when its command is given again.
"""
import argparse
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

import discriminator as eq1
from discriminator import Discriminator, similarity_reward
from eval import Task, draw_curves, evaluate, is_remote, make_judge, results_table, tasks_of, verdicts_of, write_report
from model import (ROW, VLM, Outputs, UserError, check_packing, checkpoint_layers, encode_responses, generate, image_tokens,
                   join, load_processor, load_vlm, micro_batches, naming, packed_sizes, pick_device, run, save_vlm, score,
                   write_atomic)
from teachers import (Collection, Example, add_sampling_options, build_tiny_vlm, check_endpoint, draw_toy_world,
                      encode_example, Endpoint, endpoint_of, fill_collection, load_examples, read_json, read_jsonl, sampling_of)

# ---------------------------------------------------------------------------------------------- the maths of line 10 to 13


def rewards(similarity: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """R(q, o) = 1[D(q, o) < 0.5] + judge(q, a, o), and where it exists: two (B, K) -> rewards (B, K), valid (B, K) bool.

    A NaN answer is a judge that failed. It has no reward, not reward 0: the response leaves its group.
    """
    return similarity + answer.nan_to_num(0.0), ~answer.isnan()


def advantages(rewards: Tensor, valid: Tensor, divide_by_std: bool = False) -> Tensor:
    """A_i = R_i - mean_j R_j over the valid responses of a question: (B, K), (B, K) -> (B, K), zero where not valid.

    Dr.GRPO stops there. GRPO also divides by the group's standard deviation, which blows up groups that nearly agree.
    """
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = (rewards - (rewards * valid).sum(1, keepdim=True) / count) * valid
    if divide_by_std:
        centred = centred / ((centred.square().sum(1, keepdim=True) / count).sqrt() + 1e-4)
    return centred


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token, any shape: r - 1 - log r with r = ref / policy. Never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor, valid: Tensor,
                eps: float, beta: float, kind: str = "dr_grpo") -> Tensor:
    """Eq. 2, negated, summed over the questions given (so micro-batches of questions simply add up) -> scalar.

        (1/2G) sum_i  sum_t [ min(r_t A_i, clip(r_t, 1 - eps, 1 + eps) A_i) - beta KL_t ]

    logp, old_logp, ref_logp, mask: (B, K, R); advantage, valid: (B, K). kind "dr_grpo" sums over a response's tokens;
    "grpo" takes their mean, which makes each token of a long wrong answer cheaper.
    """
    ratio = (logp - old_logp).exp()
    A = advantage[..., None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A) - beta * k3_kl(logp, ref_logp)     # (B, K, R)
    gain = (gain * mask).sum(-1)                                                                          # (B, K)
    if kind == "grpo":
        gain = gain / mask.sum(-1).clamp(min=1)
    return -(gain * valid / valid.sum(1, keepdim=True).clamp(min=1)).sum()


# ---------------------------------------------------------------------------------------------- several processes


@dataclass
class World:
    """The processes that torchrun has started, of which this is number `rank`. One process alone needs none of it.

    Policy, reference and D lie in shards (FSDP2's fully_shard), a part of each weight in each process, and with them
    gradients and optimizer states. A network is whole, in every process, while it is used (`whole`). Every process draws
    the same batch of questions and the same noise, and works on its own part of them, rank::size; gradients are sums over
    questions, so what comes out does not depend on how many processes there are. Nothing is exchanged while one of them
    samples or asks a judge. Logs, checkpoints and the console are rank 0's.
    """
    rank: int = 0
    size: int = 1
    mesh: object = None

    @classmethod
    def join(cls, device: torch.device):
        """The world that torchrun's environment describes; a process alone, where there is none."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a process may wait for days while rank 0 collects; but in the loop no one may keep the others for an hour
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
        group = dist.new_group(timeout=timedelta(hours=1))
        return cls(dist.get_rank(), dist.get_world_size(), DeviceMesh.from_group(group, device.type))

    def wait(self):
        """Until all processes have come here."""
        if self.size > 1:
            import torch.distributed as dist
            dist.barrier()

    def mine(self, items: list) -> list:
        """The part of the batch that is this process's."""
        return items[self.rank::self.size]

    def joined(self, items: list) -> list:
        """What each process has made of its part, in the order of the whole batch."""
        if self.size == 1:
            return items
        import torch.distributed as dist
        parts = [None] * self.size
        dist.all_gather_object(parts, items, group=self.mesh.get_group())
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.size > 1:
            import torch.distributed as dist
            dist.all_reduce(values, group=self.mesh.get_group())
        return values

    def shard(self, module: torch.nn.Module, beside=()):
        """Leave a part of each weight to each process; of those `beside`, all of it."""
        if self.size > 1:
            from torch.distributed.fsdp import fully_shard
            fully_shard(module, mesh=self.mesh, ignored_params=set(beside))

    def sum_gradients(self, weights: list[torch.nn.Parameter]):
        """Sum gradients over the processes; none, as of eyes that have seen no image, is zero."""
        for weight in weights if self.size > 1 else ():
            weight.grad = self.sum(torch.zeros_like(weight) if weight.grad is None else weight.grad)

    def part(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """Of a whole tensor like `weight`, what this process has of the weight: as FSDP cuts it, along the first dimension."""
        if not hasattr(weight, "to_local"):
            return tensor
        return (*tensor.chunk(self.size), *[tensor[:0]] * self.size)[self.rank].clone()

    def whole(self, part: Tensor, weight: Tensor) -> Tensor:
        """The reverse of `part`, for rank 0, on the CPU: there is no room for all of a network's at once on a device."""
        if not hasattr(weight, "to_local"):
            return part
        from torch.distributed.tensor import DTensor
        shards = DTensor.from_local(part, self.mesh, weight.placements, run_check=False, shape=weight.shape,
                                    stride=weight.stride())
        whole = shards.full_tensor()
        return whole[:0] if self.rank else whole.cpu()


    @torch.no_grad()
    def weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """All weights of a module by name, as `whole` has them. (Those that are tied are one.)"""
        return {name: self.whole(local(weight), weight) for name, weight in module.named_parameters()}


def local(weight: Tensor) -> Tensor:
    """What this process has of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@contextmanager
def whole(module: torch.nn.Module):
    """The module is whole for a while, if it lies in shards."""
    if hasattr(module, "unshard"):
        module.unshard()
    yield
    if hasattr(module, "reshard"):
        module.reshard()


# ---------------------------------------------------------------------------------------------- what makes it fit


class AdamW:
    """AdamW without weight decay, in float32 whatever the weights are: a step of 1e-6 is lost when a bfloat16 is rounded.

    A weight that is not float32 gets a float32 copy, which is what Adam moves; the weight is that copy, rounded. With
    `offload` the copies and both moments (12 bytes a parameter, most of the memory of training) stay on the CPU and are
    updated there: the gradient goes over, the new weight comes back. One torch optimizer per weight, so that no more
    than one gradient is converted at a time. Frozen weights have no state. Gradients stay of the weight's own type, also
    while micro-batches add up. Of weights that are sharded over processes, each has copies and moments of its own shards.
    """

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), offload: bool = False, world: World | None = None):
        self.world, self.shards = world or World(), {}             # shards: gradients, where they are not the weights' own
        self.weights = [weight for weight in parameters if weight.requires_grad]
        self.masters = [local(weight).detach().to("cpu" if offload else weight.device, torch.float32).requires_grad_()
                        for weight in self.weights]                # shares memory with a float32 weight that stays
        self.optimizers = [torch.optim.AdamW([master], lr=lr, weight_decay=0.0, betas=betas) for master in self.masters]

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def reduce(self, parameters, most: float = float("inf")) -> Tensor:
        """Sum the gradients of (whole) weights over the processes and clip their norm to `most`; the norm before that."""
        whole = [weight for weight in parameters if weight.requires_grad]
        self.world.sum_gradients(whole)
        norm = torch.nn.utils.clip_grad_norm_(whole, most)
        if self.world.size > 1:
            for i, (weight, shard) in enumerate(zip(whole, self.weights)):
                self.shards[i], weight.grad = self.world.part(weight.grad, shard), None
        return norm

    @torch.no_grad()
    def step(self):
        for i, (weight, master, optimizer) in enumerate(zip(self.weights, self.masters, self.optimizers)):
            grad = self.shards.get(i, weight.grad)
            if grad is not None:
                master.grad = grad.to(master.device, master.dtype)
                optimizer.step()
                master.grad = None
                if master.data_ptr() != local(weight).data_ptr():
                    local(weight).copy_(master)

    def zero_grad(self):
        self.shards = {}
        for weight in self.weights:
            weight.grad = None                                     # frees it

    def tensors(self) -> dict[str, Tensor]:
        """All that must be kept to go on later, whole: moments, counts of steps, and the float32 copies."""
        kept = {}
        for i, (weight, master, optimizer) in enumerate(zip(self.weights, self.masters, self.optimizers)):
            kept |= {f"{i}.{name}": value if name == "step" else self.world.whole(value, weight)
                     for name, value in optimizer.state[master].items()}
            if master.dtype != weight.dtype:
                kept[f"{i}.master"] = self.world.whole(master, weight)
        return kept

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]):
        """Go on from what `tensors` returned."""
        for key, value in tensors.items():
            i, name = int(key.split(".")[0]), key.split(".")[1]
            state = self.optimizers[i].state[self.masters[i]]
            if name == "step":
                state[name] = value
            elif name == "master":
                self.masters[i].copy_(self.world.part(value, self.weights[i]))
            else:
                state[name] = self.world.part(value, self.weights[i]).to(self.masters[i].device)


@contextmanager
def lend(module: torch.nn.Module, device: torch.device, offload: bool):
    """The device is the module's for a while; with `offload` it waits on the CPU before and after, as in the paper."""
    if offload:
        module.to(device)
    yield
    if offload:
        module.to("cpu")


@contextmanager
def frozen_eyes(vlm: VLM, policy: VLM, features: dict, key):
    """While the eyes of the policy are frozen, `vlm` (policy or reference) takes the image features kept under `key`.

    They are the same for both and in every pass, so the first pass computes them and the others do not. Frozen means that
    nothing but the language model is trained (--freeze visual, in the Qwen families).
    """
    language = {id(w) for part in (policy.model.get_decoder(), policy.model.get_output_embeddings()) for w in part.parameters()}
    if any(w.requires_grad and id(w) not in language for w in policy.model.parameters()):
        yield
        return
    look = vlm.trunk.get_image_features

    def remembered(*args, **kwargs):
        if key not in features:
            features[key] = look(*args, **kwargs)
        return features[key]
    vlm.trunk.get_image_features = remembered
    yield
    del vlm.trunk.get_image_features


def freeze(model: torch.nn.Module, pattern: str | None, path: str):
    """No gradient for the weights whose name contains a match of the regular expression. UserError if none does."""
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if pattern and re.search(pattern, name)}
    if pattern and not chosen:
        raise UserError(f"--freeze {pattern} matches no weight of {path}; they are named like "
                        f"{', '.join(names[::len(names) // 4])}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in chosen)


def plan(args) -> str:
    """What a run would need of memory, computed from the student's config alone: no weight is read.

    Weights, gradients, optimizer states and the KV cache are counted; activations follow from the sizes of a decoder
    layer. Prompt lengths are measured on the first 32 examples of --data, or taken as 1,024 tokens. Left out: SFT, the
    eyes' activations, a local judge, and memory that is free but scattered.
    """
    if args.student == "toy":
        raise UserError("--plan needs a named --student: the toy one fits anywhere")
    model, cpu = skeleton(args.student), pick_device(args.device).type == "cpu"
    offload = args.offload and not cpu
    freeze(model, args.freeze, args.student)
    text, ril = model.config.get_text_config(), args.algorithm == "ril"
    bf16 = args.dtype == "bfloat16" or not args.dtype and not cpu
    size = 2 if bf16 else 4                                        # bytes of a weight, a gradient, an activation
    state = 0 if offload else 12 if bf16 else 8                    # of optimizer state per weight: see AdamW
    N, T = sum(w.numel() for w in model.parameters()), sum(w.numel() for w in model.parameters() if w.requires_grad)
    D = sum(w.numel() for w in model.get_decoder().parameters()) * ril
    P, where = 1024, "assumed"
    if args.data:
        vlm = VLM(model, load_processor(args.student), [], [])
        lengths = [len(encode_example(vlm, e).ids) for e in load_examples(args.data, args.skip_bad)[:32]]
        P, where = max(lengths), f"the longest of {len(lengths)} in {args.data}"
    B, G, R, V = args.batch_size, args.num_samples, args.max_new_tokens, text.vocab_size
    K, L, prefix = G * (1 + ril), P + G * (1 + ril) * R, len(eq1.SYSTEM) // 3         # D's prompt: 3 letters a token
    tokens, d_tokens = min(max(args.token_budget, L), B * L), min(args.token_budget, B * K * (R + 10))
    d, ff, heads, layers = text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_hidden_layers
    a = heads * (getattr(text, "head_dim", None) or d // heads)    # width of the attention
    kv = a // heads * text.num_key_value_heads

    def activations(tokens, length):                               # kept for the backward pass, in bytes; in rows of `length`
        # what enters each product: of two norms (in float32 inside), of attention (q, k, v, out, projection), of the FFN
        layer = tokens * ((6 * d + 5 * a + 4 * ff) * size + 8 * d * bf16)
        whole = layer + layers * tokens * d * size if args.gradient_checkpointing else layers * layer
        return whole + tokens * max(length, ROW) * 12 + V * d * size     # the mask; the embedding's gradient, before it is added
    # the head: its own gradient, and a chunk of logits, three times in float32 (model.py's head_chunk)
    head = V * d * size + 12 * (2 ** 23 if cpu else 2 ** 26)
    # always: Python and torch, where they are in the same memory; the policy, all optimizer states, D and the reference.
    # generate: KV cache of the slots and of the prompts next in line, and logits
    always = 0.5e9 * cpu + N * size + T * state + D * state + (N + D) * size * (not offload)
    needs = {"generate": always + args.rollout_batch * ((G * (P + R) + P) * layers * 2 * kv * size + 4 * G * V * 4),
             "discriminator": always + D * size * (1 + offload) + activations(d_tokens * ROW // max(1, ROW - prefix), R + prefix),
             "update": always + T * size + max(N * size * offload, activations(tokens, L) + head)}
    lines = [f"{args.student}: {N / 1e9:.3f}B parameters, {T / 1e9:.3f}B trained, discriminator {D / 1e9:.3f}B, in "
             f"{'bfloat16' if bf16 else 'float32'}",
             f"prompt {P} tokens ({where}), responses up to {R}; a step is {B} questions, {B * G} sampled responses, up to "
             f"{B * L:,} tokens to train on, {tokens:,} at a time"]
    lines += [f"{name:14} {value / 1e9:8.2f} GB" for name, value in {"between phases": always, **needs}.items()]
    lines += [f"{'on the CPU':14} {(12 * (T + D) + (N + D) * size) / 1e9:8.2f} GB"] * offload
    return "\n".join(lines + [f"{'peak':14} {max(needs.values()) / 1e9:8.2f} GB, computed"])


def skeleton(path: str) -> torch.nn.Module:
    """The model of a checkpoint without its weights, from its config alone."""
    with naming(path), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))


# ---------------------------------------------------------------------------------------------- before the loop


class Batches:
    """Endless batches of `size`; every example once before any comes again. `pool`: places of those in line."""

    def __init__(self, examples: list, size: int, rng: random.Random):
        self.examples, self.size, self.rng, self.pool = examples, size, rng, []

    def __iter__(self):
        return self

    def __next__(self) -> list:
        while len(self.pool) < self.size:
            self.pool += self.rng.sample(range(len(self.examples)), len(self.examples))
        batch, self.pool = self.pool[:self.size], self.pool[self.size:]
        return [self.examples[i] for i in batch]


def sft(vlm: VLM, examples: list[Example], steps: int, batch_size: int, lr: float, seed: int, name: str,
        budget: int, offload: bool = False):
    """Supervised fine-tuning on the examples' own answers, `budget` tokens at a time; mean cross-entropy per token, lr
    decayed linearly to lr / 10."""
    optimizer = AdamW(vlm.model.parameters(), lr, (0.9, 0.95), offload)
    batches = Batches(examples, batch_size, random.Random(seed))
    bar = tqdm(range(steps), desc=f"SFT of {name}", unit="step")
    for step in bar:
        for group in optimizer.param_groups:                       # a short warm-up: the first steps of Adam are noise
            group["lr"] = lr * (1 - 0.9 * step / steps) * min(1, (step + 1) / 50)
        batch = next(batches)
        outputs, total = encode_responses(vlm, [[e.truth] for e in batch]), 0.0             # (B, 1, R)
        prompts = [encode_example(vlm, e) for e in batch]
        for part in micro_batches(packed_sizes(prompts, outputs.mask), budget):
            loss = -score(vlm, prompts[part], outputs[part]).sum() / outputs.mask.sum()
            loss.backward()
            total += loss.item()
        optimizer.reduce(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)


def pretraining_pairs(student: VLM, examples: list[Example], collection: Collection, num: int, batch_size: int, sampling,
                      rng: random.Random, slots: int):
    """Endless batches for Eq. 1: num fresh responses of the student and num of its teachers, to batch_size questions."""
    for batch in Batches(examples, batch_size, rng):
        students = generate(student, [encode_example(student, e) for e in batch], num, sampling, slots=slots).text
        teachers = [[text for _, text in pairs] for pairs in collection.draw(batch, num, rng)]
        is_student = torch.tensor([[True] * num + [False] * num] * len(batch), device=student.device)
        yield [s + t for s, t in zip(students, teachers)], is_student


# ---------------------------------------------------------------------------------------------- Algorithm 2


class Meter:
    """Seconds and peak memory of the phases of a step, in `seconds` and `memory_gb`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.memory_gb = device, {}, {}
        if device.type == "cuda":
            torch.cuda.init()                                      # or cuda:0 has no statistics to reset yet

    @contextmanager
    def phase(self, name: str):
        peak_memory_gb(self.device, reset=True)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)                    # or the seconds would be those of queueing the work
        self.seconds[name] = time.perf_counter() - start
        self.memory_gb[name] = peak_memory_gb(self.device)

    def row(self, tokens: int) -> dict[str, float]:
        """The measurements as a row of timings.jsonl; tokens: how many were sampled in the phase "generate"."""
        return {"tokens_per_second": tokens / self.seconds["generate"], **{f"seconds/{name}": x for name, x in self.seconds.items()},
                **{f"memory_gb/{name}": x for name, x in self.memory_gb.items()}}


def peak_memory_gb(device: torch.device, reset: bool = False) -> float:
    """Most GB since the last reset: allocated on a CUDA device, else resident in the process (without Linux: ever)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
    elif status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        peak = int(found.group(1)) * 1024 / 1e9 if found else float("nan")
        if reset and os.access(clear, os.W_OK):
            clear.write_text("5")                                  # see proc(5): the mark falls to what is held now
    elif sys.platform == "darwin":
        import resource                                            # Unix only
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    else:
        peak = float("nan")
    return peak


def judge_all(judge, batch: list[Example], outputs: Outputs) -> Tensor:
    """Verdicts of every response as (B, K) float32: 1, 0, or NaN where the judge failed."""
    verdicts = verdicts_of(judge, [(e.dialogue, e.truth, text) for e, texts in zip(batch, outputs.text) for text in texts])
    return torch.tensor([float("nan") if v is None else float(v) for v in verdicts],
                        device=outputs.ids.device).view(outputs.mask.shape[:2])


def update_policy(policy: VLM, reference: VLM, optimizer, prompts: list, outputs: Outputs, advantage: Tensor,
                  valid: Tensor, args, questions: int) -> dict[str, float]:
    """Lines 11-13: mu updates of the policy by Eq. 2, each accumulated over micro-batches of up to token_budget tokens.

    questions: how many the whole batch has, of which these are one process's part.
    """
    parts, world = micro_batches(packed_sizes(prompts, outputs.mask), args.token_budget), optimizer.world
    old_logp, ref_logp, stats, tokens = {}, {}, defaultdict(float), world.sum(outputs.mask.sum())
    someone = world.sum(valid.sum()) > 0
    features, norms = {}, []                                       # features of the images of each micro-batch, if the eyes are frozen

    def logps(vlm, i):                                             # greedy sampling is still scored at temperature 1
        with frozen_eyes(vlm, policy, features, i):
            return score(vlm, prompts[parts[i]], outputs[parts[i]], args.temperature or 1.0)
    if args.beta:
        with lend(reference.model, policy.device, args.offload), whole(reference.model), torch.no_grad():
            ref_logp = {i: logps(reference, i) for i in range(len(parts))}                   # line 1
    for _ in range(args.mu):
        with whole(policy.model):
            for i, part in enumerate(parts):
                logp, mask = logps(policy, i), outputs.mask[part]
                if i not in old_logp:
                    old_logp[i] = logp.detach()                    # line 4: the policy has not moved yet
                ref = ref_logp.get(i, old_logp[i])
                loss = policy_loss(logp, old_logp[i], ref, advantage[part], mask, valid[part], args.eps, args.beta,
                                   args.loss) / questions
                loss.backward()
                with torch.no_grad():
                    clipped = ((logp - old_logp[i]).exp() - 1).abs() > args.eps
                    stats["loss"] += loss / args.mu
                    stats["kl"] += k3_kl(logp, ref)[mask].sum() / tokens / args.mu
                    stats["clip_fraction"] += clipped[mask].sum() / tokens / args.mu
            norm = optimizer.reduce(policy.model.parameters(), 1.0)
            norms.append(norm)
            if someone and norm.isfinite():                        # without anyone, Adam's momentum would walk on by itself
                optimizer.step()
            optimizer.zero_grad()
    norms = torch.stack(norms)
    return {name: world.sum(value).item() for name, value in stats.items()} | {
        "grad_norm": norms.mean().item(), "skipped_updates": int((~norms.isfinite()).sum())}


@dataclass
class State:
    """All that the loop changes, and that a checkpoint therefore holds. step: how many are done; skipped: how many of the
    last ones, in a row, had no finite gradient; logs: the open files of LOGS."""
    policy: VLM
    D: Discriminator | None
    optimizer: AdamW
    d_optimizer: AdamW | None
    rng: random.Random
    batches: Batches
    logs: dict
    world: World = field(default_factory=World)
    step: int = 0
    skipped: int = 0


def ril(policy: VLM, examples: list[Example], collection: Collection | None, D: Discriminator | None, judge,
        held_out: list[Task], args, out: Path, world: World) -> float:
    """Algorithm 2; or Algorithm 1, where there is no collection and no D. Trains `policy` in place, logs into `out`, and
    goes on from the last checkpoint there. Returns the peak memory of all steps in GB."""
    torch.manual_seed(args.seed)
    rng, peak, saved, warned = random.Random(args.seed), 0.0, time.monotonic(), {}
    reference = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False)) if args.beta else None    # line 1
    freeze(policy.model, args.freeze, args.student)
    for module, beside in ((policy.model, ()), (reference and reference.model, ()), (D, D.head.parameters() if D else ())):
        if module is not None:
            world.shard(module, beside)
    state = State(policy, D, AdamW(policy.model.parameters(), args.lr, offload=args.offload, world=world),
                  AdamW(D.parameters(), args.discriminator_lr, offload=args.offload, world=world) if D else None,
                  rng, Batches(examples, args.batch_size, rng), {}, world)
    if args.offload:
        for waiting in filter(None, (D, reference and reference.model)):
            waiting.to("cpu")
    load_checkpoint(state, out)
    recent = deque((row for _, row in read_jsonl(out / "metrics.jsonl")) if world.rank == 0 else (), WINDOW)

    with signals() as caught:
        for step in tqdm(range(state.step, args.steps), args.algorithm.upper(), args.steps, initial=state.step, unit="step",
                         disable=world.rank > 0):
            row, timing, rollouts = ril_step(state, reference, collection, judge, args)
            if held_out and (step == 0 or (step + 1) % args.eval_every == 0):
                row |= held_out_accuracy(policy, held_out, judge, args, world)
            if world.rank == 0:
                tqdm.write(console_line(row | timing))
                write_logs(state.logs, row, timing, rollouts if step % args.log_every == 0 or step == args.steps - 1 else [])
            peak = max(peak, *(value for name, value in timing.items() if name.startswith("memory_gb/")))
            recent.append(row)
            for sign in signs_of_trouble(recent) if world.rank == 0 else ():
                if step - warned.get(sign, -WINDOW) >= WINDOW:
                    tqdm.write(f"warning: {sign}")
                    warned[sign] = step
            state.step, state.skipped = step + 1, state.skipped + 1 if row["skipped_updates"] else 0
            if state.skipped == SKIPS:
                raise UserError(f"the gradient was not finite in {SKIPS} steps in a row, so the run stops; look at `loss`, `kl` and "
                                f"`d_loss` in {out / 'metrics.jsonl'}, and lower --lr or --discriminator-lr; the last checkpoint "
                                f"is kept")
            every = int(args.save_every.rstrip("m"))
            due = time.monotonic() - saved > 60 * every if args.save_every.endswith("m") else state.step % every == 0
            ends, due = world.sum(torch.tensor([len(caught), due and world.rank == 0], device=policy.device)).tolist()
            if ends or due:
                save_checkpoint(state, out)
                saved = time.monotonic()
            if ends:
                sys.exit(128 + (caught or [signal.SIGTERM])[0])
    return peak


def held_out_accuracy(policy: VLM, held_out: list[Task], judge, args, world: World) -> dict[str, float]:
    """The held-out accuracy as a part of a row of metrics; rank 0 answers. A judge that is down does not end the run."""
    with whole(policy.model):
        try:
            return {} if world.rank else {
                "heldout_accuracy": evaluate(policy, held_out, judge, args.max_new_tokens, args.rollout_batch)["accuracy"]}
        except UserError as error:
            tqdm.write(str(error))
            return {}


def ril_step(state: State, reference: VLM | None, collection: Collection | None, judge, args) -> tuple[dict, dict, list[dict]]:
    """One round of the loop, lines 3 to 13. Returns its metrics, its seconds and memory, and the responses to a few questions."""
    policy, D, G, world = state.policy, state.D, args.num_samples, state.world
    for group in state.optimizer.param_groups:                     # D, pre-trained on other samples, first catches up
        group["lr"] = args.lr * min(1, (state.step + 1) / max(1, args.warmup))
    meter, row = Meter(policy.device), {"step": state.step}
    whole_batch = next(state.batches)                                                        # line 3
    noise = [torch.rand(G, args.max_new_tokens, device=policy.device) for _ in whole_batch]
    batch = world.mine(whole_batch)                                # B questions: the part that is this process's
    with meter.phase("generate"), whole(policy.model):
        prompts = [encode_example(policy, e) for e in batch]
        outputs = generate(policy, prompts, G, sampling_of(args), slots=args.rollout_batch * G, noise=world.mine(noise))   # line 5
    sources = [["student"] * G for _ in batch]
    p_student, similarity = None, torch.zeros(len(batch), G, device=policy.device)           # Algorithm 1 has none

    if D:
        drawn = world.mine(collection.draw(whole_batch, G, state.rng))                       # line 6
        teachers = encode_responses(policy, [[text for _, text in pairs] for pairs in drawn])
        outputs = join([outputs, teachers], dim=1)                                           #              (B, 2G, R)
        sources = [s + [teacher for teacher, _ in pairs] for s, pairs in zip(sources, drawn)]
    # line 10, begun: a thread waits for a remote judge while D is updated
    judged = ThreadPoolExecutor(1).submit(judge_all, judge, batch, outputs) if is_remote(judge) else None
    if D:
        with meter.phase("discriminator"), lend(D, policy.device, args.offload):
            is_student = torch.tensor([[True] * G + [False] * G] * len(batch), device=policy.device)
            responses = D.encode(outputs.text)
            for _ in range(0 if args.freeze_discriminator else args.mu):                     # lines 7-9, Eq. 1
                with whole(D):
                    row |= eq1.update(D, state.d_optimizer, responses, is_student, args.token_budget, len(whole_batch))
            with whole(D):
                p_student = D.p_student(responses, args.token_budget)                        # line 10, by the new D
            similarity = similarity_reward(p_student, args.similarity)                       #              (B, 2G)

    with meter.phase("judge"):                                                               # line 10      (B, 2G)
        answer = judged.result() if judged else judge_all(judge, batch, outputs)
    reward, valid = rewards(similarity, torch.zeros_like(answer) if args.no_answer_reward else answer)
    if D and args.no_teacher_rollouts:
        valid &= is_student
    advantage = advantages(reward, valid, divide_by_std=args.loss == "grpo")                 # line 10      (B, 2G)
    with meter.phase("update"):                                                              # lines 11-13, Eq. 2
        row |= update_policy(policy, reference, state.optimizer, prompts, outputs, advantage, valid, args, len(whole_batch))
    row["skipped_updates"] += row.pop("d_skipped", 0)
    p_student = torch.full_like(reward, float("nan")) if p_student is None else p_student
    numbers = torch.stack([outputs.mask.sum(2), p_student, similarity, answer, reward, valid, advantage]).double().cpu()
    texts, sources, numbers = zip(*world.joined(list(zip(outputs.text, sources, numbers.unbind(1)))))      # of the whole batch
    lengths, p_student, similarity, answer, reward, valid, advantage = torch.stack(numbers, 1)
    row |= step_metrics(texts, lengths[:, :G], sources, similarity, answer, reward, valid.bool(), args.max_new_tokens)
    return (row, {"step": state.step} | meter.row(int(lengths[:, :G].sum())),
            rollouts_of(state.step, whole_batch, texts, sources, p_student, answer, reward, advantage))


def step_metrics(texts: list[list[str]], lengths: Tensor, sources: list[list[str]], similarity: Tensor, answer: Tensor,
                 reward: Tensor, valid: Tensor, longest: int) -> dict:
    """The numbers of one step, by source where that says more; lengths (B, G) are the student's, the others are (B, K). All
    are explained in the README."""
    flat, row, G = [s for row in sources for s in row], {}, lengths.shape[1]
    for source in sorted(set(flat)):
        chosen = torch.tensor([s == source for s in flat]).view(reward.shape)
        row[f"similarity/{source}"] = similarity[chosen].mean().item()
        row[f"answer/{source}"] = answer[chosen].nanmean().item()
    low = reward.masked_fill(~valid, torch.inf).amin(1)            # a group with low >= high has no gradient
    of_student = [text for row in texts for text in row[:G]]
    return row | {
        "judge/failed": answer.isnan().double().mean().item(),
        "equal_groups": (low >= reward.masked_fill(~valid, -torch.inf).amax(1)).double().mean().item(),
        "length": lengths.mean().item(),
        "cut_off": (lengths == longest).double().mean().item(),
        "repeated": Counter(of_student).most_common(1)[0][1] / len(of_student)}


WINDOW, SKIPS = 50, 5                                              # steps that signs are looked for in; bad ones that end a run


def signs_of_trouble(rows) -> list[str]:
    """What the metrics of the last WINDOW steps warn of, in words that name the metric; nothing before there are so many."""
    if len(rows) < WINDOW:
        return []
    def mean(name, part=slice(None)):
        values = [row[name] for row in list(rows)[part] if row.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")
    signs, accuracy, similarity = [], mean("d_accuracy"), mean("similarity/student")
    if accuracy > 0.98:
        signs.append("`d_accuracy` is near 1: the discriminator always knows the student, who earns no `similarity/`; lower "
                     "--discriminator-lr, or first fine-tune the student on answers in the teachers' ways")
    if abs(accuracy - 0.5) < 0.05 and not 0.05 < similarity < 0.95:
        signs.append("`d_accuracy` is at chance and `similarity/` the same for nearly all: the discriminator has nothing left to "
                     "say; raise --discriminator-lr, or stop here")
    first, last = slice(0, WINDOW // 5), slice(-(WINDOW // 5), None)
    if mean("length", last) > 2 * mean("length", first) and mean("cut_off", last) > 0.2:
        signs.append("`length` has doubled and `cut_off` is high: the reward may be paid for words; look at rollouts.jsonl")
    if mean("repeated") > 0.5:
        signs.append("`repeated` is above a half: most responses are one and the same string; look at rollouts.jsonl, and raise "
                     "--beta")
    return signs


def console_line(row: dict) -> str:
    """One line a step, always as wide: what to watch while it runs."""
    def get(name):
        return f"{row[name]:5.2f}" if name in row else "    -"
    held_out = f"  held-out {row['heldout_accuracy']:.3f}" if "heldout_accuracy" in row else ""
    return (f"step {row['step'] + 1:5}  similar {get('similarity/student')}  right {get('answer/student')}  "
            f"D acc {get('d_accuracy')}  KL {row['kl']:7.4f}  |g| {row['grad_norm']:6.2f}  tokens {row['length']:5.1f}  "
            f"{sum(v for k, v in row.items() if k.startswith('seconds/')):5.2f} s{held_out}")


def rollouts_of(step: int, batch: list[Example], texts: list[list[str]], sources, p_student: Tensor, answer: Tensor,
                reward: Tensor, advantage: Tensor, questions: int = 4) -> list[dict]:
    """All responses to the first few questions of the batch, as rows of rollouts.jsonl."""
    return [{"step": step, "id": e.id, "image": list(e.images), "question": e.text, "truth": e.truth, "source": sources[b][k],
             "text": text, "p_student": None if p_student[b, k].isnan() else round(p_student[b, k].item(), 4),
             "verdict": None if answer[b, k].isnan() else int(answer[b, k]), "reward": reward[b, k].item(),
             "advantage": round(advantage[b, k].item(), 4)}
            for b, e in enumerate(batch[:questions]) for k, text in enumerate(texts[b])]


# ---------------------------------------------------------------------------------------------- checkpoints of the loop


LOGS = ("metrics", "timings", "rollouts")                          # timings are apart: they differ from run to run


def write_logs(logs: dict, row: dict, timing: dict, rollouts: list[dict]):
    """Append to the logs, so that they are on the disk, and show four of the rollouts."""
    for name, rows in zip(LOGS, ([row], [timing], rollouts)):
        logs[name].write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        logs[name].flush()
    group = [r for r in rollouts if r["id"] == rollouts[0]["id"]]
    for r in group[::max(1, len(group) // 4)]:
        tqdm.write(f"    {r['question'][:36]:36} {r['source'][:12]:12} reward {r['reward']:.2f}  {r['text'][:60]}")


@contextmanager
def signals():
    """Yields a list to which the first SIGINT or SIGTERM is added, for the step to be finished; a second one ends it all."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        tqdm.write("finishing this step and saving; once more to leave at once")
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())


def tensors_of(state: State) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by file."""
    device = state.policy.device
    rng = {"cpu": torch.get_rng_state()} | ({"device": getattr(torch, device.type).get_rng_state()} if device.type != "cpu" else {})
    files = {"policy": state.world.weights(state.policy.model), "optimizer": state.optimizer.tensors(), "rng": rng}
    if state.D:
        files |= {"discriminator": state.world.weights(state.D), "d_optimizer": state.d_optimizer.tensors()}
    return {name: {key: x.detach().contiguous() for key, x in tensors.items()} for name, tensors in files.items()}       # of rank 0


def save_checkpoint(state: State, out: Path):
    """Write checkpoint-STEP into `out`; it is there whole or not at all. Of the older ones, one stays.

    A disk that is full ends no run: that is said, and the older checkpoints stay.
    """
    folder, files = out / f"checkpoint-{state.step:06}", tensors_of(state)
    unfinished = Path(f"{folder}.unfinished")
    if state.world.rank:
        return
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, tensors in files.items():
            save_file(tensors, unfinished / f"{name}.safetensors")
        _, *numpy = np.random.get_state()
        (unfinished / "state.json").write_text(json.dumps({
            "step": state.step, "skipped": state.skipped, "pool": state.batches.pool, "draws": state.rng.getstate(),
            "python": random.getstate(), "numpy": [numpy[0].tolist(), *numpy[1:]],
            "logs": {name: file.tell() for name, file in state.logs.items()}}))
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)                  # there only if it could not be read
        unfinished.rename(folder)
        sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        tqdm.write(f"warning: no checkpoint at step {state.step} ({error}); the run goes on")
        return
    for old in checkpoints(out)[:-2]:
        shutil.rmtree(old)


def sync(path: Path):
    """Wait until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@torch.no_grad()
def load_checkpoint(state: State, out: Path):
    """Go on from the newest checkpoint in `out` that can be read, else from the start; cut the logs back to where they were.

    UserError where a log is shorter than the checkpoint knows it: somebody else's hands were there.
    """
    lengths = dict.fromkeys(LOGS, 0)
    networks = {"policy": state.policy.model} | ({"discriminator": state.D} if state.D else {})
    optimizers = {"optimizer": state.optimizer} | ({"d_optimizer": state.d_optimizer} if state.D else {})
    for folder in reversed(checkpoints(out)):
        try:
            saved = read_json(folder / "state.json")
            files = {name: load_file(folder / f"{name}.safetensors") for name in ("rng", *networks, *optimizers)}
            for name, network in networks.items():
                if {key: x.shape for key, x in files[name].items()} != {key: x.shape for key, x in network.named_parameters()}:
                    raise ValueError(f"{name} is of another shape")
            draws, python = ((version, tuple(numbers), gauss) for version, numbers, gauss in (saved["draws"], saved["python"]))
            numpy = ("MT19937", np.array(saved["numpy"][0], np.uint32), *saved["numpy"][1:])
            for generator, numbers in ((random.Random(), draws), (random.Random(), python)):
                generator.setstate(numbers)                        # would it work?
            np.random.RandomState().set_state(numpy)
            step, skipped, sizes = int(saved["step"]), int(saved["skipped"]), {name: int(saved["logs"][name]) for name in LOGS}
            if min(step, skipped, *sizes.values()) < 0:
                raise ValueError("numbers below zero")
            pool = [range(len(state.batches.examples)).index(i) for i in saved["pool"]]
        except (UserError, OSError, ArithmeticError, ValueError, LookupError, TypeError, SafetensorError) as error:
            print(f"{folder} cannot be read ({error}); going on from the one before it")
            continue
        lengths = sizes
        for name, network in networks.items():
            for key, weight in network.named_parameters():
                local(weight).copy_(state.world.part(files[name][key], weight))
        for name, optimizer in optimizers.items():
            optimizer.load(files[name])
        torch.set_rng_state(files["rng"]["cpu"])
        if "device" in files["rng"] and state.policy.device.type != "cpu":
            getattr(torch, state.policy.device.type).set_rng_state(files["rng"]["device"])
        state.rng.setstate(draws)
        random.setstate(python)
        np.random.set_state(numpy)
        state.batches.pool, state.step, state.skipped = pool, step, skipped
        print(f"going on after step {step}, from {folder}")
        break
    for name in LOGS if state.world.rank == 0 else ():
        path = out / f"{name}.jsonl"
        path.touch()
        if path.stat().st_size < lengths[name]:
            raise UserError(f"{path} has {path.stat().st_size} bytes where the checkpoint has {lengths[name]}; remove the checkpoints "
                            f"of {out} to begin the loop again")
        os.truncate(path, lengths[name])
        state.logs[name] = open(path, "a", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- stages of a run


def prepare_toy_world(out: Path, args) -> dict[str, str]:
    """Draw the toy world and train its two teachers. Returns the paths of its files by split.

    Teachers answer in sentences. The student grows up on careless data: mostly single words, often no answer, and to
    questions about shapes never one. There a reward for right answers alone finds nothing to reward,
    and only the teachers' responses show a way up.
    """
    data = out / "data"
    if not data.exists():
        shutil.rmtree(f"{data}.unfinished", ignore_errors=True)
        draw_toy_world(f"{data}.unfinished", args.seed, {
            "heldout": (500, (1, 0, 0), ""), "train": (1000, (1, 0, 0), ""), "qwen": (6000, (0, 1, 0), ""),
            "internvl": (6000, (0, 1, 0), ""), "sft": (6000, (0.6, 0.2, 0.2), "shape")})
        Path(f"{data}.unfinished").rename(data)
    for name, family in (("qwen", "qwen2_5_vl"), ("internvl", "internvl")):
        if not (out / "teachers" / name).exists():
            examples = load_examples(str(data / f"{name}.jsonl"))
            tiny_vlm_from_nothing(out / "teachers" / name, family, examples, 96, args.teacher_steps, args.sft_lr, args)
    return {name: str(data / f"{name}.jsonl") for name in ("train", "sft", "heldout")}


def tiny_vlm_from_nothing(folder: Path, family: str, examples: list[Example], width: int, steps: int, lr: float, args):
    """A tokenizer trained on the examples, random weights, SFT on the examples; saved as a checkpoint folder."""
    # with the words of the prompts among them, these become tokens too, and the prompts short
    texts = [text for e in examples for text in (e.text, e.truth)]
    texts += 50 * [eq1.SYSTEM, eq1.BEFORE + eq1.AFTER, "user\nassistant\nsystem\n"]
    random_weights = f"{folder}.random"
    shutil.rmtree(random_weights, ignore_errors=True)
    build_tiny_vlm(random_weights, family, texts, width, layers=2, vocabulary=600, seed=args.seed)
    vlm = load_vlm(random_weights, args.device, args.dtype)
    shutil.rmtree(random_weights)
    sft(vlm, examples, steps, args.sft_batch_size, lr, args.seed, folder.name, args.token_budget)
    save_vlm(vlm, str(folder))


def check_inputs(args, out: Path) -> tuple[dict[str, list[Example]], bool]:
    """Find what is wrong with data, checkpoints and servers before anything is written; UserError if something is.

    Returns the examples (or tasks) of the data files given, by option, and whether the run in `out` is already finished.
    """
    given = {name: load(path, skip_bad=args.skip_bad) for name, load in (
        ("data", load_examples), ("sft_data", load_examples), ("eval_data", tasks_of)) if (path := getattr(args, name))}
    evaluations = ["evaluation-before.json", "evaluation-after.json"] if args.eval_data or not args.data else []
    finished = all((out / name).exists() for name in ["student", *evaluations])
    for name in args.teachers + [args.judge]:
        if not finished and (endpoint := endpoint_of(name)):
            check_endpoint(endpoint)
    local = [t for t in args.teachers if not endpoint_of(t)] + [args.student] * (args.student != "toy")
    processors = [load_processor(path) for path in local]
    if args.freeze and args.student != "toy":
        freeze(skeleton(args.student), args.freeze, args.student)
    if args.judge != "rule" and not endpoint_of(args.judge):
        load_processor(args.judge, text_only=True)
    if args.collection:
        known = () if args.student == "toy" else (image_tokens(processors[-1]), processors[-1].tokenizer, args.max_new_tokens)
        Collection(args.collection, given["data"], *known)
    return given, finished


def claim_folder(out: Path, args):
    """Make `out` this run's folder, or refuse: a folder holds one run, and its stages belong to one set of settings."""
    settings = {k: v for k, v in vars(args).items()                # what does not change the result may differ,
                if k not in ("out", "device", "offload", "gradient_checkpointing", "plan", "token_budget", "rollout_batch",
                             "save_every")}
    names = {name: (endpoint_of(name) or Endpoint(name, "")).model for name in args.teachers + [args.judge]}
    settings |= {"teachers": [names[name] for name in args.teachers], "judge": names[args.judge]}     # as may a URL
    path = out / "settings.json"                                   # without it, stages copied from elsewhere are taken over
    if path.exists():
        there = read_json(path)
        if not isinstance(there, dict):
            raise UserError(f"{path}: not the settings of a run")
        if differ := sorted(k for k in settings.keys() | there.keys() if settings.get(k) != there.get(k)):
            what = ", ".join(f"--{k.replace('_', '-')} {there.get(k)} there, {settings.get(k)} here" for k in differ)
            raise UserError(f"{out} belongs to a run with other settings ({what}); choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(settings, indent=1))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from error


def student_and_teachers(args, out: Path, given: dict, clock: Meter) -> tuple[dict[str, list[Example]], list[str], str]:
    """Stages 1 and 2. Returns the examples by option, the teachers, and the student's checkpoint as the loop finds it."""
    # 1. questions, and someone to answer them
    sources, teachers = given, args.teachers
    if args.student == "toy" and not args.data:
        with clock.phase("toy world and its teachers"):
            files = prepare_toy_world(out, args)
        sources = {"data": load_examples(files["train"]), "sft_data": load_examples(files["sft"]),
                   "eval_data": tasks_of(files["heldout"])} | given
        teachers = teachers or [str(out / "teachers" / name) for name in ("qwen", "internvl")]

    # 2. SFT of the student
    started = out / "sft"                                          # the warm start: reference, and first policy
    with clock.phase("SFT"):
        if args.student == "toy" and not started.exists():
            examples = sources.get("sft_data", sources["data"])
            tiny_vlm_from_nothing(started, "qwen2_5_vl", examples, 64, args.sft_steps, args.sft_lr, args)
        elif args.sft_steps and not started.exists():
            student = student_of(args.student, args)
            sft(student, sources["sft_data"], args.sft_steps, args.sft_batch_size, args.sft_lr, args.seed, "student",
                args.token_budget, args.offload)
            save_vlm(student, str(started))
    return sources, teachers, str(started) if started.exists() else args.student


def collect(args, out: Path, teachers: list[str], examples: list[Example], student: str, finished: bool) -> Collection:
    """The teachers' responses; sampled now, as far as they are not there yet."""
    path = Path(args.collection or out / "collection.jsonl")
    if not args.collection and not finished:
        fill_collection(path, teachers, examples, args.collect, sampling_of(args), args.seed,
                        max(1, 2 * args.num_samples * args.rollout_batch // args.collect), args.device, args.dtype)
    processor = load_processor(student)
    collection = Collection(path, examples, image_tokens(processor), processor.tokenizer, args.max_new_tokens)
    for many, why in ((collection.unfinished, "responses are empty or were cut off by a token limit"),
                      (collection.overlong, f"responses have more than --max-new-tokens {args.max_new_tokens} tokens"),
                      (len(examples) - len(collection.examples), "questions have no other response")):
        if many:
            print(f"{path}: {many} {why} and are left out")
    return collection


def student_of(path, args) -> VLM:
    """The student to be trained, from a checkpoint."""
    student = load_vlm(str(path), args.device, args.dtype)
    if args.gradient_checkpointing:
        checkpoint_layers(student.model)
    return student


def discriminator_of(policy: VLM, examples: list[Example], collection: Collection, args, out: Path) -> Discriminator:
    """D as pre-trained for this student; trained now if that was not done before."""
    torch.manual_seed(args.seed)                                   # before D: its head is drawn at random
    D, path = Discriminator(policy), out / "discriminator.safetensors"
    if not path.exists():                                          # with as many responses to a step as in the loop
        questions = max(1, args.batch_size * args.num_samples // args.collect)
        pairs = pretraining_pairs(policy, examples, collection, args.collect, questions, sampling_of(args),
                                  random.Random(args.seed), args.rollout_batch * args.num_samples)
        optimizer = AdamW(D.parameters(), args.pretrain_lr, offload=args.offload)
        eq1.pretrain(D, optimizer, pairs, args.discriminator_steps, args.pretrain_lr, args.token_budget)
        save_file(D.state_dict(), f"{path}.unfinished")
        Path(f"{path}.unfinished").rename(path)
    D.load_state_dict(load_file(path, device=str(policy.device)))
    return D


def save_student(policy: VLM, start: str, args, out: Path, world: World):
    """The trained student, as a checkpoint of transformers like the one it began as."""
    weights = world.weights(policy.model)
    if world.rank == 0:
        plain = load_vlm(start, args.device, args.dtype) if world.size > 1 else policy       # fully_shard changes classes
        for name, weight in plain.model.named_parameters() if world.size > 1 else ():
            weight.data.copy_(weights[name])
        save_vlm(plain, str(out / "student"))


def report(out: Path, args, held_out: list[Task], judge, start: str):
    """Held-out scores before and after; curves.png and report.html, from them and what the run has left in its folder."""
    results = {}
    for name, path in (("before", start), ("after", out / "student")) if held_out else ():
        if not (saved := out / f"evaluation-{name}.json").exists():
            vlm = load_vlm(str(path), args.device, args.dtype)
            result = evaluate(vlm, held_out, judge, args.max_new_tokens, args.rollout_batch)
            write_atomic(saved, json.dumps(result, ensure_ascii=False))
        results[name] = read_json(saved)["tasks"]
    metrics = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    draw_curves(metrics, str(out / "curves.png"))
    write_report(out, vars(args), results, [row for _, row in read_jsonl(out / "rollouts.jsonl")])
    if results:
        print(results_table(results))
    print(f"The trained student is {out / 'student'}; open {out / 'report.html'}")


# ---------------------------------------------------------------------------------------------- command line


# Defaults, in one place. A named student gets the paper's; the toy gets what a tiny model needs to learn in minutes.
PAPER = dict(sft_steps=0, sft_lr=1e-5, sft_batch_size=64, collect=16, discriminator_steps=1111, pretrain_lr=1e-5,
             num_samples=4, mu=1, eps=0.2, beta=0.01, steps=1000, batch_size=144, token_budget=8192, lr=1e-6, warmup=0,
             discriminator_lr=1e-6, rollout_batch=16, max_new_tokens=256, eval_every=100, log_every=10, teacher_steps=0,
             save_every="15m")
TOY = PAPER | dict(sft_steps=800, sft_lr=1e-3, collect=8, discriminator_steps=60, pretrain_lr=2e-4, steps=160,
                   batch_size=64, token_budget=16384, rollout_batch=64, lr=4e-4, warmup=32, discriminator_lr=4e-4,
                   max_new_tokens=24, eval_every=20, log_every=10, teacher_steps=600,
                   save_every="20")


def add_run_options(parser):
    """What goes in and where it comes out, and the stages before the loop."""
    group = parser.add_argument_group("models and data")
    group.add_argument("--student", default="toy", help="checkpoint folder or hub id, or toy: a tiny one, from nothing")
    group.add_argument("--teachers", nargs="+", default=[], help="fill the collection: checkpoint folders, hub "
                       "ids, or model@http://server/v1 of an OpenAI-compatible server")
    group.add_argument("--collection", help="JSONL of responses made elsewhere, instead of teachers")
    group.add_argument("--judge", default="rule", help="who decides what is right: rule (short answers are parsed), a "
                       "checkpoint, or model@url")
    group.add_argument("--data", help="questions to train on, JSONL or JSON; default, for the toy student: the toy world")
    group.add_argument("--sft-data", help="examples to fine-tune on first; default, for the toy student: --data")
    group.add_argument("--eval-data", help="held-out questions, or a benchmark as eval.py takes it")
    group.add_argument("--skip-bad", action="store_true", help="leave out examples whose image cannot be read")
    group.add_argument("--out", default="runs/toy", help="folder of the run; finished stages in it are not done again")

    group = parser.add_argument_group("before the loop")
    group.add_argument("--sft-steps", type=int, help="steps of SFT; 0 for a student that has had it")
    group.add_argument("--sft-lr", type=float, help="learning rate of SFT, decays linearly to a tenth")
    group.add_argument("--sft-batch-size", type=int, help="examples per step of SFT")
    group.add_argument("--teacher-steps", type=int, help="steps of SFT of each teacher of the toy world")
    group.add_argument("--collect", type=int, help="responses of each teacher to each question in the collection; also N, "
                       "responses of each side per question, in discriminator pre-training")
    group.add_argument("--discriminator-steps", type=int, help="steps of discriminator pre-training")
    group.add_argument("--pretrain-lr", type=float, help="learning rate of that, decays linearly to a tenth")


def add_loop_options(parser):
    """The loop: what is computed, and how."""
    group = parser.add_argument_group("algorithm")
    group.add_argument("--algorithm", choices=["ril", "rl"], default="ril", help="rl: Algorithm 1, no teachers and no D")
    group.add_argument("--loss", choices=["dr_grpo", "grpo"], default="dr_grpo", help="grpo divides by std and by length")
    group.add_argument("--similarity", choices=["binary", "ternary", "tenths", "continuous"], default="binary",
                       help="how finely the similarity reward is graded")
    group.add_argument("--freeze-discriminator", action="store_true", help="skip lines 7-9: D stays as pre-trained")
    group.add_argument("--no-answer-reward", action="store_true", help="the judge is heard, but not rewarded")
    group.add_argument("--no-teacher-rollouts", action="store_true", help="teachers' responses train D, not the policy")
    group.add_argument("--num-samples", type=int, help="G, responses of the student, and as many of teachers, a question")
    group.add_argument("--mu", type=int, help="updates of D and of the policy per step")
    group.add_argument("--beta", type=float, help="weight of the KL to the reference")
    group.add_argument("--eps", type=float, help="the ratio is clipped to 1 - eps .. 1 + eps")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=int, help="steps of the loop")
    group.add_argument("--batch-size", type=int, help="questions per step")
    group.add_argument("--token-budget", type=int, help="tokens per micro-batch, of prompts and responses; fewer need less "
                       "memory, and the gradient is the same")
    group.add_argument("--rollout-batch", type=int, help="so many questions' responses are sampled at a time; fewer need less "
                       "memory, and the responses are the same")
    group.add_argument("--lr", type=float, help="learning rate of the student")
    group.add_argument("--warmup", type=int, help="steps in which the student's learning rate rises from nothing")
    group.add_argument("--discriminator-lr", type=float, help="learning rate of D")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute layers twice, keep their insides once")
    group.add_argument("--offload", action="store_true", help="optimizer states live and work on the CPU; D and the "
                       "reference wait there")
    group.add_argument("--freeze", metavar="REGEX", help="parts of the student that are not trained in the loop, by weight "
                       "name: 'visual' the eyes, 'lm_head' the vocabulary head, 'self_attn', 'embed_tokens', "
                       "'mlp.gate|mlp.up|mlp.down', 'norm' (the paper's Table 5c)")
    group.add_argument("--plan", action="store_true", help="only print what the run would need of memory, and stop")
    group.add_argument("--eval-every", type=int, help="steps between held-out accuracies")
    group.add_argument("--log-every", type=int, help="steps between printed samples")
    group.add_argument("--save-every", help="steps between checkpoints of the loop, or minutes as 15m")


def parse_args(argv=None):
    """The command line. Where help names no default, PAPER and TOY have it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for add in (add_run_options, add_loop_options, add_sampling_options):
        add(parser)
    student = parser.parse_known_args(argv)[0].student
    parser.set_defaults(**(TOY if student == "toy" else PAPER))
    args = parser.parse_args(argv)
    for name in ("num_samples", "mu", "batch_size", "token_budget", "collect", "max_new_tokens", "eval_every", "log_every",
                 "rollout_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not re.fullmatch("[1-9][0-9]*m?", args.save_every):
        parser.error(f"--save-every {args.save_every}: expected a number of steps, or of minutes as 15m")
    try:
        re.compile(args.freeze or "")
    except re.error as error:
        parser.error(f"--freeze {args.freeze} is not a regular expression ({error})")
    if args.plan:
        return args
    if args.student != "toy" and not args.data:
        parser.error("--data is needed for a named student")
    if args.collection and not args.data:
        parser.error("--collection needs the --data that it answers")
    if args.data and args.algorithm == "ril" and not (args.teachers or args.collection):
        parser.error("RIL needs --teachers or a --collection of their responses (or --algorithm rl)")
    if args.sft_steps and args.student != "toy" and not args.sft_data:
        parser.error("--sft-steps needs --sft-data")
    return args


def main():
    """The stages of a run, each skipped where its result is in the folder already. A stage's result appears under its
    name only when it is whole, so a run that was interrupted can simply be started again."""
    args = parse_args()
    out = Path(args.out)
    transformers.utils.logging.disable_progress_bar()
    if args.plan:
        return print(plan(args))
    world = World.join(pick_device(args.device))
    if world.size > 1 and (args.offload or args.batch_size < world.size):
        raise UserError(f"{world.size} processes want a --batch-size of at least {world.size}, and no --offload")
    if world.rank:                                                 # rank 0 does what comes before the loop, for all
        sys.stdout = open(os.devnull, "w")
        world.wait()
    given, finished = check_inputs(args, out)
    if world.rank == 0:
        claim_folder(out, args)
    clock = Meter(pick_device(args.device))

    sources, teachers, start = student_and_teachers(args, out, given, clock)                 # 1. and 2.
    examples, held_out = sources["data"], sources.get("eval_data", [])

    # 3. the teachers' responses, then the discriminator, then the loop
    collection = D = None
    if not (out / "student").exists():                             # before the teachers are paid for
        student = load_vlm(start, args.device, args.dtype)
        check_packing(student, encode_example(student, examples[0]))
        del student
    if args.algorithm == "ril":
        with clock.phase("collection"):
            collection = collect(args, out, teachers, examples, start, finished)
        examples = collection.examples
    judge = None if finished else make_judge(args.judge, out / f"verdicts{world.rank or ''}.jsonl", args.device, args.dtype)
    if not (out / "student").exists():
        policy = student_of(start, args)
        if collection:
            with clock.phase("discriminator"):
                D = discriminator_of(policy, examples, collection, args, out)
    if world.rank == 0:
        world.wait()
    if not (out / "student").exists():
        with clock.phase("loop"):
            peak = ril(policy, examples, collection, D, judge, held_out, args, out, world)
            save_student(policy, start, args, out, world)
        clock.memory_gb["loop"] = max(peak, clock.memory_gb["loop"])
    if world.rank:
        return
    for checkpoint in out.glob("checkpoint-*"):                    # the student is on the disk
        shutil.rmtree(checkpoint)

    report(out, args, held_out, judge, start)                                                # 4. before and after
    print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items()),
          f"; peak memory {max(clock.memory_gb.values()):.2f} GB", sep="")


if __name__ == "__main__":
    run(main)
