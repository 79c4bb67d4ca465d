"""Tiny transformers models, rows of token ids for every loss, and the first step of a LossTrainer."""

import torch
import transformers

from sukhops import nn
from sukhops.integrations.transformers import LossTrainer, add_director_head

V = 60
SIZES = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, **SIZES,
}  # fmt: skip


def llama(seed=1, **options):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **options}))


def gpt2(seed=1):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.3,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
        **SIZES,
    )
    return transformers.GPT2LMHeadModel(config)


def phi(seed=1):
    """A model whose head has a bias."""
    torch.manual_seed(seed)
    return transformers.PhiForCausalLM(transformers.PhiConfig(**{**LLAMA, "partial_rotary_factor": 0.5}))


MODELS = {
    "llama": llama,
    "tied llama": lambda seed=1: llama(seed, tie_word_embeddings=True),
    "gpt2": gpt2,
    "phi": phi,
}
TOKENS = torch.Generator()


def row(length, **more):
    ids = torch.randint(1, V, (length,), generator=TOKENS).tolist()
    return {"input_ids": ids, "labels": [-100, -100, *ids[2:]], **more}


def pair(*lengths):
    sides = zip(("chosen", "rejected"), map(row, lengths), strict=True)
    return {f"{side}_{name}": value for side, one in sides for name, value in one.items()}


def rows(kind):
    """Four example rows; the first two have another number of labels than the last two."""
    TOKENS.manual_seed(5)
    if kind == "pairs":
        return [pair(5, 7), pair(6, 4), pair(9, 8), pair(12, 11)]
    made = [row(n) for n in (5, 6, 10, 12)]
    if kind == "label":
        return [{**r, "label": label} for r, label in zip(made, (0, 1, -1, 0), strict=True)]
    if kind == "token labels":
        return [{**r, "label": [i % 3 - 1 for i in range(len(r["labels"]))]} for r in made]
    made = [{**r, "desirable": i != 1} for i, r in enumerate(made)]
    if kind == "steps":
        steps = [[-1, -1, *[i % 2 for i in range(len(r["labels"]) - 2)]] for r in made]
        made = [{**r, "step_ids": s, "step_labels": [1, 0]} for r, s in zip(made, steps, strict=True)]
    return made


CASES = {
    "director": (nn.DirectorLoss(), "label"),
    "director with tokens": (nn.DirectorLoss(train_lm_on_positive=True, norm_weight=0.2), "token labels"),
    "cringe": (nn.CringeLoss(k=1), "label"),
    "cringe with tokens": (nn.CringeLoss(k=1), "token labels"),
    "pairwise cringe": (nn.PairwiseCringeLoss(), "pairs"),
    "dpo": (nn.DPOLoss(), "pairs"),
    "wpo": (nn.DPOLoss(use_weighting=True), "pairs"),
    "cpo": (nn.DPOLoss(loss_type="cpo"), "pairs"),
    "kto": (nn.KTOLoss(), "desirable"),
    "step kto": (nn.StepKTOLoss(), "steps"),
    "outcomes alone": (nn.StepKTOLoss(step_weight=0.0), "steps"),
    "director per example": (nn.DirectorLoss(reduction="sum_of_means"), "label"),
    "two counts": (nn.DPOLoss(nll_weight=1.0), "pairs"),
}
WITH_REFERENCE = ("dpo", "wpo", "kto", "step kto", "outcomes alone", "two counts")


def model_for(name, make=llama):
    model = make()
    if name.startswith("director"):
        add_director_head(model, shared=name == "director with tokens")
    return model


def reference_for(name, make=llama):
    return make(2) if name in WITH_REFERENCE else None


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.found is None:
            named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


def arguments(folder, **options):
    fixed = {
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1,
        "logging_steps": 1, "max_grad_norm": 0, "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**fixed, **options})


def train(folder, model, dataset, loss, ref_model=None, data_collator=None, **options):
    """Trains; returns the trainer and the gradients of the first step."""
    gradients = Gradients()
    trainer = LossTrainer(
        model, arguments(folder, **options), data_collator, dataset, loss=loss, ref_model=ref_model,
        callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    return trainer, gradients.found


def close(found, expected, rtol=1e-4, atol=1e-6):
    assert set(found) == set(expected) and found
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def last_hidden(model, batch):
    """Last hidden states from the forward of the whole model, not of its backbone."""
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask") if n in batch}
    return model(**inputs, output_hidden_states=True).hidden_states[-1][:, :-1]


def by_hand(name, model, ref_model, batch):
    """The loss computed from the hidden states of the whole model, and the gradients of its parameters."""
    loss, kind = CASES[name]
    target = batch["labels"][:, 1:]
    more = {n: batch[n] for n in ("desirable", "step_labels") if n in batch}
    for per_token in {"label", "step_ids"} & set(batch):
        value = batch[per_token]
        more[per_token] = value[:, 1:] if value.dim() == 2 else value
    head = model.get_output_embeddings()
    if ref_model is not None:
        with torch.no_grad():
            more |= {"ref_hidden": last_hidden(ref_model, batch)}
            more |= {"ref_weight": ref_model.lm_head.weight, "ref_bias": ref_model.lm_head.bias}
            if kind in ("desirable", "steps"):
                kl = {n[3:]: t for n, t in batch.items() if n.startswith("kl_")}
                more |= {"kl_hidden": last_hidden(model, kl), "kl_target": kl["labels"][:, 1:]}
                more |= {"kl_ref_hidden": last_hidden(ref_model, kl)}
    hidden = last_hidden(model, batch)
    if isinstance(loss, nn.DirectorLoss):
        out = loss(
            hidden, head.weight, head.cls_weight, target, more["label"], lm_bias=head.bias,
            cls_bias=head.cls_bias, cls_affine=head.cls_affine,
        )  # fmt: skip
    else:
        out = loss(hidden, head.weight, target, bias=head.bias, **more)
    model.zero_grad()
    out.loss.backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
