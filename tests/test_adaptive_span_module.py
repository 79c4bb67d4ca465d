"""AdaptiveSpanAttention: a direct implementation, blocks, padding, packing, frozen spans, copies, compile."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sukhops import reference
from sukhops.nn import AdaptiveSpanAttention
from sukhops.testing import assert_close, budget, distance

# Bound on the difference of two orders of summation: 32 products of a projection, 8 of a score plus rel_pos,
# scale and mask, 20 weights, 20 values, 32 products of the last projection. Each rounds by eps / 2 of numbers
# less than SIZE.
SIZE = 4
NEAR = 2 * (32 + (8 + 3) + 20 + 20 + 32) * SIZE * torch.finfo(torch.float64).eps / 2
RATIOS = [0.0, 0.3125, 0.84375, 0.125]  # of 20 tokens, ramp 5: windows 5, 12, 20, 8


def layer(include_self=True, kv_heads=4, rel_pos=True, dtype=torch.float64, max_span=20):
    made = AdaptiveSpanAttention(
        32, 4, max_span, ramp=5.0, rel_pos=rel_pos, include_self=include_self, num_kv_heads=kv_heads,
        dtype=dtype,
    )  # fmt: skip
    with torch.no_grad():
        made.adaptive_span.ratio.copy_(torch.tensor(RATIOS))
    return made


def table_of_heads(dtype=torch.float64):
    return nn.Parameter(torch.randn(4, 20, 8, dtype=dtype))


def data(t=45, b=2, dtype=torch.float64):
    return torch.randn(b, t, 32, dtype=dtype)


def in_blocks(module, x, sizes, **options):
    """Runs consecutive blocks with a cache; returns their outputs and the last cache."""
    out, cache = [], None
    for block in x.split(sizes, 1):
        y, cache = module(block, cache, **options)
        out.append(y)
    return torch.cat(out, 1), cache


def by_hand(module, x, key_start=(0, 0)):
    """The layer row by row, with the log of the mask added to the scores."""
    b, t, d = *x.shape[:2], 8
    q, k, v = (p(x).unflatten(-1, (-1, d)) for p in (module.q_proj, module.k_proj, module.v_proj))
    heads = []
    for n in range(4):
        kv = n * module.num_kv_heads // 4
        span = 20 * module.adaptive_span.ratio[n].item()
        table = module.rel_pos
        if table is not None and table.dim() == 3:
            table = table[n]
        rows = torch.zeros(b, t, d, dtype=x.dtype)
        for s in range(b):
            for i in range(t):
                scores, values = [], []
                for j in range(key_start[s], i + 1):
                    away = i - j - (not module.include_self)
                    mask = min(1.0, (5 + span - away) / 5)
                    if 0 <= away < 20 and mask > 0:
                        key = k[s, j, kv] if table is None else k[s, j, kv] + table[away]
                        scores.append(q[s, i, n] @ key / math.sqrt(d) + math.log(mask))
                        values.append(v[s, j, kv])
                if scores:
                    rows[s, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
        heads.append(rows)
    return module.out_proj(torch.cat(heads, -1))


def eager(x, **p):
    """The layer, computed with the reference and the layer's parameters."""
    q, k, v = (
        F.linear(x, p[f"{n}_proj.weight"]).unflatten(-1, (-1, 8)).transpose(1, 2) for n in ("q", "k", "v")
    )
    span = 20 * p["adaptive_span.ratio"].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    out = reference.adaptive_span_attention(q, k, v, span, ramp=5.0, rel_pos=p["rel_pos"])
    return F.linear(out.transpose(1, 2).flatten(2), p["out_proj.weight"])


def assert_within_budget(y, made, x):
    """Compares y, in the layer's precision, with the layer in float64."""
    parameters = {n: p.detach().cpu() for n, p in made.named_parameters()}
    low = eager(x.cpu(), **parameters)
    exact = eager(x.cpu().double(), **{n: p.double() for n, p in parameters.items()})
    assert distance(y.cpu(), exact) <= budget(y, low, exact)


# ---- the layer


def test_options_of_the_layer():
    with pytest.raises(ValueError, match=r"^d_model:.* 4"):
        AdaptiveSpanAttention(30, 4, 20)
    with pytest.raises(ValueError, match=r"^num_kv_heads:"):
        AdaptiveSpanAttention(32, 4, 20, num_kv_heads=3)
    with pytest.raises(TypeError, match=r"^rel_pos:.*Tensor"):
        AdaptiveSpanAttention(32, 4, 20, rel_pos=torch.zeros(20, 8))
    for shape in ((19, 8), (20, 7), (3, 20, 8)):
        with pytest.raises(ValueError, match=r"^rel_pos:.*max_span = 20"):
            AdaptiveSpanAttention(32, 4, 20, rel_pos=nn.Parameter(torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"^ramp:"):
        AdaptiveSpanAttention(32, 4, 20, ramp=-1.0)
    made = layer()
    with pytest.raises(ValueError, match=r"^x:"):
        made(data()[..., :31])
    with pytest.raises(TypeError, match=r"^key_start:"):
        made(data(), key_start=[1, 2])
    with pytest.raises(ValueError, match=r"^key_start:"):
        made(data(), key_start=torch.zeros(3, dtype=torch.int64))
    cache = made(data())[1]
    with pytest.raises(ValueError, match=r"^cache:.*B = 3"):
        made(data(b=3), cache)
    with pytest.raises(TypeError, match=r"^cache:"):
        made(data(), cache.keys)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize(("kv_heads", "rel_pos"), [(4, True), (2, False), (1, True), (2, "heads")])
@pytest.mark.parametrize("frozen", [False, True])
def test_matches_direct_implementation(include_self, kv_heads, rel_pos, frozen):
    made = layer(include_self, kv_heads, table_of_heads() if rel_pos == "heads" else rel_pos)
    made = made.freeze_spans() if frozen else made
    x = data(t=26)
    assert distance(made(x)[0], by_hand(made, x)) <= NEAR
    assert distance(made(x, key_start=torch.tensor([3, 9]))[0], by_hand(made, x, (3, 9))) <= NEAR
    assert distance(in_blocks(made, x, [3, 1, 1, 9, 12])[0], by_hand(made, x)) <= NEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget(dtype):
    made = layer(kv_heads=2)
    inputs = {"x": data().requires_grad_()} | dict(made.named_parameters())

    def ours(x, **parameters):
        return torch.func.functional_call(made, parameters, (x,))[0]

    assert_close(ours, eager, inputs, dtype)


def test_gradients():
    made = AdaptiveSpanAttention(8, 4, 10, ramp=3.0, num_kv_heads=2, dtype=torch.float64)
    # no integer spans, where the mask is not differentiable
    made.adaptive_span.ratio.data.copy_(torch.tensor([0.13, 0.41, 0.77, 0.22]))
    names, parameters = zip(*made.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))[0]

    assert gradcheck(call, (torch.randn(1, 14, 8, dtype=torch.float64, requires_grad=True), *parameters))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_blocks_equal_one_pass(include_self, frozen):
    made = layer(include_self, kv_heads=2)
    x = data(t=90)
    whole = made(x)[0]
    if frozen:
        made.freeze_spans()
    for sizes in ([30, 30, 30], [1] * 90, [50, 1, 1, 1, 7, 30], [90]):
        y, cache = in_blocks(made, x, sizes)
        assert distance(y, whole) <= NEAR
        assert not any(t.requires_grad for t in cache.keys + cache.values)
        # the next token also sees itself if include_self; heads 0 and 1, and 2 and 3, share keys
        windows = [12, 20] if frozen else [20, 20]
        kept = sorted(t.shape[2] for t in cache.keys for _ in range(t.shape[1]))
        assert kept == [w - include_self for w in windows]


def test_a_cache_is_not_changed():
    made = layer()
    x = data()
    _, cache = made(x[:, :20])
    first = made(x[:, 20:], cache)[0]
    made(torch.randn_like(x), cache)
    assert torch.equal(made(x[:, 20:], cache)[0], first)
    long = made(data(t=500))[1]  # keys that left the cache are not kept in memory
    assert long.keys[0].untyped_storage().nbytes() == 2 * 4 * 19 * 8 * 8


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [[60], [20, 1, 1, 38], [2, 3, 55]])
def test_left_padding(frozen, sizes):
    """Each sequence gives the same as alone; the cache stores where it starts."""
    made = layer(kv_heads=2)
    if frozen:
        made.freeze_spans()
    x, pad = data(t=60), [7, 31]
    start = torch.tensor(pad)
    alone = [made(x[i : i + 1, p:])[0] for i, p in enumerate(pad)]
    again = in_blocks(made, x, sizes, key_start=start)[0]
    y, cache = made(x[:, : sizes[0]], key_start=start)
    parts = [y]
    for block in x[:, sizes[0] :].split(sizes[1:], 1) if sizes[1:] else ():
        y, cache = made(block, cache)
        parts.append(y)
    for out in (torch.cat(parts, 1), again):
        for i, p in enumerate(pad):
            assert distance(out[i : i + 1, p:], alone[i]) <= NEAR
            assert not out[i, :p].any()  # padding sees no key


@pytest.mark.parametrize("frozen", [False, True])
def test_packed_documents(frozen):
    made = layer()
    if frozen:
        made.freeze_spans()
    x = data(t=40, b=1)
    start = torch.tensor([0] * 13 + [13] * 20 + [33] * 7).unsqueeze(0)
    alone = torch.cat([made(part)[0] for part in x.split([13, 20, 7], 1)], 1)
    assert distance(made(x, key_start=start)[0], alone) <= NEAR
    y, cache = made(x[:, :35], key_start=start[:, :35])
    rest = made(x[:, 35:], cache)[0]  # the last document continues
    assert distance(torch.cat([y, rest], 1), alone) <= NEAR


def test_no_tokens_with_starts_per_token():
    made = layer()
    start = torch.tensor([3, 0])
    x = data(t=5)
    none, cache = made(x[:, :0], key_start=start.unsqueeze(1)[:, :0])
    assert none.shape == x[:, :0].shape and cache.key_start is None
    _, cache = made(x, key_start=start)
    none, cache = made(x[:, :0], cache, key_start=start.unsqueeze(1)[:, :0])
    assert torch.equal(cache.key_start, start)


# ---- frozen spans


def test_frozen_windows():
    made = layer(kv_heads=2)
    x = data()
    whole = made(x)[0]
    assert made.freeze_spans() is made and made.windows == (5, 12, 20, 8)
    assert "windows=(5, 12, 20, 8)" in repr(made)
    assert distance(made(x)[0], whole) <= NEAR
    made(x)[0].sum().backward()
    assert made.adaptive_span.ratio.grad is None and made.q_proj.weight.grad is not None
    cache = layer()(x)[1]
    with pytest.raises(ValueError, match=r"^cache:.*new cache"):
        made(x, cache)
    fresh = made(x[:, :1])[1]  # a cache has the same shapes from the first token on
    assert [t.shape for t in fresh.keys] == [t.shape for t in made(x)[1].keys]


@pytest.mark.parametrize("frozen", [False, True])
def test_copies(frozen):
    made = layer(kv_heads=2)
    x, file = data(), io.BytesIO()
    whole = made(x)[0]
    if frozen:
        made.freeze_spans()
    torch.save(made, file)
    file.seek(0)
    others = [copy.deepcopy(made), torch.load(file, weights_only=False), layer(kv_heads=2)]
    others[2].load_state_dict(made.state_dict())
    assert set(made.state_dict()) == set(layer().state_dict())
    late = layer(kv_heads=2)
    late.adaptive_span.ratio.data.fill_(0.5)
    late.freeze_spans().load_state_dict(made.state_dict())
    assert late.windows == (5, 12, 20, 8)
    for other in (*others, late, late.float().double()):
        near = NEAR if other.q_proj.weight.equal(made.q_proj.weight) else math.inf
        assert distance(in_blocks(other, x, [20, 1, 24])[0], whole) <= near


def test_one_table_for_all_layers():
    first = layer()
    second = layer(rel_pos=first.rel_pos)
    assert second.rel_pos is first.rel_pos and len(list(nn.ModuleList([first, second]).parameters())) == 11
    pair = copy.deepcopy(nn.ModuleList([first, second]))
    assert pair[0].rel_pos is pair[1].rel_pos and pair[0].rel_pos is not first.rel_pos
    x = data()
    pair[1](pair[0](x)[0])[0].square().sum().backward()
    assert pair[0].rel_pos.grad[:20].any(1).all()


# ---- torch features


def test_no_device_synchronization():
    """Runs the forward with fake tensors, which raise if a value is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for made in (layer(), layer().freeze_spans()):
        with FakeTensorMode(allow_non_fake_inputs=True):
            start = torch.zeros(2, dtype=torch.int64)
            y, _ = in_blocks(made, data(), [20, 1, 24], key_start=start)
            assert y.shape == (2, 45, 32)


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen):
    made = layer(kv_heads=2)
    if frozen:
        made.freeze_spans()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = data()
    y, whole = compiled(x)[0], made(x)[0]
    assert distance(y, whole) <= NEAR
    wanted = [p for p in made.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(out.square().sum(), wanted) for out in (y, whole)]
    for ours, eager in zip(*grads, strict=True):
        assert distance(ours, eager) <= NEAR * eager.abs().max().item()
    with torch.no_grad():
        y, _ = in_blocks(compiled, x, [12] + [1] * 33)
    assert distance(y, whole) <= NEAR


@torch.no_grad()
def test_frozen_decoding_compiles_to_two_graphs():
    torch._dynamo.reset()
    counts = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(kv_heads=2).freeze_spans(), fullgraph=True, backend=counts)
    _, cache = compiled(data(t=12))
    first = counts.frame_count
    for _ in range(33):  # past the longest window, 20
        _, cache = compiled(data(t=1), cache)
    assert counts.frame_count == first + 2


def test_checkpointing():
    made, x = layer(), data()
    wanted = list(made.parameters())
    plain = torch.autograd.grad(made(x)[0].square().sum(), wanted)
    saved = torch.autograd.grad(checkpoint(made, x, use_reentrant=False)[0].square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_autocast_and_half_precision():
    made = layer(dtype=torch.float32)
    x = data(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, cache = made(x[:, :30])
        y = torch.cat([y, made(x[:, 30:], cache)[0]], 1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert made.adaptive_span.ratio.grad.dtype == torch.float32 and made.rel_pos.grad.any()
    half = copy.deepcopy(made).bfloat16()
    z = in_blocks(half, x.bfloat16(), [30, 15])[0]
    assert z.dtype == torch.bfloat16 and torch.equal(half.adaptive_span.ratio, made.adaptive_span.ratio)
    for out in (y, z):
        assert_within_budget(out, half, x.bfloat16())


def test_span_grows_if_the_task_needs_it():
    """Each token equals the one 15 positions before, near the end of the ramp for span 0."""
    made = AdaptiveSpanAttention(16, 2, 64, ramp=16.0)
    embed, head = nn.Embedding(8, 16), nn.Linear(16, 8)
    step = torch.optim.Adam([*made.parameters(), *embed.parameters(), *head.parameters()], 0.01)
    ids = torch.randint(0, 8, (8, 15)).repeat(1, 4)
    for _ in range(90):
        step.zero_grad()
        logits = head(made(embed(ids[:, :-1]))[0])
        loss = F.cross_entropy(logits[:, 15:].flatten(0, 1), ids[:, 16:].flatten())
        (loss + made.adaptive_span.penalty(1e-4)).backward()
        step.step()
    assert loss < 0.2 and made.adaptive_span.span().max() > 3


@pytest.mark.gpu
def test_on_cuda():
    made = layer(kv_heads=2, dtype=torch.float32).cuda()
    x = data(dtype=torch.float32).cuda()
    assert_within_budget(made(x)[0], made, x)
    made.freeze_spans()
    assert_within_budget(in_blocks(made, x, [20, 1, 24])[0], made, x)
