"""What `lite ladder` says: the table for a terminal, the record for programs, one HTML page with the plots inside.

The page is bench/report.py's: inline SVG, no script, nothing fetched, light and dark. A rung that did not run has its reason
where its numbers would be, and no mark in a plot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from bench.ladder import BATCHES, Advice, Row
from bench.report import STYLE, section
from bench.svg import Bar, apart, bars, escape, number, ticks

GIB = 2**30
HEAD = ("rung", "perplexity", "change %", "95 %", "KL", "top-1 %", "weights GiB", "KV tokens", *(f"tok/s x{n}" for n in BATCHES), "TTFT ms")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>{body}</main></body></html>
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 150, 30, 52  # of the scatter plot
SMALLEST, LARGEST = 6.0, 22.0  # radius of a dot
LABEL_GAP = 15.0
BUSY = 0.1  # share of the processor that others took, from which on it is said
OWN_STYLE = (
    "main { max-width: 1060px; } table { font-size: 13px; } th, td { white-space: nowrap; } "
    "td[colspan] { white-space: normal; text-align: left; } p:first-of-type { color: var(--ink); }"
)


def cells(row: Row) -> list[str]:
    """A row that ran, as the columns of HEAD."""
    apart = row.apart
    distances = ["", "", "", ""]
    if apart is not None:
        interval = f"{100 * apart.change_low:+.2f} .. {100 * apart.change_high:+.2f}"
        distances = [f"{100 * apart.perplexity_change:+.2f}", interval, f"{apart.kl_mean:.4f}", f"{100 * apart.same_top1:.1f}"]
    rates = [f"{row.decode[n]:,.0f}" if n in row.decode else "" for n in BATCHES]
    memory = [f"{row.weight_bytes / GIB:.3f}", f"{row.kv_tokens:,}"]
    return [row.rung.name, f"{row.perplexity:.3f}", *distances, *memory, *rates, f"{1000 * row.ttft_s:,.0f}"]


def table(rows: Sequence[Row]) -> str:
    """For a terminal."""
    lines = [list(HEAD)] + [cells(row) for row in rows if row.ran]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    widths[0] = max(widths[0], *(len(row.rung.name) for row in rows))
    out = []
    filled = iter(lines[1:])
    for line in [lines[0], *((next(filled) if row.ran else [row.rung.name, f"not run: {row.reason}"]) for row in rows)]:
        if len(line) == 2:
            out.append(f"{line[0]:<{widths[0]}}  {line[1]}")
        else:
            out.append(
                "  ".join(
                    [f"{line[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))]
                ).rstrip()
            )
    return "\n".join(out)


def record(rows: Sequence[Row], advice: Advice, about: dict[str, Any]) -> dict[str, Any]:
    """One JSON object: finite numbers only."""
    out = dict(about) | {"bench": "ladder", "rungs": [_plain(row) for row in rows]}
    return out | {"recommended": advice.row.rung.name if advice.row else None, "because": list(advice.sentences)}


def _plain(row: Row) -> dict[str, Any]:
    found = {"rung": row.rung.name, "path": row.path}
    if not row.ran:
        return found | {"not_run": row.reason}
    values = dataclasses.asdict(row)
    for name in ("rung", "path", "reason"):
        values.pop(name)
    values["decode"] = {str(n): rate for n, rate in row.decode.items()}
    if row.apart is not None:
        values["apart"] = {name: value for name, value in dataclasses.asdict(row.apart).items() if math.isfinite(value)}
    return found | {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}


# --- the page -----------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], advice: Advice, about: dict[str, Any], max_loss: float) -> str:
    ran = [row for row in rows if row.ran]
    title = f"The ladder of {about['model']}"
    where = f"{about['data']}: {about['tokens']:,} tokens, windows of {about['window']}, stride {about['stride']}. {machine(about)}"
    parts = [f"<p>{escape(where)}</p>"]
    why_not = "".join(f"<p>{escape(sentence)}</p>" for sentence in advice.sentences[1:])
    parts.append(section("Which rung", advice.sentences[0], why_not, _html_table(rows, advice)))
    if any(row.apart is not None for row in ran):
        text = "Down is nearer to the first rung, right is faster, a larger dot has room for more K/V. The dashed line is what may be lost."
        parts.append(section("Quality against speed", text, scatter(ran, advice, max_loss)))
    for name, unit, of in _charts(ran):
        parts.append(section(name, unit, bars([_bar(row, of, advice) for row in ran], name, unit)))
    return PAGE.format(title=escape(title), style=STYLE + OWN_STYLE, body="".join(parts))


def machine(about: dict[str, Any]) -> str:
    """Where it was measured, in words, and whether it had to share."""
    found = about["machine"]
    cards = [str(card.get("name", card)) if isinstance(card, dict) else str(card) for card in found.get("gpus", [])]
    words = ", ".join([*cards, f"{found.get('processor', 'CPU')} with {found.get('cores', '?')} cores"])
    others = about.get("others_cpu_share") or 0
    return words + (
        f"; other programs took {100 * others:.0f} % of the processor meanwhile: speeds, and advice that rests on them, are rough."
        if others > BUSY
        else "."
    )


def _charts(ran: Sequence[Row]) -> list[tuple[str, str, Any]]:
    out: list[tuple[str, str, Any]] = [("Decoding, one sequence", "tokens a second", lambda row: row.decode.get(BATCHES[0], 0.0))]
    out.append((f"Decoding, {BATCHES[-1]} sequences", "tokens a second, together", lambda row: row.decode.get(BATCHES[-1], 0.0)))
    out.append(("Weights", "GiB resident", lambda row: row.weight_bytes / GIB))
    out.append(("KV cache", "tokens that fit", lambda row: float(row.kv_tokens)))
    out.append(("First token", "milliseconds after a prompt of 512", lambda row: 1000 * row.ttft_s))
    return [chart for chart in out if any(chart[2](row) > 0 for row in ran)]


def _bar(row: Row, of: Any, advice: Advice) -> Bar:
    value = of(row)
    return Bar(row.rung.name, value, 0 if row is advice.row else 1, number(value))


def _html_table(rows: Sequence[Row], advice: Advice) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
    body = []
    for row in rows:
        if row.ran:
            kind = ' class="good"' if row is advice.row else ""
            body.append("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in cells(row)) + "</tr>")
        else:
            reason = f'<td colspan="{len(HEAD) - 1}">not run: {escape(row.reason)}</td>'
            body.append(f"<tr><td>{escape(row.rung.name)}</td>{reason}</tr>")
    return f"<table><tr>{top}</tr>{''.join(body)}</table>"


def scatter(ran: Sequence[Row], advice: Advice, max_loss: float) -> str:
    """x: decoding of one sequence; y: change of perplexity with its interval; area: KV tokens."""
    losses = [_losses(row) for row in ran]
    xs, ys = [row.decode.get(BATCHES[0], 0.0) for row in ran], [y for three in losses for y in three]
    low, high = min(0.0, *ys), max(100 * max_loss, *ys) * 1.1 + 0.01
    low -= (high - low) * 0.06  # labels of what lies on the axis stand above its numbers
    right = max(xs) * 1.12 or 1.0
    most = max(row.kv_tokens for row in ran) or 1

    def x(value: float) -> float:
        return LEFT + value / right * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = [f'<text x="{LEFT}" y="14">perplexity, % above {escape(ran[0].rung.name)}</text>']
    for tick in ticks(low, high, False):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(0, right, False):
        out.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">tokens a second, one sequence</text>')
    allowed = y(100 * max_loss)
    out.append(f'<line class="line bound s6" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{allowed:.1f}" y2="{allowed:.1f}"/>')
    labels = apart([y(mid) for _, mid, _ in losses], LABEL_GAP)
    for row, at, (below, mid, above), label_at in zip(ran, xs, losses, labels, strict=True):
        colour = 0 if row is advice.row else 1
        radius = max(SMALLEST, LARGEST * math.sqrt(row.kv_tokens / most))
        tip = f"{row.rung.name}: {mid:+.2f} %, {number(at)} tokens a second, room for {row.kv_tokens:,} tokens"
        out.append(f'<line class="line s{colour}" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(below):.1f}" y2="{y(above):.1f}"/>')
        dot = f'<circle class="f{colour} halo" fill-opacity=".7" cx="{x(at):.1f}" cy="{y(mid):.1f}" r="{radius:.1f}">'
        out.append(f"{dot}<title>{escape(tip)}</title></circle>")
        strong = ' class="strong"' if colour == 0 else ""
        out.append(f'<text{strong} x="{x(at) + radius + 5:.1f}" y="{label_at + 4:.1f}">{escape(row.rung.name)}</text>')
    label = "change of perplexity against decoding speed"
    return "\n".join([f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">', *out, "</svg>"])


def _losses(row: Row) -> tuple[float, float, float]:
    """Low, mid and high, percent; an interval that nothing bounds is not drawn."""
    if row.apart is None:
        return 0.0, 0.0, 0.0
    mid = 100 * row.apart.perplexity_change
    low, high = 100 * row.apart.change_low, 100 * row.apart.change_high
    return (low if math.isfinite(low) else mid), mid, (high if math.isfinite(high) else mid)
