"""`numbatch list`: which models can be read, and which chat templates are built in."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser


def parser() -> Parser:
    return Parser(prog="numbatch list", description="Model families and built-in chat templates.")


def main(argv: Sequence[str] | None = None) -> int:
    parser().parse_args(argv)
    from engine.models.spec import FAMILIES
    from text.template_names import known_names

    print("model families (architecture in config.json; general.architecture in GGUF):")
    for name, family in FAMILIES.items():
        print(f"  {name:<12}{family.architecture:<24}{family.gguf or '-'}")
    print("\nbuilt-in chat templates, for --chat-template (a checkpoint's own is used without it):")
    for name, others in known_names().items():
        print(f"  {name:<12}{', '.join(others)}".rstrip())
    return 0
