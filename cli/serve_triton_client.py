"""`numbatch serve triton_client ADDRESS`: a terminal chat over the KServe v2 protocol with Triton's generate extension.

Speaks HTTP to numbatch's own port or to a Triton server that serves a language model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import Parser, UsageError, say
from cli.chat import MANNERS, add_conversation

if TYPE_CHECKING:
    from api.remote import APIClient


def parser() -> Parser:
    cli = Parser(
        prog="numbatch serve triton_client",
        usage="numbatch serve triton_client [ADDRESS] [flags]",
        description=f"Talk to a Triton (KServe v2) server in this terminal.\n{MANNERS}",
        epilog="The protocol has no conversations: what was said is sent as one text, which the model continues.",
    )
    cli.add_argument("tritonserver_addr", nargs="?", default="127.0.0.1:23333", help="its HTTP address (default: %(default)s)")
    cli.add_argument("--api-key", metavar="KEY", help="one of the server's keys (or NUMBATCH_API_KEY)")
    cli.add_argument("--model-name", metavar="NAME", help="which of its models; needed where it has several")
    cli.add_argument("--chat-template", metavar="NAME", help="markers of this built-in template around each turn (numbatch list)")
    add_conversation(cli)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from api.remote import APIClient
    from cli.partners import OverKServe
    from cli.terminal import converse
    from text.template_names import template_named

    template = template_named(args.chat_template) if args.chat_template else None
    if args.chat_template and template is None:
        raise UsageError(f"--chat-template {args.chat_template}: is no built-in template; numbatch list shows them.")
    with APIClient(args.tritonserver_addr, args.api_key or os.environ.get("NUMBATCH_API_KEY")) as client:
        try:
            model = args.model_name or _only_model(client)
        except (ValueError, RuntimeError, ConnectionError) as error:
            say(f"numbatch: {error}")
            return 1
        say(f"{model} at {client.url}")
        return converse(OverKServe(client, args, model, template), args.history)


def _only_model(client: APIClient) -> str:
    names = [str(model["name"]) for model in client.post("/v2/repository/index", {})]
    if len(names) != 1:
        raise ValueError(f"The server has {len(names)} models ({', '.join(names)}); name one with --model-name.")
    return names[0]
