"""`python -m engine.cuda.compile`: compile the kernels named on standard input into the cache, in a process of its own.

Input: JSON {"cc", "image", "directory", "variants": [{"module", "factory", "constants"}, ...]}. Needs no GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.cuda.launch import Variant, cached, store


def main() -> None:
    work = json.load(sys.stdin)
    directory = Path(work["directory"])
    for item in work["variants"]:
        variant = Variant(item["module"], item["factory"], tuple(item["constants"]))
        store(variant, tuple(work["cc"]), work["image"], cached(directory, variant, work["image"]))


if __name__ == "__main__":
    main()
