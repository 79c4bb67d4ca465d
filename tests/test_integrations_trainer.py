"""LossTrainer: every loss compared with a direct computation, accumulation, references, ranks."""

import copy
import os

import pytest
import torch
from ranks import on_ranks
from torch import nn as tnn

from sukhops import nn

transformers = pytest.importorskip("transformers", minversion="5.24")

from trainer_inputs import (  # noqa: E402
    CASES,
    MODELS,
    SIZES,
    arguments,
    by_hand,
    close,
    last_hidden,
    llama,
    model_for,
    reference_for,
    rows,
    train,
)

from sukhops.integrations.transformers import LossTrainer  # noqa: E402
from sukhops.integrations.transformers._batches import Collator, Request  # noqa: E402
from sukhops.integrations.transformers._trainer import _answer_requests  # noqa: E402


def check(name, make, folder):
    loss, kind = CASES[name]
    model, ref_model = model_for(name, make), reference_for(name, make)
    batch = Collator(0, kind in ("desirable", "steps"))(rows(kind))
    expected, gradients = by_hand(name, copy.deepcopy(model).train(), ref_model, batch)
    trainer, found = train(folder, model, rows(kind), loss, ref_model)
    close(found, gradients)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    for metric, value in expected.metrics.items():
        assert log[metric] == pytest.approx(value.float().mean().item(), rel=1e-4, abs=1e-5), metric


@pytest.mark.parametrize("name", CASES)
def test_training_step_matches_direct_computation(name, tmp_path):
    check(name, llama, tmp_path)


@pytest.mark.parametrize("model", ["tied llama", "gpt2", "phi"])
@pytest.mark.parametrize("name", ["dpo", "director", "kto"])
def test_models(name, model, tmp_path):
    check(name, MODELS[model], tmp_path)


def test_dpo_on_logits(tmp_path):
    """DPO compared with a computation from whole logits."""
    model, ref_model = llama(), llama(2)
    batch = Collator(0, False)(rows("pairs"))
    target = batch["labels"][:, 1:]

    def logp(one):
        logits = one(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return picked.where(target != -100, 0.0).sum(-1).view(2, -1)

    with torch.no_grad():
        ratio = logp(model) - logp(ref_model)
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])).mean()
    trainer, _ = train(tmp_path, model, rows("pairs"), nn.DPOLoss(), ref_model)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


# KTO estimates its reference point from each micro-batch, unless kl is given
ACCUMULATED = [n for n in CASES if n not in ("kto", "outcomes alone")]


@pytest.mark.parametrize("name", [*ACCUMULATED, "kto with kl"])
def test_accumulation(name, tmp_path):
    """Two micro-batches give the gradient of the batch; a loss with two counts gives the mean of theirs."""
    loss, kind = CASES[name.removesuffix(" with kl")]
    dataset = [{**r, "kl": 0.1} for r in rows(kind)] if kind in ("desirable", "steps") else rows(kind)
    ref_model = reference_for(name.removesuffix(" with kl"))
    halves, whole = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}

    def gradients(dataset, options):
        return train(tmp_path, model_for(name), dataset, loss, copy.deepcopy(ref_model), **options)

    two, found = gradients(dataset, halves)
    one, expected = gradients(dataset, whole)
    first, second = (
        gradients(half, {"per_device_train_batch_size": 2})[1] for half in (dataset[:2], dataset[2:])
    )
    mean = {n: (first[n] + second[n]) / 2 for n in first}
    counts_once = name not in ("step kto", "director per example", "two counts")
    close(found, expected if counts_once else mean)
    if counts_once:
        assert two.state.log_history[0]["loss"] == pytest.approx(one.state.log_history[0]["loss"], rel=1e-5)
    pairs = kind == "pairs" or kind == "desirable"  # with equal counts in both halves, the two are equal
    if counts_once and not pairs:
        with pytest.raises(AssertionError):
            close(mean, expected)


def test_short_last_step_is_divided_by_its_own_count(tmp_path):
    trainer, _ = train(
        tmp_path, llama(), rows("pairs")[:3], nn.DPOLoss(loss_type="cpo"), per_device_train_batch_size=1,
        gradient_accumulation_steps=2, max_steps=2, learning_rate=0.0,
    )  # fmt: skip
    alone, _ = train(tmp_path, llama(), rows("pairs")[2:3], nn.DPOLoss(loss_type="cpo"))
    assert trainer.state.log_history[1]["loss"] == pytest.approx(alone.state.log_history[0]["loss"], rel=1e-5)


def test_all_targets_ignored_gives_a_loss_of_zero(tmp_path):
    dataset = [{**r, "labels": [-100] * len(r["labels"])} for r in rows("label")]
    trainer, gradients = train(tmp_path, llama(), dataset, nn.CringeLoss(), logging_nan_inf_filter=False)
    assert trainer.state.log_history[0]["loss"] == 0 and not any(g.any() for g in gradients.values())


# ------------------------------------------------------------------ references


def test_reference_log_probs_in_the_dataset(tmp_path):
    """Log-probs per token or per sequence replace the reference model."""
    ref_model, dataset = llama(2), rows("pairs")
    _, expected = train(tmp_path, llama(), dataset, nn.DPOLoss(), ref_model)
    for per_token in (True, False):
        more = []
        for one in dataset:
            added = dict(one)
            for side in ("chosen", "rejected"):
                ids, labels = (torch.tensor([one[f"{side}_{n}"]]) for n in ("input_ids", "labels"))
                head = nn.HeadLoss(ref_model.lm_head, None)
                with torch.no_grad():
                    logp = head(last_hidden(ref_model, {"input_ids": ids}), labels[:, 1:])[0]
                added[f"{side}_ref_logp"] = [0.0, *logp.tolist()] if per_token else logp.sum().item()
            more.append(added)
        _, found = train(tmp_path, llama(), more, nn.DPOLoss())
        close(found, expected)


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("saved", [False, True])
def test_peft(name, saved, tmp_path):
    """The reference is the model without adapters, in eval mode; also if PEFT wraps the head."""
    peft = pytest.importorskip("peft")
    loss, kind = CASES[name]

    def adapted():
        torch.manual_seed(3)
        more = {"modules_to_save": ["lm_head"]} if saved else {}
        targets = ["q_proj", "v_proj"] if saved else ["q_proj", "lm_head"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **more)
        return peft.get_peft_model(llama(), config)

    _, expected = train(tmp_path, adapted(), rows(kind), loss, llama())
    trainer, found = train(tmp_path, adapted(), rows(kind), loss)
    close(found, expected)
    assert trainer.model.training and all(
        p.requires_grad for n, p in trainer.model.named_parameters() if n in found
    )
    _, other = train(tmp_path, adapted(), rows(kind), loss, llama(2))
    with pytest.raises(AssertionError):
        close(other, expected)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt learning"):
        LossTrainer(peft.get_peft_model(llama(), prompts), arguments(tmp_path), loss=loss)


def test_reference_has_no_dropout(tmp_path):
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **SIZES)
    ref_model = transformers.GPT2LMHeadModel(config).train()
    trainer = LossTrainer(llama(), arguments(tmp_path), loss=nn.DPOLoss(), ref_model=ref_model)
    batch = Collator(0, False)(rows("pairs"))
    logp = [trainer._reference(trainer.model, batch, batch["labels"][:, 1:]) for _ in range(2)]
    assert torch.equal(*logp) and not logp[0].requires_grad
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(attention_dropout=0.5), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = LossTrainer(adapted.train(), arguments(tmp_path), loss=nn.DPOLoss())
    logp = [trainer._reference(adapted, batch, batch["labels"][:, 1:]) for _ in range(2)]
    assert torch.equal(*logp) and adapted.training


# ------------------------------------------------------------------ several processes


def as_launched(rank):
    """Sets the environment variables of torchrun, which accelerate reads."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def on_two_ranks(rank, folder):
    as_launched(rank)
    found = {}
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for name in ("director", "dpo"):
        loss, kind = CASES[name]
        trainer, gradients = train(folder, model_for(name), rows(kind), loss, reference_for(name), **options)
        assert isinstance(trainer.model_wrapped, tnn.parallel.DistributedDataParallel)
        log = trainer.state.log_history[0]
        found[name] = gradients, log["loss"]
    stream = type(
        "Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(rows("label"))}
    )
    for dispatches in (None, False):
        args = arguments(folder, ddp_backend="gloo", accelerator_config={"dispatch_batches": dispatches})
        try:
            LossTrainer(llama(), args, train_dataset=stream(), loss=nn.CringeLoss())
            found[dispatches] = "made"
        except ValueError as error:
            found[dispatches] = str(error)
    found["fsdp"] = sharded(rank)
    return found


def sharded(rank):
    """Gradients with FSDP2, which requires head and loss to run inside the wrapped forward."""
    from torch.distributed.fsdp import fully_shard

    model = llama(tie_word_embeddings=True)
    _answer_requests(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    batch = Collator(0, False)(rows("label"))
    mine = {n: t[2 * rank : 2 * rank + 2] for n, t in batch.items()}
    label = mine.pop("label")
    target = mine.pop("labels")[:, 1:]
    total = int((batch["labels"] != -100).sum())
    request = Request(nn.CringeLoss(), target, {"label": label, "num_items": total / 2})
    model(**mine, sukhops_request=request).loss.backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters()}


def test_two_ranks(tmp_path):
    """DDP with two micro-batches of one row gives the gradient and loss of one process with all rows."""
    for found in on_ranks(2, on_two_ranks, str(tmp_path)):
        assert isinstance(found, dict), found
        for name in ("director", "dpo"):
            loss, kind = CASES[name]
            trainer, expected = train(tmp_path, model_for(name), rows(kind), loss, reference_for(name))
            gradients, value = found[name]
            close(gradients, expected)
            assert value == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
        assert "dispatch_batches: expected False" in found[None] and found[False] == "made"
        tied = llama(tie_word_embeddings=True)
        _, expected = train(tmp_path, tied, rows("label"), nn.CringeLoss())
        close(found["fsdp"], expected)
