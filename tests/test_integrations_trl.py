"""TRL with sukhops' LM head: the replaced function compared with TRL's, and trainers with and without it."""

import inspect
import subprocess
import sys
import weakref
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sukhops import reference, testing
from sukhops.ops.vocab_head import TokenStats

trl = pytest.importorskip("trl", "1.16")
peft = pytest.importorskip("peft")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl_step import gradients, make_trainer, training_step, word_tokenizer  # noqa: E402

from sukhops.integrations import trl as integration  # noqa: E402

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SUBSETS = [names for k in range(5) for names in combinations(OPTIONAL, k)]
Results = namedtuple("Results", ("log_probs", *OPTIONAL))
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def disabled():
    yield
    integration.disable()


@pytest.fixture
def calls(monkeypatch):
    """Records (rows, dtype) of hidden in each call of linear_token_stats by the integration."""
    found, operator = [], integration.linear_token_stats

    def spy(hidden, *args, **kwargs):
        found.append((len(hidden), hidden.dtype))
        return operator(hidden, *args, **kwargs)

    monkeypatch.setattr(integration, "linear_token_stats", spy)
    return found


# ------------------------------------------------------------------ the function


def exact(hidden, weight, bias, targets, temperature, _, softcap=None, scale=1.0, outputs=OPTIONAL):
    """The same results computed by the reference, in the dtype of hidden."""
    options = {"softcap": softcap, "scale": scale, "temperature": temperature}
    stats = reference.linear_token_stats(hidden, weight, targets, bias, outputs=TokenStats._fields, **options)
    optional = zip(OPTIONAL, stats[2:], strict=True)
    return stats.logp, *(t if name in outputs else None for name, t in optional)


def caller(function, outputs=OPTIONAL):
    """Wraps `function`: named arguments and results; floating-point results are float32 as in TRL."""

    def call(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, scale=1.0):
        found = function(hidden, weight, bias, targets, temperature, 128, softcap, scale, outputs)
        return Results(*(t if t is None or t.dtype == torch.bool else t.float() for t in found))

    return call


def make(n=23, d=16, v=300, bias=False, frozen=False, **options):
    """Inputs; the target of every third row is its largest logit."""
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    targets = torch.randint(0, v, (n,))
    targets[::3] = (hidden @ weight.T).argmax(-1)[::3]
    given = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(not frozen)}
    if bias:
        given["bias"] = (0.1 * torch.randn(v)).requires_grad_(not frozen)
    return given | {"targets": targets} | options


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "scale": 1.3, "temperature": 2.0},
    "bias": {"bias": True, "scale": 0.5},
    "frozen": {"frozen": True, "bias": True},
    "no rows": {"n": 0, "bias": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_function_agrees_with_trl(case, dtype):
    given = make(**CASES[case])
    ours, theirs, truth = map(caller, (integration.log_probs, ChunkedLogProbFunction.apply, exact))
    rows = [testing.compare(f, truth, given, dtype) for f in (ours, theirs)]
    double = dtype == torch.float64  # the budget assumes float64 logits; TRL's are float32
    for a, b in zip(*rows, strict=True):
        assert a.ok or (double and a.error <= b.error), a
        assert b.error <= (256 * torch.finfo(torch.float32).eps if double else 4 * b.budget), b


@pytest.mark.parametrize("outputs", SUBSETS, ids=lambda names: "+".join(names) or "none")
def test_each_subset_of_outputs(outputs):
    given = make(softcap=4.0)
    ours = caller(integration.log_probs, outputs)
    found, expected = ours(**given), caller(ChunkedLogProbFunction.apply, outputs)(**given)
    kinds = [[t if t is None else (t.dtype, t.shape, t.requires_grad) for t in r] for r in (found, expected)]
    assert kinds[0] == kinds[1]
    assert [t is not None for t in found] == [True, *(name in outputs for name in OPTIONAL)]
    assert "is_top1" not in outputs or (torch.equal(found.is_top1, expected.is_top1) and found.is_top1.any())
    testing.assert_close(ours, caller(exact, outputs), given, torch.float32)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_products_are_in_the_dtype_of_autocast_or_of_hidden(half, dtype, autocast, calls):
    given = make(bias=True)
    hidden, *head = (given[n].detach().to(dtype) for n in ("hidden", "weight", "bias"))
    tensors = [t.requires_grad_() for t in (hidden if autocast else hidden.to(half), *head)]

    def run(function, tensors, dtype=None):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found = function(*tensors, given["targets"], 0.8, 128)
        loss = found[0].sum() + 0.1 * found[1].sum()
        return [t.detach() for t in found[:4]] + list(torch.autograd.grad(loss, tensors))

    functions = integration.log_probs, ChunkedLogProbFunction.apply
    ours, theirs = (run(f, tensors, half if autocast else None) for f in functions)
    assert calls == [(23, half)]
    truth = run(exact, [t.detach().to(half).double().requires_grad_() for t in tensors])
    for a, b, t in zip(ours, theirs, truth, strict=True):
        low = t.to(half)  # gradients are rounded to the dtype of the products, then cast to that of the input
        assert a.dtype == b.dtype
        assert testing.distance(a, t) <= 2 * testing.distance(b, t) + testing.budget(low, low, t)


# ------------------------------------------------------------------ ZeRO-3


class Partitioned:
    """Simulates DeepSpeed ZeRO-3: parameters are empty except within `gather`."""

    def __init__(self, monkeypatch, *tensors):
        self.parameters = [torch.nn.Parameter(torch.empty(0), t.requires_grad) for t in tensors]
        for parameter, full in zip(self.parameters, tensors, strict=True):
            parameter.ds_id, parameter.full = 0, full.detach().numpy().copy()
        self.memory = []  # weak references to the gathered arrays
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", self.gather)

    @contextmanager
    def gather(self, *parameters):
        for p in parameters:
            if p is not None:
                p.data = torch.from_numpy(array := p.full.copy())
                self.memory.append(weakref.ref(array))
                del array
        yield
        for p in self.parameters:
            p.data = torch.empty(0)

    def check_released(self):
        assert self.memory and all(memory() is None for memory in self.memory)


@pytest.mark.parametrize("function", [integration.log_probs, ChunkedLogProbFunction.apply])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_zero3_gathers_weights_again_in_the_backward(function, bias, autocast, frozen, monkeypatch):
    """TRL's function also passes, so `Partitioned` is not stricter than DeepSpeed."""
    given = make(bias=bias, frozen=frozen)
    full = [given["weight"], *([given["bias"]] if bias else [])]

    def run(weight, bias=None, gather=lambda *_: nullcontext(), check=lambda: None):
        with torch.autocast("cpu", enabled=autocast), gather(weight, bias):
            found = function(given["hidden"], weight, bias, given["targets"], 0.7, 128)
        check()
        leaves = [t for t in (given["hidden"], weight, bias) if t is not None and t.requires_grad]
        grads = torch.autograd.grad(found[0].sum() + 0.1 * found[1].sum(), leaves)
        check()
        return [*found, *grads]

    expected = run(*full)
    fake = Partitioned(monkeypatch, *full)
    found = run(*fake.parameters, gather=fake.gather, check=fake.check_released)
    assert len(fake.memory) == 2 * len(full)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b)


NONE = {"forward": staticmethod(lambda ctx, x: x.clone()), "backward": staticmethod(lambda ctx, grad: None)}
WithoutGradient = type("WithoutGradient", (torch.autograd.Function,), NONE)


def test_zero3_with_autocast_partial_results_and_no_grad(monkeypatch):
    given = make()
    fake = Partitioned(monkeypatch, given["weight"])

    def call(weight):
        with fake.gather(*fake.parameters):
            return integration.log_probs(given["hidden"], weight, None, given["targets"], 0.7, 128)

    plain = call(given["weight"])
    for used in (0, 1):
        results = (call(*fake.parameters), fake.parameters), (plain, [given["weight"]])
        grads = [torch.autograd.grad(found[used].sum(), w, retain_graph=used == 0)[0] for found, w in results]
        assert torch.equal(*grads)
    unreached = WithoutGradient.apply(call(*fake.parameters)[0]).sum()
    assert torch.autograd.grad(unreached, fake.parameters, allow_unused=True) == (None,)
    with torch.autocast("cpu"):
        (head,) = call(*fake.parameters)[0].grad_fn.heads
    assert head.dtype == torch.bfloat16 and head.numel() == 0  # the cast copy is not kept either
    with torch.no_grad():
        found = call(*fake.parameters)
    fake.check_released()
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, plain, strict=True))


# ------------------------------------------------------------------ trainers


TEXTS = (
    ["a b c", "d e", "f g h", "i j"], [" d", " e f g h", " a", " b c d"], [" j", " a b", " c d e", " f"],
)  # fmt: skip


def llama(**options):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, tie_word_embeddings=True, pad_token_id=0, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def first_batch(kind, model, peft_config, options):
    """A trainer and its first batch."""
    given = {"model": model, "processing_class": word_tokenizer([*"abcdefghij"]), "peft_config": peft_config}
    if kind in ("DPO", "KTO") and peft_config is None:
        given["ref_model"] = llama()
    if kind == "GRPO":
        given["reward_funcs"] = lambda completions, **_: [float(i * i) for i in range(len(completions))]
        options = options | {"num_generations": 4, "max_completion_length": 6}
    return make_trainer(kind, *TEXTS, options, **given)


def step(trainer, batch):
    return {"loss": training_step(trainer, batch)} | {n: g.clone() for n, g in gradients(trainer).items()}


def positions_with_labels(kind, batch):
    """Number of positions with a label in each forward pass of a step."""
    if kind == "SFT":
        return [(batch["labels"][:, 1:] != -100).sum()]
    count = batch["completion_mask"].sum()
    return {"GRPO": [count], "DPO": [count] * 2}.get(kind) or [batch["KL_completion_mask"].sum(), count] * 2


LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
STEPS = {
    "SFT": {},
    "SFT, softcap and logit scale": {"config": {"final_logit_softcapping": 2.0, "logit_scale": 0.5}},
    "SFT, LoRA": {"peft_config": LORA},
    "DPO": {"loss_type": ["sigmoid"]},
    "DPO, IPO": {"loss_type": ["ipo"]},
    "DPO, WPO": {"loss_type": ["sigmoid"], "use_weighting": True},
    "DPO, LoRA": {"peft_config": LORA},
    "KTO": {},
    "GRPO": {"temperature": 0.7},
}


@pytest.mark.parametrize("case", STEPS)
def test_training_step_is_the_same(case, calls, monkeypatch):
    kind, options = case.split(",")[0], dict(STEPS[case])
    model, peft_config = llama(**options.pop("config", {})), options.pop("peft_config", None)
    trainer, batch = first_batch(kind, model, peft_config, options)
    theirs = step(trainer, batch)
    assert not calls
    with integration.enabled():
        ours = step(trainer, batch)
    assert [rows for rows, _ in calls] == positions_with_labels(kind, batch)
    again = step(trainer, batch)
    assert all(torch.equal(again[n], t) for n, t in theirs.items())

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=exact))
    trainer.model.double()
    if getattr(trainer, "ref_model", None) is not None:
        trainer.ref_model.double()
    truth = step(trainer, batch)
    assert ours.keys() == theirs.keys() == truth.keys() and len(truth) > 4
    assert truth["loss"].dtype == torch.float64 and any(t.abs().max() > 1e-3 for t in truth.values())
    for name, t in truth.items():
        assert testing.distance(ours[name], t) <= testing.budget(ours[name], theirs[name], t), name


def test_batch_without_labels_has_zero_gradients(calls):
    model = llama()
    utils.add_fused_lm_head(model)
    ids = torch.randint(0, 64, (2, 5))
    with integration.enabled():
        loss = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    loss.backward()
    assert calls == [(0, torch.float32)] and loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_compiled_checkpointed_and_without_gradient(calls):
    model = llama()
    utils.add_fused_lm_head(model)
    ids = torch.randint(0, 64, (2, 7))
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < 2, -100), "fused_lm_head": True}

    def grads(call, *args, **options):
        return torch.autograd.grad(call(*args, **given, **options).loss, list(model.parameters()))

    compiled = torch.compile(model, backend="aot_eager")
    theirs = grads(compiled)
    assert not calls
    with integration.enabled():
        found = [grads(model), grads(compiled), grads(checkpoint, model, use_reentrant=False)]
        model.train()
        model.gradient_checkpointing_enable()
        found.append(grads(model))
        with torch.no_grad():
            assert not model(**given).log_probs.requires_grad
    assert len(calls) == 6
    torch.testing.assert_close(found, [theirs] * 4)


# ------------------------------------------------------------------ enable and disable


def names():
    return utils._ChunkedLogProbFunction, utils._use_triton


def test_enable_and_disable():
    assert inspect.getsource(utils).count("_use_triton(") == 1  # TRL uses it only to select positions
    before = names()
    integration.disable()
    for _ in range(2):
        integration.enable()
        assert names()[0].apply is integration.log_probs and names()[1] is not before[1]
    for _ in range(2):
        integration.disable()
        assert names() == before


def test_enabled_restores_the_previous_state(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", type("Other", (ChunkedLogProbFunction,), {}))
    before = names()
    with pytest.raises(KeyError), integration.enabled():
        with integration.enabled():
            on = names()
        assert names() == on and on[0] is not before[0]
        raise KeyError
    assert names() == before
    integration.enable()
    with integration.enabled():
        integration.disable()
    assert names() == on
    integration.disable()


def test_unknown_signature_raises(monkeypatch):
    other = SimpleNamespace(forward=lambda ctx, hidden, vocabulary: None)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", other)
    with pytest.raises(RuntimeError, match=r"forward takes \(ctx, hidden, vocabulary\) instead of .*1\.16"):
        integration.enable()
    assert names()[0] is other


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx"])
def test_missing_name_raises(name, monkeypatch):
    monkeypatch.delattr(utils, name)
    with pytest.raises(RuntimeError, match=rf"found TRL \S+ without trl\.trainer\.utils\.{name}"):
        integration.enable()


def test_missing_or_old_trl_raises(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(ImportError, match=r"found TRL 1\.15\.2, which is too old; .* works with TRL 1\.16"):
        integration.enable()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r'pip install "trl>=1\.16"'), integration.enabled():
        pass
    integration.disable()


def test_import_does_not_import_trl_or_transformers():
    program = "import sys, sukhops.integrations.trl; print({'trl', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr
