"""The vocabulary of a GGUF file as Hugging Face's files, for programs that do not read GGUF.

    byte-level BPE   tokenizer.json                  sentencepiece   tokenizer.model
    both             tokenizer_config.json (BOS, EOS, chat template), generation_config.json (every id that ends an answer)

Read back by this room they give the ids that the GGUF file gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formats.gguf import read_gguf
from text.base import Tokenizer
from text.byte_level import load_gguf_bpe
from text.gguf_vocabulary import read_vocabulary
from text.sentencepiece_model import load_gguf_sentencepiece, model_bytes


def hub_files_of_gguf(path: Path | str) -> dict[str, bytes]:
    """Name -> contents. Raises FormatError."""
    file = read_gguf(path)
    vocabulary = read_vocabulary(file)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if vocabulary.model == "gpt2":
        byte_level = load_gguf_bpe(file, vocabulary)
        tokenizer: Tokenizer = byte_level
        files = {"tokenizer.json": byte_level.to_json().encode()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        tokenizer = load_gguf_sentencepiece(file, vocabulary)
        files = {"tokenizer.model": model_bytes(file, vocabulary)}
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("unk_token", tokenizer.unk_id)):
        config[name] = None if token_id is None else vocabulary.tokens[token_id]
    config |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": False}
    templates = tokenizer.chat_templates
    if templates:
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        config["chat_template"] = templates["default"] if list(templates) == ["default"] else listed
    ends = sorted(tokenizer.eos_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends} if ends else {"bos_token_id": tokenizer.bos_id}
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        files[name] = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
    return files
