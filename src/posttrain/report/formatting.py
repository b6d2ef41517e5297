"""Write numbers and results as text, for a reader who has not met a p-value before."""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from markupsafe import Markup, escape

from posttrain.report.load import TaskRow

_GAP = "\N{NO-BREAK SPACE}"


def format_number(value: Any, digits: int = 4) -> str:
    """Write a number with four significant digits, small ones as 2e−5; "–" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    value += 0.0  # turns -0.0 into 0.0
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def format_fixed(value: float, digits: int, sign: bool = False) -> str:
    """Write a number with `digits` decimals, halves rounded away from zero.

    0.9025 becomes 0.903 and 90.3%. Binary rounding would make these differ, and halves are common among shares of 400
    items.

    Args:
        value: The number.
        digits: Decimals to keep.
        sign: Whether a positive number gets a plus sign.
    """
    if not math.isfinite(value):
        return format_number(value)
    exact = Decimal(f"{value:.12g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{exact:{'+' if sign else ''},}".replace("-", "−")


def format_score(value: Any, metric: str, sign: bool = False) -> str:
    """Write a value as tables show it: three decimals of an accuracy or a score, two of a perplexity, one of a speed.

    Args:
        value: The value; what is no number becomes "–".
        metric: accuracy, score, perplexity or tokens/s.
        sign: Whether a positive number gets a plus sign.
    """
    if not isinstance(value, int | float):
        return "–"
    return format_fixed(value, {"perplexity": 2, "tokens/s": 1}.get(metric, 3), sign)


def format_percentage(share: float) -> str:
    """Write a share in percent, with one decimal below 10%."""
    return f"{format_fixed(100 * share, 1 if 0 < share < 0.1 else 0)}%"


def format_p(p: Any) -> str:
    """Write a p-value."""
    if not isinstance(p, int | float):
        return "–"
    return f"<{_GAP}0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def format_seconds(value: Any) -> str:
    """Write a duration in seconds, minutes or hours."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if value < 60:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if value < 600 else f"{minutes} min" if minutes < 120 else f"{value / 3600:.1f} h"


def chance_in_words(p: float) -> str:
    """Write a probability as "about N times in 100", 1,000 or 10,000."""
    if p < 1e-4:
        return "less than once in 10,000 times"
    if p > 0.995:
        return "nearly always"
    base = 10_000 if p < 1e-3 else 1000 if p < 0.0095 else 100
    times = max(1, round(p * base))
    return f"about {'once' if times == 1 else f'{times} times'} in {base:,}"


def verdict(row: TaskRow) -> str:
    """Describe a task before and after in sentences: the change, its interval, and whether it may be chance."""
    c, before, after = row.comparison, row.before, row.after
    if c is None or before is None or after is None:
        side, name = (before, "Before training") if before is not None else (after, "After training")
        when = f"{name}, {row.metric} is {format_share(side or {}, row)}. " if side else ""
        return f"{when}The other side has not been measured, so the change is not known yet."
    change, accuracy = float(c["difference"]), row.metric == "accuracy"
    up = "did not change, at" if change == 0 else "rose from" if change > 0 else "fell from"
    to = "" if change == 0 else f" to {format_share(after, row)}"
    higher = row.metric != "perplexity"
    note = "" if higher else " (lower is better)"
    better = change != 0 and (change > 0) == higher
    scale, unit, digits = (100, " points", 1) if accuracy else (1, "", 3 if higher else 2)
    size, low, high = (format_fixed(scale * float(c[k]), digits, sign=True) for k in ("difference", "low", "high"))
    if row.kind == "sample":
        moved = f"Of {row.n:,} questions, {c['gained']:,} are answered right more often, {c['lost']:,} less often. "
        what = "a change at least this large"
    elif row.kind == "behaviour" or (row.kind == "score" and "wins" not in c):
        moved = f"Of {row.n:,} items, {c['gained']:,} have a higher number and {c['lost']:,} a lower one. "
        what = "a change at least this large"
    elif row.kind == "score":
        won, least, most = (format_fixed(100 * float(c["wins"][k]), 1) for k in ("value", "low", "high"))
        moved = (
            f"{c['gained']:,} of {row.n:,} prompts got a higher score and {c['lost']:,} a lower one; an answer after "
        )
        moved += f"training beats one from before in {won}% (95% interval {least}% to {most}%). "
        what = "a change at least this large"
    elif accuracy:
        moved = f"Of {row.n:,} items, {c['gained']:,} went from wrong to right and {c['lost']:,} from right to wrong. "
        what = "a split at least this uneven"
    else:
        moved = f"{c['gained']:,} of {row.n:,} items got easier and {c['lost']:,} harder. "
        what = "a change at least this large"
    p = float(c["p_value"])
    equals = _GAP if p < 1e-4 else f"{_GAP}={_GAP}"
    if p < 0.05 and row.kind == "behaviour":
        end = ". Chance is an unlikely explanation."
    elif p < 0.05:
        end = f". Chance is an unlikely explanation: the model got {'better' if better else 'worse'} at this task."
    else:
        end = ", so this may well be chance; more items would tell."
    return (
        f"{row.metric.capitalize()}{note} {up} {format_share(before, row)}{to} "
        f"({size}{unit}, 95% interval {low} to {high}). {moved}"
        f"If training had made no difference, {what} would occur {chance_in_words(p)} (p{equals}{format_p(p)}){end}"
    )


def format_share(side: dict[str, Any], row: TaskRow) -> str:
    """Write a value as sentences show it: accuracy in percent."""
    value = float(side.get("value", math.nan))
    return f"{format_fixed(100 * value, 1)}%" if row.metric == "accuracy" else format_score(value, row.metric)


_KEY = re.compile(r"^(\s*(?:- +)*)([\w.\-]+)(:)(\s.*)?$")
_LITERAL = re.compile(r"^(true|false|null|~|[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?)$", re.IGNORECASE)


def yaml_markup(text: str) -> Markup:
    """Return YAML as HTML with keys, literals and comments in spans; every character of the text is escaped."""

    def value(part: str) -> Markup:
        if not part.lstrip().startswith(("#", "'", '"')) and " #" in part:
            at = part.index(" #") + 1
            return value(part[:at]) + value(part[at:])
        stripped = part.strip()
        kind = "c" if stripped.startswith("#") else "n" if _LITERAL.match(stripped) else "s"
        return Markup('<span class="{}">{}</span>').format(f"y-{kind}", part) if stripped else escape(part)

    lines = []
    for line in text.splitlines():
        found = _KEY.match(line)
        if found:
            indent, key, colon, rest = found.groups()
            lines.append(Markup('{}<span class="y-k">{}</span>{}{}').format(indent, key, colon, value(rest or "")))
        else:
            dash = re.match(r"^\s*(?:- +)*", line)
            start = dash.end() if dash else 0
            lines.append(escape(line[:start]) + value(line[start:]))
    return Markup("\n").join(lines)


def plain_text(value: Any) -> str:
    """Return a prompt or answer as text; a list of messages becomes one paragraph a turn."""
    if isinstance(value, list):
        return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in value if isinstance(m, dict))
    return "" if value is None else str(value)
