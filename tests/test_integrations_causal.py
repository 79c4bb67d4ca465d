"""Checks which transformers models work with a loss on hidden states; the check does not change the model."""

import copy

import pytest
import torch
from torch import nn as tnn

from sukhops import nn

transformers = pytest.importorskip("transformers", minversion="5.24")

from trainer_inputs import LLAMA, MODELS, V, arguments, llama, model_for  # noqa: E402

from sukhops.integrations.transformers import LossTrainer, add_director_head  # noqa: E402
from sukhops.integrations.transformers._causal import check_causal, check_logits  # noqa: E402

BERT = {n: v for n, v in LLAMA.items() if n not in ("num_key_value_heads", "eos_token_id")}


def made(config, model, **options):
    torch.manual_seed(1)
    return getattr(transformers, model)(getattr(transformers, f"{config}Config")(**{**BERT, **options}))


def rejects(model, match, folder):
    """Asserts that add_director_head and LossTrainer raise and do not change the model."""
    head, kind, before = model.get_output_embeddings(), type(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        add_director_head(model)
    with pytest.raises(ValueError, match=match):
        LossTrainer(model, arguments(folder), loss=nn.CringeLoss())
    assert model.get_output_embeddings() is head and type(model) is kind
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "config, name",
    [
        ("ModernBertDecoder", "ModernBertDecoderForCausalLM"),
        ("Bert", "BertLMHeadModel"),
        ("Bert", "BertForMaskedLM"),
        ("Roberta", "RobertaForCausalLM"),
        ("Electra", "ElectraForCausalLM"),
    ],
)
def test_head_with_a_transform_raises(config, name, tmp_path):
    rejects(made(config, name, is_decoder=True), rf"lm_head\(hidden\).*the logits of {name} differ", tmp_path)


@pytest.mark.parametrize(
    "config, name, options",
    [
        ("RecurrentGemma", "logits_soft_cap", {"lru_width": 16, "block_types": ["recurrent", "attention"]}),
        ("xLSTM", "output_logit_soft_cap", {"num_heads": 2, "num_blocks": 1}),
        ("GPT2", "add_cross_attention", {"add_cross_attention": True, "n_embd": 16, "n_head": 2}),
    ],
)
def test_unsupported_config_raises(config, name, options, tmp_path):
    model = f"{config}LMHeadModel" if config == "GPT2" else f"{config}ForCausalLM"
    rejects(made(config, model, **options), name, tmp_path)


def test_modified_logits_raise(tmp_path):
    class Capped(transformers.LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    torch.manual_seed(1)
    rejects(Capped(transformers.LlamaConfig(**LLAMA)), "logits of Capped differ", tmp_path)


def test_noncausal_model_raises(tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    rejects(model, "causal language model; in LlamaForCausalLM the last token changes", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_check_does_not_change_the_model(make, dtype):
    model = make().to(dtype).train()
    model.get_input_embeddings().eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    with torch.random.fork_rng():
        check_logits(model)
        assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_check_disables_dropout_and_restores_training_mode_after_errors(monkeypatch):
    model = made("GPT2", "GPT2LMHeadModel", n_embd=16, n_head=2, n_layer=1).train()
    check_logits(model)  # with dropout, two calls would differ
    assert all(m.training for m in model.modules())

    def broken(*_):
        raise ZeroDivisionError

    model.transformer.ln_f.register_forward_hook(broken)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ZeroDivisionError):
        check_logits(model)
    assert all(m.training for m in model.modules())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_logits(model)  # errors are ignored: the model may need the accelerator and not be there yet


@pytest.mark.parametrize("gamma", [2.0, torch.tensor([[0.5], [2.0]])])
def test_director_head_is_accepted(gamma, tmp_path):
    model = model_for("director")
    model.lm_head.gamma = gamma
    check_logits(model)
    LossTrainer(model, arguments(tmp_path), loss=nn.DirectorLoss())
    own = llama()
    own.lm_head = nn.DirectorHead.from_linear(own.lm_head, gamma=gamma)
    LossTrainer(own, arguments(tmp_path), loss=nn.DirectorLoss())


def test_special_tokens_are_not_used_by_the_check():
    """Image tokens have no embedding."""
    model = llama()
    model.config.image_token_id = 7
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    check_logits(model)
    assert seen and not any(((ids == 7) | (ids == 0)).any() for ids in seen)


def test_check_skips_models_without_weights():
    model = llama().to("meta")
    check_causal(model)
    check_logits(model)
    offloaded = llama()
    offloaded.model.layers[0].to("meta")
    check_logits(offloaded)
    sharded = llama()
    sharded.lm_head.weight.ds_id = 0
    sharded.lm_head.weight.data = torch.empty(0)
    check_logits(sharded)


def test_reference_model_is_checked(tmp_path):
    reference = made("Roberta", "RobertaForCausalLM", is_decoder=True)
    with pytest.raises(ValueError, match="RobertaForCausalLM differ"):
        LossTrainer(llama(), arguments(tmp_path), loss=nn.DPOLoss(), ref_model=reference)
    small = made("Llama", "LlamaForCausalLM", num_key_value_heads=2, vocab_size=50)
    with pytest.raises(ValueError, match=f"ref_model: expected the model's vocabulary of {V} tokens, got 50"):
        LossTrainer(llama(), arguments(tmp_path), loss=nn.DPOLoss(), ref_model=small)
    assert isinstance(small.lm_head, tnn.Linear)
