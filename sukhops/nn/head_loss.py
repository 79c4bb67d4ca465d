"""A loss and the head that it trains, in one module: what FSDP2, DDP, ZeRO-3 and PEFT need."""

from typing import Any

from torch import Tensor, nn

from sukhops.losses._output import LossOutput
from sukhops.nn.director import DirectorHead, DirectorLoss
from sukhops.ops.vocab_head import linear_logp


class HeadLoss(nn.Module):
    """Calls a loss of `sukhops.nn` with the weight of a head that this module owns.

    A loss that is called with `lm_head.weight` reads a parameter outside the forward of its module: FSDP2 and
    ZeRO-3 have not gathered it there, and what PEFT adds to it is missed. `HeadLoss` is a module around both.
    Its forward gathers, reduces and frees the head's parameters like that of any other module, whether it or
    the head is sharded, if it runs inside the forward of the wrapped model. Tests cover
    DDP, FSDP2, DeepSpeed's ZeRO-3 and PEFT.

    Args:
        head: nn.Linear, its weight tied or not; `DirectorHead`, for `DirectorLoss`; or one of these in a
            layer of PEFT: LoRA, differentiable in A and B, or modules_to_save; adapters may be disabled or
            merged. LoRA's weight + scaling * B @ A is built in every call: V x D more numbers, and the
            products of a head that learns.
        loss: a loss of `sukhops.nn`, or None for log-probs.

    Raises:
        TypeError: a head of another kind, or one that does not go with the loss.
        ValueError, in forward: LoRA with dropout while training, or a variant of it (DoRA); a head of which
            FSDP2 has sharded a part alone.

    Source: the library's; LoRA is Hu et al. 2021.
    """

    def __init__(self, head: nn.Module, loss: nn.Module | None):
        super().__init__()
        gated = isinstance(_plain(head), DirectorHead)
        if gated != isinstance(loss, DirectorLoss):
            raise TypeError(
                "head: DirectorHead and DirectorLoss go with each other alone, got "
                f"{type(_plain(head)).__name__} and {type(loss).__name__}"
            )
        self.head, self.loss = head, loss

    def forward(self, hidden: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossOutput | Tensor:
        """
        Args:
            hidden, target: as in the loss, or in `sukhops.linear_logp`.
            args, kwargs: what the loss takes beside weight and bias of the head.

        Returns:
            What the loss returns; log-probs without one.
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
        self.head.forward = call  # what hooks into the head's forward sees this one
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
            "head: FSDP2 has sharded a part of it; shard the head, or its layer of PEFT, as a whole"
        )
    return hasattr(head, "unshard") or any(hasattr(p, "ds_id") for p in head.parameters())


def in_use(head: Any) -> nn.Module | None:  # Any: layers of PEFT have attributes of their own
    """What a layer of PEFT wraps, as far as it is in use; None for a layer of its own."""
    if hasattr(head, "modules_to_save"):
        if head.disable_adapters or not head.active_adapters:
            return head.original_module
        return head.modules_to_save[head.active_adapters[0]]
    return head.base_layer if hasattr(head, "lora_A") else None


def _plain(head: nn.Module) -> nn.Module:
    """The head under PEFT's layers; raises where it is no head."""
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
    """The weight and the bias that the head's own forward would use."""
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
            raise ValueError(f"head: adapter {name!r} is a variant of LoRA; plain LoRA has a weight to build")
        if head.training and getattr(head.lora_dropout[name], "p", 0.0) > 0:
            raise ValueError(f"head: adapter {name!r} has dropout, which no weight can express; set it to 0")
        a, b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        weight = weight + (scaling * (b.weight @ a.weight)).to(weight.dtype)
        if b.bias is not None:
            more = (scaling * b.bias).to(weight.dtype)
            bias = more if bias is None else bias + more
    return weight, bias
