"""`ModelSpec`: everything the decoder needs to know about a model, as data. Families differ here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021). Half-split ("HF") layout: dimension i pairs with i + rotary_dim/2."""

    theta: float = 10000.0
    rotary_dim: int = 0  # rotated dimensions of each head; 0: all of head_dim
    kind: str = "default"  # default | linear | dynamic | yarn | llama3
    factor: float = 1.0
    original_max_position: int = 0  # trained length (dynamic, yarn, llama3)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: multiplies cos and sin; 0: 0.1 ln(factor) + 1
    freq_factors: tuple[float, ...] = ()  # GGUF rope_freqs.weight: divides each inverse frequency


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str  # key of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int  # longest sequence the model was made for
    rope: RopeSpec
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k before rope (Qwen3)
    sliding_window: int = 0  # a position sees itself and sliding_window - 1 before it; 0: all
    window_layers: tuple[int, ...] = ()  # layers that have the window; () with sliding_window > 0: all
    use_logn_attn: bool = False
    bos_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of the checkpoint's 16/32-bit tensors

    def window(self, layer: int) -> int:
        """Sliding window of this layer, 0 for none."""
        return self.sliding_window if not self.window_layers or layer in self.window_layers else 0
