import math

from simclr_ray.evaluate.intervals import percent
from simclr_ray.evaluate.linear import ProbeSummary
from simclr_ray.evaluate.table import EvaluationRow, to_markdown, to_text

ROWS = [
    EvaluationRow("raw pixels", knn_top1=0.823, linear={"100 labels": ProbeSummary(0.7251, 0.0123, (0.724, 0.726))}),
    EvaluationRow(
        "trained encoder",
        knn_top1=0.8094,
        linear={
            "100 labels": ProbeSummary(0.719, math.nan, (0.719,)),
            "all labels": ProbeSummary(0.853, 0.001, (0.852, 0.853, 0.854)),
        },
        rankme=55.21,
        alignment=0.3,
        uniformity=-2.8,
        contrastive_accuracy=0.92,
    ),
]


def test_text_is_aligned_and_missing_is_a_dash():
    header, rule, raw, trained = to_text(ROWS).splitlines()
    assert header.startswith("                 kNN %  linear %, 100 labels  linear %, all labels  RankMe  alignment")
    assert rule.split() == ["-" * width for width in (15, 5, 20, 20, 6, 9, 10, 17)]
    assert raw.startswith("raw pixels        82.3     72.5 [71.2, 73.8]                     -       -          -")
    assert trained.startswith("trained encoder   80.9                  71.9     85.3 [85.1, 85.5]    55.2      0.300")
    assert [len(line) for line in (header, raw, trained)] == [len(rule)] * 3


def test_markdown_has_one_row_a_line():
    lines = to_markdown(ROWS).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| raw pixels | 82.3 | 72.5 [71.2, 73.8] | - | - | - | - | - |"


def test_a_name_stays_inside_its_cell():
    line = to_markdown([EvaluationRow("a|b\nc")]).splitlines()[2]
    assert line.startswith(r"| a\|b c | - |")


def test_no_rows_is_a_header():
    assert len(to_text([]).splitlines()) == 2
    assert "linear %" in to_text([])


def test_an_interval_stays_within_what_an_accuracy_can_be():
    assert percent([0.5, 0.9]) == "70.0 [0.0, 100.0]"
    assert percent([]) == "-"
