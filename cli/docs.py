"""`python -m cli.docs`: writes everything in `docs/` that is generated; `--check` only compares.

`docs/config.md` and `config/example.toml` are written whole (config/docs.py). In `docs/api.md` and
`docs/operating.md` the parts between `<!-- generated: NAME -->` and `<!-- end -->` are: fields of request bodies from
the tables that parse them, metrics from the families that `/metrics` gives.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from api import kserve, native
from api.chat import chat_fields
from api.completions import completion_fields
from api.control import abort_fields
from api.counters import Metrics
from api.interactive import interactive_fields
from api.messages import message_fields
from api.metrics import Families
from api.response_fields import response_fields
from api.schema import Table, in_words
from api.service import Service
from api.tokenize import detokenize_fields, tokenize_fields
from config.docs import generated as generated_by_config
from config.schema import Config, Request

# Stand-ins that are recognised in the output: bounds that depend on the model are shown by name.
SESSION_LEN, VOCAB_SIZE, MODEL = 1_000_003, 2_000_003, "MODEL"
NAMES = {
    str(SESSION_LEN): "session_len",
    str(SESSION_LEN - 1): "session_len - 1",
    str(VOCAB_SIZE - 1): "vocabulary - 1",
    str((1 << 64) - 1): "2^64 - 1",
    str((1 << 63) - 1): "2^63 - 1",
    str((1 << 31) - 1): "2^31 - 1",
}


def _fields(build: Callable[[Request, str, int, int], Table]) -> str:
    fields = build(Config().request, MODEL, SESSION_LEN, VOCAB_SIZE)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.required else _default(field.default)
        rows.append(f"| `{name}` | {in_words(field.schema)} | {default} | {field.doc} |")
    text = "\n".join(rows)
    for stand_in, meaning in NAMES.items():
        text = re.sub(rf"\b{stand_in}\b", meaning, text)
    return text


def _default(value: Any) -> str:
    if value is None or value == () or value == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _metrics() -> str:
    idle = SimpleNamespace(engine=None, metrics=Metrics(), model_name=MODEL, gate=None)
    rows = ["| metric | type | meaning |", "|---|---|---|"]
    for family in Families(cast(Service, idle)).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "chat fields": lambda: _fields(chat_fields),
    "completion fields": lambda: _fields(completion_fields),
    "tokenize fields": lambda: _fields(tokenize_fields),
    "detokenize fields": lambda: _fields(detokenize_fields),
    "response fields": lambda: _fields(response_fields),
    "message fields": lambda: _fields(message_fields),
    "interactive fields": lambda: _fields(interactive_fields),
    "generate fields": lambda: _fields(native.generate_fields),
    "sampling fields": lambda: _fields(native.sampling_fields),
    "ppl fields": lambda: _fields(native.ppl_fields),
    "encode fields": lambda: _fields(native.encode_fields),
    "abort fields": lambda: _fields(abort_fields),
    "kserve fields": lambda: _fields(kserve.generate_fields),
    "metrics": _metrics,
}
PAGES = ("docs/api.md", "docs/operating.md")


def generated(root: Path) -> dict[Path, str]:
    """File -> the text it must have."""
    out = generated_by_config(root)
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        for name, write in PARTS.items():
            opening, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
            before, found, rest = text.partition(opening)
            if found:
                text = before + opening + write() + "\n" + end + rest.partition(end)[2]
        out[root / page] = text
    return out


def main() -> int:
    cli = argparse.ArgumentParser(prog="python -m cli.docs", description="Write the generated parts of the documentation.")
    cli.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    args = cli.parse_args()
    stale = [path for path, text in generated(Path()).items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path} is not up to date: run python -m cli.docs", file=sys.stderr)
        else:
            path.write_text(generated(Path())[path], encoding="utf-8")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
