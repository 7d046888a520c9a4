"""Random Qwen2.5-VL checkpoints of real shape for the benchmarks, and data for them.

    python tests/shapes.py ...                         train.py, with each phase's peak memory in its timings
"""
import ctypes
import json
import os
import re
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import families  # noqa: E402
from conftest import TEXTS, noise_image  # noqa: E402

SHAPES = {                                                       # all with the 151,936 words of the real ones
    "60M": dict(text=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
                          num_key_value_heads=2),
                vision=dict(depth=4, hidden_size=384, intermediate_size=1152, num_heads=6,
                            out_hidden_size=256)),
    "0.3B": dict(text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=14,
                           num_attention_heads=12, num_key_value_heads=2),
                 vision=dict(depth=4, hidden_size=512, intermediate_size=1536, num_heads=8,
                             out_hidden_size=768)),
    "3B": dict(text=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                         num_attention_heads=16, num_key_value_heads=2),
               vision=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                           out_hidden_size=2048))}


def build(folder, shape, dtype=torch.float32, device="cpu"):
    """A Qwen2.5-VL of real shape and vocabulary with random weights; the tokenizer is the tests' small
    one."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    families.build(folder, "qwen2_5_vl", TEXTS)               # processor and token ids; the model is replaced
    config, text = Qwen2_5_VLConfig.from_pretrained(folder), SHAPES[shape]["text"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (half * 3 // 8),
                                                                         half * 3 // 8, half * 3 // 8]}
    ends = {name: getattr(config.text_config, name) for name in ("eos_token_id", "pad_token_id",
                                                                 "bos_token_id")}
    config = Qwen2_5_VLConfig(text_config=text | ends | {"vocab_size": 151936, "rope_parameters": rope},
                              tie_word_embeddings=True,
        vision_config=dict(patch_size=14, window_size=112, fullatt_block_indexes=[3])
                              | SHAPES[shape]["vision"],
        **{name: getattr(config, name) for name in ("image_token_id", "video_token_id",
                                                    "vision_start_token_id", "vision_end_token_id")})
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config = model.generation_config.from_pretrained(folder)
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2).save_pretrained(folder)
    (Path(folder) / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')


def data(folder, questions, tokens, image=True, words=0):
    """Questions about 392 x 392 pictures (196 image tokens), `words` longer, and responses of rule for a
    collection."""
    with open(folder / "data.jsonl", "w") as file, open(folder / "responses.jsonl", "w") as responses:
        for i in range(questions):
            row = {"id": str(i), "question": "How many red circles are there?" + " yes" * words,
                   "answer": "3"}
            if image:
                noise_image(392, 392, i).save(folder / f"{i}.png")
                row["image"] = f"{i}.png"
            file.write(json.dumps(row) + "\n")
            for k in range(4):
                responses.write(json.dumps({"id": str(i), "teacher": "rule",
                                            "text": " yes" * (tokens - 2 - k)}) + "\n")


def peak_memory_gb(device, reset=False):
    """Most GB since the last reset: allocated on CUDA, else resident (NaN where it is not known)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    if not status.exists():                                        # not Linux
        return float("nan")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    if reset and os.access(clear, os.W_OK):
        clear.write_text("5")                                # see proc(5): the mark falls to what is held now
    return int(found.group(1)) * 1024 / 1e9 if found else float("nan")


def memory_by_phase():
    """From now on, train.py's Meter measures memory too."""
    import train
    phase, row = train.Meter.phase, train.Meter.row

    @contextmanager
    def measured(meter, name):
        meter.memory_gb = getattr(meter, "memory_gb", defaultdict(float))
        peak_memory_gb(meter.device, reset=True)
        with phase(meter, name):
            yield
        meter.memory_gb[name] = max(meter.memory_gb[name], peak_memory_gb(meter.device))

    def noted(meter, *args):
        timing = row(meter, *args) | {f"memory_gb/{name}": value for name, value in meter.memory_gb.items()}
        meter.memory_gb.clear()
        return timing
    train.Meter.phase, train.Meter.row = measured, noted


def give_back():
    """Let glibc return what is free, so that the next peak is not what an earlier one has left."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def seconds(work, device):
    """Wall-clock seconds of work(), and what it returned."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def alternate(arms, rounds, device):
    """Run all of {name: work} in turn, `rounds` times. Returns {name: median seconds}."""
    times = {name: [] for name in arms}
    for r in range(rounds):
        for name, work in arms.items():
            times[name].append(seconds(work, device)[0])
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings(device, dtype):
    """(FLOP/s of a large matrix product, bytes/s read and written by a large copy), as measured now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.empty(n, n, device=device, dtype=dtype)
    big = torch.zeros(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    other = torch.empty_like(big)
    arms = {"product": lambda: torch.mm(a, a, out=b), "copy": lambda: other.copy_(big)}
    alternate(arms, 1, device)                                     # to warm up
    times = alternate(arms, 5, device)
    return 2 * n ** 3 / times["product"], 2 * big.nbytes / times["copy"]


def table(head, rows):
    """A Markdown table on the console; each row as soon as `rows` gives it."""
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


if __name__ == "__main__":
    import train
    memory_by_phase()
    train.main()
