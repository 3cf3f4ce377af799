"""Which tokenizer a path means. `load_tokenizer` is the door of this room; the formats live in their own files.

    LMDeploy workspace  its triton_models/tokenizer, with the built-in template that config.ini's model_name means
    directory         tokenizer.json, else tokenizer.model, else *.tiktoken, else *.model, else the one *.gguf in it
    *.bin, *.safetensors   the directory that such a weight file lies in
    *.json            Hugging Face tokenizers            byte_level.py
    *.model           sentencepiece                      sentencepiece_model.py
    *.tiktoken        Qwen-1                             byte_level.py
    *.gguf            vocabulary in the metadata         byte_level.py or sentencepiece_model.py

The small JSON files beside a tokenizer file (tokenizer_config.json and others) are read with it.
"""

from __future__ import annotations

from pathlib import Path

from formats.errors import FormatError, printable
from formats.gguf import read_gguf
from formats.workspace import Workspace, is_workspace, read_workspace
from text.base import Special, Tokenizer, VocabularyInfo
from text.gguf_vocabulary import read_vocabulary
from text.hub_files import HubSettings, read_hub_settings
from text.template_names import built_in_template

__all__ = ["ByteTokenizer", "Tokenizer", "load_tokenizer"]

WEIGHT_FILES = (".bin", ".safetensors")
PREFERRED = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "*.model", "*.gguf")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Raises FormatError naming file and reason; takes 0.1 to 1.5 s for vocabularies of 32,000 to 150,000."""
    path = Path(path)
    if is_workspace(path):
        return _load_workspace(read_workspace(path))
    file = _tokenizer_file(path)
    suffix = file.suffix.lower()
    if suffix == ".gguf":
        return _load_gguf(file)
    hub = read_hub_settings(file.parent)
    tokenizer = _load_file(file, suffix, hub)
    if not tokenizer.chat_templates and hub.family and all(content in tokenizer.specials for content in hub.family.controls):
        tokenizer.template_name = hub.family.template
    return tokenizer


def _load_workspace(workspace: Workspace) -> Tokenizer:
    """LMDeploy's model_name chose the template whatever the checkpoint brought; a name of none leaves the checkpoint's own."""
    tokenizer = load_tokenizer(workspace.tokenizer)
    if name := built_in_template(workspace.text("model_name")):
        tokenizer.template_name, tokenizer.chat_templates = name, {}
    return tokenizer


def _load_file(file: Path, suffix: str, hub: HubSettings) -> Tokenizer:
    if suffix == ".json":
        from text.byte_level import load_tokenizer_json

        return load_tokenizer_json(file, hub)
    if suffix == ".tiktoken":
        from text.byte_level import load_tiktoken

        return load_tiktoken(file, hub)
    if suffix == ".model":
        from text.sentencepiece_model import load_sentencepiece

        return load_sentencepiece(file, hub)
    raise FormatError(file.name, "", "not a tokenizer file: expected .json, .model, .tiktoken or .gguf")


def _tokenizer_file(path: Path) -> Path:
    if path.suffix.lower() in WEIGHT_FILES and path.is_file():
        path = path.parent
    if path.is_dir():
        for pattern in PREFERRED:
            found = sorted(path.glob(pattern))
            if found:
                return found[0]
        raise FormatError(path.name, "", f"the directory holds no tokenizer ({', '.join(PREFERRED)})")
    if not path.is_file():
        raise FormatError(path.name, "", "no such file")
    return path


def _load_gguf(path: Path) -> Tokenizer:
    file = read_gguf(path)
    vocabulary = read_vocabulary(file)
    if vocabulary.model == "gpt2":
        from text.byte_level import load_gguf_bpe

        return load_gguf_bpe(file, vocabulary)
    if vocabulary.model == "llama":
        from text.sentencepiece_model import load_gguf_sentencepiece

        return load_gguf_sentencepiece(file, vocabulary)
    raise FormatError(path.name, "tokenizer.ggml.model", f"{printable(vocabulary.model)} is not supported; gpt2 and llama are")


class ByteTokenizer(Tokenizer):
    """No vocabulary file: one id a byte, for the mock engine and for tests.

    ids 0-255: the bytes; 256 `<s>` (BOS), 257 `</s>` (EOS), 258 `<|im_start|>`, 259 `<|im_end|>` (EOS too).
    """

    BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
    TEMPLATE = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def __init__(self) -> None:
        specials = [Special(256 + n, content) for n, content in enumerate(("<s>", "</s>", "<|im_start|>", "<|im_end|>"))]
        table = [bytes([b]) for b in range(256)] + [s.content.encode() for s in specials]
        info = VocabularyInfo(table, specials, self.BOS, frozenset({self.EOS, self.IM_END}), chat_templates={"default": self.TEMPLATE})
        super().__init__(info)

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        return list(text.encode("utf-8"))
