"""What `seqkern forecast` leaves on the disk."""

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from seqkern.data.series.interval import stamp_text
from seqkern.forecasting.methods import Network
from seqkern.forecasting.run import ForecastResult

METRICS = ("method", "column", "windows", "mae", "rmse", "coverage", "width")


def write_result(result: ForecastResult, folder: Path) -> None:
    """Write forecasts.csv, metrics.csv, config.json and model.safetensors into a folder."""
    header = ("series", "time", "column", "step", "forecast", "lower", "upper")
    _write_csv(folder / "forecasts.csv", header, _forecast_rows(result))
    rows = ([getattr(score, name) for name in METRICS] for score in result.scores)
    _write_csv(folder / "metrics.csv", METRICS, rows)
    text = json.dumps(_described(result), indent=1, ensure_ascii=False)
    (folder / "config.json").write_text(text, encoding="utf-8")
    tensors = {key: x.detach().cpu() for key, x in result.model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors))


def metrics_table(result: ForecastResult) -> str:
    """The scores as text, the model first."""
    o = result.options
    several = len(o.columns) > 1
    lines = [f"{'':26s}{'MAE':>12s}{'RMSE':>12s}{'coverage':>10s}{'interval width':>16s}"]
    for s in result.scores:
        name = f"{s.method}, {s.column}" if several else s.method
        lines.append(f"{name:26s}{s.mae:12.5g}{s.rmse:12.5g}{s.coverage:10.3f}{s.width:16.5g}")
    return "\n".join(lines)


def _forecast_rows(result: ForecastResult) -> Iterable[tuple[Any, ...]]:
    f = result.forecast
    for s, series in enumerate(result.series):
        stamps = series.interval.after(series.stamps[-1], result.options.horizon)
        for d, column in enumerate(series.columns):
            for h, stamp in enumerate(stamps):
                numbers = (float(x[s, h, d]) for x in (f.center, f.lower, f.upper))
                yield (series.name, stamp_text(stamp), column, h + 1, *numbers)


def _described(result: ForecastResult) -> dict[str, Any]:
    from seqkern import __version__

    method = result.method
    network = asdict(method.model.config) if isinstance(method, Network) else None
    return {
        "seqkern": __version__,
        "forecast": asdict(result.options),
        "season": result.season,
        "order": result.order,
        "network": network,
        "widening": method.widening if isinstance(method, Network) else None,
        "normalizers": [
            {"series": series.name, "mean": n.mean.tolist(), "std": n.std.tolist()}
            for series, n in zip(result.series, result.normalizers, strict=True)
        ],
    }


def _write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Floats with all their digits."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
