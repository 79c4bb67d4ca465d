"""Called with labels, a model with a DirectorHead is the plain language model, also with another forward."""

import copy
import inspect
import pickle
import sys
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.24")

from trainer_inputs import MODELS, V, arguments, llama, rows  # noqa: E402

from sukhops import nn  # noqa: E402
from sukhops.integrations.transformers import LossTrainer, add_director_head, from_pretrained  # noqa: E402


def ids():
    return torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        if getattr(model.lm_head, "bias", None) is not None:
            model.lm_head.bias.normal_()
    return model


def is_plain_with_labels(model, plain):
    """Without labels, logits are gated; with labels (keyword or positional), loss and logits are plain."""
    expected = plain(ids(), labels=ids())
    position = list(inspect.signature(plain.forward).parameters).index("labels")
    gated = model(ids()).logits
    torch.testing.assert_close(gated.exp().sum(-1), torch.ones(2, 7))
    assert not torch.allclose(gated, expected.logits.log_softmax(-1))
    for found in (
        model(ids(), labels=ids()),
        model(ids(), *[None] * (position - 1), ids()),
        model.forward(ids(), labels=ids()),
    ):
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(model(ids()).logits, gated)


@pytest.mark.parametrize("training", [False, True])
def test_labels_give_the_plain_language_model(model, training):
    plain = copy.deepcopy(model)
    head = add_director_head(model, gamma=3.0)
    labels = ids()
    labels[:, :2] = -100
    for one in (plain, model):
        one.train(training)
    for options in ({}, {"num_items_in_batch": 29}):
        found, expected = [], []
        for one, results in ((model, found), (plain, expected)):
            torch.manual_seed(0)
            one.zero_grad()
            out = one(input_ids=ids(), labels=labels, **options)
            out.loss.backward()
            grads = [p.grad for n, p in one.named_parameters() if "cls_" not in n]
            results += [out.loss, out.logits, *grads]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert head.cls_weight.grad is None
    is_plain_with_labels(model.eval(), plain.eval())


def test_error_does_not_change_the_head():
    model = llama().eval()
    add_director_head(model)
    expected = model(ids()).logits
    with pytest.raises((ValueError, IndexError)):
        model(ids(), labels=ids()[:1, :3])
    assert torch.equal(model(ids()).logits, expected)


# ------------------------------------------------------------------ model.forward replaced on the instance


def with_accelerate(model, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def accelerate_added_and_removed(model, folder):
    with_accelerate(model, folder)
    pytest.importorskip("accelerate").hooks.remove_hook_from_module(model, recurse=True)


@pytest.fixture(autouse=True)
def accelerate_without_state():
    """accelerate keeps the precision of the process; neither earlier nor later tests share it with these."""

    def reset():
        if "accelerate.state" in sys.modules:
            sys.modules["accelerate.state"].AcceleratorState._reset_state()

    reset()
    yield
    reset()


def with_mixed_precision(model, folder):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare_model(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def with_liger(model, folder):
    liger = pytest.importorskip("liger_kernel.transformers")
    liger.apply_liger_kernel_to_llama(model=model, rope=False, rms_norm=False, swiglu=False)


def with_trl(model, folder):
    pytest.importorskip("trl").trainer.utils.add_fused_lm_head(model)


def with_trainer(model, folder):
    gated = isinstance(model.lm_head, nn.DirectorHead)
    loss = nn.DirectorLoss() if gated else nn.CringeLoss()
    LossTrainer(model, arguments(folder), train_dataset=rows("label"), loss=loss)


SETTERS = (
    with_accelerate, accelerate_added_and_removed, with_mixed_precision, with_liger, with_trl, with_trainer
)  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("setter", SETTERS)
def test_replaced_forward(setter, first, again, tmp_path):
    plain = llama().eval()
    model = copy.deepcopy(plain)
    if first:
        setter(model, tmp_path)
    add_director_head(model, gamma=3.0)
    if not first or again:
        setter(model, tmp_path)
    is_plain_with_labels(model, plain)
    is_plain_with_labels(copy.deepcopy(model), plain)
    if setter is not with_liger:  # Liger's forward has other parameters
        assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    model.save_pretrained(tmp_path / "saved")
    is_plain_with_labels(from_pretrained(tmp_path / "saved").eval(), plain)
    model.resize_token_embeddings(V + 3)
    plain.resize_token_embeddings(V + 3)
    plain.lm_head.weight, plain.model.embed_tokens.weight = (
        model.lm_head.weight,
        model.model.embed_tokens.weight,
    )
    is_plain_with_labels(model, plain)


def test_pickled_forward():
    plain = llama().eval()
    model = copy.deepcopy(plain)
    add_director_head(model)
    model.forward = model.forward
    is_plain_with_labels(pickle.loads(pickle.dumps(model)), plain)


# ------------------------------------------------------------------ compiled, in threads, nested


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole):
    torch._dynamo.reset()
    plain = llama().eval()
    model = copy.deepcopy(plain)
    add_director_head(model, gamma=3.0)
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
    else:
        compiled = model
        model.forward = torch.compile(model.forward, backend="aot_eager")
    is_plain_with_labels(compiled, plain)


def test_threads():
    """Both threads are in the forward of the model before either runs the head."""
    plain = llama().eval()
    model, found = copy.deepcopy(plain), {}
    add_director_head(model, gamma=3.0)
    expected = {False: model(ids()).logits, True: plain(ids()).logits}
    both = threading.Barrier(2, timeout=60)

    def wait(*_):
        both.wait()

    model.model.norm.register_forward_hook(wait)

    def run(labels):
        found[labels] = model(ids(), labels=ids() if labels else None).logits

    threads = [threading.Thread(target=run, args=[labels]) for labels in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[labels], expected[labels]) for labels in expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nested_calls_and_errors(error):
    """A nested call has its own labels, and an error in it does not affect the outer call."""
    plain = llama().eval()
    model = copy.deepcopy(plain)
    add_director_head(model, gamma=3.0)
    other = copy.deepcopy(model)
    gated, inner = model(ids()).logits, []

    def broken(*_):
        raise error

    def within(*_):
        inner.append(other(ids()).logits)
        hook = other.model.norm.register_forward_hook(broken)
        with pytest.raises(error):
            other(ids(), labels=ids())
        hook.remove()

    model.model.norm.register_forward_hook(within)
    assert torch.equal(model(ids()).logits, gated)
    assert torch.equal(model(ids(), labels=ids()).logits, plain(ids()).logits)
    assert all(torch.equal(logits, gated) for logits in inner)
