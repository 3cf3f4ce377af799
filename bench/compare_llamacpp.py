"""numbatch beside llama.cpp on the same GGUF file: `python -m bench.compare_llamacpp --json`.

Both get the same threads and the same work, in turn, several rounds, one process alive at a time; medians. In process:
a prompt of 512 tokens, and decoding of 1, 8 and 16 sequences with prompts of 128. Over HTTP: 8 clients, 128 tokens in
and 128 out, through bench.load. llama.cpp's figure is the better of its flash attention on and off, cell by cell.

`--q4_0` also runs llama.cpp on the file requantized to Q4_0, its fast format on x86 (numbatch keeps the given file).
Needs `pip install numbatch[bench]`. With `--json` the last line of stdout is {"ratios": {...}, "numbatch": {...}, ...}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import load
from bench.client import Target
from bench.load import Pace
from bench.machine import Neighbours, describe_machine
from bench.served import serving
from bench.workload import Job, random_prompts

ROOT = Path(__file__).resolve().parent.parent
MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCHES = (1, 8, 16)
CLIENTS, TOKENS_IN, TOKENS_OUT = 8, 128, 128
VOCAB = 32000
STEP_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
CELLS = ("prompt_512", *(f"decode_{n}" for n in BATCHES), f"http_{CLIENTS}")


def python(*words: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, **options)


def last_json(*words: str) -> dict[str, Any]:
    """Run a module to its end; its last line of stdout. The process is gone when this returns, and its threads with it."""
    with python("-m", *words) as process:
        try:
            out, _ = process.communicate(timeout=STEP_TIMEOUT_S)
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with exit code {process.returncode}")
    return json.loads(out.strip().splitlines()[-1])


@contextlib.contextmanager
def serving_llamacpp(model: str, threads: int, flash: str) -> Iterator[str]:
    """llama-server's address; it is gone afterwards."""
    process = python(
        "-m", "bench.llamacpp", model, "--threads", str(threads), "--serve", str(CLIENTS), "--flash", flash, stdin=subprocess.PIPE
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError("llama-server did not start")
        yield json.loads(line)["url"]
    finally:
        _end(process)  # closes its standard input, at which it ends


@contextlib.contextmanager
def serving_numbatch(model: str, threads: int, sets: list[str]) -> Iterator[str]:
    """numbatch's address; it is gone afterwards."""
    knobs = [f"model.path={model}", f"engine.num_threads={threads}", "cache.enable_prefix_caching=false", "server.log_level=ERROR"]
    with serving([*knobs, *sets], stdout=subprocess.PIPE) as server:
        yield server.url


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.communicate(timeout=STOP_TIMEOUT_S)
    finally:
        process.kill()
        process.wait()


def http_rate(url: str, seed: int) -> float:
    """Output tokens a second of 8 clients that each ask twice, after one request each to warm up."""

    async def run() -> float:
        await load.wait_ready(url, 120)
        model = await load.first_model(url, "")
        target = Target(url, model, ignore_eos=True)
        prompts = random_prompts(3 * CLIENTS, TOKENS_IN, TOKENS_OUT, 0.0, VOCAB, seed, words=False)
        jobs = [Job(0.0, *prompt) for prompt in prompts]
        await load.run(target, jobs[:CLIENTS], Pace(False, CLIENTS))
        answers, seconds, _ = await load.run(target, jobs[CLIENTS:], Pace(False, CLIENTS))
        short = [a.error or f"{a.output_len} tokens" for a in answers if a.error or a.output_len != TOKENS_OUT]
        if short:
            raise RuntimeError(f"{len(short)} of {len(answers)} requests did not give {TOKENS_OUT} tokens: {short[0]}")
        return TOKENS_OUT * len(answers) / seconds

    return asyncio.run(run())


def llamacpp_round(model: str, threads: int, seed: int) -> dict[str, float]:
    """Every cell once, the better of the two flash attention settings."""
    best = dict.fromkeys(CELLS, 0.0)
    batches = ",".join(map(str, BATCHES))
    for flash in ("on", "off"):
        r = last_json("bench.llamacpp", model, "--threads", str(threads), "--batch", batches, "--flash", flash)
        cells = {"prompt_512": r["prompt"]} | {f"decode_{n}": rate for n, rate in r["decode"].items()}
        with serving_llamacpp(model, threads, flash) as url:
            cells[f"http_{CLIENTS}"] = http_rate(url, seed)
        best = {cell: max(best[cell], cells[cell]) for cell in CELLS}
    return best


def numbatch_round(model: str, threads: int, seed: int, sets: list[str]) -> dict[str, float]:
    more = [word for knob in sets for word in ("--set", knob)]
    batches = ",".join(map(str, BATCHES))
    r = last_json("bench.offline", "--model", model, "--threads", str(threads), "--batch", batches, "--repeats", "1", "--json", *more)
    cells = {"prompt_512": r["prompt_tok_s"]} | {f"decode_{n}": rate for n, rate in r["decode_tok_s"].items()}
    with serving_numbatch(model, threads, sets) as url:
        cells[f"http_{CLIENTS}"] = http_rate(url, seed)
    return cells


def requantize(source: Path, target: Path) -> None:
    """Write `source` with its Q4_1 tensors as Q4_0; everything else unchanged. For files one trusts: the `gguf` reader is not hardened."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = gguf.LlamaFileType.MOSTLY_Q4_0.value if field.name == "general.file_type" else field.contents()
            writer.add_key_value(field.name, value, kind, sub_type=sub_type)
    for tensor in reader.tensors:
        data, dtype = tensor.data, tensor.tensor_type
        if dtype == gguf.GGMLQuantizationType.Q4_1:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, dtype), gguf.GGMLQuantizationType.Q4_0)
            dtype = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)


def q4_0_copy(model: str) -> str:
    """The file's Q4_0 twin in .cache/bench, made when it is not there."""
    folder = ROOT / ".cache" / "bench"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{Path(model).stem}.as-Q4_0.gguf"
    if not target.exists():
        requantize(Path(model), target)
    return str(target)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and their medians."""
    model = str(Path(args.model).resolve())
    runs: dict[str, list[dict[str, float]]] = {"llamacpp": [], "numbatch": []}
    neighbours = Neighbours()
    peers = {"llamacpp": model} | ({"llamacpp_q4_0": q4_0_copy(model)} if args.q4_0 else {})
    for number in range(args.rounds):
        for name, path in peers.items():
            if args.only != "numbatch":
                runs.setdefault(name, []).append(llamacpp_round(path, args.threads, number))
        if args.only != "llamacpp":
            runs["numbatch"].append(numbatch_round(model, args.threads, number, args.set))
        print(f"round {number + 1} of {args.rounds}: " + "; ".join(f"{who} {_short(r[-1])}" for who, r in runs.items() if r), flush=True)
    medians = {who: {cell: statistics.median(r[cell] for r in rounds) for cell in CELLS} for who, rounds in runs.items() if rounds}
    ratios = {f"ratios{who.removeprefix('llamacpp')}": _ratios(medians, who) for who in peers if {who, "numbatch"} <= set(medians)}
    machine = describe_machine()
    return {
        **ratios,
        **medians,
        "cpu": machine["features"],
        "machine": machine,
        "others_cpu_share": neighbours.share(),
        "threads": args.threads,
        "model": Path(args.model).name,
        "rounds": args.rounds,
        "runs": runs,
    }


def _ratios(medians: dict[str, dict[str, float]], peer: str) -> dict[str, float]:
    return {cell: medians["numbatch"][cell] / medians[peer][cell] for cell in CELLS}


def _leave(number: int, _: object) -> None:
    """A SIGTERM unwinds, so that the server that is being measured ends too."""
    raise SystemExit(128 + number)


def _short(cells: dict[str, float]) -> str:
    return " ".join(f"{value:.0f}" for value in cells.values())


def show(out: dict[str, Any]) -> None:
    names = [who for who in ("llamacpp", "llamacpp_q4_0", "numbatch") if who in out]
    tables = [key for key in ("ratios", "ratios_q4_0") if key in out]
    print(f"\n{out['model']}, {out['threads']} threads, medians of {out['rounds']} rounds, tokens a second")
    print(" " * 12 + "".join(f"{name:>15}" for name in [*names, *tables]))
    for cell in CELLS:
        print(f"{cell:12}" + "".join(f"{out[n][cell]:>15,.1f}" for n in names) + "".join(f"{out[t][cell]:>15.2f}" for t in tables))
    has = [name for name, present in out["cpu"].items() if present]
    print(f"processor: {out['machine']['processor']}, {out['machine']['cores']} cores, {' '.join(has)}")
    if out["others_cpu_share"] > 0.05:
        print(f"NOT ALONE: other processes took {out['others_cpu_share']:.0%} of the cores; these figures are provisional.")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.compare_llamacpp", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--model", default=MODEL, help=f"a .gguf file; default {MODEL}")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--q4_0", action="store_true", help="also run llama.cpp on the file requantized to Q4_0")
    p.add_argument("--only", choices=("llamacpp", "numbatch"), help="leave the other one out")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a knob of numbatch")
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    if not (1 <= args.threads <= 1024 and 1 <= args.rounds <= 50):
        p.error("--threads must be 1..1024 and --rounds 1..50")
    if not Path(args.model).is_file():
        p.error(f"{args.model} is not here; python -m cli.fetch smollm2 --to .models fetches the default")
    try:
        out = compare(args)
    except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired) as error:
        print(f"bench.compare_llamacpp: {error}", file=sys.stderr)
        return 2
    show(out)
    if args.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())
