"""benchmarks/harness/paired.py: p-values against known ones."""

import math
import statistics

import pytest

from harness.paired import incomplete_beta, paired, sign_flip_p, student_p


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [  # the usual table of critical values, two-sided
        (12.7062047, 1, 0.05), (4.3026527, 2, 0.05), (2.7764451, 4, 0.05), (4.6040949, 4, 0.01),
        (8.6103018, 4, 0.001), (2.2281389, 10, 0.05), (1.6602343, 100, 0.1), (0.0, 4, 1.0), (1.0, 1, 0.5),
    ],
)  # fmt: skip
def test_student(t, freedom, p):
    assert student_p(t, freedom) == pytest.approx(p, rel=1e-6)
    assert student_p(-t, freedom) == student_p(t, freedom)


def test_student_with_one_and_two_degrees_of_freedom_has_a_closed_form():
    for t in (0.01, 0.3, 1.7, 5.0, 40.0, 1e4):
        assert student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
        assert student_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-6)


def test_student_nears_the_normal_distribution():
    assert student_p(1.959964, 1e7) == pytest.approx(0.05, rel=1e-5)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 0.5), (0.5, 0.5), (30, 2), (5, 40)])
def test_incomplete_beta(a, b):
    assert incomplete_beta(a, b, 0) == 0 and incomplete_beta(a, b, 1) == 1
    assert incomplete_beta(a, b, 0.3) == pytest.approx(1 - incomplete_beta(b, a, 0.7), abs=1e-14)
    if (a, b) == (1, 1):
        assert incomplete_beta(a, b, 0.3) == pytest.approx(0.3)
    if (a, b) == (2, 0.5):  # 1 - sqrt(1 - x) (1 + x/2)
        assert incomplete_beta(a, b, 0.3) == pytest.approx(1 - math.sqrt(0.7) * 1.15, rel=1e-12)
    if (a, b) == (0.5, 0.5):
        assert incomplete_beta(a, b, 0.3) == pytest.approx(2 / math.pi * math.asin(math.sqrt(0.3)), rel=1e-12)


@pytest.mark.parametrize(
    ("differences", "p"),
    [([1, 2, 3, 4, 5], 2 / 32), ([-1, -2, -3], 2 / 8), ([1, -1], 1.0), ([0, 0, 0], 1.0), ([3, 1, -1], 0.75)],
)
def test_sign_flips(differences, p):
    assert sign_flip_p(differences) == p


def test_sign_flips_of_numbers_that_round():
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.7]) == 2 / 32
    assert sign_flip_p([0.3, 0.1, -0.1]) == 0.75


def test_a_comparison():
    found = paired([1.0, 2.0, 0.5, 1.5, 1.0])
    assert found.mean == pytest.approx(1.2) and found.error == pytest.approx(0.2549510)
    u = (t := found.mean / found.error) / math.sqrt(4 + t * t)
    assert found.p_t == pytest.approx(1 - 1.5 * (u - u**3 / 3), rel=1e-9)  # four degrees of freedom
    assert found.p_signs == 2 / 32 and str(found) == "+1.20 ± 0.25, p 0.0093"


def test_too_few_or_equal_pairs():
    assert paired([]) is None
    one = paired([0.5])
    assert (one.mean, one.error, one.p_t, one.p_signs, str(one)) == (0.5, None, None, None, "+0.50")
    assert paired([0.0, 0.0]).p_t == 1 and paired([1.0, 1.0]).p_t == 0
    many = paired([float(i) for i in range(13)])
    assert many.p_signs is None and many.mean == statistics.mean(range(13))
