"""A loss and the head that it trains in one module, for use with FSDP2, DDP, ZeRO-3 and PEFT."""

from typing import Any

from torch import Tensor, nn

from sukhops.losses._output import LossOutput
from sukhops.nn.director import DirectorHead, DirectorLoss
from sukhops.ops.vocab_head import linear_logp


class HeadLoss(nn.Module):
    """Calls a loss of `sukhops.nn` with the weight of a head that is part of this module.

    A call such as `loss(hidden, lm_head.weight, target)` reads the weight outside the forward of `lm_head`.
    At that moment FSDP2 and ZeRO-3 have not gathered the weight, and the adapters of PEFT are left out.
    `HeadLoss` contains both the head and the loss. Its forward gathers, reduces and frees the parameters of
    the head like the forward of any other module, whether `HeadLoss` or the head is sharded. It must run
    inside the forward of the wrapped model. Tests cover DDP, FSDP2, DeepSpeed's ZeRO-3 and PEFT.

    Args:
        head: an nn.Linear, its weight tied or not; a `DirectorHead`, for `DirectorLoss`; or one of these in a
            PEFT layer: LoRA, differentiable in A and B, or modules_to_save. Adapters may be disabled or
            merged. With LoRA, weight + scaling * B @ A is computed in every call. This needs memory for
            another [V, D], and as many matrix products as a trainable head.
        loss: a loss of `sukhops.nn`. None: forward returns log-probs.

    Raises:
        TypeError: head has another type, or does not match the loss.
        ValueError: in forward: LoRA has dropout in training mode, or is a variant such as DoRA; FSDP2 has
            sharded only a part of the head.

    Source: this library; LoRA is from Hu et al. 2021.
    """

    def __init__(self, head: nn.Module, loss: nn.Module | None):
        super().__init__()
        gated = isinstance(_plain(head), DirectorHead)
        if gated != isinstance(loss, DirectorLoss):
            raise TypeError(
                "head: expected a DirectorHead with a DirectorLoss, or an nn.Linear with another loss, got "
                f"{type(_plain(head)).__name__} and {type(loss).__name__}"
            )
        self.head, self.loss = head, loss

    def forward(self, hidden: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossOutput | Tensor:
        """The loss of a batch with the weight and the bias of the head.

        Args:
            hidden, target: as in the loss, or in `sukhops.linear_logp` without a loss.
            args, kwargs: the other arguments of the loss, except weight and bias.

        Returns:
            LossOutput(loss, metrics) of the loss; without a loss, log-probs shaped as target.
        """

        def call(hidden: Tensor) -> LossOutput | Tensor:
            weight, bias = _effective(self.head)
            if self.loss is None:
                return linear_logp(hidden, weight, target, bias, *args, **kwargs)
            if isinstance(self.loss, DirectorLoss):
                plain = _plain(self.head)
                return self.loss(
                    hidden, weight, plain.cls_weight, target, *args,
                    lm_bias=bias, cls_bias=plain.cls_bias, cls_affine=plain.cls_affine, **kwargs,
                )  # fmt: skip
            return self.loss(hidden, weight, target, *args, bias=bias, **kwargs)

        if not _gathers_itself(self.head):
            return call(hidden)
        before = vars(self.head).get("forward")
        self.head.forward = call  # so that the head's forward hooks, which gather the weight, run around it
        try:
            return self.head(hidden)
        finally:
            del self.head.forward
            if before is not None:
                self.head.forward = before


def _gathers_itself(head: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 gathers the head's parameters in its own forward."""
    if any(hasattr(m, "unshard") for m in head.modules() if m is not head):
        raise ValueError(
            "head: expected a head (or PEFT layer) that FSDP2 has sharded as a whole, got a sharded part"
        )
    return hasattr(head, "unshard") or any(hasattr(p, "ds_id") for p in head.parameters())


def in_use(head: Any) -> nn.Module | None:  # Any: layers of PEFT have attributes of their own
    """The module that a PEFT layer wraps and currently uses; None if `head` is not a PEFT layer."""
    if hasattr(head, "modules_to_save"):
        if head.disable_adapters or not head.active_adapters:
            return head.original_module
        return head.modules_to_save[head.active_adapters[0]]
    return head.base_layer if hasattr(head, "lora_A") else None


def _plain(head: nn.Module) -> nn.Module:
    """The head inside its PEFT layers. Raises a TypeError if it is not a supported head."""
    inner = in_use(head)
    if inner is not None:
        return _plain(inner)
    if isinstance(head, nn.Linear | DirectorHead) and head.weight.is_floating_point():
        return head
    raise TypeError(
        "head: expected an nn.Linear or DirectorHead of a floating dtype, or one in a LoRA or "
        f"modules_to_save layer of PEFT, got {type(head).__name__}"
    )


def _effective(head: Any) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and the bias [V] that the head's own forward would use."""
    inner = in_use(head)
    if inner is None:
        return head.weight, head.bias
    if not hasattr(head, "lora_A"):
        return _effective(inner)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    weight, bias = _effective(inner)
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if head.lora_variant.get(name) is not None:
            raise ValueError(f"head: expected plain LoRA, got a variant of LoRA (DoRA or other) in {name!r}")
        if head.training and getattr(head.lora_dropout[name], "p", 0.0) > 0:
            raise ValueError(f"head: expected LoRA without dropout in training mode, got dropout in {name!r}")
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        weight = weight + (scaling * (b.weight @ a.weight)).to(weight.dtype)
        if b.bias is not None:
            more = (scaling * b.bias).to(weight.dtype)
            bias = more if bias is None else bias + more
    return weight, bias
