"""Characters a second of one model, by Hugging Face transformers and by numbatch: the same questions, one at a time.

    python examples/infer_compare.py hf --model FOLDER
    python examples/infer_compare.py numbatch --model FOLDER      (lmdeploy: its old name, read as numbatch)

Prints one line an engine: `hf 耗时 29.50秒  40 字/秒` (seconds taken, characters a second). transformers is needed
for `hf` only. Loading and the first answer, which compiles, are not counted. Greedy, so both write the same text.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

QUESTIONS = ("请介绍一下你自己。", "What is the capital of France?", "写一首关于春天的诗。", "Explain how a bicycle stays upright.")
Ask = Callable[[str], str]


def with_numbatch(model: str, max_tokens: int) -> Ask:
    from numbatch import GenerationConfig, pipeline

    pipe = pipeline(model)
    config = GenerationConfig(max_new_tokens=max_tokens)
    return lambda question: pipe(question, config).text


def with_hf(model: str, max_tokens: int) -> Ask:
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise SystemExit(f"hf needs {error.name}: pip install torch transformers") from None
    file = Path(model)
    place: dict[str, Any] = {"gguf_file": file.name} if file.is_file() else {}
    folder = str(file.parent if file.is_file() else model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", **place).to(device).eval()

    def ask(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(device)
        with torch.inference_mode():
            out = network.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
        return str(tokenizer.decode(out[0][ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask


def measure(ask: Ask, rounds: int) -> tuple[float, int]:
    """(seconds, characters) of all questions, `rounds` times, after one that is not counted."""
    ask(QUESTIONS[0])
    began = time.monotonic()
    characters = sum(len(ask(question)) for _ in range(rounds) for question in QUESTIONS)
    return time.monotonic() - began, characters


def line(engine: str, seconds: float, characters: int) -> str:
    return f"{engine} 耗时 {seconds:.2f}秒  {characters / seconds:.0f} 字/秒"


def main(argv: list[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    cli.add_argument("engine", choices=("hf", "numbatch", "lmdeploy"))
    cli.add_argument("--model", default=os.environ.get("INFER_COMPARE_MODEL", ""), help="folder, GGUF file or hub name")
    cli.add_argument("--max-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    cli.add_argument("--rounds", type=int, default=2, help="how often the questions are asked (default: %(default)s)")
    args = cli.parse_args(argv)
    if not args.model:
        cli.error("name a model: --model FOLDER (or INFER_COMPARE_MODEL in the environment)")
    engine = "hf" if args.engine == "hf" else "numbatch"
    ask = (with_hf if engine == "hf" else with_numbatch)(args.model, args.max_tokens)
    print(line(engine, *measure(ask, args.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
