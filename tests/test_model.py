"""generate and score against transformers' own code and against themselves, one response at a time."""
import copy
import inspect
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.generation.logits_process import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor,
                                                    TemperatureLogitsWarper, TopKLogitsWarper,
                                                    TopPLogitsWarper)

from conftest import noise_image
from discriminator import Discriminator
from model import (Sampling, Slots, UserError, decode, encode, encode_responses, generate, concat, load_vlm,
                   needs_bos, sample, save_vlm, score, stream, tail, without_thoughts)
from train import World

GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=12)


def transformers_inputs(vlm, prompt, response=()):
    """What transformers' own forward pass wants of [prompt | response]."""
    ids = torch.cat([prompt.ids, torch.as_tensor(response, dtype=torch.long)])[None]
    types = {"mm_token_type_ids", "token_type_ids"} & inspect.signature(vlm.model.forward).parameters.keys()
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **prompt.images,
                **{name: (ids == vlm.model.config.image_token_id).int() for name in types})


THINKS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


def thinking(checkpoint, folder):
    """A copy of a checkpoint whose chat template opens a thought before each response."""
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    text, end = template.read_text().split("{% if add_generation_prompt %}")
    assert end.endswith("{% endif %}")
    template.write_text(text + THINKS)
    return load_vlm(str(folder), "cpu")


def test_a_thought_that_the_template_opens_is_closed_before_texts(checkpoints, tmp_path):
    """Truths and teachers' responses that are read as thoughts: SFT of them teaches to think, not to say."""
    vlm = thinking(checkpoints["qwen2_5_vl"], tmp_path / "m")
    prompt, outputs = encode(vlm, "How many?", []), encode_responses(vlm, [["two", "3"]])
    ids = outputs.ids[0, 0][outputs.mask[0, 0]]
    read = vlm.tokenizer.decode(torch.cat([prompt.ids, ids[:-1]]))
    assert read.endswith("<think>\n\n</think>\n\ntwo")
    assert without_thoughts(read).endswith("assistant\n\n\ntwo")
    assert outputs.text == [["two", "3"]] and ids[-1] == vlm.stop_ids[0]
    sampled = generate(vlm, [prompt], 2, replace(GREEDY, max_new_tokens=3))
    assert all(text.startswith("<think>") and without_thoughts(text) == "" for text in sampled.text[0])
    D = Discriminator(vlm)                                         # sees neither thoughts nor their marks
    assert D.encode(["?"], [["<think>so</think>two", "two"]]).ids.unique(dim=1).shape[1] == 1


def test_a_tokenizer_that_ends_each_prompt_is_refused(checkpoints, tmp_path):
    """Prompts that end in the stop token: the model is asked what comes after a response."""
    from tokenizers.processors import TemplateProcessing
    vlm = load_vlm(checkpoints["qwen2_5_vl"], "cpu")
    save_vlm(vlm, tmp_path / "m")
    tokenizer = vlm.processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)])
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="appends a token to each prompt"):
        load_vlm(str(tmp_path / "m"), "cpu")


def test_a_template_with_a_line_break_before_bos_gets_one_bos(qwen):
    tokenizer = copy.deepcopy(qwen.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    assert [needs_bos(tokenizer, text) for text in ("<|im_start|>a", "\n<|im_start|>a")] == [False, False]
    assert needs_bos(tokenizer, "a")


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_gives_transformers_own_tokens(vlm, prompts, penalty):
    """Wrong positions after a left-padded prompt, a cache repeated in the wrong order, a mask off by one;
    padding that counts as a token that was seen."""
    ours = generate(vlm, prompts, 1, replace(GREEDY, repetition_penalty=penalty))
    for b, prompt in enumerate(prompts):
        theirs = vlm.model.generate(**transformers_inputs(vlm, prompt), max_new_tokens=12, do_sample=False,
                                    repetition_penalty=penalty, suppress_tokens=vlm.banned_ids)
        assert ours.ids[b, 0][ours.mask[b, 0]].tolist() == theirs[0, len(prompt.ids):].tolist()


def test_rows_that_finish_early_leave_the_others_as_they_were(vlm, prompts):
    """Dropping finished rows must not shuffle the cache. Every token that occurs is made a stop in turn."""
    whole = generate(vlm, prompts, 2, GREEDY)
    stop = whole.ids[0, 0, 3].item()
    vlm.stop_ids.append(stop)
    try:
        cut = generate(vlm, prompts, 2, GREEDY)
    finally:
        vlm.stop_ids.remove(stop)
    for before, after, mask in zip(whole.ids.flatten(0, 1), cut.ids.flatten(0, 1), cut.mask.flatten(0, 1)):
        ended = before.tolist()[:before.tolist().index(stop) + 1] if stop in before else before.tolist()
        assert after[mask].tolist() == ended                       # the stop token itself is inside the mask
    assert cut.mask[0, 0].sum() <= 4


def test_untruncated_sampling_draws_from_all_of_the_distribution():
    """A token that top-k, top-p or the penalty keep out of rollouts, and that no update can push down."""
    torch.manual_seed(0)
    logits, draws = 2 * torch.randn(1, 40), 20_000
    sampling = Sampling(1.5, 0.5, 7, 1.3, truncated=False)
    noise = (torch.arange(draws) + 0.5) / draws                    # evenly: the counts are the probabilities
    seen = torch.ones(1, 40, dtype=torch.bool)
    tokens = sample(logits.expand(draws, -1), seen.expand(draws, -1), sampling, noise)
    expected = draws * (logits[0] / 1.5).softmax(-1)
    assert (tokens.bincount(minlength=40) - expected).abs().max() <= 1.01
    assert sample(logits, seen, replace(sampling, temperature=0), noise[:1]).item() == sample(
        logits, seen, replace(sampling, temperature=0, truncated=True), noise[:1]).item()


def test_tail_is_what_top_k_and_top_p_leave_out(vlm, prompts):
    """A tail of other tokens than sampled ones; one that depends on how many responses run at a time."""
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]])
    for top_p, top_k, cut in ((0.6, 0, 0.3), (0.3, 0, 0.6), (1, 3, 0.1), (0.7, 2, 0.3), (0.5, 2, 0.6),
                              (1, 0, 0)):
        assert tail(probs.log(), Sampling(1, top_p, top_k)).item() == pytest.approx(cut, abs=1e-6)
    for sampling in (Sampling(1.3, 0.6, 20, 1, 9), Sampling(1.3, 0.6, 20, 1, 9, truncated=False)):
        outputs = [generate(vlm, prompts, 3, sampling, torch.Generator().manual_seed(0), slots=n)
                   for n in (None, 2)]
        expected = 0
        for b, prompt in enumerate(prompts):
            for ids, mask in zip(outputs[0].ids[b], outputs[0].mask[b]):
                with torch.no_grad():
                    logits = vlm.model(**transformers_inputs(vlm, prompt, ids[mask])).logits[0]
                logits[:, vlm.banned_ids] = -torch.inf
                expected += tail(logits[len(prompt.ids) - 1:-1], sampling).sum().item()
        assert [o.tail for o in outputs] == pytest.approx([expected] * 2, abs=1e-3) and expected > 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.5, 0, 1.3), Sampling(1.5, 1.0, 7, 1.0)])
def test_sampled_frequencies_match_the_filtered_distribution(sampling):
    """A filter in the wrong order or off by one token: chi-square of 20,000 draws against transformers' own
    warpers."""
    torch.manual_seed(0)
    logits, prompt = 2 * torch.randn(1, 40), torch.tensor([[3, 7, 7, 11]])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.repetition_penalty != 1:
        warpers.insert(0, RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = 20000 * warpers(prompt, logits.clone()).softmax(-1)[0]
    seen = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, prompt, True)
    counts = sample(logits.expand(20000, -1), seen.expand(20000, -1), sampling,
                    torch.rand(20000)).bincount(minlength=40).float()
    assert (counts[expected == 0] == 0).all()                      # filtered tokens never occur
    kept = expected > 0
    chi2 = ((counts - expected)[kept].square() / expected[kept]).sum().item()
    degrees = kept.sum().item() - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_generation_at_temperature_1_follows_the_model(qwen):
    """Sampling from anything but the model's next-token distribution, in the loop itself."""
    prompt = encode(qwen, "How many?", [noise_image(32, 32)])
    outputs = generate(qwen, [prompt], 4000, Sampling(1.0, 1.0, 0, 1.0, max_new_tokens=1),
                       torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = qwen.model(**transformers_inputs(qwen, prompt)).logits[0, -1]
    logits[qwen.banned_ids] = -torch.inf
    expected = 4000 * logits.softmax(-1)
    counts = outputs.ids.flatten().bincount(minlength=len(expected)).float()
    common = expected > 5
    chi2 = ((counts - expected)[common].square() / expected[common]).sum().item()
    assert chi2 < common.sum().item() + 4 * (2 * common.sum().item()) ** 0.5


def test_banned_tokens_are_never_sampled(vlm, prompts):
    """A policy that samples an image placeholder crashes its next forward pass. Their logits are made the
    largest."""
    head = vlm.model.get_output_embeddings()
    with torch.no_grad():
        saved = head.weight.clone()
        head.weight[vlm.banned_ids] *= 1000
        try:
            outputs = generate(vlm, prompts, 8, Sampling(max_new_tokens=6))
        finally:
            head.weight.copy_(saved)
    assert vlm.model.config.image_token_id in vlm.banned_ids
    assert not torch.isin(outputs.ids[outputs.mask], torch.tensor(vlm.banned_ids)).any()


@pytest.mark.parametrize("stride", [None, 8])
def test_slots_change_no_token(vlm, prompts, stride, monkeypatch):
    """Continuous batching that hands a slot on with its old cache, noise or count; a batch that a response
    can notice. Off the CPU (stride 8) the host looks every few tokens only, at numbers of slots that are
    halves of the whole: what a response adds after its end must not be read."""
    monkeypatch.setattr(Slots, "stride", stride)
    sampling = Sampling(max_new_tokens=11)
    stops = torch.arange(20, 60).tolist()           # random weights stop by chance: responses of many lengths
    ours = replace(vlm, stop_ids=vlm.stop_ids + [i for i in stops if i not in vlm.banned_ids])
    noise = [torch.rand(5, 11, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [plain_loop(ours, prompt, rows, sampling) for prompt, rows in zip(prompts, noise)]
    assert len({len(ids) for rows in expected for ids in rows}) > 3
    for slots in (1, 3, 7, 20):
        done = dict(stream(ours, iter(prompts), iter(noise), 5, sampling, slots))
        assert [[ids.tolist() for ids in done[b]] for b in range(4)] == expected


@torch.no_grad()
def plain_loop(vlm, prompt, noise, sampling):
    """Each response by itself, without a cache: the whole text is read again for every token."""
    rows = []
    for chances in noise:
        ids = []
        while len(ids) < sampling.max_new_tokens and not (ids and ids[-1] in vlm.stop_ids):
            inputs = transformers_inputs(vlm, prompt, ids)
            logits = vlm.model(**inputs).logits[:, -1]
            logits[:, vlm.banned_ids] = -torch.inf
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, inputs["input_ids"], True)
            ids.append(sample(logits, seen, sampling, chances[len(ids), None]).item())
        rows.append(ids)
    return rows


def unpacked(vlm, prompts, outputs):
    """Row-per-response log-probs from transformers' own forward: the slow, obvious reference."""
    rows = torch.zeros(outputs.mask.shape)
    for b, prompt in enumerate(prompts):
        for k, mask in enumerate(outputs.mask[b]):
            ids = outputs.ids[b, k][mask]
            logits = vlm.model(**transformers_inputs(vlm, prompt, ids)).logits[0, len(prompt.ids) - 1:-1]
            rows[b, k, :len(ids)] = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return rows


def gradients(vlm, logps, weights):
    vlm.model.zero_grad()
    (logps * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in vlm.model.parameters() if p.grad is not None])


def test_packed_scores_and_gradients_equal_one_row_per_response(vlm, prompts):
    """Responses that see their siblings, positions that run on, prompt or pad tokens in the score, a shift by
    one."""
    sampled = generate(vlm, prompts, 3, Sampling(max_new_tokens=9), torch.Generator().manual_seed(0))
    outputs = concat([sampled, encode_responses(vlm, [["yes", "There are 3 red circles."]] * 4)])
    weights = torch.randn(outputs.mask.shape)
    packed, reference = score(vlm, prompts, outputs), unpacked(vlm, prompts, outputs)
    assert ((packed - reference).abs() / reference.abs().clamp(min=1)).max() < 1e-5
    ours, theirs = gradients(vlm, packed, weights), gradients(vlm, reference, weights)
    assert ((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("bias, scale, cap", [(False, 1.0, None), (True, 1.0, None), (True, 0.5, 2.0)])
def test_log_probs_in_chunks_equal_autograds_own(monkeypatch, bias, scale, cap):
    """Chunks of the head that lose or repeat a token; a hand-written gradient that is wrong."""
    import model
    torch.manual_seed(0)
    head, states = torch.nn.Linear(16, 60, bias), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(60, (50,))
    weights, inputs = torch.randn(50), [states, *head.parameters()]
    logits = scale * head(states)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    plain = (logits / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    for size in (7, 50, 1000):
        monkeypatch.setattr(model, "head_chunk", lambda weight, size=size: size)
        ours = model.TokenLogps.apply(states, head.weight, head.bias, targets, 0.7, scale, cap)
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), inputs), expected)
    head.weight.requires_grad_(False)                              # --freeze lm_head
    ours = model.TokenLogps.apply(states, head.weight, head.bias, targets, 0.7, scale, cap)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), states)[0], expected[0])


def test_teacher_text_never_becomes_an_image_or_a_turn(vlm, prompts):
    """Teacher text that spells special tokens must stay text: no placeholder, no early stop, and it decodes
    to itself."""
    text = "see <|image_pad|> <IMG_CONTEXT> <img> <|im_end|> <|im_start|>user"
    outputs = encode_responses(vlm, [[text], ["yes"]])
    ids = outputs.ids[0, 0][outputs.mask[0, 0]]
    assert not torch.isin(ids, torch.tensor(vlm.banned_ids)).any()
    assert torch.isin(ids, torch.tensor(vlm.stop_ids)).tolist() == [False] * (len(ids) - 1) + [True]
    assert vlm.tokenizer.decode(ids[:-1]) == text
    assert torch.isfinite(score(vlm, prompts[:2], outputs)).all()


def test_a_question_that_spells_an_image_token_is_refused(vlm):
    with pytest.raises(UserError, match="spells"):
        encode(vlm, f"what is {vlm.processor.image_token}?", [noise_image(32, 32)])


def test_any_utf8_text_survives_the_tokenizers(vlm):
    for text in ("naïve café", "日本語 😀", "\t\x01 zero-width\u200b"):
        assert vlm.tokenizer.decode(vlm.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_saved_folder_loads_unchanged_with_transformers_alone(vlm, prompts, tmp_path):
    """A checkpoint that only our own loader understands."""
    save_vlm(vlm, str(tmp_path / "saved"))
    theirs, missing = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved",
                                                                  output_loading_info=True)
    assert not missing["missing_keys"] and not missing["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(value, vlm.model.state_dict()[name])
    again = load_vlm(str(tmp_path / "saved"), "cpu")
    torch.testing.assert_close(generate(again, prompts, 1, GREEDY).ids, generate(vlm, prompts, 1, GREEDY).ids)
    assert (again.stop_ids, again.banned_ids) == (vlm.stop_ids, vlm.banned_ids)


def test_discriminator_reads_each_response_alone_and_as_text(vlm):
    """p_student that depends on the other responses in the row, on padding, or on tags that a response
    spells."""
    torch.manual_seed(0)
    D = Discriminator(vlm)
    texts = ["yes", "There are 3 red circles.", "<|im_end|> no </response> 0", ""]
    together = D.p_student(D.encode([""], [texts]), 512, World())[0]
    alone = torch.cat([D.p_student(D.encode([""], [[text]]), 512, World())[0] for text in texts])
    backwards = D.p_student(D.encode([""], [texts[::-1]]), 512, World())[0].flip(0)
    in_two_parts = D.p_student(D.encode(["", ""], [texts[:2], texts[2:]]), 1, World()).flatten()
    in_many_rows = D.p_student(D.encode([""], [texts * 50]), 512, World())[0, -4:]
    responses = D.encode([""], [texts])
    plain = torch.stack([D.plain_logit(ids[mask]).sigmoid()        # no packing at all
                         for ids, mask in zip(responses.ids[0], responses.mask[0])])
    for other in (alone, backwards, in_two_parts, in_many_rows, plain):
        torch.testing.assert_close(together, other, atol=1e-5, rtol=1e-5)
    assert (D.backbone.embed_tokens.weight == vlm.model.model.language_model.embed_tokens.weight).all()
    assert D.backbone.embed_tokens.weight is not vlm.model.model.language_model.embed_tokens.weight


def test_outputs_join_keeps_text_ids_and_mask_together(qwen):
    a = encode_responses(qwen, [["yes"], ["no"]])
    b = encode_responses(qwen, [["There are 3"], ["blue circles"]])
    both = concat([a, b])
    assert both.text == [["yes", "There are 3"], ["no", "blue circles"]]
    for ids, mask, texts in zip(both.ids, both.mask, both.text):
        assert decode(qwen, [x[m] for x, m in zip(ids, mask)]) == texts
