"""Tiny checkpoints of real architectures, made in a second: for tests and self-tests, never for use.

Each maker writes a folder that the Auto class of its key opens like any downloaded checkpoint. Random, seeded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", "the", "sun", "rain", "good", "bad", "very", "day", "night"]
SIGNS = [*"QA:.,?!"]  # for questions and answers


def text_encoder(folder: Path, dropout: float = 0.0, **config: Any) -> Path:
    """A two-layer BERT body (no head) with a word tokenizer. About 10,000 parameters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    )  # fmt: skip
    fast.save_pretrained(folder)
    settings = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "initializer_range": 0.15,
    }  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**(settings | config))).save_pretrained(folder)
    return folder


def image_encoder(folder: Path, dropout: float = 0.0, **config: Any) -> Path:
    """A small ResNet with batch norms and an image head of three labels, for pictures of 16 x 16 pixels."""
    import transformers

    settings: dict[str, Any] = {
        "num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "id2label": {0: "sky", 1: "sea", 2: "sand"}, "label2id": {"sky": 0, "sea": 1, "sand": 2},
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**(settings | config)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)  # as after pre-training: not the 0 and 1 of a new layer
            module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 1.0,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_normalize": True, "do_rescale": True,
        "do_resize": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def causal_lm(folder: Path, dropout: float = 0.0, **config: Any) -> Path:
    """A two-layer Llama with a word tokenizer that puts <s> first. About 5,000 parameters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS, *SIGNS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    settings = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 2,
        "eos_token_id": 3, "pad_token_id": 0, "attention_dropout": dropout, "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | config))).save_pretrained(folder)
    return folder


# A task whose Auto class is not here cannot be tested, and the contract tests say so.
MAKERS: dict[str, Callable[..., Path]] = {
    "AutoModelForSequenceClassification": text_encoder,
    "AutoModelForImageClassification": image_encoder,
    "AutoModelForCausalLM": causal_lm,
}


def mixture(folder: Path, **config: Any) -> Path:
    """A two-layer Mixtral of four experts, of which two answer each token, with the tokenizer of `causal_lm`."""
    import transformers

    causal_lm(folder)
    base = transformers.AutoConfig.from_pretrained(folder)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
              "initializer_range", "tie_word_embeddings")  # fmt: skip
    settings = {key: getattr(base, key) for key in shared} | {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**(settings | config))).save_pretrained(folder)
    return folder
