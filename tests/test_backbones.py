"Models of other families: what is measured of them, what is refused, and the path that each is trained on."
import copy
import csv
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from llava_med.models.adapters import add_lora, attach, lora_targets
from llava_med.models.anatomy import connector, part_table, trainable_names
from llava_med.models.backbone_rows import as_sample, backbone_loss, cached_answers, plain_answers, row_batch, row_losses, text_attention, text_attention_of
from llava_med.models.backbones import GATED_FAMILIES, backbone_of, load_backbone
from llava_med.models.llava import save, tiny_model
from llava_med.models.thin_backbones import THIN, thin_backbone, thin_inputs
from llava_med.train import gates
from llava_med.train.batches import backbone_samples, pack_shared_prefixes
from llava_med.train.gates import (BackbonePath, backbone_path, backbone_probe, path_collate, path_rows, separate_losses, thin_probe,
                                   way_losses)
from llava_med.train.loop import Stage, fit
from llava_med.train.packing import ProcessedPictures, pack_rows

REPO = Path(__file__).resolve().parents[1]
# family → (path, way): what its masks and layers allow
PACKED = dict(paligemma=('packed', 'row_masks'), paligemma2=('packed', 'row_masks_eager'))
PATHS = {name: ('shared', 'row_blocks') for name in THIN} | PACKED | dict(lfm2_vl=('shared', 'prefix_cache'))
ALONE = ('paligemma', 'paligemma2', 'lfm2_vl', 'mllama')   # whose images do not go into one row, or cannot be shared


@pytest.fixture(scope='module')
def thin():
    "Each thin model once, with its probe."
    made = {}
    def get(name):
        if name not in made:
            found = thin_backbone(name)
            made[name] = found, thin_probe(found)
        return made[name]
    return get


def test_every_known_family_has_a_thin_model():
    assert {thin_backbone(name).model.config.model_type for name in THIN} == set(GATED_FAMILIES)


# The gate

FEW = ('smolvlm', 'gemma3', 'lfm2_vl')   # rows, windows and blocks of an image, a cache


def some(names):
    "Three families in the quick tests, the others in the slow ones."
    return [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in names]


@pytest.mark.parametrize('name', THIN)
def test_the_gate_of_a_family(thin, name):
    model, probe = thin(name)[0].model, thin(name)[1]
    found = backbone_path(model, *probe)
    assert (found.path, found.way) == PATHS[name], found.line
    assert max(found.loss_error, found.grad_error) <= 1e-5
    assert set(found.caught) == {'see_each_other', 'one_leak', 'positions'} and min(found.caught.values()) > 1e-3
    assert found.joins_images == (name not in ALONE[2:])
    assert ('change with the question' in found.why) == (name in PACKED)


@pytest.mark.parametrize('name', some(THIN))
def test_the_gate_under_an_adapter(name):
    thin = thin_backbone(name)
    probe = thin_probe(thin)
    adapted = attach(thin.model, LoraConfig(r=4, lora_alpha=8, target_modules=lora_targets(thin.model)))
    g = torch.Generator().manual_seed(1)
    for n, p in adapted.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .05, generator=g)    # a new adapter changes nothing
    found = backbone_path(adapted, *probe)
    assert (found.path, found.way) == PATHS[name], found.line


@pytest.mark.parametrize('name', some(THIN))
def test_the_gate_under_gradient_checkpointing(name):
    thin = thin_backbone(name)
    thin.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    thin.model.train()
    found = backbone_path(thin.model, *thin_probe(thin))
    wanted = ('plain', '') if name == 'lfm2_vl' else PATHS[name]    # which silently drops the cache of the prefix
    assert (found.path, found.way) == wanted, found.line
    assert all(m.training for m in thin.model.modules())


def test_layers_that_are_computed_again_see_the_same_blocks():
    "The backward pass of another batch comes first, so that the blocks of the first one are not the latest."
    thin = thin_backbone('gemma3')
    record, samples, pictures = thin_probe(thin)
    rows = pack_rows(pack_shared_prefixes(samples, record.image_id), 10**6)
    learn = [p for p in thin.model.parameters() if p.requires_grad]
    _, truth = separate_losses(thin.model, record, samples, pictures, learn)
    thin.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    thin.model.train()
    with text_attention(thin.model, 'row_blocks'):
        first = row_losses(thin.model, row_batch(record, rows, pictures)).mean()
        row_losses(thin.model, row_batch(record, pack_rows(samples[:1], 10**6), pictures)).mean().backward()
        found = torch.autograd.grad(first, learn, allow_unused=True)
    gap = max(float((a - b).abs().max()) for a, b in zip(truth, found) if b is not None)
    assert gap <= 1e-5


def test_a_gate_that_shows_nothing_does_not_pass(thin, monkeypatch):
    model, (record, samples, pictures) = copy.deepcopy(thin('llava')[0].model), thin('llava')[1]
    assert 'shows nothing' in backbone_path(model, record, samples, pictures[:1]*2).why
    monkeypatch.setattr(gates, '_counting_on', lambda row, image: row)
    found = backbone_path(model, record, samples, pictures)
    assert found.path == 'plain' and 'does not notice a mistake: positions' in found.why


def test_a_wrong_way_is_not_taken(thin, monkeypatch):
    model, probe = thin('smolvlm')[0].model, thin('smolvlm')[1]
    monkeypatch.setattr(gates, 'pack_shared_prefixes', lambda samples, image: [
        dict(r, more=dict(r['more'], position_ids=list(range(len(r['input_ids']))))) for r in pack_shared_prefixes(samples, image)])
    found = backbone_path(model, *probe)
    assert found.path == 'plain' and 'off by' in found.why
    monkeypatch.setattr(gates, 'way_losses', lambda *a, **kw: 1/0)
    assert 'division by zero' in backbone_path(model, *probe).line


def test_types_of_tokens_matter(thin):
    "Without them rows and samples agree, and both are wrong; so they are never left out."
    model, (record, samples, pictures) = thin('gemma3')[0].model, thin('gemma3')[1]
    right, _ = separate_losses(model, record, samples, pictures)
    for s in samples: assert sum(s['more']['token_type_ids']) == record.image_tokens
    bare = [dict(s, more=dict(s['more'], token_type_ids=[0]*len(s['input_ids']))) for s in samples]
    wrong, _ = separate_losses(model, record, bare, pictures)
    rows = pack_rows(pack_shared_prefixes(bare, record.image_id), 10**6)
    assert (way_losses(model, record, rows, pictures, 'row_masks')[0] - wrong).abs().max() < 1e-5
    assert (wrong - right).abs().max() > .01


def test_the_attention_is_put_back(thin):
    model, (record, samples, pictures) = thin('llava')[0].model, thin('llava')[1]
    was = text_attention_of(model)
    with pytest.raises(ValueError, match='reads no rows'): row_losses(model, row_batch(record, samples, pictures))
    with pytest.raises(ZeroDivisionError), text_attention(model, 'row_masks'): 1/0
    assert text_attention_of(model) == was


def test_a_row_takes_the_images_of_its_blocks(thin):
    "Rows of two pictures in a batch of two, where one row holds both."
    for name in ('smolvlm', 'molmo2', 'qwen2_5_vl'):
        model, (record, samples, pictures) = thin(name)[0].model, thin(name)[1]
        both = samples + [dict(s, image=1) for s in samples]
        shared = pack_shared_prefixes(both, record.image_id)
        rows = [pack_rows(shared, 10**6)[0], pack_rows(shared[1:], 10**6)[0]]
        truth, _ = separate_losses(model, record, both + both[3:], pictures)
        for way in ('row_blocks', 'row_masks'):
            found, _ = way_losses(model, record, rows, pictures, way)
            assert (found - truth).abs().max() < 1e-5, (name, way)


# Answers, and the table of all families

@pytest.mark.parametrize('name', some(n for n in THIN if n not in PACKED))
def test_answers_behind_a_cache_are_those_of_generate(thin, name):
    model, (record, samples, pictures) = thin(name)[0].model, thin(name)[1]
    prefix = samples[0]['input_ids'][:-len(gates._LATER[0])]
    asked = []
    for i, words in enumerate([*gates._LATER, (51, 52, 53, 54, 55), (61, 62)]):
        inputs = thin_inputs(thin(name)[0], prefix + list(words), [i % 2])
        asked.append(as_sample(model, record, inputs, 0, image=i % 2))
    truth = plain_answers(model, record, asked, pictures, 5)
    rows = pack_shared_prefixes(asked, record.image_id)
    said = [cached_answers(model, record, row, pictures, 5) for row in rows]
    assert said == [truth[::2], truth[1::2]]
    other = cached_answers(model, record, dict(rows[0], image=1), pictures, 5)
    assert other != said[0]                       # the image decides what is said


def test_the_table_of_families_is_what_the_gates_say():
    with open(REPO/'nbs/benchmarks/results/backbones.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert tuple(r['family'] for r in rows) == GATED_FAMILIES
    assert {r['family']: r['path'] for r in rows} == {f: PATHS[f][0] for f in GATED_FAMILIES}
    assert sum(r['path'] == 'shared' for r in rows) >= 15
    for r in rows:
        assert max(float(r['loss_error']), float(r['grad_error'])) <= 1e-5 and r['reason'] and r['wrong_mask_caught'] == 'True'
        assert r['answers_equal'] == r['answers'] == '50'


# Training

def trained(name, way, adapter=False):
    "Losses of a thin model in a path of its own or the plain one."
    thin = thin_backbone(name)
    record, samples, pictures = thin_probe(thin)
    model = add_lora(thin.model, 4, projector=False) if adapter else thin.model
    found = backbone_path(model, record, samples, pictures)
    assert found.path == PATHS[name][0]
    if way == 'plain': found = BackbonePath(found.family, 'plain', '')
    both = samples + [dict(s, image=1) for s in samples]
    rows = path_rows(found, record, both)
    assert len(rows) == dict(shared=2, packed=6, plain=6)[found.path]
    job = Stage(name='vqa', trainable=('projector', 'language_model'), lr=1e-3, epochs=2, batch_size=len(rows))
    return [r['loss'] for r in fit(model, rows, path_collate(found, record, pictures), job)], found


@pytest.mark.parametrize('name', some(['smolvlm', 'qwen3_vl', 'gemma3', 'lfm2_vl', 'paligemma', 'mllama']))
def test_a_path_trains_as_separate_samples_do(name):
    (plain, _), (own, found) = trained(name, 'plain'), trained(name, 'own')
    assert found.way == PATHS[name][1] and len(own) == 2 and plain[1] < plain[0] - .01
    assert own == pytest.approx(plain, abs=1e-4)


def test_an_adapter_trains_in_rows():
    (plain, _), (own, _) = trained('smolvlm', 'plain', True), trained('smolvlm', 'own', True)
    assert own == pytest.approx(plain, abs=1e-4) and plain[1] < plain[0]


def test_weights_count_in_every_way(thin):
    for name in ('smolvlm', 'lfm2_vl'):
        model, (record, samples, pictures) = thin(name)[0].model, thin(name)[1]
        weighed = [dict(s, weights=[float(i + 1)]*len(s['labels'])) for i, s in enumerate(samples)]
        truth, counts = 0., 0.
        for s in weighed:
            with torch.no_grad(): total, n = backbone_loss(model, row_batch(record, [s], pictures))
            truth, counts = truth + float(total), counts + n
        assert counts == 3*(1 + 2 + 3)
        with torch.no_grad(): total, n = backbone_loss(model, row_batch(record, weighed, pictures))
        assert (float(total), n) == (pytest.approx(truth, rel=1e-5), counts)


@pytest.mark.parametrize('name', THIN)
def test_every_weight_belongs_to_a_part(thin, name):
    "So that each part can be trained or frozen, in any family."
    model = thin(name)[0].model
    rows = {r['part']: r['parameters'] for r in part_table(model)}
    assert min(rows.values()) > 0 and sum(rows.values()) == sum(p.numel() for p in model.parameters())
    inside = {id(p) for p in connector(model).parameters()}
    named = set(trainable_names(model, ['projector']))
    assert inside <= {id(p) for n, p in model.named_parameters() if n in named}
    assert not any(n.startswith('lm_head') for n in named)


# A real processor

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp('backbone')/'small'
    save(*tiny_model(), folder)
    return folder


def test_a_folder_becomes_a_backbone(small):
    model, processor = load_backbone(small)
    record, samples, pictures = backbone_probe(model, processor)
    assert (record.family, record.image_tokens, record.coordinates) == ('llava', 64, 1)
    assert len(samples) == 3 and pictures[0]['pixel_values'].shape == (1, 3, 96, 96)
    for s in samples: assert sum(l >= 0 for l in s['labels']) > 0 and s['input_ids'].count(record.image_id) == 64
    assert backbone_path(model, record, samples, pictures).family == 'llava'


def test_questions_of_a_set_are_trained_with_the_models_own_processor(small):
    from PIL import Image
    images = {n: Image.new('RGB', (120, 96), n) for n in ('red', 'blue')}
    asked = [('red', 'Why?', 'yes'), ('red', 'What is it?', 'a nodule'), ('blue', 'Where?', 'left lung'), ('blue', 'Is it small?', 'no')]
    records = [dict(id=str(i), image=n, conversations=[{'from': 'human', 'value': f'<image>\n{q}'}, {'from': 'gpt', 'value': a}])
               for i, (n, q, a) in enumerate(asked)]
    losses = []
    for path in ('shared', 'plain'):
        model, processor = load_backbone(small)
        record = backbone_of(model, processor, images['red'])
        samples, names = backbone_samples(model, processor, record, records, images.__getitem__)
        assert names == ['red', 'blue'] and [s['image'] for s in samples] == [0, 0, 1, 1]
        found = BackbonePath('llava', path, '', 'row_blocks' if path == 'shared' else '')
        pictures = ProcessedPictures(processor, record, names, images.__getitem__, most=1)
        rows = path_rows(found, record, samples)
        job = Stage(name='vqa', trainable=('projector', 'language_model'), lr=1e-2, epochs=2, batch_size=len(rows))
        losses.append([r['loss'] for r in fit(model, rows, path_collate(found, record, pictures), job)])
        assert len(rows) == dict(shared=2, plain=4)[path] and len(pictures.kept) == 1
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][1] < losses[0][0]


@pytest.mark.parametrize('change, says', [
    ('family', "family 'aria', which has no gate here; take a model of llava, "), ('config', 'holds no config.json'),
    ('processor', 'has no processor: copy preprocessor_config.json'), ('strange', 'not a LlavaProcessor; take both of one checkpoint'),
    ('weights', 'cannot be read as a model of the family'), ('adapter', 'is an adapter and no model by itself')])
def test_what_cannot_be_had_is_refused_in_one_sentence(small, tmp_path, change, says):
    import shutil
    folder = tmp_path/'changed'
    shutil.copytree(small, folder)
    def written(name, old, new):
        text = (folder/name).read_text()
        assert old in text
        (folder/name).write_text(text.replace(old, new))
    if change == 'family': written('config.json', '"model_type": "llava"', '"model_type": "aria"')
    if change in ('config', 'adapter'): (folder/'config.json').unlink()
    if change == 'adapter': (folder/'adapter_config.json').write_text('{}')
    if change == 'processor':
        for name in ('preprocessor_config.json', 'processor_config.json'): (folder/name).unlink()
    if change == 'strange':
        for name in ('preprocessor_config.json', 'processor_config.json'): written(name, 'LlavaProcessor', 'LlavaNextProcessor')
    if change == 'weights': (folder/'model.safetensors').unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: load_backbone(folder)
    assert '\n' not in str(e.value) and str(folder) in str(e.value)


def test_a_gated_repository_names_its_licence(monkeypatch):
    from llava_med.models import backbones
    def gated(**kw): raise OSError('You are trying to access a gated repo.\nMake sure to have access to it.')
    monkeypatch.setattr(backbones.AutoConfig, 'from_pretrained', gated)
    with pytest.raises(ValueError, match='is gated: accept its licence at https://huggingface.co/google/medgemma-4b-it and set HF_TOKEN'):
        load_backbone('google/medgemma-4b-it')


def test_a_processor_of_other_image_sizes_is_refused(small):
    from PIL import Image
    model, processor = load_backbone(small)
    processor.num_additional_image_tokens += 1
    with pytest.raises(ValueError, match='writes 65 image tokens for a picture and the model has 64 vectors'):
        backbone_of(model, processor, Image.new('RGB', (96, 96)))
