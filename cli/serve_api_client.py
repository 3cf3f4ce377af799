"""`numbatch serve api_client URL`: a terminal chat with a server; `numbatch chat --url URL` is the same."""

from __future__ import annotations

from collections.abc import Sequence

from cli.arguments import Parser
from cli.chat import MANNERS, add_conversation, over_http


def parser() -> Parser:
    cli = Parser(
        prog="numbatch serve api_client",
        usage="numbatch serve api_client [URL] [flags]",
        description=f"Talk to a server in this terminal.\n{MANNERS}",
    )
    cli.add_argument("api_server_url", nargs="?", default="http://127.0.0.1:23333", help="where it listens (default: %(default)s)")
    cli.add_argument("--api-key", metavar="KEY", help="one of the server's keys (or NUMBATCH_API_KEY)")
    cli.add_argument("--session-id", type=int, metavar="N", help="let the server keep the conversation, under this number (1 or more)")
    add_conversation(cli)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return over_http(args.api_server_url, args, args.session_id)
