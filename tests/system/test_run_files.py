import itertools
import math

import pytest

from seqkern.errors import UserError
from seqkern.files import replace_content, replace_link
from seqkern.metrics import COLUMNS, MetricsLog, Row, read_metrics
from seqkern.plot import PlotLabels, plot_losses
from seqkern.schedule import learning_rate


def rate(step, steps=100, peak=2.0, warmup=10, floor=0.1):
    return learning_rate(step, steps=steps, peak=peak, warmup=warmup, floor=floor)


def test_warm_up_is_linear_and_decay_a_half_cosine():
    assert [rate(step) for step in (1, 5, 10)] == [0.2, 1.0, 2.0]
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(100) == pytest.approx(0.2)
    falling = [rate(step) for step in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(falling))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 0)])
def test_every_step_of_a_short_run_has_a_rate(steps, warmup):
    rates = [rate(step, steps=steps, warmup=warmup) for step in range(1, steps + 1)]
    assert all(0 < r <= 2.0 and math.isfinite(r) for r in rates)


def row(step, val_loss=None):
    return Row(step, 10 * step, 1 / (step + 1), val_loss, 0.1, 0.5, 1000.0)


def write(path, rows, after_step=-1):
    log = MetricsLog(path, after_step)
    for one in rows:
        log.append(one)
    log.close()


def test_metrics_come_back_with_all_their_digits(tmp_path):
    rows = [Row(0, 0, None, 4.5, None, None, None), row(1), row(2, 1 / 3)]
    write(tmp_path / "metrics.csv", rows)
    assert read_metrics(tmp_path / "metrics.csv") == rows


def test_resuming_drops_the_rows_past_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, [row(step) for step in range(1, 6)])
    write(path, [row(4), row(5)], after_step=3)
    assert [r.step for r in read_metrics(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_row_cut_short_by_a_kill_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.csv"
    write(path, [row(1), row(2)])
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_metrics(path) == [row(1)]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", ",".join(COLUMNS) + "\n1,x,,,,,\n"])
def test_damaged_metrics_are_named(tmp_path, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics.csv is damaged"):
        read_metrics(path)


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_replacing_leaves_nothing_beside(tmp_path):
    replace_content(tmp_path / "a.json", b"1")
    replace_content(tmp_path / "a.json", b"2")
    replace_link(tmp_path / "link", "a.json")
    replace_link(tmp_path / "link", "b.json")
    assert (tmp_path / "a.json").read_bytes() == b"2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link"]


@pytest.mark.parametrize("steps", [0, 1, 3, 250])
def test_plot_is_a_png_for_runs_of_any_length(tmp_path, steps):
    rows = [Row(0, 0, None, 4.0, None, None, None), *(row(s) for s in range(1, steps + 1))]
    path = tmp_path / "loss.png"
    plot_losses(rows, PlotLabels("title", 3.2, "character"), path)
    assert path.read_bytes().startswith(b"\x89PNG")
