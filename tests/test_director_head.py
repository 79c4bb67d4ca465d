"""DirectorHead as a replacement of lm_head, alone and in Hugging Face generate."""

import pytest
import torch
from torch import nn

from sukhops import reference
from sukhops.nn import DirectorHead, DirectorLoss, HeadLoss


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_topk(shared, bias):
    head = DirectorHead(16, 50, gamma=0.7, shared=shared, bias=bias)
    hidden = torch.randn(2, 3, 16)
    expected = reference.director_logp(
        hidden,
        head.weight,
        head.cls_weight,
        gamma=0.7,
        lm_bias=head.bias,
        cls_bias=head.cls_bias,
        cls_affine=head.cls_affine,
    )
    logp = head(hidden)
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(head.topk(hidden, 4).values, expected.topk(4).values)
    logp.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    head.gamma = 0.0
    torch.testing.assert_close(
        head(hidden), torch.log_softmax(nn.functional.linear(hidden, head.weight, head.bias), -1)
    )
    head.gamma = torch.tensor([[0.0], [2.0]])
    assert torch.isfinite(head(hidden)).all()


def test_state_dict_has_the_names_of_a_linear_head():
    linear = nn.Linear(16, 50)
    head = DirectorHead(16, 50, bias=True)
    missing, unexpected = head.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"cls_weight", "cls_bias"} and not unexpected
    assert "gamma=1.0" in repr(head)


def test_from_linear_keeps_the_parameters():
    linear = nn.Linear(16, 50, dtype=torch.float64)
    head = DirectorHead.from_linear(linear, gamma=0.5)
    assert (
        head.weight is linear.weight and head.bias is linear.bias and head.cls_weight.dtype == torch.float64
    )


@pytest.mark.parametrize("shared", [False, True])
def test_from_linear_initializes_only_the_classifier(shared):
    linear = nn.Linear(16, 50)
    torch.manual_seed(7)
    head = DirectorHead.from_linear(linear, shared=shared)
    torch.manual_seed(7)
    drawn = torch.empty(50, 16).uniform_(-0.25, 0.25)
    if shared:
        assert (head.scale, head.shift) == (1, 0) and head.cls_weight is None
    else:
        assert torch.equal(head.cls_weight, drawn) and not head.cls_bias.any()


@pytest.mark.parametrize("shared", [False, True])
def test_reset_classifier_keeps_the_language_model(shared):
    head = DirectorHead(16, 50, shared=shared, bias=True)
    with torch.no_grad():
        for p in head.parameters():
            p.fill_(7.0)
    head.reset_classifier()
    for name, p in head.named_parameters():
        assert (p == 7).all() == (name in ("weight", "bias")), name
    head.reset_parameters()
    assert not (head.weight == 7).any() and not head.bias.any()


def test_tensor_gamma_is_a_buffer():
    head, hidden = DirectorHead(16, 50), torch.randn(2, 3, 16)
    names = set(head.state_dict())
    assert names == {"weight", "cls_weight", "cls_bias"}
    gamma = torch.tensor([[0.5], [2.0]])
    head.gamma = gamma
    assert set(head.state_dict()) == {*names, "gamma"} and head.gamma is gamma
    for row, strength in enumerate((0.5, 2.0)):
        other = DirectorHead(16, 50, gamma=strength)
        other.load_state_dict({n: t for n, t in head.state_dict().items() if n != "gamma"})
        torch.testing.assert_close(head(hidden)[row], other(hidden)[row])
    loaded = DirectorHead(16, 50, gamma=torch.zeros(2, 1))
    loaded.load_state_dict(head.state_dict())
    assert torch.equal(loaded(hidden), head(hidden))
    assert head.to(torch.float64).gamma.dtype == torch.float64 and head.to("meta").gamma.is_meta
    head.gamma = 0.25
    assert head.gamma == 0.25 and set(head.state_dict()) == names
    head.gamma = nn.Parameter(torch.tensor(0.5))
    assert "gamma" in dict(head.named_parameters())
    head.gamma = 1
    assert set(head.state_dict()) == names
    assert "gamma" in DirectorHead(16, 50, gamma=gamma).state_dict()


@pytest.mark.parametrize(
    "gamma, error, match",
    [
        (-1.0, ValueError, "finite number >= 0, got -1.0"),
        (float("nan"), ValueError, "finite number >= 0, got nan"),
        (float("inf"), ValueError, "finite number >= 0, got inf"),
        ("x", TypeError, "expected a number or a tensor, got str"),
        (None, TypeError, "expected a number or a tensor, got NoneType"),
        (torch.tensor([1]), TypeError, r"floating dtype, got torch\.int64"),
    ],
)
def test_invalid_gamma_raises_when_it_is_set(gamma, error, match):
    with pytest.raises(error, match=f"gamma: .*{match}"):
        DirectorHead(4, 6, gamma=gamma)
    for kept in (0.5, torch.tensor([0.5])):
        head = DirectorHead(4, 6, gamma=kept)
        with pytest.raises(error, match=match):
            head.gamma = gamma
        assert head.gamma is kept


def test_trains_with_the_loss():
    """DirectorLoss trains every parameter of the head, including its biases."""
    head = DirectorHead(8, 20, bias=True)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    hidden, target = torch.randn(4, 5, 8), torch.randint(0, 20, (4, 5))
    label = torch.tensor([1, 0, -1, -1])
    loss, history = HeadLoss(head, DirectorLoss()), []
    for _ in range(30):
        out = loss(hidden, target, label)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append(out.loss.item())
    assert history[-1] < 0.3 * history[0] and out.metrics["accuracy"] == 1
    assert all((p != before[name]).any() for name, p in head.named_parameters())


@pytest.fixture
def model():
    transformers = pytest.importorskip("transformers")
    torch.use_deterministic_algorithms(False)  # the model uses operators without a deterministic kernel
    config = transformers.GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    return model


GENERATE = [{"do_sample": False}, {"do_sample": True, "top_k": 5}, {"num_beams": 3, "do_sample": False}]


@pytest.mark.parametrize("options", GENERATE, ids=["greedy", "sampling", "beams"])
def test_generate(model, options):
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])

    def generate():
        torch.manual_seed(3)
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )

    plain = generate()
    head = DirectorHead.from_linear(model.lm_head, gamma=0.0)
    model.lm_head = head
    assert torch.equal(generate().sequences, plain.sequences)  # gamma = 0 gives the original model
    banned = plain.sequences[:, 3:].unique()
    with torch.no_grad():
        head.cls_bias[banned] = -1e4
    head.gamma = 1.0
    gated = generate().sequences[:, 3:]
    assert not torch.isin(gated, banned).any()
    head.gamma = 0.0
    assert torch.equal(generate().sequences, plain.sequences)


def test_generate_with_a_shared_head(model):
    model.lm_head = DirectorHead.from_linear(model.lm_head, gamma=1.5, shared=True)
    out = model.generate(torch.tensor([[1, 2]]), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 7)


def test_tied_weights_stay_tied(model):
    head = DirectorHead.from_linear(model.lm_head)
    model.lm_head = head
    assert head.weight is model.transformer.wte.weight
