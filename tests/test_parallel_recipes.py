"""DTensors, and HeadLoss with DDP, FSDP2, tensor parallelism and PEFT."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn as tnn

from sukhops import director_logp, linear_logp, linear_token_stats, nn

V, D, S, T = 53, 8, 4, 6


def batch():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (S, T + 1), generator=g)
    target = ids[:, 1:].clone()
    target[:, 0] = -100
    return ids[:, :-1], target


class Model(tnn.Module):
    """A backbone and its head in one forward."""

    def __init__(self, loss=None, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = tnn.Embedding(V, D)
        self.backbone = tnn.Sequential(tnn.Linear(D, D), tnn.GELU(), tnn.Linear(D, D))
        head = tnn.Linear(D, V, bias=False)
        if tied:
            head.weight = self.embedding.weight
        self.head = nn.HeadLoss(head, loss)

    def forward(self, ids, target, **kwargs):
        return self.head(self.backbone(self.embedding(ids)), target, **kwargs)


def trained(model, step, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def whole(tied=False, loss=None, ids=None, target=None):
    """The same steps in one process; the loss is the mean over all tokens."""
    ids, target = batch()
    count = (target != -100).sum()
    return trained(Model(loss, tied), lambda m: (-m(ids, target).sum() / count).backward())


def own_part(rank, parts):
    ids, target = batch()
    return ids.chunk(parts)[rank], target.chunk(parts)[rank], (target != -100).sum()


def ddp(rank):
    ids, target, count = own_part(rank, 2)
    model = tnn.parallel.DistributedDataParallel(Model())

    def step(m):  # two micro-batches, divided by the count of the whole batch; DDP averages over two ranks
        with m.no_sync():
            (-m(ids[:1], target[:1]).sum() / (count / 2)).backward()
        (-m(ids[1:], target[1:]).sum() / (count / 2)).backward()

    return {n.removeprefix("module."): p for n, p in trained(model, step).items()}


def fsdp(rank, sharded):
    from torch.distributed.fsdp import fully_shard

    ids, target, count = own_part(rank, 2)
    model = Model(tied=sharded == "root")
    if sharded == "HeadLoss":
        fully_shard(model.head)
    elif sharded == "head":
        fully_shard(model.head.head)
    fully_shard(model.backbone)
    fully_shard(model)
    found = trained(model, lambda m: (-m(ids, target).sum() / (count / 2)).backward())
    return {n: p.full_tensor() for n, p in found.items()}


def fsdp_and_tensor_parallel(rank):
    """Four ranks: two parts of the batch (FSDP2) times two slices of the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh["data"].get_local_rank(), mesh["tensor"].get_local_rank()
    ids, target, count = own_part(data, 2)
    full = Model()
    backbone = tnn.Sequential(full.embedding, full.backbone)
    head = tnn.Linear(D, V, bias=False)
    head.weight = tnn.Parameter(full.head.head.weight.detach().tensor_split(2)[tensor].clone())
    fully_shard(backbone, mesh=mesh["data"])

    class Slice(tnn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone, nn.HeadLoss(head, None)

    model = Slice()
    fully_shard(model.head, mesh=mesh["data"])
    group = mesh["tensor"].get_group()

    def step(m):
        logp = m.head(m.backbone(ids), target, group=group)
        (-logp.sum() / (count / 2)).backward()

    return tensor, {n: p.full_tensor() for n, p in trained(model, step).items()}


def close(found, expected):
    assert set(found) == set(expected)
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=2e-6, atol=2e-6)


def test_ddp_with_micro_batches():
    for found in on_ranks(2, ddp):
        close(found, whole())


@pytest.mark.parametrize("sharded", ["HeadLoss", "head", "root"])
def test_fsdp2(sharded):
    """Sharded separately: HeadLoss, its head, or neither (tied weights sharded with the root)."""
    for found in on_ranks(2, fsdp, sharded):
        close(found, whole(tied=sharded == "root"))


def fsdp_loss(rank):
    """Calls a loss with metrics twice; the gathered weight is freed in between."""
    from torch.distributed.fsdp import fully_shard

    hidden, (_, target) = torch.randn(S, T, D, generator=torch.Generator().manual_seed(3)), batch()
    torch.manual_seed(0)
    head = tnn.Linear(D, V)
    plain = nn.DPOLoss(loss_type="cpo")(hidden, head.weight, target, bias=head.bias)
    exact = torch.autograd.grad(plain.loss, head.weight)[0]
    fully_shard(head)
    for _ in range(2):
        head.zero_grad()
        found = nn.HeadLoss(head, nn.DPOLoss(loss_type="cpo"))(hidden, target)
        found.loss.backward()
        assert torch.equal(found.metrics["logp_chosen"], plain.metrics["logp_chosen"])
        torch.testing.assert_close(head.weight.grad.full_tensor(), exact)
    with pytest.raises(ValueError, match="HeadLoss"):
        linear_logp(hidden, head.weight, target)
    return True


def test_fsdp2_with_a_loss():
    assert on_ranks(2, fsdp_loss) == [True, True]


def test_fsdp2_and_tensor_parallel():
    expected = whole()
    ranks = on_ranks(4, fsdp_and_tensor_parallel)
    assert all(isinstance(r, tuple) for r in ranks), ranks
    for tensor, found in ranks:
        mine = expected["head.head.weight"].tensor_split(2)[tensor]
        torch.testing.assert_close(found["head.head.weight"], mine, rtol=2e-6, atol=2e-6)
        backbone = (found["backbone.0.weight"], expected["embedding.weight"])
        torch.testing.assert_close(*backbone, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------ DTensor


def dtensors(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, g = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(1)
    hidden, weight, second = (torch.randn(*size, generator=g) for size in ((S, T, D), (V, D), (V, D)))
    bias, (_, target) = torch.randn(V, generator=g), batch()
    found = {}

    def gradients(name, call, placed, of_hidden):
        tensors = [hidden, weight, bias, second]
        placements = [of_hidden, placed, placed, placed]
        given = [
            distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, placements, strict=True)
        ]
        out = call(*given)
        assert isinstance(out, DTensor), name
        loss = out.full_tensor().square().sum() if out.dim() else out.full_tensor()
        grads = torch.autograd.grad(loss, given, allow_unused=True)
        assert all(g is None or g.placements == t.placements for g, t in zip(grads, given, strict=True)), name
        plain = [t.clone().requires_grad_() for t in tensors]
        alone = call(*plain)
        exact = torch.autograd.grad(alone.square().sum() if alone.dim() else alone, plain, allow_unused=True)
        found[name] = [
            (a.full_tensor() - b).abs().max().item() / b.abs().max().item()
            for a, b in zip((out, *grads), (alone, *exact), strict=True)
            if b is not None
        ]

    dpo = nn.DPOLoss(loss_type="cpo")
    calls = {
        "logp": lambda h, w, b, s: linear_logp(h, w, target, b),
        "statistics": lambda h, w, b, s: linear_token_stats(h, w, target, b, outputs=("entropy",)).entropy,
        "dpo": lambda h, w, b, s: dpo(h, w, target, bias=b).loss,
        "director": lambda h, w, b, s: director_logp(h, w, s, lm_bias=b),
    }
    for name, call in calls.items():
        for placed in (Shard(0), Replicate()):
            for of_hidden in (Replicate(), Shard(0), Shard(1)):
                gradients(f"{name} {placed} {of_hidden}", call, placed, of_hidden)
    other_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("other",))
    sharded = distribute_tensor(weight, mesh, [Shard(0)])
    row = distribute_tensor(hidden, mesh, [Replicate()])
    for name, call in {
        "plain hidden": lambda: linear_logp(hidden, sharded, target),
        "group": lambda: linear_logp(row, sharded, target, group=dist.group.WORLD),
        "columns": lambda: linear_logp(row, distribute_tensor(weight, mesh, [Shard(1)]), target),
        "plain weight": lambda: linear_logp(row, weight, target),
        "plain bias": lambda: linear_logp(row, sharded, target, bias),
        "plain rows": lambda: nn.DPOLoss()(row, sharded, target, ref_hidden=hidden, ref_weight=sharded),
        "two meshes": lambda: linear_logp(
            distribute_tensor(hidden, other_mesh, [Replicate()]), sharded, target
        ),
        "width": lambda: linear_logp(distribute_tensor(hidden, mesh, [Shard(2)]), sharded, target),
        "generator": lambda: nn.CringeLoss(k=2)(
            row, distribute_tensor(weight, mesh, [Replicate()]), target, target.clamp(0, 1)
        ),
    }.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


BAD = {
    "plain hidden": "weight: expected a plain tensor with a plain hidden.*nn.HeadLoss.*group=",
    "group": "group: expected None with DTensors",
    "columns": r"weight: expected Shard\(0\) or Replicate\(\)",
    "plain weight": "hidden: expected a plain tensor with a plain weight, got a DTensor",
    "plain bias": "bias: expected a DTensor",
    "plain rows": "ref_hidden: expected a DTensor on the mesh of weight, like hidden",
    "two meshes": "hidden: expected a DTensor on the mesh of weight",
    "width": r"hidden: expected Replicate\(\) or Shard of a leading axis",
    "generator": r"generator: expected one in the same state on every rank \(DTensors",
}


def test_dtensors():
    for found in on_ranks(2, dtensors):
        assert isinstance(found, dict), found
        for name, message in BAD.items():
            with pytest.raises(ValueError, match=message):
                raise ValueError(found.pop(name))
        assert len(found) == 24
        for name, errors in found.items():
            assert max(errors) < 2e-5, (name, errors)


# ------------------------------------------------------------------ HeadLoss and PEFT


class Base(tnn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = tnn.Linear(D, V, bias=True)

    def forward(self, x):
        return self.lm_head(x)


def agrees(model, hidden, target):
    """Compares log-probs and gradients of HeadLoss with those of the model's forward."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    head = nn.HeadLoss(model.lm_head, None)
    ours = head(hidden, target)
    theirs = F.log_softmax(model(hidden), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad
    if not ours.requires_grad:  # merged adapters
        return
    grads = [torch.autograd.grad(t.square().sum(), leaves, allow_unused=True) for t in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_peft():
    peft = pytest.importorskip("peft")
    hidden, (_, target) = torch.randn(S, T, D), batch()
    target = target.clamp(min=0)

    def lora(**options):
        config = peft.LoraConfig(
            r=3, target_modules=["lm_head"], lora_alpha=7, init_lora_weights=False, **options
        )
        return peft.get_peft_model(Base(), config).base_model.model

    agrees(lora(), hidden, target)
    agrees(lora(lora_bias=True), hidden, target)
    two = lora()
    two.lm_head.update_layer("more", 2, lora_alpha=4, config=peft.LoraConfig(init_lora_weights=False))
    two.lm_head.set_adapter(["default", "more"])
    agrees(two, hidden, target)
    merged = lora()
    merged.lm_head.merge()
    agrees(merged, hidden, target)
    merged.lm_head.enable_adapters(False)
    agrees(merged, hidden, target)
    two.lm_head.set_adapter(["default"])
    two.lm_head._active_adapter = ["default", "of another layer"]
    agrees(two, hidden, target)
    disabled = lora()
    disabled.lm_head.enable_adapters(False)
    head = nn.HeadLoss(disabled.lm_head, None)
    assert torch.equal(
        head(hidden, target), linear_logp(hidden, Base().lm_head.weight, target, Base().lm_head.bias)
    )
    saved = peft.get_peft_model(
        tnn.Sequential(tnn.Linear(D, D)).append(Base()),
        peft.LoraConfig(target_modules=["0"], modules_to_save=["lm_head"]),
    ).base_model.model[1]
    agrees(saved, hidden, target)
    with pytest.raises(ValueError, match="expected LoRA without dropout"):
        nn.HeadLoss(lora(lora_dropout=0.1).lm_head, None)(hidden, target)
    nn.HeadLoss(lora(lora_dropout=0.1).eval().lm_head, None)(hidden, target)
    with pytest.raises(ValueError, match="variant of LoRA"):
        nn.HeadLoss(lora(use_dora=True).lm_head, None)(hidden, target)


def parts_of_a_lora_head(rank):
    """A PEFT layer sharded as a whole gives the same gradient; sharding only a part of it raises."""
    import peft
    from torch.distributed.fsdp import fully_shard

    hidden, (_, target) = torch.randn(S, T, D, generator=torch.Generator().manual_seed(3)), batch()

    def layer():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
        return peft.get_peft_model(Base(), config).base_model.model.lm_head

    def gradient(head):
        nn.HeadLoss(head, None)(hidden, target).sum().backward()
        return head.lora_A["default"].weight.grad

    alone, sharded, part = gradient(layer()), layer(), layer()
    torch.testing.assert_close(gradient(fully_shard(sharded)).full_tensor(), alone)
    fully_shard(part.base_layer)
    with pytest.raises(ValueError, match="FSDP2 has sharded as a whole, got a sharded part"):
        nn.HeadLoss(part, None)(hidden, target)
    return True


def test_peft_under_fsdp2():
    pytest.importorskip("peft")
    assert on_ranks(2, parts_of_a_lora_head) == [True, True]


def test_replaced_forward_of_the_head_is_kept():
    head = tnn.Linear(D, V)
    head.unshard = lambda: None  # like modules of FSDP2
    head.forward = own = lambda x: x
    nn.HeadLoss(head, None)(torch.randn(S, T, D), batch()[1])
    assert head.forward is own


def test_head_loss_calls_the_loss():
    hidden, (_, target) = torch.randn(S, T, D), batch()
    linear = tnn.Linear(D, V)
    dpo = nn.DPOLoss(loss_type="cpo")
    ours = nn.HeadLoss(linear, dpo)(hidden, target, num_items=7)
    assert torch.equal(ours.loss, dpo(hidden, linear.weight, target, bias=linear.bias, num_items=7).loss)
    label, director = torch.tensor([1, 0, -1, 1]), nn.DirectorLoss()
    for shared in (False, True):
        head = nn.DirectorHead(D, V, shared=shared, bias=True)
        found = nn.HeadLoss(head, director)(hidden, target, label)
        expected = director(
            hidden, head.weight, head.cls_weight, target, label,
            lm_bias=head.bias, cls_bias=head.cls_bias, cls_affine=head.cls_affine,
        )  # fmt: skip
        assert torch.equal(found.loss, expected.loss)
    for head, loss in ((nn.DirectorHead(D, V), dpo), (linear, director), (nn.DirectorHead(D, V), None)):
        with pytest.raises(TypeError, match="expected a DirectorHead with a DirectorLoss"):
            nn.HeadLoss(head, loss)
    for head in (tnn.Embedding(V, D), tnn.Identity()):
        with pytest.raises(TypeError, match=r"head: expected an nn\.Linear or DirectorHead"):
            nn.HeadLoss(head, None)
