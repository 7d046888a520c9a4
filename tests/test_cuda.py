"""The CUDA path without CUDA: what would be refused on a GPU, found on a CPU.

The device is played: real CPU tensors that say they are on cuda:0, so that all of Python takes its CUDA
branches with real numbers. torch.cuda.graph is played too: a capture runs nothing for good (its effects are
undone) and refuses reads and copies by the host, as a capturing stream does; replay() runs the step again.
This sees no kernels: speed, memory, cuDNN, NCCL and the numbers of a real device stay untested.
"""
import collections
import json
import shutil
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import families
import model
import pytest
import torch
import train
from conftest import lamp_files, noise_image, quick
from eval import make_judge, task_of
from model import Sampling, Slots, check_scoring, checkpoint_layers, encode, load_vlm, stream
from teachers import load_examples
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")


@pytest.fixture(scope="session")
def dynamic(folders, tmp_path_factory):
    """A checkpoint whose rope is computed anew for long texts: it reads their length."""
    folder = shutil.copytree(folders["internvl"], tmp_path_factory.mktemp("families") / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def here():
    """The two innermost places of our code, for a message."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-1:-3:-1])


T = torch.Tensor
READS = {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.numpy, T.cpu,
         T.nonzero, torch.nonzero, T.unique, torch.unique, T.masked_select, torch.masked_select,
         T.equal, torch.equal, torch.unique_consecutive, T.bincount, torch.bincount}
notes, capturing = collections.Counter(), []


def note(what):
    """A read or a copy by the host: while a stream captures, it is refused."""
    if capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing "
                           f"({what} at {here()})")
    notes[f"{what} at {here()}"] += 1


class OnCuda(torch.Tensor):
    """A tensor that says it is on cuda:0."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Played(TorchFunctionMode):
    """While it is on, tensors asked for on a CUDA device are OnCuda."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def ours(x):
    return isinstance(x, OnCuda)


def tag(x):
    return x.as_subclass(OnCuda) if isinstance(x, T) and not ours(x) else x


def call(function, args, kwargs):
    """What torch is asked, done on the CPU; the result says it is on the device that it would be on."""
    name = getattr(function, "__name__", "")
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)]
    some = any(map(ours, tensors))
    with torch._C.DisableTorchFunctionSubclass():
        if name == "__get__":
            return attribute(function, args, some)
        if name == "__deepcopy__" and some:
            return copied(*args)
        if name in ("__set__", "backward", "requires_grad_", "detach_", "register_hook"):
            return function(*args, **kwargs)
        want = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        if function is T.to and any(ours(x) for x in args[1:]):
            want = CUDA
        want = want and torch.device(want).type
        if some and torch._C._current_graph_task_id() == -1:       # autograd's own gradients carry no tag
            check_operands(function, name, args, kwargs, tensors)
        moves = function is T.to and want and (want == "cuda") != some
        if moves or function is torch.tensor and want == "cuda":
            note(f"copy ({name})")
        on_cpu = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        out = function(*on_cpu, **kwargs | ({"device": torch.device("cpu")} if kwargs.get("device") else {}))
        leaves = function is T.cpu or function is T.to and want == "cpu"
        if leaves or not (some or want == "cuda") or isinstance(out, torch.Size):
            return out.as_subclass(T) if ours(out) else out
        if function is T.to:
            return tag(out)
        return tree_map(lambda x: x if any(x is t for t in tensors) else tag(x), out)


def attribute(function, args, some):
    """What a property of a tensor is."""
    owner = getattr(function, "__self__", None)
    if some and owner is T.device:
        return CUDA
    if some and owner in (T.is_cuda, T.is_cpu):
        return owner is T.is_cuda
    return tag(function(*args)) if some else function(*args)


def copied(own, memo):
    """copy.deepcopy of a tensor; a parameter stays one."""
    if id(own) not in memo:
        memo[id(own)] = own.detach().clone().as_subclass(OnCuda).requires_grad_(own.requires_grad)
        if isinstance(own, torch.nn.Parameter):
            memo[id(own)]._is_param = True
    return memo[id(own)]


def check_operands(function, name, args, kwargs, tensors):
    """Note what makes the host wait; RuntimeError where tensors of two devices meet."""
    index = args[1] if name in ("__getitem__", "__setitem__") else ()
    index = index if isinstance(index, tuple) else (index,)
    repeats = name == "repeat_interleave" and len(tensors) > 1 and kwargs.get("output_size") is None
    if function in READS or repeats:
        note(f"host read ({name})")
    if any(isinstance(i, T) and i.dtype == torch.bool for i in index):
        note("host read (of a mask)")
    if any(isinstance(i, (list, range)) or isinstance(i, T) and not ours(i) and i.dim() for i in index):
        note("copy from the host (of an index)")
    if function is T.copy_ and ours(args[0]) != ours(args[1]):
        note("copy (copy_)")
    moving = (T.__getitem__, T.__setitem__, T.copy_, T.to)
    if function not in moving and any(not ours(x) and x.dim() for x in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name} "
                           f"at {here()})")


def vmap(function, *settings, plain=torch.vmap, **more):
    """vmap looks inside of tensors: what it makes of ours gets its tag back."""
    inner = plain(function, *settings, **more)

    def work(*args):
        with torch._C.DisableTorchFunction():
            out = inner(*args)
        return tag(out) if any(map(ours, args)) else out
    return work


def moved(vlm):
    """A VLM on the played device."""
    seen = {}
    for module in vlm.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    new = x.detach().as_subclass(OnCuda)
                    if isinstance(x, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, x.requires_grad)
                    tensors[name] = seen.setdefault(id(x), new)
    return replace(vlm, prompts={}, capture=True)


@pytest.fixture
def played(monkeypatch):
    """Plays the device; yields the function that moves a VLM there, and counts of captures and replays."""
    counts, step = collections.Counter(), Slots.step
    stream_now = ["the one before"]

    class Graph:
        def replay(self):
            counts["replays"] += 1
            table, n, columns = self.of
            assert table.columns == columns
            step(table, n)

        def pool(self):
            return (0, 1)

    @contextmanager
    def graph(recorded, pool=None):
        capturing.append(recorded)
        recorded.shared = pool
        stream_now[0] = "the capturing one"
        try:
            yield
        except RuntimeError:                                       # as torch does; its stream stays
            capturing.pop()
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
        counts["captures"] += 1
        stream_now[0] = "the one before"
        capturing.pop()

    def recording(self, n):
        if not capturing:
            assert stream_now == ["the one before"], "a failed capture has kept its stream"
            return step(self, n)
        capturing[-1].of = (self, n, self.columns)
        assert bool(capturing[-1].shared) == bool(self.graphs), "graphs that do not share their memory"
        kept = [*self.rows.values(), *self.cache]
        before = [x.clone() for x in kept]
        step(self, n)
        for x, was in zip(kept, before):
            x.copy_(was)

    nothing = {"init": lambda: None, "synchronize": lambda *_: None, "max_memory_allocated": lambda *_: 0,
               "reset_peak_memory_stats": lambda *_: None, "get_rng_state": torch.get_rng_state,
               "current_stream": lambda *_: stream_now[0],
               "set_stream": lambda stream: stream_now.__setitem__(0, stream)}
    for name, value in {"CUDAGraph": Graph, "graph": graph, **nothing}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Slots, "step", recording)
    monkeypatch.setattr(torch, "vmap", vmap)

    notes.clear()
    yield moved, counts
    assert not capturing


def sampled(vlm, prompts, noise):
    sampling = Sampling(max_new_tokens=21)
    return {b: [ids.tolist() for ids in rows] for b, rows in stream(vlm, prompts, noise, 3, sampling, 5)}


@pytest.mark.parametrize("family", quick([*sorted(set(families.FAMILIES) - set(families.IN_ROWS)), "dynamic"],
                                         ("qwen2_5_vl", "gemma4", "dynamic")))
def test_replayed_graphs_sample_the_same_tokens(family, folders, dynamic, played):
    """Not: a step that depends on what changes between captures (columns, memory that has moved), effects of
    a capture itself, or a model that cannot be captured and is not decoded."""
    move, counts = played
    vlm = load_vlm(folders.get(family, dynamic), "cpu")
    a, b, c = noise_image(32, 32), noise_image(80, 48, 1), noise_image(48, 64, 2)
    prompts = [encode(vlm, "yes or no?", []), encode(vlm, "How many?", [a]), encode(vlm, "two", [c, a]),
               encode(vlm, "Is it red?", [b])]
    noise = [torch.rand(3, 21, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    more_stops = [i for i in range(20, 60) if i not in vlm.banned_ids]
    vlm = replace(vlm, stop_ids=vlm.stop_ids + more_stops)
    expected = sampled(vlm, prompts, noise)
    vlm = move(vlm)
    with Played():
        assert vlm.device == CUDA and sampled(vlm, prompts, [tag(x) for x in noise]) == expected
    if family == "dynamic":
        assert vlm.capture and not counts["captures"]              # it is not even tried
    else:
        assert vlm.capture and counts["captures"] and counts["replays"] >= 20


@pytest.mark.parametrize("what, says", [("read", "host read (item)"), ("copy", "copy (tensor)"), ("mix", "")])
def test_a_failed_capture_says_why_and_frees_the_stream(what, says, folders, played, monkeypatch, capsys):
    """Not: torch's second error in the place of the first, or all later work on the capturing stream. A step
    that reads a number, makes a tensor on the host, or mixes devices is noticed."""
    move, counts = played
    vlm = load_vlm(folders["qwen2_5_vl"], "cpu")
    prompts, sample = [encode(vlm, "yes or no?", [])], model.sample
    noise = [torch.rand(3, 21, generator=torch.Generator().manual_seed(0))]
    expected = sampled(vlm, prompts, noise)

    def worse(logits, seen, sampling, noise):
        if what == "read":
            assert noise.min().item() >= 0
        elif what == "copy":
            noise = noise * torch.tensor([1.0], device=noise.device)
        else:
            noise = noise + torch.zeros(len(noise), device="cpu")
        return sample(logits, seen, sampling, noise)
    monkeypatch.setattr(model, "sample", worse)
    vlm = move(vlm)
    with Played():
        if what == "mix":
            with pytest.raises(RuntimeError, match="on the same device"):
                sampled(vlm, prompts, [tag(x) for x in noise])
            return
        assert sampled(vlm, prompts, [tag(x) for x in noise]) == expected
    printed = capsys.readouterr().out
    assert not vlm.capture and not counts["captures"]
    assert says in printed and "previous error" not in printed


@pytest.mark.parametrize("family", quick(["qwen2_5_vl", "gemma3", "qwen3_5"],
                                         ("qwen2_5_vl",)))
def test_a_step_of_the_loop_mixes_no_devices(family, folders, played, tmp_path):
    """Not: a mask, a label, a position that was made on the CPU; in bfloat16, also types that do not go
    together."""
    move, counts = played
    data, responses = lamp_files(tmp_path, 6)
    options = {"student": folders[family], "data": data, "collection": responses, "batch-size": 3,
               "token-budget": 200, "num-samples": 2, "max-new-tokens": 24, "rollout-batch": 2}
    args = train.parse_args([*[str(x) for name, value in options.items() for x in (f"--{name}", value)],
                             "--gradient-checkpointing"])
    vlm = load_vlm(args.student, "cpu", "bfloat16")
    checkpoint_layers(vlm.model)
    examples = load_examples(str(data))
    collection = train.read_collection(str(responses), examples, vlm.processor, args)
    judge = make_judge("rule", tmp_path / "verdicts.jsonl", None, None)
    vlm, checked = move(vlm), move(load_vlm(args.student, "cpu", "bfloat16"))
    with Played():
        check_scoring(checked, [encode(checked, "Is the lamp on?", [noise_image(32, 32)])])
        assert {w.dtype for w in vlm.model.parameters()} == {torch.bfloat16}
        D = train.Discriminator(vlm)
        run = train.Run(args, train.World(), tmp_path, vlm, examples, D)
        assert D.head.weight.device == D.backbone.device == run.reference.device == CUDA
        row, rollouts = train.ril_step(run, next(run.batches), collection, judge)
        assert row["kl"] == 0 and row["clip_fraction"] == 0 and row["grad_norm"] > 0
        assert run.optimizer.skipped == run.d_optimizer.skipped == 0
        row, greedy = train.held_out_accuracy(run, task_of(str(data)), judge)
        assert "heldout_accuracy" in row and 0 < greedy[0]["p_student"] < 1
        train.save_checkpoint(run)
    assert bool(counts["captures"]) == vlm.packs and len(sum(rollouts, [])) == 12
