"""What a card can do: the table cards.json, each figure with its source there."""

from pathlib import Path
from typing import NamedTuple

from bigbatch.launcher.documents import read_json
from bigbatch.launcher.problems import nearest
from bigbatch.recipes.core.errors import UserError

TABLE = Path(__file__).parent / "cards.json"
GIB = 2**30


class Card(NamedTuple):
    """One card of the table; rates in operations, bytes and joules a second."""

    name: str
    memory_bytes: float
    matrix_rates: dict[str, float]
    """Peak by number format, without sparsity."""
    sustained_fraction: float
    """Of the peak that a large model's layers reach, communication aside."""
    memory_bandwidth: float
    node_link: float
    """To the other cards of its node, one direction."""
    network_link: float
    """To other nodes, this card's share, one direction."""
    power_watts: float
    price_per_hour: float
    """US dollars."""

    @property
    def is_cpu(self) -> bool:
        """Whether it runs PyTorch's CPU kernels."""
        return self.name == "CPU"


def card_names() -> list[str]:
    """List the cards of the table."""
    return list(read_json(TABLE)["cards"])


def find_card(name: str) -> Card:
    """Return a card by name, whatever the case of its letters."""
    cards = {key.lower(): (key, row) for key, row in read_json(TABLE)["cards"].items()}
    if name.lower() not in cards:
        match = nearest(name.lower(), cards)
        close = f"did you mean {cards[match][0]}?" if match else f"there are: {', '.join(card_names())}"
        raise UserError("--card", f"there is no {name!r} in the table; {close}")
    key, row = cards[name.lower()]
    return Card(
        key,
        row["memory"] * GIB,
        {dtype: rate * 1e12 for dtype, rate in row["matrix_rate"].items()},
        row["sustained_fraction"],
        row["memory_bandwidth"] * 1e9,
        row["node_link"] * 1e9,
        row["network_link"] * 1e9,
        row["power"],
        row["price"],
    )
