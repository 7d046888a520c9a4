"""Will it fit? What a run would need of memory, from the checkpoints' configs alone: no weight is read.

    python tests/plan_memory.py --student Qwen/Qwen2.5-VL-3B-Instruct --gradient-checkpointing --offload
    python tests/plan_memory.py --student Qwen/Qwen2.5-VL-7B-Instruct --gradient-checkpointing --processes 8

takes the options of train.py, and of how many processes each is one. A line for each stage of the run is for
one of its processes. Weights, gradients, optimizer states and the KV cache are counted; activations follow
from the sizes of a layer; all tokens of a prompt are taken for those of images. Prompt lengths are measured
on the first 32 examples of --data, or taken as 1,024 tokens. Left out: a local judge, and memory that is free
but scattered.
tests/bench_memory.py and tests/bench_ranks.py compare this with what is measured.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from discriminator import SYSTEM  # noqa: E402
from model import ROW, VLM, UserError, load_processor, pick_device, run_main  # noqa: E402
from teachers import encode_example, load_examples, make_teacher  # noqa: E402
from train import freeze, make_parser, pretraining_size, skeleton  # noqa: E402


def prompt_length(args, model) -> tuple[int, str]:
    """The tokens of the longest prompt, and where that is from."""
    if not args.data:
        return 1024, "assumed"
    vlm = VLM(model, load_processor(args.student), [], [])
    lengths = [len(encode_example(vlm, e).ids) for e in load_examples(args.data, args.skip_bad)[:32]]
    return max(lengths), f"the longest of {len(lengths)} in {args.data}"


class Sizes:
    """What a model takes, in bytes, where a weight and an activation have `size`."""

    def __init__(self, model, size: int, checkpointed: bool, on_cpu: bool):
        text, self.size, self.checkpointed = model.config.get_text_config(), size, checkpointed
        self.d, self.ff, self.layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        self.V, heads, self.vision = text.vocab_size, text.num_attention_heads, model.config.vision_config
        self.a = heads * (getattr(text, "head_dim", None) or self.d // heads)      # width of the attention
        self.kv = self.a // heads * text.num_key_value_heads
        self.layer = sum(w.numel() for w in next(iter(model.get_decoder().layers)).parameters())
        # the head: its own gradient, and a chunk of logits, three times in float32 (model.py's head_chunk)
        self.head = self.V * self.d * size + 12 * (2 ** 23 if on_cpu else 2 ** 26)

    def activations(self, tokens: int, length: int) -> float:
        """Kept for the backward pass of so many tokens in rows of `length`."""
        # (the gradient of the embedding, before it is added, comes when little of this is left)
        mask = tokens * max(length, ROW) * 12
        return self.kept(tokens, self.d, self.a, self.ff, self.layers) + mask

    def kept(self, tokens: int, d: int, a: int, ff: int, layers: int) -> float:
        """By so many layers for their backward pass."""
        # what enters each product: of two norms (in float32 inside), of attention (q, k, v, out, projection),
        # of the FFN
        layer = tokens * ((6 * d + 5 * a + 4 * ff) * self.size + 8 * d * (self.size == 2))
        return layer + layers * tokens * d * self.size if self.checkpointed else layers * layer

    def tower(self, tokens: int) -> float:
        """Kept by the vision tower, where so many tokens stand for images."""
        merged = getattr(self.vision, "spatial_merge_size", None) or 1
        layers = getattr(self.vision, "depth", None) or self.vision.num_hidden_layers
        d, ff = self.vision.hidden_size, self.vision.intermediate_size
        return self.kept(tokens * merged ** 2, d, d, ff, layers)

    def sampling(self, slots: int, num: int, P: int, R: int) -> float:
        """The KV cache of so many slots and of the prompts next in line, each for `num` responses; and
        logits."""
        cache = (slots * (P + R) + slots // num * P) * self.layers * 2 * self.kv * self.size
        return cache + 4 * slots * self.V * 4

    def gathered(self, weights: int) -> float:
        """In shards: two layers, what is no layer, and its gradient, of a module with so many weights."""
        return (2 * (weights - self.layers * self.layer) + 3 * self.layer) * self.size


def plan(args) -> str:
    """The table for a process of a run with these options, in GB."""
    if args.student == "toy":
        raise UserError("a plan needs a named --student: the toy one fits anywhere")
    model, cpu = skeleton(args.student), pick_device(args.device).type == "cpu"
    offload, ril, p = args.offload and not cpu, args.algorithm == "ril", args.processes
    freeze(model, args.freeze, args.student)
    bf16 = args.dtype == "bfloat16" or not args.dtype and not cpu
    size = 2 if bf16 else 4                                     # bytes of a weight, a gradient, an activation
    state = 12 if bf16 else 8                                 # bytes of optimizer state per weight: see AdamW
    here = 0 if offload else state
    N = sum(w.numel() for w in model.parameters())
    T = sum(w.numel() for w in model.parameters() if w.requires_grad)
    D = sum(w.numel() for w in model.get_decoder().parameters()) if ril else 0
    sizes = Sizes(model, size, args.gradient_checkpointing, cpu)
    python = 0.5e9 if cpu else 0                               # Python and torch, where they share the memory
    P, where = prompt_length(args, model)
    B, G, R = -(-args.batch_size // p), args.num_samples, args.max_new_tokens
    K = 2 * G if ril else G
    L = P + K * R                                                  # tokens of a question
    tokens = min(max(args.token_budget, L), B * L)
    row = 4 * len(SYSTEM) // 3                     # D's prompt, three letters a token; responses thrice

    def training(weights, trained, tokens, length):            # a model in shards: weights, gradients, states
        whole = sizes.gathered(weights) if p > 1 else 0
        held = (weights * size + trained * (size + here)) / p
        return held + whole + sizes.activations(tokens, length)

    def of_d(questions, responses):                                # tokens that D reads at a time
        return min(args.token_budget, questions * responses * (R + 10)) * 4 // 3
    gathered_d = sizes.gathered(D) if p > 1 else 0
    needs = {}
    if args.sft_steps:
        sft_tokens = min(max(args.token_budget, P + R), -(-args.sft_batch_size // p) * (P + R))
        needs["SFT"] = (training(N, N, sft_tokens, P + R) + sizes.head + N * size * offload
                        + sizes.tower(sft_tokens * P // (P + R)))
    for name in args.teachers:
        if hasattr(teacher := make_teacher(name), "path"):
            of_teacher = skeleton(teacher.path)
            count = sum(w.numel() for w in of_teacher.parameters())
            slots = max(1, 2 * G * args.rollout_batch // args.collect) * args.collect
            cache = Sizes(of_teacher, size, False, cpu).sampling(slots, args.collect, P, R)
            needs[f"teacher {teacher.name}"] = count * size + cache
    if ril:
        at_a_time = of_d(-(-pretraining_size(args) // p), 2 * args.collect)
        learns = training(D, D, at_a_time, row) + D * size * offload
        samples = D * (size + here) / p + sizes.sampling(args.rollout_batch * G, args.collect, P, R)
        needs["D's pre-training"] = N * size + max(D * size, learns, samples)
    waiting = 0 if offload else (N + D) * size / p                 # D and the reference
    held = (N * size + (T + D) * here) / p + waiting
    needs["setting up"] = (2 * N + D / p) * size                   # whole copies, before they are in shards
    sampler = N * size if p > 1 else 0                             # all weights once more
    needs["generate"] = held + sampler + sizes.sampling(args.rollout_batch * G, G, P, R)
    if ril:
        needs["discriminator"] = (held + D * size * (2 if offload else 1) / p + gathered_d
                                  + sizes.activations(of_d(B, K), row))
    gathered = sizes.gathered(N) if p > 1 else 0
    learns = sizes.activations(tokens, L) + sizes.tower(tokens * P // L) + sizes.head
    needs["update"] = held + T * size / p + gathered + max(N * size * offload, learns)
    if args.eval_data:
        needs["evaluation"] = N * size + sizes.sampling(args.rollout_batch, 1, P, R)
    lines = [f"{args.student}: {N / 1e9:.3f}B parameters, {T / 1e9:.3f}B trained, discriminator "
             f"{D / 1e9:.3f}B, in {'bfloat16' if bf16 else 'float32'}",
             f"prompt {P} tokens ({where}), responses up to {R}; a step is {B} questions, {B * G} sampled "
             f"responses, up to {B * L:,} tokens to train on, {tokens:,} at a time"]
    lines += [f"{name:24} {(python + value) / 1e9:8.2f} GB" for name, value in needs.items()]
    if offload:
        lines.append(f"{'on the CPU':24} {(12 * (T + D) + (N + D) * size) / 1e9:8.2f} GB")
    most = max(needs, key=needs.get)
    lines.append(f"{'peak':24} {(python + needs[most]) / 1e9:8.2f} GB, computed: {most}")
    return "\n".join(lines)


def main():
    """The command line of train.py, without its checks of what a run would need."""
    parser = make_parser(make_parser("toy").parse_known_args()[0].student)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, over all nodes")
    print(plan(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
