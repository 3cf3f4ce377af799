"""`numbatch serve api_server MODEL`: the server of `server.py`, with LMDeploy's flags.

Each flag is printed with the key of the TOML file that it sets; everything else (checks, memory plan, exit codes) is
what `python server.py --config FILE` does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.arguments import Parser, say
from cli.flags import ACCESS, CACHE, ENGINE, LIMITS, MODEL, SERVER, add_flags, configuration, refused
from config.cli import verdict

SECTIONS = (MODEL, ENGINE, CACHE, SERVER, ACCESS, LIMITS)


def parser() -> Parser:
    cli = Parser(
        prog="numbatch serve api_server",
        usage="numbatch serve api_server MODEL [flags]",
        description="Serve a model behind an OpenAI-compatible port.",
        epilog="Precedence: flags and --set, then NUMBATCH_SECTION_KEY, then --config, then the default. The API: /docs on the port.",
        refused=refused(SECTIONS),
    )
    cli.add_argument("model_path", nargs="?", default="", help="Hugging Face folder, GGUF file, workspace or hub name [model.path]")
    add_flags(cli, SECTIONS)
    what = cli.add_argument_group("instead of serving").add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say whether the configuration can be used")
    what.add_argument("--print-effective", action="store_true", help="print every knob with its value, as TOML")
    what.add_argument("--plan", action="store_true", help="print the memory plan, allocating nothing")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    asked = configuration(args, model_path=args.model_path)
    for line in asked.lines:
        say(line)
    import server

    if args.check:
        print(verdict(asked.loaded.config))
        return 0
    if args.print_effective:
        from config.load import render_effective

        print(render_effective(asked.loaded))
        return 0
    if args.plan:
        return server.plan(asked.loaded)
    sys.stderr.flush()
    return server.run(asked.loaded)
