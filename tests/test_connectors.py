"A connector of one's own: trained, saved, loaded, and asked on both paths with equal answers."
import copy
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_med.core.registry import UnknownName
from llava_med.generate.answers import answer, plain_answer, slow_because
from llava_med.models.adapters import add_lora, load_adapter, merge, save_adapter
from llava_med.models.anatomy import connector, decoder, image_tokens, part_table, put_part, set_trainable, vision_features
from llava_med.models.connectors import CONNECTORS, connector_record, put_connector
from llava_med.core.cards import write_card
from llava_med.models.llava import load, save, tiny_model
from llava_med.train.batches import Collator, batch_loss, record_samples


class Pool(nn.Module):
    "Averages groups of patches."
    def __init__(self, vision_width, text_width, tokens_in, groups=16):
        super().__init__()
        if tokens_in % groups: raise ValueError(f'{tokens_in} patches are no multiple of {groups} groups.')
        self.tokens_out, self.linear = groups, nn.Linear(vision_width, text_width)

    def forward(self, features):
        n, _, width = features.shape
        return self.linear(features.reshape(n, self.tokens_out, -1, width).mean(2))*5


@pytest.fixture(autouse=True)
def toy():
    CONNECTORS['toy_pool'] = Pool
    yield
    CONNECTORS.pop('toy_pool', None)


@pytest.fixture
def pooled():
    model, processor = tiny_model(connector='toy_pool', seed=1)
    with torch.no_grad():
        for p in decoder(model).parameters():   # enough that answers depend on the image
            if p.dim() > 1: p.mul_(15)
    return model, processor


def pictures(n=3):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)) for _ in range(n)]


def asked(processor, text='<image>left'): return processor(images=pictures(1)[0], text=text, return_tensors='pt')


def test_both_paths_give_the_same_answers_before_and_after_a_file(pooled, tmp_path):
    model, processor = pooled
    images, prompts = [p for p in pictures() for _ in range(2)], ['left?', 'where is the nodule?']*3
    said = answer(model, processor, images, prompts, max_new_tokens=8)
    assert slow_because(model) is None and len(set(said)) > 1
    assert said == plain_answer(model, processor, images, prompts, max_new_tokens=8)
    again, processor2 = load(save(model, processor, tmp_path/'m'))
    with torch.no_grad(): assert torch.equal(again(**asked(processor2)).logits, model(**asked(processor)).logits)
    assert answer(again, processor2, images, prompts, max_new_tokens=8) == said
    assert plain_answer(again, AutoProcessor.from_pretrained(tmp_path/'m'), images, prompts, max_new_tokens=8) == said


def test_two_images_in_one_question(pooled):
    model, processor = pooled
    a, b = pictures(2)
    assert answer(model, processor, [[a, b], [b, a]], ['left?', 'left?']) == plain_answer(model, processor, [[a, b], [b, a]], ['left?', 'left?'])


def test_it_learns_from_pixels_and_from_features_alike(pooled):
    model, processor = pooled
    record = dict(id='1', image='a.png', conversations=[{'from': 'human', 'value': '<image>\nwhere?'}, {'from': 'gpt', 'value': 'left lung'}])
    samples, _ = record_samples([record], processor.tokenizer, image_tokens(model))
    assert samples[0]['input_ids'].count(model.config.image_token_id) == 16
    px = asked(processor)['pixel_values']
    set_trainable(model, ['projector'])
    assert {r['part'] for r in part_table(model) if r['trainable']} == {'projector'}
    loss, n = batch_loss(model, Collator(processor.tokenizer.pad_token_id, vision_features(model, px))(samples))
    loss.backward()
    assert connector(model).linear.weight.grad.abs().sum() > 0
    labels = torch.tensor([samples[0]['labels']])
    with torch.no_grad(): whole = model(input_ids=torch.tensor([samples[0]['input_ids']]), pixel_values=px, labels=labels).loss
    assert torch.allclose(loss/n, whole, atol=1e-5)


def test_plain_transformers_loads_the_rest_and_does_not_answer(pooled, tmp_path):
    save(*pooled, tmp_path/'m')
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path/'m', output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    with pytest.raises(ValueError, match='do not match'): plain(**asked(pooled[1]))
    text = write_card(tmp_path/'m', 'x', ['none'], 'mit').read_text()
    assert 'connector folder: The folder `connector` belongs to this model' in text and 'from llava_med.models.llava import load' in text
    assert 'AutoModelForImageTextToText.from_pretrained' not in text


def test_saved_twice_and_in_another_format(pooled, tmp_path):
    model, processor = load(save(*pooled, tmp_path/'a', dtype='bfloat16'))
    assert torch.equal(connector(model).linear.weight, pooled[0].model.multi_modal_projector.linear.weight.bfloat16().float())
    save(model, processor, tmp_path/'a')
    again = load(tmp_path/'a')[0]
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), again.state_dict().values()))
    put_connector(again, processor, 'mlp')
    third, _ = load(save(again, processor, tmp_path/'a'))
    assert connector_record(third) == {} and image_tokens(third) == 64 and not (tmp_path/'a/connector').exists()


@pytest.mark.parametrize('connector_of_base', ['mlp', 'linear'])
def test_any_base_and_an_adapter_on_top(connector_of_base, tmp_path):
    model, processor = tiny_model(connector=connector_of_base)
    put_connector(model, processor, 'toy_pool', groups=4)
    assert 'projector' in {r['part'] for r in part_table(model) if set_trainable(model, ['projector']) and r['trainable']}
    save(model, processor, tmp_path/'base')
    adapted = add_lora(copy.deepcopy(model), 2)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(torch.randn_like(p)*.05)
    want = adapted(**asked(processor)).logits
    adapter = save_adapter(adapted, tmp_path/'adapter')
    with pytest.raises(ValueError, match='before the adapter'): put_connector(adapted, processor, 'toy_pool')
    merged, p2 = load(save(merge(load_adapter(load(tmp_path/'base')[0], adapter)), processor, tmp_path/'merged'))
    assert torch.allclose(merged(**asked(p2)).logits, want, atol=1e-5) and image_tokens(merged) == 4


# What does not fit

def spoil(folder, **change):
    f = folder/'connector/config.json'
    f.write_text(json.dumps({**json.loads(f.read_text()), **change}))

def lose_key(folder):
    f = folder/'connector/config.json'
    f.write_text(json.dumps({k: v for k, v in json.loads(f.read_text()).items() if k != 'options'}))

def unmarked(folder):
    config = json.loads((folder/'config.json').read_text())
    del config['connector']
    (folder/'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('damage, words', [
    (lambda d: shutil.rmtree(d/'connector'), 'there is no connector/config.json'),
    (lambda d: (d/'connector/model.safetensors').unlink(), 'there is no connector/model.safetensors'),
    (lambda d: (d/'connector/model.safetensors').write_bytes(b'x'*50), 'holds other weights'),
    (lambda d: (d/'connector/config.json').write_text('{'), 'cannot be read'),
    (lose_key, 'not complete'),
    (lambda d: spoil(d, name='other'), "holds other weights .'other'"),
    (lambda d: spoil(d, options={'groups': 5}), 'no multiple of 5 groups'),
    (lambda d: spoil(d, options={'group': 16}), "unexpected keyword argument 'group'"),
    (lambda d: spoil(d, tokens_in=256), 'made for 256 vectors of width 32; this tower gives 64'),
    (unmarked, 'its config.json does not name'),
])
def test_a_damaged_folder_is_refused_in_one_sentence(damage, words, pooled, tmp_path):
    damage(save(*pooled, tmp_path/'m'))
    with pytest.raises(ValueError, match=words) as e: load(tmp_path/'m')
    assert str(tmp_path/'m') in str(e.value) and '\n' not in str(e.value)


def test_the_folder_of_another_checkpoint_is_refused(pooled, tmp_path):
    save(*pooled, tmp_path/'a'); save(*tiny_model(connector='toy_pool', seed=2), tmp_path/'b')
    shutil.rmtree(tmp_path/'a/connector'); shutil.copytree(tmp_path/'b/connector', tmp_path/'a/connector')
    with pytest.raises(ValueError, match='holds other weights'): load(tmp_path/'a')


def test_a_connector_without_its_recipe_names_the_module(pooled, tmp_path):
    save(*pooled, tmp_path/'m')
    del CONNECTORS['toy_pool']
    with pytest.raises(UnknownName, match="needs the connector 'toy_pool'.*import its module '.*test_connectors' first"): load(tmp_path/'m')


def test_a_recipe_of_this_library_is_imported(pooled, tmp_path, monkeypatch):
    model, processor = pooled
    connector(model)._record['module'] = 'llava_med.recipes.toy'
    save(model, processor, tmp_path/'m')
    del CONNECTORS['toy_pool']
    with pytest.raises(UnknownName, match='no recipe module'): load(tmp_path/'m')
    class Finder:
        @staticmethod
        def find_spec(name, *a):
            if name != 'llava_med.recipes.toy': return None
            from importlib.machinery import ModuleSpec
            return ModuleSpec(name, types.SimpleNamespace(create_module=lambda s: None, exec_module=lambda m: CONNECTORS.update(toy_pool=Pool)))
    monkeypatch.setattr(sys, 'meta_path', [Finder, *sys.meta_path])
    assert connector_record(load(tmp_path/'m')[0])['options'] == {}


def test_names_and_options_are_checked_before_anything_changes(pooled):
    model, processor = pooled
    before = connector(model)
    for name, options, words in (('toy_pol', {}, 'Did you mean toy_pool'), ('toy_pool', dict(group=2), 'cannot be built'), ('mlp', dict(groups=2), 'has no options'),
                                 ('toy_pool', dict(groups={1}), 'not JSON serializable')):
        with pytest.raises(ValueError, match=words): put_connector(model, processor, name, **options)
    assert connector(model) is before
    with pytest.raises(UnknownName, match='no connector named'): tiny_model(connector='deep')


def test_a_connector_that_gives_another_number_is_refused():
    class Liar(Pool):
        def forward(self, features): return super().forward(features)[:, 1:]
    CONNECTORS['toy_pool'] = Liar
    with pytest.raises(ValueError, match=r'gives \(1, 15, 32\) for one image.*should be \(1, 16, 32\)'): tiny_model(connector='toy_pool')


def test_another_number_of_tokens_behind_the_back_of_the_processor_is_noticed(pooled):
    model, processor = pooled
    put_part(model, 'projector', Pool(32, 32, 64, 4))   # behind the back of processor and configuration
    with pytest.raises(ValueError): plain_answer(model, processor, pictures(1), ['left?'])
