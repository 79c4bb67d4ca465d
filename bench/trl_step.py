"""One training step of TRL's trainers without and with `sukhops.integrations.trl`: time, memory, difference.

A step is the forward and backward of one batch with activation checkpointing, TRL's default; the optimizer is
not timed. A batch has `--pairs` pairs, or twice as many single completions. Each sequence has `--tokens`
tokens; half of them are the prompt. The two providers alternate in one process. Peak memory is measured in a
new process: the memory that a step adds, after a short step, minus the size of the gradients. `--record`
writes to bench/results instead of bench/own.
"""

import argparse
import copy
import ctypes
import logging
import multiprocessing
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import harness
import real_model
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

import sukhops.integrations.trl

PROVIDERS = {"TRL": nullcontext, "sukhops": sukhops.integrations.trl.enabled}
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
# Allowed relative difference of losses and gradient norms. In bfloat16, KTO's gradient is a small difference
# of two sums: the gradients of both providers differ from that of a float32 model by half.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.2}


def word_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Splits text at spaces; the vocabulary is three special tokens, then `words`."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    index = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_trainer(
    kind: str, prompts: list[str], chosen: list[str], rejected: list[str], options: dict, **given
) -> tuple:
    """A trainer of TRL (such as kind "DPO") and its first batch, which contains all texts.

    Only DPO uses `rejected`. For KTO, every second completion is desirable.
    """
    columns = {
        "SFT": {"prompt": prompts, "completion": chosen},
        "DPO": {"prompt": prompts, "chosen": chosen, "rejected": rejected},
        "KTO": {"prompt": prompts, "completion": chosen, "label": [i % 2 == 0 for i in range(len(prompts))]},
        "GRPO": {"prompt": prompts},
    }[kind]
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{kind}Config")(
            output_dir=folder, per_device_train_batch_size=len(prompts), use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, **options,
        )  # fmt: skip
        dataset = Dataset.from_dict(columns)
        trainer = getattr(trl, f"{kind}Trainer")(args=args, train_dataset=dataset, **given)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def training_step(trainer: transformers.Trainer, batch: dict) -> torch.Tensor:
    """Runs forward and backward and returns the loss; the gradients are in the parameters."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss.detach()


def gradients(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def load(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if name == "tiny":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).to(dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def prepare(kind: str, method: str, dtype: torch.dtype, args: argparse.Namespace) -> tuple:
    """The trainer and the batch of a case."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    model = load(args.model, dtype)
    words = [f"w{i}" for i in range(model.config.vocab_size - 3)]
    generator = torch.Generator().manual_seed(0)

    def texts(count: int, length: int) -> list[str]:
        drawn = torch.randint(len(words), (count, length), generator=generator)
        return [" " + " ".join(words[i] for i in row) for row in drawn.tolist()]

    half = args.tokens // 2
    count = args.pairs if kind == "DPO" else 2 * args.pairs
    prompts = texts(count, half)
    chosen, rejected = (texts(count, args.tokens - half - 1) for _ in range(2))  # TRL appends one token
    given = {"model": model, "processing_class": word_tokenizer(words)}
    if method == "LoRA":
        given["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    elif kind != "SFT":
        given["ref_model"] = copy.deepcopy(model)
    trainer, batch = make_trainer(kind, prompts, chosen, rejected, {"max_length": args.tokens}, **given)
    assert batch["input_ids"].shape == (2 * args.pairs, args.tokens)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer, batch


def measure_time(kind: str, method: str, dtype: torch.dtype, args: argparse.Namespace) -> dict:
    """Seconds of each provider, differences between their first steps, and sizes of the batch."""
    trainer, batch = prepare(kind, method, dtype, args)
    losses, norms, seconds = [], [], {name: [] for name in PROVIDERS}
    for i in range(args.rounds + 1):
        for name, context in PROVIDERS.items():
            with context():
                step = lambda: losses.append(training_step(trainer, batch).item())  # noqa: E731
                seconds[name].append(harness.clock(step))
            if i == 0:
                norms.append({n: g.float().norm().item() for n, g in gradients(trainer).items()})
    largest = max(norms[0].values())
    labels = batch["labels"] != -100 if kind == "SFT" else batch["completion_mask"] == 1
    return {
        "seconds": {name: values[1:] for name, values in seconds.items()},  # the first ones warm up
        "loss_difference": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradient_difference": max(abs(norms[1][n] - g) for n, g in norms[0].items()) / largest,
        "labels": labels[:, 1:].sum().item(),
        "D": trainer.model.config.hidden_size,
        "V": trainer.model.config.vocab_size,
    }


def measure_memory(
    provider: str, kind: str, method: str, dtype: torch.dtype, args: argparse.Namespace
) -> int:
    """Bytes that one step allocates, without the gradients."""
    trainer, batch = prepare(kind, method, dtype, args)
    short = {n: t[:, -16:] if t.dim() == 2 else t for n, t in batch.items()}
    with PROVIDERS[provider]():
        training_step(trainer, short)  # loads code and starts threads
        trainer.model.zero_grad()
        ctypes.CDLL(None).malloc_trim(0)
        before = harness.resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        training_step(trainer, batch)
    kept = sum(g.numel() * g.element_size() for g in gradients(trainer).values())
    return harness.resident("VmHWM") - before - kept


def send(call, results, *arguments) -> None:
    results.put(call(*arguments))


def in_fresh_process(call, *arguments):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=send, args=(call, results, *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{call.__name__} failed")
    return results.get()


def run_case(kind: str, method: str, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    case = (kind, method, dtype, args)
    found = in_fresh_process(measure_time, *case)
    memory = {name: in_fresh_process(measure_memory, name, *case) / 2**20 for name in PROVIDERS}
    seconds = found.pop("seconds")
    sizes = {n: found.pop(n) for n in ("labels", "D", "V")}
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
    base = {
        "op": "trl_step", "case": f"{kind}, {method}, {Path(args.model).name}", "dtype": str(dtype)[6:],
        "shape": {"sequences": 2 * args.pairs, "tokens": args.tokens, **sizes}, **harness.machine(),
        "threads": args.threads, "trl": trl.__version__, "transformers": transformers.__version__,
        "mode": "fwd_bwd", "rounds": args.rounds, **found,
    }  # fmt: skip
    rows = []
    for name, values in seconds.items():
        times = {f"p{q}_ms": round(1e3 * harness.quantile(values, q), 3) for q in (20, 50, 80)}
        rows.append(base | {"provider": name} | times | {"memory_mib": round(memory[name], 1)})
    rows[1]["ratio_p50"] = round(harness.quantile(ratios, 50), 4)
    for row in rows:
        ratio = f"  {row['ratio_p50']:.3f}x" if "ratio_p50" in row else ""
        print(
            f"{row['case']:<28} {row['dtype']:<9} {row['provider']:<8} {row['p50_ms']:>10.1f} ms  "
            f"{row['memory_mib']:>9.1f} MiB{ratio}",
            flush=True,
        )
    worst = max(found.values())
    if not worst <= ALLOWED[dtype]:
        raise SystemExit(f"TRL and sukhops disagree: {found}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder or hub name; tiny: a small random Llama (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="per sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", default="", help='only cases whose "TRAINER METHOD DTYPE" contains this')
    parser.add_argument("--record", action="store_true", help="write to bench/results, for the documentation")
    args = parser.parse_args()
    args.model = args.model or real_model.path()
    for dtype in ALLOWED:
        for kind in ("SFT", "DPO", "KTO"):
            for method in ("full", "LoRA"):
                if args.case in f"{kind} {method} {str(dtype)[6:]}":
                    harness.save("trl_step", run_case(kind, method, dtype, args), args.record)


if __name__ == "__main__":
    main()
