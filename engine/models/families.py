"""The families of models that the decoder computes, as data: what their files leave unsaid, and what they call things.

A family is its architecture's name in config.json, the names of its keys and tensors where they are not Llama's, and
which of the decoder's options it always has. `spec.py` reads configurations by it, `engine/weight_files.py` tensors.
Checkpoints of some old families name code of their own (`auto_map`): it is never run, this page says what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HF_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "input_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "post_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
GGUF_NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "input_norm": "blk.{i}.attn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "o": "blk.{i}.attn_output",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "post_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}
# Where q, k and v have one name they are one tensor, cut as `packed_qkv` says.
INTERNLM2_NAMES = {
    "embed": "model.tok_embeddings",
    "final_norm": "model.norm",
    "lm_head": "output",
    "input_norm": "model.layers.{i}.attention_norm",
    **dict.fromkeys("qkv", "model.layers.{i}.attention.wqkv"),
    "o": "model.layers.{i}.attention.wo",
    "post_norm": "model.layers.{i}.ffn_norm",
    "gate": "model.layers.{i}.feed_forward.w1",
    "up": "model.layers.{i}.feed_forward.w3",
    "down": "model.layers.{i}.feed_forward.w2",
}
QWEN_NAMES = {
    "embed": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_norm": "transformer.h.{i}.ln_1",
    **dict.fromkeys("qkv", "transformer.h.{i}.attn.c_attn"),
    "o": "transformer.h.{i}.attn.c_proj",
    "post_norm": "transformer.h.{i}.ln_2",
    "gate": "transformer.h.{i}.mlp.w2",  # c_proj(w1(x) * silu(w2(x)))
    "up": "transformer.h.{i}.mlp.w1",
    "down": "transformer.h.{i}.mlp.c_proj",
}
BAICHUAN_NAMES = HF_NAMES | dict.fromkeys("qkv", "model.layers.{i}.self_attn.W_pack")

QWEN_KEYS = {
    "head_dim": "kv_channels",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "seq_length",  # the trained length; the file's max_position_embeddings is how far NTK may go
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}
ALIBI = "the 13B form of this family has ALiBi in the place of rotary positions, which is not supported; the 7B form is"
STACKED, BY_KV_HEAD = "stacked", "by KV head"


@dataclass(frozen=True, slots=True)
class Family:
    """What a family's files leave unsaid."""

    architecture: str  # in config.json
    gguf: str = ""  # general.architecture; "": such files say "llama", or are not read
    qkv_bias: bool = False  # always there, whatever the file says
    bias_keys: bool = False  # config.json's attention_bias and mlp_bias are honoured
    bias_key: str = ""  # the key that says whether q, k, v and o have a bias
    qk_norm: bool = False
    window: str = ""  # "": none, "all": sliding_window, "layers": use_sliding_window with max_window_layers or layer_types
    default_window: int = 0  # where the key is absent (null means none)
    default_kv_heads: int = 0  # where the key is absent; 0: as many as heads
    default_head_dim: int = 0  # where the key is absent; 0: hidden_size / heads
    permuted_qk: bool = False  # GGUF files of this architecture hold rows of q and k in interleaved order
    names: Mapping[str, str] = field(default_factory=lambda: HF_NAMES)  # of tensors
    packed_qkv: str = ""  # STACKED: q, then k, then v. BY_KV_HEAD: for each KV head its query heads, its k, its v
    unit_head: bool = False  # each row of the output head is divided by its length
    keys: Mapping[str, str] = field(default_factory=dict)  # names of keys of config.json where they are not Llama's
    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)  # more of spec.py's NEUTRAL_HF
    own_code: bool = False  # its checkpoints name code of their own
    rope: str = ""  # "internlm": under `rotary`; "qwen": use_dynamic_ntk; "": as transformers has it
    halved_intermediate: bool = False  # config.json counts gate and up together
    logn_key: str = ""  # the key that switches logn scaling on
    required: Mapping[str, str] = field(default_factory=dict)  # key -> what is said where it is missing
    refused: Mapping[tuple[str, int], str] = field(default_factory=dict)  # (key, value) -> why


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", bias_keys=True, permuted_qk=True),
    "mistral": Family("MistralForCausalLM", window="all", default_window=4096, default_kv_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, window="layers", default_kv_heads=32),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", bias_keys=True, qk_norm=True, window="layers", default_kv_heads=32, default_head_dim=128),
    "internlm": Family("InternLMForCausalLM", bias_key="bias", own_code=True, rope="internlm"),
    "internlm2": Family("InternLM2ForCausalLM", bias_key="bias", own_code=True, names=INTERNLM2_NAMES, packed_qkv=BY_KV_HEAD),
    "qwen": Family(
        "QWenLMHeadModel",
        qkv_bias=True,
        own_code=True,
        names=QWEN_NAMES,
        packed_qkv=STACKED,
        keys=QWEN_KEYS,
        neutral={"no_bias": (True,), "scale_attn_weights": (True,), "use_cache_quantization": (False,), "rope_scaling": ()},
        rope="qwen",
        halved_intermediate=True,
        logn_key="use_logn_attn",
    ),
    "baichuan": Family(
        "BaichuanForCausalLM",
        own_code=True,
        names=BAICHUAN_NAMES,
        packed_qkv=STACKED,
        unit_head=True,
        required={"max_position_embeddings": f"missing: {ALIBI}"},
        refused={("hidden_size", 5120): ALIBI},
    ),
}
