"""The Triton model repository of a workspace: what a Triton server needs to put numbatch behind its own port.

LMDeploy's workspace held a C++ backend's configuration and two Python scripts. Ours holds three scripts that speak HTTP
to a numbatch that serves the same workspace (NUMBATCH_URL), with the tensors' names of then. Nobody needs it who talks
to numbatch itself: it answers the KServe v2 protocol on its own port. The texts are in `quant/triton/`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

MODELS = {"preprocessing": "tokenizer", "postprocessing": "tokenizer", "interactive": "weights"}  # and what its 1/ links to
REPOSITORY = {"preprocessing": "preprocessing", "postprocessing": "postprocessing", "turbomind": "interactive"}


def write_glue(workspace: Path) -> None:
    """Add triton_models/*, model_repository/ and service_docker_up.sh to a workspace that has weights and tokenizer."""
    texts = files("quant") / "triton"
    for model, link in MODELS.items():
        version = workspace / "triton_models" / model / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(_script(model), encoding="utf-8")
        (version / link).symlink_to(Path("..") / ".." / link)
        config = (texts / f"{model}.config.pbtxt").read_text(encoding="utf-8")
        (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    (workspace / "triton_models" / "interactive" / "1" / "placeholder").touch()
    (workspace / "model_repository").mkdir()
    for name, model in REPOSITORY.items():
        (workspace / "model_repository" / name).symlink_to(Path("..") / "triton_models" / model)
    script = workspace / "service_docker_up.sh"
    script.write_text((texts / "service_docker_up.sh").read_text(encoding="utf-8"), encoding="utf-8")
    script.chmod(0o755)


def _script(model: str) -> str:
    """A Triton Python model: the part that all share, then its own."""
    texts = files("quant") / "triton"
    return "".join((texts / f"{name}.txt").read_text(encoding="utf-8") for name in ("common", model))
