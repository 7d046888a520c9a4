"""RIL: reinforcement and imitation learning in one loop, for small vision-language models (arXiv 2510.19307).

A student answers a question G times, and G more responses come from large teachers. A response earns one
point if it reads like a teacher's (discriminator.py) and one if it is right (the judge, eval.py). Dr.GRPO
then moves the student towards every response that did better than the average of all 2G, including the
teachers'. So the student learns to speak like its teachers, and a question that it always gets wrong still
has right responses to learn from. The result is a plain checkpoint.

Algorithm 2 of the paper. Lines 1 and 2 make a `Run`; the others stand by their numbers in `ril`, `ril_step`
and `update_policy` below:

     1  ref <- init    2  policy <- init    3  for each batch of questions (mu = 1, G = 4)
     4    old <- policy                     5    sample G student outputs per question from old
     6    take G teacher outputs per question from the saved collection
     7-9  mu times: update D by Eq. 1 on these 2G
    10    rewards and advantages for all 2G outputs, by the just-updated D and the judge
    11-13 mu times: update policy by Eq. 2

How this differs from the paper: `old` is never a third network. Only its log-probs are needed, and these are
the policy's own before the step's first update. The ratio and the KL are per token and summed over a
response, as in Dr.GRPO. A response on which the judge fails leaves its group, as the paper does not say what
happens then. D keeps the optimizer of its pre-training. The toy student samples from its full distribution in
the loop. The paper gives no formula for its choice of training data; ours is `select` in teachers.py.

Notation, here and in every file: B questions, b of them in a micro-batch, G samples per side, K responses
per question (in RIL K = 2G, the student's first, then the teachers'), P prompt tokens, R response tokens, L
tokens in a row, T tokens in all rows, V vocabulary size, d width, X axes of positions. N counts what its
comment says.

    python train.py                                    all of it on a toy world, minutes on a laptop
    python train.py --algorithm rl --out runs/rl       Algorithm 1: the judge's reward alone, no teachers
    python train.py --student DIR --data train.jsonl --teachers DIR DIR --out runs/mine
    torchrun --nproc-per-node 8 train.py --student DIR --data train.jsonl --teachers DIR DIR --out runs/mine
"""
import argparse
import copy
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Iterable, Iterator, NamedTuple

# Before torch is imported: waiting threads sleep. Spinning ones slow a busy machine down threefold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from discriminator import (AFTER, BEFORE, SIMILARITIES, SYSTEM, Discriminator, around_response,
                           pretrain_discriminator, update_discriminator)
from eval import (Task, check_judge, draw_curves, greedy_sampling, make_judge, predict, results_table,
                  rule_check, score_responses, task_of, write_report)
from model import (VLM, Outputs, UserError, World, all_or_nothing, check_scoring, checkpoint_layers, concat,
                   encode_responses, gathered, generate, image_tokens, load_processor, load_vlm,
                   local, micro_batches, naming, pick_device, pick_dtype, read_vlm, remove, row_sizes,
                   run_main, save_vlm, score, stamp, without_thoughts, write_atomic)
from teachers import (Collection, Example, ToySplit, add_sampling_options, build_tiny_vlm, draw_toy_world,
                      encode_examples, endpoint_of, fill_collection, load_examples, make_teacher,
                      prompt_checks, read_json, read_jsonl, sampling_of)

# ------------------------------------------------------------------------------------------ the maths


@dataclass
class Group:
    """B questions with K = 2G responses each, the student's first, and everything a reward may use."""
    batch: list[Example]
    outputs: Outputs                   # text: B lists of K strings; ids and mask: (B, K, R)
    sources: list[list[str]]           # "student", or the name of a teacher
    p_student: Tensor | None           # (B, K); Algorithm 1 has none
    verdicts: Tensor                   # (B, K): 1 right, 0 wrong, NaN where the judge failed


# Weights of the reward terms below; --reward-weights changes them.
REWARD_WEIGHTS = {"similarity": 1.0, "answer": 1.0}


def reward_terms(group: Group, args) -> dict[str, Tensor]:
    """The terms of R(q, o) = 1[D(o) < 0.5] + judge(q, truth, o) by name, each (B, K).

    To add a reward, add an entry here and its weight to REWARD_WEIGHTS. It is then logged, printed and drawn
    under its name. NaN means that a response has no such reward: it leaves its group, unless the weight is 0.
    """
    terms = {}
    if group.p_student is not None:
        terms["similarity"] = SIMILARITIES[args.similarity](group.p_student)
    terms["answer"] = group.verdicts
    return terms


def total_reward(terms: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms, (B, K), and where it exists, (B, K) bool.

    A term of weight 0 is only logged. Where any other term is NaN (a failed judge), there is no reward: the 0
    returned in its place is masked out by the second tensor.
    """
    counted = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
    reward = torch.stack(counted).sum(0)
    return reward.nan_to_num(0.0), ~reward.isnan()


@dataclass(frozen=True)
class LossForm:
    """How GRPO and Dr.GRPO differ; read by advantages, importance_ratio and policy_loss. To add a loss, add
    an entry to LOSSES, and a field here if it needs one."""
    divide_by_std: bool                # advantages are divided by the standard deviation of their group
    mean_over_tokens: bool             # the gain of a response is divided by its length


LOSSES = {"dr_grpo": LossForm(divide_by_std=False, mean_over_tokens=False),
          "grpo": LossForm(divide_by_std=True, mean_over_tokens=True)}


def advantages(reward: Tensor, valid: Tensor, form: LossForm) -> Tensor:
    """A_i = R_i - mean_j R_j over the valid responses of a question: (B, K), zero where not valid.

    Dr.GRPO stops there. GRPO also divides by the group's standard deviation, which blows up when all rewards
    are nearly equal.
    """
    count = valid.sum(1, keepdim=True).clamp(min=1)
    centred = (reward - (reward * valid).sum(1, keepdim=True) / count) * valid
    if form.divide_by_std:
        std = (centred.square().sum(1, keepdim=True) / count).sqrt()
        centred = centred / (std + 1e-4)
    return centred


def importance_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, form: LossForm) -> Tensor:
    """pi_theta / pi_old of every token, (B, K, R), for Eq. 2 and for the metric clip_fraction.

    mask and form are for forks: GSPO has one ratio for a whole response.
    """
    return (logp - old_logp).exp()


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per token: q - 1 - log q with q = ref / policy. Never negative."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor, mask: Tensor,
                valid: Tensor, is_student: Tensor, eps: float, beta: float, form: LossForm) -> Tensor:
    """Eq. 2, negated and summed over questions, so that micro-batches add up -> scalar.

        (1/2G) sum_i  sum_t [ min(ratio_t A_i, clip(ratio_t, 1 - eps, 1 + eps) A_i) - beta KL_t ]

    logp, old_logp, ref_logp, mask (which includes the stop token): (B, K, R). advantage, valid: (B, K).
    is_student (B, K): not from a teacher, for forks that treat these differently. Dr.GRPO sums over tokens.
    GRPO takes their mean, which makes each token of a long wrong answer cheaper.
    """
    ratio = importance_ratio(logp, old_logp, mask, form)
    A = advantage[..., None]                                                          # (B, K, 1)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - eps, 1 + eps) * A)                # (B, K, R)
    gain = gain - beta * k3_kl(logp, ref_logp)
    gain = (gain * mask).sum(-1)                                                      # (B, K)
    if form.mean_over_tokens:
        gain = gain / mask.sum(-1).clamp(min=1)
    size = valid.sum(1, keepdim=True).clamp(min=1)              # valid responses: 2G, less judge failures
    return -(gain * valid / size).sum()


# ------------------------------------------------------------------------------------------ Algorithm 2


# `run` is everything that the loop changes (class Run, below):
#   run.policy, run.reference  VLMs (model.py); the reference is the first policy, None if beta is 0
#   run.D, run.d_optimizer     the discriminator, None in Algorithm 1; run.optimizer is the policy's
#   run.score(vlm, prompts, outputs, part)      log-probs of some of the questions, see `score` in model.py
#   run.sampler(), run.using(m)                 contexts: the policy can sample; m is on the device
#   run.unheard                whether the last step had no verdict at all, as when the judge is down
#   run.steps(), run.batches   the numbers of the steps, and lists of questions; run.rng: a random.Random
#   run.optimizer.step()       sums the gradients over processes, clips, steps, and frees them
#   run.world                  the processes (one, unless torchrun starts more). mine(x): this one's share;
#                              all_reduce(x): the sum over all; rank_0(f): f in the first, its result in all;
#                              even(parts): equally many pairs (part, weight) in each, as sharded weights need
#                              all processes in every forward pass; a filler repeats a question with weight 0


def update_policy(run, prompts: list, outputs: Outputs, advantage: Tensor, valid: Tensor,
                  is_student: Tensor, num_questions: int) -> dict[str, float]:
    """Lines 11-13: mu updates of the policy by Eq. 2, each summed over micro-batches of questions.

    prompts: B; outputs: (B, K, R); advantage, valid, is_student: (B, K); num_questions: B summed over all
    processes. Returns loss, kl, clip_fraction and grad_norm.
    """
    args, policy, reference, form = run.args, run.policy, run.reference, LOSSES[run.args.loss]
    # a part: the indices of questions that have up to token_budget tokens
    parts = run.world.even(micro_batches(row_sizes(policy.packs, prompts, outputs.mask), args.token_budget))
    old_logps, ref_logps, norms, stats = {}, {}, [], defaultdict(float)

    if reference:                                                                     # unless beta is 0
        with run.using(reference.model), torch.no_grad():
            for i, (part, _) in enumerate(parts):
                ref_logps[i] = run.score(reference, prompts, outputs, part)           # (b, K, R)

    for update in range(args.mu):                                                     # line 11
        for i, (part, weight) in enumerate(parts):
            logp = run.score(policy, prompts, outputs, part)                          # (b, K, R)
            # pi_old is the policy before this step's first update, also for teachers' responses: no teacher's
            # log-prob is needed. In the first update the ratio is 1, and its gradient that of logp.
            if update == 0:
                old_logps[i] = logp.detach()                                          # line 4
            old_logp, mask = old_logps[i], outputs.mask[part]
            ref_logp = ref_logps[i] if reference else old_logp     # with beta 0, KL to old is logged
            loss = weight / num_questions * policy_loss(
                logp, old_logp, ref_logp, advantage[part], mask, valid[part], is_student[part], args.eps,
                args.beta, form)
            loss.backward()
            stats["loss"] += loss.detach()
            # The loss has the KL on all valid responses, as in Eq. 2. The metric averages it over all of the
            # student's own, because k3 estimates a KL only on samples of the policy.
            sampled = mask & is_student[part][..., None]                              # (b, K, R)
            stats["kl"] += weight * k3_kl(logp.detach(), ref_logp)[sampled].sum()
            stats["sampled"] += weight * sampled.sum()
            stats["tokens"] += weight * mask.sum()
            clipped = (importance_ratio(logp.detach(), old_logp, mask, form) - 1).abs() > args.eps
            stats["clip_fraction"] += weight * clipped[mask].sum()
        norms.append(run.optimizer.step(max_norm=1.0))                                # line 12

    sums = {name: run.world.all_reduce(total).item() / args.mu for name, total in stats.items()}
    return {"loss": sums["loss"], "kl": sums["kl"] / sums["sampled"],
            "clip_fraction": sums["clip_fraction"] / sums["tokens"],
            "grad_norm": torch.stack(norms).mean().item()}


def ask_judge(judge, batch: list[Example], outputs: Outputs):
    """Ask a judge about B questions with K responses each. Returns a function that returns the verdicts.

    A remote judge works in a thread in the meantime; any other starts when that function is called. Verdicts
    are (B, K) float32: 1 right, 0 wrong, in between if the judge grades, NaN if it failed.
    """
    triples = [(e.dialogue, e.truth, without_thoughts(text))
               for e, texts in zip(batch, outputs.text) for text in texts]
    answer = partial(judge, triples)
    if getattr(judge, "remote", False):
        answer = ThreadPoolExecutor(1).submit(answer).result

    def wait() -> Tensor:
        verdicts = [float("nan") if verdict is None else float(verdict) for verdict in answer()]
        return torch.tensor(verdicts, device=outputs.ids.device).view(outputs.mask.shape[:2])
    return wait


def ril_step(run, questions: list[Example], collection: Collection | None, judge) -> tuple[dict, list]:
    """Lines 4 to 13 for one batch of questions. Returns a row of metrics, and rows of rollouts.

    All processes draw the same questions, and each works on its own share of B.
    """
    args, policy, D, G = run.args, run.policy, run.D, run.args.num_samples
    batch = run.world.mine(questions)                                                 # B questions

    with run.phase("generate"), run.sampler() as sampler:
        prompts = encode_examples(sampler, batch)
        sampling = replace(sampling_of(args), truncated=args.truncate_rollouts)
        noise = drawn_noise(run.world, questions, G, args.max_new_tokens, policy.device)
        outputs = generate(sampler, prompts, G, sampling, noise=noise,
                           slots=args.rollout_batch * G)                              # line 5   (B, G, R)
    row = {"tail": tail_per_token(run.world, outputs)}
    sources = [["student"] * G for _ in batch]
    if D:
        drawn = run.world.mine(collection.draw(questions, G, run.rng))                # line 6   B lists of G
        taught = encode_responses(policy, [[text for _, text in pairs] for pairs in drawn])
        outputs = concat([outputs, taught])                                           # (B, 2G, R)
        sources = [["student"] * G + [teacher for teacher, _ in pairs] for pairs in drawn]
    B, K, _ = outputs.ids.shape
    is_student = torch.arange(K, device=policy.device).expand(B, K) < G
    verdicts_of = ask_judge(judge, batch, outputs)     # for line 10; a remote judge works while D learns

    p_student = None
    if D:
        with run.phase("discriminator"), run.using(D):
            responses = D.encode([example.text for example in batch], outputs.text)   # questions: for forks
            # after a step without any verdict, D waits: the policy stood still, and could not follow it
            learns = not args.freeze_discriminator and not run.unheard
            for update in range(args.mu if learns else 0):                            # line 7
                d_stats = update_discriminator(D, run.d_optimizer, responses, is_student,
                                               args.token_budget, len(questions))     # line 8   Eq. 1
                if update == 0:
                    row |= d_stats                     # measured before the step's updates
            p_student = D.p_student(responses, args.token_budget, run.world)          # line 10, by the new D
    with run.phase("judge"):
        verdicts = verdicts_of()                                                      # line 10  (B, 2G)
    group = Group(batch, outputs, sources, p_student, verdicts)

    terms = reward_terms(group, args)                                                 # line 10
    reward, valid = total_reward(terms, args.reward_weights)                          # (B, 2G)
    if not args.teacher_rollouts:                      # an ablation: D alone sees the teachers
        valid = valid & is_student
    advantage = advantages(reward, valid, LOSSES[args.loss])                          # line 10  (B, 2G)

    with run.phase("update"):
        row |= update_policy(run, prompts, outputs, advantage, valid, is_student, len(questions))   # 11-13
    return row, rollouts_of(run.step, group, terms, reward, valid, advantage)


def ril(run, collection: Collection | None, judge, held_out: Task | None):
    """Algorithm 2; without a collection and a D, Algorithm 1. Trains run.policy."""
    for step in run.steps():                           # resumes, saves, warns and stops
        questions = next(run.batches)                                                 # line 3
        row, rollouts = ril_step(run, questions, collection, judge)
        greedy = []
        if held_out and (step == 0 or (step + 1) % run.args.eval_every == 0):
            accuracy, greedy = held_out_accuracy(run, held_out, judge)
            row |= accuracy
        run.log(row, rollouts, greedy)


def main():
    """The stages of a run. Each leaves its result in --out, and is skipped if that exists already."""
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    if args.student == "toy":
        torch.set_num_threads(1)                       # its steps are too short to split
    world = World.from_torchrun(pick_device(args.device))         # all processes do each stage together
    folder = RunFolder(args, world)
    data = world.rank_0(partial(check_inputs, args, folder))
    folder.record = world.rank_0(partial(folder.open, data))
    teachers = toy_world_and_teachers(folder, args, data)
    start = fine_tuned_student(folder, args, data)                                    # SFT; a path
    collection = teachers_responses(folder, args, teachers, data, start)
    pretrained = pretrained_discriminator(folder, args, data, collection, start)      # Eq. 1
    verdicts = folder.out / f"verdicts{world.rank or ''}.jsonl"
    get_judge = cache(partial(make_judge, args.judge, verdicts, args.device, args.dtype))  # loaded on use
    trained_student(folder, args, data, collection, pretrained, start, get_judge)     # Algorithm 2
    report(folder, args, data, get_judge, start)
    world.close()


# ==========================================================================================
#
#   MACHINERY: skip on first reading. All of RIL is above. The rest makes it run for days, on
#   many GPUs, in little memory, and from one command line.
#
# ==========================================================================================


class Batches:
    """Endless batches of `size` examples. Every example comes once before any comes again. `pool` holds those
    that are next in line."""

    def __init__(self, examples: list[Example], size: int, rng: random.Random):
        self.examples, self.size, self.rng, self.pool = examples, size, rng, []

    def __next__(self) -> list[Example]:
        while len(self.pool) < self.size:
            self.pool += self.rng.sample(self.examples, len(self.examples))
        batch, self.pool = self.pool[:self.size], self.pool[self.size:]
        return batch

    def state(self) -> dict:
        """What a checkpoint must hold to resume, as JSON."""
        return {"pool": [example.id for example in self.pool]}

    def load(self, state: dict):
        """Resume from what `state` returned."""
        by_id = {example.id: example for example in self.examples}
        self.pool = [by_id[name] for name in state["pool"]]


# ------------------------------------------------------------------------------------------ a run of the loop


FOLLOWED = 8                               # held-out questions whose greedy responses are logged
MOST_SKIPPED = 5                           # a run ends after this many steps in a row without any learning
LOGS = ("metrics", "timings", "rollouts", "greedy")        # timings are separate: they vary between runs


class Run:
    """Everything the loop changes, and what it needs besides the algorithm.

    networks, optimizers: what a checkpoint holds, by file. step: the number of steps done. kept: what a fork
    wants to remember, as JSON; every checkpoint has it. rng draws batches and teachers' responses, and
    torch's generators draw the rest. phase(name) measures seconds.
    """

    def __init__(self, args, world, out: Path, policy: VLM, examples: list[Example], D: Discriminator | None):
        torch.manual_seed(args.seed)
        self.args, self.world, self.out, self.policy, self.D = args, world, out, policy, D
        self.rng, self.meter = random.Random(args.seed), Meter(policy.device)
        self.phase = self.meter.phase
        self.step, self.kept = 0, {}
        self.skipped = 0                          # steps in a row, up to now, without any learning
        self.unheard = False                      # whether no response of the last step had a verdict
        self.logs, self.warned = {}, {}
        self.reference, self.networks, self.optimizers = None, {"policy": policy.model}, {}
        if D:
            world.shard(D, D.backbone, D.head, method="logits")
            self.d_optimizer = AdamW(D, args.discriminator_lr, offload=args.offload, world=world)
            self.networks["discriminator"], self.optimizers["d_optimizer"] = D, self.d_optimizer
        if args.beta:
            frozen_copy = copy.deepcopy(policy.model).requires_grad_(False)
            self.reference = replace(policy, model=frozen_copy)                              # line 1
        freeze(policy.model, args.freeze, args.student)                                      # line 2
        self.empty = world.without_weights(policy)
        for vlm in filter(None, (policy, self.reference)):
            world.shard(vlm.model, vlm.model.get_decoder())
        self.optimizer = AdamW(policy.model, args.lr, offload=args.offload, world=world)
        self.optimizers["optimizer"] = self.optimizer
        if args.offload:
            for waiting in filter(None, (D, self.reference and self.reference.model)):
                waiting.to("cpu")
        self.batches = Batches(examples, args.batch_size, self.rng)

    def saw(self, rollouts: list[list[dict]]):
        """A hook for forks, called after each step with the K rollouts of each question (see rollouts_of)."""

    def sampler(self):
        """A context in which this process holds all weights of the policy, as sampling requires."""
        return self.world.unsharded(self.policy, self.empty)

    def score(self, vlm: VLM, prompts: list, outputs: Outputs, part: list[int]) -> Tensor:
        """Log-probs (b, K, R) of a micro-batch at the sampling temperature, or at 1 if sampling is greedy."""
        prompts, temperature = [prompts[b] for b in part], self.args.temperature or 1.0
        return gathered(vlm.model, lambda: score(vlm, prompts, outputs[part], temperature))

    @contextmanager
    def using(self, module: torch.nn.Module):
        """A context in which the module is on the device. With --offload, it is on the CPU otherwise."""
        if self.args.offload:
            module.to(self.policy.device)
        yield
        if self.args.offload:
            module.to("cpu")

    def steps(self):
        """Yield the numbers of the remaining steps, resuming from the last checkpoint in --out.

        Between steps: save when due, stop on a signal, and end a run that cannot learn anything.
        """
        load_checkpoint(self)
        saved = time.monotonic()
        bar = tqdm(range(self.step, self.args.steps), self.args.algorithm.upper(), self.args.steps,
                   initial=self.step, unit="step")
        with signals() as caught:
            for step in bar:
                # while the student warms up, D adapts from its pre-training to the loop's samples
                self.optimizer.set_lr(self.args.lr * min(1, (step + 1) / max(1, self.args.warmup)))
                yield step
                self.step += 1
                if self.skipped == MOST_SKIPPED:
                    raise UserError(
                        f"nothing could be learned in {MOST_SKIPPED} steps in a row, so the run stops: in "
                        f"{self.out / 'metrics.jsonl'}, either `judge/failed` is 1, so mend the judge; or a "
                        f"gradient was not finite (`skipped_updates`): look at `loss`, `kl` and `d_loss`, "
                        f"and lower --lr or --discriminator-lr; the last checkpoint is kept")
                due = self.world.rank == 0 and self.is_due(saved)
                wishes = torch.tensor([len(caught), due], device=self.policy.device)
                stops, due = self.world.all_reduce(wishes).tolist()       # if any process asks, all comply
                if stops or due:
                    save_checkpoint(self)
                    saved = time.monotonic()
                if stops:
                    sys.exit(128 + (caught or [signal.SIGTERM])[0])

    def is_due(self, saved: float) -> bool:
        """Whether a checkpoint is due: after the last step, and every --save-every steps or minutes."""
        if self.step == self.args.steps:
            return True
        if self.args.save_every.endswith("m"):
            return time.monotonic() - saved > 60 * int(self.args.save_every.rstrip("m"))
        return self.step % int(self.args.save_every) == 0

    def log(self, row: dict, rollouts: list[list[dict]], greedy: list[dict]):
        """Complete the metrics from the rollouts of all processes; append to the logs, print, and warn."""
        rollouts = self.world.all_gather(rollouts)
        self.saw(rollouts)
        row = {"step": self.step} | row | step_metrics(rollouts, self.args.max_new_tokens)
        row["skipped_updates"] = 0
        for optimizer in self.optimizers.values():
            row["skipped_updates"] += optimizer.skipped
            optimizer.skipped = 0
        self.unheard = not any(response["valid"] for response in sum(rollouts, []))
        self.skipped = self.skipped + 1 if row["skipped_updates"] or self.unheard else 0
        timing = self.meter.row(self.step, row["length"] * len(rollouts) * self.args.num_samples)
        if self.world.rank:
            return
        last = self.step == self.args.steps - 1
        shown = rollouts[:4] if self.step % self.args.log_every == 0 or last else []
        for name, rows in zip(LOGS, ([row], [timing], sum(shown, []), greedy)):
            self.logs[name].write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self.logs[name].flush()                                # so that others can read it now
        print_step(row, timing, shown)
        self.recent.append(row)
        for warning in warnings(list(self.recent)):
            if self.step - self.warned.get(warning, -WINDOW) >= WINDOW:
                tqdm.write(f"warning: {warning}")
                self.warned[warning] = self.step


def drawn_noise(world: World, questions: list[Example], num: int, length: int, device) -> list[Tensor]:
    """Uniform numbers (num, length) that choose the tokens, for each of this process's questions. Every
    process draws them for all questions, so the number of processes changes nothing."""
    return world.mine([torch.rand(num, length, device=device) for _ in questions])


def tail_per_token(world: World, outputs: Outputs) -> float:
    """The mean tail of a token in the responses of all processes."""
    sums = torch.tensor([outputs.tail, outputs.mask.sum().item()], device=outputs.ids.device)
    tail, tokens = world.all_reduce(sums).tolist()
    return tail / tokens


def held_out_accuracy(run: Run, held_out: Task, judge) -> tuple[dict[str, float], list[dict]]:
    """The held-out accuracy, greedy and sampled, as metrics; and rows of greedy.jsonl: greedy responses to
    the first questions, with D's opinion of them. Each process answers its share, and rank 0 has them judged.
    A judge that is down does not end the run."""
    row, greedy, p_student = {}, [], []
    with run.sampler() as policy:
        texts, sampled = (predict(policy, held_out, sampling, run.args.rollout_batch, run.world)
                          for sampling in (greedy_sampling(run.args.max_new_tokens), sampling_of(run.args)))
    if run.D:
        followed = [e.text for e in held_out.examples[:FOLLOWED]]
        with run.using(run.D):
            responses = run.D.encode(followed, [[text] for text in texts[:FOLLOWED]])
            p_student = run.D.p_student(responses, run.args.token_budget, run.world)[:, 0].tolist()
    if run.world.rank == 0:
        try:
            result = score_responses(held_out, texts, judge)
            row["heldout_accuracy"] = result["score"] / 100
            row["heldout_sampled"] = score_responses(held_out, sampled, judge)["score"] / 100
            greedy = [about | {"step": run.step, "p_student": p}
                      for about, p in zip_longest(result["rows"][:FOLLOWED], p_student)]
        except UserError as error:
            tqdm.write(str(error))
    run.world.barrier()                                # which may take hours, if the judge is slow
    return row, greedy


# --------------------------------------------------------------------------------------- rollouts and metrics


def rollouts_of(step: int, group: Group, terms: dict[str, Tensor], reward: Tensor, valid: Tensor,
                advantage: Tensor) -> list[list[dict]]:
    """Everything known about the K responses to each of B questions: B lists of K rows of rollouts.jsonl.

    reward, valid (whether a response is in its group), advantage and each term: (B, K). NaN becomes None.
    """
    def as_lists(x):                                   # six decimal places are all that a float32 has
        x = x.cpu().double().round(decimals=6) if x.is_floating_point() else x
        return [[None if value != value else value for value in row] for row in x.tolist()]
    p_student = torch.full_like(reward, float("nan")) if group.p_student is None else group.p_student
    numbers = {"p_student": p_student, "verdict": group.verdicts, "length": group.outputs.mask.sum(2),
               "valid": valid, "reward": reward, "advantage": advantage}
    numbers = {name: as_lists(x) for name, x in numbers.items()}
    rewards = {name: as_lists(x) for name, x in terms.items()}
    rollouts = []
    for b, e in enumerate(group.batch):
        about = {"step": step, "id": e.id, "image": list(e.images), "question": e.text, "truth": e.truth}
        rollouts.append([about | {"source": group.sources[b][k], "text": text}
                         | {name: x[b][k] for name, x in numbers.items()}
                         | {"rewards": {name: x[b][k] for name, x in rewards.items()}}
                         for k, text in enumerate(group.outputs.text[b])])
    return rollouts


def mean(values) -> float | None:
    """The mean of the values that are not None; None if all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def step_metrics(rollouts: list[list[dict]], longest: int) -> dict[str, float | None]:
    """The metrics of one step that follow from its rollouts; see the README. longest: --max-new-tokens."""
    rows, metrics = sum(rollouts, []), {}
    own = [row for row in rows if row["source"] == "student"]

    def share_of_equal(value):                         # of questions whose valid responses all have one value
        return mean(len({value(row) for row in group if row["valid"]}) < 2 for group in rollouts)
    for name in rows[0]["rewards"]:
        for source in sorted({row["source"] for row in rows}):
            chosen = (row["rewards"][name] for row in rows if row["source"] == source)
            metrics[f"reward/{name}/{source}"] = mean(chosen)
        metrics[f"flat/{name}"] = share_of_equal(lambda row: row["rewards"][name])
    return metrics | {
        "judge/failed": mean(row["verdict"] is None for row in rows),
        "flat/total": share_of_equal(lambda row: row["reward"]),
        "length": mean(row["length"] for row in own),
        "cut_off": mean(row["length"] == longest for row in own),
        "repeated": Counter(row["text"] for row in own).most_common(1)[0][1] / len(own)}


def print_step(row: dict, timing: dict, shown: list[list[dict]]):
    """Print one line, with the student's rewards, and four of the responses to the first question."""
    seconds = sum(value for name, value in timing.items() if name.startswith("seconds/"))
    cells = [("reward/(.+)/student", "{} {:5.2f}"), ("d_accuracy", "D acc {:5.2f}"), ("kl", "KL {:7.4f}"),
             ("grad_norm", "|g| {:6.2f}"), ("tail", "tail {:4.2f}"), ("length", "tokens {:5.1f}"),
             ("seconds", "{:5.2f} s"),
             ("heldout_accuracy", "held-out {:.3f}"), ("heldout_sampled", "sampled {:.3f}")]
    line = [f"step {row['step'] + 1:5}"]
    for pattern, form in cells:
        for name, value in (row | {"seconds": seconds}).items():
            if (found := re.fullmatch(pattern, name)) and value is not None:
                line.append(form.format(*found.groups(), value))
    tqdm.write("  ".join(line))
    if not shown:
        return
    for r in shown[0][::max(1, len(shown[0]) // 4)]:
        tqdm.write(f"    {r['question'][:36]:36} {r['source'][:12]:12} reward {r['reward']:.2f}  "
                   f"{r['text'][:60]}")


WINDOW = 50                                       # steps that `warnings` looks back


def warnings(rows: list[dict]) -> list[str]:
    """Sentences that warn of trouble in the metrics of the last steps (up to WINDOW), naming the metric."""
    def last(name, steps):
        return mean(row.get(name) for row in rows[-steps:]) or 0
    table = [
        (len(rows) >= 10 and last("kl", 5) > 5,
         "`kl` is above 5: the student is leaving the reference, and may soon lose its language; lower --lr"),
        (len(rows) == WINDOW and last("d_accuracy", WINDOW) > 0.98,
         "`d_accuracy` is near 1: D always recognises the student, so `reward/similarity/` is 0; lower "
         "--discriminator-lr, or first fine-tune the student on answers in the teachers' style"),
        (last("skipped_updates", 1) > 0,
         "`skipped_updates`: a gradient was not finite, so it was not applied; lower --lr if this continues")]
    return [sentence for is_so, sentence in table if is_so]


# ---------------------------------------------------------------------------------------- signals and meters


@contextmanager
def signals():
    """Yields a list that receives the first SIGINT or SIGTERM, so that the step can finish. A second one
    kills the process."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        tqdm.write("finishing this step and saving; send the signal again to quit at once")
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """Measures the seconds of each phase since the last row and, on CUDA, the peak of allocated memory."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def phase(self, name: str):
        """Measure the seconds spent inside. Phases do not nest."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)           # or only the queueing of the work would be measured
        self.seconds[name] += time.perf_counter() - start

    def row(self, step: int, tokens: int) -> dict[str, float]:
        """The measurements as a row of timings.jsonl; resets them. tokens: the number of sampled tokens."""
        row = {"step": step, "tokens_per_second": tokens / self.seconds["generate"]}
        row |= {f"seconds/{name}": value for name, value in self.seconds.items()}
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self.seconds.clear()
        return row


# ------------------------------------------------------------------------------------ checkpoints of the loop


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if path.name[11:].isdigit())


@torch.no_grad()
def save_checkpoint(run: Run):
    """Write checkpoint-STEP into --out, complete or not at all. One older checkpoint is kept.

    A full disk does not end the run: a warning says so, and the older checkpoints stay.
    """
    files = {"rng": {"cpu": torch.get_rng_state()}}
    if (device := run.policy.device.type) != "cpu":
        files["rng"]["device"] = getattr(torch, device).get_rng_state()
    files |= {name: run.world.full_weights(network) for name, network in run.networks.items()}
    files |= {name: optimizer.tensors() for name, optimizer in run.optimizers.items()}
    if run.world.rank:                                             # rank 0 holds everything
        return
    for file in run.logs.values():                                 # a checkpoint is never ahead of its logs
        os.fsync(file.fileno())
    state = {"step": run.step, "skipped": run.skipped, "unheard": run.unheard, "kept": run.kept,
             "batches": run.batches.state(), "draws": run.rng.getstate(),
             "logs": {name: file.tell() for name, file in run.logs.items()}}
    path = run.out / f"checkpoint-{run.step:06}"
    try:
        with all_or_nothing(path) as folder:
            folder.mkdir()
            for name, tensors in files.items():
                save_file({key: x.detach().contiguous() for key, x in tensors.items()},
                          folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(state))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(f"{path}.unfinished", ignore_errors=True)    # frees the space
        tqdm.write(f"warning: no checkpoint at step {run.step} ({error}); the run continues")
        return
    for old in checkpoints(run.out)[:-2]:
        remove(old)


@torch.no_grad()
def load_checkpoint(run: Run):
    """Resume from the newest checkpoint in --out, if there is one, and truncate the logs to it.

    UserError if it cannot be read, or a log is too short. (Starting over would erase the logs.)
    """
    lengths = dict.fromkeys(LOGS, 0)
    for folder in checkpoints(run.out)[-1:]:
        try:
            state = read_json(folder / "state.json")
            for name, network in run.networks.items():
                load_weights(network, folder / f"{name}.safetensors", run.world)
            for name, optimizer in run.optimizers.items():
                optimizer.load(read_tensors(folder / f"{name}.safetensors"))
            states = dict(read_tensors(folder / "rng.safetensors"))
            lengths = state["logs"]
            for name, length in lengths.items():
                if (size := (run.out / f"{name}.jsonl").stat().st_size) < length:
                    raise OSError(f"it was made when {name}.jsonl had {length} bytes; now it has {size}")
        except (UserError, OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder} cannot be read ({error}); remove it, and the run resumes from the "
                            f"checkpoint before it, or starts over if there is none") from error
        run.batches.load(state["batches"])
        torch.set_rng_state(states["cpu"])
        if "device" in states and (device := run.policy.device.type) != "cpu":
            getattr(torch, device).set_rng_state(states["device"])
        version, numbers, gauss = state["draws"]
        run.rng.setstate((version, tuple(numbers), gauss))         # JSON turned the tuple into a list
        run.step, run.skipped, run.unheard = state["step"], state["skipped"], state["unheard"]
        run.kept = state["kept"]
        print(f"resuming after step {run.step}, from {folder}")
    if run.world.rank == 0:
        for name in LOGS:
            path = run.out / f"{name}.jsonl"
            path.touch()
            os.truncate(path, lengths[name])
            run.logs[name] = open(path, "a", encoding="utf-8")
        run.recent = deque((row for _, row in read_jsonl(run.out / "metrics.jsonl")), WINDOW)


def read_tensors(path: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name without the prefix, tensor) of a file's tensors with that prefix. One at a time, as there
    may be no room for eight copies, one in each of eight processes."""
    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), tensors.get_tensor(name)


@torch.no_grad()
def load_weights(module: torch.nn.Module, path: Path, world: World, prefix: str = ""):
    """Copy a file's weights into a module, or into its shards. UserError if any is missing."""
    weights = dict(module.named_parameters())
    for name, tensor in read_tensors(path, prefix):
        weight = weights.pop(name)
        local(weight).copy_(world.shard_of(tensor, weight))
    if weights:
        raise UserError(f"{path} lacks {', '.join(weights)}")


# ------------------------------------------------------------------------------------------ what makes it fit


class AdamW:
    """AdamW without weight decay, in float32: rounding to bfloat16 would swallow steps of 1e-6.

    A weight that is not float32 gets a float32 copy, its master. Adam moves the master, and the weight is the
    master rounded. With `offload`, masters and both moments (12 bytes a parameter, most of the memory of
    training) live on the CPU and are updated there: gradients are copied over, and new weights back. There is
    one torch optimizer per weight, so that only one gradient at a time is converted. Frozen weights have no
    state. Gradients keep the weight's dtype, also while micro-batches accumulate. If weights are sharded,
    each process has masters and moments for its own shards.
    """

    def __init__(self, module: torch.nn.Module, lr: float, betas=(0.9, 0.999), offload: bool = False,
                 world=World()):
        self.world, self.skipped = world, 0
        self.weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        self.masters, self.optimizers = {}, {}
        for name, weight in self.weights.items():
            device = "cpu" if offload else weight.device           # a float32 weight here is its own master
            master = local(weight).detach().to(device, torch.float32).requires_grad_()
            self.masters[name] = master
            self.optimizers[name] = torch.optim.AdamW([master], lr=lr, weight_decay=0.0, betas=betas,
                                                      fused=True)

    def set_lr(self, lr: float):
        """Change the learning rate."""
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = lr

    @torch.no_grad()
    def step(self, max_norm: float = float("inf")) -> Tensor:
        """Clip the gradient norm to `max_norm`, move the weights, free the gradients.

        A step whose gradient is not finite is skipped and counted in `skipped`, as a single NaN would spread
        to every weight for good. A weight with a zero gradient stays put, like one without a gradient: if no
        question has an image, several processes give the vision tower zeros, and momentum would move it.
        Returns the norm before clipping, a scalar.
        """
        norms = [torch.linalg.vector_norm(local(w.grad), dtype=torch.float32) if w.grad is not None
                 else torch.zeros((), device=w.device) for w in self.weights.values()]
        norms = self.world.all_reduce(torch.stack(norms).square()).sqrt()  # over the shards of all processes
        norm = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(self.weights.values(), max_norm, norm)
        followed = bool(norm.isfinite())
        self.skipped += not followed
        for (name, weight), own_norm in zip(self.weights.items(), norms.tolist()):
            if followed and own_norm:
                master = self.masters[name]
                master.grad = local(weight.grad).to(master.device, master.dtype)
                self.optimizers[name].step()
                master.grad = None
                local(weight).copy_(master)                        # rounds; onto itself if in float32
            weight.grad = None
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, complete on rank 0: moments, step counts, float32 masters."""
        kept = {}
        for name, master in self.masters.items():
            weight = self.weights[name]
            for part, value in self.optimizers[name].state[master].items():
                kept[f"{name}.{part}"] = value if part == "step" else self.world.full_tensor(value, weight)
            if (master.dtype, master.device) != (weight.dtype, weight.device):           # it is a copy
                kept[f"{name}.master"] = self.world.full_tensor(master, weight)
        return kept

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]):
        """Resume from the items of what `tensors` returned. The weights must have been loaded before.
        UserError if it is the state of other weights."""
        for name, master in self.masters.items():
            master.copy_(local(self.weights[name]))                # a float32 run saved no masters
        for key, value in tensors:
            name, _, part = key.rpartition(".")
            if name not in self.weights or part != "step" and value.shape != self.weights[name].shape:
                raise UserError(f"it holds the optimizer state of a weight {name} of shape "
                                f"{tuple(value.shape)}, which is not trained here")
            master = self.masters[name]
            if part != "step":
                value = self.world.shard_of(value, self.weights[name])
            if part == "master":
                master.copy_(value)
            else:
                self.optimizers[name].state[master][part] = value.to(master.device)


def freeze(model: torch.nn.Module, pattern: str | None, path: str):
    """Turn off gradients of weights whose name matches the regular expression. UserError if none does."""
    names = [name for name, _ in model.named_parameters()]
    chosen = {name for name in names if pattern and re.search(pattern, name)}
    if pattern and not chosen:
        raise UserError(f"--freeze {pattern} matches no weight of {path}; its weights have names like "
                        f"{', '.join(names[::len(names) // 4])}")
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in chosen)


def skeleton(path: str) -> torch.nn.Module:
    """The model of a checkpoint without weights, built from its config alone."""
    with naming(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        config._attn_implementation = None                         # as in load_vlm
        return AutoModelForImageTextToText.from_config(config)


# -------------------------------------------------------------------------------------------- before the loop


def sft(vlm: VLM, examples: list[Example], steps: int, name: str, args, world: World):
    """Supervised fine-tuning on the examples' truths: mean cross-entropy per token.

    The learning rate warms up over 50 steps, as Adam's first steps are noisy, and decays linearly to lr / 10.
    With several processes, the weights must be sharded.
    """
    lr = args.sft_lr
    optimizer = AdamW(vlm.model, lr, (0.9, 0.95), args.offload, world)
    batches = Batches(examples, args.sft_batch_size, random.Random(args.seed))
    bar = tqdm(range(steps), desc=f"SFT of {name}", unit="step")
    for step in bar:
        optimizer.set_lr(lr * (1 - 0.9 * step / steps) * min(1, (step + 1) / 50))
        batch = world.mine(next(batches))
        outputs = encode_responses(vlm, [[e.truth] for e in batch])                          # (B, 1, R)
        prompts = encode_examples(vlm, batch)
        tokens, total = world.all_reduce(outputs.mask.sum()), torch.zeros((), device=vlm.device)
        sizes = row_sizes(vlm.packs, prompts, outputs.mask)
        for part, weight in world.even(micro_batches(sizes, args.token_budget)):
            logps = gathered(vlm.model, lambda: score(vlm, [prompts[b] for b in part], outputs[part]))
            loss = -weight * logps.sum() / tokens
            loss.backward()
            total += loss.detach()
        optimizer.step(max_norm=1.0)
        bar.set_postfix_str(f"loss {world.all_reduce(total):.3f}", refresh=False)


def pretraining_size(args) -> int:
    """Questions in a batch of D's pre-training, so that it has as many responses as a batch of the loop."""
    return max(1, args.batch_size * args.num_samples // args.collect)


def pretraining_pairs(student: VLM, examples: list[Example], collection: Collection, args, world: World):
    """Endless batches for Eq. 1, this process's share: for each question, N fresh responses of the student
    and N of the teachers."""
    N, rng = args.collect, random.Random(args.seed)
    batches = Batches(examples, pretraining_size(args), rng)
    while True:
        questions = next(batches)
        batch, drawn = world.mine(questions), world.mine(collection.draw(questions, N, rng))
        noise = drawn_noise(world, questions, N, args.max_new_tokens, student.device)
        students = generate(student, encode_examples(student, batch), N, sampling_of(args), noise=noise,
                            slots=args.rollout_batch * args.num_samples).text
        teachers = [[text for _, text in pairs] for pairs in drawn]
        is_student = torch.tensor([[True] * N + [False] * N] * len(batch), device=student.device)
        yield [e.text for e in batch], [s + t for s, t in zip(students, teachers)], is_student


# ---------------------------------------------------------------------------------------- the folder of a run


CODE = ("model.py", "discriminator.py", "teachers.py", "eval.py", "train.py")
BEFORE_LOOP = ("data", "teachers", "sft", "collection.jsonl", "discriminator.safetensors")
LOOP_INPUTS = ("eval_data", "judge", "reward_weights")


class RunFolder:
    """--out. Its run.json records what everything in it was made from: options, inputs by content, and code.

    A command whose options or inputs differ is refused. So whatever exists is what this command would make,
    and is reused. Changed code is allowed, but a notice names it.
    """

    def __init__(self, args, world: World):
        self.args, self.world, self.out = args, world, Path(args.out)
        self.record = read_record(self.out)

    def open(self, data: dict) -> dict:
        """Return the record, begun if the run is new; rank 0 alone calls this, after check_inputs. UserError
        if --out or --from was made from something else, or nobody knows from what."""
        wanted, donor = record_of(self.args, data), getattr(self.args, "from")
        if self.record:
            compare(self.out, self.record, wanted)
            steps = max([self.record["steps"], *(int(path.name[11:]) for path in checkpoints(self.out))])
            if steps > self.args.steps:
                raise UserError(f"{self.out} has come to step {steps}, beyond --steps {self.args.steps}; "
                                f"choose another --out")
        elif self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"{self.out} holds files and no run.json that says what they were made from; "
                            f"choose another --out")
        if donor:
            if not (record := read_record(Path(donor))):
                raise UserError(f"--from {donor}: not the folder of a run, it has no run.json")
            compare(Path(donor), record, wanted, ignored=fields("loop").union(LOOP_INPUTS))
        if not self.record:
            self.record = wanted
            self.write(steps=0)
        for name in BEFORE_LOOP:                       # also what a kill has kept from being copied
            if donor and (Path(donor) / name).exists() and not self.has(name):
                source = Path(donor) / name
                copy_all = shutil.copytree if source.is_dir() else shutil.copyfile
                with all_or_nothing(self.out / name) as unfinished:
                    copy_all(source, unfinished)
        return self.record

    def stage(self, name: str, make) -> Path:
        """The path of --out/name. Unless it exists, make(path) makes it, complete or not at all. All
        processes call make, and rank 0 writes."""
        path = self.out / name
        if not self.world.rank_0(path.exists):
            make(path)
            gc.collect()                               # sharded models hold references to themselves
            self.world.barrier()
        return path

    def has(self, name: str) -> bool:
        """Whether --out/name exists."""
        return (self.out / name).exists()

    def is_trained(self) -> bool:
        """Whether the loop has come to its last step, and the student was saved."""
        return self.record.get("steps") == self.args.steps and self.has("student")

    def write(self, steps: int):
        """Save the record. steps: how many the saved student has been trained for."""
        self.record["steps"] = steps
        if self.world.rank:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "run.json", json.dumps(self.record, indent=1))


def fields(*groups: str) -> set[str]:
    """The attributes of the parsed arguments that hold the options of these groups."""
    return {option.name.strip("-").replace("-", "_") for group in groups for option in OPTIONS[group]}


def record_of(args, data: dict) -> dict:
    """The run.json of a new run: every option but those of the machine, files by what they hold, and hashes
    of the code. data: the examples, or the task, of each option."""
    left_out = fields("machine", "models and data")
    made = {name: value for name, value in vars(args).items() if name not in left_out}
    for name in ("data", "sft_data", "collection", "eval_data"):
        pictures = [e.pictures for e in getattr(data.get(name), "examples", data.get(name, ()))]
        if path := getattr(args, name):
            made[name] = f"{stamp(path)} {zlib.crc32(json.dumps(pictures).encode())}"
    teachers, endpoint = [make_teacher(name) for name in args.teachers], endpoint_of(args.judge)
    judge = endpoint.model if endpoint else args.judge             # without the address, which may change
    made |= {"student": "toy" if args.student == "toy" else stamp(args.student), "skip_bad": args.skip_bad,
             "dtype": pick_dtype(args.device, args.dtype),
             "judge": judge if endpoint or judge == "rule" else stamp(judge),
             "teachers": [teacher.name for teacher in teachers],
             "checkpoints": [stamp(teacher.path) for teacher in teachers if hasattr(teacher, "path")]}
    code = {name: stamp(Path(__file__).with_name(name)) for name in CODE}
    return json.loads(json.dumps({"options": made, "code": code, "steps": 0}))


def read_record(folder: Path) -> dict:
    """The record in a run's folder; {} if there is no run.json."""
    path = folder / "run.json"
    record = read_json(path) if path.exists() else {}
    if path.exists() and not (isinstance(record, dict) and {"options", "code", "steps"} <= record.keys()):
        raise UserError(f"{path}: not the record of a run of this version; choose another --out")
    return record


def compare(folder: Path, record: dict, wanted: dict, ignored: Iterable[str] = ()):
    """UserError naming the options in which the record of a folder differs from the wanted one. An option
    that the record lacks had its default. Changed code triggers a notice."""
    defaults, differ = vars(make_parser(wanted["options"]["student"]).parse_args([])), []
    for name in sorted((record["options"] | wanted["options"]).keys() - ignored):
        old, new = (made["options"].get(name, defaults.get(name)) for made in (record, wanted))
        if old != new:
            differ.append(f"--{name.replace('_', '-')} {old} there, {new} here")
    if differ:
        raise UserError(f"{folder} was made with other settings ({', '.join(differ)}); choose another --out "
                        f"(--from RUN copies what comes before the loop, if that stays the same)")
    if changed := [name for name in CODE if record["code"].get(name) != wanted["code"][name]]:
        print(f"{folder} was made by other versions of {', '.join(changed)}; what it holds is reused as is")


# -------------------------------------------------------------------------------------------- stages of a run


def check_inputs(args, folder: RunFolder) -> dict[str, list]:
    """UserError if data, checkpoints or servers are not usable, before anything is written.

    Returns the examples (or the task) of each data file, by option. Servers whose work is already done are
    not contacted.
    """
    check_rewards(args)
    given, student, processor = {}, [], None
    if args.student != "toy":                                      # which does not exist yet
        student, processor = [args.student], load_processor(args.student)
    collected = folder.has("discriminator.safetensors")
    # rows that were once left out because of a teacher must be left out again
    asked = student if collected and not args.skip_bad else student + args.teachers
    judged = [rule_check] if args.judge == "rule" else []
    for name, load, models, response, checks in (
            ("data", load_examples, asked, args.max_new_tokens, judged),
            ("sft_data", load_examples, student, None, []),
            ("eval_data", task_of, student, args.max_new_tokens, judged)):
        if path := getattr(args, name):
            given[name] = load(path, skip_bad=args.skip_bad, checks=prompt_checks(models, response) + checks)
    if not collected:
        for name in args.teachers:
            make_teacher(name, args.device, args.dtype).check()
    if not folder.is_trained() or given.get("eval_data") and not folder.has("evaluation-after.json"):
        check_judge(args.judge)
    if processor and args.algorithm == "ril":
        around_response(processor)
    if processor and args.freeze:
        freeze(skeleton(args.student), args.freeze, args.student)
    if args.collection:
        read_collection(args.collection, given["data"], processor, args)
    if args.truncate_rollouts:
        print(f"rollouts are truncated (top-p {args.top_p}, top-k {args.top_k}), as in the paper: what is "
              "never sampled is never pushed down; watch `tail` and `heldout_sampled`, or give "
              "--no-truncate-rollouts")
    return given


def check_rewards(args):
    """UserError unless every reward that reward_terms gives has a weight, and one weight is not 0."""
    K = 2 * args.num_samples
    outputs = Outputs([["?"] * K], torch.zeros(1, K, 1, dtype=torch.long),
                      torch.ones(1, K, 1, dtype=torch.bool))
    p_student = torch.full((1, K), 0.5) if args.algorithm == "ril" else None
    group = Group([Example("?", (), "?", "?")], outputs, [["student"] * K], p_student, torch.ones(1, K))
    terms = reward_terms(group, args)
    for name in terms:
        if name not in args.reward_weights:
            raise UserError(f"train.py: the reward {name!r} of reward_terms has no weight in REWARD_WEIGHTS")
    if not any(args.reward_weights[name] for name in terms):
        raise UserError("--reward-weights leaves no reward")


def read_collection(path, examples: list[Example], processor, args) -> Collection:
    """The part of the collection that a student with this processor (None: unknown yet) can use."""
    if processor is None:
        return Collection(path, examples)
    return Collection(path, examples, image_tokens(processor), processor.tokenizer, args.max_new_tokens)


def toy_world_and_teachers(folder: RunFolder, args, data: dict) -> list:
    """The teachers. Without --data, this draws the toy world and puts its examples and tasks into `data`. The
    toy student is trained alongside the toy teachers, as none of them needs the others."""
    models, words = {}, []                             # by stage: family, lessons, width, steps
    if not args.data:
        drawn = folder.stage("data", partial(toy_world, seed=args.seed, world=folder.world))
        words = load_examples(str(drawn / "words.jsonl"))
        for name, family in (("qwen", "qwen2_5_vl"), ("internvl", "internvl")):
            lessons = [words, load_examples(str(drawn / f"{name}.jsonl"))]
            models[f"teachers/{name}"] = (family, lessons, 96, args.teacher_steps)
        words = [] if args.sft_data else words
        for option, name, load in (("data", "train", load_examples), ("sft_data", "sft", load_examples),
                                   ("eval_data", "heldout", task_of)):
            if not getattr(args, option):
                setattr(args, option, str(drawn / f"{name}.jsonl"))
                data[option] = load(getattr(args, option))
        args.teachers = args.teachers or [str(folder.out / name) for name in models]
    if args.student == "toy":
        lessons = [lesson for lesson in (words, data["sft_data"]) if lesson]
        models["sft"] = ("qwen2_5_vl", lessons, 64, args.sft_steps)
        folder.world.rank_0(partial(side_by_side, folder, args, models))
    slots = max(1, 2 * args.num_samples * args.rollout_batch // args.collect) * args.collect
    return [make_teacher(name, args.device, args.dtype, slots) for name in args.teachers]


def side_by_side(folder: RunFolder, args, models: dict[str, tuple]):
    """Train tiny models, each in its own process, as many at a time as there are cores."""
    todo = {folder.out / name: model for name, model in models.items() if not folder.has(name)}
    try:
        with ProcessPoolExecutor(min(len(todo), os.cpu_count()) or 1, get_context("spawn"), leave_with_parent,
                                 (os.getpid(),)) as processes:
            for job in [processes.submit(tiny_vlm_from_scratch, path, *model, args)
                        for path, model in todo.items()]:
                job.result()
    except BrokenProcessPool as error:
        raise UserError(f"a process that trained one of {', '.join(models)} has died; did it run out of "
                        f"memory?") from error


def leave_with_parent(parent: int):
    """Set up a process of side_by_side; it exits when its parent has been killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)
    Thread(target=watch, daemon=True).start()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def toy_world(path: Path, seed: int, world: World):
    """Draw the toy world: questions, and lessons for the student (sft) and its teachers.

    All of them first learn to see, answering in single words, and then to speak in their own styles. What
    each of them gets wrong, and why, is in the README: "What there is to learn".
    """
    if world.rank:
        return
    other_words = {"circle": "disc", "square": "box", "triangle": "wedge"}
    shared = {"1": "2", "2": "1"}
    with all_or_nothing(path) as folder:
        draw_toy_world(str(folder), seed, {
            "heldout": ToySplit(500), "train": ToySplit(1000, wrong=other_words), "words": ToySplit(3000),
            "qwen": ToySplit(1500, ("A",), shared | {"square": "circle"}),
            "internvl": ToySplit(1500, ("B",), shared | {"circle": "square"}),
            "sft": ToySplit(2000, 5 * ("plain",) + ("A", "B"), echoes=True)})


def tiny_vlm_from_scratch(folder: Path, family: str, lessons: list[list[Example]], width: int, steps: int,
                          args):
    """Train a tokenizer on the lessons, then a model from random weights by SFT on each lesson in turn.

    The first takes `steps`, the others a quarter as many: learning to see takes longer than to speak.
    """
    examples = sum(lessons, [])
    # the prompts' words are among the texts, so that each becomes a token, and prompts are short
    texts = [text for e in examples for text in (e.text, e.truth)]
    texts += 50 * [SYSTEM, BEFORE + AFTER, "user\nassistant\nsystem\n"]
    random_weights = Path(f"{folder}.random")
    remove(random_weights)
    build_tiny_vlm(str(random_weights), family, texts, width, layers=2, vocabulary=600, seed=args.seed)
    vlm = load_vlm(str(random_weights), args.device, args.dtype)
    for i, lesson in enumerate(lessons):
        sft(vlm, lesson, steps // 4 if i else steps, folder.name, args, World())
    save_vlm(vlm, str(folder))
    remove(random_weights)


def fine_tuned_student(folder: RunFolder, args, data: dict) -> str:
    """The warm start, both reference and first policy: the student's checkpoint, after SFT if there is any.

    UserError if its family cannot be scored as we do, before anyone pays for teachers' responses.
    """
    start, world = args.student, folder.world

    def make(path):
        student = load_student(args.student, args)
        world.shard(student.model, student.model.get_decoder())
        sft(student, data["sft_data"], args.sft_steps, "student", args, world)
        save_student(world, student, args.student, path)
    if args.student == "toy":
        start = str(folder.out / "sft")                            # see toy_world_and_teachers
    elif args.sft_steps:
        start = str(folder.stage("sft", make))

    def check():
        student = load_vlm(start, args.device, args.dtype)
        shown = [next((e for e in data["data"] if bool(e.images) == seen), None) for seen in (True, False)]
        check_scoring(student, encode_examples(student, [e for e in shown if e]))
    if not folder.is_trained():
        world.rank_0(check)
    return start


def load_student(path: str, args) -> VLM:
    """Load the student for training."""
    student = load_vlm(path, args.device, args.dtype)
    if args.gradient_checkpointing:
        checkpoint_layers(student.model)
    return student


def teachers_responses(folder: RunFolder, args, teachers: list, data: dict, start: str) -> Collection | None:
    """Fill the collection, and keep only the examples with a response in data["data"]."""
    if args.algorithm != "ril":
        return None
    path = Path(args.collection or folder.out / "collection.jsonl")
    # once D has been trained on the collection, nobody is asked for missing responses
    if not (args.collection or folder.world.rank_0(partial(folder.has, "discriminator.safetensors"))):
        fill_collection(str(path), teachers, data["data"], args.collect, sampling_of(args), args.seed,
                        folder.world)
    collection = read_collection(path, data["data"], load_processor(start), args)
    for many, why in ((collection.unfinished, "responses are empty or were cut off by a token limit"),
                      (collection.overlong, f"responses have more than --max-new-tokens "
                       f"{args.max_new_tokens} tokens"),
                      (len(data["data"]) - len(collection.examples), "questions have no other response")):
        if many:
            print(f"{path}: {many} {why} and are left out")
    data["data"] = collection.examples
    return collection


def pretrained_discriminator(folder: RunFolder, args, data: dict, collection: Collection | None,
                             start: str) -> Path | None:
    """Pre-train D by Eq. 1 on fresh responses of the student and the collected ones."""
    if collection is None:
        return None

    def make(path):
        policy, world = load_student(start, args), folder.world
        torch.manual_seed(args.seed)                               # draws D's head, and the responses
        D = Discriminator(policy)
        world.shard(D, D.backbone, D.head, method="logits")
        pairs = pretraining_pairs(policy, data["data"], collection, args, world)
        optimizer = AdamW(D, args.pretrain_lr, offload=args.offload, world=world)
        pretrain_discriminator(D, optimizer, pairs, args.discriminator_steps, args.pretrain_lr,
                               args.token_budget, pretraining_size(args))
        # with its optimizer, as a new one's first steps have full length, however small the gradient
        tensors = {f"D {name}": weight for name, weight in world.full_weights(D).items()}
        tensors |= {f"optimizer {name}": moment for name, moment in optimizer.tensors().items()}
        if world.rank == 0:
            with all_or_nothing(path) as unfinished:
                save_file(tensors, unfinished)
    return folder.stage("discriminator.safetensors", make)


def trained_student(folder: RunFolder, args, data: dict, collection: Collection | None,
                    pretrained: Path | None, start: str, get_judge):
    """Run the loop and save the trained student, a checkpoint like the one it started from."""
    path, world = folder.out / "student", folder.world
    if world.rank_0(folder.is_trained):
        return
    if path.exists() and not checkpoints(folder.out):
        raise UserError(f"{path} cannot be trained further because its last checkpoint is gone; choose "
                        f"another --out")
    policy = load_student(start, args)
    D = Discriminator(policy) if pretrained else None
    if D:
        load_weights(D, pretrained, world, "D ")
    run = Run(args, world, folder.out, policy, data["data"], D)
    if D:
        run.d_optimizer.load(read_tensors(pretrained, "optimizer "))
    ril(run, collection, get_judge(), data.get("eval_data"))
    if world.rank == 0:
        remove(folder.out / "evaluation-after.json")               # of a student that had fewer steps
    save_student(world, policy, start, path)
    folder.write(steps=args.steps)
    if world.rank == 0:
        for old in checkpoints(folder.out)[:-1]:
            remove(old)                                   # the last one lets a run be given more steps
    del run, policy, D
    gc.collect()                                       # as in RunFolder.stage


def save_student(world: World, vlm: VLM, start: str, path: Path):
    """Save a model that was the checkpoint `start` before training, replacing whatever is at `path`."""
    weights = world.full_weights(vlm.model)
    if world.rank:
        return
    if world.size > 1:                                    # fully_shard changed the classes of its modules
        vlm = read_vlm(start, "cpu", str(vlm.model.dtype).removeprefix("torch."))
        for name, weight in vlm.model.named_parameters():
            weight.data.copy_(weights[name])
    remove(path)
    save_vlm(vlm, str(path))


def report(folder: RunFolder, args, data: dict, get_judge, start: str):
    """Score the held-out questions before and after, greedy and sampled; write curves.png and report.html."""
    results, out, held_out = {}, folder.out, data.get("eval_data")
    for name, checkpoint in (("before", start), ("after", str(out / "student"))):
        def make(path):
            vlm, world = load_vlm(checkpoint, args.device, args.dtype), folder.world
            texts, sampled = (predict(vlm, held_out, sampling, args.rollout_batch, world)
                              for sampling in (greedy_sampling(args.max_new_tokens), sampling_of(args)))
            if world.rank == 0:
                score, of_samples = score_responses(held_out, texts, get_judge()), f"{held_out.name}, sampled"
                score["sampled"] = score_responses(replace(held_out, name=of_samples), sampled, get_judge())
                write_atomic(path, json.dumps(score, ensure_ascii=False))
        if held_out:
            score = read_json(folder.stage(f"evaluation-{name}.json", make))
            results[name] = [score, score.pop("sampled")]
    if folder.world.rank:
        return
    logs = {name: [row for _, row in read_jsonl(out / f"{name}.jsonl")] for name in LOGS}
    draw_curves(logs["metrics"], logs["greedy"], str(out / "curves.png"))
    write_report(out, vars(args), results, logs["rollouts"])
    if results:
        print(results_table(results))
    print(f"The trained student is {out / 'student'}; open {out / 'report.html'}")


# ---------------------------------------------------------------------------------------------- command line


class Option(NamedTuple):
    """An option of the command line. A default of True or False makes it a flag, with --no-NAME to turn it
    off; a default that is a list means several values."""
    name: str
    default: object                                    # the paper's, where it has one
    what: str
    toy: object = None                                 # the toy's default, if it differs
    choices: tuple = ()


# Every option is part of a run's record (record_of) except those in "machine", which change nothing but
# rounding. --from takes over what another run made before its loop if everything agrees except "loop".
OPTIONS = {
    "models and data": [                               # of inputs, what they hold is recorded
        Option("--student", "toy", "checkpoint folder or hub id, or toy: a tiny one, from scratch"),
        Option("--teachers", [], "fill the collection: checkpoint folders, hub ids, or "
               "model@http://server/v1 of an OpenAI-compatible server"),
        Option("--collection", None, "JSONL of responses made elsewhere, instead of teachers"),
        Option("--judge", "rule", "who decides what is right: rule (short answers are parsed), a "
               "checkpoint, or model@url"),
        Option("--data", None, "questions to train on; default, for the toy student: the toy world"),
        Option("--sft-data", None, "examples to fine-tune on first; default, for the toy student: --data, or "
               "the toy world's own"),
        Option("--eval-data", None, "held-out questions, or a benchmark as eval.py takes it"),
        Option("--skip-bad", False, "leave out examples whose image cannot be read, or that a model cannot "
               "be asked"),
        Option("--out", "runs/toy", "folder of the run; finished stages in it are reused"),
        Option("--from", None, "folder of a run that differs only in its loop: copy what came before it")],
    "SFT": [
        Option("--sft-steps", 0, "steps of SFT; 0 for a student that has already had it", toy=500),
        Option("--sft-lr", 1e-5, "learning rate of SFT; decays linearly to a tenth", toy=1e-3),
        Option("--sft-batch-size", 64, "examples per step of SFT", toy=32),
        Option("--teacher-steps", 0, "steps of SFT of each teacher of the toy world", toy=400)],
    "collection": [
        Option("--collect", 16, "responses of each teacher to each question; also N of D's pre-training",
               toy=8)],
    "discriminator": [                                 # the loop uses the first two as well
        Option("--num-samples", 4, "G: responses of the student, and as many of teachers, to each question"),
        Option("--batch-size", 144, "questions per step", toy=64),
        Option("--discriminator-steps", 1111, "steps of discriminator pre-training", toy=60),
        Option("--pretrain-lr", 1e-5, "its learning rate; decays linearly to a tenth", toy=1e-3)],
    "loop": [
        Option("--algorithm", "ril", "rl: Algorithm 1, no teachers and no D", choices=("ril", "rl")),
        Option("--loss", "dr_grpo", "grpo divides by std and by length", choices=tuple(LOSSES)),
        Option("--similarity", "binary", "how finely the similarity reward is graded",
               choices=tuple(SIMILARITIES)),
        Option("--freeze-discriminator", False, "skip lines 7-9: D stays as pre-trained"),
        Option("--truncate-rollouts", True, "in the loop, too, the student samples with top-p, top-k and "
               "penalty, as in the paper; --no-truncate-rollouts: from its full distribution", toy=False),
        Option("--teacher-rollouts", True, "teachers' responses train the policy, not just D"),
        Option("--freeze", None, "regular expression for the names of weights that the loop does not change: "
               "'visual' the vision tower, 'lm_head' the vocabulary head, 'self_attn', 'mlp', 'norm' "
               "(Table 5c)"),
        Option("--mu", 1, "updates of D and of the policy per step"),
        Option("--beta", 0.01, "weight of the KL to the reference"),
        Option("--eps", 0.2, "the ratio is clipped to 1 - eps .. 1 + eps"),
        Option("--lr", 1e-6, "learning rate of the student", toy=1.5e-4),
        Option("--warmup", 0, "steps over which the student's learning rate rises from 0", toy=20),
        Option("--discriminator-lr", 1e-6, "learning rate of D", toy=6e-4)],
    "machine": [
        Option("--steps", 1000, "steps of the loop; a finished run can be given more", toy=150),
        Option("--device", None, "cuda, mps or cpu; default: the best available"),
        Option("--token-budget", 8192, "tokens per micro-batch: fewer need less memory", toy=16384),
        Option("--rollout-batch", 16, "questions sampled at a time: fewer need less memory", toy=64),
        Option("--gradient-checkpointing", False, "keep only the inputs of layers, and compute them twice"),
        Option("--offload", False, "keep optimizer states on the CPU and update there; park D and the "
               "reference there, too"),
        Option("--eval-every", 100, "steps between held-out accuracies", toy=25),
        Option("--log-every", 10, "steps between printed samples"),
        Option("--save-every", "15m", "steps between checkpoints of the loop, or minutes as 15m", toy="20")],
    "every stage": [
        Option("--seed", 0, "seed of everything random"),
        Option("--dtype", None, "default: bfloat16 on a GPU, float32 on the CPU",
               choices=("float32", "bfloat16"))],
}


def make_parser(student: str) -> argparse.ArgumentParser:
    """A parser of all options, with the defaults for this student."""
    toy = student == "toy"
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {title: parser.add_argument_group(title) for title in OPTIONS}
    for title, options in OPTIONS.items():
        for option in options:
            value = option.toy if toy and option.toy is not None else option.default
            settings = {"default": value}
            if isinstance(option.default, bool):
                settings["action"] = argparse.BooleanOptionalAction
            elif isinstance(option.default, list):
                settings["nargs"] = "+"
            else:
                settings["type"] = str if option.default is None else type(option.default)
                settings["choices"] = option.choices or None
            groups[title].add_argument(option.name, **settings, help=f"{option.what} [{value}]")
    groups["loop"].add_argument("--reward-weights", nargs="+", type=reward_weight, metavar="NAME=WEIGHT",
                                default=REWARD_WEIGHTS, help="answer=0: verdicts are logged, and earn 0")
    add_sampling_options(parser)
    if toy:
        parser.set_defaults(max_new_tokens=24)
    return parser


def reward_weight(text: str) -> tuple[str, float]:
    """Parse NAME=WEIGHT into a pair."""
    name, _, weight = text.partition("=")
    if name not in REWARD_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=WEIGHT, with one of "
                                         f"{', '.join(REWARD_WEIGHTS)}")
    try:
        return name, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {weight!r} is not a number") from error


def parse_args(argv=None):
    """Parse the command line, and check all that can be checked without reading a file."""
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
    args.reward_weights = parser.get_default("reward_weights") | dict(args.reward_weights)
    if args.student != "toy" and not args.data:
        parser.error("--data is needed for a named student")
    if args.collection and not args.data:
        parser.error("--collection needs --data, the questions that it answers")
    if args.data and args.algorithm == "ril" and not (args.teachers or args.collection):
        parser.error("RIL needs --teachers or a --collection of their responses (or --algorithm rl)")
    if args.student == "toy":
        args.sft_data = args.sft_data or args.data
    elif args.sft_steps and not args.sft_data:
        parser.error("--sft-steps needs --sft-data")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    fewest = min(args.batch_size, args.sft_batch_size, pretraining_size(args))
    if ranks > 1 and (args.offload or fewest < ranks):
        parser.error(f"{ranks} processes need --batch-size, --sft-batch-size, and --batch-size x "
                     f"--num-samples / --collect to be at least {ranks}, and no --offload")
    return args


if __name__ == "__main__":
    run_main(main)
