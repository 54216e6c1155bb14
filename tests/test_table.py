"""The papers' rows: those of the papers for their teachers, and the table says where their order does not hold."""

import pytest

from ddops.commands.table import markdown
from ddops.config.evaluation import parse_row
from ddops.evaluation.papers import FIDS, SPEEDUPS, all_rows, ordering, paper_figure

VAR = tuple(size * size for size in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LLAMAGEN = (1,) * 256


@pytest.mark.parametrize(("sizes", "starts", "preset"), [(VAR, (0, 5), "var_d16"), (LLAMAGEN, (0, 80), "llamagen_l")])
def test_the_rows_of_the_published_teachers_are_the_papers(sizes, starts, preset):
    rows = all_rows(sizes, starts, trajectories=True)
    assert set(FIDS[preset]) - {"dd2_1step"} <= set(rows)
    assert set(rows) - set(FIDS[preset]) == {"teacher_flow", "onestep_class"}


def test_other_teachers_have_rows_at_the_same_fractions():
    rows = all_rows((1,) * 16, (0, 7), trajectories=False)
    assert [row for row in rows if "involved" in row or "skip" in row] == [
        *("teacher_involved_1_8", "teacher_involved_5_8", "teacher_involved_7_8", "skip_7", "skip_10"),
    ]
    assert not [row for row in rows if "onestep" in row], "without trajectories there are no marginals"
    assert all_rows((1, 4), (0, 1), trajectories=True)[2:4] == ["teacher_involved_1_2", "dd1_2step"]
    with_dd2 = all_rows((1,) * 16, (0, 7), trajectories=False, dd2=True)
    assert [row for row in with_dd2 if row not in rows] == [
        *("dd2_2step", "dd2_1step", "dd2_refine_1", "dd2_refine_2", "ar_diffusion"),
    ]
    for row in with_dd2:
        parse_row(row)


def test_a_papers_figure_stands_beside_its_own_protocol_alone():
    assert paper_figure(FIDS, "released_dd1_var_d16", "dd_50k", "teacher_involved_4_6") == 5.47
    assert paper_figure(SPEEDUPS, "llamagen_l", "dd_50k", "dd1_1step") == 217.8
    assert paper_figure(FIDS, "var_d16", "adm_50k", "teacher") is None
    assert paper_figure(FIDS, "digits", "dd_50k", "teacher") is None
    assert paper_figure(FIDS, "llamagen_xl_t2i_256", "t2i_30k", "dd1_2step") == 28.95
    assert paper_figure(SPEEDUPS, "llamagen_xl_t2i_256", "dd_50k", "dd1_2step") is None


def row(fid, seconds=1.0):
    return {"fid": fid, "fid_spread": 0.1, "runs": 3, "passes": 1, "parameters": 5_000_000, "seconds": seconds}


def test_the_papers_own_figures_keep_their_order_but_for_what_they_report():
    """VAR-d16: the paper's skip-1 (9.52) beats its DD1 in one step (9.94), as it says."""
    broken = [
        each.claim for each in ordering({name: {"fid": fid} for name, fid in FIDS["var_d16"].items()}) if not each.holds
    ]
    assert broken == ["dd1_1step 9.94 < skip_1 9.52"]
    llamagen = ordering({name: {"fid": fid} for name, fid in FIDS["llamagen_l"].items()})
    assert all(each.holds and each.clear for each in llamagen)
    assert "dd2_1step 7.58 < dd1_1step 11.35" in [each.claim for each in llamagen]


def test_the_table_shows_figures_speed_and_where_the_order_breaks():
    rows = {"teacher": row(5.0, 0.01), "dd1_2step": row(9.0, 0.002), "dd1_1step": row(8.0, 0.001)}
    result = {"preset": "var_d16", "protocol": {"name": "dd_50k"}, "rows": rows}
    result["ordering"] = [each._asdict() for each in ordering(rows)]
    text = markdown(result, list(rows))
    assert "| DD1 student, 1 step | 1 | 5.00 M | 8.00 ± 0.10 | 1 | 10.0x | 9.94 | 6.3 |" in text
    assert "- teacher 5.00 < dd1_2step 9.00: holds" in text
    assert "- dd1_2step 9.00 < dd1_1step 8.00: **does not hold**\n" in text


def test_a_difference_within_the_spread_says_so():
    """Spreads of 0.1 each: their difference's is 0.14."""
    rows = {"teacher": row(5.0), "dd1_1step": row(4.9), "dd2_1step": row(4.7)}
    near, far = ordering(rows)
    assert (near.holds, near.clear) == (False, False)
    assert (far.holds, far.clear) == (True, True)
    result = {"preset": "digits", "protocol": {"name": "digits"}, "rows": rows}
    text = markdown({**result, "ordering": [near._asdict(), far._asdict()]}, list(rows))
    assert "- teacher 5.00 < dd1_1step 4.90: **does not hold**, within the spread of their difference\n" in text
    assert "- dd2_1step 4.70 < dd1_1step 4.90: holds\n" in text
