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

How this differs from the paper: one process, where it uses eight GPUs; with mu = 1 (its setting) the policy has not moved
when its old log-probs are wanted, so `old` is the detached current policy and no third network exists; the ratio and the
KL are per token, summed over a response, as Dr.GRPO has them.

    python train.py                                          the whole method on a toy world, minutes on a laptop
    python train.py --algorithm rl --out runs/rl             Algorithm 1: the judge's reward alone, no teachers
    python train.py --student DIR --data train.jsonl --eval-data val.jsonl --teachers DIR DIR --out runs/mine
"""
import argparse
import copy
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import discriminator as eq1
from discriminator import Discriminator, similarity_reward
from eval import JUDGES, draw_curves, evaluate, results_table, write_report
from model import (VLM, Outputs, UserError, build_tiny_vlm, encode_responses, generate, image_tokens, join,
                   load_processor, load_vlm, pick_device, run, save_vlm, score)
from teachers import (Collection, Example, add_sampling_options, draw_toy_world, encode_example, fill_collection,
                      load_examples, read_jsonl, sampling_of)

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


# ---------------------------------------------------------------------------------------------- before the loop


def batches_of(examples: list, size: int, rng: random.Random):
    """Endless batches of `size`; every example once before any comes again."""
    pool = []
    while True:
        while len(pool) < size:
            pool += rng.sample(examples, len(examples))
        yield pool[:size]
        del pool[:size]


def sft(vlm: VLM, examples: list[Example], steps: int, batch_size: int, lr: float, seed: int, name: str):
    """Supervised fine-tuning on the examples' own answers; mean cross-entropy per token, lr decayed linearly to lr / 10."""
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    batches = batches_of(examples, batch_size, random.Random(seed))
    bar = tqdm(range(steps), desc=f"SFT of {name}", unit="step")
    for step in bar:
        for group in optimizer.param_groups:                       # a short warm-up: the first steps of Adam are noise
            group["lr"] = lr * (1 - 0.9 * step / steps) * min(1, (step + 1) / 50)
        batch = next(batches)
        outputs = encode_responses(vlm, [[e.answer] for e in batch])                         # (B, 1, R)
        loss = -score(vlm, [encode_example(vlm, e) for e in batch], outputs).sum() / outputs.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)


def pretraining_pairs(student: VLM, examples: list[Example], collection: Collection, num: int, batch_size: int, sampling,
                      rng: random.Random):
    """Endless batches for Eq. 1: num fresh responses of the student and num of its teachers, to batch_size questions."""
    for batch in batches_of(examples, batch_size, rng):
        students = generate(student, [encode_example(student, e) for e in batch], num, sampling).text
        teachers = [[text for _, text in pairs] for pairs in collection.draw(batch, num, rng)]
        is_student = torch.tensor([[True] * num + [False] * num] * len(batch), device=student.device)
        yield [s + t for s, t in zip(students, teachers)], is_student


# ---------------------------------------------------------------------------------------------- Algorithm 2


class Meter:
    """Seconds and peak memory of the phases of a step, in `seconds` and `memory_gb`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.memory_gb = device, {}, {}

    @contextmanager
    def phase(self, name: str):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)                    # or the seconds would be those of queueing the work
        self.seconds[name] = time.perf_counter() - start
        self.memory_gb[name] = peak_memory_gb(self.device)


def peak_memory_gb(device: torch.device) -> float:
    """Most GB allocated on a CUDA device since the last reset; elsewhere the most the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource                                                # Unix only
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def judge_all(judge, batch: list[Example], outputs: Outputs) -> Tensor:
    """Verdicts of every response as (B, K) float32: 1, 0, or NaN where the judge failed."""
    verdicts = [[judge(e.question, e.answer, text) for text in texts] for e, texts in zip(batch, outputs.text)]
    return torch.tensor([[float("nan") if v is None else float(v) for v in row] for row in verdicts],
                        device=outputs.ids.device)


def update_policy(policy: VLM, reference: VLM, optimizer, prompts: list, outputs: Outputs, advantage: Tensor,
                  valid: Tensor, args) -> dict[str, float]:
    """Lines 11-13: mu updates of the policy by Eq. 2, each accumulated over micro-batches of batch_size questions."""
    chunks = [slice(i, i + args.batch_size) for i in range(0, len(prompts), args.batch_size)]
    logps = partial(score, temperature=args.temperature or 1.0)    # greedy sampling is still scored at temperature 1
    old_logp, ref_logp, stats = {}, {}, defaultdict(float)
    for _ in range(args.mu):
        optimizer.zero_grad()
        for i, chunk in enumerate(chunks):
            logp, mask = logps(policy, prompts[chunk], outputs[chunk]), outputs.mask[chunk]
            if i not in old_logp:
                old_logp[i] = logp.detach()                        # line 4: the policy has not moved yet
                with torch.no_grad():                              # line 1: log-probs are all we need of the reference
                    ref_logp[i] = logps(reference, prompts[chunk], outputs[chunk]) if args.beta else old_logp[i]
            loss = policy_loss(logp, old_logp[i], ref_logp[i], advantage[chunk], mask, valid[chunk], args.eps, args.beta,
                               args.loss) / len(prompts)
            loss.backward()
            with torch.no_grad():
                clipped = ((logp - old_logp[i]).exp() - 1).abs() > args.eps
                stats["loss"] += loss.item() / args.mu
                stats["kl"] += k3_kl(logp, ref_logp[i])[mask].sum().item() / outputs.mask.sum().item() / args.mu
                stats["clip_fraction"] += clipped[mask].sum().item() / outputs.mask.sum().item() / args.mu
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        stats["grad_norm"] += norm.item() / args.mu
        optimizer.step()
    return dict(stats)


def ril(policy: VLM, examples: list[Example], collection: Collection | None, D: Discriminator | None, judge,
        held_out: list[Example], args, out: Path):
    """Algorithm 2; or Algorithm 1, where there is no collection and no D. Trains `policy` in place, logs into `out`."""
    G, sampling, rng = args.num_samples, sampling_of(args), random.Random(args.seed)
    torch.manual_seed(args.seed)
    reference = replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))     # line 1
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=args.lr, weight_decay=0.0)
    d_optimizer = torch.optim.AdamW(D.parameters(), lr=args.discriminator_lr, weight_decay=0.0) if D else None
    batches = batches_of(examples, args.batch_size * args.accumulate, rng)
    metrics_file, rollouts_file = open(out / "metrics.jsonl", "w"), open(out / "rollouts.jsonl", "w", encoding="utf-8")

    for step in tqdm(range(args.steps), desc=args.algorithm.upper(), unit="step"):
        for group in optimizer.param_groups:                       # D, pre-trained on other samples, first catches up
            group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup))
        meter, row = Meter(policy.device), {"step": step}
        batch = next(batches)                                                                # line 3
        with meter.phase("generate"):
            prompts = [encode_example(policy, e) for e in batch]
            outputs = generate(policy, prompts, G, sampling)                                 # line 5       (B, G, R)
        sources = [["student"] * G for _ in batch]
        p_student, similarity = None, torch.zeros(len(batch), G, device=policy.device)       # Algorithm 1 has none

        if D:
            with meter.phase("discriminator"):
                drawn = collection.draw(batch, G, rng)                                       # line 6
                teachers = encode_responses(policy, [[text for _, text in pairs] for pairs in drawn])
                outputs = join(outputs, teachers)                                            #              (B, 2G, R)
                sources = [s + [teacher for teacher, _ in pairs] for s, pairs in zip(sources, drawn)]
                is_student = torch.tensor([[name == "student" for name in s] for s in sources], device=policy.device)
                for _ in range(0 if args.freeze_discriminator else args.mu):                 # lines 7-9, Eq. 1
                    row |= eq1.update(D, d_optimizer, outputs.text, is_student)
                p_student = D.p_student(outputs.text)                                        # line 10, by the new D
                similarity = similarity_reward(p_student, args.similarity)                   #              (B, 2G)

        with meter.phase("judge"):
            answer = judge_all(judge, batch, outputs)                                        # line 10      (B, 2G)
        reward, valid = rewards(similarity, torch.zeros_like(answer) if args.no_answer_reward else answer)
        if D and args.no_teacher_rollouts:
            valid &= is_student
        advantage = advantages(reward, valid, divide_by_std=args.loss == "grpo")             # line 10      (B, 2G)
        with meter.phase("update"):                                                          # lines 11-13, Eq. 2
            row |= update_policy(policy, reference, optimizer, prompts, outputs, advantage, valid, args)

        row |= step_metrics(outputs, sources, similarity, answer, reward, valid, args, meter)
        if held_out and (step == 0 or (step + 1) % args.eval_every == 0):
            row["heldout_accuracy"] = evaluate(policy, held_out, judge, args.max_new_tokens)["accuracy"]
        print(json.dumps(row), file=metrics_file, flush=True)
        tqdm.write(console_line(row))
        if step % args.log_every == 0 or step == args.steps - 1:
            log_rollouts(rollouts_file, step, batch, outputs, sources, p_student, answer, reward, advantage)


def step_metrics(outputs: Outputs, sources: list[list[str]], similarity: Tensor, answer: Tensor, reward: Tensor,
                 valid: Tensor, args, meter: Meter) -> dict:
    """The numbers of one step, by source where that says more. All are explained in the README."""
    flat, row = [s for row in sources for s in row], {}
    for source in sorted(set(flat)):
        chosen = torch.tensor([s == source for s in flat], device=reward.device).view(reward.shape)
        row[f"similarity/{source}"] = similarity[chosen].mean().item()
        row[f"answer/{source}"] = answer[chosen].nanmean().item()
    of_students = outputs.mask[:, :args.num_samples]
    low = reward.masked_fill(~valid, torch.inf).amin(1)            # a group with low >= high has no gradient
    tokens = of_students.sum().item()
    return row | {
        "judge_failed": answer.isnan().float().mean().item(),
        "equal_groups": (low >= reward.masked_fill(~valid, -torch.inf).amax(1)).float().mean().item(),
        "length": of_students.sum(2).float().mean().item(),
        "cut_off": (of_students.sum(2) == args.max_new_tokens).float().mean().item(),
        "tokens_per_second": tokens / meter.seconds["generate"],
        **{f"seconds/{name}": value for name, value in meter.seconds.items()},
        **{f"memory_gb/{name}": value for name, value in meter.memory_gb.items()}}


def console_line(row: dict) -> str:
    """One line a step, always as wide: what to watch while it runs."""
    def get(name):
        return f"{row[name]:5.2f}" if name in row else "    -"
    held_out = f"  held-out {row['heldout_accuracy']:.3f}" if "heldout_accuracy" in row else ""
    return (f"step {row['step'] + 1:5}  similar {get('similarity/student')}  right {get('answer/student')}  "
            f"D acc {get('d_accuracy')}  KL {row['kl']:7.4f}  |g| {row['grad_norm']:6.2f}  tokens {row['length']:5.1f}  "
            f"{sum(v for k, v in row.items() if k.startswith('seconds/')):5.2f} s{held_out}")


def log_rollouts(file, step: int, batch: list[Example], outputs: Outputs, sources, p_student: Tensor | None, answer: Tensor,
                 reward: Tensor, advantage: Tensor, questions: int = 4):
    """Write all responses to the first few questions of the batch to rollouts.jsonl, and show four of them."""
    for b, example in enumerate(batch[:questions]):
        for k, text in enumerate(outputs.text[b]):
            verdict = None if answer[b, k].isnan() else int(answer[b, k])
            row = {"step": step, "id": example.id, "image": list(example.images), "question": example.text,
                   "truth": example.answer, "source": sources[b][k], "text": text,
                   "p_student": None if p_student is None else round(p_student[b, k].item(), 4), "verdict": verdict,
                   "reward": reward[b, k].item(), "advantage": round(advantage[b, k].item(), 4)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if b == 0 and k % max(1, len(sources[b]) // 4) == 0:
                tqdm.write(f"    {row['question'][:36]:36} {row['source'][:12]:12} reward {row['reward']:.2f}  {text[:60]}")
    file.flush()


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
    # with the discriminator's prompt among them, its words become tokens too, and the prompt short
    texts = [text for e in examples for text in (e.text, e.answer)] + 50 * [eq1.SYSTEM, eq1.BEFORE + eq1.AFTER]
    random_weights = f"{folder}.random"
    shutil.rmtree(random_weights, ignore_errors=True)
    build_tiny_vlm(random_weights, family, texts, width, layers=2, vocabulary=600, seed=args.seed)
    vlm = load_vlm(random_weights, args.device, args.dtype)
    shutil.rmtree(random_weights)
    sft(vlm, examples, steps, args.sft_batch_size, lr, args.seed, folder.name)
    save_vlm(vlm, str(folder))


def claim_folder(out: Path, args):
    """Make `out` this run's folder, or refuse: a folder holds one run, and its stages belong to one set of settings."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device")}
    path = out / "settings.json"                                   # without it, stages copied from elsewhere are taken over
    if path.exists():
        there = json.loads(path.read_text())
        if differ := sorted(k for k in settings.keys() | there.keys() if settings.get(k) != there.get(k)):
            what = ", ".join(f"--{k.replace('_', '-')} {there.get(k)} there, {settings.get(k)} here" for k in differ)
            raise UserError(f"{out} belongs to a run with other settings ({what}); choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from error


def discriminator_of(policy: VLM, examples: list[Example], collection: Collection, args, out: Path) -> Discriminator:
    """D as pre-trained for this student; trained now if that was not done before."""
    torch.manual_seed(args.seed)                                   # before D: its head is drawn at random
    D, path = Discriminator(policy), out / "discriminator.safetensors"
    if not path.exists():
        questions = max(1, args.batch_size * args.num_samples // args.collect)               # as many rows as in the loop
        pairs = pretraining_pairs(policy, examples, collection, args.collect, questions, sampling_of(args),
                                  random.Random(args.seed))
        eq1.pretrain(D, pairs, args.discriminator_steps, args.pretrain_lr)
        save_file(D.state_dict(), f"{path}.unfinished")
        Path(f"{path}.unfinished").rename(path)
    D.load_state_dict(load_file(path, device=str(policy.device)))
    return D


def report(out: Path, args, results: dict[str, dict]):
    """curves.png and report.html from what the run has left in its folder, and the table on the console."""
    metrics = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    draw_curves(metrics, str(out / "curves.png"))
    write_report(out, vars(args), results, [row for _, row in read_jsonl(out / "rollouts.jsonl")])
    if results:
        print(results_table(results))
    print(f"The trained student is {out / 'student'}; open {out / 'report.html'}")


# ---------------------------------------------------------------------------------------------- command line


# Defaults, in one place. A named student gets the paper's; the toy gets what a tiny model needs to learn in minutes.
PAPER = dict(sft_steps=0, sft_lr=1e-5, sft_batch_size=64, collect=16, discriminator_steps=278, pretrain_lr=1e-5,
             num_samples=4, mu=1, eps=0.2, beta=0.01, steps=1000, batch_size=4, accumulate=36, lr=1e-6, warmup=0,
             discriminator_lr=1e-6, max_new_tokens=256, eval_every=100, log_every=10, teacher_steps=0)
TOY = PAPER | dict(sft_steps=800, sft_lr=1e-3, collect=8, discriminator_steps=60, pretrain_lr=2e-4, steps=160,
                   batch_size=64, accumulate=1, lr=4e-4, warmup=32, discriminator_lr=4e-4, max_new_tokens=24,
                   eval_every=20, log_every=10, teacher_steps=600)


def parse_args(argv=None):
    """The command line. Where help names no default, PAPER and TOY have it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    group = parser.add_argument_group("models and data")
    group.add_argument("--student", default="toy", help="checkpoint folder or hub id, or toy: a tiny one, from nothing")
    group.add_argument("--teachers", nargs="+", default=[], help="checkpoint folders or hub ids that fill the collection")
    group.add_argument("--collection", help="JSONL of responses made elsewhere, instead of teachers")
    group.add_argument("--judge", choices=list(JUDGES), default="rule", help="who decides what is right")
    group.add_argument("--data", help="JSONL of questions to train on; default, for the toy student: the toy world")
    group.add_argument("--sft-data", help="JSONL of examples to fine-tune on first; default, for the toy student: --data")
    group.add_argument("--eval-data", help="JSONL of held-out questions")
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
    group.add_argument("--batch-size", type=int, help="questions per micro-batch")
    group.add_argument("--accumulate", type=int, help="micro-batches per step")
    group.add_argument("--lr", type=float, help="learning rate of the student")
    group.add_argument("--warmup", type=int, help="steps in which the student's learning rate rises from nothing")
    group.add_argument("--discriminator-lr", type=float, help="learning rate of D")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on the CPU")
    group.add_argument("--eval-every", type=int, help="steps between held-out accuracies")
    group.add_argument("--log-every", type=int, help="steps between printed samples")
    add_sampling_options(parser)
    student = parser.parse_known_args(argv)[0].student
    parser.set_defaults(**(TOY if student == "toy" else PAPER))
    args = parser.parse_args(argv)
    for name in ("num_samples", "mu", "batch_size", "accumulate", "collect", "max_new_tokens", "eval_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.student != "toy" and not args.data:
        parser.error("--data is needed for a named student")
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
    given = {name: load_examples(path) for name in ("data", "sft_data", "eval_data") if (path := getattr(args, name))}
    processors = [load_processor(path) for path in args.teachers + [args.student] * (args.student != "toy")]
    if args.collection:                                            # bad input is found before anything is written
        Collection(args.collection, given["data"], image_tokens(processors[-1]) if processors else frozenset())
    claim_folder(out, args)
    clock = Meter(pick_device(args.device))

    # 1. questions, and someone to answer them
    sources, teachers = given, args.teachers
    if args.student == "toy" and not args.data:
        with clock.phase("toy world and its teachers"):
            files = prepare_toy_world(out, args)
        sources = {"data": load_examples(files["train"]), "sft_data": load_examples(files["sft"]),
                   "eval_data": load_examples(files["heldout"])} | given
        teachers = teachers or [str(out / "teachers" / name) for name in ("qwen", "internvl")]
    examples, held_out, judge = sources["data"], sources.get("eval_data", []), JUDGES[args.judge]

    # 2. SFT of the student
    started = out / "sft"                                          # the warm start: reference, and first policy
    with clock.phase("SFT"):
        if args.student == "toy" and not started.exists():
            sft_examples = sources.get("sft_data", examples)
            tiny_vlm_from_nothing(started, "qwen2_5_vl", sft_examples, 64, args.sft_steps, args.sft_lr, args)
        elif args.sft_steps and not started.exists():
            student = load_vlm(args.student, args.device, args.dtype)
            sft(student, sources["sft_data"], args.sft_steps, args.sft_batch_size, args.sft_lr, args.seed, "student")
            save_vlm(student, str(started))
    start = str(started) if started.exists() else args.student

    # 3. the teachers' responses, then the discriminator, then the loop
    collection = D = None
    if args.algorithm == "ril":
        path = Path(args.collection or out / "collection.jsonl")
        with clock.phase("collection"):
            if not args.collection:
                fill_collection(path, teachers, examples, args.collect, sampling_of(args), args.seed, device=args.device,
                                dtype=args.dtype)
            collection = Collection(path, examples, image_tokens(load_processor(start)))
        if collection.unfinished:
            print(f"{path}: {collection.unfinished} responses were cut off by a token limit and are left out")
    if not (out / "student").exists():
        policy = load_vlm(start, args.device, args.dtype)
        if collection:
            with clock.phase("discriminator"):
                D = discriminator_of(policy, examples, collection, args, out)
        with clock.phase("loop"):
            ril(policy, examples, collection, D, judge, held_out, args, out)
            save_vlm(policy, str(out / "student"))

    # 4. before and after
    results = {}
    if held_out:
        for name, path in (("before", start), ("after", out / "student")):
            if not (saved := out / f"evaluation-{name}.json").exists():
                result = evaluate(load_vlm(str(path), args.device, args.dtype), held_out, judge, args.max_new_tokens)
                saved.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
            results[name] = json.loads(saved.read_text(encoding="utf-8"))
    report(out, args, results)
    print("; ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items()),
          f"; peak memory {peak_memory_gb(clock.device):.2f} GB", sep="")


if __name__ == "__main__":
    run(main)
