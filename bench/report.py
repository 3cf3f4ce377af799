"""Measured results as one page: `python -m bench.report [bench/results] --out report.html`.

Reads every *.json and *.jsonl there, in the order of their names; what was measured twice counts with its last value. One HTML
file with inline SVG, no script, nothing fetched, light and dark. Figures of others come from bench/peers.py and are never
mixed with ours; what was not measured is not drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import peers
from bench.svg import CSS, Bar, Range, Series, bars, escape, lines, number, ranges

Record = dict[str, Any]
PARAMETERS = sum(n * k for n, k in peers.PRODUCTS.values()) * 32  # of Llama-3.1-8B's layers
HEAD = 128256 * 4096
W4_BYTES = 0.5 + 2.5 / 128  # a weight with its share of scale and zero point
KV_BYTES = 32 * 2 * 8 * 128 * 2  # of a position
MEAN_CONTEXT = 192  # while 128 tokens follow a prompt of 128
NO_COPY = "engine.w4_dense_copy=false"
PEER_COLOURS = {"vLLM AWQ": 1, "vLLM bf16": 2, "TurboMind AWQ": 3}

LIGHT = """--page: #f6f5f2; --card: #fffefb; --ink: #1f1d1a; --ink-2: #55514a; --ink-3: #a8a296; --line: #e6e2d8; --s0: #c2410c;
 --s1: #2563a8; --s2: #3f8f8a; --s3: #7a5ea8; --s4: #8a7a3a; --s5: #6b7280; --s6: #8f8a80; --good: #2f7d3b; --bad: #b42318;"""
DARK = """--page: #161513; --card: #1f1e1b; --ink: #f2efe8; --ink-2: #bdb7aa; --ink-3: #6d685e; --line: #35332e; --s0: #ff8a4c;
 --s1: #6fb1f2; --s2: #63c7bf; --s3: #b79cec; --s4: #d3bf6a; --s5: #a3abb8; --s6: #8f8a80; --good: #74c983; --bad: #ff8379;"""
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }}
main {{ max-width: 900px; margin: 0 auto; padding: 48px 20px 80px; }}
h1 {{ font-size: 34px; line-height: 1.15; margin: 0 0 6px; letter-spacing: -.02em; }}
h2 {{ font-size: 20px; margin: 0 0 4px; }}
h3 {{ font-size: 15px; margin: 18px 0 0; }}
p {{ margin: 0 0 16px; color: var(--ink-2); max-width: 70ch; }}
.part {{ margin: 44px 0 14px; font-size: 13px; letter-spacing: .08em; text-transform: uppercase; color: var(--ink-2); }}
section, .tile {{ background: var(--card); border: 1px solid var(--line); border-radius: 14px; }}
section {{ padding: 24px 26px; margin: 0 0 18px; overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; margin-top: 14px; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--line); }}
th {{ color: var(--ink-2); font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; }}
.good {{ color: var(--good); }}
.bad {{ color: var(--bad); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; margin: 26px 0 0; }}
.tile {{ padding: 16px 18px; }}
.tile b {{ display: block; font-size: 26px; letter-spacing: -.02em; line-height: 1.3; white-space: nowrap; }}
.tile span {{ color: var(--ink-2); font-size: 13.5px; line-height: 1.4; display: block; }}
details summary {{ cursor: pointer; color: var(--ink-2); font-size: 14px; margin-top: 10px; }}
footer {{ color: var(--ink-2); font-size: 13.5px; margin-top: 40px; }}
{CSS}"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>numbatch: what was measured</title><style>{style}</style></head>
<body><main><h1>numbatch: what was measured</h1>{body}</main></body></html>
"""


# -- reading ------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[Record]:
    """Every JSON object of the folder's files, oldest file first. ValueError naming a file that is not JSON."""
    found = []
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        text = path.read_text(encoding="utf-8")
        try:
            rows = [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path.name} is not JSON: {error}.") from None
        found += [row | {"file": path.name} for row in rows if isinstance(row, dict)]
    return found


def on_gpu(record: Record) -> bool:
    return bool(record.get("machine", {}).get("gpus")) and not record.get("emulated")


def latest(records: Sequence[Record], key: str) -> dict[str, Any]:
    """The objects under `key` of all records, later entries over earlier ones."""
    merged: dict[str, Any] = {}
    for record in records:
        if isinstance(record.get(key), dict):
            merged |= record[key]
    return merged


def last(records: Sequence[Record], key: str) -> Any:
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)


def of_8b(records: Sequence[Record], form: str = "awq", setting: str = "") -> list[Record]:
    """Of a card, with a model of the shape that the peers ran: its weights in this form (a part of the model's name), with the
    one setting changed, or as it is served."""
    named = [r for r in records if on_gpu(r) and all(part in str(r.get("model", "")).lower() for part in ("8b", form))]
    return [r for r in named if (setting in r.get("set", ()) if setting else NO_COPY not in r.get("set", ()))]


# -- pieces of HTML -----------------------------------------------------------------------------------------------------


def section(title: str, text: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(parts)}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text; one that begins with + or - signs is coloured by `verdict`."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def verdict(value: float, bar: float, lower_is_better: bool = False) -> str:
    met = value <= bar if lower_is_better else value >= bar
    return f'<span class="{"good" if met else "bad"}">{"met" if met else "missed"}</span>'


def tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


# -- the card -----------------------------------------------------------------------------------------------------------


def ceilings(records: Sequence[Record]) -> tuple[float, float]:
    """(bytes, float operations) a second of the card: measured with the kernels, else the peers' measurement."""
    measured = latest([r for r in records if on_gpu(r)], "ceilings")
    return measured.get("read_gb_s", peers.READ_TB_S * 1e3) * 1e9, measured.get("dense_gflop_s", peers.DENSE_TFLOP_S * 1e3) * 1e9


def decode_floor_s(rows: int, bytes_s: float, flop_s: float) -> float:
    """Seconds a decode step of the 8B model in 4 bits takes at least: products bound by bytes or operations, then the KV cache."""
    weights = PARAMETERS * W4_BYTES + HEAD * 2
    return max(weights / bytes_s, 2 * rows * (PARAMETERS + HEAD) / flop_s) + rows * MEAN_CONTEXT * KV_BYTES / bytes_s


def decode(records: Sequence[Record]) -> str:
    ours = {int(n): rate for n, rate in sorted(latest(of_8b(records), "decode_tok_s").items(), key=lambda item: int(item[0]))}
    floor = {n: n / decode_floor_s(n, *ceilings(records)) for n in peers.DECODE_BARS}
    series = [Series("hardware", list(floor.items()), 6, "bound")]
    series += [Series(name, list(rates.items()), PEER_COLOURS[name]) for name, rates in peers.DECODE.items()]
    if ours:
        series.append(Series("numbatch", list(ours.items()), 0, "ours"))
    best = {n: max(rates[n] for rates in peers.DECODE.values()) for n in peers.DECODE_BARS}
    rows = [
        [str(n), number(ours[n]), number(bar), verdict(ours[n], bar), f"{ours[n] / best[n]:.2f} x", f"{100 * ours[n] / floor[n]:.0f} %"]
        for n, bar in peers.DECODE_BARS.items()
        if n in ours
    ]
    words = "Llama-3.1-8B in 4 bits (AWQ shape, random weights), one card: all sequences decode together after prompts of 128 tokens. "
    words += "The dotted line is what the card's measured bandwidth and arithmetic allow."
    head = ["sequences", "tok/s", "bar", "", "best peer", "of the hardware's bound"]
    return section("Decoding", words + missing(ours), lines(series, "sequences", "tokens a second"), table(head, rows) if rows else "")


def crossover(records: Sequence[Record]) -> str:
    """Decoding with weights in 4 bits beside the same shape in 16, and from where unpacking them costs."""
    found = {
        "4 bits": of_8b(records),
        "4 bits, no 16-bit copy": of_8b(records, setting=NO_COPY),
        "16 bits": of_8b(records, form="dense"),
    }
    rates = {name: {int(n): rate for n, rate in latest(of, "decode_tok_s").items()} for name, of in found.items()}
    if not rates["16 bits"]:
        return ""
    drawn = [(i, name) for i, name in enumerate(found) if rates[name]]
    series = [Series(name, sorted(rates[name].items()), i, "peer" if i else "ours") for i, name in drawn]
    rows = []
    for n, dense in sorted(rates["16 bits"].items()):
        cells = [rates[name].get(n) for name in ("4 bits", "4 bits, no 16-bit copy")]
        rows.append([str(n), number(dense)] + [f"{number(c)} ({c / dense:.2f} x)" if c else "" for c in cells])
    words = "The same shape with its matrices in 4 bits and in 16, decoding. Up to the crossing 4 bits are read for less than 16 are; "
    words += "beyond it a product is bound by arithmetic, and the 16-bit copy that is kept where memory allows takes over."
    head = ["sequences", "16 bits, tok/s", "4 bits", "4 bits, no 16-bit copy"]
    return section("What 4 bits are worth", words, lines(series, "sequences", "tokens a second"), table(head, rows))


def missing(ours: Any) -> str:
    return "" if ours else " numbatch itself has not been measured on this kind of card yet."


def prefill(records: Sequence[Record]) -> str:
    ours, rows = latest(of_8b(records), "prefill_tok_s"), []
    for case, bar in peers.PREFILL_BARS.items():
        if case in ours:
            rows.append(Bar(f"numbatch {case}", ours[case], 0, number(ours[case]), bar, gap=True))
        rows += [Bar(f"{name} {case}", rates[case], PEER_COLOURS[name], number(rates[case])) for name, rates in peers.PREFILL.items()]
    words = "Prompt tokens a second, all prompts sent at once, until the last has its first token. The tick is the bar." + missing(ours)
    return section("Prompts", words, bars(rows, "prompt tokens a second", "tokens a second"))


def mixed(records: Sequence[Record]) -> str:
    measured, http = last(of_8b(records), "mixed"), last(of_8b(records), "mixed_http")
    rows = []
    if measured:
        rate = measured["output_throughput"]
        rows.append(Bar("numbatch, in process", rate, 0, number(rate), peers.MIXED_BAR))
    if http:
        rate = http["output_throughput"]
        share = f"{100 * rate / measured['output_throughput']:.0f} % of it" if measured else ""
        rows.append(Bar("numbatch, over HTTP", rate, 0, number(rate), note=share))
    rows += [Bar(name, rate, PEER_COLOURS[name], number(rate)) for name, rate in peers.MIXED.items()]
    words = "512 requests of mixed lengths (202,806 prompt and 94,221 answer tokens), all sent at once; output tokens a second."
    return section("Mixed workload", words + missing(measured), bars(rows, "output tokens a second", "output tokens a second"))


def latency(records: Sequence[Record]) -> str:
    names = {"ttft": "first token", "tpot": "per token", "itl": "between tokens", "e2el": "whole answer"}
    rows = []
    for name, words in names.items():
        for key, where, colour in (("mixed", "in process", 0), ("mixed_http", "HTTP", 1)):
            found = last(of_8b(records), key) or {}
            values = [(f"p{p}", found.get(f"p{p}_{name}_ms", 0.0)) for p in (50, 90, 99)]
            if all(value > 0 for _, value in values):
                rows.append(Range(f"{words}, {where}", values, colour))
    if not rows:
        return ""
    text = "Milliseconds in the mixed workload, where 512 requests arrive in one moment: the time to the first token is mostly waiting."
    return section("Latency", text, ranges(rows, "latency percentiles", "ms"))


def w4(records: Sequence[Record]) -> str:
    ours = {int(m): us for m, us in latest([r for r in records if on_gpu(r)], "w4_layer_us").items()}
    bytes_s, flop_s = ceilings(records)
    products = sum(n * k for n, k in peers.PRODUCTS.values())
    floor = {m: max(products * W4_BYTES / bytes_s, 2 * m * products / flop_s) * 1e6 for m in peers.W4_BARS}
    series = [Series("hardware", list(floor.items()), 6, "bound")]
    series += [Series(name, list(us.items()), n) for n, (name, us) in enumerate(peers.W4_LAYER.items(), 1)]
    if ours:
        series.append(Series("numbatch", sorted(ours.items()), 0, "ours"))
    marlin, rows = peers.W4_LAYER["Marlin"], []
    for m, bar in peers.W4_BARS.items():
        if m in ours:
            us, share = ours[m], f"{100 * floor[m] / ours[m]:.0f} %"
            rows.append([str(m), number(us), number(bar), verdict(us, bar, True), f"{marlin[m] / us:.2f} x", share])
    words = "Microseconds of the four 4-bit products of one Llama-3.1-8B layer, against the number of rows; lower is better."
    head = ["rows", "us", "bar", "", "as fast as Marlin", "of the hardware's bound"]
    return section(
        "4-bit products", words + missing(ours), lines(series, "rows", "microseconds a layer"), table(head, rows) if rows else ""
    )


def attention(records: Sequence[Record]) -> str:
    ours = {r["case"]: r for r in kernel_rows(records) if r["op"] == "decode attention"}
    rows = []
    for (count, context), us in peers.DECODE_ATTENTION.items():
        case = f"{count} x {context:,}"
        if case in ours:
            mine, bar = ours[case]["us"], peers.DECODE_ATTENTION_BARS[count, context]
            rows.append(Bar(case, mine, 0, number(mine), bar, f"{us / mine:.2f} x as fast", gap=True))
        rows.append(Bar(f"FlashAttention-3, {case}", us, 1, number(us)))
    words = "Microseconds for paged decode attention of one layer (32 heads, 8 KV heads of 128, 16-bit): sequences x context."
    return section("Decode attention", words + missing(ours), bars(rows, "microseconds", "microseconds"))


def kernel_rows(records: Sequence[Record]) -> list[Record]:
    """The rows of the card's kernels, each (operation, case) once, its last measurement."""
    rows: dict[tuple[str, str], Record] = {}
    for record in records:
        if record.get("bench") == "kernels" and on_gpu(record):
            rows |= {(row["op"], row["case"]): row for row in record["rows"]}
    return list(rows.values())


def efficiency(records: Sequence[Record]) -> str:
    rows = [r for r in kernel_rows(records) if r.get("percent")]
    if not rows:
        return ""
    bytes_s, flop_s = ceilings(records)
    drawn = [
        Bar(f"{r['op']} {r['case']}", r["percent"], 1 if r["of"] == "read" else 3, f"{r['percent']:.0f} %", note=f"{number(r['us'])} us")
        for r in rows
        if r["us"] >= 2
    ]
    head = ["kernel", "us", "GB/s", "TFLOP/s", "% of ceiling", "error"]
    cells = []
    for r in rows:
        error = "" if r.get("error") is None else f"{r['error']:.1e}"
        rates = [number(r["us"]), number(r["gb_s"]), number(r["gflop_s"] / 1e3), f"{r['percent']:.0f} ({r['of']})"]
        cells.append([escape(f"{r['op']} {r['case']}"), *rates, error])
    words = f"Percent of the ceiling that is nearer, both measured in the same run: {bytes_s / 1e12:.2f} TB/s read (blue) and "
    words += f"{flop_s / 1e12:.0f} TFLOP/s of a dense product (violet). Kernels under 2 us are left out of the drawing: they are latency."
    chart = bars(drawn, "percent of the ceiling", "%", 100) if drawn else ""
    return section("How near the kernels are to the card", words, chart, folded("all figures", table(head, cells)))


def start(records: Sequence[Record]) -> str:
    rows = []
    for record in of_8b(records):
        if record.get("bench") == "served" and record.get("ready_s"):
            kind = "cold" if record.get("cold") else "warm"
            words = {"warm": "numbatch, kernels cached", "cold": "numbatch, no kernel cached"}[kind]
            bar = Bar(words, record["ready_s"], 0, number(record["ready_s"]), peers.READY_BARS_S[kind])
            rows = [r for r in rows if r.label != words] + [bar]
    ours = list(rows)
    rows += [Bar(name, seconds, PEER_COLOURS[name], number(seconds)) for name, seconds in peers.START_S.items()]
    words = "Seconds from the command to the first token that a client has in hand, checkpoint in the page cache." + missing(ours)
    return section("Ready", words, bars(rows, "seconds until ready", "seconds"))


def busy(records: Sequence[Record]) -> str:
    found = {r["rows"]: r for r in of_8b(records) if r.get("bench") == "profile" and r.get("device") == "card"}
    if not found:
        return ""
    rows, details = [], ""
    for n, r in sorted(found.items()):
        percent, label = 100 * r["busy_share"], f"{n} sequence{'s' if n > 1 else ''}"
        rows.append(Bar(label, percent, 0, f"{percent:.1f} %", 100 * peers.BUSY_BAR))
        cells = [[k["name"][:80], number(k["us_per_step"]), number(k["calls_per_step"]), f"{100 * k['share']:.1f} %"] for k in r["top"]]
        head = ["kernel", "us a step", "launches", "share"]
        details += f"<h3>{label}</h3>" + table(head, [[escape(cell) for cell in row] for row in cells])
    words = "Share of the time between decode steps in which at least one kernel or copy ran, under the profiler (which costs some)."
    return section("The card is busy", words, bars(rows, "percent busy", "%", 100), folded("what the time went to", details))


# -- the host -----------------------------------------------------------------------------------------------------------


def llamacpp(records: Sequence[Record]) -> str:
    found = next((r for r in reversed(records) if "ratios" in r and "llamacpp" in r), None)
    if found is None:
        return ""
    q4_0: Record = last(records, "llamacpp_q4_0") or {}
    cells = ("prompt_512", "decode_1", "decode_8", "decode_16", "http_8")
    labels = ("prompt of 512", "decode, 1", "decode, 8", "decode, 16", "HTTP, 8 clients")
    rows = []
    for cell, label in zip(cells, labels, strict=True):
        ours, ratio = found["numbatch"][cell], f"{found['ratios'][cell]:.2f} x"
        rows.append(Bar(f"{label}: numbatch", ours, 0, number(ours), note=ratio, gap=True))
        rows.append(Bar("llama.cpp, Q4_1", found["llamacpp"][cell], 1, number(found["llamacpp"][cell])))
        if cell in q4_0:
            rows.append(Bar("llama.cpp, its own Q4_0", q4_0[cell], 2, number(q4_0[cell])))
    text = f"SmolLM2-135M on {machine_words(found)}, tokens a second, medians; both engines with the same file and threads, in turn."
    return section("Beside llama.cpp", text, bars(rows, "tokens a second", "tokens a second"))


def delivery(records: Sequence[Record]) -> str:
    found = {(r["engine"], r["streams"]): r for r in records if "token_events_per_s" in r}
    rows = []
    for (engine, streams), r in sorted(found.items()):
        rows.append(Bar(f"{streams} streams, {engine.split('.')[0]}", r["token_events_per_s"], 0, number(r["token_events_per_s"])))
    if not rows:
        return ""
    text = "Token events a second from the engine to the sockets of streaming clients, one server process."
    return section("Delivery", text, bars(rows, "events a second", "events a second"))


def scheduler(records: Sequence[Record]) -> str:
    p50, p99 = latest(records, "plan_apply_us_p50"), latest(records, "plan_apply_us_p99")
    if not p50:
        return ""
    rows = [Range(f"{n} sequences", [("p50", p50[n]), ("p99", p99[n])], 0) for n in sorted(p50, key=int)]
    return section("Scheduler", "Microseconds of planning and applying one decode step.", ranges(rows, "scheduler time", "us"))


def machine_words(record: Record) -> str:
    machine = record.get("machine", {})
    card = machine.get("gpus") or []
    host = f"{machine.get('processor', 'an unnamed processor')}, {machine.get('cores', '?')} cores"
    return f"{card[0]['name']} (driver {card[0]['driver_version']}), {host}" if card else host


# -- the page -----------------------------------------------------------------------------------------------------------

CARD: tuple[Callable[[Sequence[Record]], str], ...] = (decode, crossover, w4, attention, prefill, mixed, latency, busy, start, efficiency)
HOST: tuple[Callable[[Sequence[Record]], str], ...] = (llamacpp, delivery, scheduler)


def tiles(records: Sequence[Record]) -> Iterator[str]:
    ours, eight = latest(of_8b(records), "decode_tok_s"), of_8b(records)
    for n in ("1", "32", "256"):
        if n in ours:
            best = max(rates[int(n)] for rates in peers.DECODE.values())
            yield tile(f"{number(ours[n])} tok/s", f"decoding {n} at once on one card, {ours[n] / best:.2f} x the best peer")
    if measured := last(eight, "mixed"):
        rate = measured["output_throughput"]
        yield tile(f"{number(rate)} tok/s", f"mixed workload, {rate / max(peers.MIXED.values()):.2f} x the best peer")
    compared = next((r for r in reversed(records) if "ratios" in r), None)
    if compared is not None:
        yield tile(f"{compared['ratios']['decode_8']:.1f} x", "llama.cpp's speed on the CPU, 8 sequences decoding, the same file")


def page(records: Sequence[Record]) -> str:
    """The whole HTML. Parts without a result of ours are drawn with the peers' alone where there are any."""
    machines = dict.fromkeys(machine_words(r) for r in records if r.get("machine"))
    body = ["<p>Medians of several runs unless a text says otherwise. Raw results are in bench/results, commands in bench/LOG.md.</p>"]
    body.append(f'<div class="tiles">{"".join(tiles(records))}</div>')
    body.append('<div class="part">On one NVIDIA H200</div>')
    body += [part(records) for part in CARD]
    if any(host := [part(records) for part in HOST]):
        body += ['<div class="part">On the processor</div>', *host]
    names = "; ".join(machines) or "none named"
    others = "vLLM 0.24, LMDeploy 0.18, Marlin, FlashAttention-3 and cuBLAS on one H200"
    body.append(f"<footer>Machines: {escape(names)}. Peers: {others}.</footer>")
    return PAGE.format(style=STYLE, body="\n".join(body))


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    p.add_argument("results", nargs="?", default=str(Path(__file__).parent / "results"), help="folder of *.json and *.jsonl")
    p.add_argument("--out", default="report.html", help="the page to write")
    args = p.parse_args(argv)
    try:
        records = read(Path(args.results))
        if not records:
            raise ValueError(f"{args.results} holds no results")
        Path(args.out).write_text(page(records), encoding="utf-8")
    except (ValueError, KeyError, OSError) as error:
        print(f"bench.report: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{len(records)} results -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
