"""Sampling: model.py's generate against transformers' own, on the same prompts, weights and response lengths.

    python tests/bench_generate.py                     60M Qwen2.5-VL, prompts of 222 tokens: four minutes on
                                                       two cores
    python tests/bench_generate.py --full              the shape of Qwen2.5-VL-3B, bfloat16, for a GPU

"batch" is 8 questions x 4 responses; "fill" is 4 responses (--full: 16) to each of --questions, where
transformers works in batches of 4 questions and ours keeps as many slots full. Response lengths are spread
evenly over 8 to 64 tokens, and forced: for transformers by a stopping criterion, for ours by noise that is 1
where the response ends. Both sample from the 50 likeliest tokens, without top-p, for which transformers sorts
the whole vocabulary. First, greedy tokens of both are compared. Ceilings are measured in the same run:
"matrix" is the model's arithmetic (2 FLOPs a weight and token, what padding and repetition add not counted)
over a large matrix product's rate; "copy" is the bytes that decoding must read (weights once a step, each
response's keys and values) over a large copy's rate.
"""
import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import StoppingCriteria

from shapes import alternate, build, ceilings, data, give_back, peak_memory_gb, table
import model  # noqa: E402
from model import Sampling, load_vlm, stream  # noqa: E402
from teachers import encode_example, load_examples  # noqa: E402

LENGTHS = [8 + 56 * ((7 * i) % 16) // 15 for i in range(16)]       # 8 .. 64, shuffled
own_sample = model.sample


def sample_to_length(logits, seen, sampling, noise):
    """Where the noise is 1, the response ends: token 1 stands for a stop token, and else does not occur."""
    token = own_sample(logits.index_fill(1, torch.tensor([1], device=logits.device), -torch.inf), seen,
                       sampling, noise.clamp(max=0.999))
    return torch.where(noise >= 1, 1, token)


class StopAtLength(StoppingCriteria):
    def __init__(self, prompt, lengths):
        self.ends = prompt + lengths

    def __call__(self, ids, scores, **_):
        return ids.shape[1] >= self.ends


def ours(vlm, prompts, G, slots, sampling):
    def noise():
        for b in range(len(prompts)):
            rows = torch.rand(G, sampling.max_new_tokens, device=vlm.device)
            for g in range(G):
                rows[g, LENGTHS[(b * G + g) % 16] - 1] = 1
            yield rows
    return dict(stream(vlm, prompts, noise(), G, sampling, slots))


def theirs(vlm, prompts, G, sampling, batch, **options):
    """transformers.generate, `batch` questions at a time; all prompts here are of one length, so nothing is
    padded."""
    done = []
    for i in range(0, len(prompts), batch):
        part = prompts[i:i + batch]
        ids = torch.stack([p.ids for p in part]).to(vlm.device)
        images = {name: torch.cat([p.images[name] for p in part]).to(vlm.device) for name in part[0].images}
        images["pixel_values"] = images["pixel_values"].to(vlm.model.dtype)
        lengths = torch.tensor([LENGTHS[j % 16] for j in range(i * G, (i + len(part)) * G)],
                               device=vlm.device)
        done.append(vlm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **images,
            mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(), num_return_sequences=G,
            max_new_tokens=sampling.max_new_tokens, stopping_criteria=[StopAtLength(ids.shape[1], lengths)],
            suppress_tokens=[*vlm.banned_ids, *vlm.stop_ids], **options, do_sample=sampling.temperature > 0,
            **({"top_k": sampling.top_k, "top_p": sampling.top_p} if sampling.temperature else {})))
    return done


def load(full, questions, device, dtype):
    """(VLM, prompts); token 1 ends a response, and none of the words that the small tokenizer lacks is
    banned."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, "3B" if full else "60M", dtype, device)
        data(folder, questions, 8)
        vlm = load_vlm(str(folder), str(device), str(dtype).removeprefix("torch."))
        prompts = [encode_example(vlm, e) for e in load_examples(str(folder / "data.jsonl"))]
    vlm.stop_ids[:] = [1]
    vlm.banned_ids[:] = [i for i in vlm.banned_ids if i < 300]
    return vlm, prompts


def measure(vlm, prompts, cases, rounds, product, copy):
    """Rows of the table: (name, questions, G, slots) of each case, by each code."""
    sampling = Sampling(top_p=1.0, repetition_penalty=1.0, max_new_tokens=64)
    text, device = vlm.model.config.get_text_config(), vlm.device
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    size = vlm.model.dtype.itemsize
    per_token = 2 * text.num_hidden_layers * width * size          # bytes of keys and values
    P, N = len(prompts[0].ids), sum(w.numel() for w in vlm.model.get_decoder().parameters())      # tied: head
    for case, questions, G, slots in cases:
        part, tokens = prompts[:questions], sum(LENGTHS[j % 16] for j in range(questions * G))
        batch, memory = slots // G, {}
        in_step = replace(vlm, packs=False)                        # as for families that have no slots
        arms = {"ours": lambda: ours(vlm, part, G, slots, sampling),
                "ours, in step": lambda: ours(in_step, part, G, slots, sampling),
                "transformers": lambda: theirs(vlm, part[:batch], G, sampling, batch),
                "transformers, static cache": lambda: theirs(vlm, part[:batch], G, sampling, batch,
                                                             cache_implementation="static")}
        for name, work in arms.items():                            # to warm up, too
            give_back()
            peak_memory_gb(device, reset=True)
            work()
            memory[name] = peak_memory_gb(device)
        times = alternate(arms, rounds, device)
        for name in arms:                                  # transformers' batches are all alike: one is timed
            share = 1 if name.startswith("ours") else batch / questions
            rate = tokens * share / times[name]
            flops = 2 * N * (tokens + questions * P) * share / times[name] / product
            steps = (64 if case == "batch" else tokens / slots) if name == "ours" else 64
            read = steps * N * size + tokens * share * (P + 18) * per_token
            yield (f"{case}, {questions} x {G}", name, f"{times[name] / share:.2f}", f"{rate:.0f}",
                   f"{rate * times['ours'] / tokens:.2f}", f"{memory[name]:.2f}", f"{flops:.0%}",
                   f"{read / times[name] / copy:.0%}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--questions", type=int, help="of the fill; default 8, with --full 32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    questions = args.questions or (32 if args.full else 8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model.sample = sample_to_length
    vlm, prompts = load(args.full, max(questions, 8), device, dtype)
    product, copy = ceilings(device, dtype)
    print(f"prompts of {len(prompts[0].ids)} tokens, {product / 1e9:,.0f} GFLOP/s, {copy / 1e9:.0f} GB/s "
          f"copied", flush=True)
    greedy, P = Sampling(0, 1, 0, 1, 64), len(prompts[0].ids)
    a, b = ours(vlm, prompts[:4], 1, 3, greedy), theirs(vlm, prompts[:4], 1, greedy, 4)[0][:, P:]
    same = [a[q][0].tolist()[:-1] == b[q, :len(a[q][0]) - 1].tolist() for q in range(4)]
    print(f"greedy tokens the same as transformers': {sum(same)} of {len(same)} responses", flush=True)
    G = 16 if args.full else 4
    cases = [("batch", 8, 4, 32), ("fill", questions, G, min(4, questions) * G)]
    table(("case", "code", "seconds", "tokens/s", "of ours", "peak GB", "of matrix", "of copy"),
          measure(vlm, prompts, cases, args.rounds, product, copy))


if __name__ == "__main__":
    main()
