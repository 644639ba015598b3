"""LoRA adapters (arXiv 2106.09685) in a block of a tower or a layer of a decoder, through peft."""

from __future__ import annotations

import logging

from torch import nn

from effbench.errors import UsageError


def add_adapters(block: nn.Module, rank: int, alpha: float) -> None:
    """Put adapters on the linear layers of a block; they add nothing until they are trained.

    Of a tower's block those of its attention and MLP get one, not those of methods that act in it; of a decoder's
    layer all, GPT-2's too (transformers' Conv1D: a linear layer with its weight transposed).

    Raises:
        UsageError: peft is not installed, or there is no linear layer.
    """
    logging.disable(logging.WARNING)  # importing it warns of what other libraries do
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise UsageError("layer_tune: lora needs peft", "pip install 'effbench[lora]'") from error
    finally:
        logging.disable(logging.NOTSET)
    holders = (block.attn, block.mlp) if hasattr(block, "token_edit") else (block,)  # effbench's own loop runs it
    own = {part for held in holders for part in held.modules()}
    linear = {
        name: part for name, part in block.named_modules() if isinstance(part, nn.Linear | Conv1D) and part in own
    }
    if not linear:
        raise UsageError(
            f"layer_tune: {type(block).__name__} has no linear layer that lora could adapt", "leave lora out"
        )
    for transposed in (False, True):
        names = [name for name, part in linear.items() if isinstance(part, Conv1D) == transposed]
        if names:
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, fan_in_fan_out=transposed)
            inject_adapter_in_model(config, block)


def merge_adapters(block: nn.Module) -> None:
    """Add what a block's adapters have learned to its own weights, and take them out."""
    for name, part in list(block.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge()
            holder, _, own = name.rpartition(".")
            setattr(block.get_submodule(holder), own, part.get_base_layer())
    vars(block).pop("peft_config", None)
