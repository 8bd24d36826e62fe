import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.recipes.core.config import CleanSection
from bigbatch.recipes.core.data.clean import clean, units


def test_line_ends_become_line_feeds_and_control_characters_go():
    assert clean("a\r\nb\rc\td\x00\x07\x0b\x7f\x85e", CleanSection()) == "a\nb\nc\tde"


def test_unicode_forms_are_the_standard_ones():
    text = "e\u0301 \ufb01"
    assert clean(text, CleanSection()) == "é \ufb01"
    assert clean(text, CleanSection(unicode_form="NFKC")) == "é fi"
    assert clean(text, CleanSection(unicode_form="none")) == text


def test_nothing_is_touched_when_everything_is_off_but_half_surrogates_which_no_utf8_can_hold():
    untouched = CleanSection(unicode_form="none", strip_control_characters=False, min_characters=0)
    assert clean("a\r\n\x00e\u0301", untouched) == "a\r\n\x00e\u0301"
    assert clean("a\ud800b", untouched) == "a\ufffdb"


def test_documents_below_the_smallest_size_are_left_out_counting_no_surrounding_space():
    assert clean("  ab \n", CleanSection(min_characters=3)) is None
    assert clean("  abc \n", CleanSection(min_characters=3)) == "  abc \n"
    assert clean(" \n", CleanSection()) is None
    assert clean("", CleanSection(min_characters=0)) == ""


@settings(deadline=None)
@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    section = CleanSection(min_characters=0)
    once = clean(text, section)
    assert clean(once, section) == once
    assert all(unicodedata.category(character) != "Cc" for character in once if character not in "\n\t")


def test_lines_and_sentences_become_units_of_their_own():
    text = "One 3.5 ends here. Two\ngoes on!  Three?\n\nA title\n \nFour."
    assert units(text, "text") == [text]
    assert units(text, "line") == ["One 3.5 ends here. Two", "goes on!  Three?", "A title", "Four."]
    assert units(text, "sentence") == ["One 3.5 ends here.", "Two\ngoes on!", "Three?", "A title", "Four."]
