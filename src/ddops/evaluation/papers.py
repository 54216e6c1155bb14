"""The papers' tables: which rows they have, their own figures, and the order they find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

PROTOCOL: Final = "dd_50k"
"""Which the figures below are of: they stand beside figures of that protocol and of no other."""
OTHER_PROTOCOLS: Final = {"llamagen_xl_t2i_256": "t2i_30k"}
"""But for these: of captions (Table 3). The paper's prompts and real images are not published."""
_JUDGE: Final = {"feature_dim": 2048, "image_size": 256, "resize": "pytorch_fid"}
PAPERS_FACTS: Final[dict[str, dict[str, Any]]] = {
    "dd_50k": {"asked_for": "50000 samples", **_JUDGE},
    "t2i_30k": {"asked_for": "30000 samples", **_JUDGE},
}
"""What these protocols are unless their settings were changed."""
FIDS: Final[dict[str, dict[str, float]]] = {
    "var_d16": {
        "teacher": 4.19,
        "dd1_1step": 9.94,
        "dd1_2step": 7.82,
        "teacher_involved_1_6": 5.03,
        "teacher_involved_4_6": 5.47,
        "teacher_involved_5_6": 6.54,
        "skip_1": 9.52,
        "skip_2": 40.09,
        "onestep_star": 157.5,
    },
    "var_d20": {"teacher": 3.35, "dd1_1step": 9.55, "dd1_2step": 7.33, "dd2_1step": 5.43},
    "var_d24": {"teacher": 2.51, "dd1_1step": 8.92, "dd1_2step": 6.95},
    "llamagen_b": {"dd1_1step": 15.50, "dd1_2step": 11.17},
    "llamagen_l": {
        "teacher": 4.11,
        "dd1_1step": 11.35,
        "dd1_2step": 7.58,
        "dd2_1step": 7.58,
        "teacher_involved_1_81": 5.71,
        "teacher_involved_41_81": 6.20,
        "teacher_involved_61_81": 6.76,
        "skip_106": 19.14,
        "skip_156": 80.72,
        "onestep_star": 220.2,
    },
    "llamagen_xl_t2i_256": {"teacher": 25.70, "dd1_1step": 36.09, "dd1_2step": 28.95},
}
"""FID on ImageNet-256 by teacher and row (of captions: on COCO): arXiv 2412.17153 (DD1), 2510.21003 (DD2), and DD1's
model card."""
SPEEDUPS: Final[dict[str, dict[str, float]]] = {
    "var_d16": {
        "dd1_1step": 6.3,
        "dd1_2step": 3.7,
        "teacher_involved_1_6": 1.5,
        "teacher_involved_4_6": 2.1,
        "teacher_involved_5_6": 2.6,
    },
    "var_d20": {"dd2_1step": 8.0},
    "llamagen_l": {
        "dd1_1step": 217.8,
        "dd2_1step": 238.0,
        "teacher_involved_1_81": 2.9,
        "teacher_involved_41_81": 5.7,
        "teacher_involved_61_81": 11.2,
    },
    "llamagen_xl_t2i_256": {"dd1_1step": 151.9, "dd1_2step": 92.9},
}


def paper_figure(
    figures: Mapping[str, Mapping[str, float]], preset: str, protocol: Mapping[str, Any], row: str
) -> float | None:
    """The paper's figure of a row, None where it has none or the protocol is another: by name, or in what makes up
    the papers' (:data:`PAPERS_FACTS`)."""
    teacher = preset.removeprefix("released_dd1_").removesuffix("_dd2")
    name = OTHER_PROTOCOLS.get(teacher, PROTOCOL)
    if protocol.get("name") != name or any(protocol.get(key) != value for key, value in PAPERS_FACTS[name].items()):
        return None
    return figures.get(teacher, {}).get(row)


def all_rows(
    level_sizes: Sequence[int],
    start_positions: Sequence[int],
    *,
    trajectories: bool,
    marginals: bool = True,
    dd2: bool = False,
    ar_diffusion: bool = False,
) -> list[str]:
    """Every row of the papers' tables for a teacher of these levels: their own for VAR and LlamaGen, and for others
    those at the same fractions of the levels. ``marginals``: whether the trajectories are of the conditions that
    images are asked for by."""
    levels, last = len(level_sizes), start_positions[-1] + 1
    involved = sorted({1 + math.ceil(share * (last - 1)) for share in (0, 0.5, 0.75)}) if last > 1 else []
    one_token = max(level_sizes) == 1
    skipped = [round(share * levels) for share in ((106 / 256, 156 / 256) if one_token else (0.1, 0.2))]
    return [
        *("teacher", "teacher_flow"),
        *(f"teacher_involved_{first}_{last}" for first in involved if first < last),
        *(f"dd1_{steps}step" for steps in range(len(start_positions), 0, -1)),
        *((f"dd2_{steps}step" for steps in range(len(start_positions), 1, -1)) if dd2 else ()),
        *(("dd2_1step",) if dd2 else ()),
        *(("dd2_refine_1", "dd2_refine_2") if dd2 and ar_diffusion else ()),
        *(("ar_diffusion",) if ar_diffusion else ()),
        *(f"skip_{count}" for count in sorted({max(1, count) for count in skipped}) if count < levels),
        *(("onestep_class",) if trajectories and marginals else ()),
        *(("onestep_star",) if trajectories else ()),
    ]


class Claim(NamedTuple):
    """One pair of the papers' order."""

    claim: str
    holds: bool
    clear: bool | None
    """Whether the two differ by more than the spread of their difference over the sampling seeds; None where one of
    them has no spread, being of one seed."""


def ordering(rows: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """The papers' order, pair by pair, and whether these rows keep it: teacher < teacher-involved < DD1's two steps <
    its one < skip < onestep*, and DD2's one step < DD1's."""
    involved = sorted((name for name in rows if name.startswith("teacher_involved")), key=_first_level)
    skipped = sorted((name for name in rows if name.startswith("skip")), key=_first_level)
    chain = ["teacher", *involved, "dd1_2step", "dd1_1step", *skipped, "onestep_star"]
    present = [name for name in chain if name in rows]
    pairs = list(itertools.pairwise(present))
    if "dd2_1step" in rows and "dd1_1step" in rows:
        pairs.append(("dd2_1step", "dd1_1step"))
    found = []
    for better, worse in pairs:
        a, b = rows[better]["fid"], rows[worse]["fid"]
        clear = None
        if all(rows[name]["runs"] > 1 for name in (better, worse)):
            clear = bool(abs(a - b) > math.hypot(*(rows[name]["fid_spread"] for name in (better, worse))))
        found.append(Claim(f"{better} {a:.2f} < {worse} {b:.2f}", bool(a < b), clear))
    return found


def _first_level(name: str) -> int:
    return next(int(part) for part in name.split("_") if part.isdecimal())
