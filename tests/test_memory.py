"""What makes real sizes fit: float32 updates of bfloat16 weights, micro-batches, offload, freezing, the
plan."""
import contextlib
import copy
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import call, lamp_files, noise_image
from discriminator import Discriminator, update_discriminator
from model import UserError, encode, encode_responses, load_vlm
from train import AdamW, freeze, sft, update_policy
from teachers import Example


def test_a_bfloat16_weight_keeps_steps_of_1e_6():
    """bfloat16 has 8 bits: 0.02 + 1e-6 is 0.02. A hundred such steps must add up to 1e-4 all the same."""
    start = torch.full((64,), 0.02, dtype=torch.bfloat16)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = AdamW(torch.nn.ParameterList([ours]), lr=1e-5)
    torchs = torch.optim.AdamW([theirs], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        for weight, optimizer in ((ours, mine), (theirs, torchs)):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert torch.equal(theirs, start)                              # the trap is real
    torch.testing.assert_close(ours.float(), start.float() - 1e-3, atol=1e-4, rtol=0)
    assert mine.masters["0"].dtype == torch.float32 and ours.grad is None


@pytest.mark.parametrize("offload", [False, True])
def test_adamw_in_float32_is_torchs_own(offload):
    torch.manual_seed(0)
    a, b = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    b.load_state_dict(a.state_dict())
    ours = AdamW(a, 0.1, (0.9, 0.95), offload)
    theirs = torch.optim.AdamW(b.parameters(), 0.1, (0.9, 0.95), weight_decay=0.0, fused=True)
    for i in range(5):
        for model, optimizer in ((a, ours), (b, theirs)):
            b.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        ours.set_lr(0.1 * 0.9 ** i)
        theirs.param_groups[0]["lr"] = 0.1 * 0.9 ** i
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


def test_micro_batches_of_discriminator_and_sft_give_the_whole_step(qwen):
    """A loss that is averaged per part and not over the step."""
    texts = [["yes", "no way", "There are 3.", "blue"]] * 2 + [["green", "no", "red", "It is a circle."]] * 2
    is_student = torch.tensor([[True, True, False, False]] * 4)
    weights = []
    for budget in (1000, 1, 100):
        torch.manual_seed(0)
        D = Discriminator(qwen)
        metrics = update_discriminator(D, AdamW(D, 1e-3), D.encode([""] * 4, texts), is_student, budget)
        weights.append((metrics["d_loss"], D.head.weight))
    for loss, weight in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-5)
        torch.testing.assert_close(weight, weights[0][1], atol=1e-5, rtol=1e-4)
    examples, heads = [Example(str(i), (), "two", "yes " * (i + 1)) for i in range(4)], []
    for size in (10 ** 6, 1, 100):
        model = copy.deepcopy(qwen.model)
        args = SimpleNamespace(sft_lr=1e-3, sft_batch_size=4, seed=0, token_budget=size, offload=False)
        sft(type(qwen)(model, qwen.processor, qwen.stop_ids, qwen.banned_ids), examples, 2, "test", args,
            train.World())
        heads.append(model.get_output_embeddings().weight)
    torch.testing.assert_close(heads[1], heads[0], atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(heads[2], heads[0], atol=2e-5, rtol=1e-3)


def test_frozen_weights_do_not_move_and_the_others_do(qwen):
    policy = type(qwen)(copy.deepcopy(qwen.model), qwen.processor, qwen.stop_ids, qwen.banned_ids)
    freeze(policy.model, r"visual|self_attn", "here")
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    args = SimpleNamespace(token_budget=1, temperature=1.0, mu=1, beta=0.01, eps=0.2, loss="dr_grpo")
    prompts = [encode(policy, "How many?", [noise_image(32, 32)])]
    outputs, valid = encode_responses(policy, [["yes", "no"]]), torch.ones(1, 2, dtype=torch.bool)
    run = SimpleNamespace(args=args, policy=policy, reference=qwen, world=train.World(),
                          optimizer=AdamW(policy.model, 1e-2, offload=True),
                          using=lambda module: contextlib.nullcontext(),
                          score=partial(train.Run.score, SimpleNamespace(args=args)))
    update_policy(run, prompts, outputs, torch.tensor([[1.0, -1.0]]), valid, valid, 1)
    for name, weight in policy.model.named_parameters():
        frozen = "visual" in name or "self_attn" in name
        assert torch.equal(weight, before[name]) == frozen or not frozen and "bias" in name, name
    assert all(weight.grad is None for weight in policy.model.parameters())
    with pytest.raises(UserError, match="matches no weight of here; its weights have names like"):
        freeze(policy.model, "attention_head", "here")


@pytest.mark.slow
def test_bfloat16_student_with_offload_and_checkpointing_learns_from_the_command_line(tmp_path, checkpoints):
    """bfloat16 weights at a rate that bfloat16 alone would round away; the same --out without those options
    resumes."""
    data, responses = lamp_files(tmp_path, 8)
    options = ["--student", checkpoints["internvl"], "--data", data, "--collection", responses, "--out",
               tmp_path / "out", "--device", "cpu", "--steps", 3, "--batch-size", 4, "--token-budget", 200,
               "--collect", 2, "--discriminator-steps", 1, "--max-new-tokens", 24, "--lr", 1e-5, "--dtype",
               "bfloat16", "--similarity", "continuous", "--freeze", "vision_tower", "--rollout-batch", 3]
    done = call("train.py", *options, "--offload", "--gradient-checkpointing")
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = load_vlm(checkpoints["internvl"], "cpu",
                             "bfloat16").model, load_vlm(str(tmp_path / "out/student"), "cpu",
                                                         "bfloat16").model
    moved = {name for (name, a), b in zip(before.named_parameters(), after.parameters())
             if not torch.equal(a, b)}
    assert moved and not any("vision_tower" in name for name in moved)
    assert call("train.py", *options).returncode == 0         # what changes no result may differ in one --out
    assert call("train.py", *options[:-4], "--out", tmp_path / "other", "--freeze",
                "nothing like it").returncode == 2
    assert not (tmp_path / "other").exists()


def test_the_plan_reads_no_weights_and_counts_them_right(tmp_path, checkpoints):
    """A planner that needs what it is to plan for."""
    folder = tmp_path / "config only"
    shutil.copytree(checkpoints["qwen2_5_vl"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = load_vlm(checkpoints["qwen2_5_vl"], "cpu").model
    data, _ = lamp_files(tmp_path, 3)
    for options in (["--data", data], ["--offload", "--gradient-checkpointing", "--dtype", "bfloat16"]):
        done = call("plan_memory.py", "--student", folder, "--device", "cpu", "--out", tmp_path / "out",
                    *options)
        assert done.returncode == 0, done.stderr
        count = float(re.search(r"([\d.]+)B parameters", done.stdout).group(1))
        assert count == pytest.approx(sum(w.numel() for w in model.parameters()) / 1e9, abs=6e-4)
        assert re.search(r"prompt \d+ tokens", done.stdout) and re.search(r"peak +[\d.]+ GB", done.stdout)
    assert not (tmp_path / "out").exists()
