"""The report: it holds the figures, opens without a network, and its curves are the ones that training wrote."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ddops.evaluation.report import chart, embed_png, read_curve, render, table
from ddops.training.curves import Curves


def row(fid, accuracy, **others):
    values = {
        "fid": fid,
        "fid_spread": 0.11,
        "accuracy": accuracy,
        "accuracy_spread": 0.002,
        "samples": 1797,
        "runs": 3,
    }
    return {**values, **others}


METRICS = {
    "protocol": {
        "name": "digits",
        "reference_images": 1797,
        "features_sha256": "ab12" * 16,
        "reference_sha256": "ef56" * 16,
        "seeds": [1, 2, 3],
        "labels": "of the real images",
        "features": "digits_classifier",
        "quantisation": "uint8",
    },
    "models": {"dd1": "cd34" * 16},
    "onestep_star": row(113.25, 0.25, passes=1),
    "dd1_1step": row(10.125, 0.905, passes=1),
    "my_own": row(7.0, 0.5),
    "teacher": row(5.0625, 0.955, passes=16),
    "reconstruction": row(2.0, 0.99, runs=1),
    "skip_4": row(8.0, 0.8, passes=12),
    "dd1_2step": row(5.5, 0.94, passes=2),
    "teacher_flow": row(5.0, 0.95, passes=16),
    "teacher_involved_4_8": row(5.25, 0.955, passes=6),
}
ACCEPTED = {
    "passed": True,
    "outcome": "accepted",
    "override": None,
    "checks": [{"name": "the figures are of this dd1", "passed": True, "detail": "cd34"}],
    "rules": [
        {"rule": "near", "quantity": "a.fid / b.fid", "value": 1.9876, "bound": "at most 2", "passed": True},
    ],
}
REFUSED = {
    "passed": False,
    "outcome": "refused",
    "override": None,
    "checks": [{"name": "the figures are of this dd1", "passed": False, "detail": "stale"}],
    "rules": [{"rule": "near", "quantity": "a.fid", "value": None, "bound": "at most 2", "passed": False}],
}
EXPORT = {"parity": {"largest": 3.5e-6, "mean": 1e-7, "images": 256}, "bytes": 2_340_000, "steps": 1}
EXPORT["sha256"] = {"model.onnx": "9a78" * 16}
CURVE = {"fid_1step": ([10, 20, 30], [90.0, 30.0, 11.0]), "fid_2step": ([10, 20, 30], [40.0, 12.0, 6.0])}


def page(tmp_path, template="report.html", **changes):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grid.png")
    values = {
        "preset": "digits",
        "seed": 0,
        "summary": "16 teacher steps in 1.",
        "table": table(METRICS),
        "protocol": METRICS["protocol"],
        "samples": 1797,
        "judge": {"name": "digits_classifier", "heldout_accuracy": 0.9876},
        "decision": ACCEPTED,
        "grids": [("DD1 student, 1 step", embed_png(tmp_path / "grid.png"))],
        "charts": [
            ("DD1: FID", chart(CURVE, "FID", log=True)),
            ("Teacher", chart({"loss": CURVE["fid_1step"]}, "nats")),
        ],
        "export": EXPORT,
        "exported": "DD1 student, 1 step",
        "progress": [("DD2 after 20 updates", embed_png(tmp_path / "grid.png"))],
        "interpolations": [("DD1 student, 1 step", embed_png(tmp_path / "grid.png"))],
        "provenance": {"platform": "Linux", "sha256 of the teacher": "cd34" * 16},
    }
    return render(template, **{**values, **changes})


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
    for line in (
        "DD1 student, 1 step, exported 1 10.12 \u00b1 0.11 2.00 90.5% \u00b1 0.2%",
        "DD1 student, 2 steps 2 5.50 \u00b1 0.11 1.09 94.0%",
        "Teacher, ordinary sampling 16 5.06 \u00b1 0.11 1.00 95.5%",
        "Teacher-involved, 4-8 6 5.25",
        "Tokenizer reconstruction (the floor) - 2.00 0.40 99.0%",
        "onestep*: independent tokens 1 113.25 \u00b1 0.11 22.37 25.0%",
    ):
        assert line in words
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
    assert text.count("data:image/png;base64,") == 3
    assert "DD2 after 20 updates" in words


def test_a_refused_model_has_a_page_too(tmp_path):
    words = " ".join(" ".join(References(page(tmp_path, decision=REFUSED, export=None)).text).split())
    assert "Refused." in words
    assert "near a.fid missing at most 2 failed" in words
    assert "the figures are of this dd1: stale." in words
    assert "Nothing was exported." in words


def test_an_override_is_shown_with_its_author_and_reason(tmp_path):
    overridden = {**REFUSED, "passed": True, "outcome": "overridden", "override": {"by": "Ada", "reason": "demo"}}
    words = " ".join(" ".join(References(page(tmp_path, decision=overridden)).text).split())
    assert "Refused, and let through by Ada: demo" in words
    assert "Overridden by Ada: demo" in page(tmp_path, "model_card.md", decision=overridden)


def test_the_model_card_holds_the_same_facts(tmp_path):
    card = page(tmp_path, "model_card.md")
    assert "| DD1 student, 1 step | 1 | 10.12 \u00b1 0.11 | 2.00 | 90.5% \u00b1 0.2% |" in card
    assert "| near | a.fid / b.fid | 1.988 | at most 2 | passed |" in card
    for fact in (
        "# digits:",
        "`digits`: 1797 samples",
        "seeds 1, 2, 3",
        "cd34" * 16,
        "9a78" * 16,
        "The gate accepted it.",
    ):
        assert fact in card
    assert "on 256 images: largest\ndifference of a pixel 3.5e-06, mean 1e-07" in card
    judged = {**EXPORT, "fid_loss": 0.01, "exported": {"fid": 10.135}, "pytorch": {"fid": 10.125}}
    assert "it has FID\n10.135, PyTorch 10.125.\n" in page(tmp_path, "model_card.md", export=judged)
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables[:11]} == {len(table(METRICS).headings) + 2}
    assert "**The gate refused it.**" in page(tmp_path, "model_card.md", decision=REFUSED, export=None)


def test_names_are_escaped(tmp_path):
    found = References(page(tmp_path, preset="<script>alert(1)</script>"))
    assert "script" not in found.tags
    assert "<script>alert(1)</script>" in "".join(found.text)


def test_a_value_that_is_forgotten_is_an_error_and_not_a_blank(tmp_path):
    with pytest.raises(Exception, match="labels"):
        page(tmp_path, protocol={"name": "digits"})


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    """The report is an output of the pipeline: its hash must not change by itself."""
    assert page(tmp_path) == page(tmp_path)


def test_rows_come_in_the_pages_order_and_unknown_ones_last():
    names = [row.name for row in table(METRICS).rows]
    teachers = ["reconstruction", "teacher", "teacher_flow", "teacher_involved_4_8"]
    assert names == [*teachers, "dd1_1step", "dd1_2step", "skip_4", "onestep_star", "my_own"]
    assert table(METRICS).rows[-1].title == "my_own"


def test_only_figures_that_are_there_have_a_column():
    headings = [heading for heading, _ in table(METRICS).headings]
    assert headings == ["steps", "FID", "FID / teacher", "class accuracy"]
    others = {"dd1_1step": {"fid": 3.0, "fid_spread": 0.0, "recall": 0.5, "recall_spread": 0.0, "runs": 1}}
    assert [heading for heading, _ in table(others).headings] == ["steps", "FID", "recall"]
    assert table(others).rows[0].cells == ("-", "3.00", "0.500")


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
