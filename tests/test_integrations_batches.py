"""LossTrainer: padded and packed batches, columns, evaluation, logs, effects on the model, invalid inputs."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn as tnn

from sukhops import losses, nn

transformers = pytest.importorskip("transformers", minversion="5.24")

from trainer_inputs import (  # noqa: E402
    CASES,
    LLAMA,
    V,
    arguments,
    by_hand,
    close,
    llama,
    model_for,
    reference_for,
    row,
    rows,
    train,
)

from sukhops.integrations.transformers import LossTrainer  # noqa: E402
from sukhops.integrations.transformers._batches import Collator, Request  # noqa: E402


def test_packed_sequences(tmp_path):
    """One packed row with cu_seqlens and position_ids trains like the padded batch."""
    dataset, (loss, _) = rows("pairs"), CASES["dpo"]
    _, expected = train(tmp_path, llama(), dataset, loss, llama(2))

    def packed(examples):
        sides = [(e[f"{s}_input_ids"], e[f"{s}_labels"]) for s in ("chosen", "rejected") for e in examples]
        ids, labels = (torch.cat([torch.tensor(side[i]) for side in sides])[None] for i in (0, 1))
        lengths = torch.tensor([len(i) for i, _ in sides])
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        labels[0, starts[:-1]] = ids[0, starts[:-1]]  # labels of first tokens must be ignored
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seqlens": starts}

    options = {"data_collator": packed, "remove_unused_columns": False}
    _, found = train(tmp_path, llama(), dataset, loss, llama(2), **options)
    close(found, expected)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    close(train(tmp_path, llama(), dataset, loss, llama(2), **options, **halves)[1], expected)


def test_left_padding(tmp_path):
    """With position_ids, left padding gives the same training as right padding."""

    def left(examples):
        batch = Collator(0, False)(examples)
        shift = [len(batch["input_ids"][0]) - len(e["input_ids"]) for e in examples]
        batch = {n: torch.stack([r.roll(s) for r, s in zip(t, shift, strict=True)]) for n, t in batch.items()}
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return {**batch, "position_ids": positions}

    dataset, loss = [{n: v for n, v in r.items() if n != "label"} for r in rows("label")], nn.CringeLoss()
    dataset = [{**r, "label": [1] * len(r["labels"])} for r in dataset]
    _, expected = train(tmp_path, llama(), dataset, loss)
    _, found = train(tmp_path, llama(), dataset, loss, data_collator=left)
    close(found, expected)


def test_datasets_keep_the_needed_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("dpo", "step kto", "cringe with tokens"):
        loss, kind = CASES[name]
        dataset = datasets.Dataset.from_list([{**r, "text": "dropped"} for r in rows(kind)])
        _, found = train(tmp_path, llama(), dataset, loss, reference_for(name))
        close(found, train(tmp_path, llama(), rows(kind), loss, reference_for(name))[1])


def test_collator():
    batch = Collator(7, True)(rows("steps")[:2])
    assert batch["input_ids"][0, 5] == 7 and batch["labels"][0, 5] == -100 and batch["step_ids"][0, 5] == -1
    assert batch["attention_mask"].sum(-1).tolist() == [5, 6] and batch["step_labels"].shape == (2, 2)
    ids, target = losses.mismatched(batch["labels"][:, 1:], batch["input_ids"][:, :-1], pad_id=7)
    assert torch.equal(batch["kl_input_ids"][:, :-1], ids) and torch.equal(batch["kl_labels"][:, 1:], target)
    chosen = Collator(0, False)(rows("pairs"))["input_ids"]
    assert [int((r > 0).sum()) for r in chosen] == [5, 6, 9, 12, 7, 4, 8, 11]


# ------------------------------------------------------------------ evaluation, logs, effects on the model


def test_evaluation(tmp_path):
    model, (loss, kind) = llama(), CASES["dpo"]
    batch = Collator(0, False)(rows(kind))
    expected, _ = by_hand("dpo", copy.deepcopy(model), llama(2), batch)
    trainer = LossTrainer(
        model, arguments(tmp_path), eval_dataset={"own": rows(kind)}, loss=loss, ref_model=llama(2)
    )
    trainer.compute_loss(
        model.eval(), {n: t[[0, 4]] for n, t in batch.items()}
    )  # metrics of an evaluation that did not finish must not be counted
    found = trainer.evaluate()
    assert found["eval_own_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, value in expected.metrics.items():
        assert found[f"eval_own_{name}"] == pytest.approx(value.float().mean().item(), rel=1e-4, abs=1e-5), (
            name
        )
    assert trainer.state.log_history[-1]["eval_own_margin"] == found["eval_own_margin"]
    predicted = trainer.predict(rows(kind))
    assert (
        predicted.metrics["test_loss"] == pytest.approx(found["eval_own_loss"])
        and predicted.predictions is None
    )


def test_training_and_evaluation_metrics_are_separate(tmp_path):
    trainer = LossTrainer(
        llama(), arguments(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1,
                           per_device_train_batch_size=2, learning_rate=0.0),
        train_dataset=rows("label")[:2], eval_dataset=rows("label")[2:], loss=nn.CringeLoss(),
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    tokens = [log["ce_tokens"] + log["ct_tokens"] for log in logs if "loss" in log]
    assert tokens == [3 + 4, 3 + 4]  # per step, averaged over the two logged steps
    assert [log["eval_ce_tokens"] for log in logs if "eval_loss" in log] == [8.0] * 4


def test_training_does_not_change_the_models_interface(tmp_path):
    model = llama().eval()
    ids = torch.randint(1, V, (2, 6))
    plain, signature = model(ids, labels=ids), inspect.signature(model.forward)
    decoded = model.generate(ids, max_new_tokens=4, do_sample=False)
    train(tmp_path, model, rows("label"), nn.CringeLoss(), learning_rate=0.0)
    model.eval()
    assert inspect.signature(model.forward) == signature
    again = model(ids, labels=ids)
    assert torch.equal(again.loss, plain.loss) and torch.equal(again.logits, plain.logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), decoded)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert not other(ids).logits.any()
    request = Request(None, ids[:, 1:])
    uniform = -torch.log(torch.tensor(float(V)))
    assert torch.allclose(other(input_ids=ids, sukhops_request=request), uniform)
    _, expected = train(tmp_path, llama(), rows("pairs"), nn.DPOLoss(loss_type="cpo"))
    _, found = train(
        tmp_path, model, rows("pairs"), nn.DPOLoss(loss_type="cpo")
    )  # the same model with another loss
    close(found, expected)
    assert torch.isfinite(model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["cringe", "director"])
def test_pickled_model_trains(name, tmp_path):
    loss, kind = CASES[name]
    model = model_for(name)
    LossTrainer(model, arguments(tmp_path), train_dataset=rows(kind), loss=loss)
    copied = pickle.loads(pickle.dumps(model))
    _, found = train(tmp_path, copied, rows(kind), loss)
    close(found, train(tmp_path, model, rows(kind), loss)[1])


def test_no_logits_are_computed(tmp_path):
    class Head(tnn.Linear):
        def forward(self, x):
            assert not self.training, "logits"
            return super().forward(x)

    model = llama()
    head = Head(16, V, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    train(tmp_path, model, rows("label"), nn.CringeLoss())


def test_bfloat16(tmp_path, monkeypatch):
    """With bf16=True, the operator gives bitwise the result of bfloat16 hidden and weight."""
    seen, operator = [], nn.dpo.linear_token_stats

    def spy(hidden, weight, *args, **kwargs):
        stats = operator(hidden, weight, *args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            both = [
                operator(hidden.to(d), weight.to(d), *args, **kwargs) for d in (torch.bfloat16, torch.float32)
            ]
        seen.append([torch.equal(stats.logp, one.logp) for one in both])
        return stats

    monkeypatch.setattr(nn.dpo, "linear_token_stats", spy)
    trainer, _ = train(tmp_path, llama(), rows("pairs"), nn.DPOLoss(), llama(2), bf16=True)
    exact, _ = train(tmp_path, llama(), rows("pairs"), nn.DPOLoss(), llama(2))
    assert seen == [[True, False], [False, True]]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(exact.state.log_history[0]["loss"], rel=0.05)


# ------------------------------------------------------------------ invalid inputs


def test_invalid_losses_and_models_raise(tmp_path):
    args = arguments(tmp_path)

    def raises(error, match, **options):
        with pytest.raises(error, match=match):
            LossTrainer(**{"model": llama(), "args": args, "loss": nn.CringeLoss(), **options})

    raises(TypeError, "loss: expected one of .* got SegmentationLoss", loss=nn.SegmentationLoss())
    raises(TypeError, "expected a DirectorHead with a DirectorLoss", loss=nn.DirectorLoss())
    raises(TypeError, "causal language model of transformers.*got Linear", model=tnn.Linear(2, 2))
    config = transformers.GraniteConfig(**LLAMA, logits_scaling=8.0)
    raises(ValueError, "logits_scaling", model=transformers.GraniteForCausalLM(config))
    mixture = llama()
    mixture.config.output_router_logits = True
    raises(ValueError, "output_router_logits", model=mixture)
    raises(ValueError, "ref_model: expected a reference .*ref_model, a PEFT model", loss=nn.DPOLoss())
    raises(ValueError, "uses no reference", ref_model=llama(2))
    raises(ValueError, "uses no reference", loss=nn.DPOLoss(loss_type="cpo"), ref_model=llama(2))
    same = llama()
    raises(ValueError, "the model itself", loss=nn.DPOLoss(), model=same, ref_model=same)
    for name in ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        raises(ValueError, name, **{name: lambda *a, **k: None})
    raises(ValueError, "label_smoothing", args=arguments(tmp_path, label_smoothing_factor=0.1))
    several = arguments(tmp_path)
    several._n_gpu = 2
    raises(ValueError, "n_gpu: expected one GPU per process", args=several)


def test_unsupported_parallelism_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(LossTrainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match="context and sequence parallelism are not supported"):
        LossTrainer(llama(), arguments(tmp_path), loss=nn.CringeLoss())


def test_a_batch_without_reference_log_probs_raises(tmp_path):
    """The dataset has the log-probs, but the user's collator drops them."""

    def collate(batch):
        return Collator(0, False)([{n: v for n, v in r.items() if "ref" not in n} for r in batch])

    dataset = [{**r, "chosen_ref_logp": -1.0, "rejected_ref_logp": -2.0} for r in rows("pairs")]
    with pytest.raises(ValueError, match=r"batch: expected ref_logp .* without ref_model, got none"):
        train(tmp_path, llama(), dataset, nn.DPOLoss(), data_collator=collate)


def test_evaluation_without_batches_has_no_metrics(tmp_path):
    trainer = LossTrainer(llama(), arguments(tmp_path), loss=nn.CringeLoss())
    assert trainer._take("eval") == {}


def test_missing_and_unknown_columns_raise(tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = [row(5), row(6)]
    for dataset in (plain, datasets.Dataset.from_list(plain)):
        for options in ({"train_dataset": dataset}, {"eval_dataset": {"one": dataset}}):
            with pytest.raises(ValueError, match=r"dataset.*CringeLoss.* needs the columns \['label'\]"):
                LossTrainer(llama(), arguments(tmp_path), loss=nn.CringeLoss(), **options)
    unlabeled = [{"input_ids": [1, 2, 3], "label": 1}]
    with pytest.raises(ValueError, match=r"needs the columns \['labels'\]"):
        LossTrainer(llama(), arguments(tmp_path), train_dataset=unlabeled, loss=nn.CringeLoss())

    def first_batch(loss, change, kind="label", **options):
        def collate(examples):
            return change(Collator(0, False)(examples))

        return train(tmp_path, llama(), rows(kind), loss, data_collator=collate, **options)

    def without(name):
        return lambda batch: {n: t for n, t in batch.items() if n != name}

    with pytest.raises(ValueError, match=r"batch: .* needs the columns \['label'\], got \['attention_mask'"):
        first_batch(nn.CringeLoss(), without("label"))
    with pytest.raises(ValueError, match=r"takes the columns \['labell'\]"):
        first_batch(nn.CringeLoss(), lambda batch: {**batch, "labell": 1})
    with pytest.raises(ValueError, match=r"labels: expected shape \[B, T\] as input_ids"):
        first_batch(nn.CringeLoss(), lambda batch: {**batch, "labels": batch["labels"][:, 1:]})
    with pytest.raises(ValueError, match="needs the column kl, or kl_input_ids and kl_labels"):
        first_batch(nn.KTOLoss(), lambda batch: batch, "desirable", ref_model=llama(2))


# ------------------------------------------------------------------ rows


def changed(kind, number, **columns):
    """Example rows in which row `number` has the given columns; None drops a column."""
    made = rows(kind)
    made[number] = {n: v for n, v in {**made[number], **columns}.items() if v is not None}
    return made


@pytest.mark.parametrize(
    "kind, column, value, match",
    [
        ("label", "labels", [5, 6], "labels: expected as many values as input_ids in row 2.*, 10, got 2"),
        ("token labels", "label", [1], "label: expected as many values as input_ids in row 2.*, 10, got 1"),
        ("steps", "step_ids", [0] * 11, "step_ids: .* as input_ids in row 2 of the batch, 10, got 11"),
        ("label", "ref_logp", [0.5], "ref_logp: .* as input_ids in row 2 of the batch, 10, got 1"),
        ("pairs", "chosen_labels", [5], "chosen_labels: .* as chosen_input_ids in row 2 .*, 9, got 1"),
        (
            "pairs",
            "rejected_ref_logp",
            [5.0],
            "rejected_ref_logp: .* rejected_input_ids in row 2.*, 8, got 1",
        ),
        ("label", "label", None, r"row 2 of the batch: .*\['label'\] are not in all rows"),
        ("label", "more", 1, r"row 2 of the batch: .*\['more'\] are not in all rows"),
        ("token labels", "label", 1, "label: expected a number in every row or a list .*, got both"),
        ("label", "label", "bad", "label: expected a number.* in row 2 of the batch, got 'bad'"),
    ],
)
def test_invalid_rows_raise(kind, column, value, match):
    made = changed(kind, 2, **{column: value})
    if column.endswith("ref_logp"):
        made = [{**r, column: 0.5} | ({column: value} if i == 2 else {}) for i, r in enumerate(made)]
    with pytest.raises(ValueError, match=match):
        Collator(0, False)(made)


def test_unused_text_column_raises(tmp_path):
    dataset = [{**r, "text": "words"} for r in rows("label")]
    with pytest.raises(ValueError, match=r"text: expected a number .* in row 0 of the batch, got 'words'"):
        train(tmp_path, llama(), dataset, nn.CringeLoss(), remove_unused_columns=False)
    train(tmp_path, llama(), dataset, nn.CringeLoss())


class Stream(torch.utils.data.IterableDataset):
    """An iterable dataset that has a length."""

    def __init__(self, made):
        self.rows = made

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


@pytest.mark.parametrize("loss", [nn.DPOLoss(loss_type="cpo"), nn.PairwiseCringeLoss()])
def test_pairs_need_their_four_columns(loss, tmp_path):
    half = [{n: v for n, v in r.items() if n.startswith("chosen_")} for r in rows("pairs")]
    for dataset, missing in ((rows("label"), "chosen_input_ids"), (half, "rejected_input_ids")):
        with pytest.raises(ValueError, match=rf"train_dataset: .* needs the columns \['{missing}'"):
            LossTrainer(llama(), arguments(tmp_path), train_dataset=dataset, loss=loss)
        with pytest.raises(ValueError, match=rf"row 0 of the batch: .*{missing}"):
            train(tmp_path, llama(), Stream(dataset), loss)
    _, expected = train(tmp_path, llama(), rows("pairs"), loss)
    close(train(tmp_path, llama(), Stream(rows("pairs")), loss)[1], expected)


def test_reference_log_probs_in_only_one_dataset_raise(tmp_path):
    with_logp = [{**r, "chosen_ref_logp": -1.0, "rejected_ref_logp": -2.0} for r in rows("pairs")]
    options = {"model": llama(), "args": arguments(tmp_path), "loss": nn.DPOLoss()}
    LossTrainer(**options, train_dataset=with_logp, eval_dataset=with_logp)
    LossTrainer(**options, train_dataset=Stream(with_logp), eval_dataset=with_logp)
    LossTrainer(**options, train_dataset=with_logp, eval_dataset=rows("pairs"), ref_model=llama(2))
    with pytest.raises(ValueError, match=r"eval_dataset two: .* \['chosen_ref_logp', 'rejected_ref_logp'\]"):
        LossTrainer(**options, train_dataset=with_logp, eval_dataset={"one": with_logp, "two": rows("pairs")})


def test_kto_with_reference_log_probs_needs_kl(tmp_path):
    """Without a reference model, log-probs of mismatched completions cannot be computed."""
    with_logp = [{**r, "ref_logp": -1.0} for r in rows("desirable")]
    options = {"model": llama(), "args": arguments(tmp_path), "loss": nn.KTOLoss()}
    with pytest.raises(ValueError, match=r"without ref_model KTOLoss.* needs the column kl"):
        LossTrainer(**options, train_dataset=with_logp)
    LossTrainer(**options, train_dataset=[{**r, "kl": 0.1} for r in with_logp]).train()


def test_kto_needs_two_rows_in_each_batch(tmp_path):
    dataset = rows("desirable")

    def made(dataset=dataset, name="train_dataset", collate=None, **options):
        args = arguments(tmp_path, **options)
        return LossTrainer(llama(), args, collate, **{name: dataset}, loss=nn.KTOLoss(), ref_model=llama(2))

    three = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"{name}: 4 rows in batches of 3 .*dataloader_drop_last"):
            made(name=name, **three)
    with pytest.raises(ValueError, match="4 rows in batches of 1 leave"):
        made(per_device_train_batch_size=1, dataloader_drop_last=True)
    made()
    made(dataloader_drop_last=True, **three)
    made(dataset=[{**r, "kl": 0.1} for r in dataset], **three)
    made(collate=Collator(0, True), **three)
    datasets = pytest.importorskip("datasets")
    made(dataset=datasets.Dataset.from_list(dataset).to_iterable_dataset(), **three)  # its length is unknown
