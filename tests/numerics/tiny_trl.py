"""Real TRL trainers on CPU around a tiny random Llama, with everything built in memory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

NUM_VOCAB = 48
PAD, EOS = 0, 1


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def word_tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, NUM_VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def settings(output_dir):
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }


def grpo_trainer(output_dir, **options):
    config = GRPOConfig(
        **settings(output_dir),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        **options,
    )
    return GRPOTrainer(
        model=tiny_llama(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3"] * 4}),
        processing_class=word_tokenizer(),
    )


def dpo_trainer(output_dir, **options):
    rows = [("w2 w3", " w4 w5 w6", " w7"), ("w8", " w9 w10", " w11 w12 w13 w14")] * 2
    columns = dict(zip(("prompt", "chosen", "rejected"), zip(*rows, strict=True), strict=True))
    config = DPOConfig(**settings(output_dir), per_device_train_batch_size=4, **options)
    return DPOTrainer(
        model=tiny_llama(),
        ref_model=tiny_llama(seed=1),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=word_tokenizer(),
    )
