"""The examples in docs/rewards.md give what the page says."""

import doctest
import pathlib
import sys

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "rewards.md"


@pytest.mark.skipif(sys.platform != "linux", reason="the page runs programs in a cage that Linux alone has")
def test_examples_on_the_page():
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    assert result.attempted > 30 and result.failed == 0
