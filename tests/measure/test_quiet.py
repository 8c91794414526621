"""What says whether a machine was quiet while it measured: rows, exponents, the self-test."""

import pytest

from xformers_lab import hardware
from xformers_lab.bench import rows
from xformers_lab.config import Config, edit
from xformers_lab.doctor import quiet
from xformers_lab.measure import speed


@pytest.mark.parametrize(
    ("finding", "load", "spread", "ok"),
    [
        ("cores", 0.3, 1.0, True),
        ("cores", 2.5, 1.0, False),
        ("cores", None, 1.0, True),
        ("timer", 0.0, 1.29, True),
        ("timer", 0.0, 1.31, False),
    ],
)
def test_the_self_test_does_not_say_yes_on_a_busy_machine(monkeypatch, finding, load, spread, ok):
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(hardware, "load", lambda: load)
    monkeypatch.setattr(quiet, "spread", lambda: spread)
    told = getattr(quiet, finding)()
    assert told["ok"] is (ok or None) and ("something else is busy here" in told["found"]) is not ok


def test_a_row_says_how_steady_its_times_were(monkeypatch):
    monkeypatch.setattr(hardware, "load", lambda: 2.5)
    assert speed.disturbance([1.0, 2.0, 1.5]) == {"seconds_ratio": 1.5, "load": 2.5}
    assert speed.disturbance([1.0])["seconds_ratio"] is None


@pytest.mark.parametrize(("lengths", "fitted"), [((8, 16), False), ((8, 16, 32), True)])
def test_an_exponent_needs_three_lengths_that_were_measured(lengths, fitted):
    cells = rows.blank([edit(Config(), seq_len=length) for length in lengths], rows.PASSES[:1], True)
    for cell in cells:
        cell.row.update(status="ok", seconds_min=cell.config.seq_len**2, flops=cell.config.seq_len, temp_bytes=7)
    rows.exponents(cells)
    fits = [cell.row["exponent"] for cell in cells]
    assert fits == (pytest.approx([2.0] * 3) if fitted else [None, None])
    cells[0].end("oom", "no room")  # what was not measured is no point of the line
    for cell in cells:
        cell.row["exponent"] = None
    rows.exponents(cells)
    assert [cell.row["exponent"] for cell in cells] == [None] * len(lengths)
