"""The discriminator of Eq. 1: was this written by the student, or by a teacher?

    max_phi  1/G sum_i [ log D(o_i^student) + log(1 - D(o_i^teacher)) ]                            (Eq. 1)

D is a copy of the student's own language backbone, in which a linear head (d x 1) replaces the vocabulary
head (d x V). The head reads the last layer's state at the last token of D's prompt, where D's answer would
begin. The sigmoid of its output is p_student, the probability that the student wrote the text. A response
earns the similarity reward if p_student < 0.5.

The paper writes D(q, o), but its D sees the response alone, neither image nor question (Fig. 3). So D can
only judge how something is said; whether it is true is the judge's business. One sentence of the paper's
section 4.1 has the labels the other way round. Eq. 1, Fig. 3 and the reward agree with one another, and we
follow them: student = 1, teacher = 0.

Identical responses are read once and counted as often as they occur. Many responses share one packed row,
because the text in front of a response is always the same. Neither changes a number.
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

# How p_student becomes the similarity reward, in [0, 1]. The paper's choice is binary, 1[D(o) < 0.5]. The
# others come from its ablation and grade 1 - p_student: in three levels, in tenths, or continuously.
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
    """What D reads before and after a response. UserError if the chat template has no system turn."""
    marker = "[the response]"
    turns = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
             {"role": "user", "content": [{"type": "text", "text": BEFORE + marker + AFTER}]}]
    return render(processor, turns, add_generation_prompt=True).split(marker)


class Discriminator(nn.Module):
    """D_phi: text -> p_student. It is built from the student, and uses its tokenizer and chat template."""

    def __init__(self, student: VLM):
        super().__init__()
        self.tokenizer = student.tokenizer
        self.backbone = copy.deepcopy(student.model.get_decoder())
        self.packs = student.packs
        width = student.model.get_output_embeddings().in_features
        self.head = nn.Linear(width, 1, device=student.device)     # float32, even on a bfloat16 backbone
        before, after = around_response(student.processor)
        bos = needs_bos(self.tokenizer, before)
        self.prompt_start = self.tokenizer(before, add_special_tokens=bos).input_ids
        self.prompt_end = self.tokenizer(after, add_special_tokens=False).input_ids
        self.thinks = bool(opened_thought(student.processor))

    def encode(self, questions: list[str], texts: list[list[str]]) -> Outputs:
        """Tokenize B lists of K responses, each with the text that closes D's prompt (`prompt_end`).

        The B questions are unused: the paper's D sees the response alone. They are here for forks (GAD's D
        reads both, see tests/forks/gad.diff). If the student's prompts open a thought, D reads only what
        follows the thought, as teachers' texts have none. Responses are tokenized as plain text, so none can
        spell a special token and break out of its place in the prompt.
        """
        every = [text for row in texts for text in row]
        every = [without_thoughts(text) for text in every] if self.thinks else every
        rows = self.tokenizer(every, add_special_tokens=False, split_special_tokens=True).input_ids
        device = self.head.weight.device
        return as_outputs(texts, [torch.tensor(row + self.prompt_end, device=device) for row in rows])

    def plain_logit(self, ids: Tensor) -> Tensor:
        """D's definition: one response of `encode`, ids (r,) -> its logit. `logits` computes the same."""
        tokens = torch.cat([torch.tensor(self.prompt_start, device=ids.device), ids])        # (F + r,)
        states = self.backbone(input_ids=tokens[None]).last_hidden_state                     # (1, F + r, d)
        return self.head(states[0, -1].float())[0]

    def logits(self, responses: Outputs) -> Tensor:
        """Logits of p_student, (B, K) float32, in packed rows. N = 5 distinct responses, n = 2 to a row:

            start | o_1 | o_2          `prompt_start` (F tokens) is always the same, so a row reads it once.
            start | o_3 | o_4          Each o ends with `prompt_end`; the state at its last token gives its
            start | o_5 |  -           logit. Identical responses share a logit.

        A row of n responses with r tokens each takes F + n r tokens instead of n (F + r). We choose n so that
        n r = 3 F. Then `start` is a quarter of a row, the most that longer rows could save, while in those
        every token attends to more others.
        """
        padded = torch.where(responses.mask, responses.ids, -1).flatten(0, 1)                # (B K, R)
        ids, which = padded.unique(dim=0, return_inverse=True)     # (N, R): identical responses once
        mask, N, F = ids >= 0, len(ids), len(self.prompt_start)
        n = 3 * F * N // int(mask.sum())                           # 3 F / (mean length of a response)
        n = min(max(1, n), N)
        rows = -(-N // n)                                          # N / n, rounded up
        empty = rows * n - N                                       # places in the last row
        ids, mask = (nn.functional.pad(x, (0, 0, 0, empty)).unflatten(0, (rows, n)) for x in (ids, mask))

        prompt = Prompt(torch.tensor(self.prompt_start), {}, torch.arange(F)[None])
        states_of = packed_states if self.packs else row_states
        # states of all tokens (T, d), and the indices of all response tokens among them, in order
        states, at, _ = states_of(self.backbone, [prompt] * rows, ids, mask)
        # The last token of each response. Example: lengths 2 and 3 occupy at[0:2] and at[2:5], so they end
        # at at[1] and at[4].
        lengths = mask.flatten(0, 1).sum(1)                        # (rows n,), 0 for empty places
        final = at[lengths.cumsum(0)[:N] - 1]                      # (N,)
        logits = self.head(states[final].float())[:, 0]            # (N,)
        return logits[which.view(responses.mask.shape[:2])]

    @torch.no_grad()
    def p_student(self, responses: Outputs, budget: int, world) -> Tensor:
        """Probabilities (B, K) that the student wrote each response, `budget` tokens at a time. Line 10 needs
        them from the updated D, so this is another, forward-only pass."""
        logits = torch.empty(responses.mask.shape[:2], device=responses.mask.device)
        for part, _ in world.even(self.parts(responses, budget)):
            logits[part] = self.logits(responses[part])
        return logits.sigmoid()

    def parts(self, responses: Outputs, budget: int) -> list[list[int]]:
        """Questions in groups whose responses have up to `budget` tokens (with `start`, if unpacked)."""
        sizes = responses.mask.sum(2) + (0 if self.packs else len(self.prompt_start))              # (B, K)
        return micro_batches(sizes.sum(1).tolist(), budget)


def update_discriminator(D: Discriminator, optimizer, responses: Outputs, is_student: Tensor, budget: int,
                         num_questions: int | None = None) -> dict[str, float]:
    """One step of Eq. 1 (line 8 of Algorithm 2) on responses (B, K), `budget` tokens at a time.

    Every question has equally many responses of each side, so the gradients of the parts add up to the
    batch's. num_questions: B summed over all processes. optimizer.step sums the gradients over processes and
    frees them. Returns loss and accuracy before the step.
    """
    num_questions = num_questions or len(is_student)
    loss, right = torch.zeros(2, device=is_student.device)         # two scalars
    for part, weight in optimizer.world.even(D.parts(responses, budget)):
        logits, label = D.logits(responses[part]), is_student[part]
        share = weight * discriminator_loss(logits, label) * len(label) / num_questions
        share.backward()
        loss += share.detach()
        right += weight * ((logits > 0) == label).sum()
    optimizer.step()
    loss, right = optimizer.world.all_reduce(torch.stack([loss, right])).tolist()
    return {"d_loss": loss, "d_accuracy": right / (num_questions * is_student.shape[1])}


def pretrain_discriminator(D: Discriminator, optimizer, batches, steps: int, lr: float, budget: int,
                           size: int):
    """Teach D before it rewards anyone: `steps` updates of Eq. 1, lr decayed linearly to lr / 10.

    batches: an iterator over (questions, texts, is_student), this process's share of `size` questions.
    """
    bar = tqdm(range(steps), desc="discriminator", unit="step")
    for step in bar:
        optimizer.set_lr(lr * (1 - 0.9 * step / steps))
        questions, texts, is_student = next(batches)
        metrics = update_discriminator(D, optimizer, D.encode(questions, texts), is_student, budget, size)
        bar.set_postfix_str(f"loss {metrics['d_loss']:.3f} accuracy {metrics['d_accuracy']:.2f}",
                            refresh=False)
