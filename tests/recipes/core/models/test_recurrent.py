import pytest
import torch
from torch import nn

from bigbatch.recipes.core.models.recurrent import locked_dropout, recurrent

THEIRS = {"lstm": nn.LSTM, "gru": nn.GRU}


def pair(cell, weight_dropout):
    """Return our layers and PyTorch's own with the same weights."""
    torch.manual_seed(3)
    ours = recurrent(cell, 5, 7, weight_dropout, num_layers=2)
    theirs = THEIRS[cell](5, 7, num_layers=2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("cell", THEIRS)
def test_layers_are_pytorchs_where_nothing_is_dropped(cell):
    ours, theirs = pair(cell, 0.5)
    inputs = torch.randn(3, 11, 5)
    torch.testing.assert_close(ours.eval()(inputs), theirs(inputs))


@pytest.mark.parametrize("cell", THEIRS)
def test_dropped_weights_are_pytorchs_with_the_same_weights_at_zero(cell):
    ours, theirs = pair(cell, 0.5)
    torch.manual_seed(8)
    outputs, _ = ours(torch.randn(3, 11, 5))
    torch.manual_seed(8)
    inputs = torch.randn(3, 11, 5)
    masks = [
        nn.functional.dropout(torch.ones_like(theirs.get_parameter(name)), 0.5) for name in recurrent_names(theirs)
    ]
    kept = [theirs.get_parameter(name).clone() for name in recurrent_names(theirs)]
    with torch.no_grad():
        for name, mask in zip(recurrent_names(theirs), masks, strict=True):
            theirs.get_parameter(name).mul_(mask)
    expected, _ = theirs(inputs)
    torch.testing.assert_close(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for name, mask, weight in zip(recurrent_names(theirs), masks, kept, strict=True):
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs.get_parameter(name).grad * mask)
        torch.testing.assert_close(ours.get_parameter(name).detach(), weight)  # the layer's own stay whole


def recurrent_names(layers):
    return [name for name, _ in layers.named_parameters() if name.startswith("weight_hh")]


def test_locked_dropout_drops_a_feature_of_a_row_at_all_times():
    torch.manual_seed(1)
    found = locked_dropout(torch.ones(20, 6, 30), 0.25, training=True)
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert 0.15 < (found == 0).float().mean() < 0.35
    assert torch.equal(locked_dropout(found, 0.25, training=False), found)
