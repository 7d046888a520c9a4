"""The CUDA path without CUDA: what would be refused on a GPU, found on a CPU.

Two devices that are not there. FAKE: torch's own FakeTensorMode; tensors have a device and a shape but no
numbers, every op is checked for tensors of two devices, and numbers cannot be read. PLAYED: real CPU tensors
that say they are on cuda:0, so that all of Python takes its CUDA branches with real numbers. torch.cuda.graph
is played too: a capture runs nothing for good (its effects are undone) and refuses reads and copies by the
host, as a capturing stream does; replay() runs the step again. Neither sees kernels: speed, memory, cuDNN,
NCCL and the numbers of a real device stay untested.
"""
import collections
import copy
import ctypes
import json
import shutil
import traceback
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import families
import model
import pytest
import torch
import train
from conftest import lamp_files, noise_image
from eval import make_judge, tasks_of
from model import (Prefilled, Prompt, Sampling, Slots, check_packing, checkpoint_layers, encode, load_vlm,
                   prefill, stream)
from teachers import load_examples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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


# ---------------------------------------------------------------------------------------------- FAKE


def guard_cuda():
    """A build of torch for the CPU has no device guard for CUDA, which ops on fake tensors ask for: lend it
    the CPU's."""
    if not torch.backends.cuda.is_built():
        c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        registry = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
        registry[1] = registry[1] or registry[0]                   # c10::DeviceType: 0 is CPU, 1 is CUDA


def fake(mode, vlm, dtype):
    """The same model without numbers, on cuda:0."""
    seen = {}

    def convert(x):
        if id(x) not in seen:
            kind = dtype if x.is_floating_point() else x.dtype
            with mode:
                y = torch.empty_strided(x.shape, x.stride(), dtype=kind, device=CUDA)
            seen[id(x)] = torch.nn.Parameter(y, x.requires_grad) if isinstance(x, torch.nn.Parameter) else y
        return seen[id(x)]
    for module in vlm.model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: convert(x) for name, x in tensors.items() if x is not None})
    return replace(vlm, prompts={})


class Refused(TorchDispatchMode):
    """Notes what a capturing stream refuses: tensors of two devices in one op, and what only the host can
    decide."""
    names = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh",
             "repeat_interleave.Tensor")

    def __init__(self):
        super().__init__()
        self.notes, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in self.names):    # before: a fake tensor cannot do it
            self.notes.append(f"{function.name()} at {here()}")
        out = function(*args, **(kwargs or {}))
        if not function.name().startswith("prim"):
            self.count += 1
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            devices = {x.device.type for x in tensors}
            if len(devices) > 1:
                self.notes.append(f"{function.name()} of {sorted(devices)} at {here()}")
        return out


def fake_slots(folder, dtype=torch.bfloat16, n=4, R=6):
    """(mode, slots filled on the fake device, their prompts there)."""
    guard_cuda()
    vlm, mode = load_vlm(folder, "cpu"), FakeTensorMode()
    prompts = [encode(vlm, "yes or no?", [])] * n
    with torch.no_grad():
        block = prefill(vlm, prompts)
    vlm = fake(mode, vlm, dtype)

    def convert(x):
        if isinstance(x, list):
            return [convert(each) for each in x]
        return torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=CUDA)
    with torch.no_grad(), mode:
        block = Prefilled(*[convert(getattr(block, field.name)) for field in fields(block)])
        table = Slots(vlm, Sampling(max_new_tokens=R), n)
        table.start(0, block, torch.arange(n, device=CUDA), torch.empty(n, R, device=CUDA))
        table.cache.columns = table.cache.room
        return mode, table, [Prompt(mode.from_tensor(p.ids), {}, mode.from_tensor(p.positions))
                             for p in prompts]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_decode_step_can_be_captured(family, folders):
    """Not: a number that the host reads, or a tensor that comes from the host, in our step or in a family's
    own code."""
    mode, table, prompts = fake_slots(folders[family])
    with torch.no_grad(), mode, Refused() as refused:
        table.step(4)
    assert refused.count > 200 and not refused.notes
    assert {x.device for x in table.rows.values()} == {CUDA} and table.cache.keys[0].dtype == torch.bfloat16
    with torch.no_grad(), mode:                                    # these may copy, but not mix
        assert {x.device for x in tree_leaves(vars(prefill(table.vlm, prompts)))} == {CUDA}
        table.move([2, 3], [0, 1])


@pytest.mark.parametrize("what", ["read", "copy", "mix"])
def test_the_fake_device_would_notice(what, folders, monkeypatch):
    mode, table, _ = fake_slots(folders["qwen2_5_vl"])
    sample = model.sample

    def worse(logits, seen, sampling, noise):
        if what == "read":
            noise.max().item()
        if what == "copy":
            noise = noise * torch.tensor([0.5], device=noise.device)
        return sample(logits, seen, sampling, noise + torch.ones(len(noise)) if what == "mix" else noise)
    monkeypatch.setattr(model, "sample", worse)
    refused = Refused()
    try:
        with torch.no_grad(), mode, refused:
            table.step(4)
    except Exception as error:                                     # a fake tensor has no number; two devices
        words = ("_local_scalar_dense", "two different devices", "same device")
        assert any(word in str(error) for word in words)
    else:
        assert refused.notes


# ---------------------------------------------------------------------------------------------- PLAYED

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


@pytest.fixture
def played(monkeypatch):
    """Plays the device; yields a function that moves a VLM there, and the counts of captures and replays."""
    counts, step = collections.Counter(), Slots.step
    stream_now = ["the one before"]

    class Graph:
        def replay(self):
            counts["replays"] += 1
            table, n, columns = self.of
            assert table.cache.columns == columns
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
        capturing[-1].of = (self, n, self.cache.columns)
        assert bool(capturing[-1].shared) == bool(self.graphs), "graphs that do not share their memory"
        kept = [*self.rows.values(), *self.cache.keys, *self.cache.values]
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

    def move(vlm):
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
    notes.clear()
    yield move, counts
    assert not capturing


def sampled(vlm, prompts, noise):
    sampling = Sampling(max_new_tokens=21)
    return {b: [ids.tolist() for ids in rows] for b, rows in stream(vlm, prompts, noise, 3, sampling, 5)}


@pytest.mark.parametrize("family", [*families.FAMILIES, "dynamic"])
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


def test_a_failed_capture_says_why_and_gives_the_stream_back(folders, played, monkeypatch, capsys):
    """Not: torch's second error in the place of the first, or all later work on the capturing stream."""
    move, counts = played
    vlm = load_vlm(folders["qwen2_5_vl"], "cpu")
    prompts = [encode(vlm, "yes or no?", [])]
    noise = [torch.rand(3, 21, generator=torch.Generator().manual_seed(0))]
    expected, sample = sampled(vlm, prompts, noise), model.sample

    def reads(logits, seen, sampling, noise):
        assert noise.min().item() >= 0
        return sample(logits, seen, sampling, noise)
    monkeypatch.setattr(model, "sample", reads)
    vlm = move(vlm)
    with Played():
        assert sampled(vlm, prompts, [tag(x) for x in noise]) == expected
    printed = capsys.readouterr().out
    assert not vlm.capture and not counts["captures"]
    assert "host read (item)" in printed and "previous error" not in printed


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3"])
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
    vlm = move(vlm)
    with Played():
        check_packing(vlm, train.encode_example(vlm, examples[0]))
        assert {w.dtype for w in vlm.model.parameters()} == {torch.bfloat16}
        D = train.new_discriminator(vlm, args)
        run = train.Run(args, train.World(), tmp_path, vlm, examples, D)
        assert D.head.weight.device == D.backbone.device == run.reference.device == CUDA
        row, rollouts = train.ril_step(run, collection, judge)
        assert row["kl"] == 0 and row["clip_fraction"] == 0 and row["grad_norm"] > 0
        assert not row["skipped_updates"]
        assert "heldout_accuracy" in train.held_out_accuracy(run, tasks_of(str(data)), judge)
        train.tensors_of(run)
    assert counts["captures"] and len(rollouts) == 12
