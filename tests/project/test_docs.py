"""The pages in docs/ agree with the code."""

from tools import options_table


def test_page_of_settings_is_up_to_date() -> None:
    text = options_table.PAGE.read_text("utf-8")
    assert text == options_table.options_table(), "run `python -m tools.options_table`"
