"""
Report of a diagnosis: figures, numbers and a self-contained page that shows both.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sb3_mrq.diagnostics import measures, verdicts
from sb3_mrq.diagnostics import results as limits
from sb3_mrq.diagnostics.figures import ITEMS

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: #fff; color: #22262b;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .35rem; }
p { margin: .35rem 0; max-width: 46rem; }
.about { color: #5a6069; }
.verdict { border-left: .3rem solid; border-radius: .2rem; padding: .4rem 1rem; margin: .5rem 0; max-width: none; }
.verdict .level { float: right; font-size: .8rem; text-transform: uppercase; letter-spacing: .05em; }
.green { border-color: #1c7a3e; background: #eef7f0; }
.amber { border-color: #b7791f; background: #fdf6e7; }
.red { border-color: #b3261e; background: #fcefee; }
.grey { border-color: #8a8f98; background: #f4f5f6; }
.notes ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.notes { color: #5a6069; font-size: .95rem; }
img { display: block; width: 100%; height: auto; margin: .75rem 0; }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e3e5e8; font-weight: normal; }
th { color: #5a6069; }
th:first-child { text-align: left; color: inherit; }
footer { margin-top: 3rem; color: #5a6069; font-size: .85rem; }
"""

# Titles of the groups of numbers
_GROUPS = {
    "episodes": "Episodes",
    "model": "Linear model",
    "probe": "Linear probe of Q",
    "z_s": "State embedding z_s",
    "z_sa": "State-action embedding z_sa",
    "policy": "Policy",
    "map": "Map",
    "returns": "Predicted and realised return",
}


def _shown(value: float) -> str:
    """Format a number for display."""
    if math.isnan(value):
        return "n/a"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def thresholds() -> dict[str, Any]:
    """
    :return: limits beyond which an embedding is flagged, and limits of green and of amber
    """
    return {
        "variation_above": limits.CONSTANT,
        "effective_rank_from": limits.LOW_RANK,
        "dormant_share_up_to": limits.DORMANT_SHARE,
        "dormant_unit_deviation_up_to": measures.DORMANT,
        "norm_per_sqrt_unit_between": list(limits.UNIT_NORM),
        "tail_weight_up_to": limits.TAIL_WEIGHT,
        "reward_r2_from": list(verdicts.REWARD_R2),
        "embedding_r2_from": list(verdicts.EMBEDDING_R2),
        "linearity_r2_from": list(verdicts.LINEARITY_R2),
        "agreement_from": list(verdicts.AGREEMENT),
        "relative_bias_up_to": list(verdicts.RELATIVE_BIAS),
    }


def as_json(diagnosis: Any) -> dict[str, Any]:
    """
    :param diagnosis: the diagnosis
    :return: its numbers and flags in JSON types, None for undefined numbers
    """
    return {
        "environment": diagnosis.env_id,
        "num_timesteps": diagnosis.num_timesteps,
        "gamma": diagnosis.gamma,
        "reward_unit": diagnosis.reward_unit,
        "collapsed": diagnosis.collapsed,
        "flags": diagnosis.flags,
        "verdicts": [asdict(verdict) for verdict in diagnosis.verdicts],
        "notes": diagnosis.notes,
        "numbers": {name: value if math.isfinite(value) else None for name, value in diagnosis.numbers().items()},
        "thresholds": thresholds(),
    }


def _table(numbers: dict[str, float]) -> str:
    """
    :param numbers: numbers of a group by name; names that differ only in a final number share a row
    :return: HTML table
    """
    rows: dict[str, list[str]] = {}
    for name, value in numbers.items():
        stem, _, step = name.rpartition("_")
        rows.setdefault(stem if stem and step.isdigit() else name, []).append(_shown(value))
    width = max(map(len, rows.values()))
    lines = []
    if width > 1:
        heads = "".join(f'<th scope="col">{i + 1}</th>' for i in range(width))
        lines.append(f'<tr><th scope="col"></th>{heads}</tr>')
    for name, values in rows.items():
        cells = "".join(f"<td>{value}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def page(diagnosis: Any, images: dict[str, bytes]) -> str:
    """
    :param diagnosis: the diagnosis
    :param images: the figures as PNG, by name
    :return: a self-contained page in HTML
    """
    env_id = html.escape(diagnosis.env_id)

    def items(sentences: list[str]) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"

    judged = "".join(
        f'<p class="verdict {verdict.level}"><span class="level">{verdict.level}</span>'
        f"<strong>{html.escape(verdict.name)}.</strong> {html.escape(verdict.finding)} {html.escape(verdict.advice)}</p>"
        for verdict in diagnosis.verdicts
    )
    notes = f'<div class="notes">Notes:{items(diagnosis.notes)}</div>' if diagnosis.notes else ""

    sections = []
    for number, (name, item) in enumerate(ITEMS.items(), start=1):
        source = base64.b64encode(images[name]).decode()
        sections.append(
            f'<section id="{name}"><h2>{number}. {html.escape(item.title)}</h2><p>{html.escape(item.reading)}</p>'
            f'<img alt="{html.escape(item.title)}" src="data:image/png;base64,{source}"></section>'
        )
    groups: dict[str, dict[str, float]] = {}
    for full_name, value in diagnosis.numbers().items():
        group, _, name = full_name.partition("/")
        groups.setdefault(group, {})[name] = value
    tables = "".join(
        f"<div><h3>{html.escape(_GROUPS[group])}</h3>{_table(numbers)}</div>" for group, numbers in groups.items()
    )
    n = len(diagnosis.episode_returns)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>MR.Q on {env_id}: diagnosis</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Diagnosis of MR.Q on {env_id}</h1>
<p class="about">{diagnosis.num_timesteps:,} steps of training; {n} episode{"s" if n != 1 else ""} with
{int(diagnosis.episode_lengths.sum()):,} transitions, mean return {diagnosis.episode_returns.mean():.4g}
± {diagnosis.episode_returns.std():.3g}; discount factor {diagnosis.gamma:g}.</p>
{judged}
{notes}
{"".join(sections)}
<section id="numbers"><h2>All numbers</h2>
<p>Columns are steps ahead, or components; n/a means undefined. Values and returns are in units of the training rewards
({html.escape(diagnosis.reward_unit)}); the mean return of episodes is before normalisation.</p>
<div class="tables">{tables}</div></section>
<footer>Made by sb3_mrq.diagnostics. The same numbers are in diagnosis.json next to this page.</footer>
</body>
</html>
"""


def write(diagnosis: Any, folder: Path) -> Path:
    """
    :param diagnosis: the diagnosis
    :param folder: output folder for figures, numbers and page, created if it does not exist
    :return: path of the page
    """
    figures = diagnosis.figures()
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        images[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(images[name])
        figure.savefig(folder / f"{name}.svg", dpi=150, metadata={"Date": None})
    (folder / "diagnosis.json").write_text(json.dumps(as_json(diagnosis), indent=2, allow_nan=False) + "\n")
    path = folder / "index.html"
    path.write_text(page(diagnosis, images), encoding="utf-8")
    return path
