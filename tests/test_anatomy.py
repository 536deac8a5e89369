"Parts found with and without adapters, patterns of weights that learn, and a hash that is computed once."
import pytest
import torch
from torch import nn

from llava_med.core.registry import UnknownName
from llava_med.models import llava
from llava_med.models.adapters import add_lora
from llava_med.models.anatomy import (PARTS, check_patterns, connector, decoder, decoder_layers, head, image_token,
                                      image_tokens, part_table, set_trainable, tower, trainable_names, vision_features)
from llava_med.models.llava import tensors_hash, tiny_model, weights_hash


@pytest.fixture
def model(): return tiny_model()[0]


def test_an_adapter_around_the_model_moves_no_part(model):
    before = [tower(model), decoder(model), *decoder_layers(model)]
    px = torch.rand(2, 3, 96, 96)
    features = vision_features(model, px)
    adapted = add_lora(model, 2)
    assert all(a is b for a, b in zip(before, [tower(adapted), decoder(adapted), *decoder_layers(adapted)]))
    assert torch.equal(vision_features(adapted, px), features)
    assert connector(adapted)(features).shape == (2, 64, 32) and head(adapted).out_features == model.config.text_config.vocab_size
    assert (image_token(adapted), image_tokens(adapted)) == (model.config.image_token_id, 64)


def test_what_is_no_llava_is_named():
    with pytest.raises(ValueError, match='Linear has no vision_tower; give a LLaVA'): tower(nn.Linear(2, 2))


@pytest.mark.parametrize('patterns', [['projector'], ['projector', 'language_model'], list(PARTS), ['last_block'], ['norms', 'projector'],
                                      ['*vision_tower*bias'], ['model.language_model.layers.0.*']])
def test_exactly_the_named_weights_learn(model, patterns):
    n = set_trainable(model, patterns)
    names = [x for x, p in model.named_parameters() if p.requires_grad]
    assert names == trainable_names(model, patterns) and 0 < n == sum(r['trainable'] for r in part_table(model))
    if set(patterns) <= set(PARTS): assert {r['part'] for r in part_table(model) if r['trainable']} == set(patterns)


def test_patterns_that_are_wrong(model):
    with pytest.raises(UnknownName, match="no trainable pattern named 'head'.*Known: biases, language_model, last_block"): check_patterns(['head'])
    with pytest.raises(UnknownName): set_trainable(model, ['projector', 'head'])
    for patterns, words in ((['biases'], "'biases' fits no weight"), (['projector', '*nowhere*'], r"'\*nowhere\*' fits no weight"),
                            ([], 'nothing would learn'), ('projector', r"a list, such as \['projector'\]")):
        with pytest.raises(ValueError, match=words): set_trainable(model, patterns)


def test_the_identity_of_a_linear_connector_stays():
    model = tiny_model(connector='linear')[0]
    set_trainable(model, ['projector', '*multi_modal_projector*'])
    assert not any(p.requires_grad for p in connector(model).linear_2.parameters())
    with pytest.raises(ValueError, match='nothing would learn'): set_trainable(model, ['*projector.linear_2*'])


@pytest.fixture
def hashed(monkeypatch):
    calls = []
    monkeypatch.setattr(llava, 'tensors_hash', lambda state: calls.append(1) or tensors_hash(state))
    return calls


def test_unchanged_weights_are_hashed_once(model, hashed):
    assert weights_hash(model) == weights_hash(model) == tensors_hash(model.state_dict())
    assert len(hashed) == 1
    weights_hash(tower(model)); weights_hash(model)
    assert len(hashed) == 2, 'a part has a hash of its own'


def in_place(m):
    with torch.no_grad(): m.weight[3, 4] += 1

def through_data(m): m.weight.data.mul_(1.5)

def replaced(m): m.weight = nn.Parameter(m.weight.detach() + 1)

def another_storage(m): m.weight.data = m.weight.data + 1

def by_an_optimizer(m):
    m(torch.ones(1, m.in_features)).sum().backward()
    torch.optim.AdamW(m.parameters()).step()

def loaded(m): m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})


@pytest.mark.parametrize('change', [in_place, through_data, replaced, another_storage, by_an_optimizer, loaded])
def test_a_changed_weight_is_hashed_again(change):
    layer = nn.Linear(40, 30)
    before = weights_hash(layer)
    change(layer)
    assert weights_hash(layer) == tensors_hash(layer.state_dict()) != before


def test_tensors_without_a_count_of_changes_are_hashed_every_time(hashed):
    with torch.inference_mode(): layer = nn.Linear(4, 4)
    before = weights_hash(layer)
    with torch.inference_mode(): layer.weight[0, 0] += 1
    assert weights_hash(layer) != before and len(hashed) == 2
