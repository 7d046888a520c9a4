"""Peak memory of one RIL step by phase: measured, against what --plan says, and against plain row-per-response code.

    python tests/bench_memory.py                                   0.3B Qwen2.5-VL, random weights, 152K words, on the CPU
    python tests/bench_memory.py --full                            the shape of Qwen2.5-VL-3B, for a GPU with 80 GB

All three in one run, on the same questions and lengths. The plain code is what most repositories do: every response is a
row of its own with its own copy of the prompt, all logits at once.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import families  # noqa: E402
from conftest import ROOT, TEXTS, noise_image  # noqa: E402
from model import encode_responses, load_vlm  # noqa: E402
from teachers import encode_example, load_examples  # noqa: E402
from train import Meter, policy_loss  # noqa: E402

SMALL = dict(text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=14, num_attention_heads=12, num_key_value_heads=2),
             vision=dict(depth=4, hidden_size=512, intermediate_size=1536, num_heads=8, out_hidden_size=768))
FULL = dict(text=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2),
            vision=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048))


def build(folder, shape, dtype):
    """A Qwen2.5-VL of real shape and vocabulary with random weights; the tokenizer is the tests' small one."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    families.build(folder, "qwen2_5_vl", TEXTS)                    # processor and token ids; the model is replaced
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12] if shape is SMALL else [16, 24, 24]}
    ends = {name: getattr(config.text_config, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    config = Qwen2_5_VLConfig(text_config=shape["text"] | ends | {"vocab_size": 151936, "rope_parameters": rope}, tie_word_embeddings=True,
        vision_config=dict(patch_size=14, window_size=112, fullatt_block_indexes=[3]) | shape["vision"],
        **{name: getattr(config, name) for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")})
    torch.set_default_dtype(dtype)
    model = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    generation = model.generation_config.from_pretrained(folder)
    model.generation_config = generation
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    (Path(folder) / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')


def data(folder, questions, tokens):
    """Questions about 392 x 392 pictures (196 image tokens), and responses of rule for a collection."""
    with open(folder / "data.jsonl", "w") as file, open(folder / "responses.jsonl", "w") as responses:
        for i in range(questions):
            noise_image(392, 392, i).save(folder / f"{i}.png")
            file.write(json.dumps({"id": str(i), "image": f"{i}.png", "question": "How many red circles are there?", "answer": "3"}) + "\n")
            for k in range(4):
                responses.write(json.dumps({"id": str(i), "teacher": "rule", "text": " yes" * (tokens - 2 - k)}) + "\n")


def plain_update(folder, batch_size, K, R, device, dtype):
    """Forward and backward of Eq. 2 with one row per response and all logits; the same state in memory as in a run."""
    policy, reference = load_vlm(str(folder), device, dtype), load_vlm(str(folder), device, dtype)
    held = [torch.zeros_like(p, dtype=torch.float32) for p in policy.model.parameters() for _ in range(2 if dtype == "float32" else 3)]
    held += [torch.zeros_like(p) for p in policy.model.get_decoder().parameters()]           # D
    held += [torch.zeros_like(p, dtype=torch.float32) for p in policy.model.get_decoder().parameters() for _ in range(2 if dtype == "float32" else 3)]
    examples = load_examples(str(folder / "data.jsonl"))[:batch_size]
    meter = Meter(policy.device)
    with meter.phase("update"):
        prompts = [encode_example(policy, e) for e in examples for _ in range(K)]
        responses = encode_responses(policy, [[" yes" * (R - 2)]] * len(prompts))

        def logps(vlm):
            ids = torch.stack([torch.cat([p.ids.to(vlm.device), r[0]]) for p, r in zip(prompts, responses.ids)])
            images = {name: torch.cat([p.images[name] for p in prompts]).to(vlm.device) for name in prompts[0].images}
            types = (ids == vlm.model.config.image_token_id).int()
            images["pixel_values"] = images["pixel_values"].to(vlm.model.dtype)
            logits = vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **images).logits
            length = responses.ids.shape[-1]
            return logits[:, -length - 1:-1].float().log_softmax(-1).gather(2, responses.ids[:, 0, :, None]).squeeze(2).view(
                batch_size, K, length)
        with torch.no_grad():
            ref = logps(reference)
        logp, ones = logps(policy), torch.ones(batch_size, K, device=policy.device)
        policy_loss(logp, logp.detach(), ref, ones, torch.ones_like(logp, dtype=torch.bool), ones.bool(), 0.2, 0.01).backward()
    return meter.memory_gb["update"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--plain", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="*", default=[], help="more options for train.py")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, batch_size, G, R = ("bfloat16" if device == "cuda" else "float32"), 2, 4, 32
    if args.plain:
        return print(plain_update(Path(args.plain), batch_size, 2 * G, R, device, dtype))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder, FULL if args.full else SMALL, getattr(torch, dtype))
        data(folder, 4, R)
        command = [sys.executable, ROOT / "train.py", "--student", folder, "--collection", folder / "responses.jsonl", "--data",
                   folder / "data.jsonl", "--out", folder / "out", "--batch-size", batch_size, "--accumulate", 2, "--rollout-batch", 2,
                   "--num-samples", G, "--collect", 4, "--max-new-tokens", R, "--steps", 2, "--discriminator-steps", 1,
                   "--device", device, "--dtype", dtype, *(f"--{option}" for option in args.options)]
        command = list(map(str, command))
        said = subprocess.run(command + ["--plan"], check=True, capture_output=True, text=True).stdout
        print(said)
        # glibc keeps freed blocks of up to 32 MB for later; without that, what is resident is what is in use
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        metrics = [json.loads(line) for line in open(folder / "out" / "metrics.jsonl")][-1]
        plain = float(subprocess.run([sys.executable, __file__, "--plain", str(folder)], check=True, capture_output=True,
                                     text=True, env=env).stdout)
    print("| phase | --plan, GB | measured, GB | plan / measured |\n|---|---|---|---|")
    for phase in ("generate", "discriminator", "update"):
        planned, measured = float(re.search(rf"^{phase}\s+([\d.]+)", said, re.M).group(1)), metrics[f"memory_gb/{phase}"]
        print(f"| {phase} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |")
    print(f"| update, one row per response, all logits | - | {plain:.2f} | |")


if __name__ == "__main__":
    main()
