"""Shared by the examples with a pretrained model: loading, tokenized texts, generation, LoRA."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import common
import peft
import real_model
import torch
import torch.nn.functional as F
import transformers
from texts import documentation
from torch import Tensor, nn
from tqdm import tqdm

from sukhops.integrations.transformers import LossTrainer

ROWS = 50  # batch size of generation


def arguments(description: str) -> argparse.ArgumentParser:
    parser = common.arguments(description)
    parser.add_argument(
        "--model", default=os.environ.get("SUKHOPS_MODEL"),
        help="folder or hub name of a causal model (default: SmolLM2-135M-Instruct)",
    )  # fmt: skip
    return parser


def load(name: str | None) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer."""
    transformers.logging.set_verbosity_error()
    path = real_model.path(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    own = model.generation_config  # drop its sampling options and penalties
    kept = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id or 0}
    model.generation_config = transformers.GenerationConfig(**kept)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def manual(tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids of Django's manual: of the training pages, and of every fifth page for testing."""
    pages = documentation()
    parts = [[p for i, p in enumerate(pages) if (i % 5 == 4) == test] for test in (False, True)]
    learn, test = (tokenizer("\n\n".join(part), return_tensors="pt").input_ids[0] for part in parts)
    return learn, test


@torch.no_grad()
def continuations(model: nn.Module, prompts: Tensor, length: int, **options) -> Tensor:
    """Generates `length` tokens after each prompt [N, P] -> [N, length]; greedy by default."""
    model.eval()
    given = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length} | options
    parts = [
        model.generate(some, attention_mask=torch.ones_like(some), **given)[:, prompts.shape[1] :]
        for some in tqdm(prompts.split(ROWS), desc="generate")
    ]
    return torch.cat(parts)


@torch.no_grad()
def perplexity(model: nn.Module, texts: Tensor, start: int, process: Callable | None = None) -> float:
    """Perplexity of texts [N, T] from token `start` on; `process(ids, logits)`: a logits processor."""
    model.eval()
    total, length = 0.0, texts.shape[1] - start
    for some in tqdm(texts.split(10), desc="perplexity"):
        logits = model(some, logits_to_keep=length + 1).logits[:, :-1].float()
        if process is not None:
            steps = [process(some[:, : start + i], logits[:, i].clone()) for i in range(length)]
            logits = torch.stack(steps, 1)
        total += F.cross_entropy(logits.flatten(0, 1), some[:, start:].flatten(), reduction="sum").item()
    return math.exp(total / (texts.shape[0] * length))


def with_adapters(model: transformers.PreTrainedModel, seed: int, state: dict | None = None) -> nn.Module:
    """The model with LoRA on the linear layers of its blocks: new, or with a state from `learned`."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    if state is not None:
        adapted.load_state_dict(state, strict=False)
    return adapted


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fit(model: nn.Module, loss: nn.Module, rows: list[dict], folder: Path, seed: int, lr: float) -> None:
    """One pass over the rows, in batches of 8."""
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=8, learning_rate=lr, warmup_steps=2,
        lr_scheduler_type="cosine", seed=seed, logging_steps=4, save_strategy="no", report_to=[],
    )  # fmt: skip
    LossTrainer(model, arguments, train_dataset=rows, loss=loss).train()
