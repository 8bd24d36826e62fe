"""Triples as lines of N-Triples, read again by rdflib, and what cannot be taken."""

import json
from urllib.parse import quote

import pytest
import rdflib
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.predict import Item
from bigbatch.tools.triples import Settings, Triple, as_json, find_triples, literal, main, n_triples

NAMED = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


def entity(text, kind="thing", start=0):
    return {"text": text, "type": kind, "start": start, "end": start + len(text)}


def graph(lines):
    return set(rdflib.Graph().parse(data="\n".join(lines) + "\n", format="nt"))


@given(NAMED, NAMED, NAMED)
def test_every_name_comes_out_of_rdflib_as_it_went_in(name, kind, relation):
    triple = Triple(entity(name, kind), relation, entity("Bern", "place"), 0.9)
    found = graph(n_triples([triple], "http://example.org/"))
    labels = {str(value) for _, predicate, value in found if predicate == rdflib.RDFS.label}
    assert labels == {" ".join(name.split()), "Bern"}
    assert sum(
        predicate == rdflib.URIRef(f"http://example.org/{quote(relation, safe='')}") for _, predicate, _ in found
    )
    assert {kind for _, predicate, kind in found if predicate == rdflib.RDF.type} >= {
        rdflib.URIRef("http://example.org/place")
    }


def test_a_triple_is_two_nodes_with_types_and_names_and_what_relates_them():
    triple = Triple(entity('O"Neil\\', "person"), "lives in", entity("New Ulm", "place"), 0.9)
    found = list(n_triples([triple], "urn:x:"))
    assert found[-1] == "<urn:x:person/O%22Neil%5C> <urn:x:lives%20in> <urn:x:place/New%20Ulm> ."
    assert found[1].endswith('"O\\"Neil\\\\" .')
    assert len(graph(found)) == 5
    assert literal("a\tb\nc\x01") == '"a\\tb\\nc\\u0001"'
    assert list(n_triples("cannot be taken", "urn:x:")) == []


def test_each_pair_within_reach_is_asked_about_once_and_directions_are_followed():
    asked = []

    def entities(texts):
        return [{"entities": [entity("Cyd", start=21), entity("Ada"), entity("Bo", start=4)]} for _ in texts]

    def relations(texts):
        asked.extend(texts)
        answers = ({"name": "knows", "subject": "e2"}, None)
        return [{"label": "", "relation": answers[number % 2], "probability": 0.75} for number in range(len(texts))]

    counts = dict.fromkeys(("texts", "entities", "pairs", "triples", "not taken"), 0)
    items = [Item("Ada Bo and also, or? Cyd")]
    (found,) = find_triples(entities, relations, items, Settings(0.5, 15), counts)
    assert asked == [
        "<e1>Ada</e1> <e2>Bo</e2> and also, or? Cyd",
        "Ada <e1>Bo</e1> and also, or? <e2>Cyd</e2>",
    ]
    assert [(triple.subject["text"], triple.relation, triple.object["text"]) for triple in found] == [
        ("Bo", "knows", "Ada")
    ]
    assert counts == {"texts": 1, "entities": 3, "pairs": 2, "triples": 1, "not taken": 0}
    assert json.loads(as_json(items[0], found))["triples"][0]["relation"] == "knows"
    (found,) = find_triples(entities, relations, items, Settings(0.8, 15), counts)
    assert found == []
    with pytest.raises(UserError, match=r"ENTITIES: is a model that finds no entities"):
        find_triples(relations, relations, items, Settings(0.5, 15), counts)


def test_an_iri_that_is_none_and_no_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--base: 'example org' is no absolute IRI"):
        main(["a", "b", "text", "--base", "example org"])
    with pytest.raises(UserError, match=r"TEXT: and --file are both given, or neither"):
        main(["a", "b"])
