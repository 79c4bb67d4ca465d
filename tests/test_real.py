"""The integrations on a pretrained model, SmolLM2-135M-Instruct or SUKHOPS_MODEL: make test-real."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("trl")
import real_model  # noqa: E402
from report import RESULTS  # noqa: E402
from trl_step import gradients, make_trainer, training_step  # noqa: E402

import sukhops  # noqa: E402
import sukhops.integrations.trl  # noqa: E402
from sukhops import nn, testing  # noqa: E402
from sukhops.integrations.transformers import (  # noqa: E402
    LossTrainer,
    add_adaptive_spans,
    add_director_head,
    from_pretrained,
)

pytestmark = pytest.mark.real
PROMPTS = ["The capital of France is", "Water boils at a temperature of", "Name a color:", "2 + 2 ="]
CHOSEN = [" Paris, on the river Seine.", " 100 degrees Celsius.", " blue", " 4"]
REJECTED = [" Berlin.", " 12 degrees, as everyone knows.", " seven", " 5, more or less"]


@pytest.fixture(autouse=True)
def quiet():
    torch.use_deterministic_algorithms(False)  # the model uses operators without a deterministic kernel
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(real_model.path())


def load(dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(real_model.path(), dtype=dtype).eval()


def texts(tokenizer, sides):
    made = [a + b for a, b in zip(PROMPTS, sides, strict=True)]
    return dict(tokenizer(made, return_tensors="pt", padding=True, padding_side="right"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
def test_trl(kind, dtype, tokenizer):
    """The same loss and gradients with and without sukhops; in half precision, TRL also rounds logits."""
    given = {"model": load(dtype), "processing_class": tokenizer}
    if kind != "SFT":
        given["ref_model"] = load(dtype)
    trainer, batch = make_trainer(kind, PROMPTS, CHOSEN, REJECTED, {"max_length": 64}, **given)
    plain = training_step(trainer, batch)
    theirs = {n: g.clone() for n, g in gradients(trainer).items()}
    calls = torch.ops.sukhops.product_count()
    with sukhops.integrations.trl.enabled():
        ours = training_step(trainer, batch)
    assert torch.ops.sukhops.product_count() > calls
    rounding = torch.finfo(dtype).eps * 8
    assert abs(ours.item() - plain.item()) <= rounding * abs(plain.item())
    size = max(g.float().norm() for g in theirs.values())
    for name, g in gradients(trainer).items():
        assert (g - theirs[name]).float().norm() <= 4 * rounding * size, name


def test_spans_of_ratio_1_do_not_change_the_model(tokenizer):
    inputs = texts(tokenizer, CHOSEN)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    prompts = dict(tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left"))
    model = load()

    def results():
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        options = [{}, {"cache_implementation": "static"}]
        return loss, *(model.generate(**prompts, max_new_tokens=24, do_sample=False, **o) for o in options)

    loss, *plain = results()
    add_adaptive_spans(model, 256)
    again, *ours = results()
    torch.testing.assert_close(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_director(tokenizer, tmp_path):
    model, inputs = load(), texts(tokenizer, CHOSEN)
    with torch.no_grad():
        plain = model(**inputs, labels=inputs["input_ids"]).loss
    head = add_director_head(model, gamma=0.7)
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, plain)
        head.cls_bias[tokenizer(" Paris").input_ids[0]] = -30.0
    prompt = tokenizer(PROMPTS[:1], return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" not in text
    model.save_pretrained(tmp_path)
    restored = from_pretrained(tmp_path)
    again = tokenizer.decode(restored.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert again == text and restored.lm_head.weight is restored.model.embed_tokens.weight


@pytest.mark.parametrize("adapters", [False, True])
def test_dpo_in_a_loss_trainer(adapters, tokenizer, tmp_path):
    """The loss of the first step equals the one computed from whole logits."""
    model = load()
    if adapters:  # also on the head; randomly initialized, because the default has no effect
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    rows = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        row, start = {}, len(tokenizer(prompt).input_ids)
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            ids = tokenizer(prompt + text).input_ids
            row |= {f"{side}_input_ids": ids, f"{side}_labels": [-100] * start + ids[start:]}
        rows.append(row)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=0.0, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    loss, reference = nn.DPOLoss(beta=0.5), None if adapters else load()
    if reference is not None:
        with torch.no_grad():
            reference.model.norm.weight.mul_(0.9)  # different from the policy
    trainer = LossTrainer(model, arguments, train_dataset=rows, loss=loss, ref_model=reference)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]

    def log_probs(model, row, side):
        ids, labels = (torch.tensor([row[f"{side}_{n}"]]) for n in ("input_ids", "labels"))
        counted = labels[:, 1:] != -100
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logp[counted].sum()

    with torch.no_grad():
        model.eval()
        sides = ("chosen", "rejected")
        own = [[log_probs(model, r, s) for r in rows] for s in sides]
        if adapters:
            with model.disable_adapter():
                ref = [[log_probs(model, r, s) for r in rows] for s in sides]
        else:
            ref = [[log_probs(reference, r, s) for r in rows] for s in sides]
    own, ref = torch.tensor(own), torch.tensor(ref)
    margin = (own[0] - ref[0]) - (own[1] - ref[1])
    expected = -torch.nn.functional.logsigmoid(0.5 * margin).mean()
    assert abs(logged - expected.item()) < 1e-4 and expected.item() > 0  # Trainer logs four digits


def test_log_probs_equal_those_of_whole_logits(tokenizer):
    model, inputs = load(), texts(tokenizer, CHOSEN)
    ids = inputs["input_ids"]
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[:, :-1]
        target = ids[:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)

        def log_probs(dtype):
            logits = hidden.to(dtype) @ model.lm_head.weight.to(dtype).T
            found = logits.log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1))[..., 0]
            return found.masked_fill(target == -100, 0.0)

        exact, eager = log_probs(torch.float64), log_probs(torch.float32)
        ours = sukhops.linear_logp(hidden, model.lm_head.weight, target)
    assert testing.distance(ours, exact) <= testing.budget(ours, eager, exact)


@pytest.mark.parametrize(
    "name", ["adaptive_span", "hybrid_lm", "lift", "meta_rewarding", "repetition", "step_kto"]
)
def test_examples_run(name):
    """A quick run with one seed prints its table and does not change recorded results."""
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    command = [sys.executable, f"examples/{name}.py", "--quick", "--seeds", "0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent.parent, timeout=400)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("\n|") > 3 and "nan" not in run.stdout
    assert before == {path: path.read_bytes() for path in RESULTS.iterdir()}
