"""Chat templates that a command names: a built-in name becomes a small LMDeploy-JSON file that a TOML file can name.

The file lies beside the compiled kernels, where the configuration lets numbatch write; its name is a digest of what it
holds, so equal commands share it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path

from cli.arguments import UsageError
from text.lmdeploy_template import BUILT_IN
from text.template_names import ALIASES, built_in_template


def template_file(wanted: str, changes: dict[str, str | None], cache_dir: Path) -> Path:
    """The file for a built-in name, or for a file of the user's; `changes` (None: none) replace keys of LMDeploy's JSON."""
    changed = {key: value for key, value in changes.items() if value is not None}
    own = Path(wanted)
    if own.is_file() and not changed:
        return own
    if own.is_file():
        if own.suffix.lower() != ".json":
            raise UsageError(f"--chat-template {wanted}: is Jinja; only LMDeploy's JSON can be changed by a flag.")
        try:
            values = json.loads(own.read_text(encoding="utf-8"))
        except ValueError:
            raise UsageError(f"--chat-template {wanted}: is not JSON.") from None
    else:
        values = {"model_name": _known(wanted)}
    text = json.dumps(values | changed, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    folder = cache_dir / "templates"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = own.stem if own.is_file() else values["model_name"]
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    if not path.is_file():
        path.write_text(text, encoding="utf-8")
    return path


def _known(name: str) -> str:
    found = built_in_template(name)
    if found is None:
        near = difflib.get_close_matches(name, [*BUILT_IN, *ALIASES], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "numbatch list shows them."
        raise UsageError(f"--chat-template {name}: is neither a file nor a built-in template; {hint}")
    return found
