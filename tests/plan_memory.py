"""Will it fit? What a run would need of memory, from the student's config alone: no weight is read.

    python tests/plan_memory.py --student Qwen/Qwen2.5-VL-3B-Instruct --gradient-checkpointing --offload
    python tests/plan_memory.py --student Qwen/Qwen2.5-VL-7B-Instruct --gradient-checkpointing --processes 8

takes the options of train.py, and of how many processes each is one. Weights, gradients, optimizer states and
the KV cache are counted; activations follow from the sizes of a decoder layer. Prompt lengths are measured on
the first 32 examples of --data, or taken as 1,024 tokens. Left out: SFT, the vision tower's activations, a
local judge, and memory that is free but scattered. tests/bench_memory.py compares this with what a step
takes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import discriminator as eq1  # noqa: E402
from model import ROW, VLM, UserError, load_processor, pick_device, run  # noqa: E402
from teachers import encode_example, load_examples  # noqa: E402
from train import freeze, make_parser, skeleton  # noqa: E402


def prompt_length(args, model) -> tuple[int, str]:
    """The tokens of the longest prompt, and where that is from."""
    if not args.data:
        return 1024, "assumed"
    vlm = VLM(model, load_processor(args.student), [], [])
    lengths = [len(encode_example(vlm, e).ids) for e in load_examples(args.data, args.skip_bad)[:32]]
    return max(lengths), f"the longest of {len(lengths)} in {args.data}"


def plan(args) -> str:
    """The table for a process of a run with these options, in GB."""
    if args.student == "toy":
        raise UserError("a plan needs a named --student: the toy one fits anywhere")
    model, cpu = skeleton(args.student), pick_device(args.device).type == "cpu"
    offload, ril = args.offload and not cpu, args.algorithm == "ril"
    freeze(model, args.freeze, args.student)
    bf16 = args.dtype == "bfloat16" or not args.dtype and not cpu
    size = 2 if bf16 else 4                                     # bytes of a weight, a gradient, an activation
    state = 12 if bf16 else 8                                 # bytes of optimizer state per weight: see AdamW
    state_here = 0 if offload else state
    N = sum(w.numel() for w in model.parameters())
    T = sum(w.numel() for w in model.parameters() if w.requires_grad)
    D = sum(w.numel() for w in model.get_decoder().parameters()) if ril else 0

    P, where = prompt_length(args, model)
    p = args.processes                                             # each has a part of all weights and states
    B, G, R = -(-args.batch_size // p), args.num_samples, args.max_new_tokens
    K = 2 * G if ril else G
    L = P + K * R                                                  # tokens of a question
    prefix = len(eq1.SYSTEM) // 3                                  # of D's prompt: three letters a token
    tokens = min(max(args.token_budget, L), B * L)
    d_tokens = min(args.token_budget, B * K * (R + 10))
    text = model.config.get_text_config()
    d, ff, layers, V = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size
    heads = text.num_attention_heads
    a = heads * (getattr(text, "head_dim", None) or d // heads)    # width of the attention
    kv = a // heads * text.num_key_value_heads

    def activations(tokens, length):
        """Bytes kept for the backward pass of so many tokens in rows of `length`."""
        # what enters each product: of two norms (in float32 inside), of attention (q, k, v, out, projection),
        # of the FFN
        layer = tokens * ((6 * d + 5 * a + 4 * ff) * size + 8 * d * bf16)
        kept = layers * layer
        if args.gradient_checkpointing:
            kept = layer + layers * tokens * d * size
        mask = tokens * max(length, ROW) * 12
        return kept + mask + V * d * size                       # the embedding's gradient, before it is added

    # the head: its own gradient, and a chunk of logits, three times in float32 (model.py's head_chunk)
    head = V * d * size + 12 * (2 ** 23 if cpu else 2 ** 26)
    python = 0.5e9 if cpu else 0                               # Python and torch, where they share the memory
    waiting = 0 if offload else (N + D) * size                     # D and the reference
    always = python + (N * size + (T + D) * state_here + waiting) / p
    cache = (G * (P + R) + P) * layers * 2 * kv * size         # of the slots, and of the prompts next in line
    # in shards: sampling has all weights once more, training two layers and what is no layer (and its
    # gradient)
    layer = sum(w.numel() for w in next(iter(model.get_decoder().layers)).parameters())
    sampler, gathered, d_gathered = 0, 0, 0
    if p > 1:
        sampler = N * size
        gathered = (2 * (N - layers * layer) + 3 * layer) * size
        d_gathered = (2 * (D - layers * layer) + 3 * layer) * size
    d_activations = activations(d_tokens * ROW // max(1, ROW - prefix), R + prefix)
    needs = {
        "generate": always + sampler + args.rollout_batch * (cache + 4 * G * V * 4),
        "discriminator": always + D * size * (2 if offload else 1) / p + d_gathered + d_activations,
        "update": always + T * size / p + gathered + max(N * size * offload, activations(tokens, L) + head)}
    lines = [f"{args.student}: {N / 1e9:.3f}B parameters, {T / 1e9:.3f}B trained, discriminator "
             f"{D / 1e9:.3f}B, in {'bfloat16' if bf16 else 'float32'}",
             f"prompt {P} tokens ({where}), responses up to {R}; a step is {B} questions, {B * G} sampled "
             f"responses, up to {B * L:,} tokens to train on, {tokens:,} at a time"]
    lines += [f"{name:14} {value / 1e9:8.2f} GB" for name, value in {"between phases": always,
                                                                     **needs}.items()]
    if offload:
        lines.append(f"{'on the CPU':14} {(12 * (T + D) + (N + D) * size) / 1e9:8.2f} GB")
    lines.append(f"{'peak':14} {max(needs.values()) / 1e9:8.2f} GB, computed")
    return "\n".join(lines)


def main():
    """The command line of train.py, without its checks of what a run would need."""
    parser = make_parser(make_parser("toy").parse_known_args()[0].student)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, over all nodes")
    print(plan(parser.parse_args()))


if __name__ == "__main__":
    run(main)
