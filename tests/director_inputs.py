"""Random inputs for the tests of Director."""

import torch

LOW = [torch.float32, torch.bfloat16, torch.float16]


def make(n=9, d=19, v=1003, dtype=torch.float32, bias=False, shared=False, gamma=False):
    inputs = {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "lm_weight": (0.4 * torch.randn(v, d, dtype=dtype)).requires_grad_(),
        "cls_weight": None if shared else (0.4 * torch.randn(v, d, dtype=dtype)).requires_grad_(),
    }
    if bias:
        inputs["lm_bias"] = torch.randn(v, dtype=dtype).requires_grad_()
        if not shared:
            inputs["cls_bias"] = torch.randn(v, dtype=dtype).requires_grad_()
    if shared:
        inputs["cls_affine"] = torch.tensor([1.3, -0.4], dtype=dtype).requires_grad_()
    if gamma:
        inputs["gamma"] = (3 * torch.rand(n, dtype=dtype)).requires_grad_()
    return inputs


def labeled(n=37, d=19, v=503, dtype=torch.float32, bias=False):
    target, label = torch.randint(0, v, (n,)), torch.arange(n) % 3 - 1
    target[::5] = -100
    target[1:5] = target[1]  # consecutive equal targets
    inputs = {
        "hidden": torch.randn(n, d, dtype=dtype).requires_grad_(),
        "weight": (0.4 * torch.randn(v, d, dtype=dtype)).requires_grad_(),
        "target": target,
        "label": label,
    }
    if bias:
        inputs["bias"] = torch.randn(v, dtype=dtype).requires_grad_()
    return inputs
