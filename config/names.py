"""Values that other programs call differently: `gpu` for cuda, `fp16` for float16. For hints only; nothing is read as another."""

SAME = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "safetensors": "hf",
    "huggingface": "hf",
    "warn": "WARNING",
    "fatal": "CRITICAL",
    "trace": "DEBUG",
}
