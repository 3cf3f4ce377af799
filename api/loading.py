"""From a configuration to what answers requests: model files, tokenizer, chat template, engine.

Everything here may take seconds and runs in a thread while the listener already answers health checks; the engine
itself is started on the event loop. Errors are the rooms' own: ModelError, FormatError, ConfigError, DeviceError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config.schema import Config
from engine.build import build_engine, resolve_spec
from engine.errors import ConfigError, ModelError
from engine.loop import Engine
from engine.workspace_config import with_workspace
from formats.errors import FormatError
from formats.workspace import is_workspace, read_workspace
from text.chat import ChatTemplate, load_chat_template
from text.errors import NoChatTemplate
from text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.plan import MemoryPlan

log = logging.getLogger("numbatch.load")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.gguf")
MAX_POINTER_BYTES = 1024
TEMPLATE_CHARS_PER_TOKEN = 32  # a template's output is bounded by the context, generously


@dataclass(frozen=True, slots=True)
class Loaded:
    engine: Engine  # not started
    tokenizer: Tokenizer
    template: ChatTemplate | None


def model_name(config: Config) -> str:
    """The name in /v1/models and in answers."""
    if config.model.model_name:
        return config.model.model_name
    if not config.model.path:
        return "mock"
    path = Path(config.model.path)
    if is_workspace(path):
        with contextlib.suppress(FormatError):  # said when the model is loaded
            return read_workspace(path).text("model_name")
    return path.name or "model"


def with_local_files(config: Config) -> Config:
    """The configuration with a hub name replaced by the folder it was fetched to; of a workspace, with what its config.ini
    says. Other local paths stay as they are."""
    path = config.model.path
    if not path or Path(path).exists() or not HUB_NAME.fullmatch(path):
        _check_path(path)
        return with_workspace(config)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    log.info("fetching %s from the hub", path)
    try:
        folder = snapshot_download(
            path,
            revision=config.model.revision or None,
            cache_dir=config.model.download_dir or None,
            allow_patterns=list(HUB_FILES),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{path}: there is no such file or folder here, and the hub {_hub_reason(error)}.") from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=folder, revision="", download_dir=""))


def _check_path(path: str) -> None:
    """A sentence for what is plainly no model, before its bytes are looked at."""
    place = Path(path)
    if not path or is_workspace(place):
        return
    if not place.exists():
        raise ModelError(f"{path}: there is no such file or folder; a name of the hub is written owner/name.")
    if place.is_dir() and not (place / "config.json").exists():
        files = sorted(file.name for file in place.glob("*.gguf"))
        hint = f"; did you mean {place / files[0]}?" if files else "; a Hugging Face model's folder has one."
        raise ModelError(f"{path}: this folder has no config.json{hint}")
    if place.is_dir() and not any(place.glob("*.safetensors")):
        pickles = sorted(file.name for ending in ("bin", "pth", "pt") for file in place.glob(f"*.{ending}"))
        if pickles:
            raise ModelError(
                f"{path}: {pickles[0]} is a pickle, which numbatch does not open; use the model's safetensors, or a GGUF file."
            )
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if file.suffix in (".safetensors", ".gguf", ".json", ".model") and _is_lfs_pointer(file):
            raise ModelError(f"{file}: is what Git LFS leaves in the file's place; run git lfs pull in its folder.")
    if place.is_file() and place.suffix == ".safetensors":
        raise ModelError(f"{path}: is one file of a model; name its folder.")


def _is_lfs_pointer(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > MAX_POINTER_BYTES:
        return False
    return file.read_bytes().startswith(b"version https://git-lfs.github.com/spec/")


def _hub_reason(error: Exception) -> str:
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
        return "has none of that name that may be read; private and gated ones need HF_TOKEN"
    return f"cannot be asked from here ({type(error).__name__})"


def load(config: Config) -> Loaded:
    """Read the model's description and text side, and build the engine (weights come with `engine.start`)."""
    config = with_local_files(config)
    spec = resolve_spec(config)
    engine = build_engine(config, spec)
    tokenizer = _tokenizer(config)
    if max((i for i in tokenizer.special_ids), default=0) >= spec.vocab_size:
        raise ConfigError(
            f"model.tokenizer has control token {max(tokenizer.special_ids)}, but the model's vocabulary ends at "
            f"{spec.vocab_size - 1}; they do not belong together."
        )
    return Loaded(engine, tokenizer, _template(config, tokenizer, engine.session_len))


def memory_plan(config: Config) -> MemoryPlan:
    """What would be resident: read from headers, nothing allocated. For a hub name the files are fetched first."""
    return planned(config)[0]


def planned(config: Config) -> tuple[MemoryPlan, str]:
    """The memory plan, and what `--plan` prints: its table, whether weights were there to count, and other precisions."""
    from engine.plan import free_memory, plan_memory  # here: they bring numba, which the serving process does without
    from engine.plan_config import only_config, precision_table

    config = with_local_files(config)
    spec = resolve_spec(config)
    plan = plan_memory(config, spec, config.model.path, free_memory(config))
    counted = ["no weights are here: counted from config.json"] if only_config(config.model.path) else []
    return plan, "\n".join([*counted, plan.table(), "", precision_table(spec)])


def _tokenizer(config: Config) -> Tokenizer:
    source = config.model.tokenizer or config.model.path
    if config.model.tokenizer and not Path(source).exists():
        raise ConfigError(f"model.tokenizer: {source!r} is no file or folder.")
    return load_tokenizer(Path(source)) if source else ByteTokenizer()


def _template(config: Config, tokenizer: Tokenizer, session_len: int) -> ChatTemplate | None:
    try:
        return load_chat_template(
            config.model.chat_template or None,
            tokenizer,
            timeout_s=config.request.template_timeout_s,
            max_chars=max(1 << 20, TEMPLATE_CHARS_PER_TOKEN * session_len),
        )
    except NoChatTemplate as error:
        log.warning("%s; /v1/chat/completions is refused", error)
        return None
