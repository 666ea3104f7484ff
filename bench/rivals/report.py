"""From the measured columns to a table and a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from limits import least_seconds
from make_checkpoint import SHAPES
from protocol import CONTEXT

KINDS = ("decode 1", "decode 8", "decode 16", "prefill 512", "prefill 2048")
START, OURS = "start", "maestrale"
QUIET = 0.15  # cores: more than that of other work makes a column doubtful
TOKENS = {kind: int(kind.split()[1]) for kind in KINDS}  # in one measured piece of work


def ratios(entry: dict[str, Any]) -> list[float]:
    """Of neighbours in time: above 1, ours was faster."""
    return sorted(b / a for a, b in zip(entry["ours"], entry["theirs"], strict=True))


def write_report(entries: dict[str, Any], folder: Path) -> None:
    """rivals.md and rivals.png; nothing where nothing has been measured."""
    rows = collect(entries)
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rivals.md").write_text(table(entries, rows))
        picture(rows, folder / "rivals.png")


Rows = dict[tuple[str, str, str], dict[str, dict[str, Any]]]


def collect(entries: dict[str, Any]) -> Rows:
    """(shape, bits, kind) → rival → entry, in the order of the issue's table."""
    rows: Rows = {}
    for shape in SHAPES:
        for bits in ("int4", "int8", "bf16"):
            for kind in (*KINDS, START):
                start, end = f"{shape} {bits} ", f" {kind}"
                found = {
                    key.removeprefix(start).removesuffix(end): entry
                    for key, entry in entries.items()
                    if key.startswith(start) and key.endswith(end)
                }
                if found:
                    rows[shape, bits, kind] = found
    return rows


def table(entries: dict[str, Any], rows: Rows) -> str:
    machine = entries["machine"]
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    rates = ", ".join(f"{bits} {rate / 1e12:.2f}" for bits, rate in machine["operations_per_second"].items())
    commits = sorted({entry["commit"] for found in rows.values() for entry in found.values()})
    lines = [
        "# Maestrale beside its rivals",
        "",
        f"{machine['processor']}, {machine['threads']} threads. Limits measured here: read "
        f"{machine['read_bytes_per_second'] / 1e9:.1f} GB/s; multiply, in TOP/s: {rates}.",
        "S: 125 M parameters. D: 2.0 G, the layers of Mistral 7B. M: 2.4 G, 2 of 8 experts a token. All weights of a "
        "row have the same bits on both sides (int4: groups of 32). Each rival took turns with ours, repeat by repeat; "
        "tokens/s are medians of what was measured, and in brackets stands the median (lowest … highest) of the ratios "
        f"of neighbours: **above 1, Maestrale is faster**. Decoding: after {CONTEXT} tokens of each sequence. Limit: "
        "the share that ours reaches of what reading or multiplying at the rates above allows, whichever is less; part "
        "of S stays in the L3 cache, which is faster than that.",
        f"Maestrale at {', '.join(commits)}. †: other work kept more than {QUIET} of a core busy meanwhile.",
        "",
        f"| model, weights | | Maestrale | limit | {' | '.join(names)} |",
        f"|---|---|---:|---:|{'---:|' * len(names)}",
    ]
    for (shape, bits, kind), found in rows.items():
        if kind == START:
            continue
        ours = [seconds for entry in found.values() for seconds in entry["ours"]]
        share = least_seconds(SHAPES[shape], kind, bits, machine) / median(ours)
        cells = [f"{TOKENS[kind] / median(ours):,.1f}", f"{share:.0%}"]
        cells += [speed_cell(found[name], TOKENS[kind]) if name in found else "–" for name in names]
        lines.append(f"| {shape} {bits} | {kind} | {' | '.join(cells)} |")
    starts = {key: found for key, found in rows.items() if key[2] == START}
    if starts:
        lines += [
            "",
            "Start: seconds from the process to the first token after five, of that to the end of loading, and the "
            "most memory once 512 tokens have been read (mapped weights included).",
            "",
            "| model, weights | side | first token, s | loaded, s | peak, GiB | ratio of first tokens |",
            "|---|---|---:|---:|---:|---:|",
        ]
    for (shape, bits, _), found in starts.items():
        for number, (name, entry) in enumerate(found.items()):
            ours, theirs = entry["both"][OURS], entry["both"][name]
            for side, facts in ([("Maestrale", ours)] if number == 0 else []) + [(name, theirs)]:
                cells = [f"{median(facts[what]):.2f}" for what in ("first_token", "load")]
                cells.append(f"{median(facts['peak']) / 2**30:.2f}")
                ratio = (
                    ""
                    if side == "Maestrale"
                    else f"{median(ratios(entry)):.2f}" + ("†" if entry["others"] > QUIET else "")
                )
                lines.append(f"| {shape} {bits} | {side} | {' | '.join(cells)} | {ratio} |")
    lines += ["", "The rivals, with their settings:", ""]
    for name in names:
        for fact in dict.fromkeys(
            f"{found[name]['version']}: {found[name]['settings']}" for found in rows.values() if name in found
        ):
            lines.append(f"- {name}: {fact}")
    without: dict[str, list[str]] = {}
    for key, entry in entries.items():
        if "without" in entry:
            without.setdefault(entry["without"], []).append(key)
    lines += ["", "Not measured, and why:", ""] if without else []
    lines += [f"- {', '.join(keys)}: {reason}" for reason, keys in without.items()]
    return "\n".join(lines) + "\n"


def speed_cell(entry: dict[str, Any], tokens: int) -> str:
    low, *_, high = values = ratios(entry)
    doubt = "†" if entry["others"] > QUIET else ""
    return f"{tokens / median(entry['theirs']):,.1f} (**{median(values):.2f}**{doubt}, {low:.2f} … {high:.2f})"


def picture(rows: Rows, path: Path) -> None:
    """A bar for each column: the ratio to the fastest rival at the same bits."""
    from matplotlib.figure import Figure

    kept = [(key, found) for key, found in rows.items() if key[2] != START]
    models = list(dict.fromkeys(key[0] for key, _ in kept))
    figure = Figure(figsize=(11, 1.2 + 0.26 * max(sum(key[0] == m for key, _ in kept) for m in models)), dpi=130)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        bars = []
        for (shape, bits, kind), found in kept:
            if shape == model:
                name, ratio = min(((n, median(ratios(e))) for n, e in found.items()), key=lambda pair: pair[1])
                bars.append((f"{bits} {kind}", ratio, name))
        places = range(len(bars))[::-1]
        axes.barh(places, [bar[1] for bar in bars], color=["#2a7f62" if bar[1] >= 1 else "#b5483a" for bar in bars])
        for place, (_, ratio, name) in zip(places, bars, strict=True):
            axes.text(ratio, place, f" {ratio:.2f} {name}", va="center", fontsize=7)
        axes.set_yticks(places, [bar[0] for bar in bars], fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, 1.5 * max(bar[1] for bar in bars))
        axes.set_title(f"{model}: speed ÷ the fastest rival's, same bits", fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
