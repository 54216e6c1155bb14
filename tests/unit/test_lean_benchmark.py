"""The fast path's benchmark on the digits' small models: parts that are added to, and what the report makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.lean_report import baseline, ratio, tables, throughput
from helpers.here import run_script_here


def benchmark(*arguments: str) -> None:
    ended = run_script_here("benchmarks/lean.py", *arguments)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_sittings_add_up_and_the_ways_agree(tmp_path: Path) -> None:
    output = tmp_path / "lean.json"
    names = ("reference_1", "plain_1", "lean_1", "lean_2", "teacher")
    for sitting, options in enumerate((["--rounds", "2"], ["--rounds", "1", "--cold"]), start=1):
        benchmark("measure", "digits_var", "tokens", "3", *names, *options, "--output", str(output))
        results = json.loads(output.read_text())
        part = results["parts"]["digits_var tokens 3"]
        assert {len(part[name]["seconds"]) for name in names} == {1 + sitting}
        assert len(results["commands"]) == sitting
    assert part["reference_1"]["difference_to_lean"] < 1e-4
    assert part["plain_1"]["difference_to_lean"] < 1e-4
    assert part["lean_1"]["gflop_an_image"] <= part["plain_1"]["gflop_an_image"]
    benchmark("report", "--output", str(output))
    assert "**digits_var, batch 3, to tokens**" in (tmp_path / "lean.md").read_text()
    assert (tmp_path / "lean.png").stat().st_size > 5000


@pytest.mark.rare
def test_exported_graphs_draw_what_is_timed_beside_them(tmp_path: Path) -> None:
    """As users run them, from a bundle; in half precision too."""
    output, names = tmp_path / "lean.json", ("lean_1", "onnx_1", "onnx_1_fp16")
    where = ("--work", str(tmp_path), "--output", str(output))
    benchmark("measure", "digits_var", "images", "2", *names, "--rounds", "1", *where)
    part = json.loads(output.read_text())["parts"]["digits_var images 2"]
    assert all(part[name]["seconds"] for name in names)
    assert part["onnx_1"]["difference_to_lean"] < 1e-4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lean_1", "reference_1"), ("lean_2", "reference_2"), ("lean_1_bf16", "reference_1"), ("onnx_1", "reference_1")],
)
def test_each_is_compared_with_the_released_way_in_as_many_steps(name: str, expected: str) -> None:
    part = {key: {"seconds": [1.0]} for key in ("reference_1", "reference_2", name)}
    assert baseline(name, part) == expected
    assert baseline(name, {**part, "teacher": {"seconds": [1.0]}}) == "teacher"


def test_ratios_are_of_medians_of_processor_time() -> None:
    """Worked out by hand: 6 over 2, whatever the clock on the wall says."""
    fast = {"seconds": [9.0, 9.0, 9.0], "cpu_seconds": [2.0, 1.0, 40.0], "peak_mb": [1.0, 2.0, 3.0]}
    slow = {"seconds": [9.0, 9.0, 9.0], "cpu_seconds": [6.0, 5.0, 7.0], "peak_mb": [5.0, 5.0, 5.0]}
    assert ratio(fast, slow) == 3
    rows = tables({"parts": {"var_d16 tokens 1": {"reference_1": slow, "lean_1": fast}}})
    assert any(row.startswith("| lean_1 |  | 9.00 (9.00-9.00) | 2.00 | 3.00 |") for row in rows)


def test_a_pass_that_cannot_be_counted_has_the_lean_one_s_floor() -> None:
    """Worked out by hand: 200 GFLOP for each of 8 images at 800 TFLOP/s are 2 ms."""
    part = {
        "lean_1_bf16": {"seconds": [0.004], "gflop_an_image": 200.0},
        "lean_1_bf16_graph": {"seconds": [0.003, 0.003, 0.1]},
        "tensorrt_1_fp16": {"seconds": [0.002]},
    }
    rows = throughput(part, 8, 800.0)
    assert rows[-3:] == [
        "| lean_1_bf16 | 2,000.0 | 4.00 | 2.00 | 2.00 |",
        "| lean_1_bf16_graph | 2,666.7 | 3.00 | 2.00 | 1.50 |",
        "| tensorrt_1_fp16 | 4,000.0 | 2.00 | 2.00 | 1.00 |",
    ]
