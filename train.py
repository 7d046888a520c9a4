"""RIL: reinforcement and imitation learning in one loop, for small vision-language models (arXiv 2510.19307).

A student answers a question G times, and G more responses come from large teachers. A response earns one
point for reading like a teacher's (the discriminator cannot tell, discriminator.py) and one for being right
(the judge, eval.py). Dr.GRPO then pushes the student towards whatever did better than the average of all 2G,
the teachers' responses included. So the student learns to speak like its teachers where that is right, and a
question on which all its own responses are wrong still has a way up. What comes out is a plain checkpoint of
the same model, as fast as before.

Algorithm 2 of the paper. Lines 1 and 2 make a `Run`; the others stand by their numbers in `ril_step` and
`update_policy` below:

     1  ref <- init    2  policy <- init    3  for each batch of questions
     4    old <- policy                     5    sample G student outputs per question from old
     6    take G teacher outputs per question from the saved collection
     7-9  mu times: update D by Eq. 1 on these 2G
    10    rewards and advantages for all 2G outputs, by the just-updated D and the judge
    11-13 mu times: update policy by Eq. 2

How this differs from the paper: `old` is never a third network, because all that is wanted of it are its
log-probs, and these are the policy's own before the first update. The ratio and the KL are per token and
summed over a response, as in Dr.GRPO. A response on which the judge failed leaves its group, where the paper
says nothing.

    python train.py                                    all of it on a toy world, minutes on a laptop
    python train.py --algorithm rl --out runs/rl       Algorithm 1: the judge's reward alone, no teachers
    python train.py --student DIR --data train.jsonl --teachers DIR DIR --out runs/mine
    torchrun --nproc-per-node 8 train.py --student DIR --data train.jsonl --teachers DIR DIR --out runs/mine

A run that was interrupted resumes when its command is given again.
"""
import argparse
import copy
import hashlib
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
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

# OpenMP's threads spin where they wait for one another: beside another busy program a step takes three times
# as long. So they sleep. This is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

import discriminator as eq1
from discriminator import SIMILARITIES, Discriminator
from eval import (Task, draw_curves, evaluate, make_judge, predict, results_table, tasks_of,
                  without_thoughts, write_report)
from model import (VLM, Outputs, UserError, check_packing, checkpoint_layers, encode_responses, generate,
                   image_tokens, join, load_processor, load_vlm, micro_batches, naming, packed_sizes,
                   pick_device, save_vlm, score, write_atomic)
from model import run as run_main
from teachers import (Collection, Example, Split, add_sampling_options, build_tiny_vlm, check_endpoint,
                      draw_toy_world, encode_example, encode_examples, endpoint_of, fill_collection,
                      load_examples, make_teacher, prompt_checks, read_json, read_jsonl, sampling_of)

# ------------------------------------------------------------------------------------------ the maths
#
# B questions, G outputs of each side, K = 2G outputs of a question, students first and then teachers,
# R response tokens.


@dataclass
class Group:
    """B questions with K responses each, and what is known of these: all that a reward may look at."""
    batch: list[Example]
    outputs: Outputs                   # text: B lists of K strings; ids and mask: (B, K, R)
    sources: list[list[str]]           # "student", or the name of a teacher
    p_student: Tensor | None           # (B, K); Algorithm 1 has none
    verdicts: Tensor                   # (B, K): 1 right, 0 wrong, NaN where the judge failed


# The weights of the reward terms below. --reward-weights changes them; the toy has its own.
REWARD_WEIGHTS = {"similarity": 1.0, "answer": 1.0}


def reward_terms(group: Group, args) -> dict[str, Tensor]:
    """The terms of R(q, o) = 1[D(q, o) < 0.5] + judge(q, a, o) by name, each (B, K).

    One more entry here, and its weight in REWARD_WEIGHTS, is one more reward: it is logged, printed and drawn
    under its name. NaN means that there is no such reward for a response, which then leaves its group.
    """
    terms = {}
    if group.p_student is not None:
        terms["similarity"] = SIMILARITIES[args.similarity](group.p_student)
    terms["answer"] = group.verdicts
    return terms


def total_reward(terms: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms, (B, K), and where it exists, (B, K) bool.

    A term of weight 0 is logged and nothing else. NaN is a judge that failed: that response has no reward,
    which is not the same as reward 0.
    """
    counted = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
    reward = torch.stack(counted).sum(0)
    return reward.nan_to_num(0.0), ~reward.isnan()


def advantages(reward: Tensor, valid: Tensor, divide_by_std: bool = False) -> Tensor:
    """A_i = R_i - mean_j R_j over the valid responses of a question: (B, K), zero where not valid.

    Dr.GRPO stops there. GRPO also divides by the group's standard deviation, which blows up groups that
    nearly agree.
    """
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = (reward - (reward * valid).sum(1, keepdim=True) / count) * valid
    if divide_by_std:
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
        centred = centred / (std + 1e-4)
    return centred


@dataclass(frozen=True)
class Loss:
    """What tells GRPO and Dr.GRPO apart."""
    divide_by_std: bool                # advantages are divided by the standard deviation of their group
    mean_over_tokens: bool             # the gain of a response is divided by its length


LOSSES = {"dr_grpo": Loss(divide_by_std=False, mean_over_tokens=False),
          "grpo": Loss(divide_by_std=True, mean_over_tokens=True)}


def importance_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """pi_theta / pi_old of every token, (B, K, R): for the loss, and for the metric clip_fraction."""
    return (logp - old_logp).exp()


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token: q - 1 - log q with q = ref / policy. Never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor,
                valid: Tensor, eps: float, beta: float, mean_over_tokens: bool = False) -> Tensor:
    """Eq. 2, negated, summed over the questions given, so that micro-batches of questions add up -> scalar.

        (1/2G) sum_i  sum_t [ min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i) - beta KL_t ]

    logp, old_logp, ref_logp, mask: (B, K, R); advantage, valid: (B, K). The sum over tokens is Dr.GRPO's.
    GRPO takes their mean instead, which makes each token of a long wrong answer cheaper.
    """
    ratio = importance_ratio(logp, old_logp, mask)
    A = advantage[..., None]                                                          # (B, K, 1)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)                # (B, K, R)
    gain = gain - beta * k3_kl(logp, ref_logp)
    gain = (gain * mask).sum(-1)                                                      # (B, K)
    if mean_over_tokens:
        gain = gain / mask.sum(-1).clamp(min=1)
    outputs = valid.sum(1, keepdim=True).clamp(min=1)                                 # 2G, less failed judges
    return -(gain * valid / outputs).sum()


# ------------------------------------------------------------------------------------------ Algorithm 2


def update_policy(run, prompts: list, outputs: Outputs, advantage: Tensor, valid: Tensor,
                  own: Tensor) -> dict[str, float]:
    """Lines 11-13: mu updates of the policy by Eq. 2, each summed over micro-batches of questions.

    prompts: B; outputs: (B, K, R); advantage, valid, own (sampled by the policy): (B, K). Returns loss, kl,
    clip_fraction and grad_norm.
    """
    args, policy, reference = run.args, run.policy, run.reference
    parts = run.world.even(micro_batches(packed_sizes(prompts, outputs.mask), args.token_budget))
    old_logps, ref_logps, norms, stats = {}, {}, [], defaultdict(float)

    if args.beta:
        with run.using(reference.model), torch.no_grad():
            for i, (part, _) in enumerate(parts):                                     # line 1
                ref_logps[i] = run.score(reference, prompts, outputs, part)           #          (b, K, R)

    for _ in range(args.mu):                                                          # line 11
        for i, (part, weight) in enumerate(parts):
            logp = run.score(policy, prompts, outputs, part)                          #          (b, K, R)
            old_logp = old_logps.setdefault(i, logp.detach())                         # line 4
            ref_logp = ref_logps.get(i, old_logp)      # without beta only the metric kl reads it
            mask = outputs.mask[part]
            loss = policy_loss(logp, old_logp, ref_logp, advantage[part], mask, valid[part], args.eps,
                               args.beta, LOSSES[args.loss].mean_over_tokens)
            loss = weight * loss / len(run.questions)
            loss.backward()
            stats["loss"] += loss.detach()
            sampled = mask & own[part][..., None]                                     #          (b, K, R)
            stats["kl"] += weight * k3_kl(logp.detach(), ref_logp)[sampled].sum()
            stats["sampled"] += weight * sampled.sum()
            stats["tokens"] += weight * mask.sum()
            clipped = (importance_ratio(logp.detach(), old_logp, mask) - 1).abs() > args.eps
            stats["clip_fraction"] += weight * clipped[mask].sum()
        norms.append(run.optimizer.step(max_norm=1.0))                                # line 12

    sums = {name: run.world.sum(total).item() / args.mu for name, total in stats.items()}
    return {"loss": sums["loss"], "kl": sums["kl"] / sums["sampled"],
            "clip_fraction": sums["clip_fraction"] / sums["tokens"],
            "grad_norm": torch.stack(norms).mean().item()}


def ril_step(run, collection: Collection | None, judge) -> tuple[dict, list[dict]]:
    """Lines 3 to 13, once. Returns a row of metrics, and rows of rollouts (the first questions)."""
    args, policy, D, G = run.args, run.policy, run.D, run.args.num_samples

    batch = run.next_batch()                                                          # line 3   B questions
    with run.phase("generate"), run.sampler() as sampler:
        prompts = encode_examples(sampler, batch)
        outputs = generate(sampler, prompts, G, sampling_of(args), noise=run.noise(),
                           slots=args.rollout_batch * G)                              # line 5   (B, G, R)
    sources = [["student"] * G for _ in batch]
    if D:
        drawn = run.draw(collection)                                                  # line 6   B lists of G
        taught = encode_responses(policy, [[text for _, text in pairs] for pairs in drawn])
        outputs = join([outputs, taught], dim=1)                                      #          (B, 2G, R)
        sources = [own + [teacher for teacher, _ in pairs] for own, pairs in zip(sources, drawn)]
    B, K, _ = outputs.ids.shape
    is_student = torch.arange(K, device=policy.device).expand(B, K) < G
    asked = Asked(judge, batch, outputs)               # for line 10; a remote judge works while D learns

    row, p_student = {}, None
    if D:
        with run.phase("discriminator"), run.using(D):
            responses = D.encode([example.text for example in batch], outputs.text)
            for _ in range(0 if args.freeze_discriminator else args.mu):              # line 7
                d_stats = eq1.update(D, run.d_optimizer, responses, is_student, args.token_budget,
                                     len(run.questions))                              # line 8   Eq. 1
                row = d_stats | row                    # what is logged is D before the first of its updates
            p_student = D.p_student(responses, args.token_budget, run.world)          # line 10, by the new D
    with run.phase("judge"):
        verdicts = asked.result()                                                     # line 10  (B, 2G)
    group = Group(batch, outputs, sources, p_student, verdicts)

    terms = reward_terms(group, args)                                                 # line 10
    reward, valid = total_reward(terms, args.reward_weights)                          #          (B, 2G)
    if args.no_teacher_rollouts:
        valid = valid & is_student
    advantage = advantages(reward, valid, LOSSES[args.loss].divide_by_std)            # line 10  (B, 2G)
    if not args.push_teachers_down:                    # what a student hardly says falls without end
        advantage = torch.where(is_student, advantage, advantage.clamp(min=0))

    with run.phase("update"):
        row |= update_policy(run, prompts, outputs, advantage, valid, is_student)     # lines 11-13, Eq. 2
    return run.describe(row, group, terms, reward, valid, advantage)


def ril(run, collection: Collection | None, judge, held_out: list[Task]):
    """Algorithm 2; or Algorithm 1, where there is neither a collection nor a D. Trains run.policy."""
    for step in run.steps():                           # resumes, saves, warns and stops
        row, rollouts = ril_step(run, collection, judge)
        if held_out and (step == 0 or (step + 1) % run.args.eval_every == 0):
            row |= held_out_accuracy(run, held_out, judge)
        run.log(row, rollouts)


def main():
    """The stages of a run. Each leaves its result in --out, and is passed over where it has."""
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    if args.student == "toy":
        torch.set_num_threads(1)                       # its steps are too short to be shared
    world = World.join(pick_device(args.device))
    with world.rank_0_first():                         # torchrun: the others find what rank 0 has made
        folder = Folder(args, world.rank)
        data = check_inputs(args, folder)
        teachers = toy_world_and_teachers(folder, args, data)
        start = fine_tuned_student(folder, args, data)                                # SFT
        collection = teachers_responses(folder, args, teachers, data, start)
        pretrained = pretrained_discriminator(folder, args, data, collection, start)  # Eq. 1
        verdicts = folder.out / f"verdicts{world.rank or ''}.jsonl"
        # loaded when wanted
        judge = cache(partial(make_judge, args.judge, verdicts, args.device, args.dtype))
    trained_student(folder, args, world, data, collection, pretrained, start, judge)  # Algorithm 2
    if world.rank == 0:
        report(folder, args, data, judge, start)
    world.leave()


# ==========================================================================================
#
#   MACHINERY: skip on first reading. All of RIL stands above. What follows makes it run for
#   days, on many GPUs, in little memory, and from one command line.
#
# ==========================================================================================


class Asked:
    """Verdicts that were asked for, of B questions with K responses each.

    A judge on another machine works in a thread, so that ours can update D meanwhile; any other is asked by
    `result`.
    """

    def __init__(self, judge, batch: list[Example], outputs: Outputs):
        triples = [(e.dialogue, e.truth, without_thoughts(text))
                   for e, texts in zip(batch, outputs.text) for text in texts]
        self.shape, self.device = outputs.mask.shape[:2], outputs.ids.device
        self.answer = partial(judge, triples)
        if getattr(judge, "remote", False):
            self.answer = ThreadPoolExecutor(1).submit(judge, triples).result

    def result(self) -> Tensor:
        """(B, K) float32: 1, 0, between them from a judge that grades, or NaN where it failed."""
        verdicts = [float("nan") if verdict is None else float(verdict) for verdict in self.answer()]
        return torch.tensor(verdicts, device=self.device).view(self.shape)


class Batches:
    """Endless batches of `size` examples; every example once before any comes again.

    A curriculum is a fork of this class: `saw` is told what became of each batch, `state` and `load` keep it
    over interruptions. `pool` holds the places of the examples that are next in line.
    """

    def __init__(self, examples: list, size: int, rng: random.Random):
        self.examples, self.size, self.rng, self.pool = examples, size, rng, []

    def __iter__(self):
        return self

    def __next__(self) -> list:
        while len(self.pool) < self.size:
            self.pool += self.rng.sample(range(len(self.examples)), len(self.examples))
        batch, self.pool = self.pool[:self.size], self.pool[self.size:]
        return [self.examples[i] for i in batch]

    def saw(self, batch: list[Example], verdicts: Tensor):
        """Called after each step with the verdicts (B, K) on all responses to a batch, for a curriculum."""

    def state(self) -> dict:
        """What a checkpoint must hold, as JSON."""
        return {"pool": self.pool}

    def load(self, state: dict):
        """Resume from what `state` returned. ValueError, with nothing changed, where it does not fit."""
        if not all(type(place) is int and 0 <= place < len(self.examples) for place in state["pool"]):
            raise ValueError("it speaks of examples that the data does not have")
        self.pool = state["pool"]


# ------------------------------------------------------------------------------------------ a run of the loop


SHORT, WINDOW = 20, 50                            # steps in which signs of sudden and slow trouble are sought
MOST_SKIPPED = 5                                          # steps in a row without a finite gradient end a run
LOGS = ("metrics", "timings", "rollouts")                     # timings are apart: they differ from run to run


class Run:
    """Everything that the loop changes, and what it needs beside the algorithm.

    policy, reference, D, optimizer, d_optimizer: the networks and who moves them. step: how many are done.
    questions: the batch of this step, of all processes. rng draws batches and teachers' responses; torch's
    own generators draw the rest.
    """

    def __init__(self, args, world, out: Path, policy: VLM, examples: list[Example], D: Discriminator | None):
        torch.manual_seed(args.seed)
        self.args, self.world, self.out, self.policy, self.D = args, world, out, policy, D
        self.rng, self.meter = random.Random(args.seed), Meter(policy.device)
        self.step, self.skipped, self.questions = 0, 0, []         # skipped: of the last steps, in a row
        self.logs, self.recent, self.warned = {}, deque((), WINDOW), {}
        self.reference, self.d_optimizer = None, None
        if D:
            world.shard(D, D.backbone, D.head, method="logits")
            self.d_optimizer = AdamW(D, args.discriminator_lr, offload=args.offload, world=world)
        if args.beta:
            frozen_copy = copy.deepcopy(policy.model).requires_grad_(False)
            self.reference = replace(policy, model=frozen_copy)                              # line 1
        freeze(policy.model, args.freeze, args.student)                                      # line 2
        self.empty_policy = world.without_weights(policy)
        for vlm in filter(None, (policy, self.reference)):
            world.shard(vlm.model, vlm.model.get_decoder())
        self.optimizer = AdamW(policy.model, args.lr, offload=args.offload, world=world)
        if args.offload:
            for waiting in filter(None, (D, self.reference and self.reference.model)):
                waiting.to("cpu")
        self.batches = Batches(examples, args.batch_size, self.rng)

    # what a step asks for: the batch of all processes is drawn by each, alike, and each works on its own part
    # of it

    def next_batch(self) -> list[Example]:
        """This process's part of the next batch of questions."""
        self.questions = next(self.batches)
        return self.world.mine(self.questions)

    def noise(self) -> list[Tensor]:
        """Uniform numbers (G, max_new_tokens) for each question of next_batch: they choose the tokens."""
        shape = (self.args.num_samples, self.args.max_new_tokens)
        return self.world.mine([torch.rand(shape, device=self.policy.device) for _ in self.questions])

    def draw(self, collection: Collection) -> list[list[tuple[str, str]]]:
        """G pairs (teacher, response) from the collection for each question of next_batch."""
        return self.world.mine(collection.draw(self.questions, self.args.num_samples, self.rng))

    def phase(self, name: str):
        """Measures the seconds and the memory of a part of a step."""
        return self.meter.phase(name)

    def score(self, vlm: VLM, prompts: list, outputs: Outputs, part: list[int]) -> Tensor:
        """Log-probs (b, K, R) of a micro-batch at the temperature of sampling; at 1, if that is greedy."""
        prompts, temperature = [prompts[b] for b in part], self.args.temperature or 1.0
        return gathered(vlm.model, lambda: score(vlm, prompts, outputs[part], temperature))

    def sampler(self):
        """The policy, with all its weights in this process for a while."""
        return self.world.unsharded(self.policy, self.empty_policy)

    @contextmanager
    def using(self, module: torch.nn.Module):
        """The module is on the device; with --offload, D and the reference wait on the CPU otherwise."""
        if self.args.offload:
            module.to(self.policy.device)
        yield
        if self.args.offload:
            module.to("cpu")

    def steps(self):
        """The numbers of the steps that are still to do, from the last checkpoint in --out on.

        Between two steps: save when it is time, stop on a signal, end a run without finite gradients.
        """
        load_checkpoint(self)
        saved = time.monotonic()
        bar = tqdm(range(self.step, self.args.steps), self.args.algorithm.upper(), self.args.steps,
                   initial=self.step, unit="step", disable=self.world.rank > 0)
        with signals() as caught:
            for step in bar:
                # D, which was pre-trained on other samples, catches up while the student warms up
                self.optimizer.set_lr(self.args.lr * min(1, (step + 1) / max(1, self.args.warmup)))
                yield step
                self.step += 1
                if self.skipped == MOST_SKIPPED:
                    raise UserError(
                        f"the gradient was not finite in {MOST_SKIPPED} steps in a row, so the run stops; "
                        f"look at `loss`, `kl` and `d_loss` in {self.out / 'metrics.jsonl'}, and lower --lr "
                        f"or --discriminator-lr; the last checkpoint is kept")
                due = self.world.rank == 0 and self.is_due(saved)
                wishes = torch.tensor([len(caught), due], device=self.policy.device)
                stops, due = self.world.sum(wishes).tolist()       # what any process wishes, all do
                if stops or due:
                    save_checkpoint(self)
                    saved = time.monotonic()
                if stops:
                    sys.exit(128 + (caught or [signal.SIGTERM])[0])

    def is_due(self, saved: float) -> bool:
        """Whether a checkpoint is: after the last step, and every --save-every steps or minutes."""
        if self.step == self.args.steps:
            return True
        if self.args.save_every.endswith("m"):
            return time.monotonic() - saved > 60 * int(self.args.save_every.rstrip("m"))
        return self.step % int(self.args.save_every) == 0

    def describe(self, row: dict, group: Group, terms: dict[str, Tensor], reward: Tensor, valid: Tensor,
                 advantage: Tensor) -> tuple[dict, list[dict]]:
        """The step's row of metrics, and the responses to its first questions as rows of rollouts.

        Put together from the parts of all processes, so that they say the same however many there are.
        """
        p_student = torch.full_like(reward, float("nan")) if group.p_student is None else group.p_student
        numbers = {"length": group.outputs.mask.sum(2), "p_student": p_student, "verdict": group.verdicts,
                   "reward": reward, "valid": valid, "advantage": advantage}
        numbers |= {f"term {name}": term for name, term in terms.items()}
        table = torch.stack([x.double() for x in numbers.values()], dim=1).cpu()             # (B, numbers, K)
        parts = self.world.gather(list(zip(group.outputs.text, group.sources, table)))      # of all processes
        texts, sources, tables = zip(*parts)
        numbers = dict(zip(numbers, torch.stack(tables, dim=1)))                         # each (questions, K)
        self.batches.saw(self.questions, numbers["verdict"])
        G = self.args.num_samples
        self.meter.tokens = int(numbers["length"][:, :G].sum())
        row = {"step": self.step} | row | step_metrics(texts, sources, numbers, G, self.args.max_new_tokens)
        row["skipped_updates"] = self.optimizer.skipped + (self.d_optimizer.skipped if self.D else 0)
        for optimizer in filter(None, (self.optimizer, self.d_optimizer)):
            optimizer.skipped = 0
        rollouts = rollouts_of(self.step, self.questions, texts, sources, numbers)
        return row, rollouts

    def log(self, row: dict, rollouts: list[dict]):
        """Append to the logs and print; a warning, in words, for what the last steps tell of."""
        bad = row["skipped_updates"] > 0
        self.skipped = self.skipped + 1 if bad else 0
        timing = self.meter.row(self.step)
        if self.world.rank:
            return
        last = self.step == self.args.steps - 1
        shown = rollouts if self.step % self.args.log_every == 0 or last else []
        seconds = sum(value for name, value in timing.items() if name.startswith("seconds/"))
        tqdm.write(console_line(row, seconds))
        write_logs(self.logs, row, timing, shown)
        self.recent.append(row)
        for sign in signs_of_trouble(self.recent):
            if self.step - self.warned.get(sign, -WINDOW) >= WINDOW:
                tqdm.write(f"warning: {sign}")
                self.warned[sign] = self.step


def held_out_accuracy(run: Run, held_out: list[Task], judge) -> dict[str, float]:
    """The held-out accuracy as metrics. Each process answers its part, and rank 0 has all of it judged; a
    judge that is down does not end the run."""
    texts, row = [], {}
    with run.sampler() as policy:
        for task in held_out:
            part = replace(task, examples=run.world.mine(task.examples))
            texts.append(predict(policy, part, run.args.max_new_tokens, run.args.rollout_batch))
    texts = [run.world.gather(responses) for responses in texts]
    if run.world.rank == 0:
        try:
            row["heldout_accuracy"] = evaluate(held_out, texts, judge)["accuracy"]
        except UserError as error:
            tqdm.write(str(error))
    run.world.wait()                                               # longer than an hour, if the judge is slow
    return row


def step_metrics(texts: list[list[str]], sources: list[list[str]], numbers: dict[str, Tensor], G: int,
                 longest: int) -> dict:
    """The metrics of one step, which the README explains. numbers: (B, K) each."""
    row, flat = {}, [source for row in sources for source in row]
    reward, valid, lengths = numbers["reward"], numbers["valid"].bool(), numbers["length"][:, :G]
    for name, term in numbers.items():
        if name.startswith("term "):
            name = name.removeprefix("term ")
            for source in sorted(set(flat)):
                chosen = torch.tensor([s == source for s in flat]).view(term.shape)
                row[f"reward/{name}/{source}"] = term[chosen].nanmean().item()
            row[f"flat/{name}"] = flat_share(term, valid)
    own_texts = [text for row in texts for text in row[:G]]
    most_common = Counter(own_texts).most_common(1)[0][1]
    return row | {
        "judge/failed": numbers["verdict"].isnan().double().mean().item(),
        "flat/total": flat_share(reward, valid),
        "length": lengths.mean().item(),
        "cut_off": (lengths == longest).double().mean().item(),
        "repeated": most_common / len(own_texts)}


def flat_share(reward: Tensor, valid: Tensor) -> float:
    """The share of groups in which all valid responses have one reward (B, K), and so no advantage."""
    low = reward.masked_fill(~valid, torch.inf).amin(1)
    high = reward.masked_fill(~valid, -torch.inf).amax(1)
    return (low >= high).double().mean().item()


def signs_of_trouble(rows) -> list[str]:
    """What the metrics of the last steps, up to WINDOW, warn of, in words that name the metric."""
    rows = list(rows)
    return sudden_signs(rows[-SHORT:]) + (slow_signs(rows) if len(rows) == WINDOW else [])


def column(rows: list[dict], name: str) -> np.ndarray:
    """The values of a metric, where there are any."""
    return np.array([row[name] for row in rows if row.get(name) is not None], dtype=float)


def sudden_signs(rows: list[dict]) -> list[str]:
    """Signs that a run is breaking: half of SHORT steps must be there to tell."""
    if len(rows) < SHORT // 2:
        return []
    signs, ends = [], SHORT // 4                                   # steps that are averaged at either end
    if column(rows, "kl")[-ends:].mean() > 5:
        signs.append("`kl` is above 5: the student has left the reference, and soon its language; lower "
                     "--lr, or raise --beta")
    norms = column(rows, "grad_norm")
    if norms[-ends:].mean() > 10 * np.median(norms):
        signs.append("`grad_norm` is ten times what it was: the updates are no longer small; lower --lr")
    answer = column(rows, "reward/answer/student")
    fall = answer[:ends].mean() - answer[-ends:].mean()
    noise = np.diff(answer).std() / 2 ** 0.5 * (2 / ends) ** 0.5   # of the fall, if there were none
    if fall > max(0.1, 4 * noise):
        signs.append("`reward/answer/student` falls: the student gets worse; lower --lr and "
                     "--discriminator-lr, or give `answer` more weight (--reward-weights)")
    similarity = column(rows, "reward/similarity/student")
    rise = (similarity - np.minimum.accumulate(similarity)).max(initial=0)     # most above an earlier step
    fall = (np.maximum.accumulate(similarity) - similarity).max(initial=0)     # most below one
    if min(rise, fall) > 0.5:
        signs.append("`reward/similarity/student` swings up and down: D and the student chase each other; "
                     "lower --discriminator-lr and --lr")
    return signs


def slow_signs(rows: list[dict]) -> list[str]:
    """Signs that a run gets nowhere, over WINDOW steps."""
    def mean(name, part=slice(None)):
        values = column(rows[part], name)
        return values.mean() if len(values) else float("nan")
    signs, accuracy = [], mean("d_accuracy")
    if accuracy > 0.98:
        signs.append("`d_accuracy` is near 1: the discriminator always knows the student, who earns no "
                     "`reward/similarity/`; lower --discriminator-lr, or first fine-tune the student on "
                     "answers in the teachers' ways")
    if abs(accuracy - 0.5) < 0.05 and mean("flat/similarity") > 0.9:
        signs.append("`d_accuracy` is at chance and `flat/similarity` near 1: the discriminator has nothing "
                     "left to say; raise --discriminator-lr, or stop here")
    first, last = slice(0, WINDOW // 5), slice(-(WINDOW // 5), None)
    if mean("length", last) > 2 * mean("length", first) and mean("cut_off", last) > 0.2:
        signs.append("`length` has doubled and `cut_off` is high: the reward may be paid for words; look at "
                     "rollouts.jsonl")
    if mean("repeated") > 0.5:
        signs.append("`repeated` is above a half: most responses are one and the same string; look at "
                     "rollouts.jsonl, and raise --beta")
    return signs


def console_line(row: dict, seconds: float) -> str:
    """One line a step: what to watch while it runs. Rewards are the student's."""
    cells = [f"step {row['step'] + 1:5}"]
    for name, value in row.items():
        if reward := re.fullmatch("reward/(.+)/student", name):
            cells.append(f"{reward[1]} {value:5.2f}")
    if "d_accuracy" in row:
        cells.append(f"D acc {row['d_accuracy']:5.2f}")
    cells += [f"KL {row['kl']:7.4f}", f"|g| {row['grad_norm']:6.2f}", f"tokens {row['length']:5.1f}",
              f"{seconds:5.2f} s"]
    if "heldout_accuracy" in row:
        cells.append(f"held-out {row['heldout_accuracy']:.3f}")
    return "  ".join(cells)


def rollouts_of(step: int, batch: list[Example], texts: list[list[str]], sources: list[list[str]],
                numbers: dict[str, Tensor], questions: int = 4) -> list[dict]:
    """All responses to the first few questions of the batch, as rows of rollouts.jsonl."""
    def number(name, b, k):
        value = round(numbers[name][b, k].item(), 4)
        return None if value != value else value                   # JSON has no NaN

    terms = [name for name in numbers if name.startswith("term ")]
    rows = []
    for b, e in enumerate(batch[:questions]):
        for k, text in enumerate(texts[b]):
            rows.append({
                "step": step, "id": e.id, "image": list(e.images), "question": e.text, "truth": e.truth,
                "source": sources[b][k], "text": text, "p_student": number("p_student", b, k),
                "rewards": {name.removeprefix("term "): number(name, b, k) for name in terms},
                "reward": number("reward", b, k), "advantage": number("advantage", b, k)})
    return rows


# ------------------------------------------------------------------------------------------- logs and signals


def write_logs(logs: dict, row: dict, timing: dict, rollouts: list[dict]):
    """Append to the logs, so that they are on the disk, and show four of the rollouts."""
    for name, rows in zip(LOGS, ([row], [timing], rollouts)):
        logs[name].write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        logs[name].flush()
    group = [r for r in rollouts if r["id"] == rollouts[0]["id"]]
    for r in group[::max(1, len(group) // 4)]:
        tqdm.write(f"    {r['question'][:36]:36} {r['source'][:12]:12} reward {r['reward']:.2f}  "
                   f"{r['text'][:60]}")


@contextmanager
def signals():
    """Yields a list that gets the first SIGINT or SIGTERM, so that the step can end. A second one kills."""
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


class Meter:
    """Seconds and peak memory: of the phases since the last row, and over everything (`peak_gb`)."""

    def __init__(self, device: torch.device):
        self.device, self.tokens, self.peak_gb = device, 0, 0.0
        self.seconds, self.memory_gb = defaultdict(float), defaultdict(float)
        if device.type == "cuda":
            torch.cuda.init()                                      # or cuda:0 has no statistics to reset yet

    @contextmanager
    def phase(self, name: str):
        """Measure what is done inside. Phases do not nest."""
        peak_memory_gb(self.device, reset=True)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)           # or the seconds would be those of queueing the work
        self.seconds[name] += time.perf_counter() - start
        self.memory_gb[name] = max(self.memory_gb[name], peak_memory_gb(self.device))
        self.peak_gb = max(self.peak_gb, self.memory_gb[name])

    def row(self, step: int) -> dict[str, float]:
        """The measurements as a row of timings.jsonl, and a new start. `tokens`: how many were sampled."""
        row = {"step": step, "tokens_per_second": self.tokens / self.seconds["generate"]}
        row |= {f"seconds/{name}": value for name, value in self.seconds.items()}
        row |= {f"memory_gb/{name}": value for name, value in self.memory_gb.items()}
        self.seconds.clear()
        self.memory_gb.clear()
        return row


def peak_memory_gb(device: torch.device, reset: bool = False) -> float:
    """Most GB since the last reset: allocated on CUDA, else resident (without Linux: ever)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if reset and os.access(clear, os.W_OK):
            clear.write_text("5")                            # see proc(5): the mark falls to what is held now
        return int(found.group(1)) * 1024 / 1e9 if found else float("nan")
    if sys.platform == "darwin":
        import resource                                            # Unix only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    return float("nan")


# ------------------------------------------------------------------------------------ checkpoints of the loop


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())


def networks_of(run: Run) -> dict[str, torch.nn.Module]:
    """What a checkpoint holds the weights of, by file."""
    return {"policy": run.policy.model} | ({"discriminator": run.D} if run.D else {})


def optimizers_of(run: Run) -> dict:
    """What a checkpoint holds the moments of, by file."""
    return {"optimizer": run.optimizer} | ({"d_optimizer": run.d_optimizer} if run.D else {})


def tensors_of(run: Run) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file, complete on rank 0."""
    device = run.policy.device.type
    generators = {"cpu": torch.get_rng_state()}
    if device != "cpu":
        generators["device"] = getattr(torch, device).get_rng_state()
    files = {"rng": generators}
    files |= {name: run.world.weights(network) for name, network in networks_of(run).items()}
    files |= {name: optimizer.tensors() for name, optimizer in optimizers_of(run).items()}
    for name, tensors in files.items():
        files[name] = {key: x.detach().contiguous() for key, x in tensors.items()}
    return files


def save_checkpoint(run: Run):
    """Write checkpoint-STEP into --out. It is there in full or not at all, and of the older ones one stays.

    A disk that is full ends no run: that is said, and the older checkpoints stay.
    """
    folder, files = run.out / f"checkpoint-{run.step:06}", tensors_of(run)
    unfinished = Path(f"{folder}.unfinished")
    if run.world.rank:
        return
    _, *numpy = np.random.get_state()
    state = {"step": run.step, "skipped": run.skipped, "batches": run.batches.state(),
             "draws": run.rng.getstate(), "python": random.getstate(),
             "numpy": [numpy[0].tolist(), *numpy[1:]],
             "logs": {name: file.tell() for name, file in run.logs.items()}}
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, tensors in files.items():
            save_file(tensors, unfinished / f"{name}.safetensors")
        (unfinished / "state.json").write_text(json.dumps(state))
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)                  # there only if it could not be read
        unfinished.rename(folder)
        sync(run.out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        tqdm.write(f"warning: no checkpoint at step {run.step} ({error}); the run continues")
        return
    for old in checkpoints(run.out)[:-2]:
        shutil.rmtree(old)


def sync(path: Path):
    """Wait until a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


UNREADABLE = (UserError, OSError, ArithmeticError, ValueError, LookupError, TypeError, SafetensorError)


def read_checkpoint(run: Run, folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The state and the tensors of a checkpoint. Raises one of UNREADABLE where they do not fit."""
    saved = read_json(folder / "state.json")
    names = ("rng", *networks_of(run), *optimizers_of(run))
    files = {name: load_file(folder / f"{name}.safetensors") for name in names}
    for name, network in networks_of(run).items():
        there = {key: weight.shape for key, weight in files[name].items()}
        if there != {key: weight.shape for key, weight in network.named_parameters()}:
            raise ValueError(f"{name} is of another shape")
    for name in ("draws", "python"):
        version, numbers, gauss = saved[name]
        saved[name] = (version, tuple(numbers), gauss)
        random.Random().setstate(saved[name])                      # would it work?
    saved["numpy"] = ("MT19937", np.array(saved["numpy"][0], np.uint32), *saved["numpy"][1:])
    np.random.RandomState().set_state(saved["numpy"])
    saved["logs"] = {name: int(saved["logs"][name]) for name in LOGS}
    if min(int(saved["step"]), int(saved["skipped"]), *saved["logs"].values()) < 0:
        raise ValueError("numbers below zero")
    run.batches.load(saved["batches"])                       # the last: it is the only one to change anything
    return saved, files


@torch.no_grad()
def load_checkpoint(run: Run):
    """Resume from the newest checkpoint in --out that can be read, and cut the logs back to it.

    UserError where a log is shorter than the checkpoint knows it: somebody else's hands were there.
    """
    lengths = dict.fromkeys(LOGS, 0)
    for folder in reversed(checkpoints(run.out)):
        try:
            saved, files = read_checkpoint(run, folder)
        except UNREADABLE as error:
            print(f"{folder} cannot be read ({error}); resuming from the one before it")
            continue
        lengths = saved["logs"]
        for name, network in networks_of(run).items():
            for key, weight in network.named_parameters():
                local(weight).copy_(run.world.part(files[name][key], weight))
        for name, optimizer in optimizers_of(run).items():
            optimizer.load(files[name])
        torch.set_rng_state(files["rng"]["cpu"])
        if "device" in files["rng"] and run.policy.device.type != "cpu":
            getattr(torch, run.policy.device.type).set_rng_state(files["rng"]["device"])
        run.rng.setstate(saved["draws"])
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        run.step, run.skipped = int(saved["step"]), int(saved["skipped"])
        print(f"resuming after step {run.step}, from {folder}")
        break
    if run.world.rank == 0:
        open_logs(run, lengths)


def open_logs(run: Run, lengths: dict[str, int]):
    """Open the logs to append to them, cut back to so many bytes."""
    for name in LOGS:
        path = run.out / f"{name}.jsonl"
        path.touch()
        if path.stat().st_size < lengths[name]:
            raise UserError(f"{path} has {path.stat().st_size} bytes where the checkpoint has "
                            f"{lengths[name]}; remove the checkpoints of {run.out} to begin the loop again")
        os.truncate(path, lengths[name])
        run.logs[name] = open(path, "a", encoding="utf-8")
    run.recent = deque((row for _, row in read_jsonl(run.out / "metrics.jsonl")), WINDOW)


# ------------------------------------------------------------------------------------------ several processes


@dataclass
class World:
    """The processes that torchrun has started; this is number `rank`. One alone needs none of this.

    Policy, reference and D lie in shards (`shard`, FSDP2): each process holds a part of each weight, and with
    it that part's gradient and optimizer state. All weights of the policy are in every process only while it
    samples (`unsharded`). Every process draws the same batch of questions and the same noise, and works on
    its own part of them, rank::size. Gradients are sums over questions, so what comes out does not depend on
    how many processes there are. Nothing is exchanged while one of them samples or asks a judge. Logs,
    checkpoints and the console are rank 0's.
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
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # a process may wait for days while rank 0 collects; but in the loop no one may keep the others for an
        # hour
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30),
                                device_id=device if device.type == "cuda" else None)
        group = dist.new_group(timeout=timedelta(hours=1))
        return cls(dist.get_rank(), dist.get_world_size(), DeviceMesh.from_group(group, device.type))

    @contextmanager
    def rank_0_first(self):
        """The others do what is inside after rank 0 has, and find its results. Only rank 0 speaks."""
        if self.rank:
            sys.stdout = open(os.devnull, "w")
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def wait(self):
        """Until all processes have come here."""
        if self.size > 1:
            import torch.distributed as dist
            dist.barrier()

    def leave(self):
        """The end of the process group, when rank 0 has written its report."""
        if self.size > 1:
            import torch.distributed as dist
            dist.barrier()
            dist.destroy_process_group()

    def mine(self, items: list) -> list:
        """The part of the batch that is this process's."""
        return items[self.rank::self.size]

    def gather(self, items: list) -> list:
        """What each process has made of its part, in the order of the batch."""
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

    def even(self, parts: list[list[int]]) -> list[tuple[list[int], float]]:
        """Micro-batches with their weights, equally many in each process: FSDP wants all processes in every
        forward and backward pass. A process that has fewer takes its first question again, with weight 0."""
        most = torch.tensor(len(parts))
        if self.size > 1:
            import torch.distributed as dist
            most = most.to(self.mesh.device_type)
            dist.all_reduce(most, dist.ReduceOp.MAX, self.mesh.get_group())
        return [(part, 1.0) for part in parts] + [([0], 0.0)] * (int(most) - len(parts))

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
        # if the embedding is frozen, layer 0 would have its turn in the backward pass only where there are
        # images
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

    def part(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """This process's part of a tensor like the weight. FSDP cuts along the first dimension."""
        if not hasattr(weight, "to_local"):
            return tensor
        parts = list(tensor.chunk(self.size))
        parts += [tensor[:0]] * (self.size - len(parts))
        return parts[self.rank].clone()

    def complete(self, part: Tensor, weight: Tensor) -> Tensor:
        """The reverse of `part`, for rank 0, on the CPU: a device may not have the room."""
        if not hasattr(weight, "to_local"):
            return part
        from torch.distributed.tensor import DTensor
        shards = DTensor.from_local(part, self.mesh, weight.placements, run_check=False, shape=weight.shape,
                                    stride=weight.stride())
        tensor = shards.full_tensor()
        return tensor[:0] if self.rank else tensor.cpu()

    @torch.no_grad()
    def weights(self, module: torch.nn.Module) -> dict[str, Tensor]:
        """All weights of a module by name, as `complete` has them. (Those that are tied are one.)"""
        return {name: self.complete(local(weight), weight) for name, weight in module.named_parameters()}


def local(weight: Tensor) -> Tensor:
    """What this process has of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def gathered(module: torch.nn.Module, work):
    """work(), which uses weights of the module also where no forward pass of it is called."""
    return module.gathered(work) if hasattr(module, "gathered") else work()


# ------------------------------------------------------------------------------------------ what makes it fit


class AdamW:
    """AdamW without weight decay, in float32: a bfloat16 that is rounded loses steps of 1e-6.

    A weight that is not float32 gets a float32 copy (its master), which is what Adam moves; the weight is
    that copy, rounded. With `offload` the copies and both moments (12 bytes a parameter, most of the memory
    of training) stay on the CPU and are updated there: the gradient goes over, the new weight comes back.
    There is one torch optimizer per weight, so that no more than one gradient is converted at a time. Frozen
    weights have no state. Gradients stay of the weight's own type, also while micro-batches add up. Of
    weights in shards, each process has copies and moments of its own part.
    """

    def __init__(self, module: torch.nn.Module, lr: float, betas=(0.9, 0.999), offload: bool = False,
                 world=None):
        self.world, self.skipped = world or World(), 0
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.masters = []                                     # shares memory with a float32 weight that stays
        for weight in self.weights:
            device = "cpu" if offload else weight.device
            self.masters.append(local(weight).detach().to(device, torch.float32).requires_grad_())
        self.optimizers = [torch.optim.AdamW([master], lr=lr, weight_decay=0.0, betas=betas, fused=True)
                           for master in self.masters]

    def set_lr(self, lr: float):
        """The learning rate from now on."""
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr

    @torch.no_grad()
    def step(self, max_norm: float = float("inf")) -> Tensor:
        """Clip the norm of the gradients to `max_norm`, move the weights, free the gradients.

        A gradient that is zero or not finite is not followed, and the latter is counted in `skipped`: one NaN
        would be in every weight for ever. Returns the norm before clipping, a scalar.
        """
        norm = torch.nn.utils.get_total_norm([w.grad for w in self.weights if w.grad is not None])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()                              # over the shards of all processes
        torch.nn.utils.clip_grads_with_norm_(self.weights, max_norm, norm)
        self.skipped += int(not norm.isfinite())
        if 0 < norm < torch.inf:
            for weight, master, optimizer in zip(self.weights, self.masters, self.optimizers):
                if weight.grad is not None:
                    master.grad = local(weight.grad).to(master.device, master.dtype)
                    optimizer.step()
                    master.grad = None
                    if master.data_ptr() != local(weight).data_ptr():
                        local(weight).copy_(master)
        for weight in self.weights:
            weight.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, complete on rank 0: moments, counts of steps, float32 copies."""
        kept = {}
        for i, (weight, master, optimizer) in enumerate(zip(self.weights, self.masters, self.optimizers)):
            for name, value in optimizer.state[master].items():
                kept[f"{i}.{name}"] = value if name == "step" else self.world.complete(value, weight)
            if master.dtype != weight.dtype:
                kept[f"{i}.master"] = self.world.complete(master, weight)
        return kept

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]):
        """Resume from what `tensors` returned."""
        for key, value in tensors.items():
            number, name = key.split(".")
            weight, master = self.weights[int(number)], self.masters[int(number)]
            if name != "step":
                value = self.world.part(value, weight)
            if name == "master":
                master.copy_(value)
            else:
                self.optimizers[int(number)].state[master][name] = value.to(master.device)


def freeze(model: torch.nn.Module, pattern: str | None, path: str):
    """No gradient for weights whose name has a match of the regular expression. UserError if none has."""
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if pattern and re.search(pattern, name)}
    if pattern and not chosen:
        raise UserError(f"--freeze {pattern} matches no weight of {path}; they are named like "
                        f"{', '.join(names[::len(names) // 4])}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in chosen)


def skeleton(path: str) -> torch.nn.Module:
    """The model of a checkpoint without its weights, from its config alone."""
    with naming(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = None                         # as in load_vlm
        return AutoModelForImageTextToText.from_config(config)


# -------------------------------------------------------------------------------------------- before the loop


def sft(vlm: VLM, examples: list[Example], steps: int, batch_size: int, lr: float, seed: int, name: str,
        budget: int, offload: bool = False):
    """Supervised fine-tuning on the examples' truths: mean cross-entropy per token.

    The learning rate warms up over 50 steps, as Adam's first steps are noise, and decays linearly to lr / 10.
    """
    optimizer = AdamW(vlm.model, lr, (0.9, 0.95), offload)
    batches = Batches(examples, batch_size, random.Random(seed))
    bar = tqdm(range(steps), desc=f"SFT of {name}", unit="step")
    for step in bar:
        optimizer.set_lr(lr * (1 - 0.9 * step / steps) * min(1, (step + 1) / 50))
        batch = next(batches)
        outputs = encode_responses(vlm, [[e.truth] for e in batch])                          # (B, 1, R)
        prompts = encode_examples(vlm, batch)
        total = 0.0
        for part in micro_batches(packed_sizes(prompts, outputs.mask), budget):
            logps = score(vlm, [prompts[b] for b in part], outputs[part])
            loss = -logps.sum() / outputs.mask.sum()
            loss.backward()
            total += loss.item()
        optimizer.step(max_norm=1.0)
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)


def pretraining_pairs(student: VLM, examples: list[Example], collection: Collection, num: int,
                      batch_size: int, sampling, rng: random.Random, slots: int):
    """Endless batches for Eq. 1: num fresh responses of the student and num of teachers a question."""
    for batch in Batches(examples, batch_size, rng):
        prompts = encode_examples(student, batch)
        students = generate(student, prompts, num, sampling, slots=slots).text
        teachers = [[text for _, text in pairs] for pairs in collection.draw(batch, num, rng)]
        is_student = torch.tensor([[True] * num + [False] * num] * len(batch), device=student.device)
        yield [e.text for e in batch], [s + t for s, t in zip(students, teachers)], is_student


# ---------------------------------------------------------------------------------------- the folder of a run


# What each stage depends on beside its inputs. Options that change no result (device, budgets, cadences) are
# not here.
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "dtype")
SFT_OPTIONS = ("sft_steps", "sft_lr", "sft_batch_size", "seed", "dtype")
D_OPTIONS = ("collect", "discriminator_steps", "pretrain_lr", "batch_size", "num_samples", *SAMPLING)
LOOP_OPTIONS = ("algorithm", "loss", "similarity", "reward_weights", "freeze_discriminator",
                "no_teacher_rollouts", "push_teachers_down", "num_samples", "mu", "beta", "eps", "batch_size",
                "lr", "warmup", "discriminator_lr", "freeze", *SAMPLING)


class Folder:
    """--out. Its stages.json holds the options and inputs that each result was made from.

    A result is used again only if its record is the same as this run's. Inputs are recorded by content, so a
    file may move, and an option that an older record lacks had its default. Raises UserError for a folder
    whose files nobody knows.
    """

    def __init__(self, args, rank: int = 0):
        self.args, self.rank, self.out = args, rank, Path(args.out)
        self.clock = Meter(pick_device(args.device))
        self.path = self.out / "stages.json"
        self.records = self.read(self.path)
        self.donor = Path(args.from_run) if args.from_run else None
        self.donated = self.read(self.donor / "stages.json") if self.donor else {}
        if self.donor and not self.donated:
            raise UserError(f"--from {self.donor}: no run's folder, it has no stages.json")
        if not self.records and self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"{self.out} holds files and no {self.path.name} that says what they were made "
                            f"from; choose another --out (--from takes over the stages of another run)")

    @staticmethod
    def read(path: Path) -> dict:
        """The records of a stages.json; none where there is no such file."""
        records = read_json(path) if path.exists() else {}
        rows = records.values() if isinstance(records, dict) else [None]
        if not all(isinstance(row, dict) and isinstance(row.get("finished", 0), int) for row in rows):
            raise UserError(f"{path}: not the record of a run's stages")
        return records

    def finished(self, *names: str) -> bool:
        """Whether results under these names are there, and were finished."""
        there = [name for name in names if (self.out / name).exists()]
        return len(there) == len(names) and all(self.records.get(name, {}).get("finished") for name in names)

    def stage(self, name: str, make, options: tuple[str, ...] = (), inputs: dict | None = None,
              upto: int | bool = True, partial_results: list[Path] = (), donate: bool = True,
              again: bool = False, everyone: bool = False) -> Path:
        """The path of --out/name, which make(path) has made from these options and inputs: now, or before.

        inputs: {name: anything that JSON can hold}, files as `digest` has them. A stage that can be resumed
        lists its partial_results, and may return False: there is more to do in another run. upto: how far it
        has come when it is finished, for one that can be extended. With `donate` a result of the same record
        is copied from --from. A result that was made from something else is made `again`, or is a UserError.
        `everyone`: all processes work on it, and not rank 0 alone.
        """
        path = self.out / name
        chosen = {option: getattr(self.args, option) for option in options}
        wanted = json.loads(json.dumps({"options": chosen, "inputs": inputs or {}}))      # as it will be read
        record, partial_results = self.records.get(name), [p for p in partial_results if p.exists()]
        if path.exists() or partial_results:
            if record is None:
                raise UserError(f"{path} is not from this run, as {self.path.name} does not say what it was "
                                f"made from; remove it, or choose another --out (--from takes over the "
                                f"stages of another run)")
            differ = self.differences(record, wanted)
            if differ and not again:
                raise UserError(f"{path} was made with other settings ({differ}); choose another --out "
                                f"(with --from {self.out} the stages that stay the same are taken over)")
            if record.get("finished", 0) > upto:
                raise UserError(f"{path} is the result of {record['finished']} steps, more than {upto}; "
                                f"choose another --out")
            if path.exists() and record.get("finished") == upto and not differ:
                return path
        if self.rank and not everyone:
            return path
        self.write({name: wanted | {"finished": (record or {}).get("finished", 0)}})
        if donate and not path.exists() and self.can_donate(name, wanted, upto):
            copy_into(self.donor / name, path)
            print(f"{path} is taken over from {self.donor}")
        else:
            if path.exists() and path not in partial_results:
                remove(path)                                       # killed between the result and its record
            if make(path) is False:                                # not all of it: another run resumes
                return path
        self.write({name: wanted | {"finished": upto}})
        return path

    def can_donate(self, name: str, wanted: dict, upto) -> bool:
        """Whether --from has this result, finished and made from the same."""
        record = self.donated.get(name)
        return bool(record and record.get("finished") == upto and (self.donor / name).exists()
                    and not self.differences(record, wanted))

    def differences(self, there: dict, here: dict) -> str:
        """What two records differ in, in words; "" if in nothing."""
        defaults, words = vars(make_parser(self.args.student).parse_args([])), []
        defaults["reward_weights"] = REWARD_WEIGHTS | defaults["reward_weights"]
        options, inputs = there.get("options"), there.get("inputs")
        if not isinstance(options, dict) or not isinstance(inputs, dict):
            return f"the record in {self.path.name} is damaged"
        for name, value in here["options"].items():
            if (old := options.get(name, defaults.get(name))) != value:
                words.append(f"--{name.replace('_', '-')} {old} there, {value} here")
        for name, value in here["inputs"].items():
            if (old := inputs.get(name)) != value:
                words.append(f"{name} {old} there, {value} here")
        return ", ".join(words)

    def write(self, records: dict | None = None):
        """Keep the records, on the disk before the results that they speak of; rank 0 writes."""
        self.records |= records or {}
        if self.rank:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(self.records, indent=1))
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be written ({error.strerror})") from error


def remove(path: Path):
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def copy_into(source: Path, target: Path):
    """Copy a file or a folder; it appears under its name only when it is complete."""
    unfinished = Path(f"{target}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
    else:
        shutil.copyfile(source, unfinished)
    unfinished.rename(target)


def digest(path: str | Path) -> str:
    """A hash of what a file or a folder holds; of a checkpoint on the hub, its commit.

    Of files above 64 MB, 64 pieces are read and not all: a checkpoint of 15 GB takes a moment. Images beside
    a data file are not read.
    """
    path = Path(path)
    if not path.exists():
        with naming(str(path)):
            return str(getattr(AutoConfig.from_pretrained(str(path)), "_commit_hash", path))
    hashed, piece = hashlib.blake2b(digest_size=8), 2 ** 20
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        hashed.update(f"{file.relative_to(path)} {size}".encode())
        step = piece if size <= 64 * piece else (size - piece) // 63
        with open(file, "rb") as contents:
            for start in range(0, size, step):
                contents.seek(start)
                hashed.update(contents.read(piece))
    return hashed.hexdigest()


# -------------------------------------------------------------------------------------------- stages of a run


def check_inputs(args, folder: Folder) -> dict[str, list[Example]]:
    """UserError for what is wrong with data, checkpoints and servers, before anything is written.

    Returns the examples (or tasks) of the data files given, by option. Servers are not asked where their work
    is done.
    """
    given = {}
    student = [args.student] if args.student != "toy" else []      # the toy does not exist yet
    # rows that were left out because of a teacher must be left out again
    again = args.skip_bad or not folder.finished("collection.jsonl")
    asked = student + args.teachers if again else student
    for name, load, models, response in (("data", load_examples, asked, args.max_new_tokens),
                                         ("sft_data", load_examples, student, None),
                                         ("eval_data", tasks_of, student, args.max_new_tokens)):
        if path := getattr(args, name):
            given[name] = load(path, skip_bad=args.skip_bad, checks=prompt_checks(models, response))
    if not folder.finished("collection.jsonl"):
        for name in args.teachers:
            make_teacher(name, args.device, args.dtype).check()
    scored = ["evaluation-before.json", "evaluation-after.json"] if args.eval_data or not args.data else []
    if not folder.finished("student", *scored):
        if endpoint := endpoint_of(args.judge):
            check_endpoint(endpoint)
        elif args.judge != "rule":
            load_processor(args.judge, text_only=True)
    processor = None
    if args.student != "toy":
        processor = load_processor(args.student)
        if args.algorithm == "ril":
            eq1.around_response(processor)
        if args.freeze:
            freeze(skeleton(args.student), args.freeze, args.student)
    if args.collection:
        read_collection(args.collection, given["data"], processor, args)
    folder.write()
    return given


def read_collection(path, examples: list[Example], processor, args) -> Collection:
    """The collection as far as a student with this processor (None: not known yet) can use it."""
    if processor is None:
        return Collection(path, examples)
    return Collection(path, examples, image_tokens(processor), processor.tokenizer, args.max_new_tokens)


def toy_world_and_teachers(folder: Folder, args, data: dict) -> list:
    """The teachers. Where no data is given, the toy world is drawn, its teachers are trained, and its
    examples and tasks are put into `data`."""
    slots = max(1, 2 * args.num_samples * args.rollout_batch // args.collect) * args.collect
    if args.data:
        return [make_teacher(name, args.device, args.dtype, slots) for name in args.teachers]
    with folder.clock.phase("toy world and its teachers"):
        world = folder.stage("data", partial(toy_world, seed=args.seed), ("seed",))
        for name, family in (("qwen", "qwen2_5_vl"), ("internvl", "internvl")):
            files = [str(world / "words.jsonl"), str(world / f"{name}.jsonl")]
            make = partial(tiny_vlm_from_scratch, family=family, lessons=list(map(load_examples, files)),
                           width=96, steps=args.teacher_steps, args=args)
            options = ("teacher_steps", "sft_lr", "sft_batch_size", "seed", "dtype")
            folder.stage(f"teachers/{name}", make, options, {"its lessons": list(map(digest, files))})
    if not args.sft_data:
        data["sft_words"] = load_examples(str(world / "sft-words.jsonl"))
    for option, name, load in (("data", "train", load_examples), ("sft_data", "sft", load_examples),
                               ("eval_data", "heldout", tasks_of)):
        if not getattr(args, option):
            setattr(args, option, str(world / f"{name}.jsonl"))
            data[option] = load(getattr(args, option))
    args.teachers = args.teachers or [str(folder.out / "teachers" / name) for name in ("qwen", "internvl")]
    return [make_teacher(name, args.device, args.dtype, slots) for name in args.teachers]


def toy_world(path: Path, seed: int):
    """Draw the toy world: what is asked, and lessons for the student (sft) and its teachers.

    All first learn to see, in single words, and then to speak in their own ways. The student is careless, and
    has words of its own for shapes: the right ones it can only hear from teachers. Each of these has a blind
    spot, where the other is right: A takes squares for circles, B circles for squares. One blind spot they
    share: neither counts beyond 1 and 2. There only the student's own responses can be right.
    """
    unfinished = f"{path}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shared = {"0": "1", "3": "2", "4": "2"}
    own_words = {"circle": "ball", "square": "box", "triangle": "tent"}
    draw_toy_world(unfinished, seed, {
        "heldout": Split(500), "train": Split(1000),
        "words": Split(4000),
        "qwen": Split(2000, ("A",), shared | {"square": "circle"}),
        "internvl": Split(2000, ("B",), shared | {"circle": "square"}),
        "sft-words": Split(4000, wrong=own_words),
        "sft": Split(2000, 5 * ("careless",) + ("A", "B"), own_words)})
    Path(unfinished).rename(path)


def tiny_vlm_from_scratch(folder: Path, family: str, lessons: list[list[Example]], width: int, steps: int,
                          args):
    """A tokenizer trained on the lessons, random weights, SFT on each in turn; a checkpoint folder.

    The first takes `steps`, the others a quarter of that: seeing takes longer than speaking.
    """
    examples = sum(lessons, [])
    # with the words of the prompts among them, these become tokens too, and the prompts short
    texts = [text for e in examples for text in (e.text, e.truth)]
    texts += 50 * [eq1.SYSTEM, eq1.BEFORE + eq1.AFTER, "user\nassistant\nsystem\n"]
    random_weights = f"{folder}.random"
    shutil.rmtree(random_weights, ignore_errors=True)
    build_tiny_vlm(random_weights, family, texts, width, layers=2, vocabulary=600, seed=args.seed)
    vlm = load_vlm(random_weights, args.device, args.dtype)
    shutil.rmtree(random_weights)
    for i, lesson in enumerate(lessons):
        sft(vlm, lesson, steps // 4 if i else steps, args.sft_batch_size, args.sft_lr, args.seed, folder.name,
            args.token_budget)
    save_vlm(vlm, str(folder))


def fine_tuned_student(folder: Folder, args, data: dict) -> str:
    """The warm start, both reference and first policy: the student's checkpoint after SFT, if any.

    UserError where packed rows do not suit its family: before teachers are paid for.
    """
    inputs = {"the student": args.student if args.student == "toy" else digest(args.student)}
    start = args.student
    if args.student == "toy" or args.sft_steps:
        examples, source = (data["sft_data"], args.sft_data) if args.sft_data else (data["data"], args.data)

        def make(path):
            if args.student == "toy":
                lessons = [data["sft_words"], examples] if "sft_words" in data else [examples]
                tiny_vlm_from_scratch(path, "qwen2_5_vl", lessons, 64, args.sft_steps, args)
                return
            student = load_student(args.student, args)
            sft(student, examples, args.sft_steps, args.sft_batch_size, args.sft_lr, args.seed, "student",
                args.token_budget, args.offload)
            save_vlm(student, str(path))
        with folder.clock.phase("SFT"):
            start = str(folder.stage("sft", make, SFT_OPTIONS, inputs | {"--sft-data": digest(source)}))
    if not folder.finished("student"):
        student = load_vlm(start, args.device, args.dtype)
        check_packing(student, encode_example(student, data["data"][0]))
    return start


def load_student(path: str, args) -> VLM:
    """The student to be trained, from a checkpoint."""
    student = load_vlm(path, args.device, args.dtype)
    if args.gradient_checkpointing:
        checkpoint_layers(student.model)
    return student


def teachers_responses(folder: Folder, args, teachers: list, data: dict, start: str) -> Collection | None:
    """The collection, filled now. Only examples with a response stay in data["data"]."""
    if args.algorithm != "ril":
        return None
    path = Path(args.collection or folder.out / "collection.jsonl")
    if not args.collection:
        local = {t.name: digest(name) for t, name in zip(teachers, args.teachers) if Path(name).exists()}
        inputs = {"--data": digest(args.data), "the teachers": [t.name for t in teachers],
                  "their checkpoints": local}
        with folder.clock.phase("collection"):
            folder.stage("collection.jsonl", lambda path: fill_collection(
                str(path), teachers, data["data"], args.collect, sampling_of(args), args.seed),
                ("collect", *SAMPLING), inputs, partial_results=[path])
    collection = read_collection(path, data["data"], load_processor(start), args)
    for many, why in ((collection.unfinished, "responses are empty or were cut off by a token limit"),
                      (collection.overlong, f"responses have more than --max-new-tokens "
                       f"{args.max_new_tokens} tokens"),
                      (len(data["data"]) - len(collection.examples), "questions have no other response")):
        if many:
            print(f"{path}: {many} {why} and are left out")
    data["data"] = collection.examples
    args.collection = str(path)
    return collection


def new_discriminator(policy: VLM, args) -> Discriminator:
    """D before any training; its head is drawn at random, the same for the same seed."""
    torch.manual_seed(args.seed)
    return Discriminator(policy)


def pretrained_discriminator(folder: Folder, args, data: dict, collection: Collection | None,
                             start: str) -> Path | None:
    """D pre-trained for this student by Eq. 1, on fresh responses of the student and the collected ones."""
    if collection is None:
        return None

    def make(path):
        policy = load_student(start, args)
        D = new_discriminator(policy, args)
        # as many responses as in the loop
        questions = max(1, args.batch_size * args.num_samples // args.collect)
        pairs = pretraining_pairs(policy, data["data"], collection, args.collect, questions,
                                  sampling_of(args), random.Random(args.seed),
                                  args.rollout_batch * args.num_samples)
        optimizer = AdamW(D, args.pretrain_lr, offload=args.offload)
        eq1.pretrain(D, optimizer, pairs, args.discriminator_steps, args.pretrain_lr, args.token_budget)
        # with its optimizer: a new one's first steps are as long as its rate allows, whatever they follow
        tensors = {f"D {name}": weight for name, weight in D.state_dict().items()}
        tensors |= {f"optimizer {name}": moment for name, moment in optimizer.tensors().items()}
        save_file(tensors, f"{path}.unfinished")
        Path(f"{path}.unfinished").rename(path)
    inputs = {"--data": digest(args.data), "the collection": digest(args.collection),
              "the student": digest(start)}
    with folder.clock.phase("discriminator"):
        return folder.stage("discriminator.safetensors", make, D_OPTIONS, inputs)


def trained_student(folder: Folder, args, world: World, data: dict, collection: Collection | None,
                    pretrained: Path | None, start: str, judge) -> Path:
    """The loop, and the student that comes out of it, a checkpoint like the one it began as."""
    def make(path):
        policy, D, tensors = load_student(start, args), None, {}
        if pretrained:
            D, tensors = new_discriminator(policy, args), load_file(pretrained)
            D.load_state_dict(named(tensors, "D "))
        if path.exists() and not checkpoints(folder.out):
            raise UserError(f"{path} cannot be trained further, as its last checkpoint is gone; choose "
                            f"another --out")
        run = Run(args, world, folder.out, policy, data["data"], D)
        if D:
            run.d_optimizer.load(named(tensors, "optimizer "))
        ril(run, collection, judge(), data.get("eval_data", []))
        folder.clock.peak_gb = max(folder.clock.peak_gb, run.meter.peak_gb)
        save_student(run, start, path)
        if world.rank == 0:
            for old in checkpoints(folder.out)[:-1]:      # the last one is for a run that is given more steps
                shutil.rmtree(old)
    inputs = {"--data": digest(args.data), "the student": digest(start), "--judge": judge_name(args.judge)}
    if pretrained:
        inputs |= {"the collection": digest(args.collection), "the discriminator": digest(pretrained)}
    begin = time.perf_counter()
    path = folder.stage("student", make, LOOP_OPTIONS, inputs, upto=args.steps,
                        partial_results=[folder.out / "student", *checkpoints(folder.out)], donate=False,
                        everyone=True)
    folder.clock.seconds["loop"] = time.perf_counter() - begin
    return path


def named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins so, by the rest of their name."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def judge_name(judge: str) -> str:
    """What a judge is called in records: of a server, the model alone, as its address may change."""
    endpoint = endpoint_of(judge)
    return endpoint.model if endpoint else judge


def save_student(run: Run, start: str, path: Path):
    """Save the trained policy in the place of what is there."""
    weights = run.world.weights(run.policy.model)
    if run.world.rank:
        return
    plain = run.policy
    if run.world.size > 1:                                # fully_shard has changed the classes of its modules
        plain = load_vlm(start, run.args.device, run.args.dtype)
        for name, weight in plain.model.named_parameters():
            weight.data.copy_(weights[name])
    shutil.rmtree(path, ignore_errors=True)
    save_vlm(plain, str(path))


def report(folder: Folder, args, data: dict, judge, start: str):
    """Held-out scores before and after; curves.png and report.html of the run."""
    results, out, held_out = {}, folder.out, data.get("eval_data", [])
    for name, checkpoint in (("before", start), ("after", str(out / "student"))):
        def make(path):
            vlm = load_vlm(checkpoint, args.device, args.dtype)
            texts = [predict(vlm, task, args.max_new_tokens, args.rollout_batch) for task in held_out]
            write_atomic(path, json.dumps(evaluate(held_out, texts, judge()), ensure_ascii=False))
        if held_out:
            inputs = {"the model": digest(checkpoint), "--eval-data": digest(args.eval_data),
                      "--judge": judge_name(args.judge)}
            saved = folder.stage(f"evaluation-{name}.json", make, ("max_new_tokens",), inputs, again=True)
            results[name] = read_json(saved)["tasks"]
    metrics = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    draw_curves(metrics, str(out / "curves.png"))
    write_report(out, vars(args), results, [row for _, row in read_jsonl(out / "rollouts.jsonl")])
    if results:
        print(results_table(results))
    print(f"The trained student is {out / 'student'}; open {out / 'report.html'}")
    stages = "; ".join(f"{name} {seconds:.0f} s" for name, seconds in folder.clock.seconds.items())
    print(f"{stages}; peak memory {folder.clock.peak_gb:.2f} GB")


# ---------------------------------------------------------------------------------------------- command line


# Defaults, in one place. A named student gets the paper's; the toy gets what a tiny model needs to learn in
# minutes.
PAPER = dict(sft_steps=0, sft_lr=1e-5, sft_batch_size=64, collect=16, discriminator_steps=1111,
             pretrain_lr=1e-5, num_samples=4, mu=1, eps=0.2, beta=0.01, steps=1000, batch_size=144,
             token_budget=8192, lr=1e-6, warmup=0, discriminator_lr=1e-6, rollout_batch=16,
             max_new_tokens=256, eval_every=100, log_every=10, teacher_steps=0, save_every="15m",
             push_teachers_down=True, reward_weights={})
TOY = PAPER | dict(sft_steps=600, sft_lr=1e-3, sft_batch_size=32, collect=8, discriminator_steps=60,
                   pretrain_lr=1e-3, beta=0.15, steps=100, batch_size=64, token_budget=16384, lr=3e-4,
                   warmup=20, rollout_batch=64, discriminator_lr=5e-5, max_new_tokens=24, eval_every=20,
                   log_every=10, teacher_steps=500, save_every="20", push_teachers_down=False,
                   reward_weights={"similarity": 0.3})


def add_run_options(parser):
    """What goes in and where it comes out, and the stages before the loop."""
    group = parser.add_argument_group("models and data")
    group.add_argument("--student", default="toy", help="checkpoint folder or hub id, or toy: a tiny one, "
                       "from scratch")
    group.add_argument("--teachers", nargs="+", default=[], help="fill the collection: checkpoint folders, "
                       "hub ids, or model@http://server/v1 of an OpenAI-compatible server")
    group.add_argument("--collection", help="JSONL of responses made elsewhere, instead of teachers")
    group.add_argument("--judge", default="rule", help="who decides what is right: rule (short answers are "
                       "parsed), a checkpoint, or model@url")
    group.add_argument("--data", help="questions to train on, JSONL or JSON; default, for the toy student: "
                       "the toy world")
    group.add_argument("--sft-data", help="examples to fine-tune on first; default, for the toy student: "
                       "--data")
    group.add_argument("--eval-data", help="held-out questions, or a benchmark as eval.py takes it")
    group.add_argument("--skip-bad", action="store_true",
                       help="leave out examples whose image cannot be read, and those that a model cannot "
                       "be asked")
    group.add_argument("--out", default="runs/toy", help="folder of the run; finished stages in it are not "
                       "done again")
    group.add_argument("--from", dest="from_run", metavar="RUN", help="folder of another run: its stages "
                       "that would come out the same here are taken over")

    group = parser.add_argument_group("before the loop")
    group.add_argument("--sft-steps", type=int, help="steps of SFT; 0 for a student that has had it")
    group.add_argument("--sft-lr", type=float, help="learning rate of SFT, decays linearly to a tenth")
    group.add_argument("--sft-batch-size", type=int, help="examples per step of SFT")
    group.add_argument("--teacher-steps", type=int, help="steps of SFT of each teacher of the toy world")
    group.add_argument("--collect", type=int, help="responses of each teacher to each question in the "
                       "collection; also N, responses of each side per question, in discriminator "
                       "pre-training")
    group.add_argument("--discriminator-steps", type=int, help="steps of discriminator pre-training")
    group.add_argument("--pretrain-lr", type=float, help="learning rate of that, decays linearly to a tenth")


def add_loop_options(parser):
    """The loop: what is computed."""
    group = parser.add_argument_group("algorithm")
    group.add_argument("--algorithm", choices=["ril", "rl"], default="ril", help="rl: Algorithm 1, no "
                       "teachers and no D")
    group.add_argument("--loss", choices=list(LOSSES), default="dr_grpo", help="grpo divides by std and by "
                       "length")
    group.add_argument("--similarity", choices=list(SIMILARITIES), default="binary",
                       help="how finely the similarity reward is graded")
    group.add_argument("--reward-weights", nargs="+", type=reward_weight, metavar="NAME=WEIGHT",
                       help="weights of the rewards; answer=0: the judge is heard, but not rewarded")
    group.add_argument("--freeze-discriminator", action="store_true", help="skip lines 7-9: D stays as "
                       "pre-trained")
    group.add_argument("--no-teacher-rollouts", action="store_true", help="teachers' responses train D, not "
                       "the policy")
    group.add_argument("--push-teachers-down", action=argparse.BooleanOptionalAction, help="also follow "
                       "negative advantages of teachers' responses, as the paper does; where the student "
                       "hardly says such things, that has no bound, and breaks a small one's language")
    group.add_argument("--num-samples", type=int, help="G, responses of the student, and as many of "
                       "teachers, a question")
    group.add_argument("--mu", type=int, help="updates of D and of the policy per step")
    group.add_argument("--beta", type=float, help="weight of the KL to the reference")
    group.add_argument("--eps", type=float, help="the ratio is clipped to 1 - eps .. 1 + eps")
    group.add_argument("--freeze", metavar="REGEX", help="parts of the student that are not trained in the "
                       "loop, by weight name: 'visual' the vision tower, 'lm_head' the vocabulary head, "
                       "'self_attn', 'embed_tokens', 'mlp.gate|mlp.up|mlp.down', 'norm' (the paper's Table "
                       "5c)")
    group.add_argument("--steps", type=int, help="steps of the loop; a finished run can be given more")
    group.add_argument("--batch-size", type=int, help="questions per step")
    group.add_argument("--lr", type=float, help="learning rate of the student")
    group.add_argument("--warmup", type=int, help="steps in which the student's learning rate rises from "
                       "nothing")
    group.add_argument("--discriminator-lr", type=float, help="learning rate of D")
    group.add_argument("--seed", type=int, default=0)


def add_machine_options(parser):
    """How it is computed: nothing here changes what comes out, but for --dtype and rounding."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, "
                       "float32 on the CPU")
    group.add_argument("--token-budget", type=int, help="tokens per micro-batch, of prompts and responses; "
                       "fewer need less memory, and the gradient is the same")
    group.add_argument("--rollout-batch", type=int, help="so many questions' responses are sampled at a "
                       "time; fewer need less memory, and the responses are the same")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute layers twice, keep "
                       "only their inputs")
    group.add_argument("--offload", action="store_true", help="optimizer states live and work on the CPU; D "
                       "and the reference wait there")
    group.add_argument("--eval-every", type=int, help="steps between held-out accuracies")
    group.add_argument("--log-every", type=int, help="steps between printed samples")
    group.add_argument("--save-every", help="steps between checkpoints of the loop, or minutes as 15m")


def reward_weight(text: str) -> tuple[str, float]:
    """NAME=WEIGHT, as a pair."""
    name, _, weight = text.partition("=")
    if name not in REWARD_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=WEIGHT, with one of "
                                         f"{', '.join(REWARD_WEIGHTS)}")
    try:
        return name, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {weight!r} is no number") from error


def make_parser(student: str) -> argparse.ArgumentParser:
    """The options, with the defaults of this student. Where help names no default, PAPER and TOY have it."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for add in (add_run_options, add_loop_options, add_machine_options, add_sampling_options):
        add(parser)
    parser.set_defaults(**(TOY if student == "toy" else PAPER))
    return parser


def parse_args(argv=None):
    """The command line, checked as far as it can be without reading a file."""
    parser = make_parser(make_parser("toy").parse_known_args(argv)[0].student)
    args = parser.parse_args(argv)
    for name in ("num_samples", "mu", "batch_size", "token_budget", "collect", "max_new_tokens", "eval_every",
                 "log_every", "rollout_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not re.fullmatch("[1-9][0-9]*m?", args.save_every):
        parser.error(f"--save-every {args.save_every}: expected a number of steps, or of minutes as 15m")
    try:
        re.compile(args.freeze or "")
    except re.error as error:
        parser.error(f"--freeze {args.freeze} is not a regular expression ({error})")
    usual = (TOY if args.student == "toy" else PAPER)["reward_weights"]
    args.reward_weights = REWARD_WEIGHTS | usual | dict(args.reward_weights)
    terms = set(REWARD_WEIGHTS) - ({"similarity"} if args.algorithm == "rl" else set())
    if not any(args.reward_weights[name] for name in terms):
        parser.error("--reward-weights leaves no reward")
    if args.student != "toy" and not args.data:
        parser.error("--data is needed for a named student")
    if args.collection and not args.data:
        parser.error("--collection needs the --data that it answers")
    if args.data and args.algorithm == "ril" and not (args.teachers or args.collection):
        parser.error("RIL needs --teachers or a --collection of their responses (or --algorithm rl)")
    if args.sft_steps and args.student != "toy" and not args.sft_data:
        parser.error("--sft-steps needs --sft-data")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and (args.offload or args.batch_size < ranks):
        parser.error(f"{ranks} processes want a --batch-size of at least {ranks}, and no --offload")
    return args


if __name__ == "__main__":
    run_main(main)
