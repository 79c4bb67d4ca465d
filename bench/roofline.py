"""A roofline model: predicts the time of each operation on a GPU from its shape.

An operation is a sequence of phases. The time of a phase is the largest of four times: matrix products on the
tensor cores, traffic with device memory, chains of dependent steps, and traffic to other devices. `floor` is
the work that no implementation can avoid; `plan` is the work of the kernels in this repository, to compare
with measured times. Launch overhead and caches are not modeled.

    python bench/roofline.py    # writes bench/results/roofline.jsonl and prints the table
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Device(NamedTuple):
    name: str
    half: float  # dense bfloat16 or float16 products, in FLOP/s
    bandwidth: float  # of device memory, bytes per second
    clock: float  # Hz
    link: float = math.inf  # to other devices, bytes per second in each direction


# NVIDIA H200 Tensor Core GPU datasheet, SXM: bfloat16 1,979 TFLOP/s with sparsity, half of that dense;
# 4.8 TB/s; NVLink 900 GB/s, half of that in each direction. The clock follows from the dense rate: 132 SMs
# with 4,096 FLOP per cycle each.
H200 = Device("NVIDIA H200", 989.5e12, 4.8e12, 989.5e12 / (132 * 4096), 450e9)
HALF, FLOAT, INDEX = 2, 4, 8  # bytes


class Phase(NamedTuple):
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0  # of a chain of dependent steps
    sent: float = 0.0  # bytes to other devices

    def times(self, device: Device) -> dict[str, float]:
        return {
            "products": self.flops / device.half,
            "memory": self.bytes / device.bandwidth,
            "latency": self.cycles / device.clock,
            "link": self.sent / device.link,
        }

    def seconds(self, device: Device) -> float:
        return max(self.times(device).values())

    def bound(self, device: Device) -> str:
        times = self.times(device)
        return max(times, key=times.__getitem__)


class Work(NamedTuple):
    floor: Phase
    plan: list[Phase]

    def predicted(self, device: Device) -> float:
        return sum(phase.seconds(device) for phase in self.plan)


def product(name: str, m: int, n: int, k: int, *, out: int = FLOAT) -> Phase:
    """[m, k] @ [k, n] in half precision; the result has `out` bytes per element."""
    return Phase(name, 2.0 * m * n * k, HALF * (m * k + k * n) + out * m * n)


def tiles(rows: int, vocab: int) -> int:
    """The number of vocabulary blocks of the CUDA implementation."""
    from sukhops.triton_kernels.vocab_head import _width

    return math.ceil(vocab / _width(rows, vocab))


def head_forward(rows: int, d: int, vocab: int) -> list[Phase]:
    """Products in float32 blocks; each is read once by a row-wise kernel (its second read hits the cache)."""
    return [
        product("logits", rows, vocab, d),
        Phase("forward rows", bytes=FLOAT * rows * vocab),
    ]


def head_backward(rows: int, d: int, vocab: int) -> list[Phase]:
    blocks = tiles(rows, vocab)
    return [
        product("logits again", rows, vocab, d),
        Phase("backward rows", bytes=(FLOAT + HALF) * rows * vocab),
        product("dhidden", rows, d, vocab),
        Phase("sum of dhidden", bytes=3 * FLOAT * rows * d * blocks),
        product("dweight", vocab, d, rows, out=HALF),
    ]


def head_frozen(rows: int, d: int, vocab: int) -> list[Phase]:
    """The forward keeps the mean of the weight's rows over the softmax; the backward only scales it."""
    blocks = tiles(rows, vocab)
    return [
        product("logits", rows, vocab, d),
        Phase("forward rows", bytes=(FLOAT + HALF) * rows * vocab),
        product("mean weight", rows, d, vocab),
        Phase("sum of means", bytes=4 * FLOAT * rows * d * blocks),
        Phase("gather of targets", bytes=(FLOAT + 2 * HALF) * rows * d),
    ]


def bare(rows: int, d: int, vocab: int, products: int, weights: int = 1) -> Phase:
    """`products` matrix products; hidden, `weights` weights and their gradients are moved once."""
    return Phase("products", 2.0 * products * rows * d * vocab, 2 * HALF * (rows * d + weights * vocab * d))


def linear_logp(rows: int, D: int, V: int) -> Work:
    return Work(bare(rows, D, V, 3), head_forward(rows, D, V) + head_backward(rows, D, V))


def sliced_logp(rows: int, D: int, V: int, GPUs: int) -> Work:
    """A slice of the vocabulary per GPU; they exchange three numbers per row and sum hidden's gradient."""
    part = math.ceil(V / GPUs)
    plan = [
        *head_forward(rows, D, part),
        Phase("numbers of slices", sent=3 * FLOAT * rows * (GPUs - 1)),
        *head_backward(rows, D, part),
        Phase("dhidden of slices", sent=2 * (GPUs - 1) / GPUs * FLOAT * rows * D),
    ]
    return Work(bare(rows, D, part, 3), plan)


def frozen(rows: int, D: int, V: int) -> Work:
    return Work(bare(rows, D, V, 2), head_frozen(rows, D, V))


def dpo(rows: int, D: int, V: int) -> Work:
    """Forward and backward of the policy, forward of the reference model."""
    plan = head_forward(rows, D, V) * 2 + head_backward(rows, D, V)
    return Work(bare(rows, D, V, 4, weights=2), plan)


def kto(rows: int, D: int, V: int) -> Work:
    """Like DPO, and two more forwards for the mismatched batch."""
    plan = head_forward(rows, D, V) * 4 + head_backward(rows, D, V)
    return Work(bare(rows, D, V, 6, weights=2), plan)


def cringe(rows: int, D: int, V: int) -> Work:
    """Half of the rows are positive; the gradient of a negative row affects only a few vocabulary entries."""
    plan = head_forward(rows, D, V) + head_backward(rows // 2, D, V)
    floor = Phase("products", 2.0 * (3 * rows // 2 + rows // 2) * D * V, 2 * HALF * (rows * D + V * D))
    return Work(floor, plan)


def director_training(rows: int, D: int, V: int) -> Work:
    """Half of the rows train the language model; a classifier row needs one dot product with a weight row."""
    floor = bare(rows // 2, D, V, 3)
    dots = Phase("indexed dots", bytes=HALF * rows // 2 * D * 6 + HALF * V * D)
    return Work(floor, [*head_forward(rows // 2, D, V), *head_backward(rows // 2, D, V), dots])


def director_topk(rows: int, D: int, V: int, k: int) -> Work:
    """Limited by reading both weights."""
    read = Phase("read of both weights", 4.0 * rows * D * V, 2 * HALF * V * D)
    return Work(read, [read, Phase("join of splits", bytes=INDEX * rows * k * 2 * 132)])


def adaptive_span(
    B: int, H: int, T: int, d: int, spans: tuple[float, ...], ramp: float, tile: int = 64
) -> Work:
    """Two products of each query with the keys in its head's window, and five more in the backward."""
    tensor = HALF * B * H * T * d

    def pairs(slack: float) -> float:
        return B * sum(_seen(T, min(T, span + ramp + slack)) for span in spans) * H / len(spans)

    def flops(products: int, slack: float) -> float:
        return 2.0 * products * d * pairs(slack)

    floor = Phase("products", flops(7, 0), 12 * tensor)
    backward = 5 * tensor + 3 * tensor
    # a block of queries visits whole tiles of keys; scores are computed once for dq and once for dk, dv
    return Work(floor, [
        Phase("forward", flops(2, tile), 4 * tensor),
        Phase("backward of queries", flops(3, tile), backward),
        Phase("backward of keys", flops(4, tile), backward),
    ])  # fmt: skip


def _seen(length: int, window: float) -> float:
    """Number of pairs of a query and one of the last `window` keys, including its own position."""
    return window * length - window * (window - 1) / 2


# latencies in cycles: the first two are from published microbenchmarks of this GPU generation, those of
# double precision and conversions are guesses
SHUFFLE, SINGLE, DOUBLE, CONVERT = 23, 4, 8, 14
# cycles of one step of a warp (one per sequence and direction): broadcast the finished sum, compare
# exponents, convert their difference to a power of two, multiply and add mantissas
STEP = SHUFFLE + 5 * SINGLE + 2 * CONVERT + 2 * DOUBLE
CHUNK = 512  # steps per chunk, as `chunk_steps` in segmentation_warp.h gives for the sequence below


def segmentation(B: int, T: int, K: int) -> Work:
    """Scores are read by both sweeps and posteriors written once; T dependent steps."""
    floor = Phase("scores and posteriors", bytes=3 * FLOAT * B * T * K)
    return Work(floor, [
        Phase("both sweeps", bytes=2 * FLOAT * B * T * K, cycles=T * STEP),
        Phase("posteriors", bytes=2 * FLOAT * B * T * K),
    ])  # fmt: skip


def segmentation_in_chunks(B: int, T: int, K: int) -> Work:
    """One sequence cut into chunks; the transfer matrices of the chunks share eight warps per SM."""
    chunks = T // CHUNK
    turns = math.ceil(2 * B * (chunks - 1) * K / (8 * 132))
    return Work(segmentation(B, T, K).floor, [
        Phase("matrices", bytes=2 * FLOAT * B * T * K, cycles=turns * CHUNK * STEP),
        Phase("windows", cycles=chunks * (4 + K / 8) * STEP),
        Phase("sweeps", bytes=2 * FLOAT * B * T * K, cycles=CHUNK * STEP),
        Phase("posteriors", bytes=2 * FLOAT * B * T * K),
    ])  # fmt: skip


# ten heads attend to the last words, three to a sentence, three farther: the mean is 314, as learned on text
SPANS = (20.0,) * 10 + (100.0,) * 3 + (500.0, 1000.0, 3024.0)
LOGP = {"rows": 8192, "D": 4096, "V": 151_936}
LLAMA = {"rows": 16_384, "D": 4096, "V": 128_256}  # 16 sequences of 1024 tokens, Llama 3 8B's head
ATTENTION = {"B": 4, "H": 16, "T": 8192, "d": 64}

# op, case of the GPU benchmark, shape, work
CASES: list[tuple[str, str, dict, Callable[..., Work]]] = [
    ("vocab_head", "linear_logp", LOGP, linear_logp),
    ("vocab_head", "linear_logp, frozen weight", LOGP, frozen),
    ("vocab_head", "DPO with a reference model", LLAMA, dpo),
    ("preference", "KTO with its mismatched batch", LLAMA, kto),
    ("preference", "CRINGE, k = 5", LLAMA, cringe),
    ("director", "Director training", LLAMA, director_training),
    ("director", "director_topk", {"rows": 32, "D": 4096, "V": 128_256, "k": 50}, director_topk),
    ("adaptive_span", "adaptive spans", ATTENTION | {"spans": SPANS, "ramp": 32.0}, adaptive_span),
    ("adaptive_span", "one hard window", ATTENTION | {"spans": (511.0,) * 16, "ramp": 1.0}, adaptive_span),
    ("segmentation", "segmentation_logz", {"B": 32, "T": 8192, "K": 16}, segmentation),
    ("segmentation", "one long sequence, in chunks", {"B": 1, "T": 65_536, "K": 16}, segmentation_in_chunks),
]  # fmt: skip


# not measured: needs several GPUs
SEVERAL: list[tuple[str, str, dict, Callable[..., Work]]] = [
    ("vocab_head", f"linear_logp, slices on {n} GPUs", LLAMA | {"GPUs": n}, sliced_logp) for n in (2, 4, 8)
]


def builder(case: str) -> Callable[..., Work] | None:
    """The function that returns the work of a GPU benchmark case for a shape, or None."""
    return next((build for _, name, _, build in CASES if name == case), None)


def rows(device: Device) -> list[dict]:
    found = []
    for op, case, shape, build in CASES + SEVERAL:
        done = build(**shape)
        found.append({
            "op": op, "case": case, "dtype": "float32" if op == "segmentation" else "bfloat16",
            "device": device.name, "shape": shape,
            "floor_ms": round(1e3 * done.floor.seconds(device), 4), "bound": done.floor.bound(device),
            "predicted_ms": round(1e3 * done.predicted(device), 4),
        })  # fmt: skip
    return found


def main() -> None:
    found = rows(H200)
    with (RESULTS / "roofline.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    for row in found:
        print(
            f"{row['case']:<32}{row['floor_ms']:>9.3f} ms by {row['bound']:<9}{row['predicted_ms']:>9.3f} ms"
        )


if __name__ == "__main__":
    main()
