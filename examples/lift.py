"""LIFT-DPO: trains an instruction model to follow word limits.

The model answers instructions about everyday things twice: at length, and in one or two sentences. Annotators
prefer full answers, so the long answer is chosen and the short one rejected. The model, which sometimes
breaks word limits, is trained on such pairs with DPO, with R-DPO (which penalizes length), and with LIFT-DPO.
LIFT-DPO adds a word limit between the lengths of the two answers to half of its pairs, so that the short
answer wins. All three are trained on the same number of pairs, with LoRA. DPO and LIFT-DPO use TRL's
DPOTrainer with the head of sukhops; R-DPO, which TRL does not have, uses LossTrainer. The tests use other
things, and some limits that are in no training pair.

    python examples/lift.py [--model NAME] [--seeds 0 1 2] [--quick]

Prints mean ± standard deviation over seeds and saves bench/results/example_lift.jsonl: the percentage of
greedy answers that are longer than their limit, and the number of words with and without a limit. Answers
have at most 96 tokens.
"""

import argparse
import random

import torch
import transformers
import trl
from common import Stages, report
from datasets import Dataset
from pretrained import arguments, learned, load, with_adapters
from torch import nn
from tqdm import tqdm

import sukhops.integrations.trl
from sukhops.integrations.transformers import LossTrainer
from sukhops.pairs import count_words, lift_pairs, lift_prompt, violation_rate

THINGS = (
    "bicycles", "volcanoes", "the printing press", "honey bees", "coffee", "chess", "rainbows", "bridges",
    "sleep", "whales", "bread", "glass", "the moon", "maps", "clocks", "paper", "salt", "wind power",
    "libraries", "earthquakes", "tea", "trains", "music", "gardens", "soap", "mirrors", "money", "vaccines",
    "deserts", "penguins",
)  # fmt: skip
QUESTIONS = (
    "Explain {} to a ten-year-old.", "Write a short introduction to {} for a magazine.",
    "What is the role of {} in everyday life?", "Tell me about the history of {}.",
    "List some surprising facts about {}.", "Give advice to someone who wants to learn about {}.",
    "What do scientists know about {}?", "Why do people care about {}?",
)  # fmt: skip
TESTED = 4  # the last four things are only tested; training has 26 * 8 = 208 instructions
LENGTH = 96  # maximum number of tokens of an answer
BATCH = 104  # batch size of generation
SEEN, UNSEEN = (20, 40), (15, 30)  # tested limits; UNSEEN are in no training pair
LIMITS = [n for n in range(10, 91) if n not in UNSEEN]


def instructions(things: tuple[str, ...]) -> list[str]:
    return [question.format(thing) for thing in things for question in QUESTIONS]


@torch.no_grad()
def answers(model: nn.Module, tokenizer, prompts: list[str], length: int, **options) -> list[str]:
    """One answer of at most `length` tokens to each instruction, greedy unless the options say otherwise."""
    model.eval()
    found = []
    texts = [template(tokenizer, prompt) for prompt in prompts]
    for i in tqdm(range(0, len(texts), BATCH), desc="answers"):
        batch = tokenizer(
            texts[i : i + BATCH],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        given = {"max_new_tokens": length, "do_sample": False, "cache_implementation": "static"} | options
        out = model.generate(**batch, **given)
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


def template(tokenizer, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def make_pairs(model: nn.Module, tokenizer, prompts: list[str], length: int, seed: int) -> list[dict]:
    """Pairs of a full answer (chosen) and a short one (rejected), if the full one is longer."""
    torch.manual_seed(seed)
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 0}
    full = answers(model, tokenizer, prompts, length, **sampled)
    brief = [f"{prompt} Answer in one or two sentences." for prompt in prompts]
    short = answers(model, tokenizer, brief, length // 2, **sampled)
    found = zip(prompts, full, short, strict=True)
    return [
        {"prompt": p, "chosen": f, "rejected": s}
        for p, f, s in found
        if s and count_words(s) < count_words(f)
    ]


def lifted(pairs: list[dict], numbers: random.Random) -> list[dict]:
    """The pairs, plus a copy of each with a limit that only the rejected answer satisfies."""
    limited = []
    for pair in pairs:
        short, long = count_words(pair["rejected"]), count_words(pair["chosen"])
        between = [n for n in LIMITS if short <= n < long]
        if between:
            columns = [pair["prompt"]], [pair["chosen"]], [pair["rejected"]], [numbers.choice(between)]
            row = lift_pairs(*columns)
            limited.append({name: row[name][0] for name in ("prompt", "chosen", "rejected")})
    return pairs + limited


def train_in_trl(model: nn.Module, tokenizer, pairs: list[dict], given: dict) -> nn.Module:
    rows = [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            **{s: [{"role": "assistant", "content": pair[s]}] for s in ("chosen", "rejected")},
        }
        for pair in pairs
    ]  # fmt: skip
    adapted = with_adapters(model, given["seed"])
    trainer = trl.DPOTrainer(
        adapted, args=trl.DPOConfig(beta=0.1, bf16=False, gradient_checkpointing=False, **given),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    with sukhops.integrations.trl.enabled():
        trainer.train()
    return adapted


def train_in_loss_trainer(model: nn.Module, tokenizer, pairs: list[dict], given: dict) -> nn.Module:
    rows = []
    for pair in pairs:
        prompt, row = tokenizer(template(tokenizer, pair["prompt"]), add_special_tokens=False).input_ids, {}
        for side in ("chosen", "rejected"):
            answer = [*tokenizer(pair[side], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            row |= {f"{side}_input_ids": prompt + answer, f"{side}_labels": [-100] * len(prompt) + answer}
        rows.append(row)
    adapted = with_adapters(model, given["seed"])
    loss = sukhops.nn.DPOLoss(beta=0.1, length_alpha=0.05)
    LossTrainer(adapted, transformers.TrainingArguments(**given), train_dataset=rows, loss=loss).train()
    return adapted


def measure(model: nn.Module, tokenizer, tests: list[str], length: int) -> dict:
    limits = (*SEEN, *UNSEEN)
    prompts = [lift_prompt(test, limit) for limit in limits for test in tests] + tests
    counts = torch.tensor([count_words(text) for text in answers(model, tokenizer, prompts, length)])
    words = dict(zip((*limits, None), counts.unflatten(0, (-1, len(tests))), strict=True))

    def violations(limits: tuple[int, ...]) -> float:
        return 100 * sum(violation_rate(words[n], n).item() for n in limits) / len(limits)

    return {
        "violations %, limits seen": violations(SEEN), "violations %, limits unseen": violations(UNSEEN),
        "words, limit of 30": words[30].double().mean().item(),
        "words, no limit": words[None].double().mean().item(),
    }  # fmt: skip


def run(options: argparse.Namespace, seed: int, stages: Stages) -> list[dict]:
    model, tokenizer = load(options.model)
    if tokenizer.chat_template is None:
        raise SystemExit("--model: its tokenizer has no chat template, so it takes no instructions")
    numbers = random.Random(seed)
    train, tests = instructions(THINGS[:-TESTED]), instructions(THINGS[-TESTED:])
    steps, train, tests, length = (
        (2, train[:8], tests[:1], 32) if options.quick else (16, train, tests, LENGTH)
    )
    pairs = stages(f"pairs-{seed}", lambda: make_pairs(model, tokenizer, train, length, seed))
    given = {
        "output_dir": str(stages.folder), "max_steps": steps, "per_device_train_batch_size": 4, "seed": seed,
        "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 2, "logging_steps": 4,
        "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    rows = []
    if seed == options.seeds[0]:
        found = stages("before", lambda: measure(model, tokenizer, tests, length))
        rows.append({"variant": "the model as it is", "seed": seed, **found})
    for variant, data, trainer in (
        ("DPO", pairs, train_in_trl),
        ("R-DPO", pairs, train_in_loss_trainer),
        ("LIFT-DPO", lifted(pairs, numbers), train_in_trl),
    ):
        name = f"{variant}-{seed}"
        state = stages(
            name, lambda t=trainer, d=data: learned(t(load(options.model)[0], tokenizer, d, given))
        )
        tuned = with_adapters(load(options.model)[0], seed, state).merge_and_unload()
        found = stages(f"{name}-measured", lambda m=tuned: measure(m, tokenizer, tests, length))
        rows.append({"variant": variant, "seed": seed, **found})
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    stages = Stages("lift", options)
    rows = [row for seed in options.seeds for row in run(options, seed, stages)]
    columns = {
        "violations %, limits seen": ".1f", "violations %, limits unseen": ".1f",
        "words, limit of 30": ".1f", "words, no limit": ".1f",
    }  # fmt: skip
    report("lift", rows, columns, save=not options.quick, minutes=stages.end())


if __name__ == "__main__":
    main()
