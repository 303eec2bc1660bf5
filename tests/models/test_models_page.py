"""The examples in docs/models.md give what the page says."""

import doctest
import pathlib

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"


def test_examples_on_the_page():
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.REPORT_NDIFF)
    assert result.attempted > 30 and result.failed == 0
