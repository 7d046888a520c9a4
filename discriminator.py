"""The discriminator of Eq. 1: did the student write this, or a teacher?

    max_phi  1/N sum_i [ log D(q, o_i^student) + log(1 - D(q, o_i^teacher)) ]                               (Eq. 1)

D is the student's own language backbone, copied with its weights, whose vocabulary head (d x V) is replaced by a linear
head (d x 1) on the last layer's state at the final token. It reads the response alone, no image and no question (Fig. 3),
so it can only judge how something is said; whether it is true is the judge's business. Its output is p_student, the
probability that the student wrote the text, and the student earns the similarity reward where p_student < 0.5.

(One sentence of the paper's section 4.1 has the labels the other way round. Eq. 1, Fig. 3 and the reward agree with one
another, and are what is implemented: student = 1, teacher = 0.)

Responses are scored in packed rows, like the policy's: the text before a response is the same for all, whatever the
question, so it is the shared prefix of the row, and each response with the text after it is a branch.
"""
import copy

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import VLM, Outputs, Prompt, as_outputs, micro_batches, needs_bos, packed_states, render

SYSTEM = ("You are a discriminator. Inside a <response> tag stands a response to a question about an image. It was "
          "written by a teacher, a large model, or by a student, a small one: 0 means teacher, 1 means student.")
BEFORE, AFTER = "Who wrote this response? Answer 0 or 1.\n<response>", "</response>"


class Discriminator(nn.Module):
    """D_phi: p_student of a text. Made from the student (a VLM), whose tokenizer and chat template it uses."""

    def __init__(self, student: VLM):
        super().__init__()
        self.tokenizer = student.tokenizer
        self.backbone = copy.deepcopy(student.model.get_decoder())
        width = student.model.get_output_embeddings().in_features
        self.head = nn.Linear(width, 1, device=student.device)     # float32, also beside a bfloat16 backbone
        marker = "[the response]"
        turns = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
                 {"role": "user", "content": [{"type": "text", "text": BEFORE + marker + AFTER}]}]
        text = render(student.processor, turns, add_generation_prompt=True)
        before, after = text.split(marker)
        self.before = self.tokenizer(before, add_special_tokens=needs_bos(self.tokenizer, before)).input_ids
        self.after = self.tokenizer(after, add_special_tokens=False).input_ids

    def encode(self, texts: list[list[str]]) -> Outputs:
        """B lists of K responses as tokens, each with the text that stands after it.

        They are read as plain text: none can spell a special token and so leave its place in the prompt.
        """
        rows = self.tokenizer(sum(texts, []), add_special_tokens=False, split_special_tokens=True).input_ids
        return as_outputs(texts, [torch.tensor(row + self.after, device=self.head.weight.device) for row in rows])

    def logits(self, responses: Outputs) -> Tensor:
        """Logits of p_student, (B, K) float32.

        D reads nothing but the response, so equal responses are computed once; and as the F tokens before a response are
        always the same, n responses of r tokens share them in one packed row of F + n r tokens instead of n (F + r).
        n r = 3 F: a longer row would save no more than a quarter, and compare every token with more others.
        """
        ids, which = torch.where(responses.mask, responses.ids, -1).flatten(0, 1).unique(dim=0, return_inverse=True)
        mask, F = ids >= 0, len(self.before)                       # (N, R), N different responses
        n = min(len(ids), max(1, 3 * F * len(ids) // int(mask.sum())))
        rows = -(-len(ids) // n)
        packed = [torch.nn.functional.pad(x, (0, 0, 0, rows * n - len(ids))).unflatten(0, (rows, n)) for x in (ids, mask)]
        prompt = Prompt(torch.tensor(self.before), {}, torch.arange(F)[None])
        states, at, _ = packed_states(self.backbone, [prompt] * rows, *packed)
        final = at[mask.sum(1).cumsum(0) - 1]                      # (N,)
        return self.head(states[final].float())[which].view(responses.mask.shape[:2])

    @torch.no_grad()
    def p_student(self, responses: Outputs, budget: int) -> Tensor:
        """(B, K) probabilities that the student wrote each response, computed `budget` tokens at a time."""
        return torch.cat([self.logits(responses[part]) for part in parts_of(responses, budget)]).sigmoid()


def parts_of(responses: Outputs, budget: int) -> list[slice]:
    """Runs of questions whose responses have up to `budget` tokens."""
    return micro_batches(responses.mask.sum((1, 2)).tolist(), budget)


def discriminator_loss(logits: Tensor, is_student: Tensor) -> Tensor:
    """Eq. 1, negated: logits (B, K), is_student (B, K) bool -> scalar. Each side is averaged by itself."""
    return -(nn.functional.logsigmoid(logits[is_student]).mean()               # log D(o^student)
             + nn.functional.logsigmoid(-logits[~is_student]).mean())          # log (1 - D(o^teacher))


def update(discriminator: Discriminator, optimizer, responses: Outputs, is_student: Tensor, budget: int,
           questions: int | None = None) -> dict[str, float]:
    """One step of Eq. 1 (line 8 of Algorithm 2) on responses (B, K), `budget` tokens at a time. Every question has as many
    of each side, so the parts' gradients add up to the whole's. A gradient that is not finite is not followed. `questions`:
    how many all processes have together. Returns loss and accuracy before the step, and whether it was skipped.

    Line 10 wants p_student of the D that comes out, so this pass cannot serve it: there is a second, forward only.
    """
    loss = right = 0.0
    for part in parts_of(responses, budget):
        logits, label = discriminator.logits(responses[part]), is_student[part]
        share = discriminator_loss(logits, label) * len(label) / (questions or len(is_student))
        share.backward()
        loss, right = loss + share.detach(), right + ((logits > 0) == label).sum()
    finite = optimizer.reduce(discriminator.parameters()).isfinite()
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    loss, right = optimizer.world.sum(torch.stack([loss, right / is_student.shape[1]])).tolist()
    return {"d_loss": loss, "d_accuracy": right / (questions or len(is_student)), "d_skipped": int(not finite)}


def pretrain(discriminator: Discriminator, optimizer, batches, steps: int, lr: float, budget: int):
    """Teach D before it rewards anyone: `steps` updates of Eq. 1 on (texts, is_student) batches, lr decayed to lr / 10.

    Returns the accuracy over the last tenth of the steps.
    """
    bar, accuracies = tqdm(range(steps), desc="discriminator", unit="step"), []
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.9 * step / steps)
        texts, is_student = next(batches)
        metrics = update(discriminator, optimizer, discriminator.encode(texts), is_student, budget)
        accuracies.append(metrics["d_accuracy"])
        bar.set_postfix_str(f"loss {metrics['d_loss']:.3f} accuracy {metrics['d_accuracy']:.2f}", refresh=False)
    last = accuracies[-max(1, steps // 10):]
    return sum(last) / len(last) if last else float("nan")


def similarity_reward(p_student: Tensor, kind: str = "binary") -> Tensor:
    """The reward for sounding like a teacher, in [0, 1], of the same shape: 1[D(q, o) < 0.5] in the paper's choice.

    The alternatives of its ablation grade 1 - p_student: in three levels {0, 0.5, 1}, in tenths, or not at all.
    """
    p_teacher = 1 - p_student
    return {"binary": (p_student < 0.5).float(), "ternary": (p_teacher * 2).round() / 2,
            "tenths": (p_teacher * 10).round() / 10, "continuous": p_teacher}[kind]
