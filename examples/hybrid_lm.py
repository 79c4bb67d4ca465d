"""A hybrid language model over characters and n-grams against a character model, on the standard library's source.

The same small transformer reads characters. As a character model it predicts the next one; as a hybrid it
predicts, with one softmax, whichever character or n-gram starts next, and its likelihood of a text is the sum
over all segmentations of the text into those units. The first steps of the hybrid train the flat loss of the
published recipe, the rest the likelihood. Compared after as many steps, and after as much time: a step of the
hybrid takes longer, so the character model gets more of them.

    python examples/hybrid_lm.py [--data FILE] [--seeds 0 1 2] [--quick]

Bits per character are those of the true likelihood of held-out text. One lattice spans all of it, so no boundary
is forced anywhere; the states are those of windows that overlap by half, the same for both models. Prints mean ±
deviation over seeds and the likeliest segmentation of some held-out lines; saves
bench/results/example_hybrid_lm.jsonl.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import Transformer, arguments, corpus, report, train, windows
from torch import Tensor, nn

import sukhops
from sukhops.losses import unit_targets

WIDTH, LAYERS, LENGTH, BATCH = 128, 2, 128, 16
MAX_LENGTH, MIN_COUNT = 4, 200
FLAT = 0.1  # share of the hybrid's steps that train the flat loss
RATE = 3e-3


class Part(NamedTuple):
    """A text and, for each position, the units that start there under a lexicon."""

    text: str
    units: Tensor  # [N, K]


def parts(lexicon: sukhops.Lexicon, learn: str, held_out: str) -> list[Part]:
    return [Part(text, lexicon.unit_ids([text])[0][0]) for text in (learn, held_out)]


def language_model(lexicon: sukhops.Lexicon, characters: int) -> Transformer:
    """Reads characters, whose ids are the same in every lexicon of a text, and predicts units."""
    model = Transformer(characters, WIDTH, LAYERS, context=LENGTH)
    model.head = nn.Linear(WIDTH, len(lexicon), bias=False)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def fit(model: Transformer, part: Part, steps: int, seed: int, name: str) -> float:
    """Trains on random windows; -> seconds."""
    likelihood, flat = sukhops.nn.SegmentationLoss(), sukhops.nn.SegmentationLoss(flat=True)
    warm = FLAT * steps if part.units.shape[1] > 1 else 0
    positions = windows(torch.arange(len(part.units)), LENGTH + 1, BATCH, seed)

    def step(i: int) -> Tensor:
        at = next(positions)
        read, units = part.units[at[:, :-1], 0], part.units[at[:, 1:]]  # [B, T], [B, T, K]
        loss = flat if i < warm else likelihood
        return loss(model.backbone(read), model.head.weight, units).loss

    began = time.perf_counter()
    train(model, step, steps, lr=RATE, name=name)
    return time.perf_counter() - began


@torch.no_grad()
def lattice(model: Transformer, units: Tensor) -> Tensor:
    """Scores [1, N - 1, K] of the units [N, K] of a text from its second position on."""
    half = LENGTH // 2
    read = units[:-1, 0].unfold(0, LENGTH, half)  # [W, LENGTH]
    starts = units[1:].unfold(0, LENGTH, half).transpose(1, 2)  # [W, LENGTH, K]
    scores = []
    for some, ids in zip(read.split(64), starts.split(64), strict=True):
        logp = sukhops.linear_logp(model.backbone(some), model.head.weight, ids.masked_fill(ids < 0, -100))
        scores.append(logp.masked_fill(ids < 0, -torch.inf))
    scores = torch.cat(scores)
    # of each window the half that has seen the other half
    joined = torch.cat([scores[0, :half], scores[:, half:].flatten(0, 1)]).unsqueeze(0)
    ends = unit_targets(torch.zeros(joined.shape, dtype=torch.int64))
    return joined.masked_fill(ends < 0, -torch.inf)


def bits_per_character(scores: Tensor) -> float:
    return -sukhops.ops.segmentation.segmentation_logz(scores.double()).item() / scores.shape[1] / math.log(2)
