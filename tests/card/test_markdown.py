"""Markdown shows any text as it is."""

import math

from hf_guidance.card.markdown import code, count, escape, shown, table


def test_signs_of_markdown_and_html_lose_their_meaning() -> None:
    assert escape("a|b *c* <d> & [e](f)\n  #g") == r"a\|b \*c\* &lt;d&gt; &amp; \[e\](f) \#g"


def test_a_table_has_columns_as_wide_as_their_widest_cell() -> None:
    assert table(["a", "wider"], [["1|2", 3], ["", "x"]]) == "\n".join(
        [r"| a    | wider |", "|------|-------|", r"| 1\|2 | 3     |", "|      | x     |"]
    )


def test_code_is_fenced_by_more_backticks_than_it_holds() -> None:
    assert code("sh", "echo") == "```sh\necho\n```"
    assert code("md", "````py") == "`````md\n````py\n`````"


def test_numbers_are_shown_with_their_digits_and_a_diverged_run_in_words() -> None:
    assert (count(1234567), shown(0.12345, 3), shown(2, 1)) == ("1,234,567", "0.123", "2.0")
    assert shown(math.nan, 3) == shown(math.inf, 3) == "not finite (the run diverged)"
