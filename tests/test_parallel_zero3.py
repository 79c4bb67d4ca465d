"""DeepSpeed ZeRO-3 on two processes: the head is gathered and freed, and trains like in one process."""

import os
from importlib.util import find_spec

import pytest
import torch
from ranks import outcomes
from torch import nn

import sukhops.integrations.trl
from sukhops.nn import HeadLoss

transformers = pytest.importorskip("transformers")
utils = pytest.importorskip("trl.trainer.utils")

V, D = 50, 16
IDS = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.embedding, self.backbone = nn.Embedding(V, D), nn.Linear(D, D)
        lm_head = nn.Linear(D, V, bias=not tied)
        if tied:
            lm_head.weight = self.embedding.weight
        self.head = HeadLoss(lm_head, None)

    def forward(self, ids):
        return -self.head(torch.tanh(self.backbone(self.embedding(ids[:, :-1]))), ids[:, 1:]).mean()

    def lm_head(self):
        return self.head.head


class Fused(nn.Module):
    """A transformers model with TRL's fused head, computed by sukhops."""

    def __init__(self, tied: bool):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)
        utils.add_fused_lm_head(self.model)

    def forward(self, ids):
        with sukhops.integrations.trl.enabled():
            return self.model(ids, labels=ids, fused_lm_head=True, use_cache=False).loss

    def lm_head(self):
        return self.model.lm_head


def made(kind: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](tied)


KINDS = {"HeadLoss": Model, "TRL": Fused}
CASES = [(kind, tied) for kind in KINDS for tied in (False, True)]


def steps(rank):
    """Parameters after an SGD step, and the number of gathered head weights after the forward."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would have to be compiled
    deepspeed.init_distributed("gloo")
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # partition every parameter
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1e9,
    }
    # transformers and TRL detect ZeRO-3 only while this object exists
    known = transformers.integrations.HfDeepSpeedConfig(options)
    assert known.is_zero3()
    found = {}
    for kind, tied in CASES:
        plain = made(kind, tied)
        with deepspeed.zero.Init(config_dict_or_path=options):
            model = KINDS[kind](tied)
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            for own, given in zip(parameters, plain.parameters(), strict=True):
                own.data.copy_(given.data)
        engine = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(parameters, lr=1.0), config=options
        )[0]
        loss = engine(IDS[2 * rank : 2 * rank + 2])
        left = model.lm_head().weight.numel()
        engine.backward(loss)
        engine.step()
        with deepspeed.zero.GatheredParameters(parameters):
            found[kind, tied] = left, [p.detach().clone() for p in parameters]
    return found


ranks = outcomes(steps, [2])


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_step_equals_one_process(ranks, kind, tied):
    model = made(kind, tied)
    model(IDS).backward()
    for found in ranks:
        left, parameters = found[kind, tied]
        assert left == 0
        for p, after in zip(model.parameters(), parameters, strict=True):
            torch.testing.assert_close(after, p.detach() - p.grad)
