"""The discriminator of Eq. 1: did the student write this, or a teacher?

    max_phi  1/N sum_i [ log D(q, o_i^student) + log(1 - D(q, o_i^teacher)) ]                      (Eq. 1)

D is the student's own language backbone, copied with its weights, whose vocabulary head (d x V) is replaced
by a linear head (d x 1) on the last layer's state at the final token. It reads the response alone, no image
and no question (Fig. 3), so it can only judge how something is said; whether it is true is the judge's
business. Its output is p_student, the probability that the student wrote the text, and a response earns the
similarity reward where p_student < 0.5.

(One sentence of the paper's section 4.1 has the labels the other way round. Eq. 1, Fig. 3 and the reward
agree with one another, and are what is implemented: student = 1, teacher = 0.)

How this differs from the paper: equal responses are read once, and many responses share one packed row,
because the text before a response is always the same. Neither changes a number.
"""
import copy

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import (VLM, Outputs, Prompt, as_outputs, micro_batches, needs_bos, opened_thought, packed_states,
                   render, row_states, without_thoughts)

SYSTEM = ("You are a discriminator. Inside a <response> tag stands a response to a question about an image. "
          "It was written by a teacher, a large model, or by a student, a small one: 0 means teacher, 1 "
          "means student.")
BEFORE, AFTER = "Who wrote this response? Answer 0 or 1.\n<response>", "</response>"

# What of p_student becomes the similarity reward, in [0, 1]. The paper's choice is binary, 1[D(q, o) < 0.5];
# the others are those of its ablation, and grade 1 - p_student: in three levels, in tenths, or not at all.
SIMILARITIES = {
    "binary": lambda p_student: (p_student < 0.5).float(),
    "ternary": lambda p_student: ((1 - p_student) * 2).round() / 2,
    "tenths": lambda p_student: ((1 - p_student) * 10).round() / 10,
    "continuous": lambda p_student: 1 - p_student,
}


def discriminator_loss(logits: Tensor, is_student: Tensor) -> Tensor:
    """Eq. 1, negated: logits (B, K), is_student (B, K) bool -> scalar. Each side has its own mean."""
    log_d_student = nn.functional.logsigmoid(logits[is_student])               # log D(o^student)
    log_not_d_teacher = nn.functional.logsigmoid(-logits[~is_student])         # log (1 - D(o^teacher))
    return -(log_d_student.mean() + log_not_d_teacher.mean())


def around_response(processor) -> list[str]:
    """What D reads before a response and after it; UserError where a template has no system turn."""
    marker = "[the response]"
    turns = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
             {"role": "user", "content": [{"type": "text", "text": BEFORE + marker + AFTER}]}]
    return render(processor, turns, add_generation_prompt=True).split(marker)


class Discriminator(nn.Module):
    """D_phi: p_student of a text. It is made from the student, whose tokenizer and chat template it uses."""

    def __init__(self, student: VLM):
        super().__init__()
        self.tokenizer = student.tokenizer
        self.backbone = copy.deepcopy(student.model.get_decoder())
        self.packs = student.packs
        width = student.model.get_output_embeddings().in_features
        self.head = nn.Linear(width, 1, device=student.device)     # float32, also beside a bfloat16 backbone
        before, after = around_response(student.processor)
        bos = needs_bos(self.tokenizer, before)
        self.before = self.tokenizer(before, add_special_tokens=bos).input_ids
        self.after = self.tokenizer(after, add_special_tokens=False).input_ids
        self.thinks = bool(opened_thought(student.processor))

    def encode(self, questions: list[str], texts: list[list[str]]) -> Outputs:
        """B lists of K responses as tokens, with the text after each. (The B questions are not read: the
        paper's D sees the response alone. GAD's reads both, see tests/forks/gad.diff.)

        Of a student whose prompts open a thought, D reads what comes after it: teachers' texts have none.
        Responses are read as plain text: none can spell a special token and so leave its place in the prompt.
        """
        every = [text for row in texts for text in row]
        every = [without_thoughts(text) for text in every] if self.thinks else every
        rows = self.tokenizer(every, add_special_tokens=False, split_special_tokens=True).input_ids
        device = self.head.weight.device
        return as_outputs(texts, [torch.tensor(row + self.after, device=device) for row in rows])

    def plain_logit(self, ids: Tensor) -> Tensor:
        """What D is: the logit of p_student of one response, ids (r,) -> scalar. `logits` has the same."""
        tokens = torch.cat([torch.tensor(self.before, device=ids.device), ids])              # (F + r,)
        states = self.backbone(input_ids=tokens[None]).last_hidden_state                     # (1, F + r, d)
        return self.head(states[0, -1].float())[0]

    def logits(self, responses: Outputs) -> Tensor:
        """Logits of p_student, (B, K) float32, computed in packed rows. Of N = 5 distinct responses, n = 2:

            before | o_1 | o_2          `before`, F tokens, is always the same, so it is read once a row;
            before | o_3 | o_4          each o ends with `after`, and the state of its last token gives its
            before | o_5 |  -           logit, which equal responses share

        n responses of r tokens take F + n r tokens in one row, and not n (F + r). n is such that n r = 3 F: a
        longer row would save no more than a quarter, and compare every token with more others.
        """
        padded = torch.where(responses.mask, responses.ids, -1).flatten(0, 1)                # (B K, R)
        ids, which = padded.unique(dim=0, return_inverse=True)     # (N, R): D reads equal responses once
        mask, F = ids >= 0, len(self.before)
        n = 3 * F * len(ids) // int(mask.sum())                    # 3 F / (mean length of a response)
        n = min(max(1, n), len(ids))
        rows = -(-len(ids) // n)                                   # N / n, rounded up
        missing = rows * n - len(ids)                              # how many the last row has fewer
        ids, mask = (nn.functional.pad(x, (0, 0, 0, missing)).unflatten(0, (rows, n)) for x in (ids, mask))

        prompt = Prompt(torch.tensor(self.before), {}, torch.arange(F)[None])
        states_of = packed_states if self.packs else row_states
        states, at, _ = states_of(self.backbone, [prompt] * rows, ids, mask)                 # (T, d)
        # where each response ends: of lengths 2 and 3, whose tokens are at[0:2] and at[2:5], at[1] and at[4]
        lengths = mask.flatten(0, 1).sum(1)                        # (rows n,), 0 for those missing
        final = at[lengths.cumsum(0)[:rows * n - missing] - 1]     # (N,)
        logits = self.head(states[final].float())[:, 0]            # (N,)
        return logits[which.view(responses.mask.shape[:2])]

    @torch.no_grad()
    def p_student(self, responses: Outputs, budget: int, world) -> Tensor:
        """(B, K) probabilities that the student wrote each response, `budget` tokens at a time in each of
        the processes."""
        logits = torch.empty(responses.mask.shape[:2], device=responses.mask.device)
        for part, _ in world.even(self.parts(responses, budget)):
            logits[part] = self.logits(responses[part])
        return logits.sigmoid()

    def parts(self, responses: Outputs, budget: int) -> list[list[int]]:
        """Groups of questions whose responses have up to `budget` tokens (unpacked: with `before`)."""
        sizes = responses.mask.sum(2) + (0 if self.packs else len(self.before))              # (B, K)
        return micro_batches(sizes.sum(1).tolist(), budget)


def update(D: Discriminator, optimizer, responses: Outputs, is_student: Tensor, budget: int,
           questions: int | None = None) -> dict[str, float]:
    """One step of Eq. 1 (line 8 of Algorithm 2) on responses (B, K), `budget` tokens at a time.

    Every question has as many of each side, so the gradients of the parts add up to that of the batch.
    questions: how many all processes have together. Returns loss and accuracy before the step. Line 10 wants
    p_student of the D that comes out, so this pass cannot serve it: there is a second one, forward only.
    """
    questions = questions or len(is_student)
    loss, right = torch.zeros(2, device=is_student.device)
    for part, weight in optimizer.world.even(D.parts(responses, budget)):
        logits, label = D.logits(responses[part]), is_student[part]
        share = weight * discriminator_loss(logits, label) * len(label) / questions
        share.backward()
        loss += share.detach()
        right += weight * ((logits > 0) == label).sum()
    optimizer.step()
    loss, right = optimizer.world.sum(torch.stack([loss, right])).tolist()
    return {"d_loss": loss, "d_accuracy": right / (questions * is_student.shape[1])}


def pretrain(D: Discriminator, optimizer, batches, steps: int, lr: float, budget: int, size: int) -> float:
    """Teach D before it rewards anyone: `steps` updates of Eq. 1, lr decayed linearly to lr / 10.

    batches: an iterator over (questions, texts, is_student), this process's part of `size` questions. Returns
    the accuracy over the last tenth of the steps.
    """
    bar, accuracies = tqdm(range(steps), desc="discriminator", unit="step"), []
    for step in bar:
        optimizer.set_lr(lr * (1 - 0.9 * step / steps))
        questions, texts, is_student = next(batches)
        metrics = update(D, optimizer, D.encode(questions, texts), is_student, budget, size)
        accuracies.append(metrics["d_accuracy"])
        bar.set_postfix_str(f"loss {metrics['d_loss']:.3f} accuracy {metrics['d_accuracy']:.2f}",
                            refresh=False)
    last = accuracies[-max(1, steps // 10):]
    return sum(last) / len(last) if last else float("nan")
