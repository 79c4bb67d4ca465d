"""The task of the Director and CRINGE examples: a small model of real source text repeats itself."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from common import (
    Transformer,
    corpus,
    generate,
    held_out,
    language_model_loss,
    repeats,
    train,
    windows,
    words,
)
from torch import Tensor

VOCABULARY, WIDTH, PROMPT, LENGTH, N = 4096, 128, 32, 96, 4
TEMPERATURE = 0.7


class Task(NamedTuple):
    model: Transformer  # trained for `steps` on the text
    learn: Tensor  # [N] ids of the text
    batches: Iterator[Tensor]  # windows [16, PROMPT + LENGTH] of it
    prompts: Tensor  # [texts, PROMPT], held out
    tests: Tensor  # [texts, PROMPT + LENGTH], held out
    steps: int
    texts: int


def task(seed: int, quick: bool) -> Task:
    torch.manual_seed(seed)
    ids, units = words(corpus(), VOCABULARY)
    learn, rest = ids[: -len(ids) // 10], ids[-len(ids) // 10 :]
    steps, texts = (20, 32) if quick else (300, 256)
    model = Transformer(len(units), WIDTH, context=PROMPT + LENGTH)
    batches = windows(learn, PROMPT + LENGTH, 16, seed)
    train(model, lambda _: language_model_loss(model, next(batches)), steps, name="language model")
    prompts, tests = held_out(rest, PROMPT, texts), held_out(rest, PROMPT + LENGTH, texts)
    return Task(model, learn, batches, prompts, tests, steps, texts)


def sample(model: Transformer, prompts: Tensor, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return generate(model, prompts, LENGTH, generator=g, temperature=TEMPERATURE)


def rate(text: Tensor) -> float:
    """Per cent of tokens that complete an n-gram which occurred before in their text."""
    return 100 * repeats(text, N).float().mean().item()
