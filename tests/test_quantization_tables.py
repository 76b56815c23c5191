"""The tables of bench/methods.py, of results of every kind side by side."""

from __future__ import annotations

import click
import pytest

from bench import methods, published


def row(method, size, kl, **more):
    costs = {"cpu_seconds": 1.0, "peak_memory": 1e6, "top1": 0.5}
    return {"method": method, "bits_per_weight": size, "kl": kl, **costs, **more}


def refused(method, size):
    return {"method": method, "bits_per_weight": size, "refused": "it has no phi3"}


def answers(questions, right, source_right, lost, won):
    return {"questions": questions, "right": right, "source_right": source_right, "lost": lost, "won": won}


@pytest.fixture
def measured(monkeypatch):
    """Takes what was measured: its model and rows by the result's name."""

    def measure(**results):
        passport = {"machine": "here", "command": "python -m bench", "date": "2026-11-30", "versions": {"mlx": "0.32"}}
        facts = {"calibration_tokens": 512, "group_size": 64, **passport}
        found = {
            f"quantization-{name}": {"name": f"quantization-{name}", "model": model, "rows": rows, **facts}
            for name, (model, rows) in results.items()
        }
        monkeypatch.setattr(published, "systems", lambda: {"here": found})

    return measure


def rows_of(table):
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if line.startswith("|")]
    assert {len(cells) for cells in lines} == {len(lines[0])}
    return lines[0], lines[2:]


def curve(*more):
    return [*(row("uniform", bits + 0.5, 2.0**-bits) for bits in (2, 3, 4, 8)), row("mixed", 3.5, 0.1), *more]


def test_two_curves_of_one_model_have_columns_of_their_own(measured):
    measured(a=("m", curve(row("gptq", 4.5, 0.01), refused("mlx-lm awq", 4.5))), b=("m", curve(row("mxfp8", 8.25, 0))))
    head, rows = rows_of(methods.quantization())
    assert head == ["method", *2 * ["m, 3.5 bits a weight", "m, 4.5 bits a weight"]]
    assert rows == [
        ["uniform", *2 * ["0.1250", "0.0625"]],
        ["mixed", "0.1000", "", "0.1000", ""],
        ["gptq", "", "0.0100", "", ""],
    ]


def test_other_groups_and_formats_stand_beside_the_results_own_groups(measured):
    others = row("uniform, groups of 32", 5.0, 0.05), row("mxfp4", 4.25, 0.2), row("mxfp8", 8.25, 0.01)
    measured(
        plain=("without", curve()),
        with_others=("m", curve(*others, row("gptq", 4.5, 0.01), refused("mlx-lm awq", 4.5))),
        costs=("without", [row("gptq", 4.5, 0.01)]),
        without_curve=("n", [row("nvfp4", 4.5, 0.3), row("uniform", 4.5, 0.3)]),
    )
    assert rows_of(methods.formats())[1] == [
        ["m", "uniform, groups of 64", "2.50", "0.2500"],
        ["m", "uniform, groups of 64", "3.50", "0.1250"],
        ["m", "mxfp4", "4.25", "0.2000"],
        ["m", "uniform, groups of 64", "4.50", "0.0625"],
        ["m", "gptq, groups of 64", "4.50", "0.0100"],
        ["m", "uniform, groups of 32", "5.00", "0.0500"],
        ["m", "mxfp8", "8.25", "0.0100"],
        ["m", "uniform, groups of 64", "8.50", "0.0039"],
        ["n", "nvfp4", "4.50", "0.3000"],
        ["n", "uniform, groups of 64", "4.50", "0.3000"],
    ]


def test_costs_name_the_tokens_of_those_that_read_any(measured):
    reading, others = ["gptq", "distill", "mlx-lm dwq"], ["uniform", "mlx-lm uniform"]
    measured(
        curve=("left out", curve()),
        groups=("left out", [row("uniform", 4.5, 0.1), row("uniform, groups of 32", 5.0, 0.1)]),
        a=("m", [row(method, 4.5, 0.1) for method in (*reading, *others)]),
        b=("n", [refused("mlx-lm awq", 4.5), row("gptq", 3.5, 0.2)]),
    )
    rows = rows_of(methods.methods())[1]
    assert {cells[0] for cells in rows} == {"m", "n"}
    assert {cells[1]: cells[2] for cells in rows if cells[0] == "m"} == {
        **dict.fromkeys(reading, "512"),
        **dict.fromkeys(others, ""),
    }
    assert [cells for cells in rows if cells[0] == "n"] == [
        ["n", "mlx-lm awq: it has no phi3", "", "4.50", "", "", "", ""],
        ["n", "gptq", "512", "3.50", "0.2000", "50.0%", "1 s", "1 MB"],
    ]


def test_flips_are_of_the_questions_that_a_model_was_asked(measured):
    first = {"mmlu": answers(10, 5, 6, 2, 1), "arc": answers(4, 1, 3, 2, 0)}
    measured(
        a=("m", [row("uniform", 4.5, 0.1, answers=first), refused("mlx-lm awq", 4.5), row("gptq", 4.5, 0.01)]),
        b=("n", [row("gptq", 4.5, 0.02, answers={"mmlu": answers(10, 7, 7, 0, 0), "arc": answers(8, 4, 4, 1, 1)})]),
        c=("unasked", [row("gptq", 4.5, 0.03)]),
    )
    head, rows = rows_of(methods.flipped())
    assert head == ["model", "method", "bits a weight", "KL, nats", "mmlu, 10", "arc, 4", "arc, 8", "lost", "won"]
    assert rows == [
        ["m", "its source", "", "0", "60.0%", "75.0%", "", "", ""],
        ["m", "uniform", "4.50", "0.1000", "50.0%", "25.0%", "", "4", "1"],
        ["n", "its source", "", "0", "70.0%", "", "50.0%", "", ""],
        ["n", "gptq", "4.50", "0.0200", "70.0%", "", "50.0%", "1", "1"],
    ]


@pytest.mark.parametrize("table", [methods.methods, methods.formats, methods.flipped])
def test_a_table_of_what_was_not_measured_is_refused(table, measured):
    measured(a=("m", curve()))
    with pytest.raises(click.ClickException, match="not measured yet"):
        table()
