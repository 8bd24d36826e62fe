import pytest
import torch
from torch import nn

from bigbatch.recipes.classify.backbones import AttentionBackbone, RecurrentBackbone, TokenEmbedding
from bigbatch.recipes.classify.config import AttentionBackboneSection, RecurrentBackboneSection

VOCABULARY_SIZE = 50
TEXTS = [[3, 7, 9, 9, 4], [8], [5, 1, 0, 2, 7, 9, 3], [6, 6], [1, 2, 3, 4]]


def lay_out(rows):
    """Return (tokens, documents, firsts, lengths) of windows that lie in rows; padding is token 0."""
    count, width = sum(len(row) for row in rows), max(sum(len(window) for window in row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    documents = torch.full((len(rows), width), count, dtype=torch.int32)
    firsts, lengths = [], []
    for index, row in enumerate(rows):
        start = 0
        for window in row:
            tokens[index, start : start + len(window)] = torch.tensor(window)
            documents[index, start : start + len(window)] = len(firsts)
            firsts.append(index * width + start)
            lengths.append(len(window))
            start += len(window)
    return tokens, documents, torch.tensor(firsts), torch.tensor(lengths)


PACKED = lay_out([[TEXTS[0], TEXTS[1]], [TEXTS[2]], [TEXTS[3], TEXTS[4]]])
PADDED = lay_out([[text] for text in TEXTS])


def redraw(model):
    """Give every parameter numbers of order one, so that nothing is near zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def attention(**settings):
    section = AttentionBackboneSection(backbone="attention", embedding_size=16, num_heads=2, **settings)
    return redraw(AttentionBackbone(section, VOCABULARY_SIZE, 16))


def recurrent(**settings):
    section = RecurrentBackboneSection(backbone="rnn", embedding_size=6, hidden_size=5, **settings)
    return redraw(RecurrentBackbone(section, VOCABULARY_SIZE))


@pytest.mark.parametrize(("num_layers", "bigram_buckets"), [(0, 0), (2, 0), (0, 11), (1, 11)])
def test_packed_padded_and_single_texts_have_the_same_features(num_layers, bigram_buckets):
    model = attention(num_layers=num_layers, bigram_buckets=bigram_buckets).eval()
    packed, padded = model(*PACKED), model(*PADDED)
    assert packed.shape == (len(TEXTS), model.feature_size)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    alone = torch.cat([model(*lay_out([[text]])) for text in TEXTS])
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)


def test_packed_and_padded_texts_give_the_same_gradients():
    model = attention(num_layers=1, dropout=0.0, embedding_dropout=0.0)
    gradients = []
    for batch in (PACKED, PADDED):
        model.zero_grad()
        model(*batch).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for packed, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_batch_of_texts_has_the_features_of_its_texts_one_by_one(cell, pooling):
    model = recurrent(cell=cell, pooling=pooling, num_layers=2, bigram_buckets=11).eval()
    found = model(*PADDED)
    assert found.shape == (len(TEXTS), model.feature_size)
    torch.testing.assert_close(found, torch.cat([model(*lay_out([[text]])) for text in TEXTS]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_features_equal_those_of_cells_called_step_by_step(bidirectional):
    poolings = {
        "last": lambda forward, backward: torch.cat([forward[-1:], backward[:1]], -1)[0],
        "mean": lambda forward, backward: torch.cat([forward, backward], -1).mean(0),
        "max": lambda forward, backward: torch.cat([forward, backward], -1).amax(0),
    }
    models = {name: recurrent(pooling=name, bidirectional=bidirectional).eval() for name in poolings}
    for name, pool in poolings.items():
        model, expected = models[name], []
        for text in TEXTS:
            embedded = model.embed.tokens.weight[torch.tensor(text)]
            forward = run_cell(model.layers, "", embedded)
            backward = run_cell(model.layers, "_reverse", embedded.flip(0)).flip(0) if bidirectional else forward[:, :0]
            expected.append(pool(forward, backward))
        torch.testing.assert_close(model(*PADDED), torch.stack(expected), atol=1e-6, rtol=0)


def run_cell(layers, direction, embedded):
    """Return the states [T, hidden] of one direction of a one-layer LSTM, by torch's cell alone."""
    cell = nn.LSTMCell(layers.input_size, layers.hidden_size)
    cell.load_state_dict({key: getattr(layers, f"{key}_l0{direction}") for key in cell.state_dict()})
    state, states = None, []
    for vector in embedded:
        state = cell(vector, state)
        states.append(state[0])
    return torch.stack(states)


def test_the_order_of_tokens_counts_by_their_pairs_and_by_layers_alone():
    batch, reordered = lay_out([[[3, 7, 9]]]), lay_out([[[7, 3, 9]]])
    for settings, is_blind in (({}, True), ({"bigram_buckets": 1000}, False), ({"num_layers": 1}, False)):
        model = attention(**{"num_layers": 0} | settings).eval()
        assert torch.allclose(model(*batch), model(*reordered), atol=1e-6) == is_blind


def test_the_vector_of_a_pair_is_added_at_its_second_token():
    section = AttentionBackboneSection(backbone="attention", embedding_size=4, num_heads=1, bigram_buckets=5)
    embed = TokenEmbedding(section, VOCABULARY_SIZE).eval()
    tokens, documents, *_ = lay_out([[[3, 7, 9], [9, 2]]])
    single = embed.tokens(tokens)[0]
    pairs = [None, (3, 7), (7, 9), None, (9, 2)]
    buckets = [(a * 1_000_003 + b * 7_919) % 2_147_483_647 % 5 for a, b in filter(None, pairs)]
    vectors = iter(embed.bigrams.weight[buckets])
    expected = torch.stack(
        [vector + (next(vectors) if pair else 0) for vector, pair in zip(single, pairs, strict=True)]
    )
    torch.testing.assert_close(embed(tokens, documents)[0], expected)


@pytest.mark.parametrize("build", [attention, recurrent])
def test_bfloat16_trains_on_a_cpu(build):
    model = build(bigram_buckets=3).bfloat16()
    features = model(*PADDED)
    assert features.dtype == torch.bfloat16
    features.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("build", [attention, recurrent])
def test_dropout_acts_in_training_only(build):
    model = build()
    assert not torch.equal(model(*PADDED), model(*PADDED))
    model.eval()
    assert torch.equal(model(*PADDED), model(*PADDED))
