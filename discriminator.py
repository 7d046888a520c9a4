"""The discriminator of Eq. 1: did the student write this, or a teacher?

    max_phi  1/N sum_i [ log D(q, o_i^student) + log(1 - D(q, o_i^teacher)) ]                               (Eq. 1)

D is the student's own language backbone, copied with its weights, whose vocabulary head (d x V) is replaced by a linear
head (d x 1) on the last layer's state at the final token. It reads the response alone, no image and no question (Fig. 3),
so it can only judge how something is said; whether it is true is the judge's business. Its output is p_student, the
probability that the student wrote the text, and the student earns the similarity reward where p_student < 0.5.

(One sentence of the paper's section 4.1 has the labels the other way round. Eq. 1, Fig. 3 and the reward agree with one
another, and are what is implemented: student = 1, teacher = 0.)

All responses to a question are scored in one packed row, like the policy's: the text before the response is the same
for all, so it is the shared prefix, and each response with the text after it is a branch.
"""
import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import VLM, needs_bos, packed_states, render

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

    def forward(self, texts: list[list[str]]) -> Tensor:
        """Logits of p_student, (B, K) float32, for B lists of K responses.

        Responses are read as plain text: none can spell a special token and so leave its place in the prompt.
        """
        device = self.head.weight.device
        rows = self.tokenizer(sum(texts, []), add_special_tokens=False, split_special_tokens=True).input_ids
        branches = [torch.tensor(row + self.after, device=device) for row in rows]
        mask = pad_sequence([torch.ones_like(b, dtype=torch.bool) for b in branches], batch_first=True)
        B, K = len(texts), len(texts[0])
        ids, mask = pad_sequence(branches, batch_first=True).unflatten(0, (B, K)), mask.unflatten(0, (B, K))
        prefix = torch.tensor(self.before, device=device).expand(B, -1)
        batch = {"input_ids": prefix, "mask": torch.ones_like(prefix, dtype=torch.bool), "images": {},
                 "position_ids": torch.arange(prefix.shape[1], device=device).expand(B, -1)}
        _, states = packed_states(self.backbone, batch, ids, mask)                           # (B, K, R, d)
        final = mask.sum(2, keepdim=True)[..., None].expand(-1, -1, -1, states.shape[-1]) - 1
        return self.head(states.gather(2, final).squeeze(2).float()).squeeze(-1)             # (B, K)

    @torch.no_grad()
    def p_student(self, texts: list[list[str]], rows: int) -> Tensor:
        """(B, K) probabilities that the student wrote each text, computed `rows` responses at a time."""
        size = max(1, rows // len(texts[0]))
        return torch.cat([self(texts[i:i + size]) for i in range(0, len(texts), size)]).sigmoid()


def discriminator_loss(logits: Tensor, is_student: Tensor) -> Tensor:
    """Eq. 1, negated: logits (B, K), is_student (B, K) bool -> scalar. Each side is averaged by itself."""
    return -(nn.functional.logsigmoid(logits[is_student]).mean()               # log D(o^student)
             + nn.functional.logsigmoid(-logits[~is_student]).mean())          # log (1 - D(o^teacher))


def update(discriminator: Discriminator, optimizer, texts: list[list[str]], is_student: Tensor,
           rows: int) -> dict[str, float]:
    """One step of Eq. 1 (line 8 of Algorithm 2) on B lists of K responses, `rows` responses at a time. Every list has as
    many responses of each side, so the parts' gradients add up to the whole's. Returns loss and accuracy before it."""
    size, loss, right = max(1, rows // len(texts[0])), 0.0, 0.0
    for i in range(0, len(texts), size):
        logits, label = discriminator(texts[i:i + size]), is_student[i:i + size]
        part = discriminator_loss(logits, label) * len(label) / len(texts)
        part.backward()
        loss, right = loss + part.item(), right + ((logits > 0) == label).sum().item()
    optimizer.step()
    optimizer.zero_grad()
    return {"d_loss": loss, "d_accuracy": right / is_student.numel()}


def pretrain(discriminator: Discriminator, optimizer, batches, steps: int, lr: float, rows: int):
    """Teach D before it rewards anyone: `steps` updates of Eq. 1 on (texts, is_student) batches, lr decayed to lr / 10.

    Returns the accuracy over the last tenth of the steps.
    """
    bar, accuracies = tqdm(range(steps), desc="discriminator", unit="step"), []
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.9 * step / steps)
        metrics = update(discriminator, optimizer, *next(batches), rows)
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
