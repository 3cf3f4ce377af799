"""schemathesis over the published OpenAPI document of a running server.

    python -m tests.e2e.fuzz --cases 2000

Valid and invalid requests are generated for every operation; a 5xx, an undocumented status or a body that does not
match its schema is a failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e.support import Server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection"
PHASES = "examples,coverage,fuzzing"
NUM_OPERATIONS = 50


def fuzz(server: Server, examples: int, seed: int, phases: str = PHASES) -> tuple[int, int, str]:
    """-> (exit code, generated cases, output) of `examples` per operation and phase at most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", server.url + "/openapi.json", "--max-examples", str(examples)),
            *("--seed", str(seed), "--phases", phases, "--checks", CHECKS, "--continue-on-failure", "--no-color"),
            *("--generation-database", "none", "--warnings", "off", "--exclude-path", "/sleep"),  # asleep it would refuse the rest
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.findall(r"(\d[\d,]*) generated", done.stdout)
    return done.returncode, sum(int(number.replace(",", "")) for number in found), done.stdout + done.stderr


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--cases", type=int, default=2000)
    cli.add_argument("--seed", type=int, default=1)
    args = cli.parse_args()
    with Server("server.log_level=ERROR", "engine.session_len=512") as server:
        code, cases, output = fuzz(server.ready(), -(-args.cases // NUM_OPERATIONS), args.seed)
        print(output)
        print(f"{cases} cases, exit code {code}; the server says:\n{server.log}")
    if code or cases < args.cases:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
