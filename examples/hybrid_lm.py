"""A hybrid language model over characters and n-grams, compared with a character model, on English text.

Both models are the same small transformer, which reads characters. The character model predicts the next
character. The hybrid predicts, with one softmax, the character or n-gram that starts next; its likelihood of
a text is the sum over all segmentations of the text into those units. One hybrid is trained on this
likelihood from the start, another first on the flat loss of the published recipe. The models are compared
after the same number of steps and after the same time: a step of the hybrid takes longer (measured with
alternating steps), so the character model gets more steps.

    python examples/hybrid_lm.py [--data FILE] [--seeds 0 1 2] [--quick]

The text is definitions and quotations of a dictionary, unless a file is given. Bits per character are
computed from the exact likelihood of held-out text: one lattice spans the whole text, so no boundary is
forced, not even between blocks. For both models, hidden states come from windows that overlap by half. Prints
mean ± standard deviation over seeds and the most likely segmentation of some held-out lines; saves
bench/results/example_hybrid_lm.jsonl.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from common import Stages, Transformer, arguments, report, train, windows
from texts import dictionary
from torch import Tensor, nn

import sukhops
from sukhops.losses import unit_targets

WIDTH, LAYERS, LENGTH, BATCH, STEPS = 96, 2, 128, 8, 350
MAX_LENGTH, MIN_COUNT = 4, 200
FLAT = 0.2  # fraction of the steps with the flat loss, if it comes first
RATE = 6e-3


class Part(NamedTuple):
    """A text and, for each position, the ids of the units that start there."""

    text: str
    units: Tensor  # [N, K]


def parts(lexicon: sukhops.Lexicon, learn: str, held_out: str) -> list[Part]:
    return [Part(text, lexicon.unit_ids([text])[0][0]) for text in (learn, held_out)]


def language_model(lexicon: sukhops.Lexicon, characters: int) -> Transformer:
    """A model that reads characters (their ids are equal in both lexicons) and predicts units."""
    model = Transformer(characters, WIDTH, LAYERS, context=LENGTH)
    model.head = nn.Linear(WIDTH, len(lexicon), bias=False)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def trainer(model: Transformer, part: Part, seed: int, warm: float = 0) -> Callable[[int], Tensor]:
    """Returns a function from the step to its loss on random windows; before step `warm`, the flat loss."""
    likelihood, flat = sukhops.nn.SegmentationLoss(), sukhops.nn.SegmentationLoss(flat=True)
    positions = windows(torch.arange(len(part.units)), LENGTH + 1, BATCH, seed)

    def step(i: int) -> Tensor:
        index = next(positions)
        read, units = part.units[index[:, :-1], 0], part.units[index[:, 1:]]  # [B, T], [B, T, K]
        loss = flat if i < warm else likelihood
        return loss(model.backbone(read), model.head.weight, units).loss

    return step


def relative_time(models: list[Transformer], learn: list[Part], rounds: int) -> float:
    """Median ratio of the time of a step of the second model to the first; their steps alternate."""
    steps = [trainer(model, part, 0) for model, part in zip(models, learn, strict=True)]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    ratios = []
    for _ in range(rounds):
        times = []
        for step, optimizer in zip(steps, optimizers, strict=True):
            began = time.perf_counter()
            optimizer.zero_grad()
            step(1).backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


@torch.no_grad()
def lattice(model: Transformer, units: Tensor) -> Tensor:
    """Scores [1, N - 1, K] of the units [N, K] of a text, from its second position on."""
    half = LENGTH // 2
    read = units[:-1, 0].unfold(0, LENGTH, half)  # [W, LENGTH]
    starts = units[1:].unfold(0, LENGTH, half).transpose(1, 2)  # [W, LENGTH, K]
    scores = []
    for some, ids in zip(read.split(64), starts.split(64), strict=True):
        logp = sukhops.linear_logp(model.backbone(some), model.head.weight, ids.masked_fill(ids < 0, -100))
        scores.append(logp.masked_fill(ids < 0, -torch.inf))
    scores = torch.cat(scores)
    # the second half of each window, which has the first half as context
    joined = torch.cat([scores[0, :half], scores[:, half:].flatten(0, 1)]).unsqueeze(0)
    ends = unit_targets(torch.zeros(joined.shape, dtype=torch.int64))
    return joined.masked_fill(ends < 0, -torch.inf)


def bits_per_character(scores: Tensor) -> float:
    return -sukhops.segmentation_logz(scores).item() / scores.shape[1] / math.log(2)


def show(scores: Tensor, text: str, count: int) -> None:
    """Prints lines of a text in their most likely segmentation, and probabilities of boundaries in tenths."""
    starts = sukhops.segmentation_viterbi(scores).segments[0] > 0  # [N - 1], of text[1:]
    boundary = sukhops.segmentation_marginals(scores)[0].sum(-1)
    print("\nmost likely segmentation; below each character: probability that a unit starts there, in tenths")
    at = 0
    for line in text.split("\n"):
        if count and 0 < at and 30 <= len(line.strip()) and len(line) <= 70 and at + len(line) <= len(starts):
            cut = starts[at - 1 :].tolist()
            tenths = (10 * boundary[at - 1 :]).int().clamp(max=9).tolist()
            print("  " + "".join("|" * cut[i] + c for i, c in enumerate(line)))
            print("  " + "".join(" " * cut[i] + str(tenths[i]) for i in range(len(line))))
            count -= 1
        at += len(line) + 1


class Data(NamedTuple):
    """Lexicons and texts; index 0 of each list: only characters, index 1: units of the hybrid."""

    lexicons: list[sukhops.Lexicon]
    learned: list[Part]  # to train on
    tested: list[Part]  # held out
    held_out: str

    def model(self, kind: int) -> Transformer:
        return language_model(self.lexicons[kind], len(self.lexicons[0]))


def prepare(text: str, tail: int) -> Data:
    learn, held_out = text[: -len(text) // 10], text[-len(text) // 10 :][:tail]
    lexicons = [
        sukhops.Lexicon.from_text([learn], max_length=1),
        sukhops.Lexicon.from_text([learn], MAX_LENGTH, MIN_COUNT),
    ]
    learned, tested = zip(*(parts(lexicon, learn, held_out) for lexicon in lexicons), strict=True)
    return Data(lexicons, list(learned), list(tested), held_out)


def run(seed: int, data: Data, steps: int, longer: float) -> list[dict]:
    """The rows of a seed; a step of the hybrid takes `longer` times as long as one of the character model."""
    rows = []
    for variant, kind, count, warm in (
        ("characters", 0, steps, 0), ("characters, in the time of a hybrid", 0, round(longer * steps), 0),
        ("hybrid", 1, steps, 0), ("hybrid, the flat loss first", 1, steps, FLAT * steps),
    ):  # fmt: skip
        torch.manual_seed(seed)
        model = data.model(kind)
        train(model, trainer(model, data.learned[kind], seed, warm), count, lr=RATE, name=variant)
        scores = lattice(model, data.tested[kind].units)
        rows.append({
            "variant": variant, "seed": seed, "bits per character": bits_per_character(scores),
            "steps": count, "time": count / steps * (longer if kind else 1.0),
            "units": len(data.lexicons[kind]), "parameters": sum(p.numel() for p in model.parameters()),
        })  # fmt: skip
        if kind and not warm and seed == 0:
            show(scores, data.held_out, 4)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text file to use instead of the dictionary")
    options = parser.parse_args()
    stages = Stages("hybrid_lm", options)
    steps, tail, rounds = (20, 4_000, 3) if options.quick else (STEPS, 50_000, 25)
    text = dictionary() if options.data is None else options.data.read_text(errors="replace")
    data = prepare(text[: 200_000 if options.quick else 2_000_000], tail)
    models = [data.model(kind) for kind in (0, 1)]
    longer = stages("time", lambda: relative_time(models, data.learned, rounds))
    rows = []
    for seed in options.seeds:
        rows += stages(f"seed-{seed}", lambda s=seed: run(s, data, steps, longer))
    columns = {
        "bits per character": ".3f", "steps": ",.0f", "time": ".2f", "units": ",.0f", "parameters": ",.0f",
    }  # fmt: skip
    report("hybrid_lm", rows, columns, save=not options.quick, minutes=stages.end())


if __name__ == "__main__":
    main()
