"""Adaptive spans in transformers models: compared with masked attention; caches, padding, errors."""

import copy

import pytest
import torch
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from sukhops import testing  # noqa: E402
from sukhops.integrations.transformers import (  # noqa: E402
    adaptive_spans,
    add_adaptive_spans,
    add_director_head,
    from_pretrained,
)
from sukhops.integrations.transformers._spans import with_spans  # noqa: E402

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": None, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 64},  # in every layer
    "Gemma3": {"sliding_window": 64, "head_dim": 8, "sliding_window_pattern": 2},  # in every other layer
    "GPT2": {"attn_pdrop": 0.0},
    "Phi": {},
}
N, LEFT, RIGHT = 40, 13, 5
IDS = torch.randint(1, 97, (2, N), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :LEFT] = 0
PACKED = torch.cat([torch.arange(n) for n in (11, 20, 9)]).unsqueeze(0)
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def quiet():
    torch.use_deterministic_algorithms(False)  # the models use operators without a deterministic kernel
    transformers.logging.set_verbosity_error()


def build(name="Llama", dtype=torch.float64, **options):
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config(**SIZES | MODELS[name] | options))
    return model.to(dtype).eval()


def by_mask(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """Attention with the soft mask [H, N, N] of module.spans and RAMP, and with transformers' mask."""
    group, n = query.shape[1] // key.shape[1], key.shape[2]
    score = scaling * query @ key.repeat_interleave(group, 1).mT
    x = torch.arange(n).unsqueeze(1) - torch.arange(n)
    soft = ((RAMP + module.spans.view(-1, 1, 1) - x) / RAMP).clamp(0, 1) * (x < MAX_SPAN)
    if attention_mask is None:
        attention_mask = x >= 0
    weight = soft * (score - score.detach().amax(-1, keepdim=True)).exp() * attention_mask
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weight @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("spans_by_mask", by_mask)
AttentionMaskInterface.register("spans_by_mask", sdpa_mask)
MAX_SPAN, RAMP = 15, 4.0
RATIOS = torch.tensor([0.0, 0.21, 0.37, 0.53, 0.79, 1.0], dtype=torch.float64)


def shortened(model):
    spans = add_adaptive_spans(model, MAX_SPAN, ramp=RAMP)
    with torch.no_grad():
        for layer in spans.layers:
            layer.ratio.copy_(RATIOS)
    return spans


@models
def test_matches_attention_with_a_mask(name):
    ours, other = build(name), build(name)
    spans = shortened(ours)
    leaves = [(MAX_SPAN * RATIOS).requires_grad_() for _ in spans.layers]
    attention = [m for m in other.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    for module, leaf in zip(attention, leaves, strict=True):
        module.spans = leaf
    other.set_attn_implementation("spans_by_mask")
    for call in ({}, {"attention_mask": MASK}, {"position_ids": PACKED}):
        kept = call.get("attention_mask", torch.ones_like(IDS)).bool()
        a, b = (m(IDS, use_cache=False, **call).logits[kept] for m in (ours, other))
        assert testing.distance(a, b) < 1e-10, call.keys()
        up = torch.randn_like(a)
        grads = torch.autograd.grad((a * up).sum(), [s.ratio for s in spans.layers])
        exact = torch.autograd.grad((b * up).sum(), leaves)
        for g, e in zip(grads, exact, strict=True):
            assert testing.distance(g / MAX_SPAN, e) < 1e-9


@models
def test_long_spans_change_nothing(name):
    ours, other = build(name), build(name)
    add_adaptive_spans(ours, 64)
    with torch.no_grad():
        for call in ({}, {"attention_mask": MASK}, {"position_ids": PACKED, "use_cache": False}):
            kept = call.get("attention_mask", torch.ones_like(IDS)).bool()
            assert testing.distance(ours(IDS, **call).logits[kept], other(IDS, **call).logits[kept]) < 1e-10
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        options |= {"attention_mask": MASK, "max_new_tokens": 9, "do_sample": False}
        assert torch.equal(ours.generate(IDS, **options), other.generate(IDS, **options)), options


@models
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_full_forward(name, cache):
    """Spans are shorter than the text; one sequence has left padding."""
    model = build(name)
    shortened(model)
    out = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=9, do_sample=False, cache_implementation=cache,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    with torch.no_grad():
        alone = [
            model(out.sequences[i : i + 1, start:-1], use_cache=False).logits
            for i, start in ((0, 0), (1, LEFT))
        ]
    whole = torch.cat([t[:, N - 1 - start :] for t, start in zip(alone, (0, LEFT), strict=True)])
    assert (
        testing.distance(torch.stack(out.logits, 1), whole) <= torch.finfo(torch.float32).eps
    )  # generate returns float32 logits


def test_documents_and_padding_are_separate():
    model = build()
    shortened(model)
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=PACKED, use_cache=False).logits
        alone = [model(part).logits for part in IDS[:1].split((11, 20, 9), 1)]
        assert testing.distance(packed, torch.cat(alone, 1)) < 1e-10
        right = torch.ones_like(IDS)
        right[0, -RIGHT:] = 0
        padded = model(IDS, attention_mask=right).logits[:1, :-RIGHT]
        assert testing.distance(padded, model(IDS[:1, :-RIGHT]).logits) < 1e-10
        nothing = model(IDS, attention_mask=torch.stack([MASK[0], 0 * MASK[0]])).logits
        assert nothing.isfinite().all()


def test_float32_is_within_budget():
    exact, plain, ours = build(), build(dtype=torch.float32), build(dtype=torch.float32)
    add_adaptive_spans(ours, 64)
    with torch.no_grad():
        e, p, o = (m(IDS, attention_mask=MASK).logits[MASK.bool()] for m in (exact, plain, ours))
    assert testing.distance(o, e) <= testing.budget(o, p, e)
    half = build(dtype=torch.bfloat16)
    spans = add_adaptive_spans(half, 64)
    assert spans.layers[0].ratio.dtype == torch.float32 and half(IDS).logits.isfinite().all()


def test_checkpointing_and_compile_give_the_same():
    model = build()
    spans = shortened(model)
    ratio = spans.layers[0].ratio

    def step(run):
        loss = run(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
        return loss, *torch.autograd.grad(loss, ratio)

    plain = step(model)
    compiled = step(torch.compile(model, backend="aot_eager"))
    model.train().gradient_checkpointing_enable()
    for other in (compiled, step(model)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_spans_learn_and_freeze():
    model = build(dtype=torch.float32)
    spans = add_adaptive_spans(model, 32, init=0.5)
    names = [n for n, _ in model.named_parameters() if "adaptive_span" in n]
    assert names == [f"model.layers.{i}.self_attn.adaptive_span.ratio" for i in range(2)]
    assert set(names) < set(model.state_dict())
    penalty = spans.penalty(0.01)
    assert penalty.item() == pytest.approx(2 * 0.01 * 16)
    (model(IDS, labels=IDS).loss + penalty).backward()
    assert all(layer.ratio.grad.all() for layer in spans.layers)
    report = spans.report()
    assert len(report) == 2 and report[1].tokens == [16.0] * 6 and report[1].keys == [32] * 6
    assert spans.freeze() is spans and not any(layer.ratio.requires_grad for layer in spans.layers)


def test_saved_and_loaded(tmp_path):
    model = build()
    shortened(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    ratios = [p for n, p in half.named_parameters() if n.endswith("adaptive_span.ratio")]
    assert (
        all(torch.equal(p, RATIOS.float()) and p.dtype == torch.float32 for p in ratios) and len(ratios) == 2
    )


def test_saved_with_a_director_head(tmp_path):
    model = build(tie_word_embeddings=True)
    shortened(model)
    add_director_head(model, gamma=0.7)
    model.save_pretrained(tmp_path)
    again, report = from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert torch.equal(copy.deepcopy(again)(IDS).logits, model(IDS).logits)
    assert type(again) is type(model) and again.lm_head.weight is again.model.embed_tokens.weight


def test_checkpoint_with_spans_that_were_not_loaded(tmp_path):
    model = build()
    shortened(model)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its checkpoint has adaptive spans"):
        add_adaptive_spans(plain, 64)
    plain.config.sukhops_adaptive_spans = None
    add_adaptive_spans(plain, 64)
    plain.config.sukhops_adaptive_spans = {"max_span": 64, "ramp": 4.0, "init": 1.0}
    for name, module in list(plain.named_modules()):
        if name.endswith("self_attn"):
            del module.adaptive_span
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"that it lacks: model\.layers\.0\.self_attn\.adaptive_span\.ratio"):
        from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a DirectorHead nor adaptive spans"):
        from_pretrained(tmp_path)


def test_lora_with_spans():
    peft = pytest.importorskip("peft")
    model = build(dtype=torch.float32)
    spans = shortened(model)
    before = model(IDS).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["adaptive_span"])
    wrapped = peft.get_peft_model(model, config)
    assert torch.equal(wrapped(IDS).logits, before)
    wrapped(IDS, labels=IDS).loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.rsplit(".", 2)[-2] for n in trained if "ratio" in n} == {"default"}
    assert sum("ratio" in n for n in trained) == 2 and sum("lora_B" in n for n in trained) == 2
    for handle in (spans, adaptive_spans(wrapped)):  # both use the copy that is trained
        wrapped.zero_grad()
        handle.penalty(0.5).backward()
        copies = [p for n, p in wrapped.named_parameters() if "modules_to_save" in n]
        assert len(copies) == 2 and all(
            torch.equal(p.grad, torch.full_like(p, 0.5 * MAX_SPAN / 6)) for p in copies
        )
    with torch.no_grad():
        copies[0].fill_(0.2)
    assert spans.report()[0].tokens == pytest.approx([0.2 * MAX_SPAN] * 6)
    with wrapped.disable_adapter():
        assert spans.report()[0].tokens == pytest.approx((MAX_SPAN * RATIOS).tolist())
    spans.freeze()
    assert not any(p.requires_grad for p in copies)


def sharded(rank):
    """Gradients of loss + penalty in a model sharded by FSDP2, and its report."""
    model = build(dtype=torch.float32)
    add_adaptive_spans(model, 32, init=0.4)
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    spans = adaptive_spans(model)
    (model(IDS, labels=IDS, use_cache=False).loss + spans.penalty(0.1)).backward()
    return {"grads": [s.ratio.grad.full_tensor() for s in spans.layers], "report": spans.report()[1].tokens}


def test_sharded_by_fsdp2():
    model = build(dtype=torch.float32)
    spans = add_adaptive_spans(model, 32, init=0.4)
    (model(IDS, labels=IDS, use_cache=False).loss + spans.penalty(0.1)).backward()
    for found in on_ranks(2, sharded):
        assert found["report"] == pytest.approx([0.4 * 32] * 6)
        for g, layer in zip(found["grads"], spans.layers, strict=True):
            torch.testing.assert_close(g, layer.ratio.grad)


# ------------------------------------------------------------------ errors


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def again(model):
    add_adaptive_spans(model, 64)
    return model


def changed(**options):
    model = build()
    for name, value in options.items():
        setattr(model.config, name, value)
    return model


def other(name, **options):
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    found = (getattr(transformers, name + kind, None) for kind in ("ForCausalLM", "LMHeadModel", "Model"))
    return next(f for f in found if f is not None)(config)


BAD = {
    "no model": (lambda: torch.nn.Linear(2, 2), TypeError, "expected a PreTrainedModel, got Linear"),
    "PEFT": (lambda: lora(build()), TypeError, "add the spans first, then get_peft_model"),
    "twice": (lambda: again(build()), ValueError, "adaptive spans already"),
    "encoder": (lambda: other("Bert"), TypeError, "expected a causal language model .* got Bert"),
    "encoder and decoder": (lambda: other("Bart"), TypeError, "expected a causal language model .* got Bart"),
    "cross-attention": (
        lambda: build("GPT2", add_cross_attention=True),
        TypeError,
        "expected a causal language model",
    ),
    "both ways": (lambda: build(is_causal=False), TypeError, "expected a causal language model"),
    "no interface": (lambda: other("Bloom"), TypeError, "through AttentionInterface.* got Bloom"),
    "dropout": (lambda: build("GPT2", attn_pdrop=0.1), ValueError, r"set config.attn_pdrop to 0 .*got 0.1"),
    "soft cap": (lambda: other("Gemma2"), ValueError, "a soft cap, got attn_logit_softcapping = 50.0"),
    "sinks": (lambda: other("GptOss", head_dim=8), ValueError, "sinks"),
    "window": (
        lambda: build("Mistral", sliding_window=63),
        ValueError,
        "a window shorter than max_span = 64, got sliding_window = 63",
    ),
    "other layers": (
        lambda: changed(layer_types=["full_attention", "chunked_attention"]),
        ValueError,
        "layer types other than full and sliding attention",
    ),
    "two widths": (lambda: changed(v_head_dim=4), ValueError, "keys and values differ in width"),
}


@pytest.mark.parametrize("name", BAD)
def test_unsupported_models_raise(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        add_adaptive_spans(make(), 64)


@pytest.mark.parametrize(
    "options", [{"max_span": 0}, {"max_span": 8, "ramp": 0.0}, {"max_span": 8, "init": 2.0}]
)
def test_invalid_options_do_not_change_the_model(options):
    model = build()
    with pytest.raises(ValueError, match=f"{list(options)[-1]}: expected"):
        add_adaptive_spans(model, **options)
    assert not any("adaptive_span" in n for n, _ in model.named_parameters())
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "sukhops_adaptive_spans")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"softcap": 30.0}, "softcap: not supported"), ({"dropout": 0.1}, "dropout: expected 0")],
)
def test_unsupported_options_of_a_call_raise(options, message):
    model = build()
    add_adaptive_spans(model, 64)
    q, k = torch.zeros(1, 6, 3, 8), torch.zeros(1, 2, 3, 8)
    attend = AttentionInterface()[model.config._attn_implementation]
    with pytest.raises(ValueError, match=message):
        attend(model.model.layers[0].self_attn, q, k, k, None, **options)


def test_mask_functions_of_a_model_raise():
    model = build()
    add_adaptive_spans(model, 64)
    mask = AttentionMaskInterface()[model.config._attn_implementation]
    with pytest.raises(ValueError, match="expected a causal mask, got a mask function of the model"):
        mask(batch_size=1, q_length=3, kv_length=3, use_vmap=True)


def test_spans_without_saved_values_start_anew():
    """transformers initializes a module whose values a checkpoint lacks."""
    model = build()
    add_adaptive_spans(model, 64)
    loaded = with_spans(transformers.LlamaForCausalLM)(model.config)
    span = loaded.model.layers[0].self_attn.adaptive_span
    start = span.ratio.detach().clone()
    with torch.no_grad():
        span.ratio.fill_(0.9)
    loaded._init_weights(span)
    assert torch.equal(span.ratio, start)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_output_attentions_raises(name):
    model = build(name)
    add_adaptive_spans(model, 64)
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        model.generate(IDS, output_attentions=True, max_new_tokens=2, return_dict_in_generate=True)


def test_models_that_share_a_config():
    first = build()
    second = type(first)(first.config)
    add_adaptive_spans(first, 64)
    with pytest.raises(ValueError, match="it shares the config of a model that has"):
        second(IDS)
    with pytest.raises(ValueError, match="has no adaptive spans"):
        adaptive_spans(second)


def test_unsupported_masks_raise():
    model = build()
    add_adaptive_spans(model, 64)
    hole = MASK.clone()
    hole[1, 20] = 0
    with pytest.raises(ValueError, match=r"hides tokens at the ends .* for sequence 1"):
        model(IDS, attention_mask=hole)
    with pytest.raises(ValueError, match="got one of 4 axes"):
        model(IDS, attention_mask=torch.ones(2, 1, N, N, dtype=torch.bool).tril())
