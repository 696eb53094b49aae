"""Intervals, paired tests and Holm's adjustment, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_transfer.studies.statistics import holm, paired, summary


def test_the_interval_and_the_p_value_are_scipys():
    values = [0.81, 0.84, 0.79, 0.86]
    found = summary(values)
    theirs = stats.ttest_1samp(values, 0)
    assert found.mean == pytest.approx(np.mean(values)) and found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_a_difference_is_paired_by_seed():
    one, first = {0: 0.8, 1: 0.9, 2: 0.7, 9: 0.1}, {2: 0.6, 1: 0.7, 0: 0.75}
    found = paired(one, first)
    theirs = stats.ttest_rel([0.8, 0.9, 0.7], [0.75, 0.7, 0.6])
    assert found.count == 3 and found.p == pytest.approx(theirs.pvalue)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_one_seed_or_equal_ones_give_no_interval(values):
    found = summary(values)
    assert (found.mean, found.interval, found.p) == (0.5, None, None)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []
