"""docs/hardening.md says what the tests show."""

from tests import hardening


def test_every_row_is_shown_by_a_test() -> None:
    assert set(hardening.shown()) == set(hardening.ROWS) == set(range(1, 26))


def test_the_page_has_the_table_of_the_tests() -> None:
    text = hardening.PAGE.read_text(encoding="utf-8")
    assert hardening.page(text) == text, "run `python -m tests.hardening`"
