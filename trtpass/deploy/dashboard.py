"""A Grafana dashboard over the metrics of deployed models and the server's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtpass.serving.metrics import ARRAYS, TEXT, Family

COLUMNS, WIDTH, HEIGHT = 3, 8, 7
MODEL = '{model=~"$model"}'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"seconds": "s", "bytes": "bytes", "fraction": "percentunit"}
SERVER = {  # Triton's own: title and expression
    "Requests answered": f"sum by (model) (rate(nv_inference_request_success{MODEL}[1m]))",
    "Requests failed": f"sum by (model, reason) (rate(nv_inference_request_failure{MODEL}[1m]))",
    "Waiting in the server's queue": f"sum by (model) (nv_inference_pending_request_count{MODEL})",
}


def dashboard(note: str) -> dict[str, Any]:
    """A dashboard that Grafana imports; ``note`` says who wrote it.

    One panel a metric: rates of counters, values of gauges, the median and the 95th and 99th percentile of histograms.
    """
    panels: list[dict[str, Any]] = []
    for row, group in (("Text models", _panels(TEXT)), ("Models of arrays", _panels(ARRAYS)), ("Server", _server())):
        _place(panels, row, group)
    return {
        "description": f"Models in Triton Inference Server; {note}",
        "title": "trtpass", "uid": "trtpass-serving", "schemaVersion": 39, "version": 1, "editable": True,
        "tags": ["triton", "trtpass"], "timezone": "browser", "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            {
                "name": "model", "label": "Model", "type": "query", "datasource": SOURCE, "refresh": 2,
                "query": "label_values(nv_inference_request_success, model)", "includeAll": True, "multi": True,
                "current": {"text": "All", "value": "$__all"},
            },
        ]},
        "panels": panels,
    }  # fmt: skip


def _panels(families: Mapping[str, Family]) -> list[dict[str, Any]]:
    return [_panel(family.about, _targets(name, family), _unit(name, family)) for name, family in families.items()]


def _server() -> list[dict[str, Any]]:
    return [
        _panel(title, [(expression, "{{model}} {{reason}}" if "reason" in expression else "{{model}}")], "short")
        for title, expression in SERVER.items()
    ]


def _targets(name: str, family: Family) -> list[tuple[str, str]]:
    """Expressions and legends."""
    by = ", ".join(["model", family.label] if family.label else ["model"])
    legend = "{{model}}" + (f" {{{{{family.label}}}}}" if family.label else "")
    if family.kind == "counter":
        return [(f"sum by ({by}) (rate({name}{MODEL}[1m]))", legend)]
    if family.kind == "gauge":
        return [(f"{name}{MODEL}", legend)]
    buckets = f"sum by (model, le) (rate({name}_bucket{MODEL}[5m]))"
    return [(f"histogram_quantile({q}, {buckets})", f"{legend} p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)]


def _unit(name: str, family: Family) -> str:
    if family.kind == "counter":
        return "cps"
    return next((unit for word, unit in UNITS.items() if name.endswith(word)), "short")


def _panel(title: str, targets: list[tuple[str, str]], unit: str) -> dict[str, Any]:
    return {
        "type": "timeseries", "title": title, "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + i), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
            for i, (expression, legend) in enumerate(targets)
        ],
    }  # fmt: skip


def _place(panels: list[dict[str, Any]], title: str, group: list[dict[str, Any]]) -> None:
    """Append a row of the dashboard, then its panels on a grid."""
    top = max((p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels), default=0)
    panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                   "id": len(panels) + 1, "gridPos": {"x": 0, "y": top, "w": COLUMNS * WIDTH, "h": 1}})  # fmt: skip
    for i, panel in enumerate(group):
        place = {"x": i % COLUMNS * WIDTH, "y": top + 1 + i // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
        panels.append({**panel, "id": len(panels) + 1, "gridPos": place})
