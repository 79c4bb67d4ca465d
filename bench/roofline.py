"""What each operation must do at a shape, and how long that takes on a GPU: a roofline.

An operation is a list of phases, one after the other. A phase lasts as long as the slowest of its matrix
products on the tensor cores, its traffic with device memory, its chain of dependent steps and what it sends
to other devices. `floor` is what no implementation avoids; `plan` is what the kernels here do, so that a
measured time can be held against it. Launches and caches are not modelled.

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
    half: float  # bfloat16 or float16 products, dense: operations a second, a multiply-add is two
    bandwidth: float  # of device memory, bytes a second
    clock: float  # Hz
    link: float = math.inf  # to other devices, bytes a second each way


# NVIDIA H200 Tensor Core GPU datasheet, SXM: bfloat16 1,979 TFLOP/s with sparsity, so half of it dense, and
# 4.8 TB/s; NVLink 900 GB/s, half of it each way. The clock is the one at which 132 multiprocessors of 4,096
# such operations a cycle give that rate.
H200 = Device("NVIDIA H200", 989.5e12, 4.8e12, 989.5e12 / (132 * 4096), 450e9)
HALF, FLOAT, INDEX = 2, 4, 8  # bytes


class Phase(NamedTuple):
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    cycles: float = 0.0  # of a chain in which each step waits for the last
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
    """[m, k] @ [k, n] of half precisions, `out` bytes per entry of the result."""
    return Phase(name, 2.0 * m * n * k, HALF * (m * k + k * n) + out * m * n)


def tiles(rows: int, vocab: int) -> int:
    """How many blocks of the vocabulary the CUDA plan walks."""
    from sukhops.triton_kernels.vocab_head import _width

    return math.ceil(vocab / _width(rows, vocab))


def head_forward(rows: int, d: int, vocab: int) -> list[Phase]:
    """The products in blocks of float32, each read by one row pass (its second walk hits the cache)."""
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
    """The forward keeps the mean of the weight's rows under the softmax; the backward scales it."""
    blocks = tiles(rows, vocab)
    return [
        product("logits", rows, vocab, d),
        Phase("forward rows", bytes=(FLOAT + HALF) * rows * vocab),
        product("mean weight", rows, d, vocab),
        Phase("sum of means", bytes=4 * FLOAT * rows * d * blocks),
        Phase("gather of targets", bytes=(FLOAT + 2 * HALF) * rows * d),
    ]


def bare(rows: int, d: int, vocab: int, products: int, weights: int = 1) -> Phase:
    """`products` matrix products, inputs and gradients of `weights` weights moved once."""
    return Phase("products", 2.0 * products * rows * d * vocab, 2 * HALF * (rows * d + weights * vocab * d))


def linear_logp(rows: int, D: int, V: int) -> Work:
    return Work(bare(rows, D, V, 3), head_forward(rows, D, V) + head_backward(rows, D, V))


def sliced_logp(rows: int, D: int, V: int, GPUs: int) -> Work:
    """A slice of the vocabulary on each: three numbers per row travel, and hidden's gradient is summed."""
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
    """The policy's head learns, the reference model's does not."""
    plan = head_forward(rows, D, V) * 2 + head_backward(rows, D, V)
    return Work(bare(rows, D, V, 4, weights=2), plan)


def kto(rows: int, D: int, V: int) -> Work:
    """As DPO, and two passes over the mismatched batch."""
    plan = head_forward(rows, D, V) * 4 + head_backward(rows, D, V)
    return Work(bare(rows, D, V, 6, weights=2), plan)


def cringe(rows: int, D: int, V: int) -> Work:
    """Half of the rows positive; a negative row's gradient touches the few entries of its contrast."""
    plan = head_forward(rows, D, V) + head_backward(rows // 2, D, V)
    floor = Phase("products", 2.0 * (3 * rows // 2 + rows // 2) * D * V, 2 * HALF * (rows * D + V * D))
    return Work(floor, plan)


def director_training(rows: int, D: int, V: int) -> Work:
    """Half of the rows train the language model; a classifier row is one indexed dot."""
    floor = bare(rows // 2, D, V, 3)
    dots = Phase("indexed dots", bytes=HALF * rows // 2 * D * 6 + HALF * V * D)
    return Work(floor, [*head_forward(rows // 2, D, V), *head_backward(rows // 2, D, V), dots])


def director_topk(rows: int, D: int, V: int, k: int) -> Work:
    """A read of both weights; the products hide behind it."""
    read = Phase("read of both weights", 4.0 * rows * D * V, 2 * HALF * V * D)
    return Work(read, [read, Phase("join of splits", bytes=INDEX * rows * k * 2 * 132)])


def adaptive_span(
    B: int, H: int, T: int, d: int, spans: tuple[float, ...], ramp: float, tile: int = 64
) -> Work:
    """Two products of each query with the keys that its head's window holds, five more backwards."""
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
    """Pairs of a query and a key at most `window` positions back, itself included."""
    return window * length - window * (window - 1) / 2


# cycles until a result can be used: the first two as microbenchmarks of this generation have them, of double
# precision and of conversions a guess
SHUFFLE, SINGLE, DOUBLE, CONVERT = 23, 4, 8, 14
# of a warp per sequence and direction: the slot that leaves is broadcast, exponents are compared, their
# difference becomes a power of two, mantissas are multiplied and added
STEP = SHUFFLE + 5 * SINGLE + 2 * CONVERT + 2 * DOUBLE
CHUNK = 512  # steps of one, as `chunk_steps` of segmentation_warp.h has it for the sequence below


def segmentation(B: int, T: int, K: int) -> Work:
    """Scores read once forwards and once backwards, posteriors written; T steps that wait for each other."""
    floor = Phase("scores and posteriors", bytes=3 * FLOAT * B * T * K)
    return Work(floor, [
        Phase("both sweeps", bytes=2 * FLOAT * B * T * K, cycles=T * STEP),
        Phase("posteriors", bytes=2 * FLOAT * B * T * K),
    ])  # fmt: skip


def segmentation_in_chunks(B: int, T: int, K: int) -> Work:
    """The same of a sequence that is cut: transfers of the chunks take turns on eight warps a processor."""
    chunks = T // CHUNK
    turns = math.ceil(2 * B * (chunks - 1) * K / (8 * 132))
    return Work(segmentation(B, T, K).floor, [
        Phase("matrices", bytes=2 * FLOAT * B * T * K, cycles=turns * CHUNK * STEP),
        Phase("windows", cycles=chunks * (4 + K / 8) * STEP),
        Phase("sweeps", bytes=2 * FLOAT * B * T * K, cycles=CHUNK * STEP),
        Phase("posteriors", bytes=2 * FLOAT * B * T * K),
    ])  # fmt: skip


# ten heads that look at the last words, three at a sentence, three far: the mean is 314, as learned on text
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


# what no benchmark of one GPU measures
SEVERAL: list[tuple[str, str, dict, Callable[..., Work]]] = [
    ("vocab_head", f"linear_logp, slices on {n} GPUs", LLAMA | {"GPUs": n}, sliced_logp) for n in (2, 4, 8)
]


def builder(case: str) -> Callable[..., Work] | None:
    """What makes the work of a case of the GPU benchmark from its shape."""
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
