"""Tiny random checkpoints of many VLM families, each with the family's real processor, as ordinary folders
on disk.

What RIL's own toy models are not: checkpoints whose images are cut into tiles, whose text attends in windows,
whose image tokens come wrapped in rows and columns. The chat templates are short ones in the manner of each
family.
"""
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pil_llava_onevision
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

WIDTH = 32
# special tokens that a response may have
WORDS = {"box_token": "<|box_start|>", "think_token": "<think>", "thought_token": "</think>"}
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif "
    "%}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA_TEMPLATE = (                                     # Gemma has no system turn: it goes before the question
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content[0].text + "
                  "'\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}"
    "{% for part in m.content %}{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% "
                  "endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


def decoder(kind, vocabulary, layers=2, **more):
    return dict(model_type=kind, vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                max_position_embeddings=4096, initializer_range=0.1, **more)


def vision(**more):
    return dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, initializer_range=0.1, **more)


def qwen(kind, **eye):
    """The three Qwen-VL families: they differ in their text model's name and in their vision tower."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return (QWEN, "<|vision_start|><|image_pad|><|vision_end|>", {},
            lambda size, ids: dict(text_config=decoder(f"{kind}_text", size, rope_parameters=rope),
                                   vision_config=dict(patch_size=8, **eye), **ids),
            Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size))


def idefics(image_processor):
    """SmolVLM and Idefics3: images cut into tiles, in rows and columns."""
    names = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
             "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
    names |= {f"cell_{i}_{j}": f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)}
    eye = vision(num_hidden_layers=1, image_size=32, patch_size=8)
    return (names, "<image>", {"image_seq_len": 4},
            lambda size, ids: dict(text_config=decoder("llama", size), scale_factor=2, vision_config=eye,
                                   image_token_id=ids["image_token_id"]),
            image_processor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}))


def internvl():
    names = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
             "start_image_token": "<img>", "end_image_token": "</img>"}
    eye = vision(num_hidden_layers=1, image_size=[32, 32], patch_size=[8, 8])
    return (names, "<IMG_CONTEXT>\n", {"image_seq_length": 4},
            lambda size, ids: dict(text_config=decoder("qwen2", size), downsample_ratio=0.5,
                                   image_seq_length=4, vision_config=eye,
                                   image_token_id=ids["context_image_token_id"]),
            GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4))


def llava():
    eye = vision(model_type="clip_vision_model", num_hidden_layers=2, image_size=32, patch_size=8,
                 projection_dim=32)
    return ({"image_token": "<image>"}, "<image>\n",
            {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
            lambda size, ids: dict(text_config=decoder("llama", size), vision_config=eye, **ids),
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))


def llava_onevision():
    eye = vision(model_type="siglip_vision_model", num_hidden_layers=2, image_size=32, patch_size=8,
                 vision_use_head=False)
    more = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [32, 96]]}
    return ({"image_token": "<image>", "video_token": "<video>"}, "<image>\n",
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full",
             "vision_aspect_ratio": "anyres_max_9"},
            lambda size, ids: dict(text_config=decoder("qwen2", size), vision_config=eye, **more, **ids,
                                   vision_feature_layer=-1, vision_feature_select_strategy="full"),
            pil_llava_onevision.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, **more))


def gemma3():
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
             "eoi_token": "<end_of_image>"}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    eye = vision(model_type="siglip_vision_model", num_hidden_layers=1, image_size=32, patch_size=8,
                 vision_use_head=False)
    return (names, None, {"image_seq_length": 4},
            lambda size, ids: dict(text_config=decoder("gemma3_text", size, 3, sliding_window=16,
                                                       layer_types=layers, query_pre_attn_scalar=16),
                                   vision_config=eye, mm_tokens_per_image=4,
                                   image_token_id=ids["image_token_id"], boi_token_index=ids["boi_token_id"],
                                   eoi_token_index=ids["eoi_token_id"]),
            Gemma3ImageProcessorPil(size={"height": 32, "width": 32}))


ROPE = {"rope_type": "default", "rope_theta": 1e6}
LAYERS = ["sliding_attention", "full_attention"] * 2
GLM = {"image_token": "<|image|>", "video_token": "<|video|>", "begin_token": "<|begin_of_image|>",
       "end_image_token": "<|end_of_image|>", "begin_video_token": "<|begin_of_video|>",
       "end_video_token": "<|end_of_video|>"}
GEMMA4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
          "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
          "video_token": "<|video|>"}


def like_qwen(kind, more, eye, ids=tuple(QWEN), settings=(("merge_size", 2), ("temporal_patch_size", 2))):
    """Families that take Qwen's pictures: Qwen3.5 (linear attention), LFM3-VL (convolutions), EXAONE 4.5."""
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return (QWEN, "<|vision_start|><|image_pad|><|vision_end|>", {},
            lambda size, found: dict(text_config=decoder(kind, size, 4, **more), vision_config=eye,
                                     **{f"{name}_id": found[f"{name}_id"] for name in ids}),
            Qwen2VLImageProcessorPil(patch_size=8, size=size, **dict(settings)))


def qwen3_5():
    more = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                linear_num_value_heads=4, layer_types=["linear_attention"] * 3 + ["full_attention"],
                rope_parameters=ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
                                        "mrope_interleaved": True})
    return like_qwen("qwen3_5_text", more, dict(patch_size=8, depth=2, hidden_size=32, intermediate_size=64,
                                                num_heads=2, out_hidden_size=WIDTH,
                                                num_position_embeddings=64, initializer_range=0.1))


def lfm3_vl():
    more = dict(layer_types=["conv", "full_attention", "conv", "sliding_attention"], sliding_window=8,
                conv_L_cache=7)
    eye = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
               num_hidden_layers=2, patch_size=8, layer_types=["conv", "full_attention"])
    parts = like_qwen("lfm3", more, eye)
    return (*parts[:3], lambda size, ids: parts[3](size, ids) | {"projector_hidden_size": 32}, parts[4])


def exaone4_5():
    more = dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], sliding_window=8)
    return like_qwen("exaone4", more, dict(patch_size=8, depth=2, hidden_size=32, intermediate_size=64,
                                           num_heads=2, num_key_value_heads=1, out_hidden_size=WIDTH,
                                           window_size=32, fullatt_block_indexes=[1]),
                     ("image_token", "video_token"))


def gemma4(**more):
    """Layers with a window and without, inputs of each layer, keys that layers share; with a cap of the
    logits, or images that are seen both ways."""
    more |= dict(sliding_window=8, layer_types=LAYERS, hidden_activation="gelu_pytorch_tanh",
                 global_head_dim=16, hidden_size_per_layer_input=8, num_kv_shared_layers=2)
    eye = vision(num_hidden_layers=1, num_key_value_heads=2, head_dim=16, patch_size=8, pooling_kernel_size=2,
                 position_embedding_size=64)
    return (GEMMA4, "<|image|>", {},
            lambda size, ids: dict(text_config=decoder("gemma4_text", size, 4, **more,
                                                       vocab_size_per_layer_input=size), vision_config=eye,
                                   **{name: ids[name] for name in ("image_token_id", "video_token_id",
                                                                   "boi_token_id", "eoi_token_id")}),
            Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70))


def glm46v():
    eye = dict(patch_size=8, depth=1, hidden_size=32, intermediate_size=64, num_heads=2, image_size=64,
               out_hidden_size=WIDTH, initializer_range=0.1)
    rope = ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
    names = {"image_token_id": "image_token_id", "video_token_id": "video_token_id",
             "image_start_token_id": "begin_token_id", "image_end_token_id": "end_image_token_id",
             "video_start_token_id": "begin_video_token_id", "video_end_token_id": "end_video_token_id"}
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return (GLM, "<|begin_of_image|><|image|><|end_of_image|>", {},
            lambda size, ids: dict(text_config=decoder("glm4v_text", size, rope_parameters=rope),
                                   vision_config=eye, **{name: ids[own] for name, own in names.items()}),
            Glm46VImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size))


def llava_next():
    eye = vision(model_type="clip_vision_model", num_hidden_layers=2, image_size=32, patch_size=8,
                 projection_dim=32)
    grid = [[32, 64], [64, 32], [64, 64]]
    return ({"image_token": "<image>"}, "<image>\n",
            {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
            lambda size, ids: dict(text_config=decoder("llama", size), vision_config=eye,
                                   image_token_index=ids["image_token_id"], image_grid_pinpoints=grid,
                                   image_seq_length=16),
            LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
                                       image_grid_pinpoints=grid))


def aya_vision():
    """Its config has a scale of the logits, which the family does not heed."""
    names = {"image_token": "<image>", "start_token": "<|START_OF_IMG|>", "stop_token": "<|END_OF_IMG|>",
             "patch_token": "<|IMG_PATCH|>", "break_token": "<|IMG_LINE_BREAK|>",
             "global_token": "TILE_GLOBAL"} | {f"tile{i}_token": f"TILE_{i}" for i in range(1, 5)}
    eye = vision(model_type="siglip_vision_model", num_hidden_layers=2, image_size=32, patch_size=8,
                 vision_use_head=False)
    return (names, "<image>", {"patch_size": 8, "img_size": 32, "downsample_factor": 2},
            lambda size, ids: dict(text_config=decoder("cohere2", size, 4, sliding_window=8,
                                                       layer_types=LAYERS, logit_scale=1 / 16),
                                   vision_config=eye,
                                   image_token_index=ids["patch_token_id"]),
            GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4))


# family: (processor class, function that gives special tokens, image in the template, processor settings,
# config of a vocabulary and its ids, image processor)
PARTS = {
    "qwen2_vl": ("Qwen2VL", lambda: qwen("qwen2_vl", depth=1, embed_dim=32, hidden_size=WIDTH, num_heads=2,
                                         mlp_ratio=2)),
    "qwen2_5_vl": ("Qwen2_5_VL", lambda: qwen("qwen2_5_vl", **vision(
        depth=2, num_heads=2, out_hidden_size=WIDTH, window_size=32, fullatt_block_indexes=[1]))),
    "qwen3_vl": ("Qwen3VL", lambda: qwen("qwen3_vl", **vision(
        depth=2, num_heads=2, out_hidden_size=WIDTH, num_position_embeddings=64,
        deepstack_visual_indexes=[0]))),
    "internvl": ("InternVL", internvl), "llava": ("Llava", llava),
    "llava_onevision": ("LlavaOnevision", llava_onevision),
    "smolvlm": ("SmolVLM", lambda: idefics(SmolVLMImageProcessorPil)),
    "idefics3": ("Idefics3", lambda: idefics(Idefics3ImageProcessorPil)), "gemma3": ("Gemma3", gemma3),
    "qwen3_5": ("Qwen3VL", qwen3_5), "lfm3_vl": ("Lfm3Vl", lfm3_vl),
    "gemma4": ("Gemma4", lambda: gemma4(final_logit_softcapping=30.0)),
    "gemma4-two-way": ("Gemma4", lambda: gemma4(use_bidirectional_attention="vision")),
    "glm46v": ("Glm46V", glm46v), "exaone4_5": ("Exaone4_5_", exaone4_5),
    "llava_next": ("LlavaNext", llava_next), "aya_vision": ("AyaVision", aya_vision)}
FAMILIES = tuple(PARTS)
# those whose responses cannot share a row
IN_ROWS = ("qwen3_5", "lfm3_vl", "gemma4-two-way")


def build(folder, family, texts, vocabulary=400, seed=0):
    """Write the checkpoint folder of a family; its tokenizer is trained on `texts`, and covers any UTF-8
    text."""
    torch.manual_seed(seed)
    folder = Path(folder)
    kind, parts = PARTS[family]
    names, image, settings, config_of, image_processor = parts()
    turns = ["<start_of_turn>", "<end_of_turn>"] if family == "gemma3" else ["<|im_start|>", "<|im_end|>"]
    last = "<eos>" if family == "gemma3" else turns[1]             # Gemma ends a text otherwise than a turn
    alphabet = {char: i for i, char in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token=last, pad_token="<|endoftext|>",
                               bos_token="<bos>", extra_special_tokens=names
                               | {"turn_token": turns[0], "end_token": turns[1]} | WORDS)
    tokenizer = tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
    tokenizer.chat_template = GEMMA_TEMPLATE if family == "gemma3" else TEMPLATE.replace("IMAGE", image)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    stops = list(dict.fromkeys(tokenizer.convert_tokens_to_ids([last, turns[1]])))
    ends = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id}
    config = CONFIG_MAPPING[family.split("-")[0]](**config_of(len(tokenizer), ids), tie_word_embeddings=False)
    for name, value in ends.items():
        setattr(config.get_text_config(), name, value)
    model = AutoModelForImageTextToText.from_config(config)
    if family == "gemma3":                                    # starts as zeros: no image would reach the text
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=3.0)
    if family in FAMILIES[9:]:                                # norms that are not 1, and nothing that is 0
        noise = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            if weight.dim() == 1 or not weight.any():
                weight.data += 0.1 * torch.randn(weight.shape, generator=noise)
    if family == "gemma4":                                    # or its cap would not show
        model.get_output_embeddings().weight.data *= 20
    model.get_output_embeddings().weight.data[stops] *= 3     # or hardly any response would end
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    settings["processor_class"] = f"{kind}Processor"
    (folder / "processor_config.json").write_text(json.dumps(settings))
