"""DirectorHead in transformers models: saving, loading, resizing, copies, PEFT."""

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import sukhops
from sukhops.nn import AdaptiveSpan, DirectorHead

transformers = pytest.importorskip("transformers", minversion="5.24")

from sukhops.integrations.transformers import add_director_head, from_pretrained  # noqa: E402

V = 60
SIZES = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES,
}  # fmt: skip


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **options}))


def gpt2():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **SIZES)
    return transformers.GPT2LMHeadModel(config)


def phi():
    """A model whose head has a bias."""
    return transformers.PhiForCausalLM(transformers.PhiConfig(**{**LLAMA, "partial_rotary_factor": 0.5}))


MODELS = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "phi": phi,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(1)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        if getattr(model.lm_head, "bias", None) is not None:
            model.lm_head.bias.normal_()
    return model


def ids(rows=2, length=7):
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(2))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def decoded(model):
    """Generates from one row with left padding and one without padding."""
    prompt, mask = ids(), torch.ones(2, 7, dtype=torch.int64)
    prompt[0, :3], mask[0, :3] = 0, 0
    return model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("gamma", [0.7, torch.tensor([[0.5], [2.0]]), torch.tensor(1.5)])
@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded(model, shared, gamma, tmp_path):
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    head = add_director_head(model, gamma=gamma, shared=shared)
    assert model.lm_head is head and (head.weight is model.get_input_embeddings().weight) == tied
    plain, made = type(model).__mro__[2], type(model)
    assert all(getattr(made, n) == getattr(plain, n) for n in ("__module__", "__name__", "__qualname__"))
    with torch.no_grad():
        for p in (head.scale, head.shift) if shared else (head.cls_weight, head.cls_bias):
            p.normal_()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = from_pretrained(tmp_path).eval()
    assert equal(model, loaded) and type(loaded) is type(model)
    assert torch.equal(torch.as_tensor(loaded.lm_head.gamma), torch.as_tensor(gamma))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, loaded(ids()).logits)
    if not isinstance(gamma, torch.Tensor):
        assert torch.equal(decoded(model), decoded(loaded))


def test_gamma_set_later_is_saved(tmp_path):
    model = llama()
    head = add_director_head(model)
    for gamma in (0.25, torch.tensor([2.0])):
        head.gamma = gamma
        model.save_pretrained(tmp_path)
        assert torch.equal(torch.as_tensor(from_pretrained(tmp_path).lm_head.gamma), torch.as_tensor(gamma))
    assert json.loads((tmp_path / "config.json").read_text())["sukhops_director"]["gamma"] == [2.0]
    half = from_pretrained(tmp_path, dtype="bfloat16")
    assert half.lm_head.cls_weight.dtype == torch.bfloat16 and half.lm_head.gamma.dtype == torch.float32


def test_left_padding_does_not_change_decoding():
    model = llama().eval()
    add_director_head(model, gamma=2.0)
    with_padding = decoded(model)[0, 7:]
    alone = model.generate(ids()[:1, 3:], max_new_tokens=6, do_sample=False)[0, 4:]
    assert torch.equal(with_padding, alone)


def test_loading_with_transformers_reports_unexpected_keys(tmp_path):
    model = llama()
    add_director_head(model)
    model.save_pretrained(tmp_path)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.cls_weight", "lm_head.cls_bias"}
    with pytest.raises(ValueError, match="load it with sukhops"):
        add_director_head(plain)
    plain.config.sukhops_director = None
    add_director_head(plain)


def test_checkpoint_without_classifier_raises(tmp_path):
    model = llama()
    add_director_head(model, gamma=0.5)
    model.config.save_pretrained(tmp_path)
    weights = {n: t for n, t in model.state_dict().items() if "cls" not in n}
    transformers.LlamaForCausalLM(model.config).save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"weights that it lacks: lm_head\.cls_bias, lm_head\.cls_weight"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [71, 50])
def test_resize(model, size, shared, tmp_path):
    head = add_director_head(model, shared=shared)
    tied = head.weight is model.get_input_embeddings().weight
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    model.resize_token_embeddings(size)
    assert model.lm_head is head and head.out_features == size == model.config.vocab_size
    assert (head.weight is model.get_input_embeddings().weight) == tied
    for name, p in head.named_parameters():
        old = before[name]
        if old.dim():
            kept = min(size, V)
            assert len(p) == size and torch.equal(p[:kept], old[:kept]), name
            if size > V and name.startswith("cls_"):
                torch.testing.assert_close(p[V:], old.mean(0).expand_as(p[V:]))
    assert model(ids() % 50).logits.shape == (2, 7, size)
    model.save_pretrained(tmp_path)
    assert equal(from_pretrained(tmp_path), model)


def test_resize_keeps_frozen_parameters_frozen():
    model = llama()
    head = add_director_head(model)
    head.cls_weight.requires_grad_(False)
    model.resize_token_embeddings(71)
    assert not head.cls_weight.requires_grad and head.cls_bias.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    model = llama().eval()
    plain = model(ids(), labels=ids()).loss
    add_director_head(model)
    other = copied(model)
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    assert torch.equal(other(ids(), labels=ids()).loss, plain)
    other.resize_token_embeddings(70)
    assert model.lm_head.cls_weight.shape[0] == V and other.lm_head.cls_weight.shape[0] == 70


def test_in_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama(tie_word_embeddings=False).eval()
    plain = copy.deepcopy(model)
    add_director_head(model)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad and "cls_weight" in n]
    assert len(trained) == 1
    assert torch.equal(adapted(input_ids=ids(), labels=ids()).loss, plain(ids(), labels=ids()).loss)
    with torch.no_grad():
        dict(adapted.named_parameters())[trained[0]].normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = copy.deepcopy(plain)
    add_director_head(fresh)
    for base in (from_pretrained(tmp_path / "base"), fresh):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids()).logits, adapted(input_ids=ids()).logits)
    with pytest.raises(TypeError, match="resize it before PEFT"):
        model.resize_token_embeddings(70)
    with pytest.raises(TypeError, match="add the head first, then get_peft_model"):
        add_director_head(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])))


def test_head_of_a_peft_model_is_a_copy():
    """Gamma is set on the copy, whose weight can be frozen (see docs/transformers.md)."""
    peft = pytest.importorskip("peft")
    model = llama(tie_word_embeddings=True).eval()
    added = add_director_head(model)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    before = adapted(input_ids=ids()).logits
    added.gamma = 2.0
    assert torch.equal(adapted(input_ids=ids()).logits, before)
    head = adapted.get_output_embeddings().modules_to_save["default"]
    assert head.weight.requires_grad and head.weight is not model.get_input_embeddings().weight
    head.gamma = 2.0
    head.weight.requires_grad_(False)
    expected = DirectorHead.from_linear(nn.Linear(16, V, bias=False), gamma=2.0)
    expected.load_state_dict(head.state_dict())
    hidden = adapted.get_base_model().model(ids()).last_hidden_state
    assert torch.equal(adapted(input_ids=ids()).logits, expected(hidden))
    trained = {
        n.rsplit(".", 1)[1] for n, p in adapted.named_parameters() if p.requires_grad and "lm_head" in n
    }
    assert trained == {"cls_weight", "cls_bias"}


# ------------------------------------------------------------------ modules in a custom model class


class OwnConfig(transformers.LlamaConfig):
    model_type = "own"


class OwnModel(transformers.LlamaForCausalLM):
    """The example of docs/transformers.md."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = DirectorHead(config.hidden_size, config.vocab_size, bias=True)
        self.spans = AdaptiveSpan(4, 32, init=0.5)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DirectorHead | AdaptiveSpan):
            module.reset_parameters()


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_missing_from_a_checkpoint_are_initialized(tied, tmp_path):
    base = llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path)
    loaded, info = OwnModel.from_pretrained(tmp_path, output_loading_info=True)
    head = loaded.lm_head
    assert set(info["missing_keys"]) == {
        "lm_head.bias", "lm_head.cls_weight", "lm_head.cls_bias", "spans.ratio",
    }  # fmt: skip
    assert torch.equal(head.weight, base.lm_head.weight)
    assert (head.weight is loaded.get_input_embeddings().weight) == tied
    assert 0.1 < head.cls_weight.std() < 0.2 and head.cls_weight.abs().max() <= 0.25
    assert not head.cls_bias.any() and not head.bias.any() and (loaded.spans.ratio == 0.5).all()


def test_parameters_in_a_checkpoint_are_loaded(tmp_path):
    model = OwnModel(OwnConfig(**LLAMA))
    with torch.no_grad():
        for p in (*model.lm_head.parameters(), model.spans.ratio):
            p.uniform_(0.1, 0.9)
    model.save_pretrained(tmp_path)
    assert equal(OwnModel.from_pretrained(tmp_path), model)


def test_registered_class_is_found(tmp_path):
    transformers.AutoConfig.register("own", OwnConfig, exist_ok=True)

    class Plain(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    transformers.AutoModelForCausalLM.register(OwnConfig, Plain, exist_ok=True)
    model = Plain(OwnConfig(**LLAMA))
    add_director_head(model)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, Plain) and equal(loaded, model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Unknown"]}))
    with pytest.raises(ValueError, match="expected a class of transformers or one registered"):
        from_pretrained(tmp_path)


# ------------------------------------------------------------------ invalid inputs


def test_invalid_models_raise(tmp_path):
    model = llama()
    add_director_head(model)
    with pytest.raises(ValueError, match="its head is a DirectorHead already"):
        add_director_head(model)
    with pytest.raises(TypeError, match="expected a PreTrainedModel, got Linear"):
        add_director_head(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="expected a causal language model with a head, got LlamaModel"):
        add_director_head(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)))
    half = llama()
    half.lm_head = nn.Sequential(half.lm_head)
    with pytest.raises(TypeError, match=r"output embeddings that are an nn\.Linear.*got Sequential"):
        add_director_head(half)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a DirectorHead nor adaptive spans"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("gamma", [-1.0, "x"])
def test_invalid_gamma_does_not_change_the_model(gamma):
    model = llama()
    head, kind = model.lm_head, type(model)
    with pytest.raises((TypeError, ValueError), match="gamma: expected"):
        add_director_head(model, gamma=gamma)
    assert model.lm_head is head and type(model) is kind and not hasattr(model.config, "sukhops_director")
    add_director_head(model)


@pytest.mark.parametrize(
    "name, option",
    [("Gemma2", "final_logit_softcapping"), ("Cohere", "logit_scale"), ("Granite", "logits_scaling")],
)
def test_models_that_change_their_logits_raise(name, option):
    config = getattr(transformers, f"{name}Config")(**LLAMA, **{option: 8.0})
    with pytest.raises(ValueError, match=f"logits are lm_head.*{option}"):
        add_director_head(getattr(transformers, f"{name}ForCausalLM")(config))


def test_sukhops_does_not_import_transformers():
    program = "import sukhops, sys; assert not any(m.startswith('transformers') for m in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("version", ["4.57.1", None])
def test_missing_or_old_transformers_raises(version, monkeypatch):
    from sukhops.integrations.transformers import _requirement

    old = None if version is None else type(sys)("transformers")
    if old is not None:
        old.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", old)
    got = version or "pip install"
    with pytest.raises(ImportError, match=f"needs transformers 5.24 or newer.*{got}"):
        importlib.reload(_requirement)
    assert sukhops.nn.DirectorHead is DirectorHead
