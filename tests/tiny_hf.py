"""Tiny random models of transformers, saved to disk with tokenizer and processor as real ones are."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IMAGE = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
WORDS = "red green blue yellow beside number take and a circle on Describe the image briefly USER ASSISTANT . : ,"
IDS = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *IMAGE, *VISION, *WORDS.split()))}
VOCABULARY = 48  # a few more than there are words
LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=1,
    eos_token_id=2,
)
TEMPLATE = (
    "USER : {% for c in messages[0]['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT :"
)


def tokenizer(special=(), **changed):
    made = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    options = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>") | changed
    words = PreTrainedTokenizerFast(tokenizer_object=made, **options)
    words.add_special_tokens({"additional_special_tokens": list(special)})
    return words


def loud(model):
    """Random weights that are large enough for every part of the model to show in its logits."""
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.3)
        elif "bias" in name:
            torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def llama(folder: Path, **changed):
    model = loud(LlamaForCausalLM(LlamaConfig(**LLAMA | changed)))
    return _saved(folder, model, tokenizer())


def gpt2(folder: Path, **changed):
    config = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    return _saved(folder, loud(GPT2LMHeadModel(GPT2Config(**config | changed))), tokenizer())


def llava(folder: Path):
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    vision = dict(image_size=32, patch_size=8, num_hidden_layers=3, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=24, intermediate_size=32, **vision),
        text_config=LlamaConfig(**LLAMA),
        image_token_id=IDS["<image>"],
        vision_feature_layer=-2,
    )
    pictures = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    processor = LlavaProcessor(
        pictures,
        tokenizer(("<image>",)),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _saved(folder, loud(LlavaForConditionalGeneration(config)), processor)


def idefics3(folder: Path):
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    vision = dict(image_size=32, patch_size=8, num_hidden_layers=3, num_attention_heads=2)
    config = Idefics3Config(
        vision_config=dict(hidden_size=24, intermediate_size=32, **vision),
        text_config=LlamaConfig(**LLAMA),
        scale_factor=2,
        image_token_id=IDS["<image>"],
    )
    pictures = Idefics3ImageProcessor(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))
    processor = Idefics3Processor(pictures, tokenizer(IMAGE), image_seq_len=4)
    return _saved(folder, loud(Idefics3ForConditionalGeneration(config)), processor)


def qwen_vl(folder: Path, newer: bool = False):
    from transformers import Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    if newer:
        from transformers import Qwen2_5_VLConfig as Config
        from transformers import Qwen2_5_VLForConditionalGeneration as Model
        from transformers import Qwen2_5_VLProcessor as Processor

        vision = dict(hidden_size=24, out_hidden_size=16, window_size=16, fullatt_block_indexes=[1])
        vision |= dict(intermediate_size=32)
    else:
        from transformers import Qwen2VLConfig as Config
        from transformers import Qwen2VLForConditionalGeneration as Model
        from transformers import Qwen2VLProcessor as Processor

        vision = dict(embed_dim=24, hidden_size=16, mlp_ratio=2)
    rope = dict(rope_type="default", rope_theta=100.0, mrope_section=[1, 1, 2])
    config = Config(
        text_config=LLAMA | dict(rope_parameters=rope, max_position_embeddings=256),
        vision_config=vision | dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2),
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    pictures = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512 * 512)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2)
    processor = Processor(pictures, tokenizer(VISION), videos, chat_template=TEMPLATE)
    return _saved(folder, loud(Model(config)), processor)


def _saved(folder: Path, model, words):
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model
