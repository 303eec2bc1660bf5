"""The numbers in docs/numerics.md are what the library says."""

import doctest
import pathlib

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "numerics.md"


def test_numbers_on_the_page():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 25 and result.failed == 0
