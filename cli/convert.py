"""`numbatch convert MODEL_NAME MODEL_PATH`: a checkpoint as the workspace of LMDeploy 0.1, for what reads TurboMind's files.

Serving needs no conversion; a workspace is served like any checkpoint. What is written, and what cannot be, is
`quant/workspace.py`'s business.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.arguments import Parser, UsageError, say

EXIT_MODEL, EXIT_DISK = 3, 1


def parser() -> Parser:
    cli = Parser(
        prog="numbatch convert",
        usage="numbatch convert MODEL_NAME MODEL_PATH [flags]",
        description="Write a TurboMind workspace (LMDeploy 0.1). Not needed for serving: numbatch reads checkpoints as they are.",
        refused={
            "--trust-remote-code": "numbatch never runs code that comes with a checkpoint; leave it out.",
            "--quant-path": "a 4-bit checkpoint is read from MODEL_PATH itself; name its folder there.",
        },
    )
    cli.add_argument("model_name", help="goes into config.ini, where it selects the chat template (numbatch list)")
    cli.add_argument("model_path", help="Hugging Face folder or GGUF file")
    cli.add_argument("--model-format", default="", metavar="FORMAT", help="hf, awq, gguf, llama, qwen; the files say it themselves")
    cli.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that the weights are cut for (default: %(default)s)")
    cli.add_argument("--tokenizer-path", default=None, metavar="PATH", help="where the tokenizer lies (default: with the checkpoint)")
    cli.add_argument("--dst-path", default="workspace", metavar="DIR", help="where to write (default: ./%(default)s)")
    cli.add_argument("--group-size", type=int, default=0, metavar="N", help="of 4-bit weights; checked against the files")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from engine.errors import ConfigError, EngineError
    from formats.errors import FormatError
    from quant.workspace import convert

    try:
        made = convert(
            args.model_path, args.dst_path, model_name=args.model_name, tp=args.tp, model_format=args.model_format,
            group_size=args.group_size, tokenizer_path=args.tokenizer_path, progress=_progress,
        )  # fmt: skip
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except (EngineError, FormatError) as error:
        say(f"numbatch convert: {error}")
        return EXIT_MODEL
    except OSError as error:
        say(f"numbatch convert: {error.filename or args.dst_path}: {error.strerror or error}")
        return EXIT_DISK
    for sentence in made.sentences:
        say(sentence)
    print(f"{made.path}: {made.files} files, {made.nbytes / 1e6:.1f} MB, {made.weight_type}, {made.ranks} rank{'s' * (made.ranks != 1)}")
    print(f"numbatch chat {args.dst_path}    numbatch serve api_server {args.dst_path}")
    return 0


def _progress(count: int, total: int, name: str) -> None:
    """One line that moves, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{count} of {total} {name}", end="\n" if count == total else "", file=sys.stderr, flush=True)
