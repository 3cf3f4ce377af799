"""What others reach on one NVIDIA H200, and the bars that numbatch is held to: the figures that tables and plots compare with.

Measured in November 2026 on one H200 (driver 580, CUDA 13.0, torch 2.11) with a checkpoint of the same shape and random weights;
medians of CUDA-graph replays with the weights rotated past the L2 cache. vLLM 0.24, LMDeploy 0.18 (TurboMind), Marlin as in
vLLM, FlashAttention-3, cuBLAS and cuDNN as in torch. Nothing here was measured by numbatch itself.
"""

from __future__ import annotations

READ_TB_S = 4.37  # a plain Numba read kernel
DENSE_TFLOP_S = 808.0  # torch.mm, bfloat16, 8192 x 28672 x 4096

# -- whole engines, Llama-3.1-8B, tokens a second -------------------------------------------------------------------------------

DECODE = {
    "vLLM AWQ": {1: 250, 8: 1975, 16: 3856, 32: 6946, 64: 10476, 128: 18091, 256: 24303},
    "vLLM bf16": {1: 194, 8: 1528, 16: 2977, 32: 5654, 64: 10428, 128: 17479, 256: 23303},
    "TurboMind AWQ": {1: 134, 8: 1058, 16: 2057, 32: 3714, 64: 7305, 128: 12758, 256: 22071},
}
DECODE_BARS = {1: 420, 8: 3000, 16: 5500, 32: 9000, 64: 13000, 128: 20500, 256: 28000}
PREFILL = {
    "vLLM AWQ": {"8x1024": 45071, "8x4096": 42325},
    "vLLM bf16": {"8x1024": 42088, "8x4096": 41047},
    "TurboMind AWQ": {"8x1024": 46231, "8x4096": 38483},
}
PREFILL_BARS = {"8x1024": 46000, "8x4096": 44000}
MIXED = {"vLLM AWQ": 8398, "vLLM bf16": 7926, "TurboMind AWQ": 7381}  # output tokens
MIXED_BAR = 9500
MIXED_HTTP_SHARE = 0.9  # of our own rate in process
START_S = {"vLLM AWQ": 88.8, "vLLM bf16": 52.1, "TurboMind AWQ": 12.6}
READY_BARS_S = {"warm": 12.0, "cold": 60.0}
BUSY_BAR = 0.95

# -- W4A16 products, microseconds; (out, in) of the four products of a layer --------------------------------------------------

PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
W4_LAYER = {  # the four together
    "Marlin": {1: 71.2, 8: 71.2, 16: 75.6, 32: 86.7, 64: 131, 128: 212, 256: 345, 1024: 1294},
    "cuBLAS 16-bit": {1: 129, 32: 134, 64: 135, 128: 143, 256: 189, 1024: 595},
}
MARLIN = {
    1: {"qkv": 11.5, "o": 9.2, "gate_up": 28.9, "down": 21.6}, 8: {"qkv": 10.9, "o": 9.5, "gate_up": 29.2, "down": 21.7},
    16: {"qkv": 11.7, "o": 9.6, "gate_up": 31.7, "down": 22.6}, 32: {"qkv": 14.4, "o": 10.8, "gate_up": 36.4, "down": 25.1},
    64: {"qkv": 22.1, "o": 15.8, "gate_up": 53.0, "down": 39.8}, 128: {"qkv": 29.5, "o": 21.1, "gate_up": 94.7, "down": 66.4},
    256: {"qkv": 44.3, "o": 31.4, "gate_up": 178, "down": 90.8}, 1024: {"qkv": 147, "o": 103, "gate_up": 713, "down": 331},
}  # fmt: skip
W4_BARS = {1: 42, 8: 46, 16: 52, 32: 68, 64: 105, 128: 150, 256: 200, 1024: 640}

# -- attention: 32 query heads, 8 KV heads, head_dim 128, 16-bit; (sequences, context) -> microseconds ------------------------

DECODE_ATTENTION = {
    (1, 1024): 15.4, (1, 4096): 19.0, (1, 32768): 47.5, (8, 1024): 18.5, (8, 4096): 46.3, (32, 1024): 48.3, (64, 512): 49.4,
    (64, 1024): 80.4,
}  # fmt: skip
DECODE_ATTENTION_BARS = DECODE_ATTENTION | {(1, 1024): 10.0}
ATTENTION_BAR_TB_S = {(64, 4096): 3.5}
PROMPT_ATTENTION = {  # TFLOP/s, causal, contiguous K and V; (prompts, tokens)
    "torch FlashAttention": {(8, 1024): 251, (8, 4096): 334, (1, 8192): 280},
    "torch cuDNN": {(8, 1024): 450, (8, 4096): 602, (1, 8192): 610},
}
