"""Numbers in words, as people spell them."""

import pytest

from bigbatch.recipes.core.data.number_words import NUM_PAIRS, english, german, number_pairs


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, ("null", "zero")),
        (1, ("eins", "one")),
        (16, ("sechzehn", "sixteen")),
        (101, ("einhunderteins", "one hundred and one")),
        (30_021, ("dreißigtausendeinundzwanzig", "thirty thousand and twenty-one")),
        (
            471_866,
            (
                "vierhunderteinundsiebzigtausendachthundertsechsundsechzig",
                "four hundred and seventy-one thousand eight hundred and sixty-six",
            ),
        ),
    ],
)
def test_numbers_are_spelled_as_people_spell_them(number, words):
    assert (german(number), english(number)) == words


def test_no_number_is_there_twice():
    assert len({pair["source"] for pair in number_pairs()}) == NUM_PAIRS
