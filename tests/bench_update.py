"""Forward and backward of Eq. 2: model.py's packed rows against one row per response with all logits, as most
code has it.

    python tests/bench_update.py                       60M Qwen2.5-VL: three minutes on two cores
    python tests/bench_update.py --full                the shape of Qwen2.5-VL-3B, bfloat16, for a GPU

2 questions (--full: 4) x 2G = 8 responses of 24 tokens; prompts of 221 tokens with a picture, then of 23
without, then responses of 8 to 24 tokens; each also with a --token-budget that cuts it in micro-batches. Loss
and gradient of both are compared first. "of matrix" is the model's arithmetic (6 FLOPs a weight and real
token of the packed row, the vocabulary head on response tokens only) over the rate of a large matrix product.
"""
import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from shapes import alternate, build, ceilings, data, give_back, peak_memory_gb, table
from model import encode_responses, load_vlm, micro_batches, row_sizes, score  # noqa: E402
from teachers import encode_example, load_examples  # noqa: E402
from train import LOSSES, policy_loss  # noqa: E402

K, R = 8, 24


def plain_logps(vlm, prompts, outputs):
    """Log-probs (B, K, R) with a row per response, padded to the longest, and all logits at once; prompts of
    one length."""
    B, R, ids = len(prompts), outputs.ids.shape[-1], outputs.ids.flatten(0, 1)
    ids = torch.cat([torch.stack([p.ids for p in prompts]).repeat_interleave(K, 0).to(vlm.device), ids], 1)
    attention = torch.nn.functional.pad(outputs.mask.flatten(0, 1), (ids.shape[1] - R, 0), value=True).long()
    images = {name: torch.cat([p.images[name] for p in prompts for _ in range(K)]).to(vlm.device)
              for name in prompts[0].images}
    if images:
        images["pixel_values"] = images["pixel_values"].to(vlm.model.dtype)
    logits = vlm.model(input_ids=ids, attention_mask=attention, **images,
                       mm_token_type_ids=(ids == vlm.model.config.image_token_id).int()).logits
    logps = logits[:, -R - 1:-1].float().log_softmax(-1).gather(2, ids[:, -R:, None])
    return logps.squeeze(2).view(B, K, R) * outputs.mask


def score_in_rows(vlm, prompts, outputs):
    return score(replace(vlm, packs=False), prompts, outputs)


def loss_of(logp, advantage, mask):
    valid = mask[..., 0]
    return policy_loss(logp, logp.detach(), logp.detach() - 0.1, advantage, mask, valid, valid, 0.2, 0.01,
                       LOSSES["dr_grpo"])


def update(vlm, logps, prompts, outputs, advantage, budget):
    """Gradients in place; the loss."""
    total = 0.0
    for part in micro_batches(row_sizes(True, prompts, outputs.mask), budget):
        logp = logps(vlm, [prompts[b] for b in part], outputs[part])
        loss = loss_of(logp, advantage[part], outputs.mask[part])
        loss.backward()
        total += loss.item()
    return total


def measure(folder, vlm, questions, rounds, product):
    """Rows of the table: the cases, by each code."""
    decoder = sum(w.numel() for w in vlm.model.get_decoder().layers.parameters())
    head = vlm.model.get_output_embeddings().weight.numel()
    tower = sum(w.numel() for w in vlm.model.model.visual.parameters())
    for case in ("picture", "text only", "text only, lengths 8-24"):
        data(folder, questions, R, image=case == "picture")
        prompts = [encode_example(vlm, e) for e in load_examples(str(folder / "data.jsonl"))]
        torch.manual_seed(0)
        outputs = encode_responses(vlm, [[" yes" * (R - 2)] * K] * questions)
        outputs.ids.random_(5, 300)
        if "lengths" in case:                        # what sampling gives: padding is left out of packed rows
            for i, mask in enumerate(outputs.mask.flatten(0, 1)):
                mask[8 + (5 * i) % 17:] = False
        advantage = torch.randn(questions, K, device=vlm.device)
        work = partial(update, vlm, prompts=prompts, outputs=outputs, advantage=advantage)
        arms = {"packed": partial(work, score, budget=10 ** 9),
                "packed, --token-budget 500": partial(work, score, budget=500),
                "rows, as for families that cannot be packed": partial(work, score_in_rows, budget=10 ** 9),
                "a row per response, all logits": partial(work, plain_logps, budget=10 ** 9)}
        held = compare(vlm, case, arms)
        times = alternate({name: lambda arm=arm: (arm(), vlm.model.zero_grad())
                           for name, arm in arms.items()}, rounds, vlm.device)
        patches = sum(len(p.images["pixel_values"]) for p in prompts if p.images)
        flops = 6 * (decoder * sum(row_sizes(True, prompts, outputs.mask)) + head * outputs.mask.sum().item()
                     + tower * patches)
        for name, took in times.items():
            yield (f"{case}, {questions} x {K}, prompt {len(prompts[0].ids)}", name,
                   f"{took:.2f}", f"{took / times['packed']:.1f}", f"{outputs.mask.sum().item() / took:.0f}",
                   f"{held[name]:.2f}", f"{held[name] / held['packed']:.1f}", f"{flops / took / product:.0%}")


def compare(vlm, case, arms):
    """Say how far losses and gradients are apart (on stderr); the peak GB of each."""
    gradients, losses, held = [], [], {}
    for name, work in arms.items():
        vlm.model.zero_grad()
        give_back()
        peak_memory_gb(vlm.device, reset=True)
        losses.append(work())
        held[name] = peak_memory_gb(vlm.device)
        gradients.append(vlm.model.get_input_embeddings().weight.grad.clone())
    vlm.model.zero_grad()
    error = max((g - gradients[-1]).abs().max() / gradients[-1].abs().max() for g in gradients).item()
    print(f"{case}: losses {losses}, largest difference of a gradient {error:.1e} of the largest gradient",
          file=sys.stderr, flush=True)
    return held


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, help="default 2, with --full 4")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    product, _ = ceilings(device, dtype)
    print(f"{product / 1e9:,.0f} GFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        build(folder := Path(folder), "3B" if args.full else "60M", dtype, device)
        vlm = load_vlm(str(folder), str(device), str(dtype).removeprefix("torch."))
        table(("case", "code", "seconds", "of packed", "response tokens/s", "peak GB", "of packed",
               "of matrix"),
              measure(folder, vlm, args.questions or (4 if args.full else 2), args.rounds, product))


if __name__ == "__main__":
    main()
