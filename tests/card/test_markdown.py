"""Markdown shows any text as it is."""

import math

import pytest

from hf_guidance.card.markdown import code, count, escape, printable, shown, table


def test_signs_of_markdown_and_html_lose_their_meaning() -> None:
    assert escape("a|b *c* <d> & [e](f)\n  #g") == r"a\|b \*c\* &lt;d&gt; &amp; \[e\](f) \#g"


def test_addresses_mentions_and_formulas_are_no_links_and_no_mathematics() -> None:
    assert escape("http://a.test, www.a.test") == "http:<!-- -->//a.test, www<!-- -->.a.test"
    assert escape("@name, me@a.test, h.1@0.5, a @ b") == "@<!-- -->name, me@<!-- -->a.test, h.1@<!-- -->0.5, a @ b"
    assert escape("$x$") == r"\$x\$"
    assert escape("12:30, a/b//c, C://x") == "12:30, a/b//c, C:<!-- -->//x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://a.test\x07link\x1b]8;;\x07", "link"),
        ("a\u202etxt.\u202c\u2066b\u200b\u200fc", "atxt.bc"),
        ("a\x00\x07\x08\x7f\x9b\ud800b\r\n\tc", "ab\n\tc"),
        ("ä – 日本 ≥ 🙂", "ä – 日本 ≥ 🙂"),
    ],
)
def test_signs_that_do_not_show_themselves_are_removed(text: str, shown: str) -> None:
    assert printable(text) == shown


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
