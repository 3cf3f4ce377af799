"""`numbatch chat MODEL`: a terminal chat with a model in this process, or with `--url` one behind a port.

LMDeploy's older forms are read too: `chat turbomind MODEL --model-name qwen-7b`, `chat torch MODEL`; there
`--model-name` selects a built-in chat template, as it did then.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cli.arguments import Parser, UsageError, say
from cli.flags import CACHE, ENGINE, MODEL, add_flags, configuration, refused
from config.given import UNGUARDED
from config.load import toml_value

SECTIONS = (MODEL, ENGINE, CACHE)
ENGINE_WORDS = ("turbomind", "torch", "pytorch")
MANNERS = "Two Enters end the input, `end` begins a new conversation, `exit` leaves, Ctrl-C stops an answer."


def parser() -> Parser:
    cli = Parser(
        prog="numbatch chat",
        usage="numbatch chat MODEL [flags]   or   numbatch chat --url URL [flags]",
        description=f"Talk to a model in this terminal.\n{MANNERS}",
        epilog="Without sampling flags the answer is the likeliest one.",
        refused=refused(SECTIONS) | {"--session-id": "a terminal is one session; leave it out."},
    )
    cli.add_argument("model_path", nargs="?", default="", help="Hugging Face folder, GGUF file, workspace or hub name [model.path]")
    cli.add_argument("--url", metavar="URL", help="talk to the server there instead of loading a model")
    cli.add_argument("--api-key", metavar="KEY", help="with --url: one of the server's keys (or NUMBATCH_API_KEY)")
    add_conversation(cli)
    add_flags(cli, SECTIONS)
    return cli


def add_conversation(cli: Parser) -> None:
    """Flags of every terminal chat."""
    group = cli.add_argument_group("answers")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy; more is more varied")
    group.add_argument("--top-p", type=float, metavar="X", help="keep the likeliest tokens whose probabilities sum to this")
    group.add_argument("--top-k", type=int, metavar="N", help="keep this many likeliest tokens")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same answers")
    group.add_argument("--system", metavar="TEXT", help="system message of each conversation")
    group.add_argument("--history", type=Path, metavar="FILE", help="keep the lines you type there")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(argv or [])
    old = words[0] if words and words[0] in ENGINE_WORDS else ""
    if old:
        say(f"chat {old} MODEL is now chat MODEL")
        words = words[1:]
    args = parser().parse_args(words)
    if args.url and args.model_path:
        raise UsageError("either a model or --url, not both.")
    if args.url:
        return over_http(args.url, args)
    if not args.model_path and args.flag_device != "mock" and args.config is None:
        raise UsageError("name a model (folder, GGUF file or hub name), or a server with --url.")
    return in_process(args, by_name=bool(old))


def in_process(args: argparse.Namespace, by_name: bool) -> int:
    """Load the model here. `by_name`: --model-name selects a chat template if it is the name of one."""
    from text.template_names import built_in_template

    name = args.flag_model_name if by_name and not args.flag_chat_template else None
    template = (built_in_template(name) if name else None) or ""
    args.system = args.system if args.system is not None else _take_meta_instruction(args, template)
    unguarded = [f"{key}={toml_value(value)}" for key, value in UNGUARDED.items()]
    asked = configuration(args, model_path=args.model_path, defaults=unguarded, template=template)
    for line in asked.lines:
        say(line)

    from api.lifecycle import EXIT_INTERNAL, exit_code
    from cli.partners import InProcess
    from cli.terminal import converse
    from numbatch import Pipeline

    logging.getLogger("numbatch").setLevel("WARNING")
    try:
        pipe = Pipeline(asked.loaded)
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_INTERNAL:
            raise
        say(f"numbatch chat: {error}")
        return code
    with pipe:
        return converse(InProcess(pipe, args), args.history)


def _take_meta_instruction(args: argparse.Namespace, template: str) -> str | None:
    """Without an LMDeploy template to put it into, the meta instruction is the system message."""
    if args.flag_meta_instruction is None or args.flag_chat_template or template:
        return None
    text: str = args.flag_meta_instruction
    args.flag_meta_instruction = None
    return text


def over_http(url: str, args: argparse.Namespace, session_id: int | None = None) -> int:
    """The same conversation with a server. `session_id`: let the server remember it under this number."""
    from api.remote import APIClient
    from cli.partners import InSession, OverHttp
    from cli.terminal import converse

    with APIClient(url, args.api_key or os.environ.get("NUMBATCH_API_KEY")) as client:
        try:
            names = client.available_models
        except (ValueError, RuntimeError, ConnectionError) as error:
            say(f"numbatch: {error}")
            return 1
        say(f"{', '.join(names)} at {client.url}")
        if session_id is None:
            return converse(OverHttp(client, args), args.history)
        with InSession(client, args, session_id) as partner:
            return converse(partner, args.history)
