"""Nine checkpoints of seven families, each with its own processor, through everything RIL asks of a model."""
import json
import re
import shutil
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import families
import model
from conftest import call, lamp_files, noise_image, quick
from discriminator import Discriminator, update_discriminator
from train import AdamW, skeleton
from model import (Sampling, UserError, check_scoring, checkpoint_layers, decode, encode, encode_responses,
                   generate, image_tokens, concat, load_processor, load_vlm, prompt_text, save_vlm, score,
                   tokens_of_image)
from test_model import transformers_inputs, unpacked

GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=8)


QUICK = ("qwen2_5_vl", "gemma3", "gemma4", "lfm3_vl")


@pytest.fixture(scope="session", params=quick(families.FAMILIES, QUICK))
def vlm(request, folders):
    return load_vlm(folders[request.param], "cpu")


@pytest.fixture(scope="session")
def prompts(vlm):
    """Two sizes of image, none, two images, and two images in the middle of the text after an earlier
    turn."""
    a, b, c = noise_image(32, 32), noise_image(80, 48, 1), noise_image(48, 64, 2)
    return [encode(vlm, "How many?", [a]), encode(vlm, "Is there a red circle?", [b]),
            encode(vlm, "yes or no?", []), encode(vlm, "two", [c, a]),
            encode(vlm, "Is <image> red?", [c, b], (("First <image> is it blue?", "no"),))]


def greedily(vlm, prompt):
    """transformers' own greedy tokens."""
    ids = vlm.model.generate(**transformers_inputs(vlm, prompt), max_new_tokens=8, do_sample=False,
                             suppress_tokens=vlm.banned_ids, eos_token_id=vlm.stop_ids)
    return ids[0, len(prompt.ids):].tolist()


def test_generation_gives_transformers_own_tokens(vlm, prompts):
    """Tiles stacked in the wrong order, a window or a two-way image block forgotten, positions off in the
    decode step."""
    ours = generate(vlm, prompts, 2, GREEDY)
    for b, prompt in enumerate(prompts):
        theirs = greedily(vlm, prompt)
        for k in range(2):
            assert ours.ids[b, k][ours.mask[b, k]].tolist() == theirs


@pytest.mark.parametrize("word", families.WORDS.values())
def test_a_special_token_that_may_be_said_is_said(vlm, prompts, word):
    """<think> or <|box_start|> never sampled, or not in the text: a judge sees thoughts without tags."""
    head, said = vlm.model.get_output_embeddings(), vlm.tokenizer.convert_tokens_to_ids(word)
    with torch.no_grad():
        saved = head.weight.clone()
        head.weight[said] = 2 * head.weight[greedily(vlm, prompts[0])[0]]
        try:
            ours = generate(vlm, prompts[:3], 1, GREEDY)
            theirs = [greedily(vlm, prompt) for prompt in prompts[:3]]
        finally:
            head.weight.copy_(saved)
    for b in range(3):
        assert ours.ids[b, 0][ours.mask[b, 0]].tolist() == theirs[b]
        assert ours.text[b][0].count(word) == (ours.ids[b, 0] == said).sum()
    assert word in "".join(row[0] for row in ours.text)


def test_special_tokens_are_encoded_as_the_tokenizer_does(vlm):
    """Teachers' thoughts spelt in letters; a spelling of a stop or of an image's place that is more than
    letters; a text that is not what it was."""
    said, marks = "<think>2 and 1</think> There are 3 <|box_start|>red", image_tokens(vlm.processor)
    marks |= set(vlm.tokenizer.convert_ids_to_tokens(vlm.stop_ids))
    texts = [said, *(f"{said} {mark} circles" for mark in marks)]
    outputs = encode_responses(vlm, [texts])
    rows = [ids[mask] for ids, mask in zip(outputs.ids[0], outputs.mask[0])]
    assert rows[0][:-1].tolist() == vlm.tokenizer(said, add_special_tokens=False).input_ids
    words = [vlm.tokenizer.convert_tokens_to_ids(word) for word in families.WORDS.values()]
    assert set(words) < set(rows[0].tolist())
    for row in rows:
        assert not set(row[:-1].tolist()) & {*vlm.stop_ids, *vlm.banned_ids} and row[-1] == vlm.stop_ids[0]
    assert len(marks) > 1 and decode(vlm, rows) == texts


def test_packed_scores_equal_one_row_per_response(vlm, prompts):
    """A response that sees its sibling, a packed row without the family's own mask or positions."""
    outputs = concat([generate(vlm, prompts, 2, replace(GREEDY, temperature=1.0)),
                    encode_responses(vlm, [["yes", "There are 3 red circles. " * 4]] * 5)])
    torch.testing.assert_close(score(vlm, prompts, outputs), unpacked(vlm, prompts, outputs), atol=2e-5,
                               rtol=1e-4)
    for prompt in prompts:
        check_scoring(vlm, [prompt])


def test_gradient_checkpointing_changes_no_gradient(vlm, prompts):
    """Layers whose dropout comes on with training mode, a mask that the second pass does not see."""
    outputs = encode_responses(vlm, [["yes", "There are 3 red circles."]] * 5)
    plain = torch.autograd.grad(score(vlm, prompts, outputs).sum(),
                                vlm.model.get_input_embeddings().weight)[0]
    checkpoint_layers(vlm.model)
    calls = []
    inner = [m.mlp if hasattr(m, "mlp") else m.feed_forward for m in vlm.model.get_decoder().layers]
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in inner]
    try:
        again = torch.autograd.grad(score(vlm, prompts, outputs).sum(),
                                    vlm.model.get_input_embeddings().weight)[0]
        generate(vlm, prompts, 1, GREEDY)                          # with its cache
    finally:
        for module in vlm.model.modules():
            module.gradient_checkpointing = False
        [hook.remove() for hook in hooks]
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
    assert len(calls) >= 3 * len(vlm.model.get_decoder().layers) and not any(m.training
                                                                             for m in vlm.model.modules())


def test_the_image_reaches_the_answer(vlm):
    """Without it, the tests above would not see an image that is lost or in the wrong place."""
    logps = [score(vlm, [encode(vlm, "How many?", [noise_image(32, 32, seed)])],
                   encode_responses(vlm, [["There are 3."]]))
             for seed in (1, 2)]
    assert (logps[0] - logps[1]).abs().max() > 1e-3


def test_the_discriminator_learns_on_this_backbone(vlm):
    D = Discriminator(vlm)
    optimizer = AdamW(D, 3e-3)
    texts = [["yes", "no", "There are 3.", "It is blue."]] * 3
    is_student = torch.tensor([[True, True, False, False]] * 3)
    losses = []
    while len(losses) < 100 and (not losses or losses[-1] > losses[0] - 0.1):
        responses = D.encode([""] * len(texts), texts)
        losses.append(update_discriminator(D, optimizer, responses, is_student, 60)["d_loss"])
    assert losses[-1] <= losses[0] - 0.1


def test_a_reply_ends_with_the_token_that_ends_a_turn(vlm):
    """Gemma's generation config lists <eos> first, but a turn ends in <end_of_turn>: answers would be taught
    to run on."""
    ends = vlm.tokenizer.decode(vlm.stop_ids[:1])
    assert ends in ("<|im_end|>", "<end_of_turn>") and len(vlm.stop_ids) == (2 if ends == "<end_of_turn>"
                                                                             else 1)


def test_saved_and_loaded_again_it_scores_the_same(vlm, prompts, tmp_path):
    outputs = encode_responses(vlm, [["yes", "There are 3 red circles."]] * 5)
    save_vlm(vlm, str(tmp_path / "saved"))
    again = load_vlm(str(tmp_path / "saved"), "cpu")
    torch.testing.assert_close(score(again, prompts, outputs), score(vlm, prompts, outputs))


SIZES_OF_STEP = {"steps": 1, "batch-size": 4, "token-budget": 300, "num-samples": 2, "lr": 1e-3, "collect": 2,
                 "discriminator-steps": 1, "max-new-tokens": 32, "top-k": 0, "top-p": 1}


@pytest.mark.parametrize("student", quick(families.FAMILIES, ("gemma4", "lfm3_vl")))
def test_a_ril_step(student, folders, tmp_path):
    """The command line itself, on photographs rather than the toy world."""
    data, responses = lamp_files(tmp_path, 6)
    done = call("train.py", "--student", folders[student], "--collection", responses, "--data", data, "--out",
                tmp_path / "out", "--device", "cpu", "--gradient-checkpointing", "--offload", "--similarity",
                "continuous", *(x for name, value in SIZES_OF_STEP.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert row["reward/similarity/student"] > 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("student", quick(("gemma3", "lfm3_vl", "qwen3_5", "idefics3"), ("gemma3",)))
def test_a_ril_step_with_teachers_of_two_other_families(student, folders, tmp_path):
    """Responses that another family's tokenizer or template leaves its marks on."""
    data, _ = lamp_files(tmp_path, 6)
    others = [f for f in families.FAMILIES if f != student]
    others = [others[(families.FAMILIES.index(student) + i) % len(others)] for i in (1, 4)]
    sizes = SIZES_OF_STEP | {"collect": 24}
    done = call("train.py", "--student", folders[student], "--teachers", *(folders[f] for f in others),
                "--data", data, "--eval-data", data, "--out", tmp_path / "out", "--device", "cpu",
                "--similarity", "continuous",
                *(x for name, value in sizes.items() for x in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert {f"reward/similarity/{f}" for f in others} <= row.keys() and row["grad_norm"] > 0


def test_a_model_that_packing_would_misread_is_refused(folders):
    """A family with something we do not know of (here: logits scaled after the head) must not be trained in
    silence."""
    vlm = load_vlm(folders["llava"], "cpu")
    prompt, forward = encode(vlm, "How many?", [noise_image(32, 32)]), vlm.model.forward

    @wraps(forward)
    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = output.logits / 2
        return output
    check_scoring(vlm, [prompt])
    vlm.model.forward = scaled
    with pytest.raises(UserError, match="differently"):
        check_scoring(vlm, [prompt])


def test_who_can_share_a_row_is_told_by_the_model(vlm, folders):
    """Linear attention, convolutions, chunks, a window that no layer names, or images that are seen both
    ways: packed, each runs, and sees the wrong tokens."""
    assert vlm.packs == (Path(vlm.model.name_or_path).name not in families.IN_ROWS)
    other = load_vlm(folders["llava"], "cpu").model
    text = other.config.get_text_config()
    assert model.can_pack(other)
    for name, value in (("layer_types", ["full_attention", "chunked_attention"]), ("sliding_window", 8),
                        ("use_bidirectional_attention", "vision")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, name, value, raising=False)
            assert not model.can_pack(other), name


def test_the_cap_and_the_scale_of_logits_are_the_familys(vlm):
    """Gemma 4 sampled from other probabilities (0.97 instead of 0.85); Aya's scale, which stands in its
    config and is not heeded, followed. With a cap, the gradient has its slope."""
    name = Path(vlm.model.name_or_path).name
    assert (vlm.scale, vlm.cap) == (1.0, 30.0 if name == "gemma4" else None)
    prompt = encode(vlm, "How many?", [noise_image(32, 32)])
    outputs = encode_responses(vlm, [["There are 3."]])
    head, response = vlm.model.get_output_embeddings().weight, outputs.ids[0, 0]
    for temperature in (1.0, 0.5):
        plain = (model.plain_logits(vlm, prompt, response) / temperature).log_softmax(-1)
        plain = plain.gather(1, response[:, None]).sum()
        ours = score(vlm, [prompt], outputs, temperature).sum()
        torch.testing.assert_close(ours, plain, atol=5e-5, rtol=1e-5)
        a, b = (torch.autograd.grad(x, head)[0] for x in (ours, plain))
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


def test_an_image_that_is_read_one_way_only_is_noticed(folders, tmp_path, monkeypatch):
    """A bound of 1e-3, which Gemma 3 passes without its mask of images (5e-4); and a check on the first
    question, which has no image."""
    data, responses = lamp_files(tmp_path, 4)
    first, *others = data.read_text().splitlines()
    first = {name: value for name, value in json.loads(first).items() if name != "image"}
    data.write_text("\n".join([json.dumps(first), *others]) + "\n")
    monkeypatch.setattr(model, "sees_image_both_ways", lambda trunk: False)
    done = call("train.py", "--student", folders["gemma3"], "--data", data, "--collection", responses,
                "--out", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 2 and "it reads responses in rows differently" in done.stderr, done.stderr


def test_slots_that_decode_differently_are_noticed(qwen, checkpoints, monkeypatch, capsys):
    """A family that scores right and samples from something else; or one that is asked in the slower way, and
    nobody hears of it."""
    prompt, prefill = encode(qwen, "How many?", [noise_image(32, 32)]), model.prefill

    def shifted(vlm, prompts):
        cache, rows = prefill(vlm, prompts)
        return cache, rows | {"position": rows["position"] + 1}
    check_scoring(qwen, [prompt])
    monkeypatch.setattr(model, "prefill", shifted)
    with pytest.raises(UserError, match="it decodes differently"):
        check_scoring(qwen, [prompt])
    assert not load_vlm(checkpoints["qwen2_5_vl"], "cpu").packs
    assert "it decodes differently" in (said := capsys.readouterr().out) and "decoded in step" in said
    monkeypatch.setattr(model, "read_prompts", lambda *_: 1 / 0)   # and where neither way goes
    with pytest.raises(UserError, match="cannot be decoded .ZeroDivisionError"):
        load_vlm(checkpoints["qwen2_5_vl"], "cpu")


def test_a_response_that_sees_its_sibling_is_noticed_in_bfloat16(vlm, prompts, folders, monkeypatch):
    """A tolerance so wide, for the rounding of bfloat16, that every wrong mask passes."""
    plain = model.packed_mask

    def leaky(trunk, rows):
        return plain(trunk, replace(rows, owner=rows.owner.clamp(max=1)))
    half = load_vlm(vlm.model.name_or_path, "cpu", "bfloat16")
    check_scoring(half, [prompts[0]])
    monkeypatch.setattr(model, "packed_mask", leaky)
    if not vlm.packs:
        return check_scoring(half, [prompts[0]])                   # each has a row of its own
    with pytest.raises(UserError, match="differently"):
        check_scoring(half, [prompts[0]])


# -------------------------------------------------------------------------------- damaged and odd checkpoints


FILES = {"weights": "model.safetensors", "chat_template": "chat_template.jinja"}


def changed(folder, tmp_path, **files):
    """A copy of a checkpoint in which some files are other bytes, or what a function makes of its JSON, or
    are gone."""
    shutil.copytree(folder, tmp_path / "changed")
    for name, change in files.items():
        file = tmp_path / "changed" / FILES.get(name, f"{name}.json")
        if change is None:
            file.unlink()
        elif isinstance(change, bytes):
            file.write_bytes(change)
        else:
            contents = json.loads(file.read_text())
            change(contents)
            file.write_text(json.dumps(contents))
    return str(tmp_path / "changed")


def sentence(load, path):
    with pytest.raises(UserError) as error:
        load(path)
    assert path in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


HEAD = "language_model.lm_head.weight"


def renamed(weights):
    return {name.replace("self_attn", "attention"): x for name, x in weights.items()}


def without_head(weights):
    return {name: x for name, x in weights.items() if name != HEAD}


@pytest.mark.parametrize("change, says", [
    (renamed, r"24 missing, 24 unexpected \(.*attention"),
    (without_head, r"1 missing, 0 unexpected \(lm_head.weight\)$"),
    (lambda weights: weights | {"stranger": torch.ones(2)}, r"0 missing, 1 unexpected \(stranger\)$"),
    (lambda weights: weights | {HEAD: torch.ones(7, 32)}, "mismatch"),
])
def test_weights_of_another_model_are_refused_by_name(folders, tmp_path, change, says, capfd):
    """A checkpoint whose weights have other names: the model ran on random ones, with a score."""
    path = changed(folders["llava"], tmp_path)
    save_file(change(load_file(f"{path}/model.safetensors")), f"{path}/model.safetensors", {"format": "pt"})
    assert re.search(says, sentence(partial(load_vlm, device="cpu"), path))
    assert "REPORT" not in capfd.readouterr().err                  # transformers' own


def test_tied_weights_are_not_missing(folders, tmp_path):
    """A head that is the embedding stands in the file once."""
    path = changed(folders["llava"], tmp_path, config=lambda config: config.update(tie_word_embeddings=True))
    weights = without_head(load_file(f"{path}/model.safetensors"))
    save_file(weights, f"{path}/model.safetensors", {"format": "pt"})
    model = load_vlm(path, "cpu").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("family, name, contents, says", [
    ("llava", "weights", POINTER, "git-lfs"), ("llava", "tokenizer", POINTER, "git-lfs"),
    ("llava", "weights", b"", "header"), ("llava", "weights", 2000, "header"),
    ("llava", "weights", -1, "not fully covered"), ("llava", "tokenizer", 3000, "cannot be read"),
    ("llava", "generation_config", 20, "cannot be read"), ("llava", "config", b"{", "cannot be read"),
    ("llava", "config", b"[]", "model_type"), ("llava", "tokenizer", b"{}", "added_tokens"),
    ("llava", "preprocessor_config", b"[]", "list"), ("llava", "chat_template", None, "no chat template"),
    ("internvl", "tokenizer", None, "knows no text"),
])
def test_damaged_files_are_one_sentence_before_weights_are_read(folders, tmp_path, family, name, contents,
                                                                says):
    """A git-lfs pointer, or a download that stopped: a traceback, or a file that was passed over. A tokenizer
    without its file reads every text as nothing."""
    path = folders[family]
    if isinstance(contents, int):
        contents = open(f"{path}/{FILES.get(name, f'{name}.json')}", "rb").read()[:contents]
    path = changed(path, tmp_path, **{name: contents})
    assert says in sentence(load_processor, path)
    if name == "config":
        sentence(skeleton, path)


@pytest.mark.parametrize("change, says", [
    (dict(weights=None), "no file named model.safetensors"),
    (dict(config=lambda config: config["text_config"].update(num_hidden_layers=1)), "unexpected"),
    (dict(config=lambda config: config["text_config"].update(num_hidden_layers=3)), "missing"),
    (dict(config=lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4})),
     "optimum"),
    (dict(config=lambda config: config["text_config"].update(hidden_size="wide")), "expected int, got str"),
])
def test_what_cannot_be_loaded_is_one_sentence(folders, tmp_path, change, says):
    """A traceback over weights that are not there, or a package that is not; layers on random weights."""
    assert says in sentence(partial(load_vlm, device="cpu"), changed(folders["llava"], tmp_path, **change))


@pytest.mark.parametrize("weights", [None, True])
def test_an_adapter_is_refused_also_beside_weights(folders, tmp_path, weights):
    """A LoRA folder as student: no file named model.safetensors; or, beside weights, it is not read."""
    path = changed(folders["llava"], tmp_path, **({} if weights else {"weights": None}))
    (tmp_path / "changed" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "LoRA adapter" in sentence(load_processor, path)


def test_what_is_no_vision_language_model_is_one_sentence(folders, tmp_path):
    assert "couldn't connect" in sentence(load_processor, "nobody/nothing")
    shutil.copytree(folders["llava"], tmp_path / "blind", ignore=shutil.ignore_patterns("pr*"))
    config = json.loads((tmp_path / "blind" / "config.json").read_text())
    (tmp_path / "blind" / "config.json").write_text(json.dumps(config["text_config"]))
    assert "without a vision tower" in sentence(load_processor, str(tmp_path / "blind"))


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "nonsense"])
def test_the_attention_that_a_config_asks_for_is_not_used(folders, tmp_path, implementation):
    """Attention that is not installed, or that does not heed a mask of four dimensions."""
    def ask(config):
        config["_attn_implementation"] = config["text_config"]["_attn_implementation"] = implementation
    path = changed(folders["gemma3"], tmp_path, config=ask)
    one, two = load_vlm(folders["gemma3"], "cpu"), load_vlm(path, "cpu")
    assert {m.config._attn_implementation for m in two.model.modules() if hasattr(m, "config")} == {"sdpa"}
    prompts = [encode(one, "How many?", [noise_image(32, 32)])]
    outputs = encode_responses(one, [["yes", "There are 3."]])
    torch.testing.assert_close(score(one, prompts, outputs), score(two, prompts, outputs))
    skeleton(path)


def with_template(folders, tmp_path, template, **files):
    """A copy whose chat template stands in tokenizer_config.json alone."""
    return changed(folders["llava"], tmp_path, chat_template=None, **{
        "tokenizer_config": lambda config: config.update(chat_template=template), **files})


LLAVA = families.TEMPLATE.replace("IMAGE", "<image>\n")


@pytest.mark.parametrize("template", [LLAVA, [{"name": "default", "template": LLAVA},
                                              {"name": "tools", "template": "none"}]])
def test_a_template_of_the_tokenizer_alone_is_used(folders, tmp_path, template):
    path = with_template(folders, tmp_path, template)
    one, two = load_vlm(folders["llava"], "cpu"), load_vlm(path, "cpu")
    image = noise_image(32, 32)
    assert encode(one, "How many?", [image]).ids.equal(encode(two, "How many?", [image]).ids)
    save_vlm(two, str(tmp_path / "saved"))
    assert load_vlm(str(tmp_path / "saved"), "cpu").stop_ids == one.stop_ids


@pytest.mark.parametrize("template, says", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "no place for images"),
    ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "no place for images"),
    ("{% for m in messages %}{{ 'USER: ' + m.content }}{% endfor %}", "refuses such turns"),
    ("{% for m in messages %}", "refuses such turns"),
])
def test_a_template_without_images_is_refused(folders, tmp_path, template, says):
    """The template of a language model: the list of parts was printed into the prompt."""
    assert says in sentence(load_processor, with_template(folders, tmp_path, template))


def test_a_template_without_system_turns_is_refused_before_any_work(folders, tmp_path):
    """D has one: a traceback after the teachers were asked."""
    none = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    path, (data, responses) = with_template(folders, tmp_path, none + LLAVA), lamp_files(tmp_path, 2)
    done = call("train.py", "--student", path, "--data", data, "--collection", responses, "--out",
                tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no system turns" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end, stops", [
    ("<|im_end|>\n", ["<|im_end|>", "<|endoftext|>"]), ("\n", ["<|endoftext|>"]),
    ("\n<|im_start|>\n", ["<|im_start|>", "<|endoftext|>"]),
    ("<|im_end|>\n<|im_start|>assistant\n<think>", ["<|im_end|>", "<|endoftext|>"])])
def test_what_ends_a_turn_of_the_template_is_a_stop(folders, tmp_path, end, stops):
    """A token that neither tokenizer nor generation config names was banned, and every response ran to the
    limit. The text of a template is no stop."""
    template = LLAVA.replace("<|im_end|>\n", end)
    path = with_template(
        folders, tmp_path, template, generation_config=lambda config: config.update(eos_token_id=None),
        config=lambda config: config["text_config"].update(eos_token_id=None),
        tokenizer_config=lambda config: config.update(chat_template=template, eos_token="<|endoftext|>"))
    vlm = load_vlm(path, "cpu")
    assert vlm.tokenizer.convert_ids_to_tokens(vlm.stop_ids) == stops
    assert not set(vlm.stop_ids) & set(vlm.banned_ids)
    assert vlm.tokenizer.convert_tokens_to_ids("<think>") not in vlm.banned_ids


SIZES = [(1, 1), (3, 50), (50, 1), (28, 28), (30, 290), (280, 28), (100, 90), (400, 300)]


def test_images_have_no_more_tokens_than_their_sizes_tell(vlm):
    """A prompt that is longer than the check of its length believes."""
    for size in SIZES:
        text = prompt_text(vlm.processor, "How many?", 2)
        length = len(vlm.tokenizer(text).input_ids) + tokens_of_image(vlm.processor, size) + \
            tokens_of_image(vlm.processor, (32, 32))
        prompt = encode(vlm, "How many?", [Image.new("RGB", size), noise_image(32, 32)])
        assert len(prompt.ids) <= length, size
