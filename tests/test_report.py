"""The report: it holds the figures, opens without a network, and its curves are the ones that training wrote."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ddops.evaluation.report import chart, embed_png, read_curve, render, table
from ddops.training.curves import Curves

METRICS = {
    "protocol": {"name": "digits", "reference_images": 1797, "features_sha256": "ab12" * 16, "seeds": [1, 2, 3]},
    "onestep_star": {"fid": 113.25, "fid_spread": 1.5, "accuracy": 0.25, "samples": 1797, "runs": 3},
    "dd1_1step": {"fid": 10.125, "fid_spread": 0.11, "accuracy": 0.905, "samples": 1797, "runs": 3},
    "my_own": {"fid": 7.0, "fid_spread": 0.0, "accuracy": 0.5, "samples": 1797, "runs": 3},
    "teacher": {"fid": 5.0625, "fid_spread": 0.07, "accuracy": 0.955, "samples": 1797, "runs": 3},
    "reconstruction": {"fid": 2.0, "fid_spread": 0.0, "accuracy": 0.99, "samples": 1797, "runs": 1},
    "dd1_2step": {"fid": 5.5, "fid_spread": 0.08, "accuracy": 0.94, "samples": 1797, "runs": 3},
    "teacher_flow": {"fid": 5.0, "fid_spread": 0.09, "accuracy": 0.95, "samples": 1797, "runs": 3},
}
ACCEPTED = {
    "passed": True,
    "rules": [
        {"rule": "near", "quantity": "a.fid / b.fid", "value": 1.9876, "bound": "at most 2", "passed": True},
    ],
}
REFUSED = {
    "passed": False,
    "rules": [{"rule": "near", "quantity": "a.fid", "value": None, "bound": "at most 2", "passed": False}],
}
EXPORT = {"parity": {"largest": 3.5e-6, "mean": 1e-7, "images": 256}, "bytes": 2_340_000, "steps": 1}
CURVE = {"fid_1step": ([10, 20, 30], [90.0, 30.0, 11.0]), "fid_2step": ([10, 20, 30], [40.0, 12.0, 6.0])}


def page(tmp_path, **changes):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grid.png")
    values = {
        "preset": "digits",
        "seed": 0,
        "summary": "16 teacher steps in 1.",
        "rows": table(METRICS, 16),
        "protocol": METRICS["protocol"],
        "samples": 1797,
        "heldout_accuracy": 0.9876,
        "decision": ACCEPTED,
        "grids": [("DD1 student, 1 step", embed_png(tmp_path / "grid.png"))],
        "charts": [
            ("DD1: FID", chart(CURVE, "FID", log=True)),
            ("Teacher", chart({"loss": CURVE["fid_1step"]}, "nats")),
        ],
        "export": EXPORT,
        "provenance": {"platform": "Linux", "sha256 of the teacher": "cd34" * 16},
    }
    return render(**{**values, **changes})


class References(HTMLParser):
    """Everything that a browser would load, and the tags that were opened and closed."""

    LOADING = ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background")

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in self.LOADING and value]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing(tmp_path):
    """A data URI or a reference within the page; no script, no style sheet, no font from elsewhere."""
    text = page(tmp_path)
    found = References(text)
    assert found.loaded
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in found.loaded)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    for loading in ("@import", "url(http", "url('", 'url("', "url(//"):
        assert loading not in text


def test_the_page_holds_the_figures(tmp_path):
    text = page(tmp_path)
    words = " ".join(" ".join(References(text).text).split())
    for title, steps, fid, spread, ratio, accuracy in (
        ("DD1 student, 1 step", "1", "10.12", "0.11", "2.00", "90.5 %"),
        ("DD1 student, 2 steps", "2", "5.50", "0.08", "1.09", "94.0 %"),
        ("Teacher, ordinary sampling", "16", "5.06", "0.07", "1.00", "95.5 %"),
        ("Tokenizer reconstruction (the floor)", "-", "2.00", "0.00", "0.40", "99.0 %"),
        ("onestep*: independent tokens", "1", "113.25", "1.50", "22.37", "25.0 %"),
    ):
        assert f"{title} {steps} {fid} ± {spread} {ratio} {accuracy}" in words
    for fact in (
        "Preset digits , seed 0",
        "98.8 %",
        "1797 samples",
        "seeds 1, 2, 3",
        "not an ImageNet FID",
        "ab12ab12ab12",
    ):
        assert fact in words
    assert "near a.fid / b.fid 1.988 at most 2 passed" in words
    assert "Accepted." in words
    assert "2.34 MB, 1 step(s)" in words
    assert "3.5e-06" in words
    assert text.count("<svg") == 2
    assert text.count("data:image/png;base64,") == 1


def test_a_refused_model_has_a_page_too(tmp_path):
    words = " ".join(" ".join(References(page(tmp_path, decision=REFUSED, export=None)).text).split())
    assert "Refused." in words
    assert "near a.fid missing at most 2 failed" in words
    assert "Nothing was exported." in words


def test_names_are_escaped(tmp_path):
    found = References(page(tmp_path, preset="<script>alert(1)</script>"))
    assert "script" not in found.tags
    assert "<script>alert(1)</script>" in "".join(found.text)


def test_a_value_that_is_forgotten_is_an_error_and_not_a_blank(tmp_path):
    with pytest.raises(Exception, match="reference_images"):
        page(tmp_path, protocol={"name": "digits"})


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    """The report is an output of the pipeline: its hash must not change by itself."""
    assert page(tmp_path) == page(tmp_path)


def test_rows_come_in_the_pages_order_and_unknown_ones_last():
    names = [row.name for row in table(METRICS, 16)]
    known = ["reconstruction", "teacher", "teacher_flow", "dd1_1step", "dd1_2step", "onestep_star"]
    assert names == [*known, "my_own"]
    assert table(METRICS, 16)[-1].title == "my_own"


def test_a_curve_that_training_wrote_is_read_back(tmp_path):
    """Through DVCLive's file: steps and values as they were logged, to the last digit."""
    values = [0.1 + 0.2, 1e-9, 12345.678901234567]
    curves = Curves(tmp_path / "curves")
    for step, value in zip((50, 100, 1000), values, strict=True):
        curves.log(step, {"loss": value, "fid_1step": value * 2})
    curves.close()
    directory = tmp_path / "curves" / "plots" / "metrics"
    assert sorted(path.name for path in directory.iterdir()) == ["fid_1step.tsv", "loss.tsv"]
    assert read_curve(directory / "loss.tsv") == ([50, 100, 1000], values)
    assert read_curve(directory / "fid_1step.tsv") == ([50, 100, 1000], [value * 2 for value in values])


def test_a_resumed_curve_replaces_what_the_killed_run_left(tmp_path):
    """Also a point that lies past the checkpoint, which the resumed run has yet to compute."""
    killed = Curves(tmp_path / "curves")
    for step in (1, 2, 3):
        killed.log(step, {"loss": float(step), "stray": 1.0})
    resumed = Curves(tmp_path / "curves", killed.history[:1])
    resumed.log(2, {"loss": 20.0})
    resumed.close()
    directory = tmp_path / "curves" / "plots" / "metrics"
    assert read_curve(directory / "loss.tsv") == ([1, 2], [1.0, 20.0])
    assert read_curve(directory / "stray.tsv") == ([1], [1.0])


def test_curves_leave_the_workspace_alone(tmp_path, monkeypatch):
    """DVCLive would write dvc.yaml, a report and machine statistics if it were let."""
    monkeypatch.chdir(tmp_path)
    curves = Curves(tmp_path / "curves")
    curves.log(1, {"loss": 1.0})
    curves.close()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["curves/metrics.json", "curves/plots/metrics/loss.tsv"]
